//! Misses of parts of pages, which ask the base for whole ones. Item 42.

use super::{Context, apply, check, in_order, is_cached};
use crate::engine::{Fua, Op, Status};
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::Violation;
use crate::sim::script::Step;
use crate::units::Lba;
use std::sync::atomic::Ordering;

/// A fill of several pages has room.
fn setup() -> Setup {
    Setup {
        segment_size_bytes: 64 << 10,
        ..in_order()
    }
}

/// Which blocks the base is being asked for.
fn check_asked(machine: &Machine, expected: &[(u64, u64)]) -> Result<(), Violation> {
    let asked = machine.with_outside(|outside| outside.base.reads_in_flight());
    check(asked == expected, || {
        format!("the base is asked for {asked:?}, not {expected:?}")
    })
}

fn check_no_base_read(machine: &Machine) -> Result<(), Violation> {
    let count = machine.cache().base_reads.load(Ordering::Relaxed);
    check(count == 0, || format!("{count} base reads are under way"))
}

/// Reads one after the other, each of which begins in the middle of a page: each page is asked for once.
pub(super) fn a_miss_is_rounded_out_to_whole_pages(context: &mut Context) -> Result<(), Violation> {
    context.cut(&setup(), |machine| {
        machine.read(0, 7, 8, &[700]);
        machine.poll_core(0);
        check_asked(&machine, &[(0, 16)])?;
        // While the first is under way, and after it.
        machine.read(0, 15, 8, &[1, 512]);
        machine.poll_core(0);
        check_asked(&machine, &[(0, 16), (16, 8)])?;
        machine.settle()?;
        machine.read(1, 23, 8, &[]);
        machine.poll_core(1);
        check_asked(&machine, &[(24, 8)])?;
        machine.settle()?;
        machine.read(1, 0, 32, &[]);
        machine.settle()?;
        let stats = machine.cache().stats();
        let reads = (stats.read_hits, stats.read_partial_hits, stats.read_misses);
        let bytes = (
            stats.base_read_bytes,
            stats.joined_read_bytes,
            stats.fill_bytes,
        );
        check(
            reads == (1, 1, 2) && bytes == (32 * 512, 512, 32 * 512),
            || format!("{stats:?}"),
        )?;
        check_no_base_read(&machine)?;
        Ok(machine)
    })
}

/// Dirty, clean, zeroed: whatever the index knows of a page, the base may have something older (INV-READ-3).
pub(super) fn a_page_of_which_anything_is_known_is_not_rounded_out(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&setup(), |machine| {
        machine.write(1, 2, 1, Fua::No, &[]);
        let machine = apply(machine, &[Step::Drain])?;
        machine.write(1, 17, 1, Fua::No, &[]);
        machine.clear(1, Op::WriteZeroes, 39, 1);
        machine.settle()?;
        for (lba, len_blocks, asked) in [
            // Clean, and nothing.
            (4, 6, (4, 12)),
            // Dirty before it; behind it.
            (18, 2, (18, 2)),
            (16, 1, (16, 1)),
            // Nothing, and zeroes.
            (30, 8, (24, 14)),
        ] {
            machine.read(0, lba, len_blocks, &[]);
            machine.poll_core(0);
            check_asked(&machine, &[asked])?;
            machine.settle()?;
        }
        machine.read(1, 0, 48, &[]);
        machine.settle()?;
        Ok(machine)
    })
}

/// A write that overlaps nothing of a miss but the rest of its page goes before the fill; the reader gets its blocks.
pub(super) fn a_write_of_the_rest_of_a_page_drops_the_fill_alone(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&setup(), |machine| {
        machine.read(0, 18, 2, &[]);
        machine.poll_core(0);
        check_asked(&machine, &[(16, 8)])?;
        machine.write(1, 22, 2, Fua::No, &[]);
        machine.poll_core(1);
        machine.settle()?;
        let cached = (is_cached(&machine, Lba(18)), is_cached(&machine, Lba(22)));
        let stats = machine.cache().stats();
        check(cached == (false, true) && stats.fills_dropped == 1, || {
            format!("blocks 18 and 22 are cached: {cached:?}; {stats:?}")
        })?;
        machine.read(0, 16, 8, &[]);
        machine.settle()?;
        Ok(machine)
    })
}

/// A block of the base cannot be read: whoever did not ask for it does not hear of it, but for the time it takes.
pub(super) fn an_error_beside_a_miss_is_not_its_own(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&setup(), |machine| {
        machine.with_outside(|outside| outside.base.faults.bad_block = Some(16));
        // The second joins the first.
        machine.read(0, 17, 4, &[]);
        machine.read(0, 18, 2, &[]);
        machine.poll_core(0);
        check_asked(&machine, &[(16, 8)])?;
        machine.complete_base();
        machine.poll_core(0);
        check_asked(&machine, &[(18, 2), (17, 4)])?;
        machine.settle()?;
        check_no_base_read(&machine)?;
        check(is_cached(&machine, Lba(20)), || {
            "what could be read is not put into the cache".to_owned()
        })?;
        machine.with_outside(|outside| outside.base.faults.bad_block = Some(32));
        // This one has asked for it.
        machine.read(0, 32, 2, &[]);
        machine.settle()?;
        check_no_base_read(&machine)?;
        let statuses: Vec<_> = machine
            .take_completed()
            .iter()
            .map(|end| end.status)
            .collect();
        check(
            statuses == [Status::Success, Status::Success, Status::Failed],
            || format!("{statuses:?}"),
        )?;
        let bytes = machine.cache().stats().base_read_bytes;
        check(bytes == 512 * (8 + 4 + 2 + 8 + 2), || {
            format!("{bytes} bytes were asked for")
        })?;
        Ok(machine)
    })
}

/// The last page of the base may be a part of one, and become a whole one.
pub(super) fn nothing_behind_the_end_of_the_base_comes_along(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        block_count: 93,
        block_count_first: Some(45),
        ..setup()
    };
    context.cut(&setup, |machine| {
        machine.read(0, 43, 1, &[]);
        machine.poll_core(0);
        check_asked(&machine, &[(40, 5)])?;
        machine.settle()?;
        let machine = apply(machine, &[Step::Grow, Step::Turns(4)])?;
        for (lba, asked) in [(46, (46, 1)), (90, (88, 5)), (50, (48, 8))] {
            machine.read(0, lba, 1, &[]);
            machine.poll_core(0);
            check_asked(&machine, &[asked])?;
            machine.settle()?;
        }
        Ok(machine)
    })
}
