//! Overlapping keys of a batch, turned into disjoint pieces of which the newest wins, in order of address.
//!
//! A batch may have many thousands of keys, and a poll must stay short: sorting can be interrupted anywhere (`overlay/sort.rs`).
//!
//! What has more keys than there is room for is cut into parts by address: see `overlay/narrow.rs`.

mod narrow;
mod sort;

use crate::canary::{self, Canary};
use crate::media::{Key, KeyKind};
use crate::memory::{self, NoMemory};
use crate::units::{Lba, PmemOff};
pub(super) use sort::Sorter;
use std::collections::BinaryHeap;
use std::mem;

/// Neighbouring pages of one write are laid on as one key of so many bytes, at most.
const JOINED_BYTES_MAX: u64 = 128 << 10;

/// A range that comes from one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) kind: KeyKind,
    pub(super) lba: Lba,
    pub(super) len_blocks: u64,
    /// Where the payload of the first block lies.
    pub(super) payload: PmemOff,
}

/// What an overlay gives out next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ahead {
    Piece(Piece),
    /// There are more keys to look at before that is known.
    Unknown,
    /// All has been given out.
    End,
}

/// A key that was laid on.
#[derive(Clone, Copy, Debug)]
struct Laid {
    lba: Lba,
    payload: PmemOff,
    len_blocks: u32,
    /// The newest key has the highest.
    number: u32,
    kind: KeyKind,
}

/// Half a line.
const _: () = assert!(size_of::<Laid>() == 32);

impl Laid {
    /// Whether a key, which is the next one of the log, goes on where this one ends, on the base and in the cache.
    fn takes(&self, key: &Key, payload: PmemOff, block_shift: u32) -> bool {
        let len_bytes = u64::from(self.len_blocks) << block_shift;
        self.kind == KeyKind::Data
            && key.kind == KeyKind::Data
            && end(self) == key.lba.0
            && self.payload.plus(len_bytes) == payload
            && len_bytes + (u64::from(key.len_blocks) << block_shift) <= JOINED_BYTES_MAX
    }
}

/// How far the keys are sorted.
#[derive(Clone, Copy, Debug)]
enum Order {
    /// Not yet begun.
    Laid,
    /// The sorter is at it.
    Sorting,
    Sorted,
    /// Room is being made: pieces are cut from the keys, which are in order.
    Narrowing,
}

/// The keys of a batch, or of a part of it. Has its memory from the start (INV-WB-8).
#[derive(Debug)]
pub(super) struct Overlay {
    keys: Vec<Laid>,
    /// Nothing is laid on it before this block.
    from: u64,
    /// Nor from this one on: that is left to other parts.
    until: u64,
    order: Order,
    /// Bits in which the addresses differ.
    varying: u64,
    /// Each starts behind the start of the one before it.
    is_ascending: bool,
    block_shift: u32,
    /// The next key to be looked at.
    next: usize,
    /// Keys that cover the current block, by number; the newest on top.
    active: BinaryHeap<(u32, u32)>,
    /// Everything before this block has been given out.
    at: u64,
}

impl Overlay {
    /// With room for so many keys: whoever lays them on sees to it that there are no more.
    pub(super) fn new(key_count: usize) -> Result<Self, NoMemory> {
        let what = "the keys of a batch of write-back";
        Ok(Self {
            keys: memory::with_room(what, key_count)?,
            from: 0,
            until: u64::MAX,
            order: Order::Laid,
            varying: 0,
            is_ascending: true,
            block_shift: 0,
            next: 0,
            active: memory::with_room(what, key_count)?.into(),
            at: 0,
        })
    }

    pub(super) fn clear(&mut self) {
        self.keys.clear();
        self.from = 0;
        self.until = u64::MAX;
        self.order = Order::Laid;
        self.varying = 0;
        self.is_ascending = true;
    }

    pub(super) fn key_count(&self) -> usize {
        self.keys.len()
    }

    /// Lays a key on top of those that came before: what of it lies in the part that is gathered.
    #[inline]
    pub(super) fn push(&mut self, key: &Key, payload: PmemOff, block_shift: u32) {
        if self.holds_all_of(key) {
            self.lay(key, payload, block_shift);
        } else if let Some((key, payload)) = self.clip(key, payload, block_shift) {
            self.lay(&key, payload, block_shift);
        }
    }

    #[inline]
    fn lay(&mut self, key: &Key, payload: PmemOff, block_shift: u32) {
        let covered = |laid: &Laid| laid.lba == key.lba && laid.len_blocks == key.len_blocks;
        if canary::is(Canary::OldestKeyWins) && self.keys.iter().any(covered) {
            return;
        }
        self.block_shift = block_shift;
        if let Some(last) = self.keys.last_mut()
            && last.takes(key, payload, block_shift)
        {
            last.len_blocks += key.len_blocks;
            return;
        }
        if let (Some(first), Some(last)) = (self.keys.first(), self.keys.last()) {
            self.varying |= first.lba.0 ^ key.lba.0;
            self.is_ascending &= last.lba < key.lba;
        }
        let laid = Laid {
            lba: key.lba,
            payload,
            len_blocks: key.len_blocks,
            // A batch has far fewer keys than 2^32.
            number: self.keys.len() as u32,
            kind: key.kind,
        };
        debug_assert!(
            self.keys.len() < self.keys.capacity(),
            "INV-WB-8: there is room for {} keys",
            self.keys.len()
        );
        self.keys.push(laid);
    }

    /// Goes on with sorting, by at most about `steps` keys, none of which is pushed afterwards. `true`: they are sorted.
    pub(super) fn sort(&mut self, sorter: &mut Sorter, steps: usize) -> bool {
        if matches!(self.order, Order::Laid) {
            if self.is_ascending {
                self.order = Order::Sorted;
            } else {
                sorter.begin(&self.keys, self.varying);
                self.order = Order::Sorting;
            }
        }
        match self.order {
            Order::Sorting if sorter.go_on(&self.keys, steps) => {
                mem::swap(&mut self.keys, &mut sorter.sorted);
                self.order = Order::Sorted;
                true
            }
            Order::Laid | Order::Sorting => false,
            Order::Sorted => true,
            Order::Narrowing => unreachable!("INV-WB-8: it is narrowed to its end"),
        }
    }

    /// Starts to give out the pieces, from the first one on. The keys are sorted.
    pub(super) fn rewind(&mut self) {
        debug_assert!(
            matches!(self.order, Order::Sorted),
            "INV-WB-4: pieces are cut from keys that are {:?}",
            self.order
        );
        self.active.clear();
        self.next = 0;
        self.at = 0;
    }

    /// The next piece, in order of address. Each key that is looked at takes one of `steps`: when it begins to cover
    /// blocks, when it ceases to, and for each piece of it.
    #[inline]
    pub(super) fn next(&mut self, steps: &mut usize) -> Ahead {
        match self.next_alone(steps) {
            Some(piece) => piece,
            None => self.next_of_several(steps),
        }
    }

    /// The next key, if it is the only one where it lies, as most are.
    #[inline]
    fn next_alone(&mut self, steps: &mut usize) -> Option<Ahead> {
        let first = *self.keys.get(self.next)?;
        let is_alone =
            self.active.is_empty() && self.next_start_is_after(self.next + 1, end(&first));
        if !is_alone || *steps == 0 {
            return None;
        }
        *steps -= 1;
        self.next += 1;
        self.at = first.lba.0;
        Some(self.give(&first, end(&first)))
    }

    #[inline(never)]
    fn next_of_several(&mut self, steps: &mut usize) -> Ahead {
        loop {
            if self.active.is_empty() && self.next == self.keys.len() {
                return Ahead::End;
            }
            if *steps == 0 {
                return Ahead::Unknown;
            }
            let Some(&(top_number, top)) = self.active.peek() else {
                if let Some(piece) = self.next_alone(steps) {
                    return piece;
                }
                *steps -= 1;
                self.at = self.keys[self.next].lba.0;
                self.activate_next();
                continue;
            };
            *steps -= 1;
            let key = self.keys[top as usize];
            if end(&key) <= self.at {
                self.active.pop();
                continue;
            }
            // The top rules until it ends or a newer key starts.
            let Some(start) = self.next_start().filter(|start| *start < end(&key)) else {
                return self.give(&key, end(&key));
            };
            let is_newer = self.activate_next() > top_number;
            if is_newer && start > self.at {
                return self.give(&key, start);
            }
        }
    }

    #[inline]
    fn give(&mut self, key: &Laid, until: u64) -> Ahead {
        let piece = cut(key, self.at, until, self.block_shift);
        self.at = until;
        Ahead::Piece(piece)
    }

    fn next_start_is_after(&self, index: usize, end: u64) -> bool {
        self.keys.get(index).is_none_or(|key| key.lba.0 >= end)
    }

    /// Where the next key starts.
    fn next_start(&self) -> Option<u64> {
        self.keys.get(self.next).map(|key| key.lba.0)
    }

    /// The next key covers the current block, or will: there is one. Its number. If it ends before the top does, which
    /// is newer, nothing of it comes to light.
    fn activate_next(&mut self) -> u32 {
        let key = self.keys[self.next];
        let is_hidden = self.active.peek().is_some_and(|&(number, top)| {
            number > key.number && end(&key) <= end(&self.keys[top as usize])
        });
        if !is_hidden {
            // Fewer than 2^32, as above.
            self.active.push((key.number, self.next as u32));
        }
        self.next += 1;
        key.number
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
mod tests;
