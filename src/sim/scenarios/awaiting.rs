//! Misses of different cores: one of them asks the base, the others wait for what it puts into the cache. Item 31.

use super::{Context, check, in_order};
use crate::engine::{Fua, Status};
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::Violation;

fn bases_asked(machine: &Machine) -> usize {
    machine.with_outside(|outside| outside.base.in_flight())
}

/// Equal, inside of the first, over its end, over its start: nothing is asked for twice, and nothing that was read is
/// dropped.
pub(super) fn misses_of_different_cores_share_a_base_read(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        // So that 12 blocks may be kept.
        segment_size_bytes: 64 << 10,
        ..in_order()
    };
    context.cut(&setup, |machine| {
        machine.read(0, 16, 8, &[]);
        machine.poll_core(0);
        for (lba, len) in [(16, 8), (19, 2), (20, 12), (12, 8)] {
            machine.read(1, lba, len, &[700]);
        }
        machine.poll_core(1);
        let asked = bases_asked(&machine);
        check(asked == 2, || format!("{asked} base reads, not 2"))?;
        machine.settle()?;
        let stats = machine.cache().stats();
        check(
            (stats.base_read_bytes, stats.fill_bytes) == (3 * 8 * 512, 3 * 8 * 512),
            || format!("{stats:?}"),
        )?;
        let reads = (
            stats.read_hits,
            stats.read_partial_hits,
            stats.read_misses,
            stats.awaited_reads,
        );
        check(reads == (2, 2, 1, 4), || format!("{reads:?}"))?;
        Ok(machine)
    })
}

/// The base fails, or a write is faster than the fill: whoever has waited looks for himself.
pub(super) fn a_read_that_has_waited_in_vain_asks_for_itself(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&in_order(), |machine| {
        for core in 0..2 {
            machine.read(core, 16, 8, &[]);
            machine.poll_core(core);
        }
        machine.with_outside(|outside| outside.base.faults.read_percent = 100);
        machine.complete_base();
        machine.with_outside(|outside| outside.base.faults.read_percent = 0);
        machine.settle()?;
        let ends = machine.take_completed();
        let statuses: Vec<Status> = ends.iter().map(|end| end.status).collect();
        check(statuses == [Status::Failed, Status::Success], || {
            format!("{ends:?}")
        })?;
        for core in 0..2 {
            machine.read(core, 40, 8, &[]);
            machine.poll_core(core);
        }
        machine.write(1, 42, 2, Fua::No, &[]);
        machine.poll_core(1);
        machine.complete_base();
        machine.poll_core(0);
        machine.poll_core(1);
        // Of the page only what was written is known.
        let asked = bases_asked(&machine);
        check(asked == 2, || {
            format!("{asked} base reads around a write, not 2")
        })?;
        let stats = machine.cache().stats();
        check((stats.awaited_reads, stats.fills_dropped) == (2, 1), || {
            format!("{stats:?}")
        })?;
        Ok(machine)
    })
}

/// That the base has answered is not yet enough: the data are found when they are published.
pub(super) fn a_read_waits_until_the_fill_is_published(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&in_order(), |machine| {
        machine.read(0, 16, 8, &[]);
        machine.poll_core(0);
        machine.complete_base();
        machine.read(0, 16, 8, &[]);
        machine.poll_core(0);
        machine.settle()?;
        let stats = machine.cache().stats();
        check(stats.base_read_bytes == 8 * 512, || {
            format!("the base is asked for what has arrived: {stats:?}")
        })?;
        Ok(machine)
    })
}
