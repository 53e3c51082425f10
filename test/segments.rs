//! Segments and their uses, one after the other.

use pcache::engine::{Fua, Op};
use pcache::sim::machine::{Machine, Setup};
use pcache::sim::model::Violation;

/// Write-back watches an open segment. While a batch takes its time, the segment may be sealed, reclaimed
/// and opened again.
#[test]
fn a_segment_that_is_used_again_during_a_batch_is_written_back_from_its_new_start()
-> Result<(), Violation> {
    let setup = Setup {
        block_size_bytes: 4096,
        block_count: 64,
        gc_percent: 0,
        yield_percent: 0,
        // None is kept free.
        segment_count: 7,
        ..Setup::default()
    };
    let segment_count = setup.segment_count;
    let machine = Machine::new(setup, 1, None)?;
    // A segment has room for one block.
    machine.write(0, 0, 1, Fua::No, &[]);
    machine.drain()?;
    // A batch gets stuck.
    machine.with_outside(|outside| outside.base.faults.stuck = true);
    machine.write(1, 1, 1, Fua::No, &[]);
    machine.pass_ms(10_000);
    machine.settle()?;
    // The first segment is sealed and reclaimed, and its turn comes again; then it gets several ksets.
    for lba in 2..=segment_count {
        machine.write(0, lba, 1, Fua::No, &[]);
        (0..20).for_each(|_| machine.poll_all());
    }
    for lba in 40..44 {
        machine.clear(0, Op::Unmap, lba, 1);
        machine.settle()?;
    }
    machine.with_outside(|outside| outside.base.faults.stuck = false);
    machine.drain()?;
    machine.check_drained()
}

/// Blocks that are read together are cached together, or not at all. No segment is given up for such as
/// never fit into one.
#[test]
fn a_read_larger_than_a_segment_uses_no_segment() -> Result<(), Violation> {
    let machine = Machine::new(Setup::default(), 1, None)?;
    let before = machine.cache().info().segments_free;
    machine.read(0, 0, 64, &[]);
    machine.settle()?;
    assert_eq!(machine.cache().info().segments_free, before);
    machine.verdict()
}
