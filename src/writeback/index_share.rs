//! How much of the index is taken up by pages that are dirty.
//!
//! The marks of write-back are percent of what the log has room for. Parts of pages take a slot of the index as whole pages
//! do, and an unmap takes one for each page and no bytes at all: so the index may be full of what cannot be forgotten while
//! hardly any bytes are dirty.
//!
//! Channels count the pages of what they append, each time that one is written. That is the most that can be dirty, and most
//! often it is little. If it is not, the background looks at a sample of the index, some buckets in each poll, which pages
//! are spread over by a hash: a page that is overwritten again and again takes one slot.

use super::pace::high_percent;
use crate::engine::{Cache, Sealing, SealingStep, SegmentState};
use crate::pmem::Pmem;
use crate::units::{NS_PER_MS, NS_PER_US, Now, Seq};
use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

/// Buckets of a sample: it is off by a few percent in most cases.
const BUCKETS: usize = 256;
/// How many of them one poll looks at: about a microsecond.
const BUCKETS_PER_POLL: usize = 8;
/// The least time between two polls that do.
const LOOK_EVERY_NS: u64 = 50 * NS_PER_US;
/// The same of those that add up what channels have counted.
const COUNT_EVERY_NS: u64 = NS_PER_MS;
/// Moments that are remembered.
const MARK_COUNT: usize = 64;

/// See the module.
#[derive(Debug)]
pub(super) struct IndexShare {
    /// Numbers of the log, and how many pages had been counted, all of them in ksets below: rising.
    marks: VecDeque<(Seq, u64)>,
    counted_at: Now,
    /// Pages that may be dirty, in percent of what the index is made for.
    percent_max: u64,
    sample: Sample,
    /// Open segments are being sealed.
    sealing: Option<Sealing>,
    /// When everything below this is clean, that has helped as much as it could.
    sealed_upto: Seq,
}

#[derive(Debug, Default)]
struct Sample {
    looked_at: Now,
    /// When it began. Once it has moved, less is dirty.
    dirty_tail: Seq,
    bucket_count: usize,
    dirty_slots: u64,
    /// Those of them that open segments keep from becoming clean: something newer always comes to these.
    open_slots: u64,
}

impl Default for IndexShare {
    fn default() -> Self {
        Self {
            marks: VecDeque::with_capacity(MARK_COUNT),
            counted_at: Now(0),
            percent_max: 0,
            sample: Sample::default(),
            sealing: None,
            sealed_upto: Seq(0),
        }
    }
}

impl IndexShare {
    /// Counts, and goes on with the sample if there is to be one. What is known is told to all.
    pub(super) fn poll<P: Pmem>(&mut self, cache: &Cache<P>, now: Now) {
        let dirty_tail = cache.dirty_tail();
        // With fewer pages each finds a slot.
        let blocks = cache.index.page_room() * u64::from(cache.geometry.blocks_per_page());
        if cache.block_count() <= blocks {
            return;
        }
        let has_moved = dirty_tail != self.sample.dirty_tail;
        if has_moved {
            self.sample.begin(dirty_tail);
        }
        if has_moved || now.since_ns(self.counted_at) >= COUNT_EVERY_NS {
            self.counted_at = now;
            self.count(cache, dirty_tail);
            // What the last sample has found holds until there is another one, as far as so much can be dirty: batches
            // may follow faster than samples.
            let told = cache.index_dirty_percent.load(Ordering::Relaxed);
            tell(cache, told.min(self.percent_max));
        }
        let is_due = now.since_ns(self.sample.looked_at) >= LOOK_EVERY_NS;
        if is_due && self.percent_max >= high_percent(cache) {
            self.sample.looked_at = now;
            self.look(cache, dirty_tail);
        }
        self.seal(cache);
    }

    fn count<P: Pmem>(&mut self, cache: &Cache<P>, dirty_tail: Seq) {
        // The order matters: what has been counted was drawn before.
        let pages = cache.pages_written();
        fence(Ordering::Acquire);
        let seq_next = cache.seq_next();
        while let Some((seq, _)) = self.marks.get(1)
            && seq.0 <= dirty_tail.0 + 1
        {
            self.marks.pop_front();
        }
        if self.marks.back().is_none_or(|(seq, _)| *seq < seq_next) {
            if self.marks.len() == MARK_COUNT {
                // Every second one will do; the first tells how much is clean.
                let mut number = 0;
                self.marks.retain(|_| {
                    number += 1;
                    number % 2 == 1
                });
            }
            self.marks.push_back((seq_next, pages));
        }
        let first = self.marks.front();
        let clean = first.filter(|(seq, _)| seq.0 <= dirty_tail.0 + 1);
        // What is dirty since before the start was never counted.
        self.percent_max = clean.map_or(u64::MAX, |(_, clean)| {
            let dirty = pages.wrapping_sub(*clean);
            dirty.saturating_mul(100) / cache.index.page_room().max(1)
        });
    }

    fn look<P: Pmem>(&mut self, cache: &Cache<P>, dirty_tail: Seq) {
        let all = cache.index.bucket_count().min(BUCKETS);
        let sample = &mut self.sample;
        let end = (sample.bucket_count + BUCKETS_PER_POLL).min(all);
        for number in sample.bucket_count..end {
            sample.look_at(cache, number, all);
        }
        sample.bucket_count = end;
        if end < all {
            // Nobody else has touched most of them lately.
            let next = end..(end + BUCKETS_PER_POLL).min(all);
            cache.index.prefetch_sampled(next, all);
            return;
        }
        let share = sample.dirty_slots * cache.index.bucket_count() as u64 / all as u64;
        let percent = (share * 100 / cache.index.page_room().max(1)).min(self.percent_max);
        tell(cache, percent);
        let is_wanted =
            percent >= high_percent(cache) && 2 * sample.open_slots >= sample.dirty_slots;
        sample.begin(dirty_tail);
        if is_wanted && self.sealing.is_none() && self.may_seal(cache, dirty_tail) {
            self.sealing = Some(Sealing::default());
        }
    }

    /// A segment that is sealed takes room, however little is in it, until it is clean and reclaimed. So none is before the
    /// last ones are clean, nor while none would be, nor where free ones are few.
    fn may_seal<P: Pmem>(&self, cache: &Cache<P>, dirty_tail: Seq) -> bool {
        !cache.tail_stands()
            && dirty_tail.0 + 1 >= self.sealed_upto.0
            && cache.segments.free_count() >= cache.free_segments_wanted()
    }

    /// Ends the open segments of channels, which hold most of the pages that are to become clean.
    fn seal<P: Pmem>(&mut self, cache: &Cache<P>) {
        let Some(sealing) = &mut self.sealing else {
            return;
        };
        if cache.tail_stands() || sealing.poll(cache) == SealingStep::Finished {
            if sealing.has_sealed() {
                self.sealed_upto = cache.seq_next();
            }
            self.sealing = None;
        }
    }
}

impl Sample {
    fn begin(&mut self, dirty_tail: Seq) {
        *self = Self {
            looked_at: self.looked_at,
            dirty_tail,
            ..Self::default()
        };
    }

    fn look_at<P: Pmem>(&mut self, cache: &Cache<P>, number: usize, all: usize) {
        let asked = |place| {
            let segment = cache.segments.get(cache.geometry.segment_of(place));
            let is_dirty = !cache.is_clean(place);
            [is_dirty, is_dirty && segment.state() == SegmentState::Open]
        };
        let [dirty, open] = cache.index.sampled_slots(number, all, asked);
        self.dirty_slots += dirty;
        self.open_slots += open;
    }
}

fn tell<P: Pmem>(cache: &Cache<P>, percent: u64) {
    cache.index_dirty_percent.store(percent, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{FormatPolicy, Op, Status};
    use crate::sim::machine::Setup;
    use crate::sim::plain::{BackgroundRuns, Plain};
    use crate::sim::pmem::SimPmem;

    const UNMAP_BLOCKS: u64 = 64;

    fn setup() -> Setup {
        Setup {
            block_count: 1 << 17,
            segment_size_bytes: 64 << 10,
            segment_count: 64,
            ..Setup::default()
        }
    }

    fn plain_on(pmem: SimPmem) -> Plain<SimPmem> {
        let setup = setup();
        let base = vec![0; (setup.block_count * u64::from(setup.block_size_bytes)) as usize];
        let options = setup.options(FormatPolicy::Auto);
        Plain::new(pmem, base, options, BackgroundRuns::InDrains).unwrap()
    }

    /// A cache of which nothing is written back unless it is drained, and what is told of it.
    struct Rig {
        plain: Plain<SimPmem>,
        share: IndexShare,
        now: Now,
    }

    impl Rig {
        fn new() -> Self {
            Self::of(plain_on(SimPmem::new(setup().device_size_bytes())))
        }

        fn of(plain: Plain<SimPmem>) -> Self {
            let (share, now) = (IndexShare::default(), Now(0));
            Self { plain, share, now }
        }

        /// The channels in turn make so many pages dirty that the index is above the mark.
        fn unmap(&mut self) {
            let per_page = u64::from(self.plain.cache.geometry.blocks_per_page());
            let page_count = self.plain.cache.index.page_room() * 9 / 10;
            for number in 0..page_count * per_page / UNMAP_BLOCKS {
                let lba = number * UNMAP_BLOCKS;
                let status = self
                    .plain
                    .run(number as usize % 2, Op::Unmap, lba, UNMAP_BLOCKS);
                assert_eq!(status, Status::Success);
            }
        }

        /// Enough for several samples. Returns how many segments were sealed, and how many at most in one poll.
        fn poll(&mut self) -> (usize, usize) {
            let (start, mut most) = (self.sealed_count(), 0);
            for _ in 0..1000 {
                let before = self.sealed_count();
                self.now.0 += LOOK_EVERY_NS;
                self.share.poll(&self.plain.cache, self.now);
                most = most.max(self.sealed_count() - before);
            }
            (self.sealed_count() - start, most)
        }

        fn sealed_count(&self) -> usize {
            let segments = &self.plain.cache.segments;
            let is_sealed = |id: &_| segments.get(*id).state() == SegmentState::Sealed;
            segments.ids().filter(is_sealed).count()
        }

        fn told_percent(&self) -> u64 {
            self.plain.cache.index_dirty_percent.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn open_segments_are_sealed_one_by_one_and_again_when_that_has_helped() {
        let mut rig = Rig::new();
        rig.unmap();
        assert_eq!(rig.poll(), (2, 1));
        assert!(rig.told_percent() >= high_percent(&rig.plain.cache));
        // Nothing of that is clean, however much comes.
        for _ in 0..4 {
            rig.unmap();
            assert_eq!(rig.poll(), (0, 0));
        }
        assert!(rig.plain.drain());
        rig.unmap();
        assert_eq!(rig.poll(), (2, 1));
    }

    #[test]
    fn nothing_is_sealed_for_a_tail_that_stands_or_where_few_segments_are_free() {
        let mut rig = Rig::new();
        rig.unmap();
        rig.plain.cache.tail_stands.store(true, Ordering::Relaxed);
        assert_eq!(rig.poll(), (0, 0));
        rig.plain.cache.tail_stands.store(false, Ordering::Relaxed);
        let cache = &rig.plain.cache;
        while cache.segments.free_count() >= cache.free_segments_wanted() {
            assert!(cache.segments.open_next(None).is_some());
        }
        assert_eq!(rig.poll(), (0, 0));
    }

    #[test]
    fn pages_that_are_dirty_since_before_the_start_count() {
        let mut rig = Rig::new();
        rig.unmap();
        let image = rig.plain.pmem().live_image();
        let mut again = Rig::of(plain_on(SimPmem::from_image(image)));
        again.poll();
        assert!(again.told_percent() >= high_percent(&again.plain.cache));
    }
}
