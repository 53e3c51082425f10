//! The slots of a group in one look.

use super::*;

/// Compares them with those that each page has by itself. Returns how many pages lie beyond their home bucket.
fn compare(block_size_bytes: u32, pages: &BTreeSet<u64>) -> u64 {
    let index = index(block_size_bytes);
    let len_blocks = index.geometry().blocks_per_page();
    for page in pages {
        set(&index, *page, 0, len_blocks, Target::Mapped(Place(*page)));
    }
    let mut beyond = 0;
    for first in (0..PAGES).step_by(GROUP_PAGES as usize) {
        let at_first = index.locate(Page(first));
        assert_eq!(index.claim(at_first, ME), Claim::Taken);
        let slots = index.group_slots(at_first);
        for number in 0..GROUP_PAGES {
            let (page, at) = (first + number, at_first.later(number));
            assert_eq!(at, index.locate(Page(page)));
            let slot = index.reserve(at).expect("few pages");
            let is_at_home = slot.bucket() == at.bucket();
            let expected = (is_at_home && pages.contains(&page)).then_some(slot);
            assert_eq!(index.slot_of(slots, at), expected, "page {page}");
            beyond += u64::from(pages.contains(&page) && !is_at_home);
            index.unreserve(slot);
        }
        index.release(at_first.bucket(), ME, Change::Moved);
    }
    beyond
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
fn what_lies_beyond_its_home_bucket_is_left_to_a_look_of_its_own() {
    let room = index(4096).page_room();
    assert!(compare(4096, &(0..room).map(|number| number * 7).collect()) > 0);
}
