//! Space: reclaiming, a full cache, more cores than segments. Items 8, 9, 18, 28, 29.

use super::{Context, apply, check, fill_up, heal, in_order, is_cached, place_of};
use crate::engine::{DataCrc, SegmentState, Status};
use crate::sim::machine::Setup;
use crate::sim::model::Violation;
use crate::sim::script::Step;
use crate::units::Lba;

/// Two cores write one block; the segment with the newer copy is reclaimed while the older one is intact, and
/// the power goes at every moment of it.
pub(super) fn the_newer_of_two_copies_may_be_reclaimed_first(
    context: &mut Context,
) -> Result<(), Violation> {
    let seed = context.seed;
    let setup = Setup {
        gc_percent: 90,
        ..in_order()
    };
    let twice_written = Lba(10);
    context.cut(&setup, |machine| {
        let machine = apply(machine, &[Step::Write(0, 10, 1, 0), Step::Core(0)])?;
        let older = place_of(&machine, twice_written);
        let mut steps = vec![Step::Write(1, 10, 1, 0), Step::Core(1)];
        let machine = apply(machine, &steps)?;
        let newer = place_of(&machine, twice_written);
        // The segment of the newer copy is sealed; that of the older one lives on, with a higher number.
        steps.clear();
        for lba in [40, 50, 60] {
            steps.extend([Step::Write(1, lba, 7, 0), Step::Core(1)]);
        }
        steps.extend([Step::Write(0, 70, 1, 0), Step::Core(0), Step::Drain]);
        let machine = apply(machine, &steps)?;
        let (Some(older), Some(newer)) = (older, newer) else {
            return Err(Violation(
                "a block that was written is not cached".to_owned(),
            ));
        };
        let cache = machine.cache();
        let [older, newer] = [older, newer].map(|place| cache.geometry.segment_of(place));
        let lap = cache.segments.get(newer).generation();
        let machine = apply(machine, &[Step::GcPercent(0), Step::Turns(8)])?;
        let cache = machine.cache();
        check(
            cache.segments.get(older).state() == SegmentState::Open
                && cache.segments.get(newer).generation() > lap
                && !is_cached(&machine, twice_written),
            || format!("the trap is not set: older in {older:?}, newer in {newer:?}"),
        )?;
        apply(
            machine,
            &[
                Step::Read(0, 8, 4, 0),
                Step::Settle,
                Step::CutPower(seed, 2),
            ],
        )
    })
}

/// Recovery meets segments that are reclaimed, reclaimed and used again, and half of that.
pub(super) fn a_reclaimed_segment_with_checksums_is_used_again(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        segment_count: 8,
        gc_percent: 0,
        data_crc: DataCrc::On,
        yield_percent: 10,
        ..Setup::default()
    };
    let mut steps = Vec::new();
    for round in 0..14 {
        steps.extend([
            Step::Write(0, round * 5 % 80, 7, 300),
            Step::Write(1, round * 5 % 80, 7, 0),
            Step::Core(round as usize % 2),
            Step::DrainStart,
            Step::Turns(5),
        ]);
        if round % 5 == 4 {
            steps.push(Step::CutPower(context.seed + round, 2));
        }
    }
    context.cut_script(&setup, &steps)
}

/// Open batches, writes that wait for room, some of them given up, and write-back under way.
pub(super) fn an_orderly_stop_while_everything_is_full_keeps_everything(
    context: &mut Context,
) -> Result<(), Violation> {
    let seed = context.seed;
    let setup = Setup {
        segment_count: 5,
        yield_percent: 10,
        ..Setup::default()
    };
    for given_up in [0, 3, 12] {
        context.cut(&setup, |machine| {
            let written = fill_up(&machine)?;
            let mut steps = Vec::new();
            for number in 0..4 {
                steps.push(Step::Write(0, (written + number) * 5 % 88, 8, 0));
                steps.push(Step::Write(1, (written + number) * 3 % 88, 5, 0));
                steps.push(Step::Unmap(1, number * 20, 9));
            }
            steps.extend([Step::DrainStart, Step::Turns(3)]);
            steps.extend((0..given_up).map(|number| Step::Abort(number % 2, number as u64)));
            steps.extend([Step::Heal, Step::Base(1), Step::Background(1)]);
            steps.push(Step::Restart(seed + given_up as u64, 3));
            steps.extend([Step::Turns(2), Step::Restart(seed, 1)]);
            apply(machine, &steps)
        })?;
    }
    Ok(())
}

/// The base does not answer; whoever waits is served in order once it does.
pub(super) fn a_full_cache_serves_reads_and_wakes_writers_in_order(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        segment_count: 5,
        ..in_order()
    };
    context.cut(&setup, |machine| {
        let written = fill_up(&machine)?;
        let waiting_before = machine.outstanding();
        let mut steps = Vec::new();
        for number in 0..6 {
            steps.push(Step::Write(0, number * 9, 8, 0));
            // Needs one line only; it may not overtake either.
            steps.push(Step::Unmap(0, number * 9 + 4, 3));
            steps.push(Step::Write(1, 40 + number, 1, 0));
        }
        let machine = apply(machine, &steps)?;
        drop(machine.take_completed());
        let machine = apply(machine, &[Step::Turns(20)])?;
        let early: Vec<_> = machine.take_completed();
        check(waiting_before > 0 && early.len() <= 6, || {
            format!("{early:?} did not wait, after {written} writes")
        })?;
        // Reads of what is cached go on. The first places were written last.
        let machine = apply(machine, &[Step::Read(1, 0, 7, 0), Step::Turns(2)])?;
        let read = machine.take_completed();
        check(read.len() == 1 && read[0].status == Status::Success, || {
            format!("a hit does not complete in a full cache: {read:?}")
        })?;
        heal(&machine);
        machine.settle()?;
        let done = machine.take_completed();
        // Three requests in a round; the third is that of the other core.
        let first = done.iter().map(|done| done.token.0).min().unwrap_or(0);
        let tokens = done.iter().map(|done| done.token.0);
        let of_core_0: Vec<u64> = tokens
            .filter(|token| (token - first) % 3 != 0 || *token == first)
            .collect();
        let sorted = of_core_0.is_sorted();
        check(sorted && of_core_0.len() > 10, || {
            format!("out of order: {done:?}")
        })?;
        Ok(machine)
    })
}

/// Most cores are idle after one write, and one of them writes several times what the cache holds.
pub(super) fn more_cores_than_segments_do_not_block_each_other(
    context: &mut Context,
) -> Result<(), Violation> {
    for segment_count in [4, 9] {
        let setup = Setup {
            segment_count,
            core_count: 12,
            stream_count_max: 12,
            yield_percent: 5,
            ..Setup::default()
        };
        let mut steps: Vec<Step> = (0..12)
            .map(|core| Step::Write(core, core as u64 * 7, 6, 0))
            .collect();
        steps.push(Step::Settle);
        for number in 0..3 * segment_count {
            steps.extend([Step::Write(11, number * 5 % 88, 8, 0), Step::Turns(1)]);
        }
        steps.push(Step::Settle);
        context.cut_script(&setup, &steps)?;
    }
    Ok(())
}
