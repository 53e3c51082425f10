//! What is acknowledged is there: items 1 to 4, and 24.

use super::{Context, apply, in_order};
use crate::sim::machine::Setup;
use crate::sim::model::Violation;
use crate::sim::script::{Step, finish};

/// Writes of all lengths and alignments, each alone in its batch.
pub(super) fn an_acknowledged_write_survives_a_cut_at_any_moment(
    context: &mut Context,
) -> Result<(), Violation> {
    let mut steps = Vec::new();
    for round in 0..12 {
        let (lba, len) = (round * 7 % 83, 1 + round % 8);
        steps.extend([
            Step::Write(0, lba, len, 100),
            Step::Core(0),
            Step::Write(1, (lba + 3) % 88, 8, 513),
            Step::Core(1),
            Step::Background(2),
            Step::Base(2),
        ]);
    }
    context.cut_script(&in_order(), &steps)
}

/// Three cores, some with a batch that is half done, some with requests that wait for one.
pub(super) fn a_flush_covers_the_open_batches_of_all_cores(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        core_count: 3,
        yield_percent: 25,
        ..Setup::default()
    };
    let mut steps = Vec::new();
    for round in 0..8 {
        for core in 0..3 {
            let lba = round * 5 + core as u64 * 2;
            steps.push(Step::Write(core, lba, 3, 700));
            steps.push(Step::Write(core, 60 + core as u64 * 8, 8, 0));
        }
        let core = round as usize % 3;
        steps.extend([Step::Core(core), Step::Flush(core), Step::Core(core)]);
        steps.extend([Step::Write(core, round, 1, 0), Step::Turns(1)]);
    }
    context.cut_script(&setup, &steps)
}

/// FUA writes across page borders, alone and between others of the same batch.
pub(super) fn a_fua_write_survives_alone_and_is_never_torn(
    context: &mut Context,
) -> Result<(), Violation> {
    let mut steps = Vec::new();
    for round in 0..6 {
        steps.extend([Step::WriteFua(0, round * 3 + 4, 8, 512), Step::Core(0)]);
        steps.extend([
            Step::Write(0, round * 3, 6, 0),
            Step::WriteFua(0, round * 3 + 4, 8, 100),
            Step::Write(0, round * 3 + 11, 5, 0),
            Step::Core(0),
            Step::Turns(2),
        ]);
    }
    context.cut_script(&in_order(), &steps)
}

/// A kset of many lines, over older ksets of the same blocks: nothing of it counts until all of it does.
pub(super) fn a_torn_kset_is_no_kset_and_hides_nothing_older(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        core_count: 1,
        ..in_order()
    };
    let mut steps = Vec::new();
    for round in 0..5 {
        // Eleven keys: 296 bytes, in five lines.
        for number in 0..11 {
            steps.push(Step::Write(0, (number * 8 + round) % 90, 1, 0));
        }
        steps.push(Step::Core(0));
    }
    let limits = context.limits;
    context.limits.lines_max = limits.lines_max.max(16);
    context.limits.random_images *= 4;
    context.limits.lazy_runs_max *= 4;
    let result = context.cut_script(&setup, &steps);
    context.limits = limits;
    result
}

/// The stores of a process that dies are in the caches of the processor: not even an acknowledgement that was
/// on its way may be wrong.
pub(super) fn a_kill_after_any_step_loses_nothing(context: &mut Context) -> Result<(), Violation> {
    let setup = Setup {
        yield_percent: 15,
        ..Setup::default()
    };
    let mut steps = Vec::new();
    for round in 0..10 {
        steps.extend([
            Step::Write(0, round * 4, 8, 200),
            Step::Write(1, round * 4 + 2, 4, 0),
            Step::Core(1),
            Step::Unmap(0, round * 4 + 5, 9),
            Step::Core(0),
            Step::Turns(2),
        ]);
    }
    steps.push(Step::DrainStart);
    steps.extend([Step::Background(4), Step::Base(1), Step::Background(2)]);
    for end in 1..=steps.len() {
        let machine = apply(context.machine(&setup)?, &steps[..end])?;
        let dice = context.seed + end as u64;
        let machine = machine.kill(dice, |setup| setup.core_count = 1 + end % 3)?;
        finish(&machine)?;
    }
    Ok(())
}
