//! Writes that wait for the base.

use super::*;
use crate::index::BlockMap;
use crate::pmem::IovBuf;
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::units::{Lba, Page};

fn plain(mode: CacheMode) -> Plain<SimPmem> {
    plain_of(mode, 2)
}

fn plain_of(mode: CacheMode, stream_count_max: u32) -> Plain<SimPmem> {
    let base = vec![0; BLOCKS as usize * 512];
    let options = OpenOptions {
        settings: SettingChange::of(Setting::CacheMode, mode as u32),
        stream_count_max,
        ..options(512, None)
    };
    Plain::new(
        SimPmem::new(DEVICE_SIZE_BYTES),
        base,
        options,
        BackgroundRuns::InDrains,
    )
    .unwrap()
}

fn write(plain: &mut Plain<SimPmem>, lba: u64, fill: u8) -> Status {
    let buf = IovBuf::new(&[fill; 512], &[]);
    plain.run(0, Op::Write(buf.cursor(), Fua::No), lba, 1)
}

#[test]
fn a_held_write_that_is_given_up_fails() {
    let mut plain = plain(CacheMode::Writethrough);
    // Nobody writes back: the request is given up in the end.
    assert_eq!(write(&mut plain, 3, 5), Status::Failed);
    // It is in the log all the same, and goes to the base some time.
    assert_eq!(plain.read(0, 3, 1), (Status::Success, vec![5; 512]));
    assert!(plain.drain());
    assert_eq!(plain.base[3 * 512..4 * 512], [5; 512]);
}

#[test]
fn a_held_write_completes_when_another_mode_is_asked_for() {
    let mut plain = plain(CacheMode::Writearound);
    let buf = IovBuf::new(&[7; 512], &[]);
    let io = HostIo {
        token: IoToken(9),
        op: Op::Write(buf.cursor(), Fua::No),
        lba: Lba(8),
        len_blocks: 1,
    };
    plain.channel_mut(0).submit(io).unwrap();
    for _ in 0..10 {
        assert_eq!(plain.poll_channel(0), None);
    }
    // One that is under way can still not be aborted: it is in the log.
    assert!(!plain.channel_mut(0).abort(IoToken(9)));
    let change = SettingChange::of(Setting::CacheMode, CacheMode::Writeonly as u32);
    plain.cache.change_settings(&change).unwrap();
    assert_eq!(plain.poll_channel(0), Some(Status::Success));
    assert_eq!(plain.cache.mode_now(), CacheMode::Writeonly);
}

/// Submits a write of a page to a channel, and lets it into the log.
fn log_page(plain: &mut Plain<SimPmem>, channel: usize, page: u64, fill: u8) {
    let buf = IovBuf::new(&[fill; 4096], &[]);
    let io = HostIo {
        token: IoToken(page),
        op: Op::Write(buf.cursor(), Fua::No),
        lba: Lba(page * 8),
        len_blocks: 8,
    };
    plain.channel_mut(channel).submit(io).unwrap();
    assert_eq!(plain.poll_channel(channel), None, "it waits for the base");
}

fn place_of(plain: &Plain<SimPmem>, page: u64) -> BlockMap {
    let index = &plain.cache.index;
    let found = index.lookup(index.locate(Page(page))).unwrap();
    found.map.block(0)
}

/// Until the base has what is in the log.
fn write_back(plain: &mut Plain<SimPmem>) {
    let last = Seq(plain.cache.seq_next().0 - 1);
    for _ in 0..1000 {
        if plain.cache.dirty_tail() >= last {
            return;
        }
        plain.poll_background();
    }
    panic!("write-back does not come to {last:?}");
}

/// Under load there is always something newer in the segment, which is not clean then.
#[test]
fn a_write_is_forgotten_though_its_segment_holds_what_is_dirty() {
    for mode in [CacheMode::Writearound, CacheMode::Passthrough] {
        let mut plain = plain_of(mode, 1);
        log_page(&mut plain, 0, 1, 0xa1);
        log_page(&mut plain, 0, 2, 0xa2);
        let places = [1, 2].map(|page| place_of(&plain, page));
        write_back(&mut plain);
        // Another core is faster; one of its pages is one of those.
        log_page(&mut plain, 1, 3, 0xb3);
        log_page(&mut plain, 1, 2, 0xb2);
        let segment_of = |place| match place {
            BlockMap::Mapped(place) => plain.cache.geometry.segment_of(place),
            _ => panic!("{place:?} has no payload"),
        };
        assert_eq!(segment_of(place_of(&plain, 3)), segment_of(places[0]));
        assert_eq!(plain.poll_channel(0), Some(Status::Success));
        assert_eq!(place_of(&plain, 1), BlockMap::Absent, "{mode:?}");
        assert_ne!(place_of(&plain, 2), BlockMap::Absent, "the newer one stays");
        assert_ne!(place_of(&plain, 3), BlockMap::Absent);
        for (page, fill) in [(1, 0xa1), (2, 0xb2), (3, 0xb3)] {
            let read = plain.read(0, page * 8, 8);
            assert_eq!(read, (Status::Success, vec![fill; 4096]), "{mode:?}");
        }
        write_back(&mut plain);
        assert_eq!(plain.poll_channel(1), Some(Status::Success));
        let kept = [2, 3].map(|page| place_of(&plain, page));
        assert_eq!(kept, [BlockMap::Absent; 2], "{mode:?}");
        plain.cache.check_invariants();
    }
}

/// Of a page that two writes have put together out of parts, the part that is still dirty stays.
#[test]
fn a_part_of_a_page_is_forgotten_alone() {
    let mut plain = plain_of(CacheMode::Writearound, 1);
    let write = |plain: &mut Plain<SimPmem>, channel: usize, lba: u64, fill: u8| {
        let buf = IovBuf::new(&[fill; 2048], &[]);
        let io = HostIo {
            token: IoToken(lba),
            op: Op::Write(buf.cursor(), Fua::No),
            lba: Lba(lba),
            len_blocks: 4,
        };
        plain.channel_mut(channel).submit(io).unwrap();
        assert_eq!(plain.poll_channel(channel), None);
    };
    // The second half comes first, since payloads grow down: so both are one run.
    write(&mut plain, 0, 12, 0xc2);
    write_back(&mut plain);
    write(&mut plain, 1, 8, 0xc1);
    assert_eq!(plain.poll_channel(0), Some(Status::Success));
    let index = &plain.cache.index;
    let found = index.lookup(index.locate(Page(1))).unwrap();
    let is_cached = [0, 3, 4, 7].map(|block| found.map.block(block) != BlockMap::Absent);
    assert_eq!(is_cached, [true, true, false, false]);
    let expected = [[0xc1; 2048], [0xc2; 2048]].concat();
    assert_eq!(plain.read(1, 8, 8), (Status::Success, expected));
}

/// A write that completes late is not taken for what lies now where it lay.
#[test]
fn what_lies_where_a_forgotten_write_lay_stays() {
    let mut plain = plain_of(CacheMode::Writearound, 1);
    let change = SettingChange::of(Setting::GcPercent, 0);
    plain.cache.change_settings(&change).unwrap();
    log_page(&mut plain, 0, 1, 0xa1);
    let place = place_of(&plain, 1);
    write_back(&mut plain);
    let mut is_same = false;
    for round in 0..=200 {
        log_page(&mut plain, 1, 1, round);
        is_same = place_of(&plain, 1) == place;
        if is_same {
            assert_eq!(plain.poll_channel(0), Some(Status::Success));
            assert_eq!(place_of(&plain, 1), place, "it is dirty");
            let read = plain.read(0, 8, 8);
            assert_eq!(read, (Status::Success, vec![round; 4096]));
            break;
        }
        write_back(&mut plain);
        assert_eq!(plain.poll_channel(1), Some(Status::Success));
        // Segments are reclaimed.
        (0..50).for_each(|_| plain.poll_background());
    }
    assert!(is_same, "the place is never used again");
}
