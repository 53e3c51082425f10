//! The index against a map, and what its writers must not do.

use super::*;
use crate::media::{Geometry, Place};
use crate::sched;
use crate::units::Page;
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};

mod evict;
mod group_tests;

const PAGES: u64 = 1 << 12;
const ME: u16 = 1;
const OTHER: u16 = 2;

fn geometry(block_size_bytes: u32) -> Geometry {
    Geometry::plan(1 << 20, 16 << 10, block_size_bytes).expect("a small device")
}

/// Of a device so large that the words of the side table are wide.
fn large_geometry() -> Geometry {
    let (start, segment, count) = (2 << 20, 1 << 30, 4 << 10);
    Geometry::from_media(start + segment * count, start, segment, count, 512).expect("4 TiB")
}

fn index(block_size_bytes: u32) -> Index {
    Index::new(geometry(block_size_bytes), PAGES, 1).unwrap()
}

/// A part of a page, or all of it, and what it is set to.
type Part = (u64, u32, u32, Target);

fn set(index: &Index, page: u64, first: u32, len_blocks: u32, target: Target) {
    Batch::begin(index, &[(page, first, len_blocks, target)]).run(index);
}

/// What a batch of the engine does to the index, step by step.
struct Batch {
    parts: Vec<Part>,
    slots: Vec<PageSlot>,
    claims: Vec<usize>,
    stock: LineStock,
    published: usize,
}

impl Batch {
    fn begin(index: &Index, parts: &[Part]) -> Self {
        let mut batch = Self {
            parts: parts.to_vec(),
            slots: Vec::new(),
            claims: Vec::new(),
            stock: LineStock::new(parts.len()),
            published: 0,
        };
        for (page, first, len_blocks, _) in parts {
            let at = index.locate(Page(*page));
            let earlier = match index.claim(at, ME) {
                Claim::Taken => EarlierParts::No,
                Claim::Held => EarlierParts::Maybe,
                Claim::Busy => panic!("nobody else is here"),
            };
            if earlier == EarlierParts::No {
                batch.claims.push(at.bucket());
            }
            let slot = index.reserve(at).expect("few pages");
            let is_part = *len_blocks < index.geometry().blocks_per_page();
            if is_part && index.needs_line(slot, *first, *len_blocks, earlier) {
                assert!(index.stock_line(&mut batch.stock), "there are enough");
            }
            batch.slots.push(slot);
        }
        batch
    }

    /// Publishes the next part, which is returned; or ends the batch.
    fn step(&mut self, index: &Index) -> Option<Part> {
        let Some(part) = self.parts.get(self.published) else {
            for bucket in self.claims.drain(..) {
                index.release(bucket, ME, Change::Written);
            }
            index.clear_stock(&mut self.stock);
            return None;
        };
        let (_, first, len_blocks, target) = *part;
        let slot = self.slots[self.published];
        index.publish(slot, first, len_blocks, target, &mut self.stock);
        self.published += 1;
        Some(*part)
    }

    fn run(mut self, index: &Index) {
        while self.step(index).is_some() {}
    }
}

/// What a part says of each of its blocks.
fn blocks_of(
    (page, first, len_blocks, target): Part,
) -> impl Iterator<Item = ((u64, u32), BlockMap)> {
    (0..len_blocks).map(move |number| {
        let map = match target {
            Target::Mapped(place) => BlockMap::Mapped(Place(place.0 + u64::from(number))),
            Target::Zero(place) => BlockMap::Zero(place),
        };
        ((page, first + number), map)
    })
}

fn block(index: &Index, page: u64, block: u32) -> BlockMap {
    let found = index.lookup(index.locate(Page(page)));
    found.expect("nobody writes").map.block(block)
}

#[test]
fn no_two_pages_share_an_entry() {
    // INV-INDEX-7, for sizes around powers of two.
    let sizes = [1, 2, 3, 4, 5, 1000, PAGES - 1, PAGES, PAGES + 1, 1 << 16];
    let geometries = [geometry(4096), geometry(512), large_geometry()];
    for (pages, geometry) in sizes
        .into_iter()
        .flat_map(|pages| geometries.map(|geometry| (pages, geometry)))
    {
        let index = Index::new(geometry, pages, 1).unwrap();
        // Those that there are, and the last that there may come to be.
        let max = index.page_count_max();
        let mut seen = BTreeSet::new();
        for page in (0..pages).chain(max - PAGES..max) {
            let at = index.locate(Page(page));
            assert!(seen.insert(format!("{at:?}")), "page {page} of {pages}");
            assert_eq!(index.page_at(at), Page(page), "of {pages}");
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
    index.release(at.bucket(), ME, Change::Moved);
    let moved = index.version(at);
    assert!(moved != before && moved.is_unwritten_since(before));
    assert_eq!(index.claim(at, OTHER), Claim::Taken);
    index.release(at.bucket(), OTHER, Change::Written);
    assert!(!index.version(at).is_unwritten_since(moved));
    assert!(!index.version(at).is_unwritten_since(Version::UNSTABLE));
    // However many were only moved.
    let before = index.version(at);
    for _ in 0..1000 {
        assert_eq!(index.claim(at, ME), Claim::Taken);
        index.release(at.bucket(), ME, Change::Moved);
        assert_ne!(index.version(at), before);
    }
}

#[test]
#[should_panic(expected = "INV-INDEX-4")]
fn a_claim_of_somebody_else_is_not_released() {
    let index = index(4096);
    let at = index.locate(Page(7));
    assert_eq!(index.claim(at, ME), Claim::Taken);
    index.release(at.bucket(), OTHER, Change::Written);
}

#[test]
#[should_panic(expected = "INV-INDEX-1")]
fn a_page_without_a_slot_is_not_published() {
    let index = index(4096);
    let slot = index.reserve(index.locate(Page(7))).expect("it is empty");
    index.unreserve(slot);
    index.publish(slot, 0, 1, Target::Zero(Place(1)), &mut LineStock::new(1));
}

#[test]
#[should_panic(expected = "INV-INDEX-3")]
fn a_page_of_one_block_has_no_line_in_the_side_table() {
    let index = index(4096);
    let at = index.locate(Page(7));
    let slot = index.reserve(at).expect("it is empty");
    index.publish(slot, 0, 0, Target::Zero(Place(1)), &mut LineStock::new(1));
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

#[test]
#[should_panic(expected = "INV-INDEX-8")]
fn a_page_is_not_split_without_a_line() {
    let index = index(512);
    set(&index, 7, 0, 1, Target::Mapped(Place(1)));
    let slot = index.reserve(index.locate(Page(7))).expect("it is there");
    index.publish(slot, 2, 1, Target::Mapped(Place(2)), &mut LineStock::new(1));
}

#[test]
fn a_line_is_taken_only_for_a_page_in_several_pieces() {
    let index = index(512);
    let lines = |index: &Index| {
        (index.used_bytes() - Index::new(geometry(512), PAGES, 1).unwrap().used_bytes()) / 32
    };
    for page in 0..20 {
        set(&index, page, 3, 2, Target::Mapped(Place(page * 16)));
        // Its blocks again, and more of them.
        set(&index, page, 3, 4, Target::Mapped(Place(page * 16 + 8)));
    }
    assert_eq!(lines(&index), 0);
    for page in 0..20 {
        set(&index, page, 0, 1, Target::Zero(Place(page * 16)));
    }
    assert_eq!(lines(&index), 20);
    // What is free is used before what is new.
    for page in 0..20 {
        set(&index, page, 0, 8, Target::Mapped(Place(page * 16)));
        set(&index, page + 20, 0, 1, Target::Mapped(Place(page * 16)));
        set(&index, page + 20, 7, 1, Target::Mapped(Place(page * 16)));
    }
    assert_eq!(lines(&index), 20);
    index.check_at_rest();
}

#[test]
fn lines_that_run_out_are_there_again_when_a_batch_ends() {
    let index = index(512);
    let mut stock = LineStock::new(10_000);
    while index.stock_line(&mut stock) {}
    let all = stock.spare_count();
    assert!(
        all as u64 >= 256,
        "a line for each page of 1 MiB, and not {all}"
    );
    index.cut_stock(&mut stock, all - 1);
    assert!(index.stock_line(&mut stock));
    assert!(!index.stock_line(&mut stock));
    index.clear_stock(&mut stock);
    index.check_at_rest();
    set(&index, 7, 0, 1, Target::Mapped(Place(1)));
    set(&index, 7, 2, 1, Target::Mapped(Place(2)));
}

#[test]
fn damage_amid_a_run_takes_a_line_or_waits_for_one() {
    let index = index(512);
    set(&index, 7, 2, 4, Target::Mapped(Place(16)));
    let at = index.locate(Page(7));
    let damaged = 17..18;
    let mapped = |place| BlockMap::Mapped(Place(place));
    let found = || [2, 3, 4, 5].map(|number| block(&index, 7, number));
    let mut all = LineStock::new(10_000);
    while index.stock_line(&mut all) {}
    assert!(!index.evict_places(at, &damaged));
    assert_eq!(found(), [16, 17, 18, 19].map(mapped));
    index.clear_stock(&mut all);
    assert!(index.evict_places(at, &damaged));
    let left = [mapped(16), BlockMap::Absent, mapped(18), mapped(19)];
    assert_eq!(found(), left);
    index.check_at_rest();
}

#[test]
fn no_two_threads_get_the_same_line() {
    // INV-INDEX-8.
    let index = index(512);
    let owners: Vec<AtomicU32> = (0..10_000).map(|_| AtomicU32::new(0)).collect();
    let work = |me: u32| {
        let mut stock = LineStock::new(32);
        for round in 0..2_000 {
            for _ in 0..1 + (round + me) % 24 {
                index.stock_line(&mut stock);
            }
            for line in stock.spare_lines() {
                assert_eq!(
                    owners[line as usize].swap(me, Ordering::SeqCst),
                    0,
                    "line {line}"
                );
            }
            for line in stock.spare_lines() {
                owners[line as usize].store(0, Ordering::SeqCst);
            }
            index.clear_stock(&mut stock);
        }
    };
    std::thread::scope(|scope| {
        for me in 1..4 {
            scope.spawn(move || work(me));
        }
    });
    index.check_at_rest();
}

#[test]
fn a_base_may_grow_far_beyond_its_size_while_the_index_is_in_use() {
    let sizes = [geometry(4096), geometry(512), large_geometry()];
    for geometry in sizes {
        let index = Index::new(geometry, PAGES, 1).unwrap();
        let max = index.page_count_max();
        assert_eq!(max, Index::page_count_max_of(&geometry, PAGES));
        assert!(max >= PAGES << 10, "2^{} pages", max.ilog2());
        let target = |page| Target::Mapped(Place(page % 1000));
        let pages: Vec<u64> = (0..40)
            .flat_map(|n| [n, PAGES * (n + 1) + n, max - 1 - n * 3])
            .collect();
        let len_blocks = geometry.blocks_per_page();
        for page in &pages {
            set(&index, *page, 0, len_blocks, target(*page));
        }
        for page in &pages {
            assert_eq!(block(&index, *page, 0), target(*page).into(), "page {page}");
        }
        index.check_at_rest();
    }
}

#[test]
fn a_base_that_is_too_large_is_known_before() {
    let max = Index::page_count_max_of(&large_geometry(), 1 << 48);
    assert!(max < 1 << 48, "{max}");
    let fits = Index::page_count_max_of(&large_geometry(), max);
    assert!(fits <= max, "{fits} pages, and not {max}");
}

/// How many of the pages that fill a cache lie away from home, in percent.
fn away_percent(stride: u64) -> u64 {
    let geometry = Geometry::plan(64 << 20, 1 << 20, 4096).expect("a small device");
    let count = u64::from(geometry.segment_count()) * (geometry.segment_room_bytes() / 4096);
    let index = Index::new(geometry, count * stride, 1).unwrap();
    let is_away = |page: u64| {
        let at = index.locate(Page(page * stride));
        index
            .reserve(at)
            .expect("there is a slot within reach")
            .bucket()
            != at.bucket()
    };
    (0..count).filter(|page| is_away(*page)).count() as u64 * 100 / count
}

#[test]
fn pages_in_a_row_and_regular_ones_lie_at_home_or_near_it() {
    // Two groups of four in a bucket of seven, here and there.
    let in_a_row = away_percent(1);
    assert!(in_a_row <= 8, "{in_a_row} % away, in a row");
    for stride in [2, 3, 8, 64, 256, 1000, 1024, 4096, 46368, 65536, 262_144] {
        let percent = away_percent(stride);
        // At random it would be 8.
        assert!(percent <= 12, "{percent} % away, every {stride}th page");
    }
}

fn target() -> impl Strategy<Value = Target> {
    prop_oneof![
        3 => (0u64..230).prop_map(|at| Target::Mapped(Place(at * 8))),
        1 => (0u64..230).prop_map(|at| Target::Zero(Place(at * 8))),
    ]
}

/// Few pages, so that they are written again and again; spread, so that some meet at home.
fn part(pages: u64) -> impl Strategy<Value = Part> {
    let range = prop_oneof![3 => (0u32..8, 1u32..9), 1 => Just((0, 8))];
    (0..pages, range, target()).prop_map(|(page, (first, len_blocks), target)| {
        (page * 85, first, len_blocks.min(8 - first), target)
    })
}

fn batches(pages: u64) -> impl Strategy<Value = Vec<Vec<Part>>> {
    prop::collection::vec(prop::collection::vec(part(pages), 1..12), 1..40)
}

/// Batches that go on while somebody reads.
struct Amid {
    index: Rc<Index>,
    page: u64,
    /// Points that pass before anything happens.
    points_left: Cell<usize>,
    batches: RefCell<std::vec::IntoIter<Vec<Part>>>,
    batch: RefCell<Option<Batch>>,
    /// What was known of each block of the page since the read began.
    seen: RefCell<[Vec<BlockMap>; 8]>,
}

impl Amid {
    fn new(index: &Rc<Index>, page: u64, after: usize, batches: Vec<Vec<Part>>) -> Self {
        Self {
            index: Rc::clone(index),
            page,
            points_left: Cell::new(after),
            batches: RefCell::new(batches.into_iter()),
            batch: RefCell::new(None),
            seen: RefCell::new(std::array::from_fn(|number| {
                vec![block(index, page, number as u32)]
            })),
        }
    }

    /// The reader is interrupted.
    fn point(&self, steps: usize) {
        let Some(left) = self.points_left.get().checked_sub(1) else {
            return sched::with_hook(None, || {
                for _ in 0..steps {
                    self.step();
                }
            });
        };
        self.points_left.set(left);
    }

    /// The next step of a batch; `false`: there is none.
    fn step(&self) -> bool {
        let mut batch = self.batch.borrow_mut();
        let Some(running) = &mut *batch else {
            let Some(parts) = self.batches.borrow_mut().next() else {
                return false;
            };
            *batch = Some(Batch::begin(&self.index, &parts));
            return true;
        };
        match running.step(&self.index) {
            Some(part) => {
                for ((page, number), map) in blocks_of(part) {
                    if page == self.page {
                        self.seen.borrow_mut()[number as usize].push(map);
                    }
                }
            }
            None => *batch = None,
        }
        true
    }
}

/// What is found of a page by whoever goes through all. `None`: it changes too fast.
fn visit_all(index: &Index, page: u64) -> Option<PageMap> {
    let mut found = PageMap::Whole(BlockMap::Absent);
    for bucket in 0..index.bucket_count() {
        let visited = index.visit_bucket(
            bucket,
            |_| true,
            |Page(at), map| {
                if at == page {
                    found = map;
                }
            },
        );
        if !visited {
            return None;
        }
    }
    Some(found)
}

proptest! {
    #[test]
    fn the_index_knows_of_each_block_what_was_published_last(
        batches in batches(48),
        evicted in prop::collection::vec((0u64..30, 0u64..1850, 1u64..9), 40),
        large in any::<bool>(),
    ) {
        let geometry = if large { large_geometry() } else { geometry(512) };
        let index = Index::new(geometry, PAGES, 1).unwrap();
        let mut model = BTreeMap::new();
        for (batch, (segment, first, len)) in batches.iter().zip(evicted) {
            Batch::begin(&index, batch).run(&index);
            model.extend(batch.iter().flat_map(|part| blocks_of(*part)));
            // A segment dies, and some blocks are damaged.
            let is_inside = |place: Place| place.0 / 64 == segment;
            let damaged = first..first + len;
            for page in (0..48).map(|page| page * 85) {
                let at = index.locate(Page(page));
                prop_assert!(index.evict(at, OTHER, is_inside), "nobody is at it");
                prop_assert!(index.evict_places(at, &damaged));
            }
            model.retain(|_, map| match map {
                BlockMap::Mapped(place) => !is_inside(*place) && !damaged.contains(&place.0),
                BlockMap::Zero(place) => !is_inside(*place),
                BlockMap::Absent => true,
            });
            index.check_at_rest();
        }
        for page in 0..PAGES {
            for number in 0..8 {
                let expected = model.get(&(page, number)).copied().unwrap_or(BlockMap::Absent);
                prop_assert_eq!(block(&index, page, number), expected, "page {}, block {}", page, number);
            }
        }
        // Whoever goes through all of it finds the same.
        let mut visited = BTreeMap::new();
        for bucket in 0..index.bucket_count() {
            let done = index.visit_bucket(bucket, |_| true, |Page(page), map| {
                let blocks = (0..8).map(|number| ((page, number), map.block(number)));
                visited.extend(blocks.filter(|(_, map)| *map != BlockMap::Absent));
            });
            prop_assert!(done, "nobody is in the way");
        }
        prop_assert_eq!(visited, model);
    }

    #[test]
    fn a_reader_amid_changes_finds_what_each_block_was_at_some_moment(
        before in batches(3),
        batches in batches(3),
        page in 0u64..3,
        after in 0usize..4,
        stride in 1usize..30,
        is_visit in any::<bool>(),
    ) {
        // INV-INDEX-9.
        let page = page * 85;
        let index = Rc::new(index(512));
        before.iter().for_each(|batch| Batch::begin(&index, batch).run(&index));
        let amid = Rc::new(Amid::new(&index, page, after, batches));
        let hook = Rc::clone(&amid);
        let found = sched::with_hook(Some(Rc::new(move || hook.point(stride))), || {
            if is_visit {
                visit_all(&index, page)
            } else {
                index.lookup(index.locate(Page(page))).map(|found| found.map)
            }
        });
        for (number, seen) in (0..).zip(&*amid.seen.borrow()) {
            // None: it changed too fast.
            if let Some(found) = &found {
                let map = found.block(number);
                prop_assert!(seen.contains(&map), "block {}: {:?}, and not one of {:?}", number, map, seen);
            }
        }
        while amid.step() {}
        index.check_at_rest();
    }
}

#[test]
fn a_sample_tells_how_much_is_cached() {
    let geometry = Geometry::plan(64 << 20, 1 << 20, 4096).expect("a device of some size");
    let index = Index::new(geometry, 1 << 20, 1).unwrap();
    // In a row, and in steps.
    let pages = (0..6000).chain((1..4000).map(|number| 8192 + number * 64));
    for page in pages.clone() {
        set(&index, page, 0, 1, Target::Mapped(Place(256 + page % 8000)));
    }
    let found_by = |buckets_max| {
        let mut blocks = 0;
        let sample = index.sample(buckets_max, |_, len_blocks| blocks += len_blocks);
        sample.scale(blocks)
    };
    let all = pages.count() as u64;
    assert_eq!(found_by(usize::MAX), all);
    assert_eq!(found_by(index.bucket_count()), all);
    // Pages of a group are found together: the standard error is that of counting groups.
    for buckets_max in [100, 300, 1000] {
        let found = found_by(buckets_max);
        let groups = all * buckets_max as u64 / index.bucket_count() as u64 / 4;
        assert!(
            found.abs_diff(all) < 2 * all / groups.isqrt(),
            "{found} of {all} by {buckets_max} buckets"
        );
    }
}
