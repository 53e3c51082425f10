//! Reclaiming, step by step.

use super::*;
use crate::engine::invariant_tests::{new_cache, new_cache_of};
use crate::engine::{HostIo, IoToken, Op, Outbox, Status};
use crate::index::BlockMap;
use crate::sim::machine::Setup;
use crate::sim::pmem::SimPmem;
use crate::units::{Lba, Now, Page};
use std::sync::Arc;

#[test]
#[should_panic(expected = "INV-SEG-5")]
fn a_segment_with_dirty_data_is_not_freed() {
    let cache = new_cache();
    let id = cache.segments.open_next(None).expect("the cache is empty");
    cache.segments.get(id).note_seq(Seq(1));
    cache.segments.get(id).set_state(SegmentState::Reclaiming);
    free(&cache, &mut Tails::empty(), Agent(1), id);
}

/// INV-SEG-8.
#[test]
fn a_segment_is_passed_by_the_key_tail_if_something_was_forgotten() {
    let cache = new_cache();
    let mut tails = Tails::empty();
    let mut free_one = |seq: u64, special, forgotten: bool| {
        let id = cache.segments.open_next(special).expect("most are free");
        let segment = cache.segments.get(id);
        segment.note_seq(Seq(seq));
        if forgotten {
            segment.note_forgotten();
        }
        segment.set_state(SegmentState::Reclaiming);
        tails.dirty_tail = Seq(seq);
        cache.seq_next.store(seq + 1, Ordering::SeqCst);
        cache.persist_tails(&mut tails, Agent(1));
        free(&cache, &mut tails, Agent(1), id);
        tails.key_tail
    };
    assert_eq!(
        free_one(1, None, false),
        Seq(0),
        "all of it is newer elsewhere"
    );
    assert_eq!(free_one(2, None, true), Seq(2));
    let probation = Some(Special::Probation);
    assert_eq!(free_one(3, probation, true), Seq(2), "read fills alone");
    let fills = Some(Special::Fills);
    assert_eq!(free_one(4, fills, true), Seq(2), "read fills alone");
    assert_eq!(free_one(5, Some(Special::Kept), true), Seq(5));
}

/// All that is sealed is dirty, and a writer waits.
#[test]
fn without_a_victim_the_segments_are_looked_at_once() {
    let cache = new_cache();
    let id = cache.segments.open_next(None).expect("the cache is empty");
    cache.segments.get(id).note_seq(Seq(1));
    cache.segments.set_sealed(id);
    cache.seq_next.store(2, Ordering::SeqCst);
    // The writer waits for a segment.
    while cache.segments.open_next(None).is_some() {}
    let (mut gc, mut tails) = (Gc::new(&cache.geometry).unwrap(), Tails::empty());
    let counters = cache.background_counters();
    let mut poll = |tails: &mut Tails| {
        cache.space_wanted.store(true, Ordering::Release);
        gc.poll(&cache, tails, Agent(1), counters);
        gc.look.begun_count
    };
    assert!((0..100).all(|_| poll(&mut tails) == 1));
    assert_eq!(cache.segments.get(id).state(), SegmentState::Sealed);
    tails.dirty_tail = Seq(1);
    cache.persist_tails(&mut tails, Agent(1));
    assert_eq!(poll(&mut tails), 2);
    assert_eq!(cache.segments.get(id).state(), SegmentState::Reclaiming);
}

/// With one free segment; all others are sealed, and hold nothing.
fn nearly_full_cache() -> Arc<Cache<SimPmem>> {
    let cache = new_cache_of(&Setup {
        segment_count: 40,
        ..Setup::default()
    });
    while cache.segments.free_count() > 1 {
        let id = cache.segments.open_next(None).expect("one is free");
        cache.segments.set_sealed(id);
    }
    cache
}

#[test]
fn the_census_hears_of_a_victim_of_which_nothing_is_in_use() {
    let cache = nearly_full_cache();
    let (mut gc, mut tails) = (Gc::new(&cache.geometry).unwrap(), Tails::empty());
    let counters = cache.background_counters();
    while cache.segments.free_count() == 1 {
        gc.poll(&cache, &mut tails, Agent(1), counters);
    }
    assert!(gc.census.chooses_by_use(&cache));
}

/// A look may have begun for a writer who did not wait for that.
#[test]
fn a_look_under_way_gets_to_its_end_though_nothing_was_counted() {
    let cache = nearly_full_cache();
    let (mut gc, mut tails) = (Gc::new(&cache.geometry).unwrap(), Tails::empty());
    let counters = cache.background_counters();
    cache.space_wanted.store(true, Ordering::Release);
    gc.poll(&cache, &mut tails, Agent(1), counters);
    assert!(gc.look.is_under_way());
    cache.space_wanted.store(false, Ordering::Release);
    for _ in 0..100 {
        gc.poll(&cache, &mut tails, Agent(1), counters);
    }
    assert!(cache.segments.free_count() > 1);
}

/// As many may be lent as there are segments.
#[test]
fn some_of_those_that_are_lent_are_looked_at_in_a_poll_and_each_has_its_turn() {
    const COUNT: u64 = 3 * LENT_PER_POLL as u64;
    let cache = new_cache_of(&Setup {
        segment_count: COUNT + 1,
        ..Setup::default()
    });
    let mut gc = Gc::new(&cache.geometry).unwrap();
    for id in cache.segments.ids().take(COUNT as usize) {
        cache.segments.get(id).pin();
        gc.lent.push_back(id);
    }
    let last = gc.lent[COUNT as usize - 1];
    cache.segments.get(last).unpin();
    assert_eq!(gc.take_returned(&cache), None);
    assert_eq!(gc.take_returned(&cache), None);
    assert_eq!(gc.take_returned(&cache), Some(last));
    assert_eq!(gc.lent.len() as u64, COUNT - 1);
    (0..10).for_each(|_| assert_eq!(gc.take_returned(&cache), None));
}

/// A writer waits, and there are segments enough: it waits for the index.
#[test]
fn no_segment_is_emptied_for_a_wait_for_the_index_that_write_back_can_end() {
    let cache = new_cache();
    let id = cache.segments.open_next(None).expect("the cache is empty");
    cache.segments.get(id).note_seq(Seq(1));
    cache.segments.set_sealed(id);
    cache.seq_next.store(3, Ordering::SeqCst);
    let (mut gc, mut tails) = (Gc::new(&cache.geometry).unwrap(), Tails::empty());
    let counters = cache.background_counters();
    let mut states_and_lack = |tails: &mut Tails, dirty_tail| {
        tails.dirty_tail = Seq(dirty_tail);
        cache.persist_tails(tails, Agent(1));
        for _ in 0..10 {
            cache.space_wanted.store(true, Ordering::Release);
            gc.poll(&cache, tails, Agent(1), counters);
        }
        (cache.segments.get(id).state(), gc.lack())
    };
    assert_eq!(
        states_and_lack(&mut tails, 1),
        (SegmentState::Sealed, Lack::Room)
    );
    // The writer still waits: its pages may share buckets with what it would have to drive out.
    let (state, _) = states_and_lack(&mut tails, 2);
    assert_ne!(state, SegmentState::Sealed);
}

/// An unmap has no bytes.
#[test]
fn a_writer_waits_as_long_as_unmaps_are_dirty() {
    let cache = new_cache();
    let (mut gc, mut tails) = (Gc::new(&cache.geometry).unwrap(), Tails::empty());
    let counters = cache.background_counters();
    cache.seq_next.store(2, Ordering::SeqCst);
    let mut waits_after_poll = |tails: &mut Tails| {
        cache.space_wanted.store(true, Ordering::Release);
        gc.poll(&cache, tails, Agent(1), counters);
        cache.space_wanted.load(Ordering::Acquire)
    };
    assert!(waits_after_poll(&mut tails));
    tails.dirty_tail = Seq(1);
    cache.persist_tails(&mut tails, Agent(1));
    assert!(!waits_after_poll(&mut tails));
}

/// A key of many pages, and another behind it: more than one poll looks up, whatever becomes of the plan meanwhile.
#[test]
fn all_pages_of_a_long_key_are_forgotten_and_those_of_the_next() {
    const PAGES: u64 = 100;
    for is_pressed_after in [None, Some(0), Some(1)] {
        let cache = new_cache_of(&Setup {
            block_count: 8 * 4096,
            segment_size_bytes: 256 << 10,
            segment_count: 32,
            ..Setup::default()
        });
        let mut channel = cache.channel().expect("there is one");
        let mut out = Outbox::new();
        for (number, first_page) in [(0, 0), (1, 2 * PAGES)] {
            let io = HostIo {
                token: IoToken(number),
                op: Op::Unmap,
                lba: Lba(first_page * 8),
                len_blocks: PAGES * 8,
            };
            channel.submit(io).expect("the table is empty");
            out.clear();
            channel.poll(Now(0), &mut out);
            assert_eq!(out.completions[0].status, Status::Success);
        }
        let cached = || {
            let pages = (0..3 * PAGES).filter_map(|page| {
                let found = cache.index.lookup(cache.index.locate(Page(page)))?;
                Some(found.map.block(0))
            });
            pages.filter(|map| *map != BlockMap::Absent).count() as u64
        };
        assert_eq!(cached(), 2 * PAGES);
        let is_in_use = |id: &SegId| cache.segments.get(*id).state() == SegmentState::Open;
        let victim = cache.segments.ids().find(is_in_use).expect("it is open");
        let mut walk = Walk::default();
        walk.begin(&cache, victim, Plan::Compact);
        let mut polls = 0;
        loop {
            if is_pressed_after == Some(polls) {
                cache.space_wanted.store(true, Ordering::Release);
            }
            let before = cached();
            match walk.poll(&cache, Agent(1)) {
                Step::More => assert!(cached() < before, "poll {polls} did nothing"),
                Step::Finished => break,
                Step::Unreadable => panic!("its keys can be read"),
            }
            polls += 1;
        }
        assert_eq!(cached(), 0, "pressed after {is_pressed_after:?}");
        assert!(polls >= 3, "{polls} polls");
    }
}
