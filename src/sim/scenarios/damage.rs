//! Dirty data that are lost, on memory that cannot be read or whose bits have flipped: items 32 and 33.

use super::reads::read_aside;
use super::{Context, apply, check, in_order, place_of};
use crate::engine::{DamagedRange, DataCrc, Fua, Health, Status, WritebackOrder};
use crate::sim::machine::{INITIAL, Machine, Setup};
use crate::sim::model::Violation;
use crate::sim::script::{self, Step};
use crate::units::{Lba, PmemOff};

/// How memory goes bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Poison,
    Flip,
}

fn setup() -> Setup {
    Setup {
        data_crc: DataCrc::On,
        order: WritebackOrder::Strict,
        core_count: 2,
        ..in_order()
    }
}

pub(super) fn spoil(machine: &Machine, lba: u64, way: Way) -> Result<PmemOff, Violation> {
    let place = place_of(machine, Lba(lba)).ok_or_else(|| Violation("not cached".to_owned()))?;
    let off = machine.cache().geometry.place_off(place).plus(77);
    match way {
        Way::Poison => machine.pmem().poison(off),
        Way::Flip => machine.pmem().flip_bit(off, 5),
    }
    Ok(off)
}

pub(super) fn drain_as_far_as_it_goes(machine: Machine) -> Result<Machine, Violation> {
    let turns = [Step::DrainStart, Step::Turns(60), Step::Pass(1000)];
    apply(apply(machine, &turns)?, &[Step::Turns(60)])
}

pub(super) fn check_degraded(machine: &Machine) -> Result<(), Violation> {
    let health = machine.cache().health();
    check(matches!(health, Health::Degraded(_)), || {
        format!("dirty data are lost, and the cache is {health:?}")
    })
}

/// The blocks of `range` that cannot be read.
fn failing(machine: &Machine, range: std::ops::Range<u64>) -> Result<Vec<u64>, Violation> {
    let mut failing = Vec::new();
    for lba in range {
        if read_aside(machine, lba, 1)? == Status::Failed {
            failing.push(lba);
        }
    }
    Ok(failing)
}

/// Two barriers with damage between them: what comes before goes to the base; the rest waits until the damaged
/// blocks are written again, and then goes there in one batch.
fn overwrite_heals(machine: Machine, way: Way) -> Result<Machine, Violation> {
    let steps = [
        Step::Write(0, 0, 3, 0),
        Step::Flush(0),
        Step::Settle,
        Step::Write(0, 8, 4, 0),
        Step::Flush(0),
        Step::Settle,
        Step::Write(1, 30, 2, 0),
        Step::Flush(1),
        Step::Settle,
    ];
    let machine = apply(machine, &steps)?;
    spoil(&machine, 9, way)?;
    let machine = drain_as_far_as_it_goes(machine)?;
    check_degraded(&machine)?;
    machine.with_outside(|outside| {
        let image = outside.base.current_image();
        let written = (0..3).all(|lba| image.stamp(lba) != Ok(INITIAL));
        check(written, || "what comes before damage waits".to_owned())?;
        let untouched = (8..12)
            .chain(30..32)
            .all(|lba| image.stamp(lba) == Ok(INITIAL));
        check(untouched, || "something overtook damage".to_owned())
    })?;
    // A checksum covers all blocks of its key, and tells nothing about one of them.
    let lost: Vec<u64> = if way == Way::Poison {
        vec![9]
    } else {
        (8..12).collect()
    };
    let found = failing(&machine, 8..12)?;
    check(found == lost, || {
        format!("blocks {found:?} fail, not {lost:?}")
    })?;
    let range = DamagedRange {
        lba: lost[0],
        len_blocks: lost.len() as u64,
    };
    let told = machine.cache().info().damaged;
    check(told == [range], || {
        format!("{told:?} is told, not {range:?}")
    })?;
    check(machine.cache().drain_status().error.is_some(), || {
        "the drain is silent".to_owned()
    })?;
    // Not all of it yet.
    let machine = if way == Way::Flip {
        let machine = apply(machine, &[Step::Write(1, 8, 2, 0), Step::Turns(30)])?;
        check_degraded(&machine)?;
        let left = machine.cache().info().damaged;
        check(left.len() == 1 && left[0].lba == 10, || format!("{left:?}"))?;
        machine
    } else {
        machine
    };
    // While it heals, barriers hold on the base at the end of the batch only.
    machine.with_outside(|outside| outside.relaxed = true);
    let machine = apply(
        machine,
        &[
            Step::Write(0, lost[0], lost.len() as u64, 0),
            Step::Settle,
            Step::Turns(60),
            Step::Drain,
        ],
    )?;
    let (info, health) = (machine.cache().info(), machine.cache().health());
    check(health == Health::Online && info.damaged.is_empty(), || {
        format!("not healed: {health:?}, {info:?}")
    })?;
    Ok(machine)
}

/// Memory that cannot be read, with a cut at every moment.
pub(super) fn an_overwrite_of_lost_dirty_data_lets_write_back_go_on(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&setup(), |machine| overwrite_heals(machine, Way::Poison))
}

/// A bit that has flipped. A crash would not forget that, as it does poison here: so there is none.
pub(super) fn an_overwrite_of_damaged_dirty_data_lets_write_back_go_on(
    context: &mut Context,
) -> Result<(), Violation> {
    let machine = overwrite_heals(context.machine(&setup())?, Way::Flip)?;
    script::finish(&machine)
}

/// Memory goes bad behind the look at it, while the base writes from it, and the base says no more than that it
/// has failed.
pub(super) fn an_error_of_the_memory_is_told_from_one_of_the_base(
    context: &mut Context,
) -> Result<(), Violation> {
    for data_crc in [DataCrc::On, DataCrc::Off] {
        let setup = Setup {
            data_crc,
            ..setup()
        };
        let machine = apply(
            context.machine(&setup)?,
            &[Step::Write(0, 8, 4, 0), Step::Settle, Step::Away(false)],
        )?;
        let machine = apply(machine, &[Step::DrainStart, Step::Turns(20)])?;
        let waiting = machine.with_outside(|outside| outside.base.in_flight());
        check(waiting > 0, || "nothing is being written".to_owned())?;
        let off = spoil(&machine, 10, Way::Poison)?;
        machine.with_outside(|outside| {
            outside.base.faults.stuck = false;
            outside.base.faults.write_percent = 100;
        });
        let machine = apply(
            machine,
            &[Step::Turns(20), Step::Pass(20_000), Step::Turns(20)],
        )?;
        check_degraded(&machine)?;
        let told = machine.cache().stats().base_write_errors;
        check(told == 0, || {
            format!("{told} errors of the memory count as the base's")
        })?;
        let found = failing(&machine, 8..12)?;
        check(found == [10], || format!("blocks {found:?} fail, not 10"))?;
        let machine = apply(
            machine,
            &[Step::Heal, Step::Write(0, 10, 1, 0), Step::Settle],
        )?;
        machine.pmem().heal(off);
        script::finish(&machine)?;
    }
    Ok(())
}

/// The base meets memory that cannot be read, and whoever looks behind it can. The first time all of it is taken again at once;
/// if that happens again, after a pause.
pub(super) fn memory_that_cannot_be_read_now_and_then_is_not_tried_without_a_pause(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        data_crc: DataCrc::Off,
        ..setup()
    };
    let steps = [
        Step::Write(0, 8, 4, 0),
        Step::Settle,
        Step::Away(false),
        Step::DrainStart,
    ];
    let machine = apply(context.machine(&setup)?, &steps)?;
    for round in 0..3 {
        machine.with_outside(|outside| outside.base.faults.stuck = true);
        if round > 0 {
            // The pause of the round before.
            machine.pass_ms(1000);
        }
        let machine = apply_turns(&machine, 20);
        let waiting = machine.with_outside(|outside| outside.base.in_flight());
        check(waiting > 0, || format!("{round}: nothing is being written"))?;
        let off = spoil(machine, 10, Way::Poison)?;
        machine.with_outside(|outside| {
            outside.base.faults.stuck = false;
            outside.base.faults.write_percent = 100;
        });
        while machine.with_outside(|outside| outside.base.in_flight()) > 0 {
            machine.poll_all();
        }
        machine.pmem().heal(off);
        machine.with_outside(|outside| {
            outside.base.faults.stuck = true;
            outside.base.faults.write_percent = 0;
        });
        let waiting = apply_turns(machine, 20).with_outside(|outside| outside.base.in_flight());
        check((waiting > 0) == (round == 0), || {
            format!("{round}: {waiting} operations are under way at once")
        })?;
        let health = machine.cache().health();
        let is_told = matches!(health, Health::WritebackFailing(_));
        check(is_told == (round > 0), || format!("{round}: {health:?}"))?;
    }
    machine.with_outside(|outside| outside.base.faults.stuck = false);
    machine.pass_ms(1000);
    let machine = apply(machine, &[Step::Turns(60)])?;
    let (health, stats) = (machine.cache().health(), machine.cache().stats());
    let is_well = health == Health::Online && stats.base_write_errors == 0;
    check(is_well, || format!("{health:?}, {stats:?}"))?;
    check(machine.cache().info().damaged.is_empty(), || {
        "nothing is lost".to_owned()
    })?;
    script::finish(&machine)
}

fn apply_turns(machine: &Machine, count: usize) -> &Machine {
    (0..count).for_each(|_| machine.poll_all());
    machine
}

/// Writes beside the damaged page until one waits for room on each core.
fn fill_up_behind_damage(machine: &Machine) -> Result<(), Violation> {
    let places = machine.setup().block_count / 8;
    for core in 0..2 {
        for number in 0..1000 {
            machine.write(core, (2 + number % (places - 2)) * 8, 7, Fua::No, &[]);
            (0..3).for_each(|_| machine.poll_all());
            if machine.outstanding() > core {
                break;
            }
        }
    }
    check(machine.outstanding() == 2, || {
        format!("{} writes wait", machine.outstanding())
    })?;
    check_degraded(machine)
}

/// A cache that is full of what lies behind damage: the writes that heal are behind those that wait, which they make room for.
fn healed_when_full(machine: Machine, way: Way) -> Result<Machine, Violation> {
    let machine = apply(machine, &[Step::Write(0, 8, 4, 0), Step::Settle])?;
    spoil(&machine, 9, way)?;
    let machine = drain_as_far_as_it_goes(machine)?;
    check_degraded(&machine)?;
    machine.with_outside(|outside| outside.relaxed = true);
    fill_up_behind_damage(&machine)?;
    // In two parts, from two cores.
    let parts = [
        Step::Write(1, 8, 2, 0),
        Step::Turns(20),
        Step::Write(0, 10, 2, 0),
    ];
    let machine = apply(apply(machine, &parts)?, &[Step::Turns(200)])?;
    check(machine.outstanding() == 0, || {
        let info = machine.cache().info();
        format!("{} writes still wait: {info:?}", machine.outstanding())
    })?;
    let machine = apply(machine, &[Step::Drain])?;
    let (info, health) = (machine.cache().info(), machine.cache().health());
    check(health == Health::Online && info.damaged.is_empty(), || {
        format!("not healed: {health:?}, {info:?}")
    })?;
    Ok(machine)
}

/// One segment is kept for the writes that heal.
pub(super) fn a_cache_that_is_full_behind_damage_is_healed(
    context: &mut Context,
) -> Result<(), Violation> {
    let machine = context.machine(&setup())?;
    script::finish(&healed_when_full(machine, Way::Flip)?)?;
    context.cut(&setup(), |machine| healed_when_full(machine, Way::Poison))
}
