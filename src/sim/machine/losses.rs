//! Memory of the cache device that goes bad while it is in use.

use super::super::pmem::SimState;
use super::super::prng::Prng;
use super::Machine;
use crate::engine::SegmentState;
use crate::index::BlockMap;
use crate::media::{KEYS_START_BYTES, Place};
use crate::pmem::LINE_SIZE_BYTES;
use crate::units::{Page, PmemOff, SegId};

/// A cache with fewer segments may have no room left without one.
const SEGMENTS_MIN: usize = 6;

impl Machine {
    /// The memory of some keys of a segment with dirty data cannot be read any more; dice. Not if that has happened
    /// before, or there are few segments. After a crash it reads well again, since no crash image knows of it.
    pub fn lose_keys(&self, dice: u64) {
        let (cache, mut prng) = (self.cache(), Prng::new(dice));
        let segments = &cache.segments;
        let all_bytes = self.setup().device_size_bytes();
        let lost = |state: &SimState| state.first_poisoned(PmemOff(0), all_bytes);
        if segments.count() < SEGMENTS_MIN || self.pmem().with_state(lost).is_some() {
            return;
        }
        let dirty_tail = cache.dirty_tail();
        let is_dirty = |id: &SegId| {
            let segment = segments.get(*id);
            let in_use = matches!(segment.state(), SegmentState::Open | SegmentState::Sealed);
            in_use && segment.key_end() > KEYS_START_BYTES && !segment.is_on_base(dirty_tail)
        };
        let dirty: Vec<SegId> = segments.ids().filter(is_dirty).collect();
        if dirty.is_empty() {
            return;
        }
        let id = prng.pick(&dirty);
        let lines = u64::from(segments.get(id).key_end() - KEYS_START_BYTES) / LINE_SIZE_BYTES;
        let line = prng.below(lines);
        self.poison_keys(id, line);
    }

    /// A bit of a payload flips that the base holds, and goes on to hold, and that is not lent; dice. Only if reads are
    /// verified: all others would see it.
    pub fn flip_bit(&self, dice: u64) {
        let (cache, mut prng) = (self.cache(), Prng::new(dice));
        if cache.verifying().is_none() {
            return;
        }
        let is_clean = |place: &Place| {
            let segment = cache.segments.get(cache.geometry.segment_of(*place));
            segment.state() == SegmentState::Sealed
                && segment.is_on_base(cache.dirty_tail())
                && !segment.is_pinned()
        };
        let per_page = u64::from(cache.geometry.blocks_per_page());
        let count = cache.block_count();
        let first = prng.below(count);
        let place = (first..count).chain(0..first).find_map(|lba| {
            let found = cache.index.lookup(cache.index.locate(Page(lba / per_page)));
            match found?.map.block((lba % per_page) as u32) {
                BlockMap::Mapped(place) => Some(place).filter(is_clean),
                BlockMap::Absent | BlockMap::Zero(_) => None,
            }
        });
        if let Some(place) = place {
            let byte = prng.below(cache.geometry.bytes(1));
            let off = cache.geometry.place_off(place).plus(byte);
            self.pmem().flip_bit(off, prng.below(8) as u32);
        }
    }

    /// Line number `line` of the keys of a segment cannot be read any more. Returns where it is. What lies in the segment
    /// goes to the base across barriers.
    pub fn poison_keys(&self, id: SegId, line: u64) -> PmemOff {
        self.with_outside(|outside| outside.relaxed = true);
        let start = self.cache().geometry.segment_off(id);
        let off = start.plus(u64::from(KEYS_START_BYTES) + line * LINE_SIZE_BYTES);
        self.pmem().poison(off);
        off
    }
}
