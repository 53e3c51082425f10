//! Keys of dirty data that become unreadable while the cache is in use: item 45.

use super::{Context, apply, check, in_order, is_cached, place_of};
use crate::engine::{
    CheckpointState, DataCrc, FormatPolicy, Health, SegmentState, Setting, SettingChange, Status,
};
use crate::media::KEYS_START_BYTES;
use crate::pmem::LINE_SIZE_BYTES;
use crate::recovery::OpenError;
use crate::sim::base::Faults;
use crate::sim::image::ImagePmem;
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::Violation;
use crate::sim::prng::{Prng, mix};
use crate::sim::recover;
use crate::sim::scenarios::reads::read_aside;
use crate::sim::scenarios::writeback::{lowest_rate, stop_at_once};
use crate::sim::script::{self, Step, Weights};
use crate::units::{Lba, SegId};

/// All that a core writes here goes into one segment.
fn setup() -> Setup {
    Setup {
        segment_size_bytes: 32 << 10,
        segment_count: 10,
        gc_percent: 90,
        ..in_order()
    }
}

fn set_scrub(machine: &Machine, mib_s: u32) {
    machine.change_settings(SettingChange::of(Setting::ScrubMibS, mib_s));
    machine.poll_background();
}

/// The scrub finds nothing before it is told to.
fn begin(context: &mut Context, setup: &Setup) -> Result<Machine, Violation> {
    let machine = context.machine(setup)?;
    set_scrub(&machine, 0);
    Ok(machine)
}

fn segment_of(machine: &Machine, lba: u64) -> Result<SegId, Violation> {
    let place = place_of(machine, Lba(lba)).ok_or_else(|| Violation("not cached".to_owned()))?;
    Ok(machine.cache().geometry.segment_of(place))
}

/// How many lines of keys a segment has. Of the first kset that is not written back write-back has taken note.
fn key_lines(machine: &Machine, id: SegId) -> u64 {
    let key_end = machine.cache().segments.get(id).key_end();
    u64::from(key_end - KEYS_START_BYTES) / LINE_SIZE_BYTES
}

fn check_health(machine: &Machine, is_expected: fn(&Health) -> bool) -> Result<(), Violation> {
    let health = machine.cache().health();
    check(is_expected(&health), || {
        format!("with lost keys the cache is {health:?}")
    })
}

/// All is on the base, the segments without keys are out of service, and nothing is wrong any more.
fn check_saved(machine: &Machine, segments: &[SegId]) -> Result<(), Violation> {
    machine.drain()?;
    machine.check_drained()?;
    (0..60).for_each(|_| machine.poll_all());
    machine.verdict()?;
    for id in segments {
        let state = machine.cache().segments.get(*id).state();
        check(state == SegmentState::Quarantined, || {
            format!("{id:?} without keys is {state:?}")
        })?;
    }
    let (info, stats) = (machine.cache().info(), machine.cache().stats());
    let count = segments.len() as u64;
    check(
        info.segments_quarantined == count && stats.key_errors == count,
        || {
            let counted = (info.segments_quarantined, stats.key_errors);
            format!("{counted:?} segments are quarantined and counted, not {count}")
        },
    )?;
    check(info.dirty_bytes == 0 && info.damaged.is_empty(), || {
        format!("something is left: {info:?}")
    })?;
    check_health(machine, |health| *health == Health::Online)?;
    machine.cache().check_invariants();
    machine.read_all()
}

/// Of everything that a segment may hold: read fills, parts of pages, zeroes, what is overwritten since, in the same
/// segment and elsewhere, and barriers between them.
fn mixed() -> Vec<Step> {
    let mut steps = vec![
        Step::Read(0, 88, 5, 0),
        Step::Settle,
        Step::Write(0, 0, 3, 0),
        Step::Settle,
        Step::Drain,
    ];
    let one_by_one = [
        Step::Write(0, 1, 1, 0),
        Step::Flush(0),
        Step::Write(0, 8, 4, 0),
        Step::Read(0, 64, 3, 0),
        Step::Unmap(0, 10, 1),
        Step::Zero(0, 40, 17),
        Step::WriteFua(0, 24, 2, 0),
        Step::Write(0, 2, 1, 0),
        Step::Write(0, 1, 1, 0),
        // On the other core, in another segment: overwritten by, and newer than what came here.
        Step::Write(1, 30, 2, 0),
        Step::Write(0, 31, 2, 0),
        Step::Write(1, 9, 1, 0),
        Step::Unmap(1, 24, 1),
        Step::Write(1, 42, 3, 0),
        Step::Flush(1),
        Step::Write(0, 44, 1, 0),
    ];
    for step in one_by_one {
        steps.extend([step, Step::Settle]);
    }
    steps
}

/// The segment is still open, and gets more until write-back meets the loss. Cut at every moment: a crash forgets of what
/// memory cannot be read.
pub(super) fn keys_that_cannot_be_read_lose_no_data(
    context: &mut Context,
) -> Result<(), Violation> {
    for block_size_bytes in [512, 4096] {
        let setup = Setup {
            block_size_bytes,
            segment_size_bytes: if block_size_bytes == 512 { 32 } else { 128 } << 10,
            ..setup()
        };
        context.cut(&setup, |machine| {
            set_scrub(&machine, 0);
            let machine = apply(machine, &mixed())?;
            let lost = segment_of(&machine, 31)?;
            let state = machine.cache().segments.get(lost).state();
            check(state == SegmentState::Open, || {
                format!("it is {state:?} already")
            })?;
            machine.poison_keys(lost, key_lines(&machine, lost) - 1);
            let more = [
                Step::Write(0, 1, 1, 0),
                Step::Write(1, 11, 3, 0),
                Step::DrainStart,
                Step::Turns(1),
                Step::Write(0, 50, 2, 0),
                Step::Write(1, 47, 1, 0),
                Step::Flush(0),
                Step::Turns(2),
                Step::Write(0, 3, 4, 0),
                Step::Settle,
            ];
            let machine = apply(machine, &more)?;
            check_saved(&machine, &[lost])?;
            Ok(machine)
        })?;
    }
    Ok(())
}

/// Nothing has asked for the data to be written back; the scrub finds the loss.
pub(super) fn a_scrub_that_finds_keys_lost_has_their_data_written_back(
    context: &mut Context,
) -> Result<(), Violation> {
    let machine = begin(context, &setup())?;
    let machine = apply(machine, &mixed())?;
    let lost = segment_of(&machine, 31)?;
    // Far behind what write-back has read ahead.
    machine.poison_keys(lost, 5);
    let tail = machine.cache().info().dirty_tail;
    (0..20).for_each(|_| machine.poll_background());
    check(machine.cache().info().dirty_tail == tail, || {
        "something is written back already".to_owned()
    })?;
    set_scrub(&machine, 4096);
    let mut was_told = false;
    for _ in 0..200 {
        machine.poll_all();
        let told = machine.cache().health();
        was_told |= matches!(told, Health::WritebackFailing(reason)
            if reason.contains(&format!("keys of segments {} cannot", lost.0)));
    }
    machine.verdict()?;
    check(was_told, || "nobody was told".to_owned())?;
    let info = machine.cache().info();
    check(info.dirty_bytes == 0 && info.dirty_tail > tail, || {
        format!("it is not written back: {info:?}")
    })?;
    set_scrub(&machine, 0);
    check_saved(&machine, &[lost])?;
    script::finish(&machine)
}

/// A bit flips in the keys of a segment. Not in the last kset: in an open segment that could be a torn one.
fn flip_a_key(machine: &Machine, id: SegId) {
    let keys = machine.cache().geometry.segment_off(id);
    let line = (key_lines(machine, id) - 3) * LINE_SIZE_BYTES;
    let off = keys.plus(u64::from(KEYS_START_BYTES) + line + 9);
    machine.pmem().flip_bit(off, 2);
}

/// A start with what is on the media now.
fn start(machine: &Machine) -> Result<(), OpenError> {
    let image = ImagePmem::new(machine.pmem().live_image());
    let base = machine.with_outside(|outside| outside.base.current_image());
    let options = machine.setup().options(FormatPolicy::Never);
    recover::open(image, options, |lba, len| base.blocks(lba, len)).map(|_| ())
}

/// Bits have flipped, and do not flip back. Before the base has everything a start is refused; then the keys are not
/// missed.
pub(super) fn a_start_without_keys_is_refused_until_the_base_has_what_they_named(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        data_crc: DataCrc::On,
        ..setup()
    };
    let machine = begin(context, &setup)?;
    let machine = apply(machine, &mixed())?;
    let lost = segment_of(&machine, 31)?;
    machine.with_outside(|outside| outside.relaxed = true);
    flip_a_key(&machine, lost);
    machine.drain_start();
    let is_told = || matches!(machine.cache().health(), Health::WritebackFailing(_));
    while machine.cache().drain_status().in_progress && !is_told() {
        machine.poll_all();
        machine.verdict()?;
    }
    // The end, in the middle of it.
    check_health(&machine, |health| {
        matches!(health, Health::WritebackFailing(_))
    })?;
    let refused = start(&machine).map_err(|error| error.to_string());
    let named = format!("segment {} is damaged", lost.0);
    check(
        refused.as_ref().is_err_and(|text| text.contains(&named)),
        || format!("a start without keys ends as {refused:?}"),
    )?;
    let machine = apply(machine, &[Step::Heal, Step::Settle])?;
    check_saved(&machine, &[lost])?;
    check(start(&machine).is_ok(), || {
        "the keys are missed although the base has everything".to_owned()
    })?;
    let machine = machine.kill(context.seed, |_| ())?;
    script::finish(&machine)
}

/// Of the blocks whose keys are lost some are lost themselves, as was known before or not: they hold everything up
/// until they are overwritten.
pub(super) fn a_block_that_is_lost_with_its_keys_is_not_written_back(
    context: &mut Context,
) -> Result<(), Violation> {
    let machine = begin(context, &setup())?;
    let machine = apply(machine, &mixed())?;
    let lost = segment_of(&machine, 31)?;
    let off_of = |lba| {
        let place = place_of(&machine, Lba(lba));
        let place = place.ok_or_else(|| Violation("not cached".to_owned()))?;
        Ok(machine.cache().geometry.place_off(place).plus(7))
    };
    let (known, unknown) = (off_of(31)?, off_of(44)?);
    machine.pmem().poison(known);
    set_scrub(&machine, 4096);
    (0..60).for_each(|_| machine.poll_all());
    set_scrub(&machine, 0);
    machine.pmem().poison(unknown);
    machine.poison_keys(lost, 4);
    let machine = apply(
        machine,
        &[Step::DrainStart, Step::Turns(60), Step::Pass(1000)],
    )?;
    let machine = apply(machine, &[Step::Turns(60)])?;
    check_health(&machine, |health| matches!(health, Health::Degraded(_)))?;
    let told: Vec<u64> = machine
        .cache()
        .info()
        .damaged
        .iter()
        .map(|range| range.lba)
        .collect();
    check(told == [31, 44], || format!("blocks {told:?} are named"))?;
    for lba in told {
        let status = read_aside(&machine, lba, 1)?;
        check(status == Status::Failed, || format!("block {lba} is read"))?;
    }
    let machine = apply(machine, &[Step::Write(1, 44, 1, 0), Step::Turns(60)])?;
    check_health(&machine, |health| matches!(health, Health::Degraded(_)))?;
    let machine = apply(machine, &[Step::Write(1, 31, 1, 0), Step::Turns(60)])?;
    check_saved(&machine, &[lost])?;
    script::finish(&machine)
}

/// The keys of a second segment turn out to be lost while the first is saved, the base fails, a checkpoint waits.
pub(super) fn lost_keys_of_several_segments_are_dealt_with_at_once(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        // Two writes fill a segment.
        segment_size_bytes: 16 << 10,
        segment_count: 12,
        ..setup()
    };
    let machine = begin(context, &setup)?;
    let mut steps = Vec::new();
    for round in 0..6 {
        steps.extend([Step::Write(0, round * 8, 7, 0), Step::Settle]);
    }
    let machine = apply(machine, &steps)?;
    let first = segment_of(&machine, 1)?;
    let second = segment_of(&machine, 40)?;
    check(first != second, || "it is one segment".to_owned())?;
    machine.poison_keys(first, 0);
    machine.with_outside(|outside| outside.base.faults.stuck = true);
    let machine = apply(
        machine,
        &[
            Step::CheckpointBegin(3),
            Step::Turns(40),
            Step::Write(1, 3, 2, 0),
            Step::Turns(2),
        ],
    )?;
    machine.poison_keys(second, 1);
    machine.with_outside(|outside| {
        outside.base.faults = Faults {
            write_percent: 40,
            flush_percent: 40,
            ..Faults::default()
        };
    });
    set_scrub(&machine, 4096);
    let machine = apply(machine, &[Step::Turns(40), Step::Heal])?;
    for _ in 0..2000 {
        machine.pass_ms(10);
        machine.poll_all();
        machine.verdict()?;
        if machine.cache().checkpoint_status(machine.now()).state == CheckpointState::Holding {
            break;
        }
    }
    let status = machine.cache().checkpoint_status(machine.now());
    check(status.state == CheckpointState::Holding, || {
        format!("the checkpoint is {status:?}")
    })?;
    let machine = apply(machine, &[Step::CheckpointEnd])?;
    set_scrub(&machine, 0);
    check_saved(&machine, &[first, second])?;
    check(is_cached(&machine, Lba(3)), || {
        "what was written since has left the cache".to_owned()
    })?;
    script::finish(&machine)
}

/// Cores run into it at any place: they overwrite what is being looked for, in the middle of their batches.
pub(super) fn keys_are_lost_under_load(context: &mut Context) -> Result<(), Violation> {
    for round in 0..12 {
        let mut prng = Prng::new(mix(context.seed, round));
        let setup = Setup {
            data_crc: prng.pick(&[DataCrc::Off, DataCrc::On]),
            segment_count: prng.between(8, 12),
            core_count: 3,
            block_count: prng.pick(&[32, 93]),
            yield_percent: prng.pick(&[5, 30]),
            ..Setup::default()
        };
        let weights = Weights {
            crash: 0,
            fault: 0,
            key_loss: 0,
            busy_percent: 60,
        };
        let mut steps = script::draw(&mut prng, &setup, weights, 60);
        steps.push(Step::LoseKeys(prng.below(1 << 32)));
        steps.extend(script::draw(&mut prng, &setup, weights, 60));
        let machine = apply(Machine::new(setup, mix(context.seed, round), None)?, &steps)?;
        script::finish(&machine)?;
    }
    Ok(())
}

/// What becomes of an orderly stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stopped {
    Saved,
    /// Although write-back is to be slow.
    AtOnce,
    /// The base has failed every write until then, and is well again.
    AfterErrors,
    /// The base fails every write.
    BySickBase,
    /// A checkpoint holds the base.
    ByCheckpoint,
}

/// An orderly stop in the middle of a salvage ends it, so that the next start misses no keys; unless the base does not take
/// anything: then it ends as it is. Bits have flipped, and do not flip back.
pub(super) fn an_orderly_stop_saves_what_lies_in_segments_without_keys(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        data_crc: DataCrc::On,
        ..setup()
    };
    for stopped in [
        Stopped::Saved,
        Stopped::AtOnce,
        Stopped::AfterErrors,
        Stopped::BySickBase,
        Stopped::ByCheckpoint,
    ] {
        // From before anybody has taken note of the loss, up to the writes of the batch.
        for turns in 0..12 {
            let mut machine = apply(begin(context, &setup)?, &mixed())?;
            if stopped == Stopped::ByCheckpoint {
                machine = apply(machine, &[Step::CheckpointBegin(1000), Step::Turns(60)])?;
                let state = machine.cache().checkpoint_status(machine.now()).state;
                check(state == CheckpointState::Holding, || {
                    format!("the checkpoint is {state:?}")
                })?;
                let again = [Step::Write(0, 31, 1, 0), Step::Settle];
                machine = apply(machine, &again.repeat(4))?;
            }
            let lost = segment_of(&machine, 31)?;
            machine.with_outside(|outside| outside.relaxed = true);
            flip_a_key(&machine, lost);
            check(machine.cache().segments.lose_keys(lost), || {
                "the keys were lost before".to_owned()
            })?;
            if matches!(stopped, Stopped::BySickBase | Stopped::AfterErrors) {
                machine.with_outside(|outside| outside.base.faults.write_percent = 100);
            }
            if stopped == Stopped::AtOnce {
                machine.change_settings(lowest_rate());
            }
            (0..turns).for_each(|_| machine.poll_background());
            if stopped == Stopped::AfterErrors {
                (0..turns).for_each(|_| machine.poll_background());
                machine.with_outside(|outside| outside.base.faults.write_percent = 0);
            }
            match stopped {
                Stopped::AtOnce => stop_at_once(&machine)?,
                _ => machine.stop()?,
            }
            let started = start(&machine);
            let is_saved = !matches!(stopped, Stopped::BySickBase | Stopped::ByCheckpoint);
            check(started.is_ok() == is_saved, || {
                format!("{stopped:?} after {turns} turns: a start ends as {started:?}")
            })?;
        }
    }
    Ok(())
}
