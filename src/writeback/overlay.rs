//! Overlapping keys of a batch, turned into disjoint pieces of which the newest wins, in order of address.
//!
//! A batch may have half a million keys, and a poll must stay short. So keys are sorted in runs, as they are
//! gathered, and the runs are merged as the pieces are asked for.

use crate::canary::{self, Canary};
use crate::media::{Key, KeyKind};
use crate::units::{Lba, PmemOff};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Keys of a run: few runs merge fast, and sorting one takes some 50 us.
const RUN_KEYS: usize = 2048;

/// A range that comes from one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) kind: KeyKind,
    pub(super) lba: Lba,
    pub(super) len_blocks: u64,
    /// Where the payload of the first block lies.
    pub(super) payload: PmemOff,
}

/// A key that was laid on. There may be half a million: kept small.
#[derive(Clone, Copy, Debug)]
struct Laid {
    lba: Lba,
    payload: PmemOff,
    len_blocks: u32,
    kind: KeyKind,
}

/// A part of `Overlay::sorted` that is in order.
#[derive(Clone, Copy, Debug)]
struct Run {
    start: usize,
    end: usize,
    /// The next to be merged.
    next: usize,
}

/// The keys of a batch. Keeps its memory from batch to batch.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    keys: Vec<Laid>,
    block_shift: u32,
    /// First block and number of each key; within each run in order.
    sorted: Vec<(Lba, u32)>,
    runs: Vec<Run>,
    /// The next key of each run: its first block, and the number of the run.
    merge: BinaryHeap<Reverse<(Lba, u32)>>,
    /// Keys that cover the current block; the newest on top.
    active: BinaryHeap<u32>,
    /// Everything before this block has been given out.
    at: u64,
}

impl Overlay {
    pub(super) fn clear(&mut self) {
        self.keys.clear();
        self.sorted.clear();
        self.runs.clear();
    }

    pub(super) fn key_count(&self) -> usize {
        self.keys.len()
    }

    /// Lays a key on top of those that came before.
    pub(super) fn push(&mut self, key: &Key, payload: PmemOff, block_shift: u32) {
        let covered = |laid: &Laid| laid.lba == key.lba && laid.len_blocks == key.len_blocks;
        if canary::is(Canary::OldestKeyWins) && self.keys.iter().any(covered) {
            return;
        }
        self.block_shift = block_shift;
        self.keys.push(Laid {
            lba: key.lba,
            payload,
            len_blocks: key.len_blocks,
            kind: key.kind,
        });
    }

    /// Sorts what was pushed since the last run was ended, if that is long enough for a run.
    pub(super) fn end_long_run(&mut self) {
        if self.keys.len() - self.sorted.len() >= RUN_KEYS {
            self.end_run();
        }
    }

    /// Sorts what was pushed since the last run was ended.
    pub(super) fn end_run(&mut self) {
        let start = self.sorted.len();
        let end = self.keys.len();
        if start == end {
            return;
        }
        // A batch has far fewer keys than 2^32.
        let new = (start as u32..).zip(&self.keys[start..]);
        self.sorted
            .extend(new.map(|(number, key)| (key.lba, number)));
        self.sorted[start..].sort_unstable();
        self.runs.push(Run {
            start,
            end,
            next: start,
        });
    }

    /// Starts to give out the pieces, from the first one on. All runs are ended.
    pub(super) fn rewind(&mut self) {
        self.merge.clear();
        self.active.clear();
        self.at = 0;
        for (number, run) in (0..).zip(&mut self.runs) {
            run.next = run.start;
            let (first, _) = self.sorted[run.start];
            self.merge.push(Reverse((first, number)));
        }
    }

    /// The next piece, in order of address.
    pub(super) fn next(&mut self) -> Option<Piece> {
        loop {
            while let Some(&top) = self.active.peek()
                && end(&self.keys[top as usize]) <= self.at
            {
                self.active.pop();
            }
            let Some(&top) = self.active.peek() else {
                self.at = self.next_start()?;
                while self.next_start() == Some(self.at) {
                    let number = self.take_start();
                    self.active.push(number);
                }
                continue;
            };
            let key = self.keys[top as usize];
            // The top rules until it ends or a newer key starts.
            let mut until = end(&key);
            while let Some(start) = self.next_start()
                && start < until
            {
                let number = self.take_start();
                self.active.push(number);
                if number > top {
                    until = start;
                }
            }
            if until > self.at {
                let piece = cut(&key, self.at, until, self.block_shift);
                self.at = until;
                return Some(piece);
            }
        }
    }

    /// Where the next key starts.
    fn next_start(&self) -> Option<u64> {
        self.merge.peek().map(|Reverse((lba, _))| lba.0)
    }

    /// The number of the next key; there is one.
    fn take_start(&mut self) -> u32 {
        let Some(mut top) = self.merge.peek_mut() else {
            unreachable!("asked for a key after the last one");
        };
        let Reverse((_, number)) = *top;
        let run = &mut self.runs[number as usize];
        let (_, taken) = self.sorted[run.next];
        run.next += 1;
        if run.next < run.end {
            let (first, _) = self.sorted[run.next];
            *top = Reverse((first, number));
        } else {
            std::collections::binary_heap::PeekMut::pop(top);
        }
        taken
    }
}

fn end(key: &Laid) -> u64 {
    key.lba.0 + u64::from(key.len_blocks)
}

/// The part of a key from block `from` to block `until`.
fn cut(key: &Laid, from: u64, until: u64, block_shift: u32) -> Piece {
    debug_assert!(
        key.lba.0 <= from && from < until && until <= end(key),
        "INV-WB-4: blocks {from} to {until} of {key:?}"
    );
    Piece {
        kind: key.kind,
        lba: Lba(from),
        len_blocks: until - from,
        payload: key.payload.plus((from - key.lba.0) << block_shift),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(lba: u64, len_blocks: u32, kind: KeyKind) -> Key {
        Key {
            lba: Lba(lba),
            len_blocks,
            kind,
            payload_off: 0,
            crc: 0,
        }
    }

    fn pieces(overlay: &mut Overlay) -> Vec<Piece> {
        overlay.rewind();
        std::iter::from_fn(|| overlay.next()).collect()
    }

    proptest! {
        #[test]
        fn pieces_are_sorted_disjoint_and_the_newest_wins(
            keys in prop::collection::vec((0u64..40, 1u32..12), 0..24),
            run_len in 1usize..8,
        ) {
            // INV-WB-4.
            let mut overlay = Overlay::default();
            let mut expected = vec![None; 64];
            for (number, &(lba, len)) in keys.iter().enumerate() {
                let payload = PmemOff((number as u64 + 1) << 20);
                overlay.push(&key(lba, len, KeyKind::Data), payload, 9);
                if number % run_len == 0 {
                    overlay.end_run();
                }
                for block in 0..u64::from(len) {
                    expected[(lba + block) as usize] = Some(payload.0 + (block << 9));
                }
            }
            overlay.end_run();
            let mut found = vec![None; 64];
            let mut last_end = 0;
            let first = pieces(&mut overlay);
            for piece in &first {
                assert!(piece.len_blocks > 0 && piece.lba.0 >= last_end);
                last_end = piece.lba.0 + piece.len_blocks;
                for block in 0..piece.len_blocks {
                    found[(piece.lba.0 + block) as usize] = Some(piece.payload.0 + (block << 9));
                }
            }
            prop_assert_eq!(found, expected);
            // A second time, as after a flush of the base that failed.
            prop_assert_eq!(pieces(&mut overlay), first);
        }
    }
}
