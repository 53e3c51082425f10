//! Metadata and recoveries: items 10, 11, 13, 17.

use super::{Context, apply, check, in_order};
use crate::engine::{FormatPolicy, Fua, Op, Setting, SettingChange, Status};
use crate::media::{
    COUNTER_START_MAX, Checksums, SegmentInfo, Superblock, Tails, persist_superblock,
};
use crate::pmem::IovBuf;
use crate::sim::base::BaseImage;
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::{Expectation, Violation};
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::sim::pmem::{PoisonedStore, SimPmem};
use crate::sim::recover::{self, superblock_of};
use crate::sim::script::Step;
use crate::units::{Agent, Generation, PmemOff, SegId, Seq};

/// Stores by hand.
const AGENT: Agent = Agent(999);
/// So far from the end of a counter.
const LEFT: u64 = 1 << 16;

/// Every record is updated, every update torn, every repair torn again.
pub(super) fn a_torn_update_of_any_record_can_be_repaired_and_torn_again(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        segment_count: 4,
        gc_percent: 0,
        core_count: 1,
        ..in_order()
    };
    let mut steps = Vec::new();
    for round in 0..6 {
        // The superblock, the tails, the infos of segments.
        steps.extend([Step::GcPercent(round as u8 * 10), Step::Turns(1)]);
        steps.extend([Step::Write(0, round * 9, 8, 0), Step::Core(0)]);
        steps.extend([Step::Write(0, round * 5 + 20, 8, 0), Step::Core(0)]);
        steps.extend([Step::DrainStart, Step::Turns(8)]);
        if round == 3 {
            steps.push(Step::CutPower(context.seed, 2));
        }
    }
    let limits = context.limits;
    context.limits.twice_every = 2;
    context.limits.nested_every = 16;
    let result = context.cut_script(&setup, &steps);
    context.limits = limits;
    result
}

/// Crashes, recoveries that are cut at each of their fences, and other numbers of cores.
pub(super) fn a_recovery_that_is_cut_again_and_again_finds_the_same(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        gc_percent: 10,
        yield_percent: 15,
        ..Setup::default()
    };
    let mut steps = Vec::new();
    for round in 0..5 {
        for number in 0..4 {
            steps.push(Step::Write(number, round * 8 + number as u64 * 5, 7, 0));
        }
        steps.extend([Step::Turns(1), Step::DrainStart, Step::Turns(2)]);
        let cores = 1 + round as usize % 4;
        // Twice in a row: the second machine dies before it has done anything.
        steps.push(Step::CutPower(context.seed + round, cores));
        steps.push(Step::CutPower(context.seed + round + 100, 5 - cores));
    }
    let limits = context.limits;
    context.limits.twice_every = 2;
    context.limits.nested_every = 8;
    let result = context.cut_script(&setup, &steps);
    context.limits = limits;
    result
}

/// A crash; `change` is done to the media meanwhile.
fn crash_with(
    machine: Machine,
    change: impl FnOnce(&SimPmem, &mut Superblock, &Checksums),
) -> Result<Machine, Violation> {
    let pmem = SimPmem::from_image(machine.pmem().live_image());
    let mut superblock = superblock_of(&pmem);
    let checksums = Checksums::new(superblock.uuid);
    change(&pmem, &mut superblock, &checksums);
    let base = machine.with_outside(|outside| outside.base.current_image());
    machine.crash(pmem.live_image(), &base, 3, |_| ())
}

/// All counters stand a little below the end of their range.
pub(super) fn numbers_near_their_end_still_count(context: &mut Context) -> Result<(), Violation> {
    let setup = Setup {
        segment_count: 5,
        gc_percent: 0,
        core_count: 1,
        ..in_order()
    };
    context.cut(&setup, |machine| {
        let near = COUNTER_START_MAX - LEFT;
        let machine = crash_with(machine, |pmem, superblock, checksums| {
            superblock.update = near;
            drop(persist_superblock(pmem, AGENT, superblock));
            let (mut tails, _) = Tails::load(pmem, checksums).expect("they are whole");
            tails.update = near;
            tails.seq_next_min = Seq(near);
            tails.epoch_min = near;
            drop(tails.persist(pmem, AGENT, checksums));
            for id in (0..superblock.geometry.segment_count()).map(SegId) {
                let mut info = SegmentInfo {
                    generation: Generation(near),
                    sealed: None,
                    update: near,
                };
                drop(info.persist(pmem, AGENT, &superblock.geometry, checksums, id));
            }
        })?;
        let mut steps = Vec::new();
        for round in 0..12 {
            steps.extend([Step::Write(0, round * 7, 8, 0), Step::Core(0)]);
            steps.extend([
                Step::Flush(0),
                Step::Core(0),
                Step::DrainStart,
                Step::Turns(6),
            ]);
            steps.push(Step::GcPercent(round as u8));
        }
        let machine = apply(machine, &steps)?;
        let info = machine.cache().info();
        check(info.seq_next > near && info.epoch > near, || {
            format!("the numbers did not count on from {near}: {info:?}")
        })?;
        Ok(machine)
    })
}

/// A power cut takes a kset whose number the tails have already counted: nobody may wait for it.
pub(super) fn a_drain_ends_though_numbers_were_drawn_and_never_stored(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = in_order();
    for dirty in [false, true] {
        context.cut(&setup, |machine| {
            let machine = apply(machine, &[Step::Write(0, 3, 4, 0), Step::Settle])?;
            let machine = if dirty {
                machine
            } else {
                apply(machine, &[Step::Drain])?
            };
            let machine = crash_with(machine, |pmem, _, checksums| {
                let (mut tails, _) = Tails::load(pmem, checksums).expect("they are whole");
                tails.seq_next_min = Seq(tails.seq_next_min.0 + 40);
                drop(tails.persist(pmem, AGENT, checksums));
            })?;
            apply(
                machine,
                &[Step::Drain, Step::Write(1, 5, 2, 0), Step::Settle],
            )
        })?;
    }
    Ok(())
}

/// A cache with clean and dirty data, and what its base holds.
pub(super) fn used_cache(context: &Context) -> Result<(Machine, BaseImage), Violation> {
    let mut steps = Vec::new();
    for round in 0..6 {
        steps.extend([Step::Write(0, round * 8, 7, 0), Step::Core(0)]);
        steps.extend([Step::Write(1, round * 8 + 4, 6, 0), Step::Core(1)]);
        if round == 3 {
            steps.extend([Step::Settle, Step::Drain, Step::Turns(20)]);
        }
    }
    let machine = apply(context.machine(&in_order())?, &steps)?;
    machine.settle()?;
    let base = machine.with_outside(|outside| outside.base.current_image());
    Ok((machine, base))
}

/// The two copies of every record: what it is called in an error, and where they lie.
fn records(superblock: &Superblock) -> Vec<(String, [PmemOff; 2])> {
    let mut records = vec![
        ("superblock".to_owned(), [PmemOff(0), PmemOff(32 << 10)]),
        ("tails".to_owned(), [PmemOff(8 << 10), PmemOff(40 << 10)]),
    ];
    for id in (0..superblock.geometry.segment_count()).map(SegId) {
        let start = superblock.geometry.segment_off(id);
        records.push((format!("segment {}", id.0), [start, start.plus(4 << 10)]));
    }
    records
}

/// A device of which this place cannot be read, and does not take a store.
fn poisoned(bytes: &[u8], off: PmemOff) -> SimPmem {
    let pmem = SimPmem::from_image(bytes.to_vec());
    pmem.poison(off);
    pmem.set_poisoned_store(PoisonedStore::Faults);
    pmem
}

/// Each copy alone, and both. Tails have to move, which takes two copies: that the other one is whole is all that can be
/// said then.
pub(super) fn one_copy_of_any_record_may_be_poisoned_and_both_are_an_error(
    context: &mut Context,
) -> Result<(), Violation> {
    let (machine, base) = used_cache(context)?;
    let bytes = machine.pmem().live_image();
    let superblock = superblock_of(machine.pmem());
    let expectation = machine.with_outside(|outside| Expectation::of(&outside.model));
    let refusal = |pmem: SimPmem| {
        let options = machine.setup().options(FormatPolicy::Auto);
        let opened = recover::open(pmem.clone(), options, |lba, len| base.blocks(lba, len));
        let says = opened.err().map(|error| error.to_string());
        check(pmem.live_image() == bytes, || {
            format!("written to, and then: {says:?}")
        })?;
        Ok::<_, Violation>(says.unwrap_or_default())
    };
    for (name, offs) in records(&superblock) {
        for off in offs {
            let pmem = poisoned(&bytes, off);
            let found = if name == "tails" {
                let says = refusal(pmem)?;
                let place = format!("{name} of the cache, at {off}, cannot be read");
                check(says.contains(&place), || {
                    format!("it is refused, and the error says: {says}")
                })
            } else {
                recover::judge_with(pmem, machine.setup(), &expectation, &base).map(|_| ())
            };
            found.map_err(|violation| {
                Violation(format!(
                    "the copy of the {name} at {off} is poisoned: {violation}"
                ))
            })?;
        }
        let pmem = SimPmem::from_image(bytes.clone());
        offs.iter().for_each(|off| pmem.poison(*off));
        let says = refusal(pmem)?;
        // Where even the kind of the device cannot be read, the error says where.
        check(
            says.contains(&name) || says.contains("cannot be read"),
            || format!("both copies of the {name} are poisoned, and the error says: {says}"),
        )?;
    }
    Ok(())
}

/// When the memory of a record is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lost {
    BeforeTheStart,
    InUse,
}

/// Nothing is stored where a copy of a segment's info cannot be read, whatever the segment holds; the cache goes on
/// without it, and with settings that it cannot keep (INV-PAIR-3).
pub(super) fn a_record_with_an_unreadable_copy_is_not_updated(
    context: &mut Context,
) -> Result<(), Violation> {
    let (machine, base) = used_cache(context)?;
    let bytes = machine.pmem().live_image();
    let superblock = superblock_of(machine.pmem());
    let block_count = machine.setup().block_count;
    for (name, offs) in records(&superblock) {
        if name == "tails" {
            continue;
        }
        let whens = [Lost::BeforeTheStart, Lost::InUse];
        for (off, when) in offs
            .into_iter()
            .flat_map(|off| whens.map(|when| (off, when)))
        {
            let blocks = base.blocks(0, block_count).to_vec();
            let options = machine.setup().options(FormatPolicy::Auto);
            let runs = BackgroundRuns::Always;
            let pmem = SimPmem::from_image(bytes.clone());
            pmem.set_poisoned_store(PoisonedStore::Faults);
            if when == Lost::BeforeTheStart {
                pmem.poison(off);
            }
            let plain = Plain::new(pmem, blocks, options, runs);
            let mut plain = plain.map_err(|error| Violation(format!("{name}: {error}")))?;
            plain.pmem().poison(off);
            let change = SettingChange::of(Setting::GcPercent, 0);
            plain
                .cache
                .change_settings(&change)
                .map_err(|error| Violation(error.to_string()))?;
            // Every segment is wanted several times.
            for number in 0..60 {
                let buf = IovBuf::new(&[number as u8; 7 * 512], &[]);
                let op = Op::Write(buf.cursor(), Fua::No);
                let status = plain.run(0, op, number * 7 % (block_count - 7), 7);
                check(status == Status::Success, || format!("{name}: {status:?}"))?;
            }
            check(plain.drain(), || format!("{name}: it does not drain"))?;
            (0..200).for_each(|_| plain.poll_background());
            plain.cache.check_invariants();
            let (is_superblock, info) = (name == "superblock", plain.cache.info());
            check(
                info.segments_quarantined == u64::from(!is_superblock),
                || format!("the copy of {name} at {off} is lost {when:?}: {info:?}"),
            )?;
            let stats = plain.cache.stats();
            check(!is_superblock || stats.metadata_errors > 0, || {
                format!("a setting that is not kept is not counted: {stats:?}")
            })?;
        }
    }
    Ok(())
}
