//! How much of each segment is in use, and how much of that was read again: counted by going through the index, some
//! buckets in each poll, since nobody keeps count while requests run. Of large segments a sample is enough: pages are
//! spread over the buckets by a hash.

use super::BUCKETS_PER_POLL;
use crate::engine::Cache;
use crate::memory::{self, NoMemory};
use crate::pmem::Pmem;
use crate::units::{PAGE_SIZE_BYTES, SegId};

/// A count is repeated when so many parts of the segments have been opened since it began.
const PARTS: u64 = 16;

/// Of a segment that is all in use, so many pages are counted, or all if it has fewer. If 70 % of a large segment are in
/// use, the standard error is 5 % then; twice that if all was written in groups of pages that share a bucket.
const PAGES_COUNTED: u64 = 256;

/// What was counted of a segment, as much as if all had been. Of what is in use, if that was estimated, two standard
/// errors more: the segment of which least is in use is looked for, which would be the one that was counted worst.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Count {
    pub(super) live_blocks: u64,
    /// Sum of the heat of what is in use.
    pub(super) heat: u64,
}

impl Count {
    /// `unit_blocks`: so many blocks stand for one page that was found.
    fn be_careful(&mut self, unit_blocks: u64) {
        let found = self.live_blocks / unit_blocks;
        // The number of pages found is as good as Poisson's.
        self.live_blocks += 2 * found.isqrt() * unit_blocks;
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Census {
    /// The last count that was finished, and the clock of the segments when it began.
    counts: Vec<Count>,
    began_at: u64,
    /// The one under way.
    next: Vec<Count>,
    next_began_at: u64,
    /// The next bucket, and how many there are for each that is looked at.
    bucket: usize,
    stride: usize,
    /// How many counts have begun: each looks at other buckets.
    begun: usize,
}

impl Census {
    /// Nothing was counted yet.
    pub(super) fn new(segment_count: usize) -> Result<Self, NoMemory> {
        let what = "counts of what is in use";
        Ok(Self {
            counts: memory::with_room(what, segment_count)?,
            began_at: 0,
            next: memory::with_room(what, segment_count)?,
            next_began_at: 0,
            bucket: 0,
            stride: 0,
            begun: 0,
        })
    }

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
        if self.stride == 0 {
            if self.is_recent(cache) {
                return false;
            }
            self.begin(cache);
        }
        let weight = self.stride as u64;
        let mut note = |place, len_blocks| {
            let id = cache.geometry.segment_of(place);
            if let Some(count) = self.next.get_mut(id.index()) {
                count.live_blocks += weight * len_blocks;
                count.heat += weight * u64::from(cache.heat.get(id, place));
            }
        };
        let end = cache.index.bucket_count();
        let buckets = (self.bucket..end).step_by(self.stride);
        let buckets = buckets.take(BUCKETS_PER_POLL);
        buckets
            .clone()
            .for_each(|bucket| cache.index.prefetch_bucket(bucket));
        buckets.for_each(|bucket| cache.index.look_at_bucket(bucket, &mut note));
        self.bucket += BUCKETS_PER_POLL * self.stride;
        if self.bucket >= end {
            self.stride = 0;
            if weight > 1 {
                let page_blocks = u64::from(cache.geometry.blocks_per_page());
                self.next
                    .iter_mut()
                    .for_each(|count| count.be_careful(weight * page_blocks));
            }
            std::mem::swap(&mut self.counts, &mut self.next);
            self.began_at = self.next_began_at;
        }
        true
    }

    fn begin<P: Pmem>(&mut self, cache: &Cache<P>) {
        self.next.clear();
        self.next.resize(cache.segments.count(), Count::default());
        self.next_began_at = cache.segments.clock();
        let pages = cache.geometry.segment_size_bytes() / u64::from(PAGE_SIZE_BYTES);
        // A segment has 1 GiB at the most.
        self.stride = (pages / PAGES_COUNTED).max(1) as usize;
        self.bucket = self.begun % self.stride;
        self.begun = self.begun.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Cache;
    use crate::engine::invariant_tests::new_cache_of;
    use crate::index::{Change, LineStock, Target};
    use crate::media::Place;
    use crate::sim::machine::Setup;
    use crate::sim::pmem::SimPmem;
    use crate::units::Page;

    const SEGMENTS: u64 = 4;
    const PAGES: u64 = 1000;

    /// Puts pages `first` to `end` into the index, where a segment begins and behind that.
    fn put(cache: &Cache<SimPmem>, id: SegId, first: u64, end: u64) {
        let start = cache.geometry.place(id, 64 << 10);
        for page in first..end {
            let at = cache.index.locate(Page(page));
            cache.index.claim(at, 1);
            let slot = cache.index.reserve(at).expect("there is room");
            let place = Place(start.0 + page % PAGES);
            let stock = &mut LineStock::new(0);
            cache
                .index
                .publish(slot, 0, 1, Target::Mapped(place), stock);
            cache.index.release(at.bucket(), 1, Change::Written);
        }
    }

    /// Segments of 4 MiB, of which every fourth bucket is looked at. The first is all in use, then three quarters, half
    /// and a quarter.
    #[test]
    fn of_large_segments_a_sample_tells_what_is_in_use() {
        let cache = new_cache_of(&Setup {
            block_size_bytes: 4096,
            block_count: SEGMENTS * PAGES + 1000,
            segment_size_bytes: 4 << 20,
            segment_count: 12,
            ..Setup::default()
        });
        let ids: Vec<SegId> = (0..SEGMENTS)
            .map(|number| {
                let id = cache.segments.open_next(None).expect("most are free");
                let first = number * PAGES;
                put(&cache, id, first, first + PAGES - number * PAGES / SEGMENTS);
                cache.segments.set_sealed(id);
                id
            })
            .collect();
        // What was sealed when the last segment was opened is known.
        cache.segments.open_next(None).expect("most are free");
        let mut census = Census::new(cache.segments.count()).unwrap();
        // Each count looks at other buckets.
        for begun in 0..6 {
            assert!(census.poll(&cache), "count {begun} has begun");
            assert_eq!(census.stride, 4);
            while census.stride > 0 {
                census.poll(&cache);
            }
            for (number, id) in (0..).zip(&ids) {
                let used = PAGES - number * PAGES / SEGMENTS;
                let count = census.get(&cache, *id).expect("it was sealed before");
                // Groups of four pages were looked at, so many; two errors are added to each count.
                let error = used / (used / 16).isqrt();
                let expected = used..used + 2 * error;
                assert!(
                    expected.start - 2 * error < count.live_blocks
                        && count.live_blocks < expected.end + error,
                    "{count:?} of {used} in count {begun}"
                );
            }
            census.began_at = 0;
            census.counts.clear();
        }
    }
}
