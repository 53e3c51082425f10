//! What is forgotten while somebody writes.

use super::*;
use crate::index::bucket::BUCKET_WORDS;

/// A segment dies. At some moment of that one block of the page that lies there is written.
#[test]
fn what_is_left_of_a_page_that_is_written_meanwhile_is_forgotten_too() {
    let is_dead = |Place(place): Place| place < 64;
    for sweeps in [false, true] {
        for moment in 0..8 {
            let index = Rc::new(index(512));
            let at = index.locate(Page(0));
            set(&index, 0, 0, 8, Target::Mapped(Place(8)));
            let (points, writer) = (Cell::new(0), Rc::clone(&index));
            let write_if_free = move || {
                points.set(points.get() + 1);
                let at = writer.locate(Page(0));
                // Nobody else is at the page while somebody holds its bucket.
                let is_free = writer.claim(at, OTHER) == Claim::Taken;
                if is_free {
                    writer.release(at.bucket(), OTHER, Change::Moved);
                }
                if is_free && points.get() == moment {
                    set(&writer, 0, 3, 1, Target::Mapped(Place(1000)));
                }
            };
            let hook = move || sched::with_hook(None, &write_if_free);
            sched::with_hook(Some(Rc::new(hook)), || {
                let evict = || {
                    if sweeps {
                        (0..index.bucket_count()).all(|it| index.sweep_bucket(it, OTHER, is_dead))
                    } else {
                        index.evict(at, OTHER, is_dead)
                    }
                };
                while !evict() {}
            });
            for number in 0..8 {
                let found = block(&index, 0, number);
                let is_left = matches!(found, BlockMap::Mapped(place) if is_dead(place));
                assert!(
                    !is_left,
                    "block {number} of a page written at point {moment}: {found:?}"
                );
            }
            index.check_at_rest();
        }
    }
}

/// Calls `change` at this point of what `act` does, if it comes so far.
fn amid<R>(moment: usize, change: impl Fn() + 'static, act: impl FnOnce() -> R) -> R {
    let points = Cell::new(0);
    let change = move || {
        points.set(points.get() + 1);
        if points.get() == moment + 1 {
            change();
        }
    };
    let hook = move || sched::with_hook(None, &change);
    sched::with_hook(Some(Rc::new(hook)), act)
}

/// At some moment of a look the page leaves its slot, another one takes that, and the page comes again.
#[test]
fn a_page_that_has_left_its_slot_amid_a_look_is_not_taken_for_the_next_one_there() {
    for moment in 0..6 {
        let index = Rc::new(index(512));
        set(&index, 0, 0, 8, Target::Mapped(Place(8)));
        let writer = Rc::clone(&index);
        let change = move || {
            let at = writer.locate(Page(0));
            assert!(writer.evict(at, OTHER, |_| true));
            // Of the same group, so of the same bucket.
            set(&writer, 1, 0, 8, Target::Mapped(Place(2000)));
            set(&writer, 0, 0, 8, Target::Mapped(Place(3000)));
        };
        let found = amid(moment, change, || index.lookup(index.locate(Page(0))));
        // Not cached is what it was for a moment, and None: it changed too fast.
        if let Some(found) = found {
            let map = found.map.block(0);
            let was = [
                BlockMap::Mapped(Place(8)),
                BlockMap::Absent,
                BlockMap::Mapped(Place(3000)),
            ];
            assert!(was.contains(&map), "changed at point {moment}: {map:?}");
        }
    }
}

/// The same when it is to be forgotten: the other one stays, and is counted where it lies.
#[test]
fn a_page_that_takes_the_slot_of_one_that_is_forgotten_stays() {
    for moment in 0..6 {
        let index = Rc::new(index(512));
        set(&index, 0, 0, 8, Target::Mapped(Place(8)));
        let (writer, is_changed) = (Rc::clone(&index), Rc::new(Cell::new(false)));
        let changed = Rc::clone(&is_changed);
        let change = move || {
            let at = writer.locate(Page(0));
            if writer.claim(at, OTHER) == Claim::Taken {
                writer.release(at.bucket(), OTHER, Change::Moved);
                assert!(writer.evict(at, OTHER, |_| true));
                set(&writer, 1, 0, 8, Target::Mapped(Place(2000)));
                changed.set(true);
            }
        };
        let evict = || index.evict(index.locate(Page(0)), OWNER_MAX, |_| true);
        assert!(amid(moment, change, evict), "idle");
        let left = if is_changed.get() { vec![1] } else { vec![] };
        assert_eq!(cached(&index, 4), left, "changed at point {moment}");
        index.check_at_rest();
    }
}

/// An index whose next page finds no room, and that page. What lies where `place` says of each page.
fn full(place: impl Fn(u64) -> Target) -> (Index, SlotRef, u64) {
    let index = index(512);
    for page in 0..PAGES {
        let at = index.locate(Page(page));
        let Ok(slot) = index.reserve(at) else {
            return (index, at, page);
        };
        index.unreserve(slot);
        let target = place(page);
        set(&index, page, 0, 8, target);
    }
    panic!("there are more pages than slots");
}

fn cached(index: &Index, page_count: u64) -> Vec<u64> {
    let is_there = |page: &u64| block(index, *page, 0) != BlockMap::Absent;
    (0..page_count).filter(is_there).collect()
}

#[test]
fn room_for_a_page_takes_what_is_missed_little_of_a_bucket_or_one_page() {
    let mapped = |page: u64| Target::Mapped(Place(page * 8));
    let number = |place: Place| place.0 / 8;
    let is_dirty = |place: Place| number(place) % 2 == 0;
    let is_hot = |place: Place| number(place) % 10 != 1;
    // What goes: zeroes and what is not hot, else one that is hot; nothing that is dirty.
    for (zeroes, hot) in [(5, 1), (u64::MAX, 1), (u64::MAX, 0)] {
        let (index, at, page_count) = full(|page| match mapped(page) {
            Target::Mapped(place) if page % 10 == zeroes => Target::Zero(place),
            target => target,
        });
        assert_eq!(index.claim(at, ME), Claim::Taken);
        let make_room = |is_clean: &dyn Fn(Place) -> bool| {
            let is_hot = |place: Place| is_hot(place) || hot == 0;
            index.make_room(at, ME, is_clean, is_hot, is_clean);
        };
        make_room(&|_| false);
        assert_eq!(cached(&index, page_count).len() as u64, page_count);
        make_room(&|place| !is_dirty(place));
        let left: BTreeSet<_> = cached(&index, page_count).into_iter().collect();
        let gone: Vec<_> = (0..page_count)
            .filter(|page| !left.contains(page))
            .collect();
        if hot == 1 {
            let is_missed_little = |page: &u64| page % 10 == 1 || page % 10 == zeroes;
            assert!(gone.iter().all(is_missed_little), "{gone:?}");
            assert!((1..BUCKET_WORDS).contains(&gone.len()), "{gone:?}");
        } else {
            assert!(gone.len() == 1 && gone[0] % 2 == 1, "{gone:?}");
        }
        let slot = index.reserve(at);
        assert!(slot.is_ok(), "there is room");
        slot.into_iter().for_each(|slot| index.unreserve(slot));
        index.release(at.bucket(), ME, Change::Moved);
        index.check_at_rest();
    }
}

/// A request of many pages asks for each of them.
#[test]
fn room_for_a_page_takes_no_look_at_all_that_is_within_reach() {
    let (index, at, page_count) = full(|page| Target::Mapped(Place(page * 8)));
    assert_eq!(index.claim(at, ME), Claim::Taken);
    let looks = Cell::new(0);
    let is_clean = |_| {
        looks.set(looks.get() + 1);
        true
    };
    index.make_room(at, ME, is_clean, |_| false, |_| true);
    let freed = page_count - cached(&index, page_count).len() as u64;
    assert!(freed > 1, "{freed}");
    assert!(looks.get() < BUCKET_WORDS, "{}", looks.get());
    index.release(at.bucket(), ME, Change::Moved);
    index.check_at_rest();
}

/// Pages of several pieces are looked at when nothing else goes.
#[test]
fn room_for_a_page_is_made_where_all_are_split() {
    let (index, at, page_count) = full(|page| Target::Mapped(Place(page * 8)));
    for page in 0..page_count {
        set(&index, page, 3, 1, Target::Mapped(Place(page * 8 + 1)));
    }
    assert_eq!(index.claim(at, ME), Claim::Taken);
    index.make_room(at, ME, |_| true, |_| false, |_| true);
    assert_eq!(cached(&index, page_count).len() as u64, page_count - 1);
    let slot = index.reserve(at);
    assert!(slot.is_ok(), "there is room");
    slot.into_iter().for_each(|slot| index.unreserve(slot));
    index.release(at.bucket(), ME, Change::Moved);
    index.check_at_rest();
}
