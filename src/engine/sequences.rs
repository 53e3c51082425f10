//! Which reads go on where others ended: a scan is told from requests for what is wanted again.

use crate::units::Lba;

/// Sequences of one channel that are told apart; the one that was longest without a read makes way.
const SEQUENCE_COUNT: usize = 8;

/// Reads one behind the other.
#[derive(Clone, Copy, Debug, Default)]
struct Sequence {
    /// Where the next one would begin.
    end: u64,
    len_blocks: u64,
    /// When it was read last, in reads.
    used: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Sequences {
    known: [Sequence; SEQUENCE_COUNT],
    reads: u64,
}

impl Sequences {
    /// Notes a read. Returns how many blocks the sequence has with it. A gap of up to `gap_blocks` is what others
    /// have found in the cache.
    pub(super) fn note(&mut self, lba: Lba, len_blocks: u64, gap_blocks: u64) -> u64 {
        self.reads += 1;
        let goes_on = |sequence: &&mut Sequence| {
            sequence.len_blocks > 0 && (sequence.end..=sequence.end + gap_blocks).contains(&lba.0)
        };
        let sequence = match self.known.iter_mut().find(goes_on) {
            Some(sequence) => sequence,
            None => {
                let Some(oldest) = self.known.iter_mut().min_by_key(|sequence| sequence.used)
                else {
                    return len_blocks;
                };
                *oldest = Sequence {
                    end: lba.0,
                    len_blocks: 0,
                    used: 0,
                };
                oldest
            }
        };
        let end = lba.0 + len_blocks;
        sequence.len_blocks += end - sequence.end;
        (sequence.end, sequence.used) = (end, self.reads);
        sequence.len_blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_told_apart_and_the_one_longest_unread_makes_way() {
        let mut sequences = Sequences::default();
        assert_eq!(sequences.note(Lba(100), 8, 4), 8);
        assert_eq!(sequences.note(Lba(5000), 8, 4), 8);
        assert_eq!(sequences.note(Lba(108), 8, 4), 16);
        assert_eq!(sequences.note(Lba(5008), 2, 4), 10);
        // What lies between was in the cache.
        assert_eq!(sequences.note(Lba(120), 8, 4), 28);
        assert_eq!(sequences.note(Lba(133), 8, 4), 8, "too far on");
        for number in 1..SEQUENCE_COUNT as u64 {
            sequences.note(Lba(number * 100_000), 1, 4);
        }
        assert_eq!(sequences.note(Lba(5010), 2, 4), 2, "forgotten");
        assert_eq!(sequences.note(Lba(100_001), 1, 4), 2);
    }
}
