//! The index against a map, and what its writers must not do.

use super::*;
use crate::media::{Geometry, Place};
use crate::units::Page;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const PAGES: u64 = 1 << 12;
const ME: u16 = 1;
const OTHER: u16 = 2;

fn geometry(block_size_bytes: u32) -> Geometry {
    Geometry::plan(1 << 20, 16 << 10, block_size_bytes).expect("a small device")
}

fn index(block_size_bytes: u32) -> Index {
    Index::new(geometry(block_size_bytes), PAGES, 1)
}

fn set(index: &Index, page: u64, first: u32, len_blocks: u32, target: Target) {
    let at = index.locate(Page(page));
    assert_eq!(index.claim(at, ME), Claim::Taken);
    let slot = index.reserve(at).expect("few pages");
    index.publish(slot, first, len_blocks, target);
    index.release(at.bucket(), ME);
}

fn block(index: &Index, page: u64, block: u32) -> BlockMap {
    let found = index.lookup(index.locate(Page(page)));
    found.expect("nobody writes").map.block(block)
}

#[test]
fn no_two_pages_share_an_entry() {
    // INV-INDEX-7, for sizes around powers of two.
    for pages in [1, 2, 3, 4, 5, 1000, PAGES - 1, PAGES, PAGES + 1, 1 << 16] {
        let index = Index::new(geometry(4096), pages, 1);
        let mut seen = BTreeSet::new();
        for page in 0..pages {
            let at = index.locate(Page(page));
            assert!(seen.insert(format!("{at:?}")), "page {page} of {pages}");
        }
    }
}

#[test]
fn a_bucket_has_one_holder_and_its_version_tells_when_it_was_released() {
    // INV-INDEX-4.
    let index = index(4096);
    let at = index.locate(Page(7));
    let before = index.version(at);
    assert_eq!(index.claim(at, ME), Claim::Taken);
    assert_eq!(index.claim(at, ME), Claim::Held);
    assert_eq!(index.claim(at, OTHER), Claim::Busy);
    assert_eq!(
        index.lookup(at).expect("nobody writes").version,
        Version::UNSTABLE
    );
    index.release(at.bucket(), ME);
    assert_ne!(index.version(at), before);
    assert_eq!(index.claim(at, OTHER), Claim::Taken);
}

#[test]
#[should_panic(expected = "INV-INDEX-4")]
fn a_claim_of_somebody_else_is_not_released() {
    let index = index(4096);
    let at = index.locate(Page(7));
    assert_eq!(index.claim(at, ME), Claim::Taken);
    index.release(at.bucket(), OTHER);
}

#[test]
#[should_panic(expected = "INV-INDEX-1")]
fn a_page_without_a_slot_is_not_published() {
    let index = index(4096);
    let slot = index.reserve(index.locate(Page(7))).expect("it is empty");
    index.unreserve(slot);
    index.publish(slot, 0, 1, Target::Zero(Place(1)));
}

#[test]
#[should_panic(expected = "INV-INDEX-3")]
fn a_page_of_one_block_has_no_line_in_the_side_table() {
    let index = index(4096);
    let at = index.locate(Page(7));
    let slot = index.reserve(at).expect("it is empty");
    index.publish(slot, 0, 0, Target::Zero(Place(1)));
}

#[test]
#[should_panic(expected = "INV-INDEX-5")]
fn a_slot_that_is_left_reserved_is_noticed() {
    let index = index(4096);
    index.reserve(index.locate(Page(7))).expect("it is empty");
    index.check_at_rest();
}

#[test]
fn a_full_neighbourhood_refuses_and_gives_back_all_it_took() {
    // INV-INDEX-6: entries far from home, and their removal.
    let index = index(4096);
    let mut taken = Vec::new();
    let full =
        (0..PAGES)
            .map(|page| index.locate(Page(page)))
            .find(|at| match index.reserve(*at) {
                Ok(slot) => {
                    assert!(index.reserve(*at).is_ok(), "it is there now");
                    taken.push(slot);
                    false
                }
                Err(IndexFull) => true,
            });
    let full = full.expect("there are more pages than slots");
    for slot in taken {
        index.unreserve(slot);
    }
    index.check_at_rest();
    assert!(index.reserve(full).is_ok());
}

fn target() -> impl Strategy<Value = Target> {
    prop_oneof![
        (0u64..2000).prop_map(|at| Target::Mapped(Place(at * 8))),
        (0u64..2000).prop_map(|at| Target::Zero(Place(at * 8))),
    ]
}

proptest! {
    #[test]
    fn the_index_knows_of_each_block_what_was_published_last(
        steps in prop::collection::vec((0u64..48, 0u32..8, 1u32..9, target()), 1..200),
        evicted in 0u64..2000,
    ) {
        let index = index(512);
        let mut model = BTreeMap::new();
        for (page, first, len_blocks, target) in steps {
            // Spread, so that pages of different homes and of one home meet.
            let page = page * 85;
            let len_blocks = len_blocks.min(8 - first);
            set(&index, page, first, len_blocks, target);
            for number in 0..len_blocks {
                let map = match target {
                    Target::Mapped(place) => BlockMap::Mapped(Place(place.0 + u64::from(number))),
                    Target::Zero(place) => BlockMap::Zero(place),
                };
                model.insert((page, first + number), map);
            }
        }
        let dead = |place: Place| place.0 < evicted * 8;
        for page in (0..48).map(|page| page * 85) {
            index.evict(index.locate(Page(page)), dead);
        }
        model.retain(|_, map| !matches!(map, BlockMap::Mapped(place) | BlockMap::Zero(place) if dead(*place)));
        for page in 0..PAGES {
            for number in 0..8 {
                let expected = model.get(&(page, number)).copied().unwrap_or(BlockMap::Absent);
                prop_assert_eq!(block(&index, page, number), expected, "page {}, block {}", page, number);
            }
        }
        index.check_at_rest();
    }
}
