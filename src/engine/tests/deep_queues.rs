//! Deep queues: requests of one kind keep none of another from its turn, and a poll stays short.

use super::*;
use crate::pmem::IovBuf;
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::units::{Lba, Now};

/// Everything else than the crowd.
const OTHERS: u64 = 1 << 32;

/// Many requests of one kind, each of which is submitted again as soon as it has ended.
struct Crowd {
    plain: Plain<SimPmem>,
    op: Op,
    buf: IovBuf,
    out: Outbox,
}

impl Crowd {
    fn new(op: impl FnOnce(&IovBuf) -> Op, count: u64) -> Self {
        let pmem = SimPmem::new(DEVICE_SIZE_BYTES);
        let base = vec![0; BLOCKS as usize * 512];
        let mut plain =
            Plain::new(pmem, base, options(512, None), BackgroundRuns::Always).unwrap();
        let buf = IovBuf::new(&[7; 512], &[]);
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
