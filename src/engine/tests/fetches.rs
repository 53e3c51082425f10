//! Misses of different channels: who asks the base, who waits, and how every wait ends.

use super::asking::Asking;
use super::*;
use crate::pmem::IovBuf;
use crate::sched;
use crate::units::{NS_PER_S, Now};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

const NOTHING: [(u64, u64); 0] = [];

/// Two channels of one cache.
fn two(settings: SettingChange, pad_pages: usize) -> (Asking, Asking) {
    let one = Asking::new(settings, pad_pages);
    let other = one.beside(pad_pages);
    (one, other)
}

/// The base answers, and the channel's next poll deals with it.
fn answer(asking: &mut Asking, result: Result<(), BaseError>) -> Vec<(u64, u64)> {
    asking.answer(result);
    asking.poll()
}

#[track_caller]
fn assert_read(asking: &Asking, count: usize, len_blocks: usize, fill: u8) {
    assert_eq!(asking.ended(), vec![Status::Success; count]);
    let bytes = asking.buf.bytes();
    assert!(bytes[..len_blocks * 512].iter().all(|byte| *byte == fill));
}

#[test]
fn a_miss_of_what_another_channel_is_fetching_asks_nothing() {
    let (mut one, mut other) = two(SettingChange::default(), 64);
    assert_eq!(one.read(16, 16), [(16, 16)]);
    // All of it, a page of it, a part of a page.
    assert_eq!(other.read(16, 16), NOTHING);
    assert_eq!(other.read(24, 8), NOTHING);
    assert_eq!(other.read(19, 2), NOTHING);
    assert_eq!(other.channel.outstanding(), 3, "work is left");
    assert_eq!(other.poll(), NOTHING);
    assert_eq!(other.ended(), []);
    one.answer(Ok(()));
    assert_eq!(
        other.poll(),
        NOTHING,
        "it has arrived, and is not there yet"
    );
    assert_eq!(other.ended(), []);
    assert_eq!(one.poll(), NOTHING);
    assert_read(&one, 1, 16, 7);
    assert_eq!(other.poll(), NOTHING);
    assert_read(&other, 3, 16, 7);
    let stats = one.cache.stats();
    assert_eq!((stats.awaited_reads, stats.joined_read_bytes), (3, 0));
    assert_eq!((stats.read_hits, stats.read_misses), (3, 1));
    assert_eq!(stats.base_read_bytes, 16 * 512);
    one.cache.fetches.check_at_rest();
}

#[test]
fn a_read_asks_for_what_comes_before_a_page_that_another_fetches() {
    let (mut one, mut other) = two(SettingChange::default(), 64);
    assert_eq!(one.read(32, 8), [(32, 8)]);
    assert_eq!(other.read(18, 28), [(16, 16)], "rounded out at its start");
    let before = std::mem::take(&mut other.out.base);
    // What is behind is nobody's meanwhile.
    let mut third = one.beside(64);
    assert_eq!(third.read(40, 8), [(40, 8)]);
    assert_eq!(answer(&mut third, Ok(())), NOTHING);
    assert_eq!(answer(&mut one, Ok(())), NOTHING);
    // While its own base read is under way it finds the rest.
    assert_eq!(other.poll(), NOTHING);
    assert_eq!(other.ended(), []);
    other.out.base = before;
    assert_eq!(answer(&mut other, Ok(())), NOTHING);
    assert_read(&other, 1, 28, 7);
    let stats = one.cache.stats();
    assert_eq!((stats.fills_dropped, stats.fill_bytes), (0, 32 * 512));
    one.cache.fetches.check_at_rest();
}

#[test]
fn channels_of_which_each_waits_for_the_other_go_on() {
    let (mut one, mut other) = two(SettingChange::default(), 64);
    assert_eq!(one.read(16, 8), [(16, 8)]);
    let mut base_of_one = std::mem::take(&mut one.out.base);
    assert_eq!(other.read(32, 8), [(32, 8)]);
    let mut base_of_other = std::mem::take(&mut other.out.base);
    // Each has a read that waits, with a base read of its own under way.
    assert_eq!(one.read(24, 16), [(24, 8)]);
    base_of_one.append(&mut one.out.base);
    assert_eq!(other.read(8, 16), [(8, 8)]);
    base_of_other.append(&mut other.out.base);
    one.out.base = base_of_one;
    assert_eq!(answer(&mut one, Ok(())), NOTHING);
    assert_read(&one, 1, 8, 7);
    other.out.base = base_of_other;
    assert_eq!(answer(&mut other, Ok(())), NOTHING);
    assert_read(&other, 2, 16, 7);
    assert_eq!(one.poll(), NOTHING);
    assert_read(&one, 1, 16, 7);
    assert_eq!(one.cache.stats().awaited_reads, 2);
    one.cache.fetches.check_at_rest();
}

#[test]
fn who_has_waited_for_a_base_read_that_fails_asks_for_itself() {
    let (mut one, mut other) = two(SettingChange::default(), 64);
    let mut third = one.beside(64);
    assert_eq!(one.read(16, 8), [(16, 8)]);
    assert_eq!(other.read(16, 8), NOTHING);
    assert_eq!(third.read(16, 8), NOTHING);
    assert_eq!(answer(&mut one, Err(BaseError::Io)), NOTHING);
    assert_eq!(one.ended(), [Status::Failed]);
    assert_eq!(other.poll(), [(16, 8)]);
    assert_eq!(third.poll(), NOTHING, "somebody else is fetching it again");
    assert_eq!(answer(&mut other, Err(BaseError::Io)), NOTHING);
    assert_eq!(other.ended(), [Status::Failed]);
    assert_eq!(third.poll(), [(16, 8)]);
    assert_eq!(answer(&mut third, Ok(())), NOTHING);
    assert_read(&third, 1, 8, 7);
    one.cache.fetches.check_at_rest();
}

#[test]
fn nobody_looks_on_while_a_page_is_fetched_in_vain_again_and_again() {
    let (mut one, mut other) = two(SettingChange::default(), 64);
    let mut third = one.beside(64);
    assert_eq!(one.read(16, 8), [(16, 8)]);
    assert_eq!(other.read(16, 8), NOTHING);
    assert_eq!(answer(&mut one, Err(BaseError::Io)), NOTHING);
    assert_eq!(third.read(16, 8), [(16, 8)]);
    other.now = Now(NS_PER_S - 1);
    assert_eq!(other.poll(), NOTHING);
    other.now = Now(NS_PER_S);
    assert_eq!(other.poll(), [(16, 8)], "though it is the third's");
    assert_eq!(answer(&mut other, Ok(())), NOTHING);
    assert_read(&other, 1, 8, 7);
    assert_eq!(one.read(24, 8), [(24, 8)]);
    assert_eq!(answer(&mut third, Ok(())), NOTHING);
    assert_read(&third, 1, 8, 7);
    assert_eq!(answer(&mut one, Ok(())), NOTHING);
    one.cache.fetches.check_at_rest();
}

#[test]
fn a_base_read_that_is_repeated_without_its_rest_is_not_waited_for() {
    let (mut one, mut other) = two(SettingChange::default(), 64);
    assert_eq!(one.read(17, 2), [(16, 8)]);
    assert_eq!(other.read(19, 2), NOTHING);
    assert_eq!(answer(&mut one, Err(BaseError::Io)), [(17, 2)]);
    assert_eq!(other.poll(), [(16, 8)]);
    assert_eq!(answer(&mut other, Ok(())), NOTHING);
    assert_read(&other, 1, 2, 7);
    assert_eq!(answer(&mut one, Ok(())), NOTHING);
    assert_read(&one, 1, 2, 7);
    one.cache.fetches.check_at_rest();
}

#[test]
fn a_read_that_has_waited_finds_what_was_written_meanwhile() {
    let (mut one, mut other) = two(SettingChange::default(), 64);
    let mut writer = one.beside(64);
    assert_eq!(one.read(16, 8), [(16, 8)]);
    assert_eq!(other.read(16, 8), NOTHING);
    writer.write(16, 8, 9);
    assert_eq!(answer(&mut one, Ok(())), NOTHING);
    assert_eq!(one.cache.stats().fills_dropped, 1);
    assert_eq!(other.poll(), NOTHING);
    assert_read(&other, 1, 8, 9);
    one.cache.fetches.check_at_rest();
}

#[test]
fn what_is_not_kept_is_not_waited_for() {
    let both = |settings: SettingChange, pad_pages, lba, len_blocks| {
        let (mut one, mut other) = two(settings, pad_pages);
        let asked = one.read(lba, len_blocks);
        assert_eq!(asked.len(), 1);
        let waits = other.read(lba, len_blocks).is_empty();
        assert_eq!(one.cache.stats().awaited_reads, u64::from(waits));
        waits
    };
    for mode in CacheMode::ALL {
        let keeps = !matches!(mode, CacheMode::Passthrough | CacheMode::Writeonly);
        let settings = SettingChange::of(Setting::CacheMode, mode as u32);
        assert_eq!(both(settings, 64, 16, 8), keeps, "{mode:?}");
    }
    // Too large for a fill; no memory for it; part of a long sequence.
    assert!(!both(SettingChange::default(), 64, 16, 40));
    assert!(!both(SettingChange::default(), 0, 16, 8));
    let cutoff = SettingChange::of(Setting::SequentialCutoffKib, 4);
    assert!(!both(cutoff, 64, 16, 8));
}

#[test]
fn a_page_of_which_only_a_part_can_be_fetched_is_nobodys() {
    let (mut one, mut other) = two(SettingChange::default(), 64);
    // Something of the first page is known: it is not rounded out. The second is whole.
    one.write(16, 1, 9);
    assert_eq!(one.read(20, 12), [(20, 12)]);
    assert_eq!(other.read(17, 1), [(17, 1)]);
    assert_eq!(other.read(25, 1), NOTHING);
}

#[test]
fn a_read_that_waits_can_be_given_up() {
    let (mut one, mut other) = two(SettingChange::default(), 64);
    assert_eq!(one.read(16, 8), [(16, 8)]);
    for _ in 0..2 {
        assert_eq!(other.read(16, 8), NOTHING);
    }
    assert!(other.channel.abort(IoToken(1)));
    assert_eq!(other.poll(), NOTHING);
    assert_eq!(other.ended(), [Status::Aborted]);
    other.channel.abort_waiting();
    assert_eq!(other.poll(), NOTHING);
    assert_eq!(other.ended(), [Status::Aborted]);
    assert_eq!(other.channel.outstanding(), 0);
}

#[test]
fn nobody_waits_when_the_cache_has_failed() {
    let (mut one, mut other) = two(SettingChange::default(), 64);
    assert_eq!(one.read(16, 8), [(16, 8)]);
    assert_eq!(other.read(16, 8), NOTHING);
    assert_eq!(other.read(8, 16), [(8, 8)], "and waits for the second page");
    one.cache.poison("for a test");
    other.answer(Ok(()));
    assert_eq!(other.poll(), NOTHING);
    assert_eq!(other.ended(), [Status::Failed; 2]);
    assert_eq!(other.channel.outstanding(), 0);
    one.answer(Ok(()));
    assert_eq!(one.poll(), NOTHING);
    assert_eq!(one.channel.outstanding(), 0);
    one.cache.fetches.check_at_rest();
}

#[test]
fn a_channel_that_goes_leaves_nobody_waiting() {
    let (mut one, mut other) = two(SettingChange::default(), 64);
    assert_eq!(one.read(16, 8), [(16, 8)]);
    assert_eq!(other.read(16, 8), NOTHING);
    one.channel.abandon_pads();
    drop(one);
    other.cache.fetches.check_at_rest();
    assert_eq!(other.poll(), [(16, 8)]);
}

#[test]
fn each_of_many_reads_that_wait_has_its_turn() {
    let (mut one, mut other) = two(SettingChange::default(), 64);
    let mut third = one.beside(64);
    assert_eq!(one.read(16, 8), [(16, 8)]);
    assert_eq!(third.read(32, 8), [(32, 8)]);
    for _ in 0..500 {
        assert_eq!(other.read(16, 8), NOTHING);
    }
    assert_eq!(other.read(32, 8), NOTHING);
    assert_eq!(answer(&mut third, Ok(())), NOTHING);
    let ended = (0..20).position(|_| {
        assert_eq!(other.poll(), NOTHING);
        !other.ended().is_empty()
    });
    assert!(ended.is_some(), "it is not behind 500 others for ever");
    assert_eq!(answer(&mut one, Ok(())), NOTHING);
    let ended: usize = (0..20)
        .map(|_| {
            assert_eq!(other.poll(), NOTHING);
            other.ended().len()
        })
        .sum();
    assert_eq!((ended, other.channel.outstanding()), (500, 0));
}

/// Lets `other` do something at the given point of what `one` does. `false`: there is no such point.
fn amid(at: usize, one: impl FnOnce(), other: impl Fn() + 'static) -> bool {
    let left = Cell::new(Some(at));
    let done = Rc::new(Cell::new(false));
    let noted = Rc::clone(&done);
    let hook = move || {
        let now = left.get() == Some(0);
        left.set(left.get().and_then(|left| left.checked_sub(1)));
        if now {
            noted.set(true);
            sched::with_hook(None, &other);
        }
    };
    sched::with_hook(Some(Rc::new(hook)), one);
    done.get()
}

/// Polls until nothing is outstanding, with a base that answers at once. Returns how often it was asked.
fn finish(asking: &mut Asking) -> usize {
    (0..8)
        .map(|_| {
            let asked = asking.poll().len();
            asking.answer(Ok(()));
            asked
        })
        .sum()
}

#[test]
fn a_read_amid_the_end_of_another_ones_fetch_asks_nothing() {
    let mut points = 0;
    loop {
        let (mut one, other) = two(SettingChange::default(), 64);
        assert_eq!(one.read(16, 8), [(16, 8)]);
        one.answer(Ok(()));
        let other = Rc::new(RefCell::new(other));
        let reader = Rc::clone(&other);
        let asked = move || assert_eq!(reader.borrow_mut().read(16, 8), NOTHING);
        if !amid(points, || drop(one.poll()), asked) {
            break;
        }
        assert_read(&one, 1, 8, 7);
        let mut other = other.borrow_mut();
        assert_eq!(finish(&mut other), 0, "at point {points}");
        assert_eq!(other.channel.outstanding(), 0);
        assert!(other.buf.bytes()[..8 * 512].iter().all(|byte| *byte == 7));
        one.cache.fetches.check_at_rest();
        points += 1;
    }
    assert!(points > 10, "{points} points");
}

#[test]
fn a_fetch_that_ends_amid_a_read_leaves_it_neither_waiting_nor_wrong() {
    let mut points = 0;
    let mut asked = [0; 2];
    loop {
        let (mut one, mut other) = two(SettingChange::default(), 64);
        assert_eq!(one.read(16, 8), [(16, 8)]);
        one.answer(Ok(()));
        let one = Rc::new(RefCell::new(one));
        let fetcher = Rc::clone(&one);
        let end = move || assert_eq!(fetcher.borrow_mut().poll(), NOTHING);
        let buf = IovBuf::zeroed(8 * 512);
        other.submit(&buf, 16, 8);
        let mut now = 0;
        let poll = || {
            now = other.poll().len();
            other.answer(Ok(()));
        };
        if !amid(points, poll, end) {
            break;
        }
        // Between its look-up and its announcement it may have missed the end; then it asks, once.
        asked[now + finish(&mut other)] += 1;
        assert_eq!(other.channel.outstanding(), 0, "at point {points}");
        assert!(buf.bytes().iter().all(|byte| *byte == 7));
        one.borrow().cache.fetches.check_at_rest();
        points += 1;
    }
    assert!(asked[0] > asked[1] && asked[1] > 0, "{asked:?}");
}
