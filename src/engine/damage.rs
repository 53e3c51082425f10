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
use crate::media::{Key, Place};
use crate::pmem::Pmem;
use crate::units::{Lba, PmemOff, SegId};
use serde::Serialize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Blocks that are kept in mind; what is found beyond is found again when one of them is well.
const DAMAGED_BLOCKS_MAX: usize = 1024;

/// Neighbouring places that share a bit of the filter, and bits of it: it takes eight lines.
const GROUP_BLOCKS: u64 = 64;
const FILTER_BITS: u64 = 4096;

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
    /// Reads ask for no more than this while all is well.
    count: AtomicUsize,
    /// Where this has no bit, nothing is damaged: what is well takes no lock when something else is not.
    filter: [AtomicU64; (FILTER_BITS / 64) as usize],
    blocks: Mutex<Vec<(Lba, Place)>>,
}

/// The word and the bit of the filter that stand for a group of places.
fn filter_bit(group: u64) -> (usize, u64) {
    let bit = group % FILTER_BITS;
    ((bit / 64) as usize, 1 << (bit % 64))
}

impl Damage {
    pub(crate) fn new() -> Self {
        Self {
            count: AtomicUsize::new(0),
            filter: [const { AtomicU64::new(0) }; (FILTER_BITS / 64) as usize],
            blocks: Mutex::new(Vec::with_capacity(DAMAGED_BLOCKS_MAX)),
        }
    }

    /// Notes a block and where its damaged copy lies. `true`: it is news.
    pub(crate) fn add(&self, lba: Lba, place: Place) -> bool {
        let mut blocks = lock(&self.blocks);
        let is_new = !blocks.contains(&(lba, place)) && blocks.len() < DAMAGED_BLOCKS_MAX;
        if is_new {
            blocks.push((lba, place));
            let (word, bit) = filter_bit(place.0 / GROUP_BLOCKS);
            self.filter[word].fetch_or(bit, Ordering::Relaxed);
            // Who sees the number sees the bit.
            self.count.store(blocks.len(), Ordering::Release);
        }
        is_new
    }

    /// Whether any of the blocks from `start` on is damaged.
    #[inline]
    pub(crate) fn covers(&self, start: Place, len_blocks: u64) -> bool {
        self.count.load(Ordering::Acquire) > 0
            && self.may_cover(start, len_blocks)
            && self.find(start, len_blocks)
    }

    #[cold]
    fn may_cover(&self, start: Place, len_blocks: u64) -> bool {
        let end = start.0 + len_blocks;
        (start.0 / GROUP_BLOCKS..end.div_ceil(GROUP_BLOCKS)).any(|group| {
            let (word, bit) = filter_bit(group);
            self.filter[word].load(Ordering::Relaxed) & bit != 0
        })
    }

    #[cold]
    fn find(&self, start: Place, len_blocks: u64) -> bool {
        let places = start.0..start.0 + len_blocks;
        let blocks = lock(&self.blocks);
        blocks.iter().any(|(_, place)| places.contains(&place.0))
    }

    pub(crate) fn contains(&self, lba: Lba) -> bool {
        lock(&self.blocks).iter().any(|(block, _)| *block == lba)
    }

    /// The memory of these places is used for something else from now on.
    pub(crate) fn forget(&self, is_gone: impl Fn(Lba, Place) -> bool) {
        if self.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut blocks = lock(&self.blocks);
        blocks.retain(|(lba, place)| !is_gone(*lba, *place));
        let mut filter = [0; (FILTER_BITS / 64) as usize];
        for (_, place) in blocks.iter() {
            let (word, bit) = filter_bit(place.0 / GROUP_BLOCKS);
            filter[word] |= bit;
        }
        for (kept, bits) in self.filter.iter().zip(filter) {
            kept.store(bits, Ordering::Relaxed);
        }
        self.count.store(blocks.len(), Ordering::Release);
    }

    /// All of them, in order.
    pub(crate) fn ranges(&self) -> Vec<DamagedRange> {
        let mut lbas: Vec<u64> = lock(&self.blocks).iter().map(|(lba, _)| lba.0).collect();
        lbas.sort_unstable();
        lbas.dedup();
        let mut ranges: Vec<DamagedRange> = Vec::new();
        for lba in lbas {
            match ranges.last_mut() {
                Some(last) if last.lba + last.len_blocks == lba => last.len_blocks += 1,
                _ => ranges.push(DamagedRange { lba, len_blocks: 1 }),
            }
        }
        ranges
    }
}

impl<P: Pmem> Cache<P> {
    /// Where the payload of a key of this segment lies.
    pub(crate) fn payload_off(&self, id: SegId, key: &Key) -> PmemOff {
        self.geometry
            .segment_off(id)
            .plus(u64::from(key.payload_off))
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
    /// what is news.
    pub(crate) fn note_damage(
        &self,
        counters: &Counters,
        id: SegId,
        key: &Key,
        flaw: Flaw,
        buf: &mut [u8],
    ) {
        let mut is_new = false;
        self.for_each_flawed_block(id, key, flaw, buf, |lba, place| {
            is_new |= !self.is_overwritten(lba, place) && self.damage.add(lba, place);
        });
        count_flaw(counters, flaw, u64::from(is_new));
    }

    /// Forgets damage that something newer has taken the place of, and that in segments of which the base holds all by now:
    /// where keys cannot be read, what counted as dirty may have been clean.
    pub(crate) fn forget_overwritten_damage(&self) {
        self.damage
            .forget(|lba, place| self.is_clean(place) || self.is_overwritten(lba, place));
    }

    /// Whether a block is read from elsewhere. `false` also if its page changes too fast to tell.
    pub(super) fn is_overwritten(&self, lba: Lba, place: Place) -> bool {
        let per_page = u64::from(self.geometry.blocks_per_page());
        let at = self.index.locate(self.geometry.page_of(lba));
        self.index.lookup(at).is_some_and(|found| {
            let block = found.map.block((lba.0 % per_page) as u32);
            block != BlockMap::Mapped(place)
        })
    }

    /// Forgets the damage in a segment that is freed.
    pub(crate) fn forget_damage_in(&self, segment: SegId) {
        self.damage
            .forget(|_, place| self.geometry.segment_of(place) == segment);
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

    #[test]
    fn neighbouring_blocks_are_told_as_one_range() {
        let damage = Damage::new();
        for (lba, place) in [(9, 90), (7, 70), (8, 81), (20, 82)] {
            assert!(damage.add(Lba(lba), Place(place)));
            assert!(!damage.add(Lba(lba), Place(place)));
        }
        let range = |lba, len_blocks| DamagedRange { lba, len_blocks };
        assert_eq!(damage.ranges(), [range(7, 3), range(20, 1)]);
        assert!(damage.covers(Place(60), 11) && !damage.covers(Place(71), 10));
        damage.forget(|_, place| place.0 != 82);
        assert_eq!(damage.ranges(), [range(20, 1)]);
        assert!(damage.covers(Place(82), 1) && !damage.covers(Place(81), 1));
    }

    #[test]
    fn each_damaged_place_is_found_and_no_other() {
        let damage = Damage::new();
        // Two of them share a bit, two a group; one is the last of a group.
        let all = [0, 63, 64 * 4096 + 5, 64 * 4097, 64 * 9000 + 63];
        for place in all {
            damage.add(Lba(place), Place(place));
        }
        for kept in (0..=all.len()).rev() {
            damage.forget(|_, place| !all[..kept].contains(&place.0));
            for place in all
                .iter()
                .flat_map(|place| place.saturating_sub(9)..place + 9)
            {
                for len_blocks in [1, 8, 200] {
                    let covered = all[..kept].iter();
                    let covered = { covered }.any(|bad| (place..place + len_blocks).contains(bad));
                    let found = damage.covers(Place(place), len_blocks);
                    assert_eq!(found, covered, "{place}, {len_blocks}, {kept}");
                }
            }
        }
    }

    #[test]
    fn what_is_beyond_the_limit_is_not_kept() {
        let damage = Damage::new();
        let noted = (0..2000).filter(|lba| damage.add(Lba(*lba), Place(*lba)));
        assert_eq!(noted.count(), DAMAGED_BLOCKS_MAX);
    }
}
