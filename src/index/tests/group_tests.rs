//! The pages of a group in one look.

use super::*;

/// Compares that with a look at each page by itself. Returns of how many pages it told, and how many lie beyond their home
/// bucket.
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
    let (mut told, mut beyond) = (0, 0);
    for first in (0..PAGES).step_by(GROUP_PAGES as usize) {
        let at_first = index.locate(Page(first));
        let sources = index.lookup_group(at_first);
        assert_eq!(index.claim(at_first, ME), Claim::Taken);
        let slots = index.slots_of_group(at_first);
        for number in 0..GROUP_PAGES {
            let (page, at) = (first + number, at_first.later(number));
            assert_eq!(at, index.locate(Page(page)));
            let (source, found) = (sources[number as usize], slots[number as usize]);
            let whole = match index.lookup(at).map(|found| found.map) {
                Some(PageMap::Whole(source)) if source != BlockMap::Absent => Some(source),
                _ => None,
            };
            let slot = index.reserve(at).expect("few pages");
            let is_at_home = slot.bucket() == at.bucket();
            // A tag of no bits does not tell.
            let tells = is_at_home && at_first.tag() != 0;
            assert_eq!(source, whole.filter(|_| tells), "page {page}");
            let is_there = pages.contains(&page);
            assert_eq!(found, (is_there && tells).then_some(slot), "page {page}");
            // Of what is reserved nothing is known, and its slot is there.
            assert_eq!(index.lookup_group(at_first)[number as usize], source);
            let again = index.slots_of_group(at_first)[number as usize];
            assert_eq!(again.is_some(), tells);
            if let Some(again) = again {
                index.unreserve(again);
                assert_eq!(index.slots_of_group(at_first)[number as usize], Some(again));
            }
            index.unreserve(slot);
            assert_eq!(index.slots_of_group(at_first)[number as usize], found);
            told += u64::from(source.is_some());
            beyond += u64::from(is_there && !is_at_home);
        }
        index.release(at_first.bucket(), ME, Change::Moved);
    }
    (told, beyond)
}

proptest! {
    #[test]
    fn a_look_at_a_group_tells_what_looks_at_its_pages_do(
        pages in prop::collection::btree_set(0u64..PAGES, 1..200),
        block_size_bytes in prop_oneof![Just(512u32), Just(4096)],
    ) {
        compare(block_size_bytes, &pages);
    }
}

#[test]
fn most_pages_in_a_row_are_told_of() {
    let room = index(4096).page_room();
    let (told, _) = compare(4096, &(0..room / 2).collect());
    assert!(told > room / 3, "{told} of {room} pages");
}

#[test]
fn what_lies_beyond_its_home_bucket_is_left_to_a_look_of_its_own() {
    let room = index(4096).page_room();
    let (_, beyond) = compare(4096, &(0..room).map(|number| number * 7).collect());
    assert!(beyond > 0);
}
