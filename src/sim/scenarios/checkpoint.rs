//! Checkpoints: item 14.

use super::{Context, apply, check, heal};
use crate::engine::{CheckpointError, CheckpointState, CheckpointStatus, Fua, WritebackOrder};
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::Violation;
use crate::sim::script::Step;

/// Turns within which a base that is well gets to a cut.
const TURNS_TO_CUT: u32 = 3000;

fn setup(order: WritebackOrder) -> Setup {
    Setup {
        order,
        segment_count: 10,
        gc_percent: 10,
        yield_percent: 10,
        ..Setup::default()
    }
}

fn status(machine: &Machine) -> CheckpointStatus {
    machine.cache().checkpoint_status(machine.now())
}

fn hold(machine: &Machine) -> Result<(), Violation> {
    for _ in 0..TURNS_TO_CUT {
        if status(machine).state == CheckpointState::Holding {
            return machine.verdict();
        }
        machine.poll_all();
    }
    Err(Violation(format!("no cut: {:?}", status(machine))))
}

/// Overwrites, zeroes and barriers of two cores.
fn load(round: u64) -> Vec<Step> {
    let lba = round * 7 % 60;
    vec![
        Step::Write(0, lba, 6, 0),
        Step::Write(1, lba + 3, 6, 0),
        Step::Core(0),
        Step::Core(1),
        Step::Unmap(1, lba + 1, 3),
        Step::WriteFua(0, lba + 8, 2, 0),
        Step::Flush(0),
        Step::Core(0),
        Step::Core(1),
        Step::Base(2),
        Step::Background(2),
        Step::Read(1, (round * 31) % 80, 9, 0),
        Step::Turns(1),
    ]
}

/// Everything goes on while the base is held: writes, barriers, read misses, reclaiming, a drain, a change of
/// options; and a kill.
pub(super) fn a_checkpoint_holds_the_base_at_an_exact_cut(
    context: &mut Context,
) -> Result<(), Violation> {
    for order in [WritebackOrder::Strict, WritebackOrder::Relaxed] {
        let seed = context.seed;
        context.cut(&setup(order), |machine| {
            let mut steps: Vec<Step> = (0..3).flat_map(load).collect();
            // A base that fails on the way keeps it waiting.
            steps.extend([Step::Faults(60, 60, 0), Step::CheckpointBegin(3600)]);
            steps.extend((3..5).flat_map(load));
            let machine = apply(machine, &steps)?;
            heal(&machine);
            machine.pass_ms(6000);
            hold(&machine)?;
            let tail = machine.cache().info().dirty_tail;
            // Something is dirty in any case when the drain begins.
            let mut steps: Vec<Step> = (5..6).flat_map(load).collect();
            steps.extend([Step::DrainStart, Step::GcPercent(0), Step::Strict(false)]);
            steps.extend((6..8).flat_map(load));
            steps.extend([Step::Pass(6000), Step::Turns(20)]);
            let machine = apply(machine, &steps)?;
            let drain = machine.cache().drain_status();
            check(
                drain.in_progress && drain.error.is_some_and(|text| text.contains("checkpoint")),
                || "a drain does not say what it waits for".to_owned(),
            )?;
            check(
                status(&machine).state == CheckpointState::Holding
                    && machine.cache().info().dirty_tail == tail,
                || format!("{:?}", status(&machine)),
            )?;
            machine.checkpoint_end();
            machine.drain()?;
            let machine = apply(machine, &load(8))?;
            machine.checkpoint_begin(3600);
            hold(&machine)?;
            let machine = apply(machine, &load(9))?;
            let machine = machine.kill(seed, |_| ())?;
            check(status(&machine).state == CheckpointState::Idle, || {
                "a checkpoint has survived its process".to_owned()
            })?;
            Ok(machine)
        })?;
    }
    Ok(())
}

/// The cache fills up during a hold: writers wait, until the time limit.
pub(super) fn writers_wait_for_a_checkpoint_until_its_time_limit(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&setup(WritebackOrder::Strict), |machine| {
        machine.checkpoint_begin(5);
        hold(&machine)?;
        let mut number = 0;
        while machine.outstanding() == 0 && number < 1000 {
            machine.write(0, number % 12 * 8, 7, Fua::No, &[]);
            (0..3).for_each(|_| machine.poll_all());
            number += 1;
        }
        let state = status(&machine).state;
        check(
            machine.outstanding() > 0 && state == CheckpointState::Holding,
            || format!("{} requests wait, {state:?}", machine.outstanding()),
        )?;
        let busy = machine.cache().checkpoint_begin(5, machine.now());
        check(matches!(busy, Err(CheckpointError::Busy(_))), || {
            format!("a second checkpoint: {busy:?}")
        })?;
        machine.settle()?;
        let state = status(&machine).state;
        check(state == CheckpointState::Expired, || format!("{state:?}"))?;
        let ended = machine.cache().checkpoint_end(None, machine.now());
        check(
            matches!(ended, Err(CheckpointError::Expired { timeout_s: 5, .. })),
            || format!("a checkpoint that was lost ends with {ended:?}"),
        )?;
        let ended = machine.cache().checkpoint_end(None, machine.now());
        check(ended == Err(CheckpointError::Missing), || {
            format!("it ends twice: {ended:?}")
        })?;
        Ok(machine)
    })
}

/// The base is never without a batch: whenever one ends, the next one is ready.
pub(super) fn a_checkpoint_is_reached_although_batch_follows_batch(
    context: &mut Context,
) -> Result<(), Violation> {
    const ROUNDS: u64 = 8;
    for order in [WritebackOrder::Strict, WritebackOrder::Relaxed] {
        context.cut(&setup(order), |machine| {
            for round in 0..ROUNDS {
                if round == ROUNDS - 3 {
                    machine.checkpoint_begin(3600);
                }
                machine.write(0, round % 8 * 8, 7, Fua::No, &[]);
                (0..4).for_each(|_| machine.poll_core(0));
                machine.drain_start();
                (0..8).for_each(|_| machine.poll_background());
                // The batch of each round is ready before the one of the round before has ended.
                if round > 0 {
                    end_batch(&machine);
                }
            }
            check(status(&machine).state == CheckpointState::Holding, || {
                format!("no cut: {:?}", status(&machine))
            })?;
            machine.checkpoint_end();
            machine.drain()?;
            Ok(machine)
        })?;
    }
    Ok(())
}

/// To the moment at which the batch under way has ended.
fn end_batch(machine: &Machine) {
    let tail = machine.cache().info().dirty_tail;
    for _ in 0..64 {
        machine.complete_base();
        if machine.cache().info().dirty_tail != tail {
            return;
        }
        machine.poll_background();
    }
}
