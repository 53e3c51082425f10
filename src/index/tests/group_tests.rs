//! The slots of a group in one look.

use super::*;

/// Compares them with those that each page has by itself. Returns of how many groups they were found, and how many pages lie
/// beyond their home bucket.
fn compare(block_size_bytes: u32, pages: &BTreeSet<u64>) -> (u64, u64) {
    let index = index(block_size_bytes);
    let len_blocks = index.geometry().blocks_per_page();
    for page in pages {
        match page % 7 {
            5 => set(&index, *page, 0, len_blocks, Target::Zero(Place(*page))),
            6 => set(&index, *page, 0, 1, Target::Mapped(Place(*page))),
            _ => set(&index, *page, 0, len_blocks, Target::Mapped(Place(*page))),
        }
    }
    let (mut found, mut beyond) = (0, 0);
    for first in (0..PAGES).step_by(GROUP_PAGES as usize) {
        let at_first = index.locate(Page(first));
        let places = index.lookup_group(at_first);
        assert_eq!(index.claim(at_first, ME), Claim::Taken);
        let slots = index.slots_of_group(at_first);
        let mut expected = Some(Vec::new());
        for number in 0..GROUP_PAGES {
            let (page, at) = (first + number, at_first.later(number));
            assert_eq!(at, index.locate(Page(page)));
            let slot = index.reserve(at).expect("few pages");
            let is_at_home = slot.bucket() == at.bucket();
            let place = match index.lookup(at).map(|found| found.map) {
                Some(PageMap::Whole(BlockMap::Mapped(place))) => Some(place),
                _ => None,
            };
            let place = place.filter(|_| is_at_home && at_first.tag() != 0);
            assert_eq!(places[number as usize], place, "page {page}");
            if !is_at_home || !pages.contains(&page) {
                expected = None;
            }
            expected.iter_mut().for_each(|slots| slots.push(slot));
            beyond += u64::from(pages.contains(&page) && !is_at_home);
            index.unreserve(slot);
        }
        // That of no bit is not told from what is empty, and left to a look of its own.
        let expected = expected.filter(|_| at_first.tag() != 0);
        assert_eq!(slots.map(Vec::from), expected, "pages from {first} on");
        found += u64::from(slots.is_some());
        index.release(at_first.bucket(), ME, Change::Moved);
    }
    (found, beyond)
}

proptest! {
    #[test]
    fn the_slots_of_a_group_are_those_of_its_pages(
        pages in prop::collection::btree_set(0u64..PAGES, 1..200),
        block_size_bytes in prop_oneof![Just(512u32), Just(4096)],
    ) {
        compare(block_size_bytes, &pages);
    }
}

#[test]
fn groups_whose_pages_are_all_at_home_are_found() {
    let room = index(4096).page_room();
    let (found, _) = compare(4096, &(0..room / 2).collect());
    assert!(found > room / 16, "{found} of {room} pages");
}

#[test]
fn what_lies_beyond_its_home_bucket_is_left_to_a_look_of_its_own() {
    let room = index(4096).page_room();
    let (_, beyond) = compare(4096, &(0..room).map(|number| number * 7).collect());
    assert!(beyond > 0);
}
