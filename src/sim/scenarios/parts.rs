//! Batches that must not end where there is no more room for their keys: item 51. How much room there is goes by the dirty
//! tail here.

use super::damage::{Way, check_degraded, drain_as_far_as_it_goes, spoil};
use super::{Context, apply, check, in_order};
use crate::engine::DataCrc;
use crate::sim::base::Faults;
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::Violation;
use crate::sim::prng::{Prng, mix};
use crate::sim::script::{self, Step, Weights};

fn setup() -> Setup {
    Setup {
        data_crc: DataCrc::On,
        segment_size_bytes: 32 << 10,
        segment_count: 10,
        gc_percent: 90,
        ..in_order()
    }
}

/// Batches that were gathered and not written, and parts of those that were beyond the first.
fn surplus(machine: &Machine) -> u64 {
    let stats = machine.cache().stats();
    stats.distributions.gather_us.count() - stats.writeback_batches
}

/// A damaged block, and behind it writes all over the base, which overlap each other, barriers, and what clears much.
fn damage_below_much(mut machine: Machine, shift: u64) -> Result<Machine, Violation> {
    for _ in 0..shift {
        machine = apply(machine, &[Step::Write(0, 90, 1, 0), Step::Drain])?;
    }
    let mut steps = vec![Step::Write(0, 8, 4, 0), Step::Flush(0), Step::Settle];
    for number in 0..14 {
        let core = (number % 2) as usize;
        steps.extend([Step::Write(core, number * 13 % 90, 5, 0), Step::Settle]);
        if number == 6 {
            steps.extend([Step::Unmap(0, 20, 50), Step::Flush(0), Step::Settle]);
            steps.extend([Step::Zero(1, 15, 20), Step::Settle]);
        }
    }
    let machine = apply(machine, &steps)?;
    spoil(&machine, 9, Way::Poison)?;
    let machine = drain_as_far_as_it_goes(machine)?;
    check_degraded(&machine)?;
    // While it heals, barriers hold on the base at the end of the batch only.
    machine.with_outside(|outside| outside.relaxed = true);
    Ok(machine)
}

/// A batch with damage goes on to where all of it is overwritten, with a cut at every moment.
pub(super) fn a_batch_that_goes_beyond_damage_is_written_in_parts(
    context: &mut Context,
) -> Result<(), Violation> {
    let mut parts = 0;
    for shift in 0..3 {
        context.cut(&setup(), |machine| {
            let machine = damage_below_much(machine, shift)?;
            let before = surplus(&machine);
            let machine = apply(
                machine,
                &[Step::Write(0, 8, 4, 0), Step::Turns(200), Step::Drain],
            )?;
            parts += surplus(&machine) - before;
            Ok(machine)
        })?;
    }
    check(parts >= 4, || format!("{parts} further parts"))
}

/// The base fails to flush what was written in parts, and may have lost any of them. An orderly stop comes in the middle of
/// another one, at any moment.
pub(super) fn parts_are_written_again_when_the_flush_behind_them_fails(
    context: &mut Context,
) -> Result<(), Violation> {
    for turns in 0..24 {
        let machine = context.machine(&setup())?;
        let machine = damage_below_much(machine, turns % 3)?;
        machine.with_outside(|outside| outside.base.faults.flush_percent = 100);
        let steps = [
            Step::Write(0, 8, 4, 0),
            Step::Turns(40),
            Step::Pass(1000),
            Step::Turns(turns),
        ];
        let machine = apply(machine, &steps)?;
        machine.with_outside(|outside| outside.base.faults = Faults::default());
        let machine = if turns < 12 {
            let machine = apply(machine, &[Step::Pass(10_000), Step::Turns(turns)])?;
            machine.restart(turns, |_| ())?
        } else {
            apply(machine, &[Step::Pass(10_000), Step::Drain])?
        };
        script::finish(&machine)?;
    }
    Ok(())
}

/// Keys are lost, and while what they named is written, more is written in places that were dealt with already.
pub(super) fn a_salvage_in_parts_is_overtaken_by_writes(
    context: &mut Context,
) -> Result<(), Violation> {
    for round in 0..16 {
        let mut prng = Prng::new(mix(context.seed, round));
        let setup = Setup {
            segment_count: 12,
            yield_percent: prng.pick(&[0, 10]),
            ..setup()
        };
        let weights = Weights {
            crash: 0,
            fault: 0,
            key_loss: 0,
            busy_percent: 30,
        };
        let mut steps = script::draw(&mut prng, &setup, weights, 30);
        for number in 0..16 {
            steps.extend([Step::Write(0, number * 6, 3, 0), Step::Core(0)]);
        }
        steps.extend([Step::Settle, Step::LoseKeys(prng.below(1 << 32))]);
        for _ in 0..prng.between(4, 30) {
            steps.push(Step::Write(1, prng.below(24), 2, 0));
            steps.extend([Step::Core(1), Step::Base(prng.below(4))]);
            steps.push(Step::Background(prng.between(1, 20)));
            if prng.percent(10) {
                steps.push(Step::CheckpointBegin(1));
            }
        }
        steps.push(match prng.below(3) {
            0 => Step::Drain,
            1 => Step::Restart(prng.below(1 << 32), 2),
            _ => Step::CutPower(prng.below(1 << 32), 2),
        });
        let machine = Machine::new(setup, mix(context.seed, round), None)?;
        script::finish(&apply(machine, &steps)?)?;
    }
    Ok(())
}
