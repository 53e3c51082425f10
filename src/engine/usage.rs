//! What the cache device is used for.
//!
//! It is found out when somebody asks, by a look at the open segments and at a sample of the index. Exact counts would be
//! of clean and dirty copies of each page, and of those that nobody finds any more: to keep them, a write would have
//! to look at the segment of each copy that it replaces, and write-back at the index for each page that gets clean.

use super::cache::Cache;
use crate::pmem::Pmem;
use serde::Serialize;
use std::sync::atomic::Ordering;

/// Buckets of the index that are looked at: some hundred microseconds, and the sum is off by less than 1 % in most
/// cases. A cache of up to 100 MiB has no more, and is counted exactly.
const SAMPLED_BUCKETS: usize = 4096;

/// Bytes of the segments, by use. `occupancy`, `free`, `dead` and `quarantined` are all of `size`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// All segments.
    pub size: u64,
    /// Data that a read may find: each cached block once. `clean` and `dirty`.
    pub occupancy: u64,
    /// Can be written without anything being reclaimed.
    pub free: u64,
    /// What of `occupancy` the base holds too.
    pub clean: u64,
    /// What of `occupancy` the base does not hold yet.
    pub dirty: u64,
    /// Older copies, keys, and ends of segments that were too short: what reclaiming gets back besides clean data.
    pub dead: u64,
    /// Not used, since memory is damaged.
    pub quarantined: u64,
}

impl<P: Pmem> Cache<P> {
    /// What the cache device is used for. While requests change that, the parts are of slightly different moments.
    pub fn usage(&self) -> Usage {
        let segment_bytes = self.geometry.segment_size_bytes();
        let block_bytes = u64::from(self.geometry.block_size_bytes());
        let (mut clean_blocks, mut dirty_blocks) = (0, 0);
        let sample = self.index.sample(SAMPLED_BUCKETS, |place, len_blocks| {
            if self.is_clean(place) {
                clean_blocks += len_blocks;
            } else {
                dirty_blocks += len_blocks;
            }
        });
        let size = self.segments.count() as u64 * segment_bytes;
        let quarantined = self.segments.quarantined_count() as u64 * segment_bytes;
        let free = (self.segments.free_count() as u64 * segment_bytes
            + self.segments.open_room_bytes())
        .min(size - quarantined);
        // A sample may tell a little more than there is room for.
        let bytes_of = |blocks| sample.scale(blocks) * block_bytes;
        let occupancy = bytes_of(clean_blocks + dirty_blocks).min(size - quarantined - free);
        // A segment counts as clean once all of it is. The log knows better how much is dirty at the most.
        let dirty = bytes_of(dirty_blocks)
            .min(self.dirty_bytes.load(Ordering::Relaxed))
            .min(occupancy);
        Usage {
            size,
            occupancy,
            free,
            clean: occupancy - dirty,
            dirty,
            dead: size - quarantined - free - occupancy,
            quarantined,
        }
    }
}
