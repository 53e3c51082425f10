//! UNMAP and WRITE_ZEROES: item 23.

use super::{Context, apply, check, in_order, is_cached};
use crate::engine::{BaseCaps, DataCrc, WritebackOrder};
use crate::sim::machine::Setup;
use crate::sim::model::Violation;
use crate::sim::script::Step;
use crate::units::Lba;

/// Dirty, clean, partly cached and uncached ranges, over all that a base may know of unmap.
pub(super) fn unmapped_data_do_not_come_back(context: &mut Context) -> Result<(), Violation> {
    let seed = context.seed;
    for (unmap, says_no) in [(true, false), (true, true), (false, false)] {
        let setup = Setup {
            base_caps: BaseCaps {
                unmap,
                ..Setup::default().base_caps
            },
            yield_percent: 5,
            ..Setup::default()
        };
        context.cut(&setup, |machine| {
            let machine = apply(
                machine,
                &[
                    Step::Write(0, 0, 8, 0),
                    Step::Write(1, 8, 8, 0),
                    Step::Write(0, 30, 4, 0),
                    Step::Drain,
                    Step::Write(0, 16, 8, 0),
                    Step::Write(1, 27, 5, 0),
                    Step::Settle,
                ],
            )?;
            machine.with_outside(|outside| outside.base.faults.unmap_unsupported = says_no);
            apply(
                machine,
                &[
                    // Clean; clean and dirty; dirty; cached in parts; not cached at all.
                    Step::Unmap(0, 2, 3),
                    Step::Unmap(1, 12, 8),
                    Step::Core(0),
                    Step::Core(1),
                    Step::Zero(0, 20, 15),
                    Step::Unmap(1, 60, 30),
                    Step::Turns(1),
                    Step::Write(1, 70, 3, 0),
                    Step::Unmap(0, 71, 1),
                    Step::Core(1),
                    Step::Core(0),
                    Step::CutPower(seed, 2),
                    Step::Read(0, 0, 40, 0),
                    Step::Read(1, 58, 34, 0),
                    Step::Settle,
                    Step::DrainStart,
                    Step::Background(4),
                    Step::Base(2),
                    Step::CutPower(seed + 1, 2),
                    Step::Unmap(0, 0, 96),
                    Step::Settle,
                    Step::Drain,
                ],
            )
        })?;
    }
    Ok(())
}

/// What was written and cleared before write-back came to it never goes to the base: the clearing does, in one
/// operation, and no payload.
pub(super) fn dirty_data_under_an_unmap_are_not_written_back(
    context: &mut Context,
) -> Result<(), Violation> {
    // All of it fits into one batch.
    let setup = Setup {
        segment_size_bytes: 64 << 10,
        segment_count: 16,
        ..in_order()
    };
    for clear in [Step::Unmap(1, 0, 64), Step::Zero(1, 0, 64)] {
        context.cut(&setup, |machine| {
            let mut steps: Vec<Step> = (0..8)
                .flat_map(|at| [Step::Write(0, at * 8, 8, 0), Step::Core(0)])
                .collect();
            steps.extend([Step::Settle, clear, Step::Settle]);
            let machine = apply(machine, &steps)?;
            let logged = machine.cache().stats();
            machine.drain()?;
            let stats = machine.cache().stats();
            check(
                stats.writeback_bytes == 0 && stats.absorbed_bytes == logged.write_bytes,
                || format!("{clear:?} left something to write: {stats:?}"),
            )?;
            Ok(machine)
        })?;
    }
    Ok(())
}

/// The base is writing the very blocks when they are cleared, and its answer comes afterwards; it fails on the
/// way, too. Then the segment with the clearing is reclaimed, and the blocks are read from the base.
pub(super) fn a_range_that_is_cleared_while_it_is_written_back_stays_cleared(
    context: &mut Context,
) -> Result<(), Violation> {
    let seed = context.seed;
    for (order, data_crc) in [
        (WritebackOrder::Strict, DataCrc::On),
        (WritebackOrder::Relaxed, DataCrc::Off),
    ] {
        let setup = Setup {
            order,
            data_crc,
            gc_percent: 0,
            ..in_order()
        };
        context.cut(&setup, |machine| {
            let mut steps = Vec::new();
            for at in [0, 8, 20, 28, 40, 48] {
                steps.extend([Step::Write(0, at, 8, 0), Step::Core(0)]);
            }
            // The writes of the batch are at the base, unanswered.
            steps.extend([Step::Settle, Step::DrainStart, Step::Background(4)]);
            steps.extend([
                Step::Unmap(1, 2, 10),
                Step::Core(1),
                Step::Zero(0, 24, 8),
                Step::Core(0),
                Step::Write(1, 26, 2, 0),
                Step::Core(1),
                Step::Read(0, 0, 56, 0),
                Step::Core(0),
                Step::Base(2),
                Step::Background(2),
            ]);
            steps.extend([Step::Faults(100, 0, 0), Step::Base(8), Step::Background(2)]);
            steps.extend([Step::Zero(1, 40, 16), Step::Core(1), Step::Heal]);
            steps.extend([Step::Pass(200), Step::Turns(4), Step::CutPower(seed, 2)]);
            steps.extend([Step::Read(0, 0, 56, 0), Step::Settle, Step::Drain]);
            let machine = apply(machine, &steps)?;
            // Other data push the clearings out.
            let mut steps = Vec::new();
            for round in 0..10 {
                steps.extend([Step::Write(0, 60 + round % 4 * 8, 8, 0), Step::Drain]);
            }
            steps.push(Step::Turns(20));
            let machine = apply(machine, &steps)?;
            check(!is_cached(&machine, Lba(4)), || {
                "the segment of an unmap is not reclaimed".to_owned()
            })?;
            apply(machine, &[Step::Read(1, 0, 56, 0), Step::Settle])
        })?;
    }
    Ok(())
}
