//! A history as a list of steps: drawn from a seed, run on a machine, and cut down to the few steps that a
//! failure needs. Each step carries its own dice, so that leaving one out does not change the others.

use super::base::Faults;
use super::machine::{Machine, Readers, Setup, SharedObserver};
use super::model::Violation;
use super::prng::{Prng, mix};
use super::recover::Crew;
use crate::engine::{CacheMode, DataCrc, Fua, Op, Setting, SettingChange, WritebackOrder};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Every record that is kept in two copies is at most so long.
const COPY_BYTES: usize = 512;
/// Steps after a recovery that is worked with.
const STEPS_AFTER_RECOVERY: usize = 24;

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A write: core, first block, number of blocks; where its buffer is cut.
    Write(usize, u64, u64, usize),
    /// The same, with FUA.
    WriteFua(usize, u64, u64, usize),
    /// A read.
    Read(usize, u64, u64, usize),
    /// A read of which the place is wanted; how many turns of the core it is held.
    Lend(usize, u64, u64, u64),
    /// Write-zeroes.
    Zero(usize, u64, u64),
    /// An unmap.
    Unmap(usize, u64, u64),
    /// A flush.
    Flush(usize),
    /// Gives up one of the requests of a core.
    Abort(usize, u64),
    /// A turn for a core.
    Core(usize),
    /// So many turns for the background.
    Background(u64),
    /// So many operations of the base end.
    Base(u64),
    /// Milliseconds pass.
    Pass(u64),
    /// Everybody has so many turns.
    Turns(u64),
    /// All requests complete.
    Settle,
    /// Everything to the base, which is then compared.
    Drain,
    /// A drain is asked for.
    DrainStart,
    /// A checkpoint is asked for, to be held so many seconds at the most.
    CheckpointBegin(u32),
    /// It ends.
    CheckpointEnd,
    /// Share of used segments above which they are reclaimed.
    GcPercent(u8),
    /// Order of write-back.
    Strict(bool),
    /// Another cache mode.
    Mode(CacheMode),
    /// What goes wrong at the base from now on: writes, flushes, reads, in percent.
    Faults(u8, u8, u8),
    /// The base stops answering, or answers that it is gone.
    Away(bool),
    /// The base is well again.
    Heal,
    /// Memory goes bad where the keys of dirty data lie; dice. Once in a life of the cache.
    LoseKeys(u64),
    /// A bit flips in clean data, if reads are verified; dice.
    FlipBit(u64),
    /// The base gets its full size, if it has not got it yet.
    Grow,
    /// Power cut; dice; cores afterwards.
    CutPower(u64, usize),
    /// Death of the process; dice; cores afterwards.
    Kill(u64, usize),
    /// Orderly stop and start; dice; cores afterwards. One copy of some metadata is damaged in between.
    Restart(u64, usize),
}

/// How often which kind of step is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Weights {
    /// Power cuts, kills and restarts, in a thousand.
    pub crash: u64,
    /// Errors of the base, in a thousand.
    pub fault: u64,
    /// Memory that goes bad, in a thousand.
    pub key_loss: u64,
    /// How many turns of the cores are left out, in percent, so that requests queue up.
    pub busy_percent: u8,
}

/// Draws the steps of a history.
#[must_use]
pub fn draw(prng: &mut Prng, setup: &Setup, weights: Weights, count: usize) -> Vec<Step> {
    // Some histories keep to a few blocks, so that everything overlaps.
    let span = prng.pick(&[setup.block_count, setup.block_count / 2, 24, 10, 3]);
    let span = span.min(setup.block_count);
    (0..count)
        .map(|_| draw_one(prng, setup, weights, span))
        .collect()
}

fn draw_one(prng: &mut Prng, setup: &Setup, weights: Weights, span: u64) -> Step {
    // Nothing is drawn for what is never to happen: what the fuzzers have found would mean something else.
    if weights.key_loss > 0 && prng.below(1000) < weights.key_loss {
        return Step::LoseKeys(prng.below(1 << 32));
    }
    let dice = prng.below(1000);
    if dice < weights.crash {
        let (dice, cores) = (prng.below(1 << 32), prng.between(1, 4) as usize);
        return match prng.below(4) {
            0 => Step::Kill(dice, cores),
            1 => Step::Restart(dice, cores),
            _ => Step::CutPower(dice, cores),
        };
    }
    if dice < weights.crash + weights.fault {
        return match prng.below(6) {
            0 => Step::Faults(30, 0, 0),
            1 => Step::Faults(0, 50, 0),
            2 => Step::Faults(10, 10, 20),
            3 => Step::Away(prng.percent(50)),
            _ => Step::Heal,
        };
    }
    if setup.block_count_first.is_some() && prng.percent(1) {
        return Step::Grow;
    }
    let core = prng.index(4);
    let len_max = setup.write_blocks_max().min(span);
    let short = prng.percent(70);
    let len = prng.between(1, if short { len_max.min(3) } else { len_max });
    let lba = prng.below(span - len + 1);
    let cut = prng.index(4096);
    match prng.below(100) {
        0..=27 => Step::Write(core, lba, len, cut),
        28..=31 => Step::WriteFua(core, lba, len, cut),
        // Others are as long as a part of a segment; a read may be of anything.
        32..=41 if cut.is_multiple_of(4) => Step::Read(core, lba, (len * 16).min(span - lba), cut),
        32..=41 => Step::Read(core, lba, len, cut),
        42..=45 => Step::Lend(core, lba, len, prng.pick(&[1, 3, 30, 300])),
        46..=48 => Step::Zero(core, lba, len),
        49..=51 => Step::Unmap(core, lba, len),
        52..=54 => Step::Flush(core),
        55 => Step::Abort(core, prng.below(64)),
        56..=71 | 93..=94 if prng.percent(weights.busy_percent) => Step::Write(core, lba, len, cut),
        56..=71 => Step::Core(core),
        72..=79 => Step::Background(prng.between(1, 8)),
        80..=89 => Step::Base(prng.between(1, 4)),
        90..=92 => Step::Pass(prng.pick(&[1, 60, 2000, 6000])),
        93..=94 => Step::Turns(prng.between(1, 30)),
        95 => Step::Settle,
        96 if prng.percent(40) => Step::Drain,
        96 => Step::DrainStart,
        97 if prng.percent(60) => Step::CheckpointBegin(prng.between(1, 3) as u32),
        97 => Step::CheckpointEnd,
        98 if prng.percent(50) => Step::Mode(prng.pick(&CacheMode::ALL)),
        98 => Step::Strict(prng.percent(50)),
        _ => Step::GcPercent(prng.between(0, 90) as u8),
    }
}

/// Takes one step.
///
/// # Errors
/// A promise was broken.
pub fn apply(machine: Machine, step: Step) -> Result<Machine, Violation> {
    let cores = machine.setup().core_count;
    match step {
        Step::Write(core, lba, len, cut) => machine.write(core % cores, lba, len, Fua::No, &[cut]),
        Step::WriteFua(core, lba, len, cut) => {
            machine.write(core % cores, lba, len, Fua::Yes, &[cut]);
        }
        Step::Read(core, lba, len, cut) => machine.read(core % cores, lba, len, &[cut]),
        Step::Lend(core, lba, len, turns) => machine.lend(core % cores, lba, len, turns),
        Step::Zero(core, lba, len) => machine.clear(core % cores, Op::WriteZeroes, lba, len),
        Step::Unmap(core, lba, len) => machine.clear(core % cores, Op::Unmap, lba, len),
        Step::Flush(core) => machine.flush(core % cores),
        Step::Abort(core, dice) => machine.abort(core % cores, dice),
        Step::Core(core) => machine.poll_core(core % cores),
        Step::Background(count) => (0..count).for_each(|_| machine.poll_background()),
        Step::Base(count) => (0..count).for_each(|_| machine.complete_base()),
        Step::Pass(ms) => machine.pass_ms(ms),
        Step::Turns(count) => (0..count).for_each(|_| machine.poll_all()),
        Step::Settle => {
            heal(&machine);
            machine.settle()?;
        }
        Step::Drain => {
            heal(&machine);
            machine.drain()?;
            machine.check_drained()?;
        }
        Step::DrainStart => machine.drain_start(),
        Step::CheckpointBegin(timeout_s) => machine.checkpoint_begin(timeout_s),
        Step::CheckpointEnd => machine.checkpoint_end(),
        Step::GcPercent(percent) => {
            machine.change_settings(SettingChange::of(Setting::GcPercent, percent.into()));
        }
        Step::Strict(strict) => {
            let order = if strict {
                WritebackOrder::Strict
            } else {
                WritebackOrder::Relaxed
            };
            machine.change_settings(SettingChange::of(Setting::WritebackOrder, order as u32));
        }
        Step::Mode(mode) => {
            machine.change_settings(SettingChange::of(Setting::CacheMode, mode as u32));
        }
        Step::Faults(write, flush, read) => set_faults(&machine, |faults| {
            faults.write_percent = write;
            faults.flush_percent = flush;
            faults.read_percent = read;
        }),
        Step::Away(gone) => set_faults(&machine, |faults| {
            faults.gone = gone;
            faults.stuck = !gone;
        }),
        Step::Heal => heal(&machine),
        Step::LoseKeys(dice) => machine.lose_keys(dice),
        Step::FlipBit(dice) => machine.flip_bit(dice),
        Step::Grow => machine.grow(),
        Step::CutPower(dice, cores) => {
            return machine.cut_power(dice, |setup| setup.core_count = cores);
        }
        Step::Kill(dice, cores) => return machine.kill(dice, |setup| setup.core_count = cores),
        Step::Restart(dice, cores) => {
            heal(&machine);
            return machine.restart(dice, |setup| setup.core_count = cores);
        }
    }
    machine.verdict()?;
    Ok(machine)
}

fn set_faults(machine: &Machine, change: impl FnOnce(&mut Faults)) {
    machine.with_outside(|outside| change(&mut outside.base.faults));
}

fn heal(machine: &Machine) {
    set_faults(machine, |faults| *faults = Faults::default());
}

/// What a history has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Tells it from others.
    pub event_hash: u64,
    /// Crashes and restarts.
    pub restarts: u64,
    /// Requests of the host.
    pub requests: u64,
    /// Reads that waited for the base read of another core.
    pub awaited_reads: u64,
}

/// Runs a history, then lets the base be well, completes everything, reads every block, drains, compares.
///
/// # Errors
/// A promise was broken.
pub fn run(
    setup: &Setup,
    seed: u64,
    steps: &[Step],
    observer: Option<SharedObserver>,
) -> Result<Outcome, Violation> {
    let mut machine = Machine::new(setup.clone(), seed, observer)?;
    let (mut restarts, mut requests, mut awaited_reads) = (0, 0, 0);
    for step in steps {
        if matches!(
            step,
            Step::CutPower(..) | Step::Kill(..) | Step::Restart(..)
        ) {
            restarts += 1;
            awaited_reads += machine.cache().stats().awaited_reads;
        }
        requests += u64::from(matches!(
            step,
            Step::Write(..)
                | Step::WriteFua(..)
                | Step::Read(..)
                | Step::Lend(..)
                | Step::Zero(..)
                | Step::Unmap(..)
                | Step::Flush(..)
        ));
        machine = apply(machine, *step)?;
    }
    finish(&machine)?;
    Ok(Outcome {
        event_hash: machine.event_hash(),
        restarts,
        requests,
        awaited_reads: awaited_reads + machine.cache().stats().awaited_reads,
    })
}

/// The end of every history.
///
/// # Errors
/// A promise was broken.
pub fn finish(machine: &Machine) -> Result<(), Violation> {
    heal(machine);
    machine.settle()?;
    machine.read_all()?;
    machine.drain()?;
    machine.check_drained()?;
    machine.give_back_all()?;
    machine.cache().check_invariants();
    machine.cache().fetches.check_at_rest();
    machine.read_all()?;
    machine.verdict()
}

/// Some requests, to a machine that was just recovered, and the end.
///
/// # Errors
/// A promise was broken.
pub fn go_on(machine: Machine, prng: &mut Prng) -> Result<(), Violation> {
    let weights = Weights {
        crash: 0,
        fault: 0,
        key_loss: 0,
        busy_percent: 0,
    };
    let steps = draw(prng, machine.setup(), weights, STEPS_AFTER_RECOVERY);
    let machine = steps.into_iter().try_fold(machine, apply)?;
    finish(&machine)
}

/// As [`run`]; a panic counts as a violation.
///
/// # Errors
/// A promise was broken.
pub fn run_caught(
    setup: &Setup,
    seed: u64,
    steps: &[Step],
    observer: Option<SharedObserver>,
) -> Result<Outcome, Violation> {
    let result = catch_unwind(AssertUnwindSafe(|| run(setup, seed, steps, observer)));
    result.unwrap_or_else(|panic| Err(Violation(format!("a panic: {}", panic_text(&*panic)))))
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    text.unwrap_or_else(|| "without a text".to_owned())
}

/// The fewest steps found that still fail, by leaving out ever smaller parts.
pub fn shrink(steps: &[Step], mut fails: impl FnMut(&[Step]) -> bool) -> Vec<Step> {
    let mut steps = steps.to_vec();
    let mut part = steps.len() / 2;
    while part > 0 {
        let mut at = 0;
        while at < steps.len() {
            let end = (at + part).min(steps.len());
            let fewer: Vec<Step> = steps[..at].iter().chain(&steps[end..]).copied().collect();
            if fails(&fewer) {
                steps = fewer;
            } else {
                at = end;
            }
        }
        part /= 2;
    }
    steps
}

/// Setups that differ in everything that matters, by number.
#[must_use]
pub fn setup_of(prng: &mut Prng) -> Setup {
    let large = prng.percent(20);
    let block_size_bytes = prng.pick(&[512, 512, 4096]);
    let segment_size_bytes = if large { 64 << 10 } else { 16 << 10 };
    let block_count = if block_size_bytes == 512 {
        prng.pick(&[64, 93, 200])
    } else {
        prng.pick(&[16, 32])
    };
    let mut setup = Setup {
        block_size_bytes,
        block_count,
        segment_size_bytes,
        segment_count: prng.between(5, 20),
        data_crc: prng.pick(&[DataCrc::Off, DataCrc::On]),
        order: prng.pick(&[
            WritebackOrder::Strict,
            WritebackOrder::Strict,
            WritebackOrder::Relaxed,
        ]),
        gc_percent: prng.pick(&[0, 30, 70, 90]),
        core_count: prng.pick(&[1, 2, 3, 3]),
        stream_count_max: prng.pick(&[1, 2, 3, 4]),
        yield_percent: prng.pick(&[0, 2, 10, 30]),
        ..Setup::default()
    };
    if prng.percent(40) {
        let mode = prng.pick(&CacheMode::ALL);
        setup.settings = setup.settings.and(Setting::CacheMode, mode as u32);
    }
    setup.used_before = prng.percent(20);
    setup.block_count_first = prng.percent(15).then_some(block_count / 2);
    setup.base_caps.flush = prng.percent(85);
    setup.base_caps.unmap = prng.percent(70);
    setup.recovered_by = Crew {
        worker_count: prng.pick(&[1, 2, 3]),
        yield_percent: prng.pick(&[2, 10, 30]),
        seed: prng.next_u64(),
    };
    // Not drawn: what the fuzzers have found would mean something else.
    setup.pad_pages = [64, 64, 6, 1][setup.recovered_by.seed as usize % 4];
    if setup.recovered_by.seed & 8 != 0 {
        setup.readers = Readers::Scribbling;
    }
    setup.base_fails_unmaps = setup.recovered_by.seed & 0x18 == 0x18;
    setup.bytes_checksummed_per_fence =
        [4096, 16 << 10, 0, 4096][setup.recovered_by.seed as usize >> 6 & 3];
    setup.base_caps.write_zeroes = setup.recovered_by.seed & 0x20 != 0;
    if setup.data_crc == DataCrc::On && setup.recovered_by.seed & 4 != 0 {
        setup.settings = setup.settings.and(Setting::VerifyReads, 1);
    }
    setup.settings = with_settings(setup.settings, setup.recovered_by.seed);
    setup
}

/// When write-back and the scrub work, how fast, and what of reads is kept; by a number. Half of the caches have the
/// defaults.
fn with_settings(settings: SettingChange, seed: u64) -> SettingChange {
    const MARKS: [(u32, u32); 3] = [(1, 0), (60, 5), (95, 94)];
    let mut prng = Prng::new(mix(seed, 1));
    if prng.percent(50) {
        return settings;
    }
    let (high, low) = prng.pick(&MARKS);
    settings
        .and(Setting::DirtyHighPercent, high)
        .and(Setting::DirtyLowPercent, low)
        .and(Setting::DirtyAgeS, prng.pick(&[0, 1, 5]))
        .and(Setting::IdleWritebackMs, prng.pick(&[0, 0, 1, 20]))
        .and(Setting::WritebackRateMibS, prng.pick(&[0, 0, 1]))
        .and(Setting::ScrubMibS, prng.pick(&[0, 8, 4096]))
        .and(Setting::ReadAdmission, prng.pick(&[0, 1, 2]))
        .and(Setting::SequentialKib, prng.pick(&[4, 8, 32]))
        .and(Setting::SequentialCutoffKib, prng.pick(&[0, 0, 8]))
}

/// Flips a bit in one of the two copies of the superblock, of the tails, or of the info of a segment. If they
/// differ, an update was cut, and the other one may be all there is: then nothing is damaged.
pub fn damage_a_copy(setup: &Setup, image: &mut [u8], prng: &mut Prng) {
    let segments_start = setup.device_size_bytes() - setup.segment_size_bytes * setup.segment_count;
    let segment = segments_start + prng.below(setup.segment_count) * setup.segment_size_bytes;
    let [first, second] = prng.pick(&[
        [0, 32 << 10],
        [8 << 10, 40 << 10],
        [segment, segment + (4 << 10)],
    ]);
    let bytes = |start: u64| start as usize..start as usize + COPY_BYTES;
    if image[bytes(first)] == image[bytes(second)] {
        let at = prng.pick(&[first, second]) + prng.below(64);
        image[at as usize] ^= 1 << prng.below(8);
    }
}
