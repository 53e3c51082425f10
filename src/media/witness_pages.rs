//! In which pages a witness has blocks, more or less: most keys and writes lie elsewhere, and need not be compared with its
//! entries, which takes a hundred instructions.

use super::{Geometry, Witness};
use crate::units::Lba;
use std::ops::Range;

/// One bit for every 256th page: it has all pages that were added, and others. An entry has a page at most, which may lie in
/// two.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WitnessPages([u64; WitnessPages::WORDS]);

impl WitnessPages {
    const WORDS: usize = 4;
    /// Where something is longer, to look for all of its pages is no better than to compare it.
    const LOOKED_FOR_MAX: u64 = 8;

    /// Of entries that are in range.
    pub(crate) fn new(geometry: &Geometry, witness: &[Witness]) -> Self {
        let mut pages = Self::default();
        for entry in witness.iter().filter(|entry| entry.len_blocks > 0) {
            pages.add(geometry, entry);
        }
        pages
    }

    /// Adds an entry, which is in use.
    pub(crate) fn add(&mut self, geometry: &Geometry, entry: &Witness) {
        for page in pages_of(geometry, entry.lba, u64::from(entry.len_blocks)) {
            let (word, bit) = Self::place(page);
            self.0[word] |= bit;
        }
    }

    /// Whether an extent of a block at least may have blocks of the witness.
    #[inline]
    pub(crate) fn may_hold(&self, geometry: &Geometry, lba: Lba, len_blocks: u64) -> bool {
        let mut pages = pages_of(geometry, lba, len_blocks);
        pages.end - pages.start > Self::LOOKED_FOR_MAX
            || pages.any(|page| {
                let (word, bit) = Self::place(page);
                self.0[word] & bit != 0
            })
    }

    #[inline]
    fn place(page: u64) -> (usize, u64) {
        let bits = u64::from(u64::BITS);
        ((page / bits) as usize % Self::WORDS, 1 << (page % bits))
    }
}

#[inline]
fn pages_of(geometry: &Geometry, lba: Lba, len_blocks: u64) -> Range<u64> {
    let first = geometry.page_of(lba).0;
    first..first + geometry.pages_touched(lba, len_blocks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn geometry() -> Geometry {
        Geometry::plan(1 << 30, 1 << 20, 512).unwrap()
    }

    proptest! {
        #[test]
        fn an_extent_that_has_blocks_of_an_entry_is_not_passed_over(
            entries in prop::collection::vec((0u64..2000, 1u32..=8), 1..16),
            (lba, len_blocks) in (0u64..2000, 1u64..100),
        ) {
            let geometry = geometry();
            let witness: Vec<Witness> = entries
                .into_iter()
                .map(|(lba, len_blocks)| Witness { lba: Lba(lba), len_blocks, crc: 0 })
                .collect();
            let pages = WitnessPages::new(&geometry, &witness);
            let overlaps = witness.iter().any(|entry| {
                lba < entry.lba.0 + u64::from(entry.len_blocks) && entry.lba.0 < lba + len_blocks
            });
            prop_assert!(!overlaps || pages.may_hold(&geometry, Lba(lba), len_blocks));
        }
    }

    #[test]
    fn most_pages_are_passed_over() {
        let geometry = geometry();
        let per_page = u64::from(geometry.blocks_per_page());
        let entry = Witness {
            lba: Lba(77 * per_page),
            len_blocks: 1,
            crc: 0,
        };
        let pages = WitnessPages::new(&geometry, &[entry]);
        let held = (0..1024).filter(|page| pages.may_hold(&geometry, Lba(page * per_page), 1));
        assert_eq!(held.collect::<Vec<_>>(), [77, 333, 589, 845]);
    }
}
