//! How much of each segment is in use, and how much of that was read again: counted by going through the index, some
//! buckets in each poll, since nobody keeps count while requests run. Of large segments a sample is enough: pages are
//! spread over the buckets by a hash.

use super::BUCKETS_PER_POLL;
use super::victim::Plan;
use crate::engine::Cache;
use crate::media::Geometry;
use crate::memory::{self, NoMemory};
use crate::pmem::Pmem;
use crate::units::{PAGE_SIZE_BYTES, SegId};

/// A count is repeated when one of so many parts of the segments has been opened since it began.
const PARTS: u64 = 16;
/// The same where the oldest segment is reclaimed, whatever is in use of it and of others: what changes that is noticed so much
/// later.
const PARTS_BY_AGE: u64 = 4;

/// Of a segment that is all in use, so many pages are counted, or all if it has fewer. If 70 % of a large segment are in
/// use, the standard error is 5 % then; twice that if all was written in groups of pages that share a bucket.
const PAGES_COUNTED: u64 = 256;

/// Counts that one poll sets to nothing: some microseconds.
const CLEARED_PER_POLL: usize = if cfg!(feature = "sim") { 8 } else { 4096 };

/// What was counted of a segment, as much as if all had been.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Count {
    pub(super) live_blocks: u64,
    /// Sum of the heat of what is in use.
    pub(super) heat: u64,
}

/// How far a count is.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// None is under way.
    Finished,
    /// What is left of an earlier one goes, from this segment on.
    Clearing(usize),
    /// The index is gone through, from this bucket on.
    Counting(usize),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Census {
    /// The last count that was finished, and the clock of the segments when it began; 0: none was.
    counts: Vec<Count>,
    began_at: u64,
    /// Of all segments. Heat counts for each block here.
    total: Count,
    /// The one under way.
    next: Vec<Count>,
    next_began_at: u64,
    next_total: Count,
    stage: Stage,
    /// So many buckets there are for each that is looked at.
    stride: usize,
    /// The clock of the segments when a victim was last emptied of which something was forgotten for want of room.
    forgotten_at: Option<u64>,
    /// The same when one was last chosen for how little of it is in use.
    chosen_by_use_at: Option<u64>,
    /// How many counts have begun: each looks at other buckets.
    begun: usize,
}

impl Census {
    /// Nothing was counted yet.
    pub(super) fn new(geometry: &Geometry) -> Result<Self, NoMemory> {
        let counts = || {
            let (what, count) = ("counts of what is in use", geometry.segment_count());
            memory::filled(what, count as usize, Count::default)
        };
        let pages = geometry.segment_size_bytes() / u64::from(PAGE_SIZE_BYTES);
        Ok(Self {
            counts: counts()?,
            began_at: 0,
            total: Count::default(),
            next: counts()?,
            next_began_at: 0,
            next_total: Count::default(),
            stage: Stage::Finished,
            // A segment has 1 GiB at the most.
            stride: (pages / PAGES_COUNTED).max(1) as usize,
            forgotten_at: None,
            chosen_by_use_at: None,
            begun: 0,
        })
    }

    /// What is known of a sealed segment; `None`: it was not yet sealed when the last count began.
    pub(super) fn get<P: Pmem>(&self, cache: &Cache<P>, id: SegId) -> Option<Count> {
        let sealed_at = cache.segments.get(id).sealed_at();
        let counts = self.counts.get(id.index());
        counts.filter(|_| sealed_at < self.began_at).copied()
    }

    /// How much is in use where that was counted. If it was estimated, two standard errors more: the segment of which least
    /// is in use is looked for, which would be the one that was counted worst. Where less was counted it is less, too.
    pub(super) fn live_blocks_max<P: Pmem>(&self, cache: &Cache<P>, count: Count) -> u64 {
        if self.stride == 1 {
            return count.live_blocks;
        }
        // So many blocks stand for one page that was found.
        let unit_blocks = self.stride as u64 * u64::from(cache.geometry.blocks_per_page());
        let found = count.live_blocks / unit_blocks;
        // The number of pages found is as good as Poisson's.
        count.live_blocks + 2 * found.isqrt() * unit_blocks
    }

    /// Whether it is worth while to copy what is in use: not where hardly anything is read again and not all finds room anyway.
    pub(super) fn has_use_for_copies<P: Pmem>(&self, cache: &Cache<P>) -> bool {
        self.has_readers() || self.has_kept_all(cache)
    }

    /// Whether of what is in use anything to speak of was read again: one page of a hundred, once.
    fn has_readers(&self) -> bool {
        self.total.heat * 100 >= self.total.live_blocks
    }

    /// A victim was emptied, and what was in use of it had to be forgotten.
    pub(super) fn note_forgotten<P: Pmem>(&mut self, cache: &Cache<P>) {
        self.forgotten_at = Some(cache.segments.clock());
    }

    /// A victim was chosen.
    pub(super) fn note_victim<P: Pmem>(&mut self, cache: &Cache<P>, id: SegId, plan: Plan) {
        let is_unused = |count: Count| count.live_blocks == 0;
        if plan == Plan::Compact || self.get(cache, id).is_some_and(is_unused) {
            self.chosen_by_use_at = Some(cache.segments.clock());
        }
    }

    /// Whether victims are chosen for how little of them is in use, since the log last went around.
    pub(super) fn chooses_by_use<P: Pmem>(&self, cache: &Cache<P>) -> bool {
        is_in_last_turn(cache, self.chosen_by_use_at)
    }

    /// Whether all that is in use has found room, as long as the log took to go around once.
    fn has_kept_all<P: Pmem>(&self, cache: &Cache<P>) -> bool {
        !is_in_last_turn(cache, self.forgotten_at)
    }

    /// The clock of the segments when the last count began that was finished; 0: none was.
    pub(super) fn counted_at(&self) -> u64 {
        self.began_at
    }

    /// Whether the first count is finished.
    pub(super) fn is_ready(&self) -> bool {
        self.began_at > 0
    }

    /// Whether there is nothing to count for now.
    fn is_recent<P: Pmem>(&self, cache: &Cache<P>) -> bool {
        let parts = if self.chooses_by_use(cache) || self.has_use_for_copies(cache) {
            PARTS
        } else {
            PARTS_BY_AGE
        };
        let every = (cache.segments.count() as u64 / parts).max(1);
        self.is_ready() && cache.segments.clock() < self.began_at + every
    }

    /// Counts some buckets. `true`: it did something.
    pub(super) fn poll<P: Pmem>(&mut self, cache: &Cache<P>) -> bool {
        if matches!(self.stage, Stage::Finished) {
            if self.is_recent(cache) {
                return false;
            }
            // There are segments, which the clock counts from the start: it is not 0.
            self.next_began_at = cache.segments.clock();
            self.next_total = Count::default();
            self.stage = Stage::Clearing(0);
        }
        if let Stage::Clearing(first) = self.stage {
            let end = self.next.len().min(first + CLEARED_PER_POLL);
            self.next[first..end].fill(Count::default());
            if end < self.next.len() {
                self.stage = Stage::Clearing(end);
                return true;
            }
            self.stage = Stage::Counting(self.begun % self.stride);
            self.begun = self.begun.wrapping_add(1);
        }
        if let Stage::Counting(bucket) = self.stage {
            self.count(cache, bucket);
        }
        true
    }

    fn count<P: Pmem>(&mut self, cache: &Cache<P>, first: usize) {
        let weight = self.stride as u64;
        let (counts, total) = (&mut self.next, &mut self.next_total);
        let mut note = |place, len_blocks| {
            let id = cache.geometry.segment_of(place);
            if let Some(count) = counts.get_mut(id.index()) {
                let heat = weight * u64::from(cache.heat.get(id, place));
                count.live_blocks += weight * len_blocks;
                count.heat += heat;
                total.live_blocks += weight * len_blocks;
                total.heat += heat * len_blocks;
            }
        };
        let end = cache.index.bucket_count();
        let buckets = (first..end).step_by(self.stride);
        let buckets = buckets.take(BUCKETS_PER_POLL);
        buckets
            .clone()
            .for_each(|bucket| cache.index.prefetch_bucket(bucket));
        buckets.for_each(|bucket| cache.index.look_at_bucket(bucket, &mut note));
        let next = first + BUCKETS_PER_POLL * self.stride;
        self.stage = Stage::Counting(next);
        if next >= end {
            self.stage = Stage::Finished;
            std::mem::swap(&mut self.counts, &mut self.next);
            self.began_at = self.next_began_at;
            self.total = self.next_total;
        }
    }
}

/// Whether the log has not gone around once since.
fn is_in_last_turn<P: Pmem>(cache: &Cache<P>, then: Option<u64>) -> bool {
    let turn = cache.segments.count() as u64;
    then.is_some_and(|then| cache.segments.clock() <= then + turn)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::invariant_tests::new_cache_of;
    use crate::engine::{Cache, SegmentState};
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

    /// What an earlier count has left is gone before the index is gone through, some of it in each poll.
    #[test]
    fn a_count_of_many_segments_begins_over_several_polls() {
        let cache = new_cache_of(&Setup {
            segment_count: 3 * CLEARED_PER_POLL as u64 + 1,
            ..Setup::default()
        });
        let mut census = Census::new(&cache.geometry).unwrap();
        let count = Count {
            live_blocks: 7,
            heat: 7,
        };
        census.next.fill(count);
        for cleared in 1..=3 {
            assert!(census.poll(&cache));
            let left = census.next.iter().filter(|left| **left == count);
            assert_eq!(left.count(), (3 - cleared) * CLEARED_PER_POLL + 1);
        }
        while !census.is_ready() {
            assert!(census.poll(&cache));
        }
        assert!(census.counts.iter().all(|left| *left == Count::default()));
    }

    #[test]
    fn a_count_is_repeated_less_often_where_victims_are_chosen_by_age() {
        let cache = new_cache_of(&Setup {
            segment_count: 64,
            ..Setup::default()
        });
        let mut census = Census::new(&cache.geometry).unwrap();
        // The log goes around once, and one segment more.
        let turn = cache.segments.count() as u64 + 1;
        let mut opened_before_next = |forgotten, chosen_by_use, heat| {
            while census.poll(&cache) {}
            let clock = cache.segments.clock();
            let at = |opened_since: Option<u64>| opened_since.map(|opened| clock - opened);
            (census.forgotten_at, census.chosen_by_use_at) = (at(forgotten), at(chosen_by_use));
            census.total = Count {
                live_blocks: 100,
                heat,
            };
            let mut opened = 0;
            while !census.poll(&cache) {
                let id = cache.segments.open_next(None).expect("one is free");
                cache.segments.set_sealed(id);
                cache.segments.get(id).set_state(SegmentState::Reclaiming);
                cache.segments.put_free(id);
                opened += 1;
            }
            opened
        };
        assert_eq!(opened_before_next(None, None, 0), 4);
        // Until so many have been opened.
        while cache.segments.clock() <= turn {
            opened_before_next(None, None, 0);
        }
        assert_eq!(opened_before_next(Some(turn), None, 0), 4);
        assert_eq!(opened_before_next(Some(0), Some(0), 0), 4);
        assert_eq!(opened_before_next(Some(0), None, 1), 4);
        assert_eq!(opened_before_next(Some(0), None, 0), 16);
        assert_eq!(opened_before_next(Some(0), Some(turn), 0), 16);
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
        let mut census = Census::new(&cache.geometry).unwrap();
        assert_eq!(census.stride, 4);
        // Each count looks at other buckets.
        for begun in 0..6 {
            assert!(census.poll(&cache), "count {begun} has begun");
            while !matches!(census.stage, Stage::Finished) {
                census.poll(&cache);
            }
            for (number, id) in (0..).zip(&ids) {
                let used = PAGES - number * PAGES / SEGMENTS;
                let count = census.get(&cache, *id).expect("it was sealed before");
                let live_blocks = census.live_blocks_max(&cache, count);
                // Groups of four pages were looked at, so many; two errors are added to each count.
                let error = used / (used / 16).isqrt();
                let expected = used..used + 2 * error;
                assert!(
                    expected.start - 2 * error < live_blocks && live_blocks < expected.end + error,
                    "{count:?} of {used} in count {begun}"
                );
            }
            census.began_at = 0;
        }
    }
}
