use super::*;
use crate::engine::invariant_tests::new_cache_of;
use crate::engine::{Fua, HostIo, IoToken, Op, Outbox, Status};
use crate::media::KEYS_START_BYTES;
use crate::pmem::IovBuf;
use crate::sim::machine::Setup;
use crate::sim::pmem::SimPmem;
use crate::units::Now;
use crate::writeback::overlay::Sorter;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const SEGMENTS: u64 = 100;

/// A cache whose log goes through many segments.
fn long_log() -> Arc<Cache<SimPmem>> {
    let cache = new_cache_of(&Setup {
        segment_count: SEGMENTS,
        ..Setup::default()
    });
    write(&cache, |cache| cache.segments.free_count() > 2, 8);
    cache
}

fn write(cache: &Arc<Cache<SimPmem>>, more: impl Fn(&Cache<SimPmem>) -> bool, len_blocks: u64) {
    let mut channel = cache.channel().expect("the first");
    let (buf, mut out) = (IovBuf::new(&[7; 4096], &[]), Outbox::new());
    while more(cache) {
        let io = HostIo {
            token: IoToken(1),
            op: Op::Write(buf.cursor(), Fua::No),
            lba: Lba(8),
            len_blocks,
        };
        channel.submit(io).expect("the table is empty");
        out.clear();
        channel.poll(Now(0), &mut out);
        assert_eq!(out.completions[0].status, Status::Success);
    }
}

/// Looks for what is there. Returns in how many calls.
fn look(log: &mut LogReader, cache: &Cache<SimPmem>) -> usize {
    for call in 1..10_000 {
        let settled = log.look(cache).expect("all can be read");
        // Until all is known there may be something.
        assert_eq!(log.has_below(Seq(1)), settled.is_none());
        if let Some(settled) = settled {
            assert_eq!(settled, cache.seq_settled());
            return call;
        }
    }
    panic!("a look does not end");
}

/// What is taken of the log.
struct Taking {
    log: LogReader,
    limits: Limits,
    taken: Taken,
    overlay: Overlay,
    lost: Lost,
}

impl Taking {
    fn new(cache: &Cache<SimPmem>) -> Self {
        let mut log = LogReader::new(cache.segments.count()).unwrap();
        look(&mut log, cache);
        Self {
            log,
            limits: Limits {
                settled: cache.seq_settled(),
                load: Load {
                    data_bytes: u64::MAX,
                    cleared_bytes: u64::MAX,
                },
                key_count: usize::MAX,
                room: usize::MAX,
                ..Limits::NONE
            },
            taken: Taken::NOTHING,
            overlay: Overlay::new(10_000).unwrap(),
            lost: Lost::default(),
        }
    }

    fn gather(&mut self, cache: &Cache<SimPmem>) -> Result<Gathered, KeysLost> {
        let batch = Gathering {
            limits: &self.limits,
            taken: &mut self.taken,
            overlay: &mut self.overlay,
            lost: &mut self.lost,
        };
        self.log.gather(cache, cache.background_counters(), batch)
    }

    /// Keys that there is memory for.
    fn capacity(&self) -> usize {
        let at_hand = self.log.next.iter().flatten().map(|next| &next.keys);
        let vectors = at_hand.chain(&self.log.spare).chain([&self.log.looked_at]);
        vectors.map(Vec::capacity).sum()
    }
}

#[test]
fn the_log_is_read_into_memory_that_is_there_from_the_start() {
    let cache = long_log();
    let mut taking = Taking::new(&cache);
    assert_eq!(taking.log.ready.len() as u64, SEGMENTS - 2);
    let capacity = taking.capacity();
    assert!(capacity >= (AT_HAND_MAX + 2) * KSET_KEYS_MAX);
    while taking.gather(&cache).expect("all can be read") == Gathered::InPart {
        assert_eq!(taking.capacity(), capacity);
    }
    assert_eq!(taking.capacity(), capacity);
    assert_eq!(taking.taken.last_seq, Some(Seq(cache.seq_next().0 - 1)));
}

#[test]
fn a_look_at_a_long_log_goes_on_over_many_polls() {
    let cache = long_log();
    let mut log = LogReader::new(cache.segments.count()).unwrap();
    let count = SEGMENTS as usize - 2;
    // For each: it is heard of, it is looked at, and one key.
    let calls = look(&mut log, &cache);
    let least = count * 3 / (LOOKED_AT_PER_POLL + 1);
    assert!((least..=count).contains(&calls), "{calls} calls");
    assert_eq!(log.ready.len(), count);
    assert_eq!(look(&mut log, &cache), 1, "nothing has come");
}

#[test]
fn what_the_tail_has_passed_is_left_behind_over_many_polls() {
    // One segment with many ksets.
    let cache = new_cache_of(&Setup {
        segment_size_bytes: 256 << 10,
        ..Setup::default()
    });
    write(&cache, |_| cache.seq_next() < Seq(200), 1);
    let mut log = LogReader::new(cache.segments.count()).unwrap();
    look(&mut log, &cache);
    let tail = Seq(cache.seq_next().0 - 2);
    cache.dirty_tail.store(tail.0, Ordering::Release);
    log.restart();
    let calls = look(&mut log, &cache);
    let least = tail.0 as usize / LOOKED_AT_PER_POLL;
    assert!(calls >= least, "{calls} calls instead of {least}");
    assert_eq!(log.ready.len(), 1);
    assert!(log.has_below(cache.seq_next()) && !log.has_below(Seq(tail.0 + 1)));
}

/// How many segments are looked at in a poll, and whether everything is found that comes meanwhile.
#[test]
fn a_restart_goes_on_over_many_polls_while_segments_are_opened() {
    let cache = new_cache_of(&Setup {
        segment_count: SEGMENTS,
        ..Setup::default()
    });
    write(&cache, |cache| cache.segments.free_count() > 50, 1);
    let mut taking = Taking::new(&cache);
    taking.limits.settled = Seq(10);
    assert_eq!(taking.gather(&cache).unwrap(), Gathered::Dry);
    assert!(
        taking.log.next.iter().any(Option::is_some),
        "one is at hand"
    );
    // The reader has not heard of these.
    write(&cache, |cache| cache.segments.free_count() > 40, 1);
    taking.log.restart();
    assert!(taking.log.has_below(Seq(1)), "there may be something");
    let mut seen = 0;
    while let Some(SegId(next)) = taking.log.restarts_at {
        assert_eq!(next as usize, seen);
        seen += LOOKED_AT_PER_POLL;
        assert_eq!(taking.log.look(&cache).unwrap(), None);
        let free = cache.segments.free_count();
        write(
            &cache,
            |cache| cache.segments.free_count() + 1 > free.max(10),
            1,
        );
    }
    assert!((SEGMENTS as usize..SEGMENTS as usize + LOOKED_AT_PER_POLL).contains(&seen));
    assert!(taking.log.next.iter().all(Option::is_none));
    while taking.log.look(&cache).unwrap() != Some(cache.seq_settled()) {}
    taking = Taking {
        taken: Taken::NOTHING,
        limits: Limits {
            settled: cache.seq_settled(),
            ..taking.limits
        },
        ..taking
    };
    let before = taking.overlay.key_count();
    while taking.gather(&cache).expect("all can be read") == Gathered::InPart {}
    // A key each, from the first one on.
    let taken = taking.taken;
    assert_eq!(
        (taken.first_seq, taken.last_seq),
        (Some(Seq(1)), Some(Seq(cache.seq_next().0 - 1)))
    );
    let count = taking.overlay.key_count() - before;
    assert_eq!(count as u64, cache.seq_next().0 - 1);
}

/// INV-WB-1: most segments are ready long before it is their turn.
#[test]
fn a_kset_that_is_lost_before_its_turn_counts_as_lost() {
    let cache = long_log();
    let mut taking = Taking::new(&cache);
    let hit = SegId(50);
    let keys = cache.geometry.segment_off(hit);
    let keys = keys.plus(u64::from(KEYS_START_BYTES));
    cache.pmem.flip_bit(keys, 3);
    let lost = loop {
        match taking.gather(&cache) {
            Ok(gathered) => assert_eq!(gathered, Gathered::InPart),
            Err(KeysLost(id)) => break id,
        }
    };
    assert_eq!(lost, hit);
}

/// A stream says so after it has opened a segment. A reader that begins in between has seen it open.
#[test]
fn a_segment_that_is_told_after_it_was_seen_open_is_ready_once() {
    let cache = new_cache_of(&Setup::default());
    write(&cache, |cache| cache.seq_next() < Seq(2), 1);
    let id = cache.segments.next_opened().expect("there is one");
    assert_eq!(cache.segments.next_opened(), None);
    let mut taking = Taking::new(&cache);
    taking.log.restart();
    look(&mut taking.log, &cache);
    assert_eq!(taking.log.ready.len(), 1);
    cache.segments.tell_opened(id);
    look(&mut taking.log, &cache);
    assert_eq!(taking.log.ready.len(), 1);
    while taking.gather(&cache).expect("no key is lost") == Gathered::InPart {}
    assert_eq!(taking.taken.last_seq, Some(Seq(1)));
}

#[test]
fn what_must_go_on_takes_no_more_room() {
    const ROOM: usize = 20;
    let cache = new_cache_of(&Setup {
        segment_count: SEGMENTS,
        block_count: 8 << 10,
        ..Setup::default()
    });
    let mut channel = cache.channel().expect("the first");
    let (buf, mut out) = (IovBuf::new(&[7; 4096], &[]), Outbox::new());
    let mut count = 0;
    while cache.segments.free_count() > 2 {
        let io = HostIo {
            token: IoToken(1),
            op: Op::Write(buf.cursor(), Fua::No),
            // No two of them are neighbours.
            lba: Lba(count * 17 % 512 * 16),
            len_blocks: 8,
        };
        channel.submit(io).expect("the table is empty");
        out.clear();
        channel.poll(Now(0), &mut out);
        count += 1;
    }
    assert!(count as usize > 4 * ROOM, "{count} writes");
    let mut taking = Taking::new(&cache);
    taking.overlay = Overlay::new(ROOM + 1).unwrap();
    let mut sorter = Sorter::new(ROOM + 1).unwrap();
    (taking.limits.reach, taking.limits.room) = (Seq(u64::MAX), ROOM);
    let (mut parts, mut from, mut pieces) = (0, Lba(0), 0);
    loop {
        loop {
            match taking.gather(&cache).expect("all can be read") {
                Gathered::Crowded => while !taking.overlay.narrow(&mut sorter, 10, ROOM / 2) {},
                Gathered::InPart => {}
                Gathered::Dry => break,
                Gathered::Full => panic!("it has to go on"),
            }
            // It has room for one kset more, which has one key.
            assert!(taking.overlay.key_count() <= ROOM);
        }
        assert_eq!(taking.taken.last_seq, Some(Seq(cache.seq_next().0 - 1)));
        while !taking.overlay.sort(&mut sorter, 10) {}
        pieces += taking.overlay.key_count();
        parts += 1;
        let Some(next) = taking.overlay.next_part() else {
            break;
        };
        assert!(next > from);
        from = next;
        taking.overlay.clear();
        taking.overlay.begin_at(from);
        taking.taken = Taken::NOTHING;
        taking.log.restart();
        look(&mut taking.log, &cache);
    }
    assert_eq!(pieces as u64, count.min(512), "each is in one part");
    assert!(parts >= pieces / ROOM, "{parts} parts");
}

/// A core that has read which number comes next, and is slow to say so, says that it may draw an old one.
#[test]
fn what_has_settled_stays_settled() {
    let cache = long_log();
    let mut log = LogReader::new(cache.segments.count()).unwrap();
    look(&mut log, &cache);
    let settled = cache.seq_settled();
    cache.stream_floors[0].store(settled.0 - 5, Ordering::Relaxed);
    assert_eq!(cache.seq_settled(), Seq(settled.0 - 5));
    log.restart();
    let again = (0..10_000).find_map(|_| log.look(&cache).expect("all can be read"));
    assert_eq!(again, Some(settled));
}
