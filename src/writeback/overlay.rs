//! Overlapping keys of a batch, turned into disjoint pieces of which the newest wins.

use crate::media::{Key, KeyKind};
use crate::units::{Lba, PmemOff};
use std::collections::BinaryHeap;

/// A range that comes from one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) kind: KeyKind,
    pub(super) lba: Lba,
    pub(super) len_blocks: u64,
    /// Where the payload of the first block lies.
    pub(super) payload: PmemOff,
}

/// The keys of a batch. Keeps its memory from batch to batch.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    keys: Vec<Piece>,
    block_shift: u32,
    /// Numbers of keys, sorted by their first block.
    by_lba: Vec<u32>,
    /// Keys that cover the current block; the newest on top.
    active: BinaryHeap<u32>,
}

impl Overlay {
    pub(super) fn clear(&mut self) {
        self.keys.clear();
    }

    pub(super) fn key_count(&self) -> usize {
        self.keys.len()
    }

    /// Lays a key on top of those that came before.
    pub(super) fn push(&mut self, key: &Key, payload: PmemOff, block_shift: u32) {
        self.block_shift = block_shift;
        let len_blocks = u64::from(key.len_blocks);
        self.keys.push(Piece {
            kind: key.kind,
            lba: key.lba,
            len_blocks,
            payload,
        });
    }

    /// Calls `emit` for each piece, in order of address.
    pub(super) fn resolve(&mut self, mut emit: impl FnMut(&Piece)) {
        self.by_lba.clear();
        self.by_lba.extend(0..self.keys.len() as u32);
        let keys = &self.keys;
        self.by_lba
            .sort_unstable_by_key(|&number| keys[number as usize].lba);
        self.active.clear();
        let mut starts = self.by_lba.iter().copied().peekable();
        let mut at = 0;
        loop {
            while let Some(&top) = self.active.peek()
                && end(&keys[top as usize]) <= at
            {
                self.active.pop();
            }
            let next_start = starts.peek().map(|&number| keys[number as usize].lba.0);
            let Some(&top) = self.active.peek() else {
                let Some(start) = next_start else { return };
                at = start;
                while let Some(number) = starts.next_if(|&n| keys[n as usize].lba.0 == at) {
                    self.active.push(number);
                }
                continue;
            };
            let key = &keys[top as usize];
            // The top rules until it ends or a newer key starts.
            let mut until = end(key);
            while let Some(&number) = starts.peek()
                && keys[number as usize].lba.0 < until
            {
                starts.next();
                self.active.push(number);
                if number > top {
                    until = keys[number as usize].lba.0;
                }
            }
            if until > at {
                emit(&cut(key, at, until, self.block_shift));
                at = until;
            }
        }
    }
}

fn end(piece: &Piece) -> u64 {
    piece.lba.0 + piece.len_blocks
}

/// The part of a piece from block `from` to block `until`.
fn cut(piece: &Piece, from: u64, until: u64, block_shift: u32) -> Piece {
    Piece {
        kind: piece.kind,
        lba: Lba(from),
        len_blocks: until - from,
        payload: piece.payload.plus((from - piece.lba.0) << block_shift),
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

    proptest! {
        #[test]
        fn pieces_are_sorted_disjoint_and_the_newest_wins(
            keys in prop::collection::vec((0u64..40, 1u32..12), 0..24)
        ) {
            let mut overlay = Overlay::default();
            let mut expected = vec![None; 64];
            for (number, &(lba, len)) in keys.iter().enumerate() {
                let payload = PmemOff((number as u64 + 1) << 20);
                overlay.push(&key(lba, len, KeyKind::Data), payload, 9);
                for block in 0..u64::from(len) {
                    expected[(lba + block) as usize] = Some(payload.0 + (block << 9));
                }
            }
            let mut found = vec![None; 64];
            let mut last_end = 0;
            overlay.resolve(|piece| {
                assert!(piece.len_blocks > 0 && piece.lba.0 >= last_end);
                last_end = end(piece);
                for block in 0..piece.len_blocks {
                    found[(piece.lba.0 + block) as usize] = Some(piece.payload.0 + (block << 9));
                }
            });
            prop_assert_eq!(found, expected);
        }
    }
}
