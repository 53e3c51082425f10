//! The checksums of payloads by place, so that a read, which knows places alone, can compare what it reads: the keys in the
//! log, which have them too, are found by going through all keys of a segment.
//!
//! Kept as long as the cache keeps checksums (`data_crc`), so that reads can be verified from one moment to the next. For
//! each block of the segments there is a word, and where a page has several blocks, a byte that says which part of its
//! payload the block is: 1 MiB for a GiB of cache with blocks of 4096 bytes, 10 MiB with blocks of 512. The system
//! provides the memory when it is first touched.
//!
//! What is said of a place holds as long as somebody may read there (INV-CRC-2). It is said before the index names the place:
//! who finds the place there finds this. It is overwritten when the place is used again, which is when its segment was
//! reclaimed: whoever has found the place has left by then ([`super::grace`]), or has pinned the segment.

use super::cache::Cache;
use crate::media::{Geometry, Key, KeyKind, Place};
use crate::memory::{self, NoMemory};
use crate::units::{Lba, SegId};
use std::iter;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

/// Bits for the number of a block in its payload, below those for its length: a page has 8 blocks at most.
const BLOCK_BITS: u32 = 3;

/// Where the payload of a key lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Payload {
    start: Place,
    /// A page at the most.
    len_blocks: u32,
    crc: u32,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct PlaceCrcs {
    /// Of the payload that begins at a place.
    crcs: Vec<AtomicU32>,
    /// Which block of its payload lies at a place, and how many blocks that has, less one. Empty where that is one.
    parts: Vec<AtomicU8>,
}

impl PlaceCrcs {
    /// Of nothing yet.
    pub(crate) fn new(geometry: &Geometry) -> Result<Self, NoMemory> {
        let end = u64::from(geometry.segment_count()) * geometry.segment_size_bytes();
        let count = usize::try_from(end >> geometry.block_shift()).unwrap_or(usize::MAX);
        let is_split = geometry.blocks_per_page() > 1;
        let what = "the checksums of data_crc";
        Ok(Self {
            crcs: memory::zeroed(what, count)?,
            parts: memory::zeroed(what, if is_split { count } else { 0 })?,
        })
    }

    /// The payload of a key lies here. To be said before the index names the place.
    #[inline]
    pub(crate) fn note(&self, place: Place, key: &Key) {
        // It lies within the segments, as whoever has the key has checked.
        let first = place.0 as usize;
        self.crcs[first].store(key.crc, Ordering::Relaxed);
        if self.parts.is_empty() {
            return;
        }
        let len_blocks = key.len_blocks as usize;
        let len_code = (key.len_blocks as u8 - 1) << BLOCK_BITS;
        for (part, code) in self.parts[first..first + len_blocks].iter().zip(len_code..) {
            part.store(code, Ordering::Relaxed);
        }
    }

    /// The payload of which a part lies here, at a place that the index names.
    #[inline]
    fn payload_at(&self, place: Place) -> Payload {
        let code = self.parts.get(place.0 as usize);
        let code = code.map_or(0, |part| part.load(Ordering::Relaxed));
        let number = code & ((1 << BLOCK_BITS) - 1);
        let start = Place(place.0 - u64::from(number));
        Payload {
            start,
            len_blocks: u32::from(code >> BLOCK_BITS) + 1,
            crc: self.crcs[start.0 as usize].load(Ordering::Relaxed),
        }
    }

    /// Asks for what is said of a place.
    #[inline]
    pub(crate) fn prefetch(&self, place: Place) {
        self.crcs
            .get(place.0 as usize)
            .into_iter()
            .for_each(crate::pmem::prefetch_line);
        self.parts
            .get(place.0 as usize)
            .into_iter()
            .for_each(crate::pmem::prefetch_line);
    }
}

impl<P> Cache<P> {
    /// The payloads that an extent of the index lies in, which is in one piece there, with their segment.
    pub(super) fn payloads(
        &self,
        crcs: &PlaceCrcs,
        lba: Lba,
        place: Place,
        len_blocks: u64,
    ) -> impl Iterator<Item = (SegId, Key)> {
        let mut done_blocks = 0;
        iter::from_fn(move || {
            let (lba, place) = (Lba(lba.0 + done_blocks), Place(place.0 + done_blocks));
            let found = (done_blocks < len_blocks).then(|| self.key_at(crcs, lba, place))?;
            done_blocks += found.1.end().0 - lba.0;
            Some(found)
        })
    }

    /// What reads are to be compared with; `None`: they are not to be compared.
    #[inline]
    pub(crate) fn verifying(&self) -> Option<&PlaceCrcs> {
        let crcs = self.place_crcs.as_ref();
        crcs.filter(|_| self.settings.verifies_reads())
    }

    /// The segment and the key of what lies at a place that the index names for a block. Whether that is a read fill is not
    /// known.
    pub(crate) fn key_at(&self, crcs: &PlaceCrcs, lba: Lba, place: Place) -> (SegId, Key) {
        let payload = crcs.payload_at(place);
        let per_page = self.geometry.blocks_per_page();
        // A page has 8 blocks at most.
        let in_page = (lba.0 % u64::from(per_page)) as u32;
        // Where payloads overlap, which no writer lets them, it may be another one's. Then its checksum is wrong, which is all
        // that is to come of it (INV-OPEN-3).
        let number = (place.0 - payload.start.0) as u32;
        let before = number.min(in_page);
        let len_blocks = (payload.len_blocks - (number - before)).min(per_page + before - in_page);
        let id = self.geometry.segment_of(place);
        let off = (self.geometry).place_off(Place(place.0 - u64::from(before)));
        let payload_off = off.0 - self.geometry.segment_off(id).0;
        let key = Key {
            lba: Lba(lba.0 - u64::from(before)),
            len_blocks,
            kind: KeyKind::Data,
            // Segments have 1 GiB at most.
            payload_off: payload_off as u32,
            crc: payload.crc,
        };
        (id, key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::DataCrc;
    use crate::engine::invariant_tests::new_cache_of;
    use crate::sim::machine::Setup;

    fn key(len_blocks: u32, crc: u32) -> Key {
        Key {
            lba: Lba(0),
            len_blocks,
            kind: KeyKind::Data,
            payload_off: 0,
            crc,
        }
    }

    #[test]
    fn every_block_of_a_payload_leads_to_all_of_it() {
        // INV-CRC-2.
        let geometry = Geometry::plan(1 << 20, 16 << 10, 512).unwrap();
        let crcs = PlaceCrcs::new(&geometry).unwrap();
        let Place(first) = geometry.place(SegId(1), 8 << 10);
        // Twice, so that something else was said of each place before.
        for lens in [[8, 1, 2, 5], [1, 7, 5, 3]] {
            let mut start = first;
            for len_blocks in lens {
                let crc = 1000 + len_blocks;
                crcs.note(Place(start), &key(len_blocks, crc));
                start += u64::from(len_blocks);
            }
            let mut start = first;
            for len_blocks in lens {
                let payload = Payload {
                    start: Place(start),
                    len_blocks,
                    crc: 1000 + len_blocks,
                };
                for _ in 0..len_blocks {
                    assert_eq!(crcs.payload_at(Place(start)), payload);
                    start += 1;
                }
            }
        }
    }

    /// As a forged device may have it: they leave the segment no more than one of them does (INV-OPEN-3).
    #[test]
    fn payloads_that_overlap_lead_to_no_more_than_a_wrong_checksum() {
        let setup = Setup {
            data_crc: DataCrc::On,
            ..Setup::default()
        };
        let cache = new_cache_of(&setup);
        let geometry = &cache.geometry;
        assert_eq!(geometry.blocks_per_page(), 8);
        let last = SegId(geometry.segment_count() - 1);
        let size_bytes = geometry.segment_size_bytes() as u32;
        let Place(first) = geometry.place(last, size_bytes - 8 * 512);
        let crcs = PlaceCrcs::new(geometry).unwrap();
        for (at, in_page) in (0..8).flat_map(|at| (0..8).map(move |in_page| (at, in_page))) {
            // One block of another page, and a whole page over it.
            crcs.note(Place(first + at), &key(1, 5));
            crcs.note(Place(first), &key(8, 6));
            let (id, key) = cache.key_at(&crcs, Lba(16 + in_page), Place(first + at));
            assert_eq!(id, last);
            assert!(key.lba.0 >= 16 && key.end().0 <= 24, "{key:?}");
            assert!(
                (key.lba.0..key.end().0).contains(&(16 + in_page)),
                "{key:?}"
            );
            assert!(
                key.payload_off + key.len_blocks * 512 <= size_bytes,
                "{key:?}"
            );
        }
    }

    #[test]
    fn a_page_of_one_block_has_a_word_alone() {
        let geometry = Geometry::plan(1 << 20, 16 << 10, 4096).unwrap();
        let crcs = PlaceCrcs::new(&geometry).unwrap();
        assert!(crcs.parts.is_empty());
        let place = geometry.place(SegId(geometry.segment_count() - 1), 12 << 10);
        crcs.note(place, &key(1, 77));
        let payload = crcs.payload_at(place);
        assert_eq!(
            (payload.start, payload.len_blocks, payload.crc),
            (place, 1, 77)
        );
        // That was the last.
        assert_eq!(crcs.crcs.len() as u64, place.0 + 1);
    }
}
