//! What is written back so that there is room, and when.

use super::*;
use crate::pmem::IovBuf;
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::sim::prng::Prng;
use crate::units::{Lba, Now};

const PAGE_COUNT: u64 = 16 << 10;
const SEGMENT_COUNT: u64 = 64;
const SEGMENT_BYTES: u64 = 64 << 10;

/// A cache of some 4 MiB in front of 64 MiB, that writes back for nothing but room.
fn plain() -> Plain<SimPmem> {
    plain_of(2)
}

fn plain_of(stream_count_max: u32) -> Plain<SimPmem> {
    let mut options = OpenOptions {
        stream_count_max,
        ..options(512, None)
    };
    options.base.block_count = PAGE_COUNT * 8;
    options.settings = SettingChange::of(Setting::DirtyAgeS, 0)
        .and(Setting::GcPercent, 90)
        .and(Setting::ScrubMibS, 0);
    let device_bytes = SEGMENT_BYTES + SEGMENT_COUNT * SEGMENT_BYTES;
    let base = vec![0; (PAGE_COUNT * 4096) as usize];
    Plain::new(
        SimPmem::new(device_bytes),
        base,
        options,
        BackgroundRuns::Always,
    )
    .unwrap()
}

fn with_marks(low: u32, high: u32) -> Plain<SimPmem> {
    let plain = plain();
    let change = SettingChange::of(Setting::DirtyLowPercent, low);
    let change = change.and(Setting::DirtyHighPercent, high);
    plain.cache.change_settings(&change).unwrap();
    plain
}

/// The memory is to be kept until it has ended.
#[must_use]
fn submit(plain: &mut Plain<SimPmem>, channel: usize, page: u64) -> IovBuf {
    let buf = IovBuf::new(&[page as u8; 4096], &[]);
    let io = HostIo {
        token: IoToken(page),
        op: Op::Write(buf.cursor(), Fua::No),
        lba: Lba(page * 8),
        len_blocks: 8,
    };
    plain.channel_mut(channel).submit(io).unwrap();
    buf
}

/// Writes pages, and nobody writes back, until one waits. Returns the number of the pages, and the memory of the last.
fn fill_up(plain: &mut Plain<SimPmem>) -> (u64, IovBuf) {
    for page in 0..PAGE_COUNT {
        let buf = submit(plain, 0, page);
        if plain.poll_channel(0).is_none() {
            assert!(plain.cache.info().requests_wait);
            return (page + 1, buf);
        }
    }
    panic!("a small cache does not fill up");
}

#[test]
fn a_wait_for_room_writes_back_what_it_needs() {
    let mut plain = with_marks(90, 95);
    let (count, _buf) = fill_up(&mut plain);
    let dirty_bytes = (count - 1) * 4096;
    assert_eq!(plain.cache.info().dirty_bytes, dirty_bytes);
    let polls = (0..1000).find(|_| {
        plain.poll_background();
        plain.poll_channel(0) == Some(Status::Success)
    });
    assert!(polls.is_some(), "the writer waits for ever");
    // Long afterwards, nobody waits.
    (0..3000).for_each(|_| plain.poll_background());
    let info = plain.cache.info();
    assert!(!info.requests_wait);
    assert!(info.segments_free > 1);
    let written = dirty_bytes - info.dirty_bytes;
    assert!(
        written < dirty_bytes / 2,
        "{written} of {dirty_bytes} bytes were written back for one page"
    );
}

#[test]
fn many_writers_that_wait_are_all_served() {
    let mut plain = with_marks(90, 95);
    let (first, buf) = fill_up(&mut plain);
    let mut bufs = vec![buf];
    let count = 2 * first;
    for number in 0..count {
        bufs.push(submit(&mut plain, number as usize % 2, first + number));
    }
    let is_done =
        |plain: &Plain<SimPmem>| (0..2).all(|channel| plain.channel(channel).outstanding() == 0);
    for _ in 0..20_000 {
        plain.poll_background();
        (0..2).for_each(|channel| {
            plain.poll_channel(channel);
        });
        if is_done(&plain) {
            break;
        }
    }
    assert!(is_done(&plain), "somebody waits for ever");
    for page in [0, first, first + count - 1] {
        let read = plain.read(0, page * 8, 8);
        assert!(
            read == (Status::Success, vec![page as u8; 4096]),
            "page {page}"
        );
    }
    plain.cache.check_invariants();
}

/// How often a request waits for room if the background has a turn, of a millisecond, after each.
fn waits(change: impl Fn(&mut Plain<SimPmem>, u64)) -> u64 {
    let mut plain = plain();
    for number in 0..6000 {
        change(&mut plain, number);
        plain.poll_background();
    }
    let info = plain.cache.info();
    assert!(info.dirty_bytes < (SEGMENT_COUNT * SEGMENT_BYTES) / 4);
    plain.cache.check_invariants();
    plain.cache.stats().space_waits
}

/// The index is full of dirty pages long before the log is full of their bytes.
#[test]
fn small_scattered_writes_do_not_wait_for_the_index() {
    let write = |plain: &mut Plain<SimPmem>, number: u64| {
        let buf = IovBuf::new(&[number as u8; 512], &[]);
        let lba = number * 8 + number % 8;
        let status = plain.run(0, Op::Write(buf.cursor(), Fua::No), lba, 1);
        assert_eq!(status, Status::Success);
    };
    assert_eq!(waits(write), 0);
}

/// An unmap has no bytes at all.
#[test]
fn unmaps_do_not_wait_for_the_index() {
    let unmap = |plain: &mut Plain<SimPmem>, number: u64| {
        let lba = number * 8 * 8 % (PAGE_COUNT * 8);
        let status = plain.run(0, Op::Unmap, lba, 64);
        assert_eq!(status, Status::Success);
    };
    assert_eq!(waits(unmap), 0);
}

/// It is clean only as a whole.
#[test]
fn a_wait_for_the_index_ends_though_another_channel_appends_to_the_segment() {
    const BLOCKS: u64 = 512;
    let mut plain = plain_of(1);
    let change = SettingChange::of(Setting::DirtyLowPercent, 90);
    let change = change.and(Setting::DirtyHighPercent, 95);
    plain.cache.change_settings(&change).unwrap();
    let write = |plain: &mut Plain<SimPmem>| {
        let buf = IovBuf::new(&[1; 512], &[]);
        let status = plain.run(1, Op::Write(buf.cursor(), Fua::No), 0, 1);
        assert_eq!(status, Status::Success);
    };
    // All that is in the index lies in one open segment, and hardly anything is dirty.
    let mut waits = false;
    for number in 1..PAGE_COUNT * 8 / BLOCKS {
        let io = HostIo {
            token: IoToken(number),
            op: Op::Unmap,
            lba: Lba(number * BLOCKS),
            len_blocks: BLOCKS,
        };
        plain.channel_mut(0).submit(io).unwrap();
        waits = plain.poll_channel(0).is_none();
        if waits {
            break;
        }
        if number % 8 == 0 {
            assert!(plain.drain());
            write(&mut plain);
        }
    }
    assert!(waits && plain.cache.info().requests_wait);
    let mut writes = 0;
    for _ in 0..10_000 {
        plain.poll_background();
        // Something is dirty at any moment.
        if plain.cache.dirty_tail().0 + 1 == plain.cache.seq_next().0 {
            write(&mut plain);
            writes += 1;
        }
        if plain.poll_channel(0) == Some(Status::Success) {
            assert!(writes < 10, "the writer waited for {writes} writes");
            return plain.cache.check_invariants();
        }
    }
    panic!("the writer waits for ever");
}

/// Those that were given up are not of the turn any more: what comes in their place is behind whoever waits by then.
#[test]
fn writes_that_are_given_up_leave_their_places_to_nobody_on_their_channel() {
    // Three fit into a segment.
    const PAGES: u64 = 4;
    let mut plain = with_marks(90, 95);
    let (count, _buf) = fill_up(&mut plain);
    assert!(plain.channel_mut(0).abort(IoToken(count - 1)));
    plain.poll_channel(0);
    let buf = IovBuf::new(&[9; PAGES as usize * 4096], &[]);
    let submit = |plain: &mut Plain<SimPmem>, channel, number: u64| {
        let io = HostIo {
            token: IoToken(number),
            op: Op::Write(buf.cursor(), Fua::No),
            lba: Lba((count + number * PAGES) * 8),
            len_blocks: PAGES * 8,
        };
        plain.channel_mut(channel).submit(io).unwrap();
        plain.poll_channel(channel);
    };
    // The first one draws a number for itself; then there are eight that wait together, and one on another channel.
    (0..9).for_each(|number| submit(&mut plain, 0, number));
    while plain.channel(0).outstanding() > 8 {
        plain.poll_background();
        plain.poll_channel(0);
    }
    submit(&mut plain, 1, 9);
    let of_turn = plain.channel(0).outstanding() as u64;
    assert!(
        plain.cache.info().requests_wait && of_turn >= 6,
        "{of_turn}"
    );
    (10 - of_turn..9).for_each(|number| assert!(plain.channel_mut(0).abort(IoToken(number))));
    plain.poll_channel(0);
    (10..10 + of_turn).for_each(|number| submit(&mut plain, 0, number));
    let before = plain.channel(0).outstanding();
    for _ in 0..10_000 {
        plain.poll_background();
        plain.poll_channel(0);
        plain.poll_channel(1);
        if plain.channel(1).outstanding() == 0 {
            break;
        }
    }
    assert_eq!(plain.channel(1).outstanding(), 0);
    // What fits into one segment, and no more.
    let served = before - plain.channel(0).outstanding();
    assert!(served <= 3, "{served} of the first channel went before");
}

/// It takes what it wants of the index at once, and a small cache has little of that.
#[test]
fn the_largest_unmap_ends_while_other_channels_write() {
    let mut plain = plain_of(3);
    let pages_max = plain.cache.unmap_size_max_bytes() / 4096;
    assert!(pages_max * 8 <= plain.cache.index.page_room() && pages_max.is_power_of_two());
    let mut third = plain.cache.channel().unwrap();
    let (mut out, mut prng) = (Outbox::new(), Prng::new(5));
    for round in 0..100 {
        let io = HostIo {
            token: IoToken(PAGE_COUNT),
            op: Op::Unmap,
            lba: Lba(prng.below(PAGE_COUNT / pages_max) * pages_max * 8),
            len_blocks: pages_max * 8,
        };
        third.submit(io).unwrap();
        let mut bufs = Vec::new();
        let mut polls = 0;
        while third.outstanding() > 0 {
            for channel in 0..2 {
                while plain.channel(channel).outstanding() < 32 {
                    bufs.push(submit(&mut plain, channel, prng.below(PAGE_COUNT)));
                }
            }
            for _ in 0..4 {
                match prng.below(4) {
                    3 => plain.poll_background(),
                    2 => {
                        out.clear();
                        third.poll(Now(0), &mut out);
                    }
                    channel => {
                        plain.poll_channel(channel as usize);
                    }
                }
            }
            polls += 1;
            assert!(polls < 5000, "round {round}: {:?}", plain.cache.info());
        }
        // The memory of the writes is in use until they have ended.
        while (0..2).any(|channel| plain.channel(channel).outstanding() > 0) {
            plain.poll_background();
            (0..2).for_each(|channel| {
                plain.poll_channel(channel);
            });
        }
    }
}
