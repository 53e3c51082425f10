//! Lent reads: nothing is reclaimed or changed under a loan, and every loan ends.

use super::*;
use crate::pmem::{IovBuf, MemSlice};
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::units::{Lba, Now};
use std::sync::Arc;

/// A cache of which requests may end otherwise than well.
struct LendRig {
    plain: Plain<SimPmem>,
    block_size: usize,
}

fn rig() -> LendRig {
    LendRig::new(4096)
}

fn bytes_of(slice: MemSlice) -> Vec<u8> {
    let mut bytes = vec![0; slice.len_bytes()];
    slice.copy_to(&mut bytes).unwrap();
    bytes
}

impl LendRig {
    fn new(block_size: u32) -> Self {
        let pmem = SimPmem::new(DEVICE_SIZE_BYTES);
        let base = vec![0; BLOCKS as usize * block_size as usize];
        let options = options(block_size, None);
        Self {
            plain: Plain::new(pmem, base, options, BackgroundRuns::Always).unwrap(),
            block_size: block_size as usize,
        }
    }

    fn cache(&self) -> &Arc<Cache<SimPmem>> {
        &self.plain.cache
    }

    fn channel(&mut self) -> &mut Channel<SimPmem> {
        self.plain.channel_mut(0)
    }

    fn run(&mut self, op: Op, lba: u64, len_blocks: u64) -> Status {
        self.plain.run(0, op, lba, len_blocks)
    }

    fn write(&mut self, lba: u64, bytes: &[u8]) {
        let buf = IovBuf::new(bytes, &[]);
        let len_blocks = (bytes.len() / self.block_size) as u64;
        let status = self.run(Op::Write(buf.cursor(), Fua::No), lba, len_blocks);
        assert_eq!(status, Status::Success);
        self.plain.poll_background();
    }

    /// Writes four pages, however many turns that takes within reason, and calls `meanwhile` with each.
    fn write_in_turns(&mut self, lba: u64, byte: u8, mut meanwhile: impl FnMut()) {
        let buf = IovBuf::new(&[byte; 4 * 4096], &[]);
        let io = HostIo {
            token: IoToken(1),
            op: Op::Write(buf.cursor(), Fua::No),
            lba: Lba(lba),
            len_blocks: 4,
        };
        self.channel().submit(io).unwrap();
        let mut turns = 0;
        while self.step() != Some(Status::Success) {
            turns += 1;
            assert!(turns < 1000, "no room: {:?}", self.cache().info());
            meanwhile();
        }
    }

    fn read(&mut self, lba: u64, len_blocks: u64) -> Vec<u8> {
        let (status, bytes) = self.plain.read(0, lba, len_blocks);
        assert_eq!(status, Status::Success);
        bytes
    }

    fn drain(&mut self) {
        assert!(self.plain.drain());
    }

    /// A turn for the channel and for the background.
    fn step(&mut self) -> Option<Status> {
        let status = self.plain.poll_channel(0);
        self.plain.poll_background();
        status
    }

    fn lend(&mut self, lba: u64, len_blocks: u64) -> Option<LoanId> {
        match self.run(Op::Lend, lba, len_blocks) {
            Status::Lent(id) => Some(id),
            Status::NotLent => None,
            status => panic!("a lent read ends as {status:?}"),
        }
    }

    fn lent(&self, id: LoanId) -> MemSlice {
        self.plain.channel(0).loan(id).unwrap()
    }

    fn reclaimed(&self) -> u64 {
        self.cache().stats().segments_reclaimed
    }

    /// Writes to other blocks until everything that can be reclaimed has been, several times over.
    fn churn(&mut self) {
        let before = self.reclaimed();
        for round in 0..400u64 {
            self.write(8 + round % 400, &[round as u8; 4 * 4096]);
        }
        self.drain();
        (0..100).for_each(|_| assert_eq!(self.step(), None));
        assert!(self.reclaimed() > before + 24);
    }
}

#[test]
fn a_lent_segment_stays_while_everything_else_is_reclaimed() {
    // INV-PIN-1.
    let mut rig = rig();
    rig.write(0, &[0x11; 4 * 4096]);
    let id = rig.lend(1, 2).unwrap();
    let lent = rig.lent(id);
    assert_eq!(bytes_of(lent), [0x11; 2 * 4096]);

    rig.churn();
    assert_eq!(bytes_of(lent), [0x11; 2 * 4096]);
    // Its blocks were never overwritten, and it is the oldest segment by far: only the loan has kept it.
    assert!(rig.cache().has_loans());
    rig.channel().give_back(id);
    assert!(!rig.cache().has_loans());
    rig.churn();
    assert_ne!(
        bytes_of(lent),
        [0x11; 2 * 4096],
        "the segment is used again"
    );
    assert_eq!(rig.read(0, 4), [0x11; 4 * 4096]);
}

#[test]
fn a_segment_that_is_lent_after_it_was_chosen_holds_up_no_other() {
    let mut rig = rig();
    rig.write(0, &[0x11; 4 * 4096]);
    let segment = rig
        .cache()
        .segments
        .ids()
        .find(|id| rig.cache().segments.get(*id).state() == super::super::SegmentState::Open)
        .unwrap();
    // Whoever was inside the grace period when the segment left the index pins it only then.
    let cache = Arc::clone(rig.cache());
    let who = usize::from(super::super::CHANNEL_COUNT_MAX) - 1;
    cache.grace.enter(who);
    for round in 0..80u64 {
        rig.write(8 + round % 400, &[round as u8; 4 * 4096]);
        if cache.segments.get(segment).state() == super::super::SegmentState::Reclaiming {
            break;
        }
    }
    (0..100).for_each(|_| assert_eq!(rig.step(), None));
    let state = cache.segments.get(segment).state();
    assert_eq!(state, super::super::SegmentState::Reclaiming);
    cache.segments.get(segment).pin();
    cache.grace.leave(who);

    rig.churn();
    let generation = cache.segments.get(segment).generation();
    let state = cache.segments.get(segment).state();
    assert_eq!(state, super::super::SegmentState::Reclaiming);
    cache.segments.get(segment).unpin();
    (0..3).for_each(|_| assert_eq!(rig.step(), None));
    assert!(cache.segments.get(segment).generation() > generation);
    rig.cache().check_invariants();
}

#[test]
fn lent_data_stay_as_they_were_when_they_are_overwritten() {
    let mut rig = rig();
    rig.write(0, &[0x11; 4096]);
    let id = rig.lend(0, 1).unwrap();
    let lent = rig.lent(id);
    rig.write(0, &[0x22; 4096]);
    assert_eq!(rig.run(Op::Unmap, 0, 1), Status::Success);
    rig.write(0, &[0x33; 4096]);
    assert_eq!(bytes_of(lent), [0x11; 4096]);
    let newer = rig.lend(0, 1).unwrap();
    assert_eq!(bytes_of(rig.lent(newer)), [0x33; 4096]);
    rig.channel().give_back(id);
    rig.channel().give_back(newer);
    assert!(!rig.cache().has_loans());
}

#[test]
fn only_a_hit_in_one_piece_is_lent() {
    let mut rig = LendRig::new(512);
    rig.write(0, &[0x11; 16 * 512]);
    rig.write(20, &[0x22; 512]);
    assert_eq!(rig.run(Op::WriteZeroes, 24, 8), Status::Success);
    let whole = rig.lend(0, 16).unwrap();
    assert_eq!(bytes_of(rig.lent(whole)), [0x11; 16 * 512]);
    let part = rig.lend(3, 11).unwrap();
    assert_eq!(
        rig.lent(part).as_ptr().addr(),
        rig.lent(whole).as_ptr().addr() + 3 * 512
    );
    assert!(rig.lend(20, 1).is_some());
    assert_eq!(rig.lend(16, 5), None, "the first of it is not cached");
    assert_eq!(rig.lend(24, 8), None, "zeroes lie nowhere");
    rig.write(4, &[0x33; 512]);
    assert_eq!(rig.lend(0, 16), None, "the fifth block lies elsewhere now");
    assert_eq!(rig.cache().stats().lent_reads, 3);
    assert_eq!(rig.run(Op::Lend, BLOCKS, 1), Status::Failed);
}

#[test]
fn pages_of_groups_are_lent_if_they_lie_in_a_row() {
    // The largest write is a group of pages, and what is written later lies before.
    for (block_size, group) in [(512, 32), (4096, 4)] {
        let mut rig = LendRig::new(block_size);
        let bytes = |fill: u8, count: u64| vec![fill; (count * u64::from(block_size)) as usize];
        for (number, fill) in [(2, 3), (1, 2), (0, 1)] {
            rig.write(number * group, &bytes(fill, group));
        }
        let loan = rig.lend(0, 3 * group).unwrap();
        let expected = [bytes(1, group), bytes(2, group), bytes(3, group)].concat();
        assert!(bytes_of(rig.lent(loan)) == expected);
        let part = rig.lend(1, 2 * group).unwrap();
        assert!(
            bytes_of(rig.lent(part))
                == expected[block_size as usize..][..bytes(0, 2 * group).len()]
        );
        rig.channel().give_back(loan);
        rig.channel().give_back(part);
        // In a row each, and not with what was there before.
        rig.write(group, &bytes(4, group));
        assert!(rig.lend(group, group).is_some());
        assert_eq!(rig.lend(0, 2 * group), None);
        assert_eq!(rig.lend(group, 2 * group), None);
        rig.write(3 * group - 1, &bytes(5, 1));
        assert_eq!(rig.lend(2 * group, group), None);
        assert!(rig.lend(2 * group, group - 1).is_some());
    }
}

#[test]
fn unreadable_memory_is_not_lent() {
    let mut rig = rig();
    rig.write(0, &[0x11; 2 * 4096]);
    let id = rig.lend(0, 2).unwrap();
    rig.channel().give_back(id);
    let page = rig
        .cache()
        .index
        .lookup(rig.cache().index.locate(crate::units::Page(1)));
    let crate::index::BlockMap::Mapped(place) = page.unwrap().map.block(0) else {
        panic!("block 1 was written")
    };
    rig.plain
        .pmem()
        .poison(rig.cache().geometry.place_off(place));
    assert_eq!(rig.lend(0, 2), None);
    assert!(rig.lend(0, 1).is_some());
    // Somebody meets it: other lines may be lost too, which a look at each page does not find.
    assert_eq!(rig.plain.read(0, 1, 1).0, Status::Failed);
    assert_eq!(rig.lend(0, 1), None);
}

/// More than are looked up in one turn, and each gets its own answer.
#[test]
fn many_lent_reads_at_once_are_answered_each_by_itself() {
    let mut rig = rig();
    for lba in (0..50).step_by(2) {
        rig.write(lba, &[lba as u8; 4096]);
    }
    for lba in 0..50 {
        let io = HostIo {
            token: IoToken(1000 + lba),
            op: Op::Lend,
            lba: Lba(lba),
            len_blocks: 1,
        };
        rig.channel().submit(io).unwrap();
    }
    let aborted = [3, 4, 20, 21];
    for lba in aborted {
        assert!(rig.channel().abort(IoToken(1000 + lba)));
    }
    let mut out = Outbox::new();
    rig.channel().poll(Now(0), &mut out);
    let mut answers: Vec<_> = out
        .completions
        .iter()
        .map(|c| (c.token.0 - 1000, c.status))
        .collect();
    answers.sort_by_key(|(lba, _)| *lba);
    assert_eq!(answers.len(), 50);
    for (expected, (lba, status)) in (0..).zip(answers) {
        assert_eq!(lba, expected);
        match status {
            Status::Aborted => assert!(aborted.contains(&lba)),
            Status::Lent(id) => assert_eq!(bytes_of(rig.lent(id)), [lba as u8; 4096]),
            status => assert_eq!((lba % 2, status), (1, Status::NotLent)),
        }
    }
    assert_eq!(rig.cache().stats().lent_reads, 25 - 2);
}

#[test]
fn loans_beyond_the_limit_are_refused_and_a_closed_channel_gives_all_of_them_back() {
    let mut rig = rig();
    rig.write(0, &[0x11; 4096]);
    let ids: Vec<_> = (0..LOAN_COUNT_MAX)
        .map(|_| rig.lend(0, 1).unwrap())
        .collect();
    assert_eq!(rig.lend(0, 1), None);
    rig.channel().give_back(ids[7]);
    // Twice is as good as once (INV-PIN-2).
    rig.channel().give_back(ids[7]);
    assert_eq!(rig.lend(0, 1), Some(ids[7]));
    assert!(rig.cache().has_loans());
    let another = rig.cache().channel().unwrap();
    *rig.channel() = another;
    assert!(!rig.cache().has_loans());
}

#[test]
fn lent_reads_end_when_they_are_aborted_and_when_the_cache_has_failed() {
    let mut rig = rig();
    rig.write(0, &[0x11; 4096]);
    let held = rig.lend(0, 1).unwrap();
    let io = |token| HostIo {
        token: IoToken(token),
        op: Op::Lend,
        lba: Lba(0),
        len_blocks: 1,
    };
    rig.channel().submit(io(1000)).unwrap();
    assert!(rig.channel().abort(IoToken(1000)));
    assert_eq!(rig.step(), Some(Status::Aborted));
    rig.cache().poison("a test");
    assert_eq!(rig.run(Op::Lend, 0, 1), Status::Failed);
    assert_eq!(bytes_of(rig.lent(held)), [0x11; 4096]);
    rig.channel().give_back(held);
    assert!(!rig.cache().has_loans());
}

/// On a channel that has nothing else to do.
fn lend_on(channel: &mut Channel<SimPmem>, lba: u64) -> Option<LoanId> {
    let io = HostIo {
        token: IoToken(0),
        op: Op::Lend,
        lba: Lba(lba),
        len_blocks: 1,
    };
    channel.submit(io).unwrap();
    let mut out = Outbox::new();
    while out.completions.is_empty() {
        channel.poll(Now(0), &mut out);
    }
    match out.completions[0].status {
        Status::Lent(id) => Some(id),
        _ => None,
    }
}

/// Writes 200 pages, all of which are clean then.
fn fill(rig: &mut LendRig) {
    for lba in 0..200u64 {
        rig.write(lba, &[lba as u8; 4096]);
    }
    rig.drain();
}

#[test]
fn writes_find_room_although_every_segment_is_lent_again_and_again() {
    let mut rig = rig();
    let mut reader = rig.cache().channel().unwrap();
    fill(&mut rig);
    let mut held: Vec<_> = (0..200)
        .filter_map(|lba| Some((lba, lend_on(&mut reader, lba)?)))
        .collect();
    assert!(held.len() > 50, "{}", held.len());
    for round in 0..100u64 {
        rig.write_in_turns(200 + round, round as u8, || {
            // Nothing comes back before it is lent anew, as long as that works.
            held = std::mem::take(&mut held)
                .into_iter()
                .filter_map(|(lba, id)| {
                    let again = lend_on(&mut reader, lba);
                    reader.give_back(id);
                    Some((lba, again?))
                })
                .collect();
        });
        held.extend(lend_on(&mut reader, 200 + round).map(|id| (200 + round, id)));
    }
}

/// A host that does not read its socket keeps what was lent to it, for minutes.
#[test]
fn writes_find_room_although_loans_of_all_segments_are_wanted_and_none_comes_back() {
    let mut rig = rig();
    let mut reader = rig.cache().channel().unwrap();
    fill(&mut rig);
    let held: Vec<_> = (0..200)
        .filter_map(|lba| lend_on(&mut reader, lba))
        .collect();
    assert!(held.len() > 20, "{}", held.len());
    for round in 0..300u64 {
        rig.write_in_turns(200 + round % 100 * 2, round as u8, || {});
    }
    for id in held {
        reader.give_back(id);
    }
}
