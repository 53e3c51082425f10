//! Damage that reads meet where clean and dirty data lie side by side: the key tells which of them it is (INV-READ-7).

use super::super::damage::Flaw;
use super::*;
use crate::index::BlockMap;
use crate::media::Place;
use crate::pmem::{IovBuf, PmemRead};
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::sim::pmem::PoisonedStore;
use crate::units::{Lba, Now, Page, PmemOff, SegId};

const BLOCK: usize = 512;
const BASE_BYTE: u8 = 0xbb;
/// As large as a cache of few segments may have, so that its keys are more than one poll looks at.
const LARGE_SEGMENT_BYTES: u64 = 1 << 20;

fn large_options() -> OpenOptions {
    OpenOptions {
        base: BaseIdentity {
            block_count: 4096,
            ..options(BLOCK as u32, None).base
        },
        segment_size_bytes: Some(LARGE_SEGMENT_BYTES),
        settings: SettingChange::of(Setting::ScrubMibS, 0),
        ..options(BLOCK as u32, Some(DataCrc::Off))
    }
}

fn options_for(flaw: Flaw) -> OpenOptions {
    let data_crc = match flaw {
        Flaw::Checksum => DataCrc::On,
        Flaw::Poisoned => DataCrc::Off,
    };
    let options = options(BLOCK as u32, Some(data_crc));
    OpenOptions {
        settings: options.settings.and(Setting::ScrubMibS, 0),
        ..options
    }
}

fn cached(options: OpenOptions) -> Plain<SimPmem> {
    let base = vec![BASE_BYTE; options.base.block_count as usize * BLOCK];
    // So few segments that fills lie among what was written.
    let size_bytes = (64 << 10) + 10 * options.segment_size_bytes.unwrap_or_default();
    let pmem = SimPmem::new(size_bytes);
    Plain::new(pmem, base, options, BackgroundRuns::InDrains).expect("the device is blank")
}

fn write(plain: &mut Plain<SimPmem>, lba: u64, len_blocks: u64, byte: u8) {
    let buf = IovBuf::new(&vec![byte; len_blocks as usize * BLOCK], &[]);
    let status = plain.run(0, Op::Write(buf.cursor(), Fua::No), lba, len_blocks);
    assert_eq!(status, Status::Success);
}

fn place_of(plain: &Plain<SimPmem>, lba: u64) -> Place {
    let index = &plain.cache.index;
    let found = index.lookup(index.locate(Page(lba / 8)));
    match found.expect("nobody writes").map.block((lba % 8) as u32) {
        BlockMap::Mapped(place) => place,
        other => panic!("block {lba} is {other:?}"),
    }
}

fn segment_of(plain: &Plain<SimPmem>, lba: u64) -> SegId {
    plain.cache.geometry.segment_of(place_of(plain, lba))
}

fn spoil(plain: &Plain<SimPmem>, lba: u64, flaw: Flaw) {
    let off = plain.cache.geometry.place_off(place_of(plain, lba));
    match flaw {
        Flaw::Checksum => plain.cache.pmem.flip_bit(off.plus(7), 3),
        Flaw::Poisoned => plain.cache.pmem.poison(off.plus(7)),
    }
}

/// The status of a read, whether all of its blocks begin with these bytes, and which of them came from the base.
fn read(plain: &mut Plain<SimPmem>, lba: u64, bytes: &[u8]) -> (Status, bool, Vec<u64>) {
    plain.missed.clear();
    let (status, found) = plain.read(0, lba, bytes.len() as u64);
    let is_right = found.iter().step_by(BLOCK).eq(bytes);
    (status, is_right, plain.missed.iter().copied().collect())
}

#[test]
fn what_is_clean_comes_from_the_base_whatever_lies_beside_it() {
    // INV-READ-7.
    for flaw in [Flaw::Poisoned, Flaw::Checksum] {
        let mut plain = cached(options_for(flaw));
        write(&mut plain, 8, 1, 1);
        assert!(plain.drain());
        read(&mut plain, 40, &[BASE_BYTE]);
        write(&mut plain, 24, 1, 3);
        let segments = [8, 40, 24].map(|lba| segment_of(&plain, lba));
        assert_eq!(segments, [segments[0]; 3]);
        let tail = plain.cache.dirty_tail();
        assert!(!plain.cache.segments.get(segments[0]).is_on_base(tail));
        for lba in [8, 40, 24] {
            spoil(&plain, lba, flaw);
        }
        for _ in 0..2 {
            // Written back, brought, and neither.
            let ok = Status::Success;
            assert_eq!(read(&mut plain, 8, &[1]), (ok, true, vec![8]));
            assert_eq!(read(&mut plain, 40, &[BASE_BYTE]), (ok, true, vec![40]));
            let (status, _, missed) = read(&mut plain, 24, &[3]);
            assert_eq!((status, missed), (Status::Failed, vec![]));
        }
        // INV-SEG-7: memory that is lost may take no stores.
        let is_suspect = plain.cache.segments.get(segments[0]).is_suspect();
        assert_eq!(is_suspect, flaw == Flaw::Poisoned);
        let told: Vec<u64> = plain.cache.info().damaged.iter().map(|at| at.lba).collect();
        assert_eq!(told, [24]);
    }
}

#[test]
fn a_read_fill_is_known_for_one_after_a_restart() {
    // INV-READ-7.
    for flaw in [Flaw::Poisoned, Flaw::Checksum] {
        let mut plain = cached(options_for(flaw));
        read(&mut plain, 40, &[BASE_BYTE; 8]);
        write(&mut plain, 24, 1, 3);
        let image = SimPmem::from_image(plain.pmem().durable_image());
        let base = plain.base.clone();
        let options = options_for(flaw);
        let mut plain = Plain::new(image, base, options, BackgroundRuns::InDrains)
            .expect("all of it can be read");
        assert!(segment_of(&plain, 40) == segment_of(&plain, 24));
        assert!(
            plain.cache.dirty_tail() < Seq(1),
            "nothing was written back"
        );
        spoil(&plain, 42, flaw);
        spoil(&plain, 24, flaw);
        let (status, is_right, missed) = read(&mut plain, 40, &[BASE_BYTE; 8]);
        assert_eq!((status, is_right), (Status::Success, true));
        assert!(missed.contains(&42), "{missed:?}");
        assert_eq!(read(&mut plain, 24, &[3]).0, Status::Failed);
        let told = plain.cache.info().damaged;
        assert!(told.iter().all(|range| range.lba == 24), "{told:?}");
    }
}

#[test]
fn damage_in_the_middle_of_a_run_costs_the_blocks_that_it_hits() {
    for flaw in [Flaw::Poisoned, Flaw::Checksum] {
        let mut plain = cached(options_for(flaw));
        // Payload grows downwards, so that these lie in one piece.
        write(&mut plain, 5, 3, 1);
        read(&mut plain, 3, &[BASE_BYTE; 2]);
        write(&mut plain, 1, 2, 2);
        let Place(first) = place_of(&plain, 1);
        let places: Vec<u64> = (1..8).map(|lba| place_of(&plain, lba).0).collect();
        assert_eq!(places, (first..first + 7).collect::<Vec<_>>());
        spoil(&plain, 4, flaw);
        let hits_before = plain.cache.stats().hit_bytes;
        let expected = [2, 2, BASE_BYTE, BASE_BYTE, 1, 1, 1];
        let (status, is_right, missed) = read(&mut plain, 1, &expected);
        assert_eq!((status, is_right), (Status::Success, true));
        // A checksum covers both; of two blocks that cannot be told apart one can be read.
        let from_base = if flaw == Flaw::Checksum {
            vec![3, 4]
        } else {
            vec![4]
        };
        assert_eq!(missed, from_base);
        let hit_bytes = plain.cache.stats().hit_bytes - hits_before;
        assert_eq!(hit_bytes, (7 - from_base.len() as u64) * BLOCK as u64);
        spoil(&plain, 6, flaw);
        assert_eq!(read(&mut plain, 1, &expected).0, Status::Failed);
        assert_eq!(read(&mut plain, 1, &expected[..4]).0, Status::Success);
    }
}

#[test]
fn where_keys_cannot_be_read_everything_counts_as_dirty() {
    let mut plain = cached(options_for(Flaw::Poisoned));
    for lba in [16, 32, 48] {
        read(&mut plain, lba, &[BASE_BYTE; 8]);
    }
    write(&mut plain, 64, 1, 5);
    let id = segment_of(&plain, 16);
    assert_eq!(segment_of(&plain, 64), id);
    for lba in [16, 32, 48] {
        spoil(&plain, lba, Flaw::Poisoned);
    }
    // The second kset: the one behind it cannot be found any more.
    let keys = u64::from(KEYS_START_BYTES) + 64;
    let off = plain.cache.geometry.segment_off(id).plus(keys);
    plain.cache.pmem.poison(off);
    let statuses = [16, 32, 48].map(|lba| read(&mut plain, lba, &[BASE_BYTE]).0);
    let (ok, failed) = (Status::Success, Status::Failed);
    assert_eq!(statuses, [ok, failed, failed]);
    // And the first one again, from behind the hole.
    assert_eq!(read(&mut plain, 16, &[BASE_BYTE]).0, ok);
    plain.cache.pmem.heal(off);
    assert_eq!(read(&mut plain, 48, &[BASE_BYTE]).0, ok);
}

#[test]
fn what_has_counted_as_dirty_is_well_when_the_base_has_all() {
    let mut plain = cached(options_for(Flaw::Checksum));
    write(&mut plain, 16, 1, 1);
    read(&mut plain, 32, &[BASE_BYTE; 8]);
    assert!(plain.drain());
    // Write-back has gone through this key, and does not miss it.
    let keys = u64::from(KEYS_START_BYTES);
    let id = segment_of(&plain, 32);
    plain
        .cache
        .pmem
        .poison(plain.cache.geometry.segment_off(id).plus(keys));
    write(&mut plain, 48, 1, 2);
    assert_eq!(segment_of(&plain, 48), id);
    spoil(&plain, 32, Flaw::Checksum);
    assert_eq!(read(&mut plain, 32, &[BASE_BYTE]).0, Status::Failed);
    assert_eq!(plain.cache.info().damaged[0].lba, 32);
    assert!(plain.drain());
    assert_eq!(plain.cache.info().damaged, []);
    let (status, is_right, missed) = read(&mut plain, 32, &[BASE_BYTE]);
    assert_eq!(
        (status, is_right, missed),
        (Status::Success, true, vec![32])
    );
}

/// INV-SEG-7: write-back finds memory that is lost before any reader does.
#[test]
fn a_segment_in_which_write_back_meets_lost_memory_is_not_used_again() {
    let mut plain = cached(options_for(Flaw::Poisoned));
    write(&mut plain, 8, 1, 1);
    let id = segment_of(&plain, 8);
    spoil(&plain, 8, Flaw::Poisoned);
    assert!(!plain.drain(), "the only copy is lost");
    assert!(plain.cache.segments.get(id).is_suspect());
    write(&mut plain, 8, 1, 2);
    // The stream goes on to another segment.
    for page in 2..20 {
        write(&mut plain, page * 8, 8, 3);
    }
    assert!(plain.drain());
    (0..1000).for_each(|_| plain.poll_background());
    assert_eq!(plain.cache.info().segments_quarantined, 1);
    assert!(read(&mut plain, 8, &[2]).1);
}

/// INV-SEG-7: what lies beside lost memory may be in the same page.
#[test]
fn an_open_segment_in_which_memory_is_lost_gets_no_more() {
    let mut plain = cached(options_for(Flaw::Poisoned));
    plain.pmem().set_poisoned_store(PoisonedStore::Faults);
    write(&mut plain, 8, 1, 1);
    let id = segment_of(&plain, 8);
    // The next payload lies below it.
    let first = place_of(&plain, 8).0 - 4;
    for place in first..first + 5 {
        plain
            .pmem()
            .poison(plain.cache.geometry.place_off(Place(place)));
    }
    assert_eq!(read(&mut plain, 8, &[1]).0, Status::Failed);
    for byte in 2..5 {
        write(&mut plain, 8, 1, byte);
        assert_ne!(segment_of(&plain, 8), id);
    }
    assert!(plain.drain());
    (0..1000).for_each(|_| plain.poll_background());
    assert_eq!(plain.cache.info().segments_quarantined, 1);
}

/// All of it is lost at once, as when a file is cut off: what is clean is read from the base, and is not put where the memory
/// takes no stores. When that is known everywhere there is nothing to wait for.
#[test]
fn without_memory_reads_go_to_the_base_and_writes_fail() {
    let mut plain = cached(options_for(Flaw::Poisoned));
    plain.pmem().set_poisoned_store(PoisonedStore::Faults);
    for page in 0..4 {
        write(&mut plain, page * 8, 8, 1);
        read(&mut plain, page * 8 + 64, &[BASE_BYTE; 8]);
    }
    assert!(plain.drain());
    let geometry = plain.cache.geometry;
    let segments = geometry.segment_off(SegId(0)).0..plain.pmem().len_bytes();
    for page in segments.step_by(4096) {
        plain.pmem().poison(PmemOff(page));
    }
    for _ in 0..3 {
        for page in 0..4 {
            let (status, is_right, _) = read(&mut plain, page * 8, &[1; 8]);
            assert_eq!((status, is_right), (Status::Success, true));
            let (status, is_right, _) = read(&mut plain, page * 8 + 64, &[BASE_BYTE; 8]);
            assert_eq!((status, is_right), (Status::Success, true));
        }
        (0..100).for_each(|_| plain.poll_background());
    }
    // The first leaves the open segment, and waits until the background has seen to that.
    let buf = IovBuf::new(&[2; BLOCK], &[]);
    let statuses = [(); 2].map(|()| {
        let status = plain.run(0, Op::Write(buf.cursor(), Fua::No), 8, 1);
        (0..1000).for_each(|_| plain.poll_background());
        status
    });
    assert_eq!(statuses, [Status::Aborted, Status::Failed]);
    let info = plain.cache.info();
    assert_eq!(
        info.segments_quarantined,
        u64::from(geometry.segment_count())
    );
    assert!(!plain.cache.has_failed());
}

/// INV-SEG-7: lost memory that nobody reads any more was known, and is not after a restart.
#[test]
fn a_segment_from_before_the_start_is_looked_at_before_it_is_used_again() {
    let mut plain = cached(options_for(Flaw::Poisoned));
    write(&mut plain, 8, 1, 1);
    let (id, place) = (segment_of(&plain, 8), place_of(&plain, 8));
    let lost = plain.cache.geometry.place_off(place);
    spoil(&plain, 8, Flaw::Poisoned);
    assert!(!plain.drain(), "the only copy is lost");
    write(&mut plain, 8, 1, 2);
    assert_ne!(segment_of(&plain, 8), id);
    let image = SimPmem::from_image(plain.pmem().durable_image());
    image.poison(lost);
    image.set_poisoned_store(PoisonedStore::Faults);
    let base = plain.base.clone();
    let options = options_for(Flaw::Poisoned);
    let mut plain = Plain::new(image, base, options, BackgroundRuns::Always)
        .expect("what is lost was overwritten");
    assert_eq!(plain.cache.segments.get(id).state(), SegmentState::Sealed);
    let gc_percent = SettingChange::of(Setting::GcPercent, 0);
    plain.cache.change_settings(&gc_percent).unwrap();
    // Several times around.
    for number in 0..100 {
        write(&mut plain, number % 8 * 8, 8, 3);
    }
    assert!(plain.drain());
    (0..1000).for_each(|_| plain.poll_background());
    assert_eq!(plain.cache.info().segments_quarantined, 1);
    assert_eq!(
        plain.cache.segments.get(id).state(),
        SegmentState::Quarantined
    );
}

/// A block of which the page has others: what is asked for is not rounded out.
fn block(number: u64) -> u64 {
    number / 2 % 512 * 8 + number / 1024 * 2 + number % 2
}

/// A cache with a large segment in use, and a kset in it for each of so many blocks: written, and brought, in turn.
fn many(count: u64) -> Plain<SimPmem> {
    let mut plain = cached(large_options());
    for number in 0..count {
        if number % 2 == 0 {
            write(&mut plain, block(number), 1, 1);
        } else {
            read(&mut plain, block(number), &[BASE_BYTE]);
        }
    }
    plain
}

/// Submits a read of a block, which is not polled yet.
fn submit(channel: &mut Channel<SimPmem>, token: u64, lba: u64) -> IovBuf {
    submit_blocks(channel, token, lba, 1)
}

fn submit_blocks(channel: &mut Channel<SimPmem>, token: u64, lba: u64, len_blocks: u64) -> IovBuf {
    let buf = IovBuf::zeroed(len_blocks as usize * BLOCK);
    let io = HostIo {
        token: IoToken(token),
        op: Op::Read(buf.cursor()),
        lba: Lba(lba),
        len_blocks,
    };
    channel.submit(io).expect("there is room");
    buf
}

/// Polls once; the base answers with its byte. How the requests ended that this has completed.
fn poll_once(channel: &mut Channel<SimPmem>, out: &mut Outbox) -> Vec<(u64, Status)> {
    out.clear();
    channel.poll(Now(0), out);
    for request in std::mem::take(&mut out.base) {
        if let BaseKind::Read(mut cursor) = request.kind {
            cursor.write_from(&vec![BASE_BYTE; request.len_blocks as usize * BLOCK]);
        }
        channel.on_base_done(request.op, Ok(()));
    }
    let completions = out.completions.iter();
    completions.map(|end| (end.token.0, end.status)).collect()
}

/// Polls until nothing is left. For each request: the poll that completed it, and how.
fn poll_all(channel: &mut Channel<SimPmem>) -> Vec<(u64, usize, Status)> {
    let (mut ends, mut out) = (Vec::new(), Outbox::new());
    for poll in 0..10_000 {
        if channel.outstanding() == 0 {
            return ends;
        }
        let ended = poll_once(channel, &mut out).into_iter();
        ends.extend(ended.map(|(token, status)| (token, poll, status)));
    }
    panic!("a read gets nowhere: {ends:?}");
}

#[test]
fn a_search_for_a_key_is_spread_over_polls_and_holds_nobody_up() {
    const COUNT: u64 = 1600;
    let plain = many(COUNT);
    let segments = [0, 1, COUNT - 1].map(|number| segment_of(&plain, block(number)));
    assert_eq!(segments, [segments[0]; 3]);
    let mut channel = plain.cache.channel().expect("there are few");
    // The last key, read when the first ones are looked at; a hit; the same again; one that is next to it.
    for number in [COUNT - 1, COUNT - 3] {
        spoil(&plain, block(number), Flaw::Poisoned);
    }
    let bufs = [COUNT - 1, 0, COUNT - 1, COUNT - 3].map(block);
    let bufs: Vec<IovBuf> = (0..)
        .zip(bufs)
        .map(|(token, lba)| submit(&mut channel, token, lba))
        .collect();
    let mut ends = poll_all(&mut channel);
    ends.sort_unstable_by_key(|end| end.0);
    assert!(ends.iter().all(|end| end.2 == Status::Success), "{ends:?}");
    let bytes: Vec<u8> = bufs.iter().map(|buf| buf.bytes()[0]).collect();
    assert_eq!(bytes, [BASE_BYTE, 1, BASE_BYTE, BASE_BYTE]);
    let polls: Vec<usize> = ends.iter().map(|end| end.1).collect();
    // 1600 ksets of a line are 100 KiB.
    assert!((6..12).contains(&polls[0]), "{polls:?}");
    assert_eq!(polls[1], 0, "a hit waits");
    assert!(polls[2] <= polls[0] + 4, "{polls:?}");
    // It lies before the last one: once around.
    assert!(
        (polls[2] + 6..polls[2] + 14).contains(&polls[3]),
        "{polls:?}"
    );
}

#[test]
fn a_damaged_segment_is_read_through_without_going_through_it_for_each_block() {
    const COUNT: u64 = 1200;
    let mut plain = many(COUNT);
    (0..COUNT).for_each(|number| spoil(&plain, block(number), Flaw::Poisoned));
    let mut channel = plain.cache.channel().expect("there are few");
    let mut polls = 0;
    for number in 0..COUNT {
        let buf = submit(&mut channel, number, block(number));
        let ends = poll_all(&mut channel);
        let expected = if number % 2 == 0 {
            Status::Failed
        } else {
            Status::Success
        };
        assert_eq!(ends[0].2, expected, "{number}");
        assert!(expected == Status::Failed || buf.bytes()[0] == BASE_BYTE);
        polls += ends[0].1 + 1;
    }
    assert!(polls < 4 * COUNT as usize, "{polls} polls");
    assert_eq!(plain.cache.stats().poisoned_reads, COUNT);
    let told = plain.cache.info().damaged;
    let told_blocks: u64 = told.iter().map(|range| range.len_blocks).sum();
    assert_eq!(told_blocks, COUNT / 2, "what was written, and nothing else");
    // What is lost is well again when it is overwritten.
    write(&mut plain, block(0), 1, 9);
    let expected = (Status::Success, true, vec![]);
    assert_eq!(read(&mut plain, block(0), &[9]), expected);
}

#[test]
fn nobody_waits_for_a_search_that_is_not_wanted_any_more() {
    const COUNT: u64 = 1600;
    for is_aborted in [false, true] {
        let mut plain = many(COUNT);
        for number in [COUNT - 1, COUNT - 3] {
            spoil(&plain, block(number), Flaw::Poisoned);
        }
        let mut channel = plain.cache.channel().expect("there are few");
        let mut out = Outbox::new();
        let first = submit(&mut channel, 1, block(COUNT - 1));
        for _ in 0..2 {
            channel.poll(Now(0), &mut out);
        }
        assert_eq!(out.completions.len(), 0);
        if is_aborted {
            assert!(channel.abort(IoToken(1)));
        } else {
            write(&mut plain, block(COUNT - 1), 1, 7);
        }
        let second = submit(&mut channel, 2, block(COUNT - 3));
        let ends = poll_all(&mut channel);
        let expected = if is_aborted {
            (1, 0, Status::Aborted)
        } else {
            (1, 0, Status::Success)
        };
        assert_eq!(ends[0], expected);
        assert_eq!(first.bytes()[0], if is_aborted { 0 } else { 7 });
        let (token, poll, status) = ends[1];
        assert_eq!((token, status), (2, Status::Success));
        assert!(poll < 14, "{ends:?}");
        assert_eq!(second.bytes()[0], BASE_BYTE);
    }
}

/// Each look at lost memory is an exception.
#[test]
fn reads_that_wait_for_a_key_do_not_look_at_lost_memory_again() {
    const COUNT: u64 = 1600;
    const READS: u64 = 32;
    let plain = many(COUNT);
    let lbas: Vec<u64> = (0..READS)
        .map(|read| block(COUNT - 1 - read * 40))
        .collect();
    lbas.iter()
        .for_each(|lba| spoil(&plain, *lba, Flaw::Poisoned));
    let mut channel = plain.cache.channel().expect("there are few");
    let bufs: Vec<IovBuf> = (0..)
        .zip(&lbas)
        .map(|(token, lba)| submit(&mut channel, token, *lba))
        .collect();
    let before = plain.pmem().counters().failed_loads;
    let ends = poll_all(&mut channel);
    assert_eq!(ends.len() as u64, READS);
    assert!(bufs.iter().all(|buf| buf.bytes()[0] == BASE_BYTE));
    // When it is asked, when it has an answer, and when it gets its turn; each time of the run and of the block.
    let failed_loads = plain.pmem().counters().failed_loads - before;
    assert!(
        (READS * 2..=READS * 6).contains(&failed_loads),
        "{failed_loads}"
    );
}

/// The page at which the next read begins is looked up while one is worked on. If that read has to wait, its turn is
/// another's.
#[test]
fn what_was_looked_up_for_a_read_that_waits_is_nobody_elses() {
    // INV-READ-9.
    let [brought, lost, well] = [3600, 3680, 3760];
    let mut plain = many(800);
    read(&mut plain, brought, &[BASE_BYTE; 16]);
    write(&mut plain, lost, 8, 2);
    write(&mut plain, well, 8, 3);
    for lba in [brought + 2, brought + 10, lost + 4] {
        spoil(&plain, lba, Flaw::Poisoned);
    }
    let mut channel = plain.cache.channel().expect("there are few");
    // The first asks for two keys, one after the other. Meanwhile the second waits for its turn.
    let _first = submit_blocks(&mut channel, 1, brought, 16);
    let _second = submit_blocks(&mut channel, 2, lost, 8);
    let (mut out, mut ended, mut polls) = (Outbox::new(), 0, 0);
    while ended < 2 {
        let buf = submit_blocks(&mut channel, 3, well, 4);
        for (token, status) in poll_once(&mut channel, &mut out) {
            ended += u64::from(token < 3);
            if token == 3 {
                assert_eq!(
                    (status, buf.bytes()[0]),
                    (Status::Success, 3),
                    "poll {polls}"
                );
            }
        }
        polls += 1;
    }
    assert!(polls > 6, "the first two were not kept apart by a search");
}

/// It fails anyway.
#[test]
fn a_read_that_has_failed_does_not_look_for_more_keys() {
    const COUNT: u64 = 1600;
    let polls_of = |len_blocks: u64| {
        let mut plain = cached(large_options());
        for number in 0..COUNT {
            write(&mut plain, number, 1, 1);
        }
        let first = COUNT - len_blocks;
        (first..COUNT).for_each(|lba| spoil(&plain, lba, Flaw::Poisoned));
        // None of their keys is found.
        let keys = u64::from(KEYS_START_BYTES) + 800 * 64;
        let id = segment_of(&plain, first);
        let off = plain.cache.geometry.segment_off(id).plus(keys);
        plain.cache.pmem.poison(off);
        let mut channel = plain.cache.channel().expect("there are few");
        let _buf = submit_blocks(&mut channel, 1, first, len_blocks);
        let ends = poll_all(&mut channel);
        assert_eq!(ends[0].2, Status::Failed);
        ends[0].1
    };
    let one = polls_of(1);
    assert!(one > 2, "{one}");
    assert!(polls_of(64) <= one + 2);
}
