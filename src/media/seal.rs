//! Good checksums for whatever bytes lie where a structure belongs, so that hostile numbers get past them.
//! For tests only; nothing that ships seals what it has not made.

use super::checksum::{ChecksumSeed, Checksums};
use super::kset::{KEY_SIZE_BYTES, KSET_HEADER_SIZE_BYTES, KSET_KEYS_MAX, KsetHeaderOnMedia};
use super::layout::{Geometry, SUPERBLOCK_OFFS, TAILS_OFFS};
use super::segment_info::SegmentInfoOnMedia;
use super::superblock::SuperblockOnMedia;
use super::tails::TailsOnMedia;
use crate::pmem::{LINE_SIZE_BYTES, Pmem};
use crate::units::{Agent, Generation, PmemOff, SegId};
use zerocopy::FromBytes;

/// Where a structure, or one copy of it, lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spot {
    /// The first byte.
    pub off: PmemOff,
    /// The bytes that the checksum covers, and itself; whole lines are taken up.
    pub len_bytes: usize,
    seed: ChecksumSeed,
}

impl Spot {
    /// A copy, 0 or 1, of the superblock.
    #[must_use]
    pub fn superblock(copy: usize) -> Self {
        Self {
            off: SUPERBLOCK_OFFS[copy],
            len_bytes: size_of::<SuperblockOnMedia>(),
            seed: Checksums::superblock(),
        }
    }

    /// A copy, 0 or 1, of the tails.
    #[must_use]
    pub fn tails(checksums: &Checksums, copy: usize) -> Self {
        Self {
            off: TAILS_OFFS[copy],
            len_bytes: size_of::<TailsOnMedia>(),
            seed: checksums.tails(),
        }
    }

    /// A copy, 0 or 1, of the info of a segment.
    #[must_use]
    pub fn segment_info(
        geometry: &Geometry,
        checksums: &Checksums,
        segment: SegId,
        copy: usize,
    ) -> Self {
        Self {
            off: geometry.info_offs(segment)[copy],
            len_bytes: size_of::<SegmentInfoOnMedia>(),
            seed: checksums.segment_info(segment.0),
        }
    }

    /// A kset at byte `off` of a segment, with as many keys as the bytes there say; `None` where it cannot
    /// have so many.
    #[must_use]
    pub fn kset<P: Pmem>(
        pmem: &P,
        geometry: &Geometry,
        checksums: &Checksums,
        (segment, generation): (SegId, Generation),
        off: u32,
    ) -> Option<Self> {
        let room = geometry.segment_size_bytes().checked_sub(u64::from(off))?;
        let at = geometry.segment_off(segment).plus(u64::from(off));
        let mut line = [0; LINE_SIZE_BYTES as usize];
        if room < LINE_SIZE_BYTES || pmem.read(at, &mut line).is_err() {
            return None;
        }
        let (header, _) = KsetHeaderOnMedia::read_from_prefix(&line).ok()?;
        let key_count = header.key_count() as usize;
        let len_bytes = KSET_HEADER_SIZE_BYTES + key_count.min(KSET_KEYS_MAX) * KEY_SIZE_BYTES;
        let possible = (1..=KSET_KEYS_MAX).contains(&key_count) && len_bytes as u64 <= room;
        possible.then_some(Self {
            off: at,
            len_bytes,
            seed: checksums.kset(segment.0, generation.0),
        })
    }

    /// Gives the kset in `bytes` another number in its segment, and a later place in the order.
    pub fn renumber_kset(bytes: &mut [u8], kset_index: u32, add_to_seq: u64) {
        if let Ok((header, _)) = KsetHeaderOnMedia::mut_from_prefix(bytes) {
            header.renumber(kset_index, add_to_seq);
        }
    }

    /// Bytes taken up.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.len_bytes.next_multiple_of(LINE_SIZE_BYTES as usize)
    }

    /// Whether the checksum is good.
    #[must_use]
    pub fn is_sealed<P: Pmem>(&self, pmem: &P) -> bool {
        let mut bytes = vec![0; self.len_bytes];
        pmem.read(self.off, &mut bytes).is_ok() && bytes[..4] == self.checksum_of(&bytes)
    }

    /// Every structure starts with its checksum.
    fn checksum_of(&self, bytes: &[u8]) -> [u8; 4] {
        let crc = self.seed.checksum(&bytes[4..self.len_bytes]);
        crc.to_le_bytes()
    }

    /// Lets `change` do what it likes with the bytes, and makes their checksum good. Durable when it returns.
    ///
    /// # Panics
    /// The memory cannot be read.
    pub fn edit<P: Pmem>(&self, pmem: &P, change: impl FnOnce(&mut [u8])) {
        let mut bytes = vec![0; self.size_bytes()];
        pmem.read(self.off, &mut bytes)
            .expect("hostile media are not poisoned");
        change(&mut bytes);
        let checksum = self.checksum_of(&bytes);
        bytes[..4].copy_from_slice(&checksum);
        let agent = Agent(0);
        pmem.store(agent, self.off, &bytes);
        drop(pmem.fence(agent));
    }
}
