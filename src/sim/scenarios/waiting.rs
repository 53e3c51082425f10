//! Writers of several cores that wait for room: item 50.

use super::{Context, apply, check, fill_up, heal, in_order};
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::Violation;
use crate::sim::script::Step;

/// Three cores that share a stream.
fn three_cores() -> Setup {
    Setup {
        segment_count: 6,
        core_count: 3,
        stream_count_max: 1,
        ..in_order()
    }
}

/// A write on each of the first two cores waits, in this order, and the base is well again.
fn two_wait(machine: Machine) -> Result<Machine, Violation> {
    fill_up(&machine)?;
    let machine = apply(machine, &[Step::Write(1, 8, 7, 0), Step::Core(1)])?;
    check(machine.outstanding() == 2, || {
        format!("{} writes wait", machine.outstanding())
    })?;
    heal(&machine);
    drop(machine.take_completed());
    Ok(machine)
}

/// Nobody but the background and the base has a turn.
fn reclaim(machine: &Machine) {
    machine.pass_ms(1);
    machine.poll_background();
    machine.complete_base();
}

fn segments_free(machine: &Machine) -> u64 {
    machine.cache().info().segments_free
}

fn until_one_is_free(machine: &Machine) -> Result<(), Violation> {
    for _ in 0..1000 {
        if segments_free(machine) > 0 {
            break;
        }
        reclaim(machine);
    }
    check(segments_free(machine) == 1, || {
        "no segment becomes free".to_owned()
    })
}

/// Whoever polls first when a segment has become free does not get it: he is behind those who wait.
pub(super) fn a_late_write_does_not_overtake_those_of_other_cores_that_wait(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&three_cores(), |machine| {
        let machine = two_wait(machine)?;
        until_one_is_free(&machine)?;
        let late = [Step::Write(2, 16, 7, 0), Step::Core(2), Step::Core(2)];
        let machine = apply(machine, &late)?;
        let machine = apply(machine, &[Step::Core(1), Step::Core(2)])?;
        check(machine.take_completed().is_empty(), || {
            "a late write goes before those that wait".to_owned()
        })?;
        let machine = apply(machine, &[Step::Core(0)])?;
        check(machine.take_completed().len() == 1, || {
            "the first to wait is not served".to_owned()
        })?;
        machine.settle()?;
        check(!machine.cache().info().requests_wait, || {
            "somebody still waits".to_owned()
        })?;
        Ok(machine)
    })
}

/// What is submitted while others wait is behind them, also on the core that waits longest.
pub(super) fn a_core_that_waits_has_one_turn_for_what_it_has_then(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&three_cores(), |machine| {
        let machine = two_wait(machine)?;
        let many: Vec<_> = (24..80).step_by(8).collect();
        let writes = many.iter().map(|lba| Step::Write(0, *lba, 7, 0));
        let machine = apply(machine, &writes.collect::<Vec<_>>())?;
        until_one_is_free(&machine)?;
        let machine = apply(machine, &[Step::Core(0), Step::Core(0), Step::Core(0)])?;
        let first = machine.take_completed().len();
        check((1..many.len()).contains(&first), || {
            format!("{first} of those that wait longest are served by one segment")
        })?;
        until_one_is_free(&machine)?;
        let machine = apply(machine, &[Step::Core(0), Step::Core(0)])?;
        check(machine.take_completed().is_empty(), || {
            "a late write of the first core goes before those that wait".to_owned()
        })?;
        let machine = apply(machine, &[Step::Core(1)])?;
        check(machine.take_completed().len() == 1, || {
            "the second to wait is not served".to_owned()
        })?;
        machine.settle()?;
        Ok(machine)
    })
}

/// A core that waits and has no turn for long keeps one segment from the others, and no more.
pub(super) fn a_core_that_is_slow_does_not_hold_up_the_others(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&three_cores(), |machine| {
        let machine = two_wait(machine)?;
        let mut steps = vec![Step::Write(2, 16, 7, 0)];
        for lba in (24..72).step_by(8) {
            steps.extend([Step::Write(1, lba, 7, 0), Step::Write(2, lba, 6, 0)]);
        }
        let machine = apply(machine, &steps)?;
        for _ in 0..5000 {
            machine.poll_core(2);
            machine.poll_core(1);
            reclaim(&machine);
        }
        let left = machine.outstanding();
        check(left == 1, || format!("{left} writes wait for a slow core"))?;
        machine.settle()?;
        Ok(machine)
    })
}

/// A time for which writes wait counts while it lasts, and not when nobody waits any more because they were given up.
pub(super) fn a_stall_counts_as_long_as_somebody_waits(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&three_cores(), |machine| {
        fill_up(&machine)?;
        let hour = [
            Step::Background(1),
            Step::Pass(3_600_000),
            Step::Background(1),
        ];
        let machine = apply(machine, &hour)?;
        let (info, stats) = (machine.cache().info(), machine.cache().stats());
        let is_counted = info.requests_wait
            && info.stall_us_max >= 3_600_000_000
            && stats.stall_us == info.stall_us_max
            && stats.stalls == 1;
        check(is_counted, || format!("{info:?}, {stats:?}"))?;
        while machine.outstanding() > 0 {
            machine.abort(0, 0);
            machine.poll_core(0);
        }
        check(!machine.cache().info().requests_wait, || {
            "nobody waits, and it is said that somebody does".to_owned()
        })?;
        let machine = apply(machine, &hour)?;
        let later = machine.cache().stats();
        let is_same = (later.stalls, later.stall_us) == (1, stats.stall_us);
        check(is_same, || format!("{stats:?}, then {later:?}"))?;
        heal(&machine);
        Ok(machine)
    })
}
