//! What reaches the base, in which order, and what if it does not: items 14 to 16, 18, 33, 40.

use super::{Context, apply, check, get_well, in_order, place_of};
use crate::engine::{BaseCaps, DataCrc, Health, Setting, SettingChange, WritebackOrder};
use crate::sim::base::Faults;
use crate::sim::machine::{INITIAL, Machine, Setup};
use crate::sim::model::Violation;
use crate::sim::script::{self, Step};
use crate::units::{Lba, NS_PER_MS};

/// The same blocks again and again, in three regions, with barriers between, while write-back is at it.
pub(super) fn overwrites_there_and_back_reach_the_base_in_order(
    context: &mut Context,
) -> Result<(), Violation> {
    for unmap in [false, true] {
        let mut setup = in_order();
        setup.base_caps.unmap = unmap;
        let mut steps = Vec::new();
        for round in 0..7 {
            for lba in [0, 40, 88] {
                steps.extend([Step::Write(0, lba, 4, 0), Step::Write(1, lba + 2, 4, 0)]);
                steps.extend([Step::Core(0), Step::Core(1), Step::Flush(0), Step::Core(0)]);
            }
            let clear = [
                Step::Unmap(0, 41, 3),
                Step::Zero(1, 1, 2),
                Step::Unmap(1, 89, 6),
            ];
            steps.extend([clear[round % 3], Step::Core(0), Step::Core(1)]);
            steps.extend([Step::DrainStart, Step::Background(3), Step::Base(1)]);
            steps.extend([Step::Background(2), Step::Base(2), Step::Background(2)]);
        }
        context.cut_script(&setup, &steps)?;
    }
    Ok(())
}

/// Transactions of a journal: log, flush, commit with FUA, the blocks in place, flush.
fn journal(rounds: u64) -> Vec<Step> {
    let mut steps = Vec::new();
    for round in 0..rounds {
        let log = round * 5 % 20;
        steps.extend([Step::Write(0, log, 4, 0), Step::Core(0)]);
        steps.extend([Step::Background(1), Step::Flush(0), Step::Core(0)]);
        steps.extend([
            Step::WriteFua(0, log + 4, 1, 0),
            Step::Core(0),
            Step::Background(2),
        ]);
        for number in 0..3 {
            let lba = 30 + (round * 11 + number * 23) % 60;
            steps.extend([Step::Write(1, lba, 3, 0), Step::Core(1), Step::Base(1)]);
        }
        steps.extend([
            Step::Flush(1),
            Step::Core(1),
            Step::Background(2),
            Step::Base(1),
        ]);
        if round % 2 == 1 {
            steps.push(Step::DrainStart);
        }
    }
    steps
}

/// The pattern of ext4 and XFS, with a base that has a volatile cache, and one that has none.
pub(super) fn a_journal_on_the_base_is_always_consistent(
    context: &mut Context,
) -> Result<(), Violation> {
    for flush in [true, false] {
        let setup = Setup {
            base_caps: BaseCaps {
                flush,
                ..Setup::default().base_caps
            },
            ..in_order()
        };
        context.cut_script(&setup, &journal(8))?;
    }
    Ok(())
}

/// The cache device is lost at any moment: every moment of write-back, its errors and a kill in the middle of
/// a batch included.
pub(super) fn the_base_alone_is_always_a_state_that_the_barriers_allow(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        yield_percent: 20,
        gc_percent: 10,
        ..Setup::default()
    };
    let mut steps = journal(4);
    steps.extend([Step::Faults(40, 0, 0), Step::DrainStart, Step::Turns(30)]);
    steps.extend(journal(2));
    steps.extend([Step::Faults(0, 60, 0), Step::Pass(300), Step::Turns(30)]);
    steps.push(Step::Kill(context.seed, 2));
    steps.extend(journal(3));
    steps.extend([Step::DrainStart, Step::Background(3), Step::Base(1)]);
    steps.push(Step::CutPower(context.seed, 2));
    steps.extend(journal(2));
    context.cut_script(&setup, &steps)
}

/// The tail, the segments and the data stay as they are while `faults` last, and all goes on afterwards.
fn sick_base(context: &mut Context, faults: Faults) -> Result<(), Violation> {
    let setup = Setup {
        gc_percent: 0,
        ..in_order()
    };
    context.cut(&setup, |machine| {
        let mut steps = Vec::new();
        for round in 0..5 {
            steps.extend([Step::Write(0, round * 8, 7, 0), Step::Core(0)]);
            steps.extend([Step::Unmap(1, round * 8 + 5, 6), Step::Core(1)]);
        }
        let machine = apply(machine, &steps)?;
        machine.settle()?;
        machine.with_outside(|outside| outside.base.faults = faults);
        let before = machine.cache().info();
        let turns = [
            Step::DrainStart,
            Step::Turns(40),
            Step::Pass(10_000),
            Step::Turns(40),
        ];
        let machine = apply(machine, &turns)?;
        let info = machine.cache().info();
        check(
            info.dirty_tail == before.dirty_tail
                && info.segments_free == before.segments_free
                && info.dirty_bytes == before.dirty_bytes,
            || format!("a base that fails took {before:?} to {info:?}"),
        )?;
        check(
            matches!(machine.cache().health(), Health::WritebackFailing(_)),
            || format!("{:?}", machine.cache().health()),
        )?;
        // What is dirty is read from the cache, and writes go on.
        let go_on = [
            Step::Read(1, 0, 6, 0),
            Step::Write(0, 3, 8, 0),
            Step::Turns(3),
        ];
        let machine = apply(machine, &go_on)?;
        check(machine.outstanding() == 0, || {
            "requests wait for the base".to_owned()
        })?;
        get_well(&machine)?;
        Ok(machine)
    })
}

/// No write of the base succeeds.
pub(super) fn failing_writes_of_the_base_hold_the_tail_and_heal(
    context: &mut Context,
) -> Result<(), Violation> {
    let faults = Faults {
        write_percent: 100,
        ..Faults::default()
    };
    sick_base(context, faults)
}

/// Writes succeed, no flush does, and what it was to cover may be lost.
pub(super) fn failing_flushes_of_the_base_hold_the_tail_and_heal(
    context: &mut Context,
) -> Result<(), Violation> {
    let faults = Faults {
        flush_percent: 100,
        ..Faults::default()
    };
    sick_base(context, faults)
}

/// A bit of a payload flips, or its line is lost: with checksums, write-back stops in front of it.
pub(super) fn damaged_payload_never_reaches_the_base(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        data_crc: DataCrc::On,
        ..in_order()
    };
    for poisoned in [false, true] {
        let steps = [
            Step::Write(0, 0, 4, 0),
            Step::Settle,
            Step::Drain,
            Step::Write(0, 8, 4, 0),
            Step::Settle,
            Step::Write(0, 30, 2, 0),
            Step::Settle,
        ];
        let machine = apply(context.machine(&setup)?, &steps)?;
        let place = place_of(&machine, Lba(9)).ok_or_else(|| Violation("not cached".to_owned()))?;
        let off = machine.cache().geometry.place_off(place).plus(77);
        if poisoned {
            machine.pmem().poison(off);
        } else {
            machine.pmem().flip_bit(off, 5);
        }
        let tail = machine.cache().info().dirty_tail;
        let turns = [
            Step::DrainStart,
            Step::Turns(60),
            Step::Pass(10_000),
            Step::Turns(60),
        ];
        let machine = apply(machine, &turns)?;
        let health = machine.cache().health();
        check(matches!(health, Health::Degraded(_)), || {
            format!("{health:?}")
        })?;
        check(machine.cache().drain_status().error.is_some(), || {
            "the drain is silent".to_owned()
        })?;
        check(machine.cache().info().dirty_tail == tail, || {
            "the tail has moved".to_owned()
        })?;
        machine.with_outside(|outside| {
            let untouched = (8..12).chain(30..32).all(|lba| {
                let image = outside.base.current_image();
                image.stamp(lba) == Ok(INITIAL)
            });
            check(untouched, || {
                "something behind the damage reached the base".to_owned()
            })
        })?;
        // Everything else is served as before.
        let others = [
            Step::Read(0, 30, 2, 0),
            Step::Read(1, 0, 8, 0),
            Step::Write(1, 50, 3, 0),
        ];
        let machine = apply(machine, &others)?;
        machine.settle()?;
        machine.verdict()?;
        if !poisoned {
            // With the bit as it was, the next start finds nothing wrong.
            machine.pmem().flip_bit(off, 5);
            let machine = machine.kill(2, |_| ())?;
            script::finish(&machine)?;
        }
    }
    Ok(())
}

/// Every write is followed by a flush. In strict order each needs a flush of the base; in relaxed order a few
/// do for all.
pub(super) fn relaxed_order_merges_what_barriers_separate(
    context: &mut Context,
) -> Result<(), Violation> {
    let mut flushes = Vec::new();
    for order in [WritebackOrder::Strict, WritebackOrder::Relaxed] {
        let setup = Setup {
            order,
            segment_count: 16,
            ..in_order()
        };
        context.cut(&setup, |machine| {
            let mut steps = Vec::new();
            for number in 0..24 {
                steps.extend([Step::Write(0, number * 4, 1, 0), Step::Core(0)]);
                steps.extend([Step::Flush(0), Step::Core(0)]);
            }
            let machine = apply(machine, &steps)?;
            machine.drain()?;
            flushes.push(machine.with_outside(|outside| outside.base.flush_count()));
            Ok(machine)
        })?;
    }
    check(flushes[0] >= 24 && flushes[1] <= 4, || {
        format!(
            "24 barriers took {} flushes in strict order, {} in relaxed",
            flushes[0], flushes[1]
        )
    })
}

/// The tail of a log, written again and again with a barrier each time: in strict order, too, the base gets the
/// last version alone. Two blocks in turn have an order that it must keep.
pub(super) fn barriers_between_versions_of_one_block_take_one_flush(
    context: &mut Context,
) -> Result<(), Violation> {
    let mut flushes = Vec::new();
    for block_count in [1, 2] {
        context.cut(&in_order(), |machine| {
            let mut steps = Vec::new();
            for number in 0..12 {
                let lba = 7 + number % block_count;
                steps.extend([Step::Write(0, lba, 1, 0), Step::Core(0)]);
                steps.extend([Step::Flush(0), Step::Core(0)]);
            }
            // In the epoch of the last version, another block: it must not overtake the first ones.
            steps.extend([Step::Write(0, 7, 1, 0), Step::Core(0)]);
            steps.extend([Step::Write(0, 40, 1, 0), Step::Core(0)]);
            let machine = apply(machine, &steps)?;
            machine.drain()?;
            flushes.push(machine.with_outside(|outside| outside.base.flush_count()));
            Ok(machine)
        })?;
    }
    check(flushes[0] <= 3 && flushes[1] >= 12, || {
        format!(
            "12 barriers took {} flushes of the base with one block, {} with two",
            flushes[0], flushes[1]
        )
    })
}

/// A second of the rate is needed before anything is written at all.
pub(super) fn lowest_rate() -> SettingChange {
    SettingChange::of(Setting::WritebackRateMibS, 1)
}

/// Stops the machine, and sees to it that the rate of write-back is not waited for.
pub(super) fn stop_at_once(machine: &Machine) -> Result<(), Violation> {
    let before = machine.now();
    machine.stop()?;
    let took_ms = machine.now().since_ns(before) / NS_PER_MS;
    check(took_ms < 500, || format!("a stop takes {took_ms} ms"))
}

/// With dirty data that no batch has taken yet, and in the middle of a batch that waits for its turn.
pub(super) fn an_orderly_stop_does_not_wait_for_the_rate_of_write_back(
    context: &mut Context,
) -> Result<(), Violation> {
    for is_begun in [false, true] {
        let setup = Setup {
            settings: lowest_rate(),
            ..in_order()
        };
        let mut steps: Vec<_> = (0..4).map(|n| Step::Write(0, n * 8, 5, 0)).collect();
        steps.push(Step::Settle);
        if is_begun {
            steps.extend([Step::DrainStart, Step::Turns(30)]);
        }
        let machine = apply(context.machine(&setup)?, &steps)?;
        let info = machine.cache().info();
        let dirty_bytes = 4 * 5 * 512;
        check(info.dirty_bytes == dirty_bytes, || {
            format!("{is_begun}: too fast for the rate: {info:?}")
        })?;
        stop_at_once(&machine)?;
        // A batch takes no more than a part of the cache.
        let left = machine.cache().info().dirty_bytes;
        check((left < dirty_bytes) == is_begun, || {
            format!("{is_begun}: a stop has left {left} dirty bytes")
        })?;
    }
    Ok(())
}
