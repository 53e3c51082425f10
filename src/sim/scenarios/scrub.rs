//! Damage that nobody has asked for yet, and segments that are not used any more: items 32 and 33.

use super::reads::read_aside;
use super::{Context, apply, check, in_order, is_cached, place_of};
use crate::engine::{DataCrc, FormatPolicy, SegmentState, Setting, SettingChange, Status};
use crate::media::{Checksums, KEYS_START_BYTES, SegmentInfo, Tails};
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::Violation;
use crate::sim::recover::{self, superblock_of};
use crate::sim::script::{self, Step};
use crate::units::{Lba, PmemOff, SegId};

/// Two writes of seven blocks fill a segment.
const FILL: u64 = 7;

fn setup() -> Setup {
    Setup {
        data_crc: DataCrc::On,
        core_count: 2,
        segment_count: 8,
        gc_percent: 90,
        ..in_order()
    }
}

/// The setting is kept, too: the superblock is written.
fn set_rate(machine: &Machine, mib_s: u32) {
    machine.change_settings(SettingChange::of(Setting::ScrubMibS, mib_s));
    machine.poll_background();
}

/// Until the scrub has been through everything once more, from the beginning.
fn scrub(machine: &Machine) -> Result<(), Violation> {
    let passes = || machine.cache().stats().scrub_passes;
    let enough = passes() + 2;
    for _ in 0..500 {
        machine.poll_all();
        machine.verdict()?;
        if passes() >= enough {
            set_rate(machine, 0);
            return Ok(());
        }
    }
    Err(Violation("the scrub does not come round".to_owned()))
}

fn segment_of(machine: &Machine, lba: u64) -> Result<SegId, Violation> {
    let place = place_of(machine, Lba(lba)).ok_or_else(|| Violation("not cached".to_owned()))?;
    Ok(machine.cache().geometry.segment_of(place))
}

fn off_of(machine: &Machine, lba: u64) -> Result<PmemOff, Violation> {
    let place = place_of(machine, Lba(lba)).ok_or_else(|| Violation("not cached".to_owned()))?;
    Ok(machine.cache().geometry.place_off(place).plus(77))
}

/// Sealed segments with clean data, then dirty data, at rest. The scrub is about to begin.
fn used(context: &Context, setup: &Setup) -> Result<Machine, Violation> {
    let machine = context.machine(setup)?;
    set_rate(&machine, 0);
    let mut steps = Vec::new();
    for number in 0..4 {
        steps.extend([Step::Write(0, number * 8, FILL, 0), Step::Core(0)]);
    }
    steps.extend([Step::Drain, Step::Write(0, 40, FILL, 0), Step::Settle]);
    let machine = apply(machine, &steps)?;
    // No time passes here, so nothing is looked at yet.
    set_rate(&machine, 64);
    Ok(machine)
}

/// Flipped bits in clean and dirty payloads and in copies of records: found and mended, or named, with nobody
/// having asked for them.
pub(super) fn a_scrub_finds_damage_before_a_reader_does(
    context: &mut Context,
) -> Result<(), Violation> {
    let machine = used(context, &setup())?;
    let sealed = segment_of(&machine, 2)?;
    let start = machine.cache().geometry.segment_off(sealed);
    machine.pmem().flip_bit(off_of(&machine, 2)?, 3);
    machine.pmem().flip_bit(off_of(&machine, 43)?, 3);
    // The first copy of the tails, the second of the superblock, both of an info.
    for off in [
        PmemOff((8 << 10) + 40),
        PmemOff((32 << 10) + 60),
        start.plus(20),
        start.plus(4116),
    ] {
        machine.pmem().flip_bit(off, 1);
    }
    scrub(&machine)?;
    check(!is_cached(&machine, Lba(2)), || {
        "damaged clean data are still read from the cache".to_owned()
    })?;
    let damaged = machine.cache().info().damaged;
    check(
        damaged
            .iter()
            .any(|range| (range.lba..range.lba + range.len_blocks).contains(&43)),
        || format!("damaged dirty data are not named: {damaged:?}"),
    )?;
    let stats = machine.cache().stats();
    let found = (stats.crc_errors, stats.scrub_repairs, stats.metadata_errors);
    check(found == (2, 3, 0), || {
        format!("found and repaired {found:?}")
    })?;
    let checksums = Checksums::new(superblock_of(machine.pmem()).uuid);
    let (pmem, geometry) = (machine.pmem(), &machine.cache().geometry);
    let tails = Tails::load(pmem, &checksums).map(|(_, copies)| copies.needs_repair());
    let info = SegmentInfo::load(pmem, geometry, &checksums, sealed);
    let info = info.map(|(info, copies)| info.sealed.is_some() && !copies.needs_repair());
    check(tails == Ok(false) && info == Ok(true), || {
        format!("not repaired: tails {tails:?}, info {info:?}")
    })?;
    // The machine takes no failure for granted, and compares.
    machine.read(0, 0, 4 * 8, &[]);
    machine.settle()?;
    check(read_aside(&machine, 43, 1)? == Status::Failed, || {
        "damaged dirty data are read".to_owned()
    })?;
    let machine = apply(machine, &[Step::Write(1, 40, FILL, 0), Step::Settle])?;
    script::finish(&machine)?;
    // What the scrub has written again is what recovery needs.
    let machine = machine.kill(context.seed, |_| ())?;
    script::finish(&machine)
}

/// Blocks that lie side by side may still come from different requests: of a clean one between two dirty ones the
/// damage is dropped, and nothing of its neighbours.
pub(super) fn a_scrub_drops_damaged_blocks_and_none_beside_them(
    context: &mut Context,
) -> Result<(), Violation> {
    let machine = context.machine(&setup())?;
    set_rate(&machine, 0);
    let mut steps = Vec::new();
    // Payload grows downwards. What is read goes into the cache, and is clean at once.
    for lba in [[5, 4, 3], [10, 9, 8]] {
        steps.extend([Step::Write(0, lba[0], 1, 0), Step::Settle]);
        steps.extend([Step::Read(0, lba[1], 1, 0), Step::Settle]);
        steps.extend([Step::Write(0, lba[2], 1, 0), Step::Settle]);
    }
    // Here it is the first of two.
    steps.extend([Step::Write(0, 17, 1, 0), Step::Settle]);
    steps.extend([Step::Read(0, 16, 1, 0), Step::Settle]);
    let machine = apply(machine, &steps)?;
    for runs in [[5, 4, 3].as_slice(), &[10, 9, 8], &[17, 16]] {
        let places: Vec<_> = runs
            .iter()
            .map(|lba| place_of(&machine, Lba(*lba)).map(|place| place.0 + runs[0] - lba))
            .collect();
        check(
            places
                .iter()
                .all(|place| *place == places[0] && place.is_some()),
            || format!("blocks {runs:?} do not lie side by side: {places:?}"),
        )?;
    }
    let damaged = [4, 9, 16];
    for lba in damaged {
        machine.pmem().flip_bit(off_of(&machine, lba)?, 3);
    }
    set_rate(&machine, 64);
    scrub(&machine)?;
    for lba in [3, 4, 5, 8, 9, 10, 16, 17] {
        let is_dropped = !is_cached(&machine, Lba(lba));
        check(is_dropped == damaged.contains(&lba), || {
            format!("block {lba} is dropped: {is_dropped}")
        })?;
    }
    machine.read(0, 0, 3 * 8, &[]);
    machine.settle()?;
    script::finish(&machine)
}

/// With checksums off memory is read all the same.
pub(super) fn a_scrub_finds_lost_memory_without_checksums(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        data_crc: DataCrc::Off,
        ..setup()
    };
    let machine = used(context, &setup)?;
    let (clean, dirty) = (off_of(&machine, 2)?, off_of(&machine, 43)?);
    let lost = segment_of(&machine, 2)?;
    machine.pmem().poison(clean);
    machine.pmem().poison(dirty);
    scrub(&machine)?;
    (0..20).for_each(|_| machine.poll_all());
    let state = machine.cache().segments.get(lost).state();
    check(state == SegmentState::Quarantined, || {
        format!("a clean segment on lost memory is {state:?}")
    })?;
    let info = machine.cache().info();
    check(info.damaged.len() == 1 && info.damaged[0].lba == 43, || {
        format!("{:?}", info.damaged)
    })?;
    machine.read(0, 0, 4 * 8, &[]);
    machine.settle()?;
    let machine = apply(machine, &[Step::Write(1, 43, 1, 0), Step::Settle])?;
    machine.pmem().heal(dirty);
    script::finish(&machine)
}

/// The keys of a clean segment are lost, and a page of a free one. The first is emptied all the same, and neither is written
/// to again, in this run nor in the next, until its memory is well (INV-SEG-7).
pub(super) fn a_segment_on_lost_memory_is_used_again_only_when_it_reads_well(
    context: &mut Context,
) -> Result<(), Violation> {
    let machine = used(context, &setup())?;
    let lost = segment_of(&machine, 2)?;
    let start_of = |id| machine.cache().geometry.segment_off(id);
    let keys = start_of(lost).plus(u64::from(KEYS_START_BYTES));
    let segments = &machine.cache().segments;
    let free = segments
        .ids()
        .filter(|id| segments.get(*id).state() == SegmentState::Free)
        .last()
        .ok_or_else(|| Violation("no segment is free".to_owned()))?;
    let page = start_of(free).plus(machine.cache().geometry.segment_size_bytes() / 2);
    machine.pmem().poison(keys);
    machine.pmem().poison(page);
    scrub(&machine)?;
    (0..40).for_each(|_| machine.poll_all());
    let count = machine.cache().info().segments_quarantined;
    check(count == 2, || {
        format!("{count} segments are quarantined, not 2")
    })?;
    machine.cache().check_invariants();
    // Round and round, several times the size of the cache.
    let mut machine = machine;
    for number in 0..60 {
        let lba = number % 8 * 8;
        machine = apply(machine, &[Step::Write(0, lba, FILL, 0), Step::Settle])?;
        machine.read(1, lba, FILL, &[]);
        machine.settle()?;
    }
    machine.read_all()?;
    machine.drain()?;
    for id in [lost, free] {
        let state = machine.cache().segments.get(id).state();
        check(state == SegmentState::Quarantined, || {
            format!("it is {state:?}")
        })?;
    }
    // The same memory, as the next runs find it.
    let (pmem, setup) = (machine.pmem().clone(), machine.setup().clone());
    let base = machine.with_outside(|outside| outside.base.current_image());
    drop(machine);
    for (healed, expected) in [(None, 2), (None, 2), (Some(page), 1), (Some(keys), 0)] {
        if let Some(off) = healed {
            pmem.heal(off);
        }
        let options = setup.options(FormatPolicy::Never);
        let cache = recover::open(pmem.clone(), options, |lba, len| base.blocks(lba, len))
            .map_err(|error| Violation(format!("the cache is refused: {error}")))?;
        let found = cache.info().segments_quarantined;
        check(found == expected, || {
            format!("{found} segments are quarantined after a start, not {expected}")
        })?;
    }
    Ok(())
}
