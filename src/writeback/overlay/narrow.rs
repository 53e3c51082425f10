//! A batch that must not end yet may have more keys than there is room for. Then it is cut into parts, each of which holds
//! what the keys do to a range of addresses, and which are gathered and written one after the other (`../parts.rs`).
//!
//! Where a part ends turns out while it is gathered. When there is no more room, the keys that are there are replaced by the
//! disjoint pieces that come of them. Those with the lowest addresses are kept, as many as take half of the room; the part
//! ends where the next one begins, and of later keys only what lies before that is laid on. (Half of what is there, if it is not
//! they that want room but the damage met in them.) A part that was cut short like
//! this holds pieces for half of the room at least, or what has covered them since, so there are not many parts; one that
//! overwrites few blocks often is not cut short at all.

use super::{Ahead, Laid, Order, Overlay, Sorter, end};
use crate::canary::{self, Canary};
use crate::media::Key;
use crate::units::{Lba, PmemOff};
use std::mem;

impl Overlay {
    /// What is laid on it changes blocks from this one on alone: it is a part behind the first. Nothing was laid on yet.
    pub(in super::super) fn begin_at(&mut self, from: Lba) {
        debug_assert!(self.keys.is_empty(), "INV-WB-8: {} keys", self.keys.len());
        self.from = from.0;
    }

    /// Whether it is a part behind the first.
    pub(in super::super) fn is_behind_first(&self) -> bool {
        self.from > 0
    }

    /// Where the next part begins; `None`: all from the beginning on was laid on it.
    pub(in super::super) fn next_part(&self) -> Option<Lba> {
        (self.until < u64::MAX).then_some(Lba(self.until))
    }

    /// Whether a block is in the range of it.
    pub(in super::super) fn holds(&self, lba: Lba) -> bool {
        (self.from..self.until).contains(&lba.0)
    }

    /// Whether anything of a key is in the range of it.
    pub(in super::super) fn holds_some_of(&self, key: &Key) -> bool {
        key.lba.0 < self.until && key.end().0 > self.from
    }

    pub(super) fn holds_all_of(&self, key: &Key) -> bool {
        key.lba.0 >= self.from && key.end().0 <= self.until
    }

    /// What of a key lies in the range of it.
    #[cold]
    pub(super) fn clip(
        &self,
        key: &Key,
        payload: PmemOff,
        block_shift: u32,
    ) -> Option<(Key, PmemOff)> {
        if !self.holds_some_of(key) {
            return None;
        }
        let (from, until) = (self.from.max(key.lba.0), self.until.min(key.end().0));
        let clipped = Key {
            lba: Lba(from),
            // No more than it had.
            len_blocks: (until - from) as u32,
            ..*key
        };
        let skipped = if canary::is(Canary::PartTakesWrongPayload) {
            0
        } else {
            from - key.lba.0
        };
        Some((clipped, payload.plus(skipped << block_shift)))
    }

    /// Goes on with making room, by at most about `steps` keys: `kept_max` pieces are left at the most, fewer than there are
    /// keys, or one. `true`: there is room, and keys are laid on as before.
    pub(in super::super) fn narrow(
        &mut self,
        sorter: &mut Sorter,
        steps: usize,
        kept_max: usize,
    ) -> bool {
        if !matches!(self.order, Order::Narrowing) {
            if self.sort(sorter, steps) {
                self.rewind();
                self.varying = 0;
                sorter.sorted.clear();
                self.order = Order::Narrowing;
            }
            return false;
        }
        let kept = &mut sorter.sorted;
        let mut left = steps;
        loop {
            match self.next(&mut left) {
                Ahead::Unknown => return false,
                Ahead::End => break,
                Ahead::Piece(piece) if kept.len() == kept_max => {
                    self.until = piece.lba.0;
                    break;
                }
                Ahead::Piece(piece) => {
                    let laid = Laid {
                        lba: piece.lba,
                        payload: piece.payload,
                        // A piece is not longer than its key.
                        len_blocks: piece.len_blocks as u32,
                        number: kept.len() as u32,
                        kind: piece.kind,
                    };
                    debug_assert!(
                        kept.last().is_none_or(|last| end(last) <= laid.lba.0),
                        "INV-WB-4: {laid:?} behind {:?}",
                        kept.last()
                    );
                    kept.push(laid);
                    self.varying |= kept[0].lba.0 ^ laid.lba.0;
                }
            }
        }
        mem::swap(&mut self.keys, kept);
        // They are disjoint.
        self.is_ascending = true;
        self.order = Order::Laid;
        true
    }
}
