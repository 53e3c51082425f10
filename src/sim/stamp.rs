//! The content of blocks in simulations: every word says which write it is of, of which block, and which
//! word of it, so that data that are torn, misplaced or somebody else's are recognised.

use std::fmt;

const WORD: usize = 8;
const ID_BITS: u32 = 24;
const LBA_BITS: u32 = 24;

/// Which write a block is of; 0 stands for zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp(pub u32);

impl Stamp {
    /// The stamp of a block of zeroes.
    pub const ZERO: Stamp = Stamp(0);
}

/// A block that no write can have left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Garbage {
    /// The first word, and the first that does not go with it.
    pub words: [u64; 2],
    /// Where in the block the second lies.
    pub at: usize,
}

impl fmt::Display for Garbage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b] = self.words.map(|word| {
            let (id, lba) = (word >> (64 - ID_BITS), word >> 16 & ((1 << LBA_BITS) - 1));
            format!(
                "{word:#x} (write {id}, block {lba}, word {})",
                word & 0xffff
            )
        });
        write!(f, "it starts with {a}, but word {} is {b}", self.at)
    }
}

fn word(stamp: Stamp, lba: u64, number: usize) -> u64 {
    if stamp == Stamp::ZERO {
        return 0;
    }
    assert!(
        stamp.0 < 1 << ID_BITS && lba < 1 << LBA_BITS,
        "a simulation is short and small"
    );
    u64::from(stamp.0) << (64 - ID_BITS) | lba << 16 | (number as u64 + 1)
}

/// Fills a block.
pub fn fill(block: &mut [u8], stamp: Stamp, lba: u64) {
    let base = word(stamp, lba, 0);
    let step = u64::from(stamp != Stamp::ZERO);
    for (number, bytes) in block.as_chunks_mut::<WORD>().0.iter_mut().enumerate() {
        *bytes = (base + step * number as u64).to_le_bytes();
    }
}

/// Which write a block is of.
///
/// # Errors
/// It is not of one write, or not of this block.
pub fn read(block: &[u8], lba: u64) -> Result<Stamp, Garbage> {
    let words = block.as_chunks::<WORD>().0;
    let first = u64::from_le_bytes(words[0]);
    let stamp = Stamp((first >> (64 - ID_BITS)) as u32);
    let expected = word(stamp, lba, 0);
    let step = u64::from(stamp != Stamp::ZERO);
    for (number, bytes) in words.iter().enumerate() {
        let found = u64::from_le_bytes(*bytes);
        if found != expected + step * number as u64 {
            return Err(Garbage {
                words: [first, found],
                at: number,
            });
        }
    }
    Ok(stamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_tells_its_write_and_a_misplaced_or_torn_one_is_garbage() {
        let mut block = [0; 512];
        assert_eq!(read(&block, 9), Ok(Stamp::ZERO));
        fill(&mut block, Stamp(77), 9);
        assert_eq!(read(&block, 9), Ok(Stamp(77)));
        assert!(read(&block, 10).is_err());
        let mut other = [0; 512];
        fill(&mut other, Stamp(78), 9);
        other[..64].copy_from_slice(&block[..64]);
        assert_eq!(read(&other, 9).unwrap_err().at, 8);
        block.rotate_left(8);
        assert!(read(&block, 9).is_err());
        block[500] ^= 1;
        assert!(read(&block, 9).is_err());
    }
}
