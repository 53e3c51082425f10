use super::{ClearingBase, Goes};
use crate::engine::{
    Background, BaseCaps, BaseError, BaseKind, BaseOpId, BaseRequest, Budget, Cache, Channel,
    FormatPolicy, Fua, Health, HostIo, IoToken, Op, Outbox, Progress, Setting, SettingChange,
    Status, ZeroesWent,
};
use crate::media::KeyKind;
use crate::pmem::IovBuf;
use crate::sim::machine::Setup;
use crate::sim::pmem::SimPmem;
use crate::sim::recover;
use crate::units::{Lba, NS_PER_MS, Now};
use std::mem;
use std::sync::Arc;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 512;
/// What one request may clear.
const CLEARED: u64 = 4 * MIB;

const TAKES_ALL: BaseCaps = BaseCaps {
    flush: true,
    unmap: true,
    write_zeroes: true,
};
const TAKES_DATA: BaseCaps = BaseCaps {
    flush: true,
    unmap: false,
    write_zeroes: false,
};

/// A base that keeps nothing, and takes its time for each byte, cleared or written, which its operations share.
#[derive(Default)]
struct SlowBase {
    /// `None`: no time at all.
    bytes_per_ms: Option<u64>,
    /// What is left of each.
    ops: Vec<(BaseOpId, u64)>,
    ended: Vec<BaseOpId>,
    /// Of all that were asked for.
    bytes: u64,
}

impl SlowBase {
    fn take(&mut self, request: &BaseRequest) {
        let bytes = match request.kind {
            BaseKind::Flush => 0,
            _ => request.len_blocks * BLOCK,
        };
        self.bytes += bytes;
        if bytes == 0 || self.bytes_per_ms.is_none() {
            self.ended.push(request.op);
        } else {
            self.ops.push((request.op, bytes));
        }
    }

    fn pass_ms(&mut self, ms: u64) {
        let share = self.bytes_per_ms.unwrap_or(0) * ms / self.ops.len().max(1) as u64;
        let ended = &mut self.ended;
        self.ops.retain_mut(|(op, left)| {
            *left = left.saturating_sub(share);
            if *left == 0 {
                ended.push(*op);
            }
            *left > 0
        });
    }
}

struct Rig {
    cache: Arc<Cache<SimPmem>>,
    channel: Channel<SimPmem>,
    background: Background<SimPmem>,
    base: SlowBase,
    out: Outbox,
    now: Now,
    /// When the base last ended anything, and the dirty tail last moved; how long neither did, at the most.
    ended: Now,
    silent_ms_max: u64,
    moved: (u64, Now),
    tail_stands_ms_max: u64,
}

impl Rig {
    fn new(base_caps: BaseCaps, settings: &[(Setting, u32)]) -> Self {
        static ZEROES: [u8; 4096] = [0; 4096];
        let none = SettingChange::of(Setting::DirtyAgeS, 0);
        let change = settings.iter().fold(none, |change, (setting, value)| {
            change.and(*setting, *value)
        });
        let setup = Setup {
            segment_size_bytes: MIB,
            segment_count: 256,
            block_count: 1 << 24,
            gc_percent: 90,
            settings: change,
            base_caps,
            ..Setup::default()
        };
        let pmem = SimPmem::new(setup.device_size_bytes());
        let cache = recover::open(pmem, setup.options(FormatPolicy::Auto), |_, len_blocks| {
            &ZEROES[..(len_blocks * BLOCK) as usize]
        })
        .expect("the device is blank");
        Self {
            channel: cache.channel().expect("the first"),
            background: cache.background().expect("the first"),
            cache,
            base: SlowBase::default(),
            out: Outbox::new(),
            now: Now(NS_PER_MS),
            ended: Now(0),
            silent_ms_max: 0,
            moved: (0, Now(0)),
            tail_stands_ms_max: 0,
        }
    }

    fn change(&mut self, op: Op, off: u64, bytes: u64) {
        let io = HostIo {
            token: IoToken(1),
            op,
            lba: Lba(off / BLOCK),
            len_blocks: bytes / BLOCK,
        };
        self.channel.submit(io).expect("the table is empty");
        self.out.clear();
        self.channel.poll(self.now, &mut self.out);
        assert_eq!(self.out.completions[0].status, Status::Success);
    }

    fn clear(&mut self, op: Op, bytes: u64) {
        (0..bytes / CLEARED).for_each(|number| self.change(op, number * CLEARED, CLEARED));
    }

    /// A turn of everybody, some time later.
    fn pass_ms(&mut self, ms: u64) {
        self.now = Now(self.now.0 + ms * NS_PER_MS);
        self.base.pass_ms(ms);
        for _ in 0..100_000 {
            let ended = mem::take(&mut self.base.ended);
            for op in &ended {
                self.background.on_base_done(*op, Ok(()), self.now);
            }
            self.out.clear();
            let progress = self
                .background
                .poll(self.now, Budget::default(), &mut self.out);
            self.out.base.iter().for_each(|op| self.base.take(op));
            if !ended.is_empty() || self.base.ops.is_empty() {
                self.ended = self.now;
            }
            if progress == Progress::Idle && self.base.ended.is_empty() {
                break;
            }
        }
        assert_eq!(self.cache.health(), Health::Online);
        let tail = self.cache.info().dirty_tail;
        if tail != self.moved.0 {
            self.moved = (tail, self.now);
        }
        let since_ms = |then: Now| self.now.since_ns(then) / NS_PER_MS;
        self.silent_ms_max = self.silent_ms_max.max(since_ms(self.ended));
        self.tail_stands_ms_max = self.tail_stands_ms_max.max(since_ms(self.moved.1));
    }

    /// Drains, in steps of so many milliseconds. Returns how long it took.
    fn drain_ms(&mut self, step_ms: u64, mut each_step: impl FnMut(u64, &SlowBase)) -> u64 {
        self.cache.drain_start();
        self.moved.1 = self.now;
        let mut passed_ms = 0;
        while self.cache.drain_status().in_progress {
            assert!(passed_ms < 100_000, "the drain does not end");
            self.pass_ms(step_ms);
            passed_ms += step_ms;
            each_step(passed_ms, &self.base);
        }
        passed_ms
    }
}

#[test]
fn what_a_base_clears_is_learned_from_how_its_operations_end() {
    let mut base = ClearingBase::default();
    let now = Now(7);
    let has_no_weight =
        |base: &ClearingBase| base.clearing(TAKES_ALL, now).goes(KeyKind::Zeroes) == Goes::Cleared;
    let unmaps = |base: &ClearingBase| base.clearing(TAKES_ALL, now).base_kind(KeyKind::Unmap);
    assert!(!has_no_weight(&base), "it has not shown it");
    assert!(!base.note_end(KeyKind::Zeroes, Ok(()), now));
    assert!(has_no_weight(&base));
    // It failed some once, and takes them again.
    base.zeroes_went = ZeroesWent::AsData;
    assert!(!has_no_weight(&base));
    base.zeroes_went = ZeroesWent::AsAsked;
    assert!(has_no_weight(&base));
    // A reset says nothing about what it has aborted.
    for error in [BaseError::Reset, BaseError::Gone] {
        assert!(!base.note_end(KeyKind::Unmap, Err(error), now));
        assert_eq!(unmaps(&base), KeyKind::Unmap);
    }
    assert!(base.note_end(KeyKind::Unmap, Err(BaseError::Io), now));
    assert_eq!(unmaps(&base), KeyKind::Zeroes);
}

#[test]
fn whatever_is_written_to_the_base_keeps_to_the_rate_and_reaches_it() {
    const RATE_MIB_S: u64 = 8;
    // Data alone, with barriers nowhere; zeroes as data, of a base that says so, and of one that turns out so.
    for (data, zeroes, caps, op) in [
        (40 * MIB, 0, TAKES_ALL, Op::Flush),
        (8 * MIB, 64 * MIB, TAKES_DATA, Op::Unmap),
        (MIB, 64 * MIB, TAKES_DATA, Op::WriteZeroes),
        (0, 64 * MIB, TAKES_ALL, Op::WriteZeroes),
    ] {
        let mut rig = Rig::new(caps, &[(Setting::WritebackRateMibS, RATE_MIB_S as u32)]);
        rig.clear(op, zeroes);
        let buf = IovBuf::new(&[7; 4096], &[]);
        for page in 0..data / 4096 {
            // Behind what is cleared, in some disorder.
            let off = zeroes + (page * 4097 % (data / 4096)) * 4096;
            rig.change(Op::Write(buf.cursor(), Fua::No), off, 4096);
        }
        if caps.write_zeroes && zeroes > 0 {
            rig.background.note_zeroes(ZeroesWent::AsData);
        }
        let took_ms = rig.drain_ms(1, |passed_ms, base| {
            // One operation may begin before there is enough for all of it.
            let bytes_max = RATE_MIB_S * MIB * passed_ms / 1000 + MIB;
            let bytes = base.bytes;
            assert!(bytes <= bytes_max, "{bytes} bytes in {passed_ms} ms");
        });
        let wanted_ms = (data + zeroes) * 1000 / (RATE_MIB_S * MIB);
        assert!(
            took_ms <= wanted_ms * 11 / 10,
            "{took_ms} ms, not {wanted_ms}"
        );
        let stats = rig.cache.stats();
        assert_eq!(rig.base.bytes, data + zeroes);
        assert_eq!(stats.writeback_bytes, data);
        assert_eq!(stats.writeback_zeroes_bytes, zeroes);
        assert_eq!(stats.absorbed_bytes, 0);
    }
}

#[test]
fn what_the_base_clears_itself_does_not_wait_for_the_rate() {
    // A base that claims WRITE_ZEROES has to take one first.
    for (op, took_ms_max, as_data_max) in [(Op::Unmap, 10, 0), (Op::WriteZeroes, 1200, 2 * MIB)] {
        let mut rig = Rig::new(TAKES_ALL, &[(Setting::WritebackRateMibS, 1)]);
        rig.clear(op, 256 * MIB);
        let took_ms = rig.drain_ms(1, |_, _| ());
        assert!(took_ms <= took_ms_max, "{op:?} took {took_ms} ms");
        assert_eq!(rig.base.bytes, 256 * MIB);
        let stats = rig.cache.stats();
        assert!(stats.writeback_zeroes_bytes <= as_data_max, "{op:?}");
        // The first is short, and so may the next be, which is gathered meanwhile.
        let batches = stats.writeback_batches;
        assert!(batches <= 18, "{op:?} took {batches} batches");
    }
}

#[test]
fn a_base_that_takes_its_time_for_each_byte_that_it_clears_is_not_taken_for_silent() {
    const BYTES_PER_MS: u64 = 10_000;
    for (caps, op) in [
        (TAKES_DATA, Op::Unmap),
        (TAKES_ALL, Op::Unmap),
        (TAKES_ALL, Op::WriteZeroes),
    ] {
        let mut rig = Rig::new(caps, &[]);
        rig.base.bytes_per_ms = Some(BYTES_PER_MS);
        rig.clear(op, 256 * MIB);
        let took_ms = rig.drain_ms(5, |_, _| ());
        let wanted_ms = 256 * MIB / BYTES_PER_MS;
        assert!(took_ms <= wanted_ms * 11 / 10, "{op:?} took {took_ms} ms");
        let silent_ms = rig.silent_ms_max;
        assert!(silent_ms < 5_000, "{op:?}: {silent_ms} ms without an end");
        let stands_ms = rig.tail_stands_ms_max;
        assert!(
            stands_ms < 6_000,
            "{op:?}: the tail stands for {stands_ms} ms"
        );
    }
}
