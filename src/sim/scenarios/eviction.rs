//! What reclaiming keeps, and what keeps it from reclaiming. Items 43, 44 and 49.

use super::{Context, apply, check, heal, in_order, is_cached};
use crate::engine::{Class, Fua, SegmentState};
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::Violation;
use crate::sim::script::{self, Step};
use crate::units::{Lba, SegId};

/// Blocks of a page.
const PAGE: u64 = 8;
/// Five or so go into a segment.
const PAGES: u64 = 24;

fn setup() -> Setup {
    Setup {
        segment_size_bytes: 32 << 10,
        segment_count: 16,
        block_count: 400,
        gc_percent: 90,
        ..in_order()
    }
}

fn write_pages(pages: impl Iterator<Item = u64>) -> Vec<Step> {
    let write = |page| [Step::Write(0, page * PAGE, PAGE, 0), Step::Core(0)];
    pages.flat_map(write).collect()
}

fn cached_count(machine: &Machine, pages: impl Iterator<Item = u64>) -> usize {
    pages
        .filter(|page| is_cached(machine, Lba(page * PAGE)))
        .count()
}

/// Segments that were overwritten for the most part are compacted, and nothing that is left in them is forgotten. The
/// power goes at every moment of it.
pub(super) fn what_is_left_of_an_overwritten_segment_is_kept(
    context: &mut Context,
) -> Result<(), Violation> {
    let seed = context.seed;
    context.cut(&setup(), |machine| {
        let mut steps = write_pages(0..PAGES);
        steps.extend(write_pages((0..PAGES).filter(|page| page % 3 != 0)));
        steps.extend([Step::Drain, Step::GcPercent(35), Step::Turns(40)]);
        let machine = apply(machine, &steps)?;
        let stats = machine.cache().stats();
        let count = cached_count(&machine, 0..PAGES);
        check(
            stats.segments_compacted > 0 && stats.gc_copied_bytes > 0 && count == PAGES as usize,
            || format!("{count} of {PAGES} pages are cached: {stats:?}"),
        )?;
        // What was copied is overwritten again, and that is reclaimed: no copy comes back.
        let mut steps = write_pages((0..PAGES).filter(|page| page % 3 == 0));
        steps.extend([Step::Drain, Step::GcPercent(0), Step::Turns(60)]);
        steps.extend((0..PAGES).map(|page| Step::Read(1, page * PAGE, PAGE, 0)));
        steps.extend([Step::Settle, Step::CutPower(seed, 2)]);
        apply(machine, &steps)
    })
}

/// A scan of what is not cached, several times the size of the cache, does not drive out what is read again.
pub(super) fn what_is_read_again_outlives_a_scan(context: &mut Context) -> Result<(), Violation> {
    let setup = Setup {
        block_count: 4000,
        gc_percent: 60,
        ..setup()
    };
    let hot = 0..6;
    let mut steps = write_pages(0..PAGES);
    steps.push(Step::Drain);
    let mut machine = apply(context.machine(&setup)?, &steps)?;
    for round in 0..30_u64 {
        let read_hot = |page| [Step::Read(0, page * PAGE, PAGE, 0), Step::Core(0)];
        let mut steps: Vec<Step> = hot.clone().flat_map(read_hot).collect();
        // Reads of the largest size that is put into so small segments, one behind the other.
        let scan = |number: u64| Step::Read(1, 400 + (round * 8 + number) * 2 * PAGE, 2 * PAGE, 0);
        steps.extend((0..8).flat_map(|number| [scan(number), Step::Settle]));
        machine = apply(machine, &steps)?;
    }
    let stats = machine.cache().stats();
    let count = cached_count(&machine, hot.clone());
    check(
        stats.fill_bytes > 2 * setup.device_size_bytes()
            && stats.segments_reclaimed > 16
            && count == hot.clone().count(),
        || format!("{count} hot pages are cached: {stats:?}"),
    )?;
    script::finish(&machine)
}

/// Read fills on probation that are in use may have so many segments in a cache of this size, and one that is going.
const PROBATION_SEGMENTS: usize = 2 + 1;

/// Nor does it drive out what was read once, by itself, or written: it makes room for itself.
pub(super) fn what_was_asked_for_by_itself_outlives_a_scan(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        block_count: 4000,
        gc_percent: 60,
        ..setup()
    };
    // More than there is room for: from now on each new segment costs an old one.
    let written = 0..3 * PAGES;
    let mut steps = write_pages(written.clone());
    steps.extend([Step::Drain, Step::Turns(40)]);
    // From the end to the beginning, so no sequence.
    let alone = 80..90;
    let read_alone = |page| [Step::Read(1, page * PAGE, PAGE, 0), Step::Settle];
    steps.extend(alone.clone().rev().flat_map(read_alone));
    steps.push(Step::Turns(40));
    let mut machine = apply(context.machine(&setup)?, &steps)?;
    let written_before = cached_count(&machine, written.clone());
    for number in 0..200 {
        let scan = Step::Read(1, 800 + number * 2 * PAGE, 2 * PAGE, 0);
        machine = apply(machine, &[scan, Step::Settle, Step::Turns(2)])?;
        let on_probation = segments_on_probation(&machine);
        check(on_probation <= PROBATION_SEGMENTS, || {
            format!("a scan has {on_probation} segments")
        })?;
    }
    let stats = machine.cache().stats();
    let count = cached_count(&machine, alone.clone());
    // As much as probation has got.
    let written_min = written_before - PROBATION_SEGMENTS * 7;
    let written_count = cached_count(&machine, written);
    check(
        stats.fill_bytes > 2 * setup.device_size_bytes()
            && count == alone.count()
            && written_count >= written_min,
        || {
            format!(
                "a scan has driven out all but {count} pages that were read and {written_count} of \
                 {written_before} that were written: {stats:?}"
            )
        },
    )?;
    script::finish(&machine)
}

fn segments_on_probation(machine: &Machine) -> usize {
    let segments = &machine.cache().segments;
    let is_on_probation = |id: &SegId| {
        let segment = segments.get(*id);
        let in_use = matches!(segment.state(), SegmentState::Open | SegmentState::Sealed);
        in_use && segment.class() == Class::Probation
    };
    segments.ids().filter(is_on_probation).count()
}

/// What keeps the dirty tail where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    BaseFails,
    Checkpoint,
}

/// One page is dirty and stays so. What is read meanwhile is several times what the cache holds, and then half of what it
/// holds is written. With so few segments that there are none for fills alone, nothing of it is kept.
pub(super) fn read_fills_take_no_room_from_writes_while_the_tail_stands_still(
    context: &mut Context,
) -> Result<(), Violation> {
    for (hold, segment_count) in [
        (Hold::BaseFails, 16),
        (Hold::Checkpoint, 16),
        (Hold::BaseFails, 10),
    ] {
        let setup = Setup {
            block_count: 4000,
            segment_count,
            ..setup()
        };
        let machine = stand_still(context.machine(&setup)?, hold)?;
        let tail = machine.cache().dirty_tail();
        // No sequence: nothing is on probation.
        for number in 0..150 {
            machine.read(1, 400 + number * 37 % 225 * 2 * PAGE, 2 * PAGE, &[]);
            (0..4).for_each(|_| machine.poll_all());
        }
        let written = segment_count / 2 * 7;
        for page in 0..written {
            machine.write(0, page * PAGE, PAGE, Fua::No, &[]);
            (0..12).for_each(|_| machine.poll_all());
            check(machine.outstanding() == 0, || {
                format!(
                    "a write waits although little is dirty: {page} of {written} pages, {hold:?}"
                )
            })?;
        }
        let stats = machine.cache().stats();
        let are_kept = stats.fill_bytes > setup.device_size_bytes();
        check(
            machine.cache().dirty_tail() == tail && are_kept == (segment_count == 16),
            || format!("{hold:?}, {segment_count} segments, {tail:?}: {stats:?}"),
        )?;
        heal(&machine);
        if hold == Hold::Checkpoint {
            machine.checkpoint_end();
        }
        script::finish(&machine)?;
    }
    Ok(())
}

/// A page is dirty, and the dirty tail does not get past it.
fn stand_still(machine: Machine, hold: Hold) -> Result<Machine, Violation> {
    let page = Step::Write(0, 0, PAGE, 0);
    let machine = match hold {
        Hold::BaseFails => apply(
            machine,
            &[
                Step::Faults(100, 0, 0),
                page,
                Step::Core(0),
                Step::DrainStart,
                Step::Turns(60),
            ],
        )?,
        Hold::Checkpoint => {
            let begin = Step::CheckpointBegin(3600);
            apply(machine, &[begin, Step::Turns(20), page, Step::Turns(20)])?
        }
    };
    check(machine.cache().tail_stands(), || {
        format!("{hold:?}: the tail does not stand still")
    })?;
    Ok(machine)
}
