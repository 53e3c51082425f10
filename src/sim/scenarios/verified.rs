//! Reads that are compared with checksums: item 46.

use super::reads::{read_aside, read_of};
use super::{Context, apply, check, in_order, is_cached, place_of};
use crate::engine::{Cache, DataCrc, FormatPolicy, Fua, Setting, SettingChange, Status};
use crate::media::Place;
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::Violation;
use crate::sim::pmem::SimPmem;
use crate::sim::recover;
use crate::sim::script::{self, Step};
use crate::units::Lba;
use std::sync::Arc;

/// Nobody else looks for damage.
fn setup(block_size_bytes: u32) -> Setup {
    Setup {
        block_size_bytes,
        data_crc: DataCrc::On,
        segment_size_bytes: 64 << 10,
        segment_count: 16,
        gc_percent: 90,
        settings: SettingChange::of(Setting::VerifyReads, 1).and(Setting::ScrubMibS, 0),
        ..in_order()
    }
}

fn place(machine: &Machine, lba: u64) -> Result<Place, Violation> {
    place_of(machine, Lba(lba)).ok_or_else(|| Violation(format!("block {lba} is not cached")))
}

/// Flips a bit of a block.
fn flip(machine: &Machine, lba: u64) -> Result<(), Violation> {
    let off = machine.cache().geometry.place_off(place(machine, lba)?);
    machine.pmem().flip_bit(off.plus(77), 5);
    Ok(())
}

/// Reads blocks on a core, one by one; the machine compares, and takes no failure for granted. Returns how many of
/// them came from the base.
fn read_each(machine: &Machine, core: usize, lbas: &[u64]) -> Result<u64, Violation> {
    let size = u64::from(machine.setup().block_size_bytes);
    let bytes = || machine.cache().stats().base_read_bytes;
    let before = bytes();
    for lba in lbas {
        machine.read(core, *lba, 1, &[100]);
        machine.settle()?;
        machine.verdict()?;
    }
    Ok((bytes() - before) / size)
}

/// The blocks of `lbas` whose read fails, in channels of their own.
fn failing(cache: &Arc<Cache<SimPmem>>, lbas: &[u64]) -> Result<Vec<u64>, Violation> {
    let mut failing = Vec::new();
    for lba in lbas {
        if read_of(cache, *lba, 1)? == Status::Failed {
            failing.push(*lba);
        }
    }
    Ok(failing)
}

/// What has the same fate as block 12, and what has not, of what was [`written`].
fn blocks(block_size_bytes: u32) -> (Vec<u64>, Vec<u64>) {
    if block_size_bytes == 512 {
        (vec![8, 9, 12, 13, 14], vec![10, 11, 15, 16, 17])
    } else {
        (vec![12], vec![9, 10, 11, 13, 14])
    }
}

/// Blocks of which the middle is overwritten, with small blocks within one payload, and others behind them.
fn written(block_size_bytes: u32) -> [Step; 5] {
    let [first, second] = if block_size_bytes == 512 {
        [(8, 7), (15, 3)]
    } else {
        [(9, 4), (13, 2)]
    };
    [
        Step::Write(0, first.0, first.1, 0),
        Step::Write(0, second.0, second.1, 0),
        Step::Settle,
        Step::Write(1, 10, 2, 0),
        Step::Settle,
    ]
}

/// Of clean data: the base has them. In use, and after a start, which takes the checksums from the log.
pub(super) fn a_flipped_bit_of_clean_data_reaches_no_reader(
    context: &mut Context,
) -> Result<(), Violation> {
    for size in [512, 4096] {
        let (same, others) = blocks(size);
        let mut machine = apply(context.machine(&setup(size))?, &written(size))?;
        machine.drain()?;
        for restarted in [false, true] {
            if restarted {
                machine = machine.kill(context.seed, |_| ())?;
            } else {
                flip(&machine, 12)?;
            }
            for core in 0..2 {
                let from_base = read_each(&machine, core, &same)?;
                let expected = same.len() as u64;
                check(from_base == expected, || {
                    format!("{from_base} blocks come from the base, not {expected}")
                })?;
                let from_base = read_each(&machine, core, &others)?;
                check(from_base == 0, || {
                    format!("{from_base} blocks beside the damage come from the base")
                })?;
            }
            let stats = machine.cache().stats();
            let expected = 2 * same.len() as u64;
            check(stats.crc_errors == expected && stats.failed == 0, || {
                format!("not {expected} wrong checksums: {stats:?}")
            })?;
            // All at once: what is well comes from the cache.
            let before = machine.cache().stats().hit_bytes;
            machine.read(0, 9, 6, &[5000]);
            machine.settle()?;
            let hits = (machine.cache().stats().hit_bytes - before) / u64::from(size);
            check(hits > 0, || "nothing of it is a hit".to_owned())?;
            machine.lend(1, 12, 1, 1);
            machine.lend(1, 10, 2, 1);
            machine.settle()?;
            let lent = machine.cache().stats().lent_reads;
            check(lent == 1, || format!("{lent} pieces are lent, not one"))?;
            check(machine.cache().info().damaged.is_empty(), || {
                "clean data count as lost".to_owned()
            })?;
        }
        script::finish(&machine)?;
    }
    Ok(())
}

/// Of dirty data: exactly what the checksum covers fails, and is told, until it is overwritten. A start finds the same.
pub(super) fn a_flipped_bit_of_dirty_data_fails_what_its_checksum_covers(
    context: &mut Context,
) -> Result<(), Violation> {
    for size in [512, 4096] {
        let machine = apply(context.machine(&setup(size))?, &written(size))?;
        flip(&machine, 12)?;
        check_failing(machine.cache(), size)?;
        machine.lend(1, 12, 1, 1);
        machine.settle()?;
        let lent = machine.cache().stats().lent_reads;
        check(lent == 0, || "what is damaged is lent".to_owned())?;
        // A machine that starts has no damage.
        let image = SimPmem::from_image(machine.pmem().live_image());
        let base = machine.with_outside(|outside| outside.base.current_image());
        let options = machine.setup().options(FormatPolicy::Never);
        let started = recover::open(image, options, |lba, len| base.blocks(lba, len));
        let started =
            started.map_err(|error| Violation(format!("the cache is refused: {error}")))?;
        check_failing(&started, size)?;
        let steps = [Step::Write(0, 8, 4, 0), Step::Write(1, 12, 3, 0)];
        let machine = apply(apply(machine, &steps)?, &[Step::Settle, Step::Turns(30)])?;
        let (same, _) = blocks(size);
        check(failing(machine.cache(), &same)?.is_empty(), || {
            "what was overwritten fails".to_owned()
        })?;
        script::finish(&machine)?;
        a_flipped_bit_beside_dirty_data_reaches_no_reader(context, size)?;
    }
    Ok(())
}

/// Of clean data in a segment, and in a kset, with dirty data: the keys tell them apart (INV-READ-7), and after a start.
fn a_flipped_bit_beside_dirty_data_reaches_no_reader(
    context: &mut Context,
    block_size_bytes: u32,
) -> Result<(), Violation> {
    // So few segments that fills lie among what was written.
    let few = Setup {
        segment_count: 8,
        ..setup(block_size_bytes)
    };
    let machine = context.machine(&few)?;
    let machine = apply(machine, &[Step::Write(0, 20, 1, 0), Step::Drain])?;
    machine.read(0, 40, 1, &[]);
    machine.poll_core(0);
    machine.complete_base();
    machine.write(0, 12, 1, Fua::No, &[]);
    let batches = || machine.cache().stats().batches;
    let before = batches();
    machine.settle()?;
    let segment = |lba| place(&machine, lba).map(|at| machine.cache().geometry.segment_of(at));
    check(
        batches() == before + 1 && segment(40)? == segment(12)? && segment(20)? == segment(12)?,
        || "they lie apart".to_owned(),
    )?;
    flip(&machine, 20)?;
    flip(&machine, 40)?;
    check_from_base(&machine, &[20, 40])?;
    // There it is not known what the segment was for, and the tail is below all but the first.
    let machine = machine.kill(context.seed, |_| ())?;
    check_from_base(&machine, &[20, 40])?;
    flip(&machine, 12)?;
    let found = failing(machine.cache(), &[12])?;
    let told = machine.cache().info().damaged;
    check(
        found == [12] && told.len() == 1 && (told[0].lba, told[0].len_blocks) == (12, 1),
        || format!("{found:?} fails, and {told:?} is told"),
    )?;
    let machine = apply(machine, &[Step::Write(0, 12, 1, 0), Step::Settle])?;
    script::finish(&machine)
}

/// Each of these blocks comes from the base, and none counts as lost.
fn check_from_base(machine: &Machine, lbas: &[u64]) -> Result<(), Violation> {
    let from_base = read_each(machine, 0, lbas)?;
    let told = machine.cache().info().damaged;
    check(from_base == lbas.len() as u64 && told.is_empty(), || {
        format!("{from_base} blocks of {lbas:?} come from the base, and {told:?} counts as lost")
    })
}

/// Of what was [`written`], after a bit of block 12 has flipped.
fn check_failing(cache: &Arc<Cache<SimPmem>>, block_size_bytes: u32) -> Result<(), Violation> {
    let (same, others) = blocks(block_size_bytes);
    let found = failing(cache, &[others.as_slice(), &same].concat())?;
    check(found == same, || {
        format!("blocks {found:?} fail, not {same:?}")
    })?;
    let stats = cache.stats();
    check(stats.crc_errors == 1, || {
        format!("one payload is damaged: {stats:?}")
    })?;
    let told = cache.info().damaged;
    let told: Vec<u64> = told
        .iter()
        .flat_map(|range| range.lba..range.lba + range.len_blocks)
        .collect();
    check(told == same, || format!("{told:?} is told"))?;
    check(failing(cache, &[12, 12])?.len() == 2, || {
        "it does not stay so".to_owned()
    })
}

/// The checksums are at hand when the setting is switched on, and without it nobody asks for them. A cache that keeps none
/// refuses it.
pub(super) fn reads_are_verified_from_the_moment_that_says_so(
    context: &mut Context,
) -> Result<(), Violation> {
    let verify = |on: u32| SettingChange::of(Setting::VerifyReads, on);
    let setup = Setup {
        settings: SettingChange::of(Setting::ScrubMibS, 0),
        ..setup(512)
    };
    let machine = apply(context.machine(&setup)?, &written(512))?;
    machine.drain()?;
    flip(&machine, 12)?;
    let counts = |machine: &Machine| {
        let stats = machine.cache().stats();
        (stats.verified_bytes, stats.crc_errors)
    };
    read_aside(&machine, 12, 1)?;
    check(counts(&machine) == (0, 0), || {
        "a read is verified unasked".to_owned()
    })?;
    machine.change_settings(verify(1));
    check(read_each(&machine, 0, &[12])? == 1, || {
        "a flipped bit is read".to_owned()
    })?;
    check(counts(&machine) == (7 * 512, 1), || {
        format!("counted {:?}", counts(&machine))
    })?;
    // It is kept, and the machine does not say it again.
    machine.poll_background();
    let machine = machine.kill(context.seed, |_| ())?;
    check(read_each(&machine, 1, &[12])? == 1, || {
        "a flipped bit is read after a start".to_owned()
    })?;
    script::finish(&machine)?;

    let without = Setup {
        data_crc: DataCrc::Off,
        settings: SettingChange::default(),
        ..setup
    };
    let machine = context.machine(&without)?;
    let told = machine.cache().change_settings(&verify(1));
    let told = told.map_err(|error| error.to_string());
    check(
        told.as_ref()
            .is_err_and(|text| text.contains("data_crc is false")),
        || format!("without checksums it is {told:?}"),
    )?;
    check(!machine.cache().settings.verifies_reads(), || {
        "it was refused, and holds".to_owned()
    })?;
    for format in [true, false] {
        let mut setup = without.clone();
        setup.settings = verify(1);
        let result = if format {
            context.machine(&setup).map(drop)
        } else {
            let machine = context.machine(&without)?;
            machine.kill(context.seed, |now| *now = setup).map(drop)
        };
        let is_refused = |violation: &Violation| violation.0.contains("data_crc is false");
        check(result.as_ref().is_err_and(is_refused), || {
            format!("without checksums it starts: {result:?}")
        })?;
    }
    Ok(())
}

/// What reclaiming has moved has its checksum at its new place, and what takes the old one has its own. Long reads of one
/// core go on while segments go round.
pub(super) fn what_reclaiming_has_moved_is_verified(
    context: &mut Context,
) -> Result<(), Violation> {
    const PAGE: u64 = 8;
    const PAGES: u64 = 24;
    let setup = Setup {
        segment_size_bytes: 32 << 10,
        block_count: 400,
        yield_percent: 10,
        ..setup(512)
    };
    let mut steps = Vec::new();
    for keep in [false, true] {
        for page in (0..PAGES).filter(|page| !keep || page % 3 != 0) {
            steps.extend([Step::Write(0, page * PAGE, PAGE, 0), Step::Core(0)]);
        }
    }
    // Parts of what is going to be copied.
    for page in (0..PAGES).step_by(6) {
        steps.push(Step::Write(1, page * PAGE + 6, 2, 0));
    }
    steps.extend([Step::Drain, Step::GcPercent(45), Step::Turns(40)]);
    let machine = apply(context.machine(&setup)?, &steps)?;
    let stats = machine.cache().stats();
    check(stats.gc_copied_bytes > 0 && stats.crc_errors == 0, || {
        format!("nothing is copied: {stats:?}")
    })?;
    let lbas: Vec<u64> = (0..PAGES * PAGE).collect();
    check(
        lbas.iter().all(|lba| is_cached(&machine, Lba(*lba)))
            && read_each(&machine, 0, &lbas)? == 0,
        || "something is not read from the cache".to_owned(),
    )?;
    flip(&machine, 3 * PAGE + 2)?;
    let copied: Vec<u64> = (3 * PAGE..4 * PAGE).collect();
    check(read_each(&machine, 1, &copied)? == PAGE, || {
        "a flipped bit in a copy is read".to_owned()
    })?;
    // Before reclaiming meets it: that would be one more.
    let overwritten = [Step::Write(0, 3 * PAGE, PAGE, 0), Step::Settle];
    let machine = apply(machine, &overwritten)?;
    let mut steps = vec![Step::GcPercent(0)];
    for round in 0..40 {
        steps.extend([
            Step::Write(0, round * 7 % 180, 7, 0),
            Step::Read(1, round * 5 % 90, 60, 0),
            Step::DrainStart,
            Step::Turns(2),
        ]);
    }
    steps.push(Step::Settle);
    let machine = apply(machine, &steps)?;
    let stats = machine.cache().stats();
    check(
        stats.segments_reclaimed > 16 && stats.crc_errors == PAGE,
        || format!("not once round, or with wrong checksums: {stats:?}"),
    )?;
    script::finish(&machine)
}
