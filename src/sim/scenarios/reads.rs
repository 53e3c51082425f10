//! Reads: misses, fills, media errors. Items 22, 31, 32, 39.

use super::{Context, apply, check, in_order, is_cached, place_of};
use crate::engine::{Cache, Fua, HostIo, IoToken, Op, Outbox, Status};
use crate::pmem::IovBuf;
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::Violation;
use crate::sim::pmem::SimPmem;
use crate::sim::script::{self, Step};
use crate::units::{Lba, Now};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Of a read that asks the base for nothing.
const POLLS_MAX: usize = 100;

/// When a write comes, as seen from a miss of core 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comes {
    /// Acknowledged on another core before the base has answered.
    BeforeTheAnswer,
    /// Acknowledged on another core, after the answer, before the fill.
    BeforeTheFill,
    /// In the batch of the fill.
    WithTheFill,
    /// After it.
    AfterTheFill,
}

/// The missed range is four blocks from here; what overlaps it is given by its first block and length, from
/// the start of the group.
const MISSED: u64 = 18;
const OVERLAPS: [(u64, u64); 6] = [(16, 8), (14, 6), (20, 6), (19, 2), (18, 4), (22, 2)];
const GROUP: u64 = 32;

/// All shapes of overlap, all moments, all kinds of write. The last one overlaps nothing but what has come along.
pub(super) fn a_fill_never_overtakes_a_write_that_overlaps_it(
    context: &mut Context,
) -> Result<(), Violation> {
    let seed = context.seed;
    let comes = [
        Comes::BeforeTheAnswer,
        Comes::BeforeTheFill,
        Comes::WithTheFill,
        Comes::AfterTheFill,
    ];
    for comes in comes {
        for op in [None, Some(Op::WriteZeroes), Some(Op::Unmap)] {
            let setup = Setup {
                block_count: GROUP * OVERLAPS.len() as u64,
                // So large that nothing is written back meanwhile.
                segment_size_bytes: 64 << 10,
                ..in_order()
            };
            let history = |machine: Machine| {
                for (group, (first, len)) in (0..).zip(OVERLAPS) {
                    fill_and_write(&machine, group * GROUP, comes, op, (first, len))?;
                }
                machine.cut_power(seed, |setup| setup.core_count = 3)
            };
            // For a power cut the kinds of write are the same.
            if op.is_none() {
                context.cut(&setup, history)?;
            } else {
                script::finish(&history(context.machine(&setup)?)?)?;
            }
        }
    }
    Ok(())
}

fn fill_and_write(
    machine: &Machine,
    group: u64,
    comes: Comes,
    op: Option<Op>,
    (first, len): (u64, u64),
) -> Result<(), Violation> {
    let write = |core| {
        match op {
            None => machine.write(core, group + first, len, Fua::No, &[]),
            Some(op) => machine.clear(core, op, group + first, len),
        }
        if comes != Comes::WithTheFill {
            machine.poll_core(core);
        }
    };
    machine.read(0, group + MISSED, 4, &[]);
    machine.poll_core(0);
    let asked = machine.with_outside(|outside| outside.base.in_flight());
    check(asked == 1, || {
        format!("a miss has asked the base {asked} times")
    })?;
    if comes == Comes::BeforeTheAnswer {
        write(1);
    }
    machine.complete_base();
    match comes {
        Comes::BeforeTheAnswer | Comes::AfterTheFill => {}
        Comes::BeforeTheFill => write(1),
        Comes::WithTheFill => write(0),
    }
    machine.poll_core(0);
    if comes == Comes::AfterTheFill {
        let filled = is_cached(machine, Lba(group + MISSED));
        check(filled, || "a miss was not put into the cache".to_owned())?;
        write(1);
    }
    machine.settle()?;
    for core in 0..2 {
        machine.read(core, group + 12, 16, &[]);
    }
    machine.settle()
}

/// Misses of one core share the base reads of blocks that they have in common, and get what these bring.
pub(super) fn concurrent_misses_of_the_same_blocks_share_a_base_read(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&in_order(), |machine| {
        // Equal, inside of the first, over its end, over its start.
        for (lba, len) in [(16, 8), (16, 8), (19, 2), (20, 8), (12, 6)] {
            machine.read(0, lba, len, &[700]);
        }
        machine.poll_core(0);
        let asked = machine.with_outside(|outside| outside.base.in_flight());
        machine.settle()?;
        let stats = machine.cache().stats();
        let blocks = |count: u64| count * 512;
        check(
            (asked, stats.base_read_bytes, stats.joined_read_bytes)
                == (3, blocks(8 + 8 + 8), blocks(8 + 2 + 4 + 2)),
            || format!("{asked} base reads, {stats:?}"),
        )?;
        Ok(machine)
    })
}

/// The error of a base read that several wait for is the error of nobody but its own request.
pub(super) fn those_who_share_a_base_read_that_fails_ask_for_themselves(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&in_order(), |machine| {
        for _ in 0..3 {
            machine.read(0, 16, 8, &[]);
        }
        machine.poll_core(0);
        machine.with_outside(|outside| outside.base.faults.read_percent = 100);
        machine.complete_base();
        machine.with_outside(|outside| outside.base.faults.read_percent = 0);
        machine.settle()?;
        let statuses = machine.take_completed();
        let failed = statuses.iter().filter(|end| end.status == Status::Failed);
        let failed: Vec<IoToken> = failed.map(|end| end.token).collect();
        check(statuses.len() == 3 && failed == [IoToken(1)], || {
            format!("{statuses:?}")
        })?;
        let under_way = machine.cache().base_reads.load(Ordering::Relaxed);
        check(under_way == 0, || {
            format!("{under_way} base reads are said to be under way")
        })?;
        Ok(machine)
    })
}

/// A base read that takes long is joined by nobody any more once its blocks were written, even if they have left
/// the cache again (INV-READ-2).
pub(super) fn a_base_read_is_not_joined_once_its_blocks_were_written(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&in_order(), |machine| {
        machine.with_outside(|outside| outside.base.faults.read_stuck = true);
        machine.read(0, 16, 8, &[]);
        machine.poll_core(0);
        machine.write(1, 16, 8, Fua::No, &[]);
        // Two more fill a segment, so that the write can be reclaimed.
        for lba in [32, 40, 48, 56] {
            machine.write(1, lba, 8, Fua::No, &[]);
        }
        machine.poll_core(1);
        let steps = [Step::GcPercent(0), Step::DrainStart, Step::Turns(60)];
        let machine = apply(machine, &steps)?;
        check(!is_cached(&machine, Lba(16)), || {
            "the write is still in the cache".to_owned()
        })?;
        machine.read(0, 16, 8, &[]);
        machine.poll_core(0);
        let asked = machine.with_outside(|outside| {
            outside.base.faults.read_stuck = false;
            outside.base.in_flight()
        });
        machine.settle()?;
        machine.verdict()?;
        check(asked == 2, || format!("{asked} base reads, not 2"))?;
        Ok(machine)
    })
}

/// A read by a channel of its own, which neither the machine nor its oracle knows of. Nothing of it may miss.
pub(super) fn read_aside(
    machine: &Machine,
    lba: u64,
    len_blocks: u64,
) -> Result<Status, Violation> {
    read_of(machine.cache(), lba, len_blocks)
}

/// The same, of a cache that is no machine's.
pub(super) fn read_of(
    cache: &Arc<Cache<SimPmem>>,
    lba: u64,
    len_blocks: u64,
) -> Result<Status, Violation> {
    let mut channel = cache.channel().expect("there are few channels");
    let buf = IovBuf::zeroed(cache.geometry.bytes(len_blocks) as usize);
    let mut out = Outbox::new();
    let io = HostIo {
        token: IoToken(1),
        op: Op::Read(buf.cursor()),
        lba: Lba(lba),
        len_blocks,
    };
    channel.submit(io).expect("the channel is empty");
    // Where there is damage it looks for keys.
    for _ in 0..POLLS_MAX {
        channel.poll(Now(0), &mut out);
        if let Some(completion) = out.completions.first() {
            return Ok(completion.status);
        }
    }
    Err(Violation(format!(
        "a read of {lba}+{len_blocks} is not served without the base"
    )))
}

/// One line is lost: the base helps where the data are clean, and only what touches it fails where not.
pub(super) fn poisoned_memory_fails_only_what_is_dirty_in_it(
    context: &mut Context,
) -> Result<(), Violation> {
    let mut steps = vec![];
    // Two of them fill a segment, so those with the clean data are sealed, and do not get dirty data too.
    for lba in [0, 8, 16, 24] {
        steps.extend([Step::Write(0, lba, 7, 0), Step::Core(0)]);
    }
    steps.extend([Step::Drain, Step::Write(0, 40, 7, 0), Step::Core(0)]);
    steps.extend([Step::Write(0, 48, 7, 0), Step::Settle]);
    // Side by side in a segment.
    steps.extend([Step::Read(0, 56, 1, 0), Step::Settle]);
    steps.extend([Step::Write(0, 58, 1, 0), Step::Settle]);
    let machine = apply(context.machine(&in_order())?, &steps)?;
    let line_of = |lba| {
        let place =
            place_of(&machine, Lba(lba)).ok_or_else(|| Violation("not cached".to_owned()))?;
        Ok::<_, Violation>(machine.cache().geometry.place_off(place).plus(128))
    };
    let lines = [line_of(2)?, line_of(43)?, line_of(56)?, line_of(58)?];
    lines.iter().for_each(|line| machine.pmem().poison(*line));
    // The machine takes no failure for granted, and compares the data.
    machine.read(0, 0, 7, &[]);
    machine.read(1, 2, 1, &[]);
    machine.read(1, 56, 1, &[]);
    machine.settle()?;
    let mut failed = Vec::new();
    for lba in (40..47).chain([58]) {
        if read_aside(&machine, lba, 1)? == Status::Failed {
            failed.push(lba);
        }
    }
    check(failed == [43, 58], || {
        format!("blocks {failed:?} fail, not 43 and 58")
    })?;
    check(read_aside(&machine, 41, 4)? == Status::Failed, || {
        "a read over a lost line succeeds".to_owned()
    })?;
    check(machine.cache().stats().poisoned_reads >= 4, || {
        "nobody counts".to_owned()
    })?;
    // A write of the block makes it good again, elsewhere.
    machine.write(0, 43, 1, Fua::No, &[]);
    machine.write(0, 58, 1, Fua::No, &[]);
    machine.settle()?;
    machine.read(0, 40, 19, &[]);
    machine.settle()?;
    lines.iter().for_each(|line| machine.pmem().heal(*line));
    script::finish(&machine)
}

/// Write-back waits for a flush that takes for ever; a miss does not.
pub(super) fn a_read_miss_does_not_wait_for_a_flush_of_the_base(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&in_order(), |machine| {
        let machine = apply(machine, &[Step::Write(0, 0, 8, 0), Step::Settle])?;
        machine.with_outside(|outside| outside.base.faults.flush_stuck = true);
        let machine = apply(machine, &[Step::DrainStart, Step::Turns(10)])?;
        let waiting = machine.with_outside(|outside| outside.base.in_flight());
        check(waiting == 1, || {
            format!("{waiting} operations wait, not the flush alone")
        })?;
        for core in 0..2 {
            machine.read(core, 30 + 10 * core as u64, 5, &[]);
        }
        (0..4).for_each(|_| machine.poll_all());
        let still = machine.with_outside(|outside| outside.base.in_flight());
        let left = machine.outstanding();
        check(left == 0 && still == 1, || {
            format!("{left} reads wait behind a flush of the base")
        })?;
        Ok(machine)
    })
}
