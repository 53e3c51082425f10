//! Memory of the cache device that goes bad while it is in use.

use super::super::pmem::SimState;
use super::super::prng::Prng;
use super::Machine;
use crate::engine::{Depth, Flaw, SegmentState};
use crate::index::BlockMap;
use crate::media::{KEYS_START_BYTES, Place};
use crate::pmem::LINE_SIZE_BYTES;
use crate::units::{Lba, PAGE_SIZE_BYTES, Page, PmemOff, SegId};

/// A cache with fewer segments may have no room left without one.
const SEGMENTS_MIN: usize = 6;
/// Keys begin where a page does.
const LINES_PER_PAGE: u64 = PAGE_SIZE_BYTES as u64 / LINE_SIZE_BYTES;

impl Machine {
    /// The memory of some keys of a segment with dirty data cannot be read any more; dice. It is a line of them, or a
    /// page, as real memory is lost: that only of a sealed segment, since one that is open would be stored to, which
    /// fails the cache (INV-PMEM-4), and only one without payloads, since these would be lost as well. Not if that has
    /// happened before, or there are few segments; nor where a bit has flipped, which a salvage cannot see. After a crash it reads well again, since no crash image knows of it.
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
            in_use
                && segment.key_end() > KEYS_START_BYTES
                && !segment.is_on_base(dirty_tail)
                && !self.has_flipped(*id)
        };
        let dirty: Vec<SegId> = segments.ids().filter(is_dirty).collect();
        if dirty.is_empty() {
            return;
        }
        let id = prng.pick(&dirty);
        let lines = u64::from(segments.get(id).key_end() - KEYS_START_BYTES) / LINE_SIZE_BYTES;
        let line = prng.below(lines);
        let first = line / LINES_PER_PAGE * LINES_PER_PAGE;
        let page_end = KEYS_START_BYTES + ((first + LINES_PER_PAGE) * LINE_SIZE_BYTES) as u32;
        let is_sealed = segments.get(id).state() == SegmentState::Sealed;
        if prng.percent(50) && is_sealed && page_end <= self.payloads_start(id) {
            for line in first..first + LINES_PER_PAGE {
                self.poison_keys(id, line);
            }
        } else {
            self.poison_keys(id, line);
        }
    }

    /// Where the payloads of a segment begin whose keys can be read.
    fn payloads_start(&self, id: SegId) -> u32 {
        let Some(keys) = self.cache().keys_of(id) else {
            return 0;
        };
        let payloads = keys.iter().filter(|(_, key)| key.kind.has_payload());
        let offs = payloads.map(|(_, key)| key.payload_off);
        offs.min().unwrap_or(u32::MAX)
    }

    /// Whether a bit of a payload has flipped.
    fn has_flipped(&self, id: SegId) -> bool {
        let (cache, mut buf) = (self.cache(), [0; PAGE_SIZE_BYTES as usize]);
        let keys = cache.keys_of(id).unwrap_or_default();
        let mut payloads = keys.iter().filter(|(_, key)| key.kind.has_payload());
        payloads.any(|(_, key)| {
            cache.check_payload(id, key, &mut buf, Depth::Read) == Err(Flaw::Checksum)
        })
    }

    /// A bit of a payload flips that the base holds, and goes on to hold, and that is not lent; dice. Only if reads are
    /// verified: all others would see it. Not where keys are lost: then nobody knows any more that it is clean.
    pub fn flip_bit(&self, dice: u64) {
        let (cache, mut prng) = (self.cache(), Prng::new(dice));
        if cache.verifying().is_none() {
            return;
        }
        let is_clean = |lba: Lba, place: Place| {
            let id = cache.geometry.segment_of(place);
            let segment = cache.segments.get(id);
            let in_use = matches!(segment.state(), SegmentState::Open | SegmentState::Sealed);
            in_use
                && !segment.is_pinned()
                && cache.keys_of(id).is_some()
                && cache.is_clean_by_key(lba, place)
        };
        let per_page = u64::from(cache.geometry.blocks_per_page());
        let count = cache.block_count();
        let first = prng.below(count);
        let place = (first..count).chain(0..first).find_map(|lba| {
            let found = cache.index.lookup(cache.index.locate(Page(lba / per_page)));
            match found?.map.block((lba % per_page) as u32) {
                BlockMap::Mapped(place) => Some(place).filter(|place| is_clean(Lba(lba), *place)),
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

#[cfg(test)]
mod tests {
    use super::super::Setup;
    use super::*;
    use crate::engine::Fua;

    /// Lines that cannot be read, from the first on.
    fn lost_lines(machine: &Machine) -> (u64, u64) {
        let all_bytes = machine.setup().device_size_bytes();
        machine.pmem().with_state(|state| {
            let line = |number: u64| PmemOff(number * LINE_SIZE_BYTES);
            let is_lost = |number: &u64| state.first_poisoned(line(*number), 1).is_some();
            let lost = (0..all_bytes / LINE_SIZE_BYTES).filter(is_lost);
            let lost: Vec<u64> = lost.collect();
            (lost[0], lost.len() as u64)
        })
    }

    #[test]
    fn keys_are_lost_by_the_line_and_by_the_page_and_no_payload_with_them() {
        let (mut by_line, mut by_page) = (0, 0);
        for dice in 0..60 {
            let setup = Setup {
                block_count: 128,
                segment_size_bytes: 64 << 10,
                core_count: 1,
                yield_percent: 0,
                ..Setup::default()
            };
            let machine = Machine::new(setup, dice, None).expect("it is made");
            for lba in 0..120 {
                machine.write(0, lba, 1, Fua::No, &[]);
                machine.poll_core(0);
            }
            machine.lose_keys(dice);
            let (first, count) = lost_lines(&machine);
            match count {
                1 => by_line += 1,
                LINES_PER_PAGE => {
                    by_page += 1;
                    assert_eq!(first % LINES_PER_PAGE, 0);
                }
                other => panic!("{other} lines were lost"),
            }
            // All of it is cached; what is lost would be an error.
            machine.read(0, 0, 120, &[]);
            machine.poll_core(0);
            machine.verdict().expect("everything can be read");
            assert_eq!(machine.cache().stats().poisoned_reads, 0);
        }
        assert!(by_line > 10 && by_page > 5, "{by_line} and {by_page}");
    }
}
