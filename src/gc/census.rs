//! How much of each segment is in use, and how much of that was read again: counted by going through the index, some
//! buckets in each poll, since nobody keeps count while requests run.

use super::BUCKETS_PER_POLL;
use crate::engine::Cache;
use crate::pmem::Pmem;
use crate::units::SegId;

/// A count is repeated when so many parts of the segments have been opened since it began.
const PARTS: u64 = 16;

/// What was counted of a segment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Count {
    pub(super) live_blocks: u64,
    /// Sum of the heat of what is in use.
    pub(super) heat: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Census {
    /// The last count that was finished, and the clock of the segments when it began.
    counts: Vec<Count>,
    began_at: u64,
    /// The one under way.
    next: Vec<Count>,
    next_began_at: u64,
    bucket: usize,
}

impl Census {
    /// What is known of a sealed segment; `None`: it was not yet sealed when the last count began.
    pub(super) fn get<P: Pmem>(&self, cache: &Cache<P>, id: SegId) -> Option<Count> {
        let sealed_at = cache.segments.get(id).sealed_at();
        let counts = self.counts.get(id.index());
        counts.filter(|_| sealed_at < self.began_at).copied()
    }

    /// Whether there is nothing to count for now.
    fn is_recent<P: Pmem>(&self, cache: &Cache<P>) -> bool {
        let every = (cache.segments.count() as u64 / PARTS).max(1);
        !self.counts.is_empty() && cache.segments.clock() < self.began_at + every
    }

    /// Whether the first count is finished.
    pub(super) fn is_ready(&self) -> bool {
        !self.counts.is_empty()
    }

    /// Counts some buckets. `true`: it did something.
    pub(super) fn poll<P: Pmem>(&mut self, cache: &Cache<P>) -> bool {
        let end = cache.index.bucket_count();
        if self.bucket == 0 {
            if self.is_recent(cache) {
                return false;
            }
            // Allocated by the first two counts.
            self.next.clear();
            self.next.resize(cache.segments.count(), Count::default());
            self.next_began_at = cache.segments.clock();
        }
        let stop = (self.bucket + BUCKETS_PER_POLL).min(end);
        let mut note = |place, len_blocks| {
            let id = cache.geometry.segment_of(place);
            if let Some(count) = self.next.get_mut(id.index()) {
                count.live_blocks += len_blocks;
                count.heat += u64::from(cache.heat.get(place));
            }
        };
        for bucket in self.bucket..stop {
            cache.index.look_at_bucket(bucket, &mut note);
        }
        self.bucket = stop;
        if stop == end {
            self.bucket = 0;
            std::mem::swap(&mut self.counts, &mut self.next);
            self.began_at = self.next_began_at;
        }
        true
    }
}
