//! Formats, wrong bases, the cost of an opening: items 19, 20, 38.

use super::metadata::used_cache;
use super::{Context, apply, check, in_order};
use crate::engine::{BaseIdentity, FormatPolicy, Fua, OpenOptions};
use crate::recovery::{OpenError, OpenStep, Opening};
use crate::sim::base::BaseImage;
use crate::sim::crash::Cuts;
use crate::sim::image::ImagePmem;
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::{Expectation, Violation};
use crate::sim::pmem::SimPmem;
use crate::sim::prng::Prng;
use crate::sim::recover;
use crate::sim::script::Step;

/// The enumerator looks at a machine from its first store on, and that is one of the format.
pub(super) fn a_format_can_be_cut_anywhere(context: &mut Context) -> Result<(), Violation> {
    let limits = context.limits;
    context.limits.twice_every = 2;
    context.limits.nested_every = 8;
    context.limits.go_on_every = 40;
    let result = context.cut_script(&in_order(), &[Step::Write(0, 0, 8, 0), Step::Settle]);
    context.limits = limits;
    result
}

/// What a device that was being formatted turned out to hold.
#[derive(Debug, Default)]
struct Outcomes {
    old: u32,
    new: u32,
}

/// The old cache has dirty data, used generations, and ksets everywhere.
pub(super) fn a_format_over_an_old_cache_leaves_the_old_one_or_the_new_one(
    context: &mut Context,
) -> Result<(), Violation> {
    let (machine, base) = used_cache(context)?;
    let old = machine.with_outside(|outside| Expectation::of(&outside.model));
    let pmem = SimPmem::from_image(machine.pmem().live_image());
    let cuts = Cuts::of(&pmem, 8, 8, Prng::new(context.seed));
    let force = OpenOptions {
        new_uuid: *b"a newer cache...",
        ..machine.setup().options(FormatPolicy::Force)
    };
    let blocks = |lba, len| base.blocks(lba, len);
    recover::open(pmem, force, blocks)
        .map_err(|error| Violation(format!("a format by force is refused: {error}")))?;
    let mut outcomes = Outcomes::default();
    for bytes in cuts.take() {
        context.tally.crash_states += 1;
        let image = ImagePmem::new(bytes);
        let after = OpenOptions {
            new_uuid: *b"the third cache.",
            ..machine.setup().options(FormatPolicy::Auto)
        };
        let cache = recover::open(image, after, blocks)
            .map_err(|error| Violation(format!("after a cut in a format: {error}")))?;
        cache.check_invariants();
        let found = recover::look(&cache, &base, old.block_count())?;
        let is_old = old.check(|lba| found[lba as usize]).is_ok();
        let is_new = (0..)
            .zip(&found)
            .all(|(lba, stamp)| *stamp == base.stamp(lba));
        match (is_old, is_new) {
            (true, _) => outcomes.old += 1,
            (false, true) => outcomes.new += 1,
            (false, false) => {
                return Err(Violation("a cut in a format left a mixture".to_owned()));
            }
        }
    }
    check(outcomes.old > 0 && outcomes.new > 0, || {
        format!("{outcomes:?}")
    })
}

/// Every way in which a base can be the wrong one, as far as the engine is told.
pub(super) fn a_wrong_base_is_refused_and_nothing_is_written(
    context: &mut Context,
) -> Result<(), Violation> {
    let (machine, base) = used_cache(context)?;
    let bytes = machine.pmem().live_image();
    // The base of another cache of the same shape, with other data: a swapped pair.
    let mut other = Prng::new(context.seed + 1);
    let swapped = {
        let machine = Machine::new(in_order(), context.seed + 1, None)?;
        let steps: Vec<Step> = (0..96)
            .map(|lba| Step::Write(0, lba, 1, other.index(64)))
            .chain([Step::Settle, Step::Drain])
            .collect();
        let machine = apply(machine, &steps)?;
        machine.with_outside(|outside| outside.base.current_image())
    };
    type Change = fn(&mut BaseIdentity);
    let changes: [(&str, Change, &BaseImage); 5] = [
        ("one block more", |base| base.block_count += 1, &base),
        ("one block less", |base| base.block_count -= 1, &base),
        ("larger blocks", |base| base.block_size_bytes = 4096, &base),
        (
            "another name and uuid",
            |base| {
                base.name = "Base1".to_owned();
                base.uuid = [9; 16];
            },
            &base,
        ),
        ("other content", |_| (), &swapped),
    ];
    for (what, change, content) in changes {
        let pmem = SimPmem::from_image(bytes.clone());
        let mut options = machine.setup().options(FormatPolicy::Auto);
        change(&mut options.base);
        match recover::open(pmem.clone(), options, |lba, len| content.blocks(lba, len)) {
            Err(
                OpenError::WrongBase { .. }
                | OpenError::BaseSize { .. }
                | OpenError::Witness { .. },
            ) => {}
            other => {
                return Err(Violation(format!(
                    "{what}: {:?}",
                    other.map(|_| "it opens")
                )));
            }
        }
        check(pmem.live_image() == bytes, || {
            format!("{what}: refused, but written to")
        })?;
    }
    // One of name and uuid may change: many kinds of base get a new uuid at each start.
    for change in [
        |base: &mut BaseIdentity| base.uuid = [9; 16],
        |base: &mut BaseIdentity| base.name.push('x'),
    ] {
        let pmem = SimPmem::from_image(bytes.clone());
        let mut options = machine.setup().options(FormatPolicy::Auto);
        change(&mut options.base);
        let opened = recover::open(pmem, options, |lba, len| base.blocks(lba, len));
        check(opened.is_ok(), || "the right base is refused".to_owned())?;
    }
    Ok(())
}

/// A log that fills many segments: polls grow with it, and each does a bounded piece.
pub(super) fn a_recovery_takes_polls_and_memory_in_proportion_to_the_log(
    context: &mut Context,
) -> Result<(), Violation> {
    let mut polls = Vec::new();
    for segment_count in [64, 256] {
        let setup = Setup {
            block_count: 8 * 1024,
            segment_count,
            core_count: 1,
            ..in_order()
        };
        let machine = context.machine(&setup)?;
        // A third of the space, so that nothing is written back.
        let writes = segment_count * 14 / 3;
        for number in 0..writes {
            let lba = number * 37 % 8192;
            machine.write(0, lba, 1, Fua::No, &[]);
            machine.poll_core(0);
        }
        let image = ImagePmem::new(machine.pmem().live_image());
        let base = machine.with_outside(|outside| outside.base.current_image());
        let mut opening = Opening::begin(image, setup.options(FormatPolicy::Auto))
            .map_err(|error| Violation(error.to_string()))?;
        let mut count = 0;
        loop {
            count += 1;
            match opening
                .poll()
                .map_err(|error| Violation(error.to_string()))?
            {
                OpenStep::Ready => break,
                OpenStep::ReadBase {
                    slot,
                    lba,
                    len_blocks,
                } => {
                    opening.on_base_block(slot, Ok(base.blocks(lba.0, len_blocks)));
                }
                OpenStep::Working { .. } | OpenStep::AwaitingBase => {}
            }
        }
        // A poll for each segment, 512 ksets, 64 repairs, and each block of the witness.
        let bound = segment_count + writes / 512 + segment_count / 64 + 20;
        check(count <= bound, || {
            format!("{count} polls for {segment_count} segments")
        })?;
        let info = opening.finish().info();
        let cache_pages = segment_count * 2;
        check(
            info.index_bytes <= 4096 + cache_pages.min(1024) * 16,
            || format!("{info:?}"),
        )?;
        polls.push(count);
    }
    check(polls[1] < polls[0] * 5, || {
        format!("four times the log takes {polls:?} polls")
    })
}
