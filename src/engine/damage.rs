//! Dirty data that are known to be damaged: the cache holds the only copy of them, and it is lost. What is clean is not
//! among them, whatever lies beside it: the key tells which it is (INV-READ-7), and only where that cannot be read any more
//! does everything count as dirty.
//!
//! Reads of these blocks fail, whatever the memory seems to hold by now. Everything else goes on. A block is
//! well again as soon as it is overwritten, since a write goes elsewhere.

use super::cache::{Cache, lock};
use super::config::DataCrc;
use super::stats::Counters;
use crate::index::BlockMap;
use crate::media::{Geometry, Key, Place};
use crate::memory::{self, NoMemory};
use crate::pmem::Pmem;
use crate::units::{Lba, PmemOff, SegId};
use serde::Serialize;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Blocks that are named. Of what is found beyond reads fail as well; and those that hold write-back up are named
/// besides, so many at most.
pub(crate) const DAMAGED_BLOCKS_MAX: usize = 1024;
/// Blocks of which one poll asks the index whether they have been overwritten, at most: some microseconds.
pub(crate) const ASKED_PER_POLL: usize = 64;

/// Neighbouring blocks whose only copy is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DamagedRange {
    /// First block.
    pub lba: u64,
    /// Number of blocks.
    pub len_blocks: u64,
}

/// What is wrong with a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// Its checksum is not that of its key.
    Checksum,
    /// Its memory cannot be read.
    Poisoned,
}

/// How well to look at a payload without a checksum; one with a checksum is always read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Whether each page of it is there.
    Probe,
    /// All of it.
    Read,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Damage {
    /// Damaged places. Reads ask for no more than this while all is well.
    count: AtomicUsize,
    /// A bit for each place: what is damaged is known however much it is, and readers take no lock. The system provides
    /// the memory for it where something is damaged.
    places: Vec<AtomicU64>,
    named: Mutex<Named>,
}

/// What is told. Both are sorted, and have their memory from the start.
#[derive(Debug)]
struct Named {
    blocks: Vec<(Lba, Place)>,
    /// Those that hold write-back up.
    holding: Vec<(Lba, Place)>,
    /// Of `blocks`: the next one of which the index is asked.
    next: usize,
}

/// The words of the bits in a range, and which of their bits are in it.
fn words(places: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let below = |bit: u64| if bit >= 64 { u64::MAX } else { (1 << bit) - 1 };
    (places.start / 64..places.end.div_ceil(64)).map(move |word| {
        let first = places.start.saturating_sub(word * 64);
        // A cache has fewer words than there are addresses.
        (word as usize, below(places.end - word * 64) & !below(first))
    })
}

impl Damage {
    /// Nothing is damaged.
    pub(crate) fn new(geometry: &Geometry) -> Result<Self, NoMemory> {
        let segments_bytes = u64::from(geometry.segment_count()) * geometry.segment_size_bytes();
        let place_count = segments_bytes >> geometry.block_shift();
        Ok(Self {
            count: AtomicUsize::new(0),
            places: memory::zeroed("what is damaged", place_count.div_ceil(64) as usize)?,
            named: Mutex::new(Named {
                blocks: Vec::with_capacity(DAMAGED_BLOCKS_MAX),
                holding: Vec::with_capacity(DAMAGED_BLOCKS_MAX),
                next: 0,
            }),
        })
    }

    /// Notes a block and where its damaged copy lies. `true`: it is news.
    pub(crate) fn add(&self, lba: Lba, place: Place) -> bool {
        let mut named = lock(&self.named);
        let bit = 1 << (place.0 % 64);
        let word = self.places.get((place.0 / 64) as usize);
        if word.is_none_or(|word| word.fetch_or(bit, Ordering::Relaxed) & bit != 0) {
            return false;
        }
        // Who sees the number sees the bit.
        self.count.fetch_add(1, Ordering::Release);
        let block = (lba, place);
        if named.blocks.len() < DAMAGED_BLOCKS_MAX
            && let Err(at) = named.blocks.binary_search(&block)
        {
            named.blocks.insert(at, block);
        }
        true
    }

    /// Whether any of the blocks from `start` on is damaged.
    #[inline]
    pub(crate) fn covers(&self, start: Place, len_blocks: u64) -> bool {
        self.count.load(Ordering::Acquire) > 0 && self.find(start, len_blocks)
    }

    #[cold]
    fn find(&self, start: Place, len_blocks: u64) -> bool {
        words(start.0..start.0 + len_blocks).any(|(word, mask)| {
            let word = self.places.get(word);
            word.is_some_and(|word| word.load(Ordering::Relaxed) & mask != 0)
        })
    }

    /// Says which blocks hold write-back up; sorted. They are named whatever else is damaged.
    pub(crate) fn hold(&self, blocks: &[(Lba, Place)]) {
        let mut named = lock(&self.named);
        named.holding.clear();
        let count = blocks.len().min(DAMAGED_BLOCKS_MAX);
        named.holding.extend_from_slice(&blocks[..count]);
    }

    /// The first block of a range that was told to hold write-back up; it may have been overwritten since.
    pub(crate) fn next_that_holds(&self, start: Lba, end: Lba) -> Option<(Lba, Place)> {
        let named = lock(&self.named);
        let at = named.holding.partition_point(|(lba, _)| *lba < start);
        let first = named.holding.get(at).copied();
        first.filter(|(lba, _)| *lba < end)
    }

    /// Forgets some of those that are named, and that are gone. Each call looks at others. Called by the background.
    fn forget_some(&self, is_gone: impl Fn(Lba, Place) -> bool) {
        if self.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut some = [(Lba(0), Place(0)); ASKED_PER_POLL];
        let mut count = 0;
        {
            let named = &mut *lock(&self.named);
            if named.next >= named.blocks.len() {
                named.next = 0;
            }
            let blocks = named.blocks[named.next..].iter();
            for (slot, block) in some.iter_mut().zip(blocks) {
                *slot = *block;
                count += 1;
            }
            named.next += count;
        }
        // Who reads takes no part in that: the index is not asked under the lock.
        for (lba, place) in &some[..count] {
            if is_gone(*lba, *place) {
                self.forget(*lba, *place);
            }
        }
    }

    fn forget(&self, lba: Lba, place: Place) {
        let mut named = lock(&self.named);
        if let Ok(at) = named.blocks.binary_search(&(lba, place)) {
            named.blocks.remove(at);
            named.next -= usize::from(at < named.next);
        }
        self.clear(place.0..place.0 + 1);
    }

    /// The memory of these places is used for something else from now on.
    fn forget_places(&self, places: Range<u64>) {
        if self.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut named = lock(&self.named);
        let is_elsewhere = |place: Place| !places.contains(&place.0);
        named.blocks.retain(|(_, place)| is_elsewhere(*place));
        self.clear(places);
    }

    /// The list is locked.
    fn clear(&self, places: Range<u64>) {
        let mut cleared = 0;
        for (word, mask) in words(places) {
            // Most of them have no memory yet, and need none.
            if let Some(word) = self.places.get(word)
                && word.load(Ordering::Relaxed) & mask != 0
            {
                let before = word.fetch_and(!mask, Ordering::Relaxed);
                cleared += (before & mask).count_ones() as usize;
            }
        }
        self.count.fetch_sub(cleared, Ordering::Release);
    }

    /// Those that are named, in order.
    pub(crate) fn ranges(&self) -> Vec<DamagedRange> {
        let mut lbas: Vec<Lba> = {
            let named = lock(&self.named);
            let all = named.blocks.iter().chain(&named.holding);
            all.map(|(lba, _)| *lba).collect()
        };
        lbas.sort_unstable();
        ranges_of(lbas)
    }
}

/// Sorted blocks, as ranges.
pub(crate) fn ranges_of(lbas: impl IntoIterator<Item = Lba>) -> Vec<DamagedRange> {
    let mut ranges: Vec<DamagedRange> = Vec::new();
    for Lba(lba) in lbas {
        match ranges.last_mut() {
            Some(last) if lba < last.lba + last.len_blocks => {}
            Some(last) if last.lba + last.len_blocks == lba => last.len_blocks += 1,
            _ => ranges.push(DamagedRange { lba, len_blocks: 1 }),
        }
    }
    ranges
}

impl<P: Pmem> Cache<P> {
    /// Where the payload of a key of this segment lies.
    pub(crate) fn payload_off(&self, id: SegId, key: &Key) -> PmemOff {
        self.geometry.payload_off(id, key)
    }

    /// Looks at the payload of a key of this segment. `buf` has room for a page.
    ///
    /// # Errors
    /// It is damaged.
    #[inline]
    pub(crate) fn check_payload(
        &self,
        id: SegId,
        key: &Key,
        buf: &mut [u8],
        depth: Depth,
    ) -> Result<(), Flaw> {
        let off = self.payload_off(id, key);
        let len_bytes = self.geometry.bytes(u64::from(key.len_blocks));
        if self.data_crc == DataCrc::Off && depth == Depth::Probe {
            return self.pmem.probe(off, len_bytes).map_err(|_| Flaw::Poisoned);
        }
        let payload = &mut buf[..len_bytes as usize];
        self.pmem.read(off, payload).map_err(|_| Flaw::Poisoned)?;
        let generation = self.segments.get(id).generation();
        let seed = self.checksums.payload(id.0, generation.0);
        if self.data_crc == DataCrc::Off || seed.checksum(payload) == key.crc {
            Ok(())
        } else {
            Err(Flaw::Checksum)
        }
    }

    /// Calls `found` with each block of a damaged payload that is not to be trusted, and its place. `buf` has room
    /// for a block.
    pub(crate) fn for_each_flawed_block(
        &self,
        id: SegId,
        key: &Key,
        flaw: Flaw,
        buf: &mut [u8],
        mut found: impl FnMut(Lba, Place),
    ) {
        let Place(first) = self.geometry.place(id, key.payload_off);
        let size_bytes = self.geometry.block_size_bytes() as usize;
        for block in 0..u64::from(key.len_blocks) {
            let place = Place(first + block);
            let off = self.geometry.place_off(place);
            // A checksum says that something is wrong, and not where.
            if flaw == Flaw::Checksum || self.pmem.read(off, &mut buf[..size_bytes]).is_err() {
                found(Lba(key.lba.0 + block), place);
            }
        }
    }

    /// Keeps the damaged blocks of a dirty key in mind, as far as nothing newer has taken their place, and counts
    /// what is news. Calls `found` with each of them, whatever has taken its place.
    pub(crate) fn note_damage(
        &self,
        counters: &Counters,
        (id, key): (SegId, &Key),
        flaw: Flaw,
        buf: &mut [u8],
        mut found: impl FnMut(Lba, Place),
    ) {
        let mut is_new = false;
        self.for_each_flawed_block(id, key, flaw, buf, |lba, place| {
            is_new |= !self.is_overwritten(lba, place) && self.damage.add(lba, place);
            found(lba, place);
        });
        count_flaw(counters, flaw, u64::from(is_new));
    }

    /// Forgets damage that something newer has taken the place of, and that in segments of which the base holds all by now:
    /// where keys cannot be read, what counted as dirty may have been clean. Some of it: each call looks at a bounded part.
    pub(crate) fn forget_overwritten_damage(&self) {
        self.damage
            .forget_some(|lba, place| self.is_well(lba, place));
    }

    /// Whether a block that was damaged at a place can be had from elsewhere. `false` also if that cannot be told yet.
    pub(crate) fn is_well(&self, lba: Lba, place: Place) -> bool {
        self.is_clean(place) || self.is_overwritten(lba, place)
    }

    /// Whether a block is read from elsewhere. `false` also if its page changes too fast to tell.
    pub(crate) fn is_overwritten(&self, lba: Lba, place: Place) -> bool {
        let per_page = u64::from(self.geometry.blocks_per_page());
        let at = self.index.locate(self.geometry.page_of(lba));
        self.index.lookup(at).is_some_and(|found| {
            let block = found.map.block((lba.0 % per_page) as u32);
            block != BlockMap::Mapped(place)
        })
    }

    /// Forgets the damage in a segment that is freed.
    pub(crate) fn forget_damage_in(&self, segment: SegId) {
        let Place(first) = self.geometry.place(segment, 0);
        let len_blocks = self.geometry.segment_size_bytes() >> self.geometry.block_shift();
        self.damage.forget_places(first..first + len_blocks);
    }
}

/// Counts damage by its kind.
pub(crate) fn count_flaw(counters: &Counters, flaw: Flaw, count: u64) {
    match flaw {
        Flaw::Checksum => counters.crc_errors.add(count),
        Flaw::Poisoned => counters.poisoned_reads.add(count),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With 2048 places.
    fn damage() -> Damage {
        Damage::new(&Geometry::plan(2 << 20, 16 << 10, 512).unwrap()).unwrap()
    }

    #[test]
    fn neighbouring_blocks_are_told_as_one_range() {
        let damage = damage();
        for (lba, place) in [(9, 90), (7, 70), (8, 81), (20, 82)] {
            assert!(damage.add(Lba(lba), Place(place)));
            assert!(!damage.add(Lba(lba), Place(place)));
        }
        let range = |lba, len_blocks| DamagedRange { lba, len_blocks };
        assert_eq!(damage.ranges(), [range(7, 3), range(20, 1)]);
        assert!(damage.covers(Place(60), 11) && !damage.covers(Place(71), 10));
        damage.forget_some(|_, place| place.0 != 82);
        assert_eq!(damage.ranges(), [range(20, 1)]);
        assert!(damage.covers(Place(82), 1) && !damage.covers(Place(81), 1));
        // What holds write-back up is told once.
        damage.hold(&[(Lba(20), Place(82)), (Lba(21), Place(5))]);
        assert_eq!(damage.ranges(), [range(20, 2)]);
    }

    #[test]
    fn each_damaged_place_is_found_and_no_other() {
        let damage = damage();
        let all = [0, 63, 64, 191, 1500, 1501, 1919];
        for place in all {
            damage.add(Lba(place), Place(place));
        }
        for kept in (0..=all.len()).rev() {
            damage.forget_some(|_, place| !all[..kept].contains(&place.0));
            check_found(&damage, &all[..kept]);
        }
        assert_eq!(damage.count.into_inner(), 0);
    }

    fn check_found(damage: &Damage, damaged: &[u64]) {
        for place in 0..1920 {
            for len_blocks in [1, 8, 200] {
                let places = place..place + len_blocks;
                let covered = damaged.iter().any(|bad| places.contains(bad));
                let found = damage.covers(Place(place), len_blocks);
                assert_eq!(found, covered, "{place}, {len_blocks}, {damaged:?}");
            }
        }
    }

    #[test]
    fn places_are_forgotten_with_their_segment_and_none_beside_them() {
        let damage = damage();
        let all = [0, 31, 32, 63, 64, 95, 96, 640];
        for (first, end) in [(32, 64), (0, 32), (64, 96), (32, 96), (100, 640)] {
            for place in all {
                damage.add(Lba(place), Place(place));
            }
            damage.forget_places(first..end);
            let left = all.iter().filter(|place| !(first..end).contains(*place));
            let left: Vec<u64> = left.copied().collect();
            check_found(&damage, &left);
            assert_eq!(
                damage.ranges(),
                ranges_of(left.iter().map(|place| Lba(*place)))
            );
        }
    }

    #[test]
    fn what_is_beyond_those_that_are_named_is_known_to_be_damaged() {
        let damage = damage();
        let news = (0..1920).filter(|lba| damage.add(Lba(*lba), Place(*lba)));
        assert_eq!(news.count(), 1920);
        let named = DAMAGED_BLOCKS_MAX as u64;
        let range = |lba, len_blocks| DamagedRange { lba, len_blocks };
        assert_eq!(damage.ranges(), [range(0, named)]);
        assert!((0..1920).all(|place| damage.covers(Place(place), 1)));
        damage.hold(&[(Lba(1800), Place(1800))]);
        assert_eq!(damage.ranges(), [range(0, named), range(1800, 1)]);
        // A call looks at some of them.
        damage.forget_some(|_, _| true);
        let asked = ASKED_PER_POLL as u64;
        assert_eq!(damage.ranges()[0], range(asked, named - asked));
        damage.hold(&[]);
        (1..named / asked).for_each(|_| damage.forget_some(|_, _| true));
        assert_eq!(damage.ranges(), []);
        assert!(!damage.covers(Place(0), named) && damage.covers(Place(named), 1));
    }

    #[test]
    fn all_that_are_named_get_their_turn_while_some_are_forgotten() {
        let damage = damage();
        assert!((0..1000).all(|lba| damage.add(Lba(lba), Place(lba))));
        // Every third is well.
        let calls = 1000_usize.div_ceil(ASKED_PER_POLL);
        (0..calls).for_each(|_| damage.forget_some(|lba, _| lba.0 % 3 == 0));
        assert!((0..1000).all(|place| damage.covers(Place(place), 1) == (place % 3 != 0)));
    }
}
