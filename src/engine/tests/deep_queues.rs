//! Deep queues: requests of one kind keep none of another from its turn, and a poll stays short.

use super::*;
use crate::pmem::{IovBuf, PAD_PAGE_SIZE_BYTES, PadMemory};
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::units::{Lba, Now};

/// Everything else than the crowd.
const OTHERS: u64 = 1 << 32;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const BASE_BYTES: u64 = 8 * MIB;

fn roomy(mode: CacheMode) -> Plain<SimPmem> {
    let options = OpenOptions {
        base: BaseIdentity {
            block_count: BASE_BYTES / PAGE,
            ..options(4096, None).base
        },
        segment_size_bytes: Some(4 << 20),
        settings: SettingChange::of(Setting::CacheMode, mode as u32),
        ..options(4096, None)
    };
    let pmem = SimPmem::new(12 * (4 << 20) + (64 << 10));
    let base = vec![3; BASE_BYTES as usize];
    Plain::new(pmem, base, options, BackgroundRuns::Always).unwrap()
}

/// Many requests of one kind, each of which is submitted again as soon as it has ended.
struct Crowd {
    plain: Plain<SimPmem>,
    op: Op,
    buf: IovBuf,
    out: Outbox,
}

impl Crowd {
    fn new(op: impl FnOnce(&IovBuf) -> Op, count: u64) -> Self {
        let mut plain = roomy(CacheMode::Writeback);
        let buf = IovBuf::new(&[7; PAGE as usize], &[]);
        for lba in 0..8 {
            let write = Op::Write(buf.cursor(), Fua::No);
            assert_eq!(plain.run(0, write, lba, 1), Status::Success);
        }
        let mut crowd = Self {
            op: op(&buf),
            plain,
            buf,
            out: Outbox::new(),
        };
        (0..count).for_each(|token| crowd.submit_one(token));
        crowd
    }

    fn submit(&mut self, token: u64, op: Op, lba: u64) {
        let io = HostIo {
            token: IoToken(token),
            op,
            lba: Lba(lba),
            len_blocks: 1,
        };
        self.plain.channel_mut(0).submit(io).unwrap();
    }

    fn submit_one(&mut self, token: u64) {
        self.submit(token, self.op, token % 8);
    }

    /// A poll of the channel, in which all of the crowd that end come back. Returns which others have ended.
    fn turn(&mut self) -> Vec<u64> {
        let mut out = std::mem::take(&mut self.out);
        out.clear();
        self.plain.channel_mut(0).poll(Now(1), &mut out);
        assert_eq!(out.base.len(), 0, "everything is cached");
        let mut others = Vec::new();
        for done in &out.completions {
            if let Status::Lent(loan) = done.status {
                self.plain.channel_mut(0).give_back(loan);
            } else {
                assert_eq!(done.status, Status::Success);
            }
            if done.token.0 < OTHERS {
                self.submit_one(done.token.0);
            } else {
                others.push(done.token.0 - OTHERS);
            }
        }
        self.out = out;
        (0..100).for_each(|_| self.plain.poll_background());
        others
    }
}

/// One of each kind, behind a crowd that is there always.
fn each_kind_has_its_turn(mut crowd: Crowd) {
    (0..3).for_each(|_| assert!(crowd.turn().is_empty()));
    let others = [
        Op::Flush,
        Op::Lend,
        Op::Read(crowd.buf.cursor()),
        Op::Write(crowd.buf.cursor(), Fua::No),
        // It is the last: its blocks are not lent any more.
        Op::WriteZeroes,
    ];
    for (number, op) in (0..).zip(others) {
        let epoch = crowd.plain.cache.info().epoch;
        crowd.submit(OTHERS + number, op, 3);
        let mut ended = Vec::new();
        let mut turns = 0;
        while ended.is_empty() {
            assert!(turns < 4, "{op:?} waits behind others");
            ended = crowd.turn();
            turns += 1;
        }
        assert_eq!(ended, [number]);
        let flushes = u64::from(matches!(op, Op::Flush));
        assert_eq!(
            crowd.plain.cache.info().epoch,
            epoch + flushes,
            "a flush closes one epoch, when it ends"
        );
    }
}

#[test]
fn a_crowd_of_hits_keeps_no_other_request_from_its_turn() {
    each_kind_has_its_turn(Crowd::new(|buf| Op::Read(buf.cursor()), 1024));
}

#[test]
fn a_crowd_of_writes_keeps_no_other_request_from_its_turn() {
    each_kind_has_its_turn(Crowd::new(|buf| Op::Write(buf.cursor(), Fua::No), 600));
}

#[test]
fn a_crowd_of_lends_keeps_no_other_request_from_its_turn() {
    each_kind_has_its_turn(Crowd::new(|_| Op::Lend, 1024));
}

/// What the first poll has done of so many requests of `len_bytes` each.
struct FirstPoll {
    stats: Stats,
    completed: u64,
}

fn first_poll(plain: &mut Plain<SimPmem>, op: Op, count: u64, len_bytes: u64) -> FirstPoll {
    for token in 0..count {
        let io = HostIo {
            token: IoToken(token),
            op,
            lba: Lba(0),
            len_blocks: len_bytes / PAGE,
        };
        plain.channel_mut(0).submit(io).unwrap();
    }
    plain.cache.reset_stats();
    let mut out = Outbox::new();
    plain.channel_mut(0).poll(Now(1), &mut out);
    FirstPoll {
        stats: plain.cache.stats(),
        completed: out.completions.len() as u64,
    }
}

#[test]
fn a_poll_stores_little_more_than_a_batch_whatever_completes() {
    let buf = IovBuf::zeroed(MIB as usize);
    let write = Op::Write(buf.cursor(), Fua::No);
    for mode in [CacheMode::Writeback, CacheMode::Writethrough] {
        let first = |op, count, len_bytes| {
            let mut plain = roomy(mode);
            let first = first_poll(&mut plain, op, count, len_bytes);
            assert_eq!(first.completed > 0, mode == CacheMode::Writeback);
            first.stats
        };
        for (count, len_bytes) in [(4000, PAGE), (128, 128 << 10), (20, MIB)] {
            let bytes = first(write, count, len_bytes).logged_bytes;
            assert!(
                (MIB..4 * MIB).contains(&bytes),
                "{bytes} bytes of writes of {len_bytes}, {mode:?}"
            );
        }
        // Pages, although nothing is stored of them.
        let clear_bytes = roomy(mode).cache.unmap_size_max_bytes();
        for op in [Op::Unmap, Op::WriteZeroes] {
            let pages =
                first(op, 1024 * MIB / clear_bytes, clear_bytes).keys * (clear_bytes / PAGE);
            assert!(
                (1024..=4096).contains(&pages),
                "{pages} pages, {op:?}, {mode:?}"
            );
        }
    }
}

#[test]
fn a_poll_copies_some_mib_of_hits() {
    let buf = IovBuf::zeroed(MIB as usize);
    let mut plain = roomy(CacheMode::Writeback);
    let write = Op::Write(buf.cursor(), Fua::No);
    let blocks = MIB / PAGE;
    assert_eq!(plain.run(0, write, 0, blocks), Status::Success);
    let first = first_poll(&mut plain, Op::Read(buf.cursor()), 100, MIB);
    assert!((1..=5).contains(&first.completed), "{}", first.completed);
    assert_eq!(first.stats.hit_bytes, first.completed * MIB);

    let mut plain = roomy(CacheMode::Writeback);
    assert_eq!(plain.run(0, write, 0, blocks), Status::Success);
    let first = first_poll(&mut plain, Op::Lend, 100, MIB);
    assert!((1..=5).contains(&first.completed), "{}", first.completed);
}

/// They wait for the next poll; they are not given up.
#[test]
fn a_poll_puts_some_mib_of_what_the_base_has_brought_into_the_cache() {
    const LEN_BYTES: u64 = 64 << 10;
    let plain = roomy(CacheMode::Writeback);
    let pads = PadMemory::from_heap(BASE_BYTES as usize / PAD_PAGE_SIZE_BYTES);
    let mut channel = plain.cache.channel_with(Some(pads)).unwrap();
    let buf = IovBuf::zeroed(LEN_BYTES as usize);
    let count = BASE_BYTES / LEN_BYTES;
    for number in 0..count {
        let io = HostIo {
            token: IoToken(number),
            op: Op::Read(buf.cursor()),
            // From the end on: they make no sequence.
            lba: Lba((count - 1 - number) * LEN_BYTES / PAGE),
            len_blocks: LEN_BYTES / PAGE,
        };
        channel.submit(io).unwrap();
    }
    let mut out = Outbox::new();
    for _ in 0..4 {
        channel.poll(Now(1), &mut out);
    }
    assert_eq!(out.base.len() as u64, count);
    for request in &out.base {
        channel.on_base_done(request.op, Ok(()));
    }
    let mut filled = 0;
    for poll in 2..20 {
        out.clear();
        channel.poll(Now(poll), &mut out);
        let bytes = plain.cache.stats().fill_bytes - filled;
        assert!(bytes <= 2 * MIB + LEN_BYTES, "{bytes} bytes in one poll");
        assert_eq!(out.completions.len() as u64, bytes / LEN_BYTES);
        filled += bytes;
    }
    assert_eq!(filled, BASE_BYTES);
    assert_eq!(plain.cache.stats().fills_dropped, 0);
}

#[test]
fn an_outbox_has_room_for_all_that_can_complete() {
    let mut crowd = Crowd::new(|buf| Op::Read(buf.cursor()), 4096);
    let before = crowd.out.completions.capacity();
    crowd.plain.cache.poison("for a test");
    let mut out = Outbox::new();
    crowd.plain.channel_mut(0).poll(Now(1), &mut out);
    assert_eq!(out.completions.len(), 4096);
    assert_eq!(out.completions.capacity(), before);
}
