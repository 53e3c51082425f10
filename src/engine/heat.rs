//! Heat: how often what lies where was read again, so that reclaiming keeps it.
//!
//! A counter from 0 to 3 for each 4 KiB of the segments, a byte each: 0.25 MiB for a GiB of cache. It tells what
//! is worth a copy, and nothing depends on it: two cores that count at once may count one read. Reads of an open segment
//! do not count: what was just brought in is often read again at once, and then never more (a second part of a page,
//! a second look of a file system), which says nothing (as "correlated references" in O'Neil et al., LRU-K, 1993).
//! Two bits are enough, as in S3-FIFO (Yang et al., SOSP 2023).

use super::cache::Cache;
use super::segments::SegmentState;
use crate::media::{Geometry, Place};
use crate::memory::{self, NoMemory};
use crate::pmem::{Pmem, prefetch_line};
use crate::units::SegId;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// The highest count.
const HEAT_MAX: u8 = 3;

/// Counts that one poll clears, at most: some microseconds. A segment of 64 MiB has so many.
const COOLED_PER_POLL: usize = 16 << 10;

/// See the module.
#[derive(Debug)]
pub(crate) struct Heat {
    counts: Vec<AtomicU8>,
    /// For each segment, whether anything in it was counted: of most, nothing is.
    is_warm: Vec<AtomicBool>,
    /// Blocks of a page, as a power of two.
    page_shift: u32,
    pages_per_segment: usize,
}

impl Heat {
    /// Nothing was read again.
    pub(crate) fn new(geometry: &Geometry) -> Result<Self, NoMemory> {
        let blocks_per_page = u64::from(geometry.blocks_per_page());
        let page_bytes = geometry.bytes(blocks_per_page);
        // A segment has 1 GiB at the most.
        let pages_per_segment = (geometry.segment_size_bytes() / page_bytes) as usize;
        let segment_count = geometry.segment_count() as usize;
        let what = "what is read often";
        Ok(Self {
            counts: memory::zeroed(what, pages_per_segment * segment_count)?,
            is_warm: memory::zeroed(what, segment_count)?,
            page_shift: blocks_per_page.trailing_zeros(),
            pages_per_segment,
        })
    }

    #[inline]
    fn number_of(&self, place: Place) -> usize {
        place.0.wrapping_shr(self.page_shift) as usize
    }

    /// Asks for the count of what lies here.
    #[inline]
    pub(super) fn prefetch(&self, place: Place) {
        self.counts
            .get(self.number_of(place))
            .into_iter()
            .for_each(prefetch_line);
    }

    /// Counts a read of what lies here, in one segment.
    #[inline]
    fn note(&self, segment: SegId, place: Place, len_blocks: u64) {
        let first = self.number_of(place);
        let last = self.number_of(Place(place.0 + len_blocks - 1));
        for count in self.counts.get(first..=last).unwrap_or_default() {
            let now = count.load(Ordering::Relaxed);
            if now < HEAT_MAX {
                count.store(now + 1, Ordering::Relaxed);
                if now == 0 {
                    self.warm(segment);
                }
            }
        }
    }

    fn warm(&self, segment: SegId) {
        if !self.is_warm(segment) {
            self.is_warm[segment.index()].store(true, Ordering::Relaxed);
        }
    }

    /// Whether anything in the segment was read again.
    #[inline]
    pub(crate) fn is_warm(&self, segment: SegId) -> bool {
        self.is_warm[segment.index()].load(Ordering::Relaxed)
    }

    /// How often what lies here, in this segment, was read again, up to 3.
    #[inline]
    pub(crate) fn get(&self, segment: SegId, place: Place) -> u8 {
        if !self.is_warm(segment) {
            return 0;
        }
        let count = self.counts.get(self.number_of(place));
        count.map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// What lies here was brought here, and has been read so often.
    pub(crate) fn set(&self, segment: SegId, place: Place, heat: u8) {
        // Nothing was counted in it since it was free.
        if heat > 0
            && let Some(count) = self.counts.get(self.number_of(place))
        {
            count.store(heat, Ordering::Relaxed);
            self.warm(segment);
        }
    }

    /// Something else is going to lie in the segment, which nobody reads any more: forgets what was counted in it, some of it,
    /// from page `from` on. Returns where to go on; `None`: that was all.
    pub(crate) fn cool(&self, id: SegId, from: usize) -> Option<usize> {
        if !self.is_warm(id) {
            return None;
        }
        let end = self.pages_per_segment.min(from + COOLED_PER_POLL);
        let first = id.index() * self.pages_per_segment;
        let counts = self.counts.get(first + from..first + end);
        for count in counts.unwrap_or_default() {
            count.store(0, Ordering::Relaxed);
        }
        if end < self.pages_per_segment {
            return Some(end);
        }
        self.is_warm[id.index()].store(false, Ordering::Relaxed);
        None
    }
}

impl<P: Pmem> Cache<P> {
    /// What lies here, in one segment, was read.
    #[inline]
    pub(super) fn note_hit(&self, place: Place, len_blocks: u64) {
        let segment = self.geometry.segment_of(place);
        if self.segments.get(segment).state() != SegmentState::Open {
            self.heat.note(segment, place, len_blocks);
        }
    }

    /// Whether what lies here was read again.
    pub(super) fn is_hot(&self, place: Place) -> bool {
        self.heat.get(self.geometry.segment_of(place), place) > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heat_is_counted_by_page_and_goes_with_the_segment() {
        let geometry = Geometry::plan(1 << 20, 16 << 10, 512).unwrap();
        let heat = Heat::new(&geometry).unwrap();
        let second = geometry.place(SegId(1), 8 << 10);
        heat.note(SegId(1), second, 8);
        heat.note(SegId(1), Place(second.0 + 7), 2);
        assert_eq!(heat.get(SegId(1), second), 2);
        assert_eq!(heat.get(SegId(1), Place(second.0 + 8)), 1);
        assert_eq!(heat.get(SegId(1), Place(second.0 + 16)), 0);
        (0..9).for_each(|_| heat.note(SegId(1), second, 1));
        assert_eq!(heat.get(SegId(1), second), HEAT_MAX);
        assert_eq!(heat.cool(SegId(0), 0), None);
        assert_eq!(heat.get(SegId(1), second), HEAT_MAX);
        assert_eq!(heat.cool(SegId(1), 0), None);
        assert_eq!(heat.get(SegId(1), second), 0);
    }

    #[test]
    fn a_large_segment_cools_over_many_polls_and_wholly() {
        const SEGMENT_BYTES: u64 = 256 << 20;
        let geometry = Geometry::plan(5 * SEGMENT_BYTES, SEGMENT_BYTES, 4096).unwrap();
        let heat = Heat::new(&geometry).unwrap();
        let id = SegId(1);
        let pages =
            [0, 1, 16_383, 16_384, 40_000, 65_535].map(|page| geometry.place(id, page << 12));
        let beside = geometry.place(SegId(0), 65_535 << 12);
        heat.note(SegId(0), beside, 1);
        pages.iter().for_each(|page| heat.note(id, *page, 1));
        let (mut from, mut polls) = (Some(0), 0);
        while let Some(at) = from {
            assert!(heat.is_warm(id), "what is left would be forgotten");
            from = heat.cool(id, at);
            polls += 1;
        }
        assert_eq!(polls, 4);
        // Warm again, it knows of nothing else.
        heat.note(id, geometry.place(id, 7 << 12), 1);
        assert!(pages.iter().all(|page| heat.get(id, *page) == 0));
        assert_eq!(heat.get(SegId(0), beside), 1);
    }
}
