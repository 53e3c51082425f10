//! More damage than is named, and more lost memory than one poll looks at.

use super::super::damage::DAMAGED_BLOCKS_MAX;
use super::*;
use crate::index::BlockMap;
use crate::pmem::IovBuf;
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::units::{Lba, Now, Page, PmemOff};

const BLOCK: usize = 512;
const PAGE_BLOCKS: u64 = 8;
const SEGMENT_BYTES: u64 = 1 << 20;

fn options_of(data_crc: Option<DataCrc>, settings: SettingChange) -> OpenOptions {
    let options = options(BLOCK as u32, data_crc);
    OpenOptions {
        base: BaseIdentity {
            block_count: 8192,
            ..options.base
        },
        segment_size_bytes: Some(SEGMENT_BYTES),
        settings,
        ..options
    }
}

fn cached(data_crc: DataCrc, settings: SettingChange) -> Plain<SimPmem> {
    let options = options_of(Some(data_crc), settings.and(Setting::ScrubMibS, 0));
    let base = vec![0xbb; 8192 * BLOCK];
    let pmem = SimPmem::new((64 << 10) + 12 * SEGMENT_BYTES);
    Plain::new(pmem, base, options, BackgroundRuns::InDrains).expect("the device is blank")
}

fn write_page(plain: &mut Plain<SimPmem>, page: u64, byte: u8) {
    let len_blocks = PAGE_BLOCKS;
    let buf = IovBuf::new(&vec![byte; len_blocks as usize * BLOCK], &[]);
    let op = Op::Write(buf.cursor(), Fua::No);
    let status = plain.run(0, op, page * PAGE_BLOCKS, len_blocks);
    assert_eq!(status, Status::Success);
}

fn off_of(plain: &Plain<SimPmem>, lba: u64) -> PmemOff {
    let index = &plain.cache.index;
    let found = index.lookup(index.locate(Page(lba / PAGE_BLOCKS)));
    match found.unwrap().map.block((lba % PAGE_BLOCKS) as u32) {
        BlockMap::Mapped(place) => plain.cache.geometry.place_off(place),
        other => panic!("block {lba} is {other:?}"),
    }
}

fn flip(plain: &Plain<SimPmem>, page: u64) {
    let off = off_of(plain, page * PAGE_BLOCKS);
    plain.pmem().flip_bit(off.plus(1000), 2);
}

fn is_degraded(plain: &Plain<SimPmem>) -> bool {
    matches!(plain.cache.health(), Health::Degraded(_))
}

fn damaged(plain: &Plain<SimPmem>) -> Vec<u64> {
    let ranges = plain.cache.info().damaged.into_iter();
    ranges
        .flat_map(|range| range.lba..range.lba + range.len_blocks)
        .collect()
}

/// With checksums, and reads that are not verified.
#[test]
fn of_more_damage_than_is_named_nothing_is_read_and_all_of_it_heals() {
    const PAGES: u64 = 300;
    let mut plain = cached(DataCrc::On, SettingChange::default());
    (0..PAGES).for_each(|page| write_page(&mut plain, page, 1));
    (0..PAGES).for_each(|page| flip(&plain, page));
    assert!(!plain.drain());
    assert!(is_degraded(&plain));
    assert_eq!(damaged(&plain).len(), DAMAGED_BLOCKS_MAX);
    for page in 0..PAGES {
        let (status, _) = plain.read(0, page * PAGE_BLOCKS, PAGE_BLOCKS);
        assert_eq!(status, Status::Failed, "page {page}");
    }
    // As many as are kept in mind, and some of the others.
    (0..200).for_each(|page| write_page(&mut plain, page, 2));
    assert!(!plain.drain());
    assert!(is_degraded(&plain));
    assert!(damaged(&plain).contains(&(299 * PAGE_BLOCKS)));
    assert!(plain.base.iter().all(|byte| *byte == 0xbb));
    (200..PAGES).for_each(|page| write_page(&mut plain, page, 2));
    assert!(plain.drain(), "{:?}", plain.cache.health());
    (0..200).for_each(|_| plain.poll_background());
    assert_eq!(plain.cache.health(), Health::Online);
    assert!(damaged(&plain).is_empty());
    let written = PAGES as usize * 4096;
    assert!(plain.base[..written].iter().all(|byte| *byte == 2));
}

#[test]
fn what_holds_write_back_up_is_named_whatever_else_is_damaged() {
    const OTHERS: u64 = 150;
    let mut plain = cached(DataCrc::On, SettingChange::default());
    write_page(&mut plain, 600, 1);
    (0..OTHERS).for_each(|page| write_page(&mut plain, page, 1));
    (0..OTHERS).for_each(|page| flip(&plain, page));
    let rate = |mib_s| SettingChange::of(Setting::ScrubMibS, mib_s);
    plain.cache.change_settings(&rate(4096)).unwrap();
    (0..2000).for_each(|_| plain.poll_background());
    assert!(plain.cache.stats().scrub_passes > 0);
    plain.cache.change_settings(&rate(0)).unwrap();
    assert_eq!(damaged(&plain).len(), DAMAGED_BLOCKS_MAX);
    flip(&plain, 600);
    assert!(!plain.drain());
    assert!(is_degraded(&plain));
    for _ in 0..200 {
        plain.poll_background();
        assert!(is_degraded(&plain));
        let told = damaged(&plain);
        assert!((4800..4808).all(|lba| told.contains(&lba)), "{told:?}");
    }
    (0..OTHERS).for_each(|page| write_page(&mut plain, page, 2));
    assert!(!plain.drain());
    assert!((4800..4808).all(|lba| damaged(&plain).contains(&lba)));
    write_page(&mut plain, 600, 2);
    assert!(plain.drain());
}

/// Fills the log up behind damage at a page, until a write waits. Returns its memory.
fn fill_up_behind(plain: &mut Plain<SimPmem>, damaged: u64) -> IovBuf {
    let buf = IovBuf::new(&[9; 4096], &[]);
    for number in 0..10_000 {
        let io = HostIo {
            token: IoToken(number),
            op: Op::Write(buf.cursor(), Fua::No),
            lba: Lba((damaged + 1 + number % 100) * PAGE_BLOCKS),
            len_blocks: PAGE_BLOCKS,
        };
        plain.channel_mut(0).submit(io).unwrap();
        (0..3).for_each(|_| plain.poll_background());
        if plain.poll_channel(0).is_none() {
            assert!(plain.cache.info().requests_wait);
            return buf;
        }
    }
    panic!("it does not fill up");
}

/// Nothing but the write that heals makes room, and it finds some, also in a cache that was full when it was opened.
#[test]
fn damage_in_a_full_cache_heals_after_a_start() {
    for with_start in [false, true] {
        let settings = || SettingChange::of(Setting::DirtyAgeS, 1);
        let mut plain = cached(DataCrc::On, settings());
        write_page(&mut plain, 0, 1);
        flip(&plain, 0);
        assert!(!plain.drain());
        let _waits = fill_up_behind(&mut plain, 0);
        let mut after = plain;
        let _waits_again;
        if with_start {
            let (pmem, base) = (after.pmem().clone(), after.base.clone());
            drop(after);
            let options = options_of(Some(DataCrc::On), settings());
            after = Plain::new(pmem, base, options, BackgroundRuns::Always).unwrap();
            _waits_again = fill_up_behind(&mut after, 0);
            (0..100).for_each(|_| after.poll_background());
        }
        assert!(is_degraded(&after), "{:?}", after.cache.health());
        // Behind one that waits.
        write_page_while_others_wait(&mut after, 0, 2);
        // A batch of all of it, in many parts.
        check_healed(&mut after, 20_000);
        assert_eq!(after.cache.channels_that_wait(), 0);
        assert_eq!(
            after.read(0, 0, PAGE_BLOCKS),
            (Status::Success, vec![2; 4096])
        );
    }
}

/// More than is named at a time: write-back goes on in between, and finds the rest. Other writes of the same channel wait all
/// the time, and so does a rewrite of what is healed already.
#[test]
fn much_damage_in_a_full_cache_heals() {
    const PAGES: u64 = 200;
    let mut plain = cached(DataCrc::On, SettingChange::default());
    (0..PAGES).for_each(|page| write_page(&mut plain, page, 1));
    (0..PAGES).for_each(|page| flip(&plain, page));
    assert!(!plain.drain());
    let _waits = fill_up_behind(&mut plain, PAGES);
    // These are zeroes, which take little room; the first page is written again and again.
    write_page_while_others_wait(&mut plain, 0, 2);
    let rewrite = IovBuf::new(&[3; 4096], &[]);
    for page in 1..PAGES {
        if page % 8 == 0 {
            // It waits like the others.
            submit_rewrite(&mut plain, 0, &rewrite);
        }
        let io = HostIo {
            token: IoToken(u64::MAX - 1),
            op: Op::WriteZeroes,
            lba: Lba(page * PAGE_BLOCKS),
            len_blocks: PAGE_BLOCKS,
        };
        plain.channel_mut(0).submit(io).unwrap();
        let status = (0..5000).find_map(|_| {
            plain.poll_background();
            plain.poll_channel(0)
        });
        assert_eq!(
            status,
            Some(Status::Success),
            "page {page}: {:?}",
            plain.cache.info()
        );
    }
    check_healed(&mut plain, 50_000);
    assert!(!plain.cache.info().requests_wait);
    assert_eq!(plain.cache.channels_that_wait(), 0);
}

/// All that waits ends within so many turns, and everything gets to the base.
fn check_healed(plain: &mut Plain<SimPmem>, turns: usize) {
    for _ in 0..turns {
        plain.poll_background();
        plain.poll_channel(0);
    }
    let info = plain.cache.info();
    assert_eq!(plain.channel(0).outstanding(), 0, "{info:?}");
    assert!(plain.drain(), "{:?}", plain.cache.health());
}

/// What does not fit into what is left for such writes keeps no smaller one from it.
#[test]
fn a_large_write_that_heals_does_not_hold_up_a_small_one() {
    const LARGE_PAGES: u64 = 64;
    let mut plain = cached(DataCrc::On, SettingChange::default());
    let pages = 6 * LARGE_PAGES;
    (0..pages).for_each(|page| write_page(&mut plain, page, 1));
    [0, LARGE_PAGES, 2 * LARGE_PAGES, 3 * LARGE_PAGES, pages - 1]
        .into_iter()
        .for_each(|page| flip(&plain, page));
    assert!(!plain.drain());
    let _waits = fill_up_behind(&mut plain, pages);
    let buf = IovBuf::new(&vec![5; LARGE_PAGES as usize * 4096], &[]);
    // Three fit into a segment of 1 MiB.
    for number in 0..4 {
        let io = HostIo {
            token: IoToken(1 << 40),
            op: Op::Write(buf.cursor(), Fua::No),
            lba: Lba(number * LARGE_PAGES * PAGE_BLOCKS),
            len_blocks: LARGE_PAGES * PAGE_BLOCKS,
        };
        plain.channel_mut(0).submit(io).unwrap();
    }
    write_page_while_others_wait(&mut plain, pages - 1, 2);
    for _ in 0..200 {
        plain.poll_background();
        plain.poll_channel(0);
    }
    // The one from the beginning, and the large one.
    assert_eq!(plain.channel(0).outstanding(), 2);
    let zeroes = HostIo {
        token: IoToken(1 << 41),
        op: Op::WriteZeroes,
        lba: Lba(3 * LARGE_PAGES * PAGE_BLOCKS),
        len_blocks: PAGE_BLOCKS,
    };
    plain.channel_mut(0).submit(zeroes).unwrap();
    check_healed(&mut plain, 50_000);
}

/// The memory is to be kept until it has ended.
fn submit_rewrite(plain: &mut Plain<SimPmem>, page: u64, buf: &IovBuf) {
    let io = HostIo {
        token: IoToken(1 << 40),
        op: Op::Write(buf.cursor(), Fua::No),
        lba: Lba(page * PAGE_BLOCKS),
        len_blocks: PAGE_BLOCKS,
    };
    plain.channel_mut(0).submit(io).unwrap();
}

fn write_page_while_others_wait(plain: &mut Plain<SimPmem>, page: u64, byte: u8) {
    let buf = IovBuf::new(&[byte; 4096], &[]);
    let io = HostIo {
        token: IoToken(u64::MAX),
        op: Op::Write(buf.cursor(), Fua::No),
        lba: Lba(page * PAGE_BLOCKS),
        len_blocks: PAGE_BLOCKS,
    };
    plain.channel_mut(0).submit(io).unwrap();
    let status = (0..1000).find_map(|_| {
        plain.poll_background();
        plain.poll_channel(0)
    });
    assert_eq!(status, Some(Status::Success));
}

/// Polls until all reads have ended, and returns how, and how many loads have failed in one poll, at most, and in all.
fn poll_out(channel: &mut Channel<SimPmem>, pmem: &SimPmem) -> (Vec<Status>, u64, u64) {
    let mut out = Outbox::new();
    let (mut ends, mut most) = (Vec::new(), 0);
    let first = pmem.counters().failed_loads;
    while channel.outstanding() > 0 {
        let before = pmem.counters().failed_loads;
        channel.poll(Now(0), &mut out);
        most = most.max(pmem.counters().failed_loads - before);
        ends.extend(out.completions.iter().map(|done| done.status));
        out.clear();
    }
    (ends, most, pmem.counters().failed_loads - first)
}

fn submit(channel: &mut Channel<SimPmem>, lba: u64, len_blocks: u64) -> IovBuf {
    let buf = IovBuf::zeroed(len_blocks as usize * BLOCK);
    let io = HostIo {
        token: IoToken(lba),
        op: Op::Read(buf.cursor()),
        lba: Lba(lba),
        len_blocks,
    };
    channel.submit(io).expect("there is room");
    buf
}

/// Each failed load is an exception, which takes long.
#[test]
fn lost_memory_is_looked_at_in_bounded_pieces_and_not_again_and_again() {
    const BLOCKS: u64 = 1024;
    let verified = SettingChange::of(Setting::VerifyReads, 1);
    for (data_crc, settings) in [
        (DataCrc::Off, SettingChange::default()),
        (DataCrc::On, verified),
    ] {
        let mut plain = cached(data_crc, settings);
        (0..BLOCKS / PAGE_BLOCKS).for_each(|page| write_page(&mut plain, page, 1));
        for lba in 0..BLOCKS {
            plain.pmem().poison(off_of(&plain, lba).plus(200));
        }
        let mut channel = plain.cache.channel().expect("there are few");
        let _buf = submit(&mut channel, 0, BLOCKS);
        let (ends, _, failed_loads) = poll_out(&mut channel, plain.pmem());
        assert_eq!(ends, [Status::Failed]);
        assert!(failed_loads <= 16, "{data_crc:?}: {failed_loads}");
        assert_eq!(damaged(&plain)[0], 0);
        // Now it is known.
        let _buf = submit(&mut channel, 0, BLOCKS);
        let (ends, _, failed_loads) = poll_out(&mut channel, plain.pmem());
        assert_eq!((ends, failed_loads), (vec![Status::Failed], 0));
        // Those of many reads at once.
        let bufs: Vec<IovBuf> = (8..408).map(|lba| submit(&mut channel, lba, 1)).collect();
        let (ends, most, _) = poll_out(&mut channel, plain.pmem());
        assert_eq!(ends, vec![Status::Failed; bufs.len()]);
        assert!(most <= 70, "{data_crc:?}: {most} in one poll");
    }
}

/// A base that copies with the CPU would end the process, after each start again.
#[test]
fn what_is_dirty_from_before_the_start_is_read_before_the_base_gets_it() {
    let mut plain = cached(DataCrc::Off, SettingChange::default());
    (0..3).for_each(|page| write_page(&mut plain, page, 7));
    // Not the first line of a page, which is all that a look at it meets.
    let lost = off_of(&plain, PAGE_BLOCKS).plus(1024);
    let image = SimPmem::from_image(plain.pmem().durable_image());
    image.poison(lost);
    let options = options_of(None, SettingChange::of(Setting::ScrubMibS, 0));
    let base = plain.base.clone();
    let mut plain = Plain::new(image, base, options, BackgroundRuns::InDrains)
        .expect("a page that is lost in part is no reason not to open");
    assert!(!plain.drain());
    assert!(is_degraded(&plain));
    assert_eq!(damaged(&plain), [PAGE_BLOCKS + 2]);
    let lost_block = (PAGE_BLOCKS as usize + 2) * BLOCK;
    assert_eq!(plain.base[lost_block..][..BLOCK], [0xbb; BLOCK]);
}
