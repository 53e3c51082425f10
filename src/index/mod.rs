//! The index: where each cached page of the base lies on the cache device.
//!
//! A hash table of 64-byte buckets. A bucket is one word of bookkeeping and seven slots; a slot is one word.
//! A look-up of a whole page costs one cache miss. The table is sized once and never grows or moves.
//!
//! - **Keys are quotients.** The number of a group of four pages is permuted by a bijection; the upper part of the result
//!   picks the home bucket, only the rest is stored. Cost per slot: 8 bytes, whatever the size of the base.
//! - **Collisions** go to the next buckets, at most [`PROBE_MAX`] away. Each bucket counts the entries that
//!   passed it by, so that a look-up knows when to stop, and removals leave nothing behind.
//! - **Parts of pages** (512-byte blocks): one run of blocks at one place fits into the slot. A page of several
//!   runs is *split*: its slot names a line of a side table, with a word for each block.
//! - **Readers** take no lock: slots are atomic words. **Writers** claim the home bucket of a page (a word, a
//!   compare-and-swap, no waiting) from before they append to the log until the new place is published, so
//!   that two writes of one page come out in the same order in the log and here.
//! - A bucket's **version** counts writes, and apart from them other changes: a read fill that was overtaken by a write
//!   notices.

mod bucket;
mod map;
mod newest;
#[cfg(feature = "heap")]
pub mod probe;
mod side;
mod table;
#[cfg(test)]
mod tests;

pub(crate) use bucket::{Change, OWNER_MAX, PageSlot, Version};
pub(crate) use map::{BlockMap, PAGE_BLOCKS_MAX, PageMap, Target};
pub(crate) use newest::{Newest, PagePart, RangeId};
pub(crate) use side::LineStock;
pub(crate) use table::{
    Claim, EarlierParts, GOLDEN, GROUP_PAGES, Index, IndexFull, Lookup, SlotRef,
};
