//! The index: where each cached page of the base lies on the cache device.
//!
//! A hash table of 64-byte buckets. A bucket is one word of bookkeeping and seven slots; a slot is one word.
//! A look-up of a whole page costs one cache miss. The table is sized once and never grows or moves.
//!
//! - **Keys are quotients.** The page number is permuted by a bijection; the upper part of the result picks
//!   the home bucket, only the rest is stored. Cost per slot: 8 bytes, whatever the size of the base.
//! - **Collisions** go to the next buckets, at most [`PROBE_MAX`] away. Each bucket counts the entries that
//!   passed it by, so that a look-up knows when to stop, and removals leave nothing behind.
//! - **Sub-page writes** turn a slot into a *split* one: the line of the same number in a side table holds a
//!   word for each block. The side table is as long as the table, but its memory is used only where needed.
//! - **Readers** take no lock: slots are atomic words. **Writers** claim the home bucket of a page (a word, a
//!   compare-and-swap, no waiting) from before they append to the log until the new place is published, so
//!   that two writes of one page come out in the same order in the log and here.
//! - A bucket's **version** counts publications: a read fill that was overtaken by a write notices.

mod bucket;
mod lines;
mod map;
mod side;
mod table;
#[cfg(test)]
mod tests;

pub(crate) use bucket::{PageSlot, Version};
pub(crate) use map::{BlockMap, Target};
pub(crate) use side::LineStock;
pub(crate) use table::{Claim, EarlierParts, Index, IndexFull};
