//! The log: stale and forged ksets, changes of segment, damage. Items 5 to 7, 12, and 48.

use super::{Context, apply, check, in_order};
use crate::engine::{FormatPolicy, Fua, Op, SegmentState};
use crate::media::{
    ChecksumSeed, Checksums, KEYS_START_BYTES, Key, KeyKind, Kset, KsetBuilder, KsetContext,
    KsetReader, Proof, SegmentInfo, Superblock, kset_size_bytes,
};
use crate::pmem::{IovBuf, LINE_SIZE_BYTES};
use crate::sim::image::ImagePmem;
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::{Expectation, Violation};
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::sim::pmem::{SimPmem, SimState};
use crate::sim::recover::{self, superblock_of};
use crate::sim::script::Step;
use crate::units::{Epoch, Generation, Lba, PmemOff, SegId, Seq};
use std::sync::{Arc, Mutex, PoisonError};

/// Writes of one block: every kset has one line, so those of the lap before lie exactly where the next ones
/// come.
pub(super) fn an_earlier_lap_of_a_segment_is_not_taken_for_the_log(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        segment_count: 4,
        gc_percent: 0,
        core_count: 1,
        ..in_order()
    };
    let lap = || (0..60).map(|number| Step::Write(0, number * 7 % 96, 1, 0));
    let mut steps = Vec::new();
    for step in lap().chain(lap()).chain(lap()) {
        steps.extend([step, Step::Core(0)]);
        if steps.len() % 20 == 0 {
            steps.extend([Step::Flush(0), Step::DrainStart, Step::Turns(6)]);
        }
    }
    context.cut_script(&setup, &steps)
}

/// What a trap is sealed with.
type Forge = fn(&Checksums, SegId, u64) -> ChecksumSeed;

/// A guest writes data that look like ksets, with everything that it could know or have recorded, into
/// segments that become log. Without the uuid of the cache no checksum can be right; with it, that of an older
/// generation can.
pub(super) fn guest_data_in_the_shape_of_ksets_are_never_the_log(
    context: &mut Context,
) -> Result<(), Violation> {
    let forges: [Forge; 4] = [
        // The right cache and segment, a lap ago.
        |ours, segment, generation| ours.kset(segment.0, generation - 1),
        // The right generation of the next segment.
        |ours, segment, generation| ours.kset(segment.0 + 1, generation),
        // Another cache.
        |_, segment, generation| Checksums::new([0; 16]).kset(segment.0, generation),
        // The next lap of another cache.
        |_, segment, generation| {
            Checksums::new(*b"another cache...").kset(segment.0, generation + 1)
        },
    ];
    for forge in forges {
        let setup = Setup {
            segment_count: 5,
            gc_percent: 0,
            core_count: 1,
            ..in_order()
        };
        context.cut(&setup, |machine| {
            // A lap, so that there is an older generation.
            let lap: Vec<Step> = (0..20)
                .flat_map(|n| [Step::Write(0, n * 4, 7, 0), Step::Core(0)])
                .collect();
            let machine = apply(machine, &lap[..20])?;
            let machine = apply(machine, &[Step::Settle, Step::Drain, Step::Turns(40)])?;
            let machine = set_traps(machine, forge)?;
            apply(machine, &lap[20..])
        })?;
    }
    Ok(())
}

/// A crash; every free segment is then full of ksets that would be next if their checksums were right.
fn set_traps(machine: Machine, forge: Forge) -> Result<Machine, Violation> {
    let cache = machine.cache();
    let checksums = Checksums::new(superblock_of(machine.pmem()).uuid);
    let mut image = machine.pmem().live_image();
    let mut traps = 0;
    for id in cache.segments.ids() {
        let segment = cache.segments.get(id);
        let generation = segment.generation();
        if segment.state() != SegmentState::Free || generation == Generation::FIRST {
            continue;
        }
        let generation = generation.0;
        let seed = forge(&checksums, id, generation);
        let start = cache.geometry.segment_off(id).0;
        let end = cache.geometry.segment_size_bytes();
        for at in (u64::from(KEYS_START_BYTES)..end).step_by(LINE_SIZE_BYTES as usize) {
            let number = (at - u64::from(KEYS_START_BYTES)) / LINE_SIZE_BYTES;
            let mut builder = KsetBuilder::default();
            builder.push(
                &Key {
                    lba: Lba(number % machine.setup().block_count),
                    len_blocks: 1,
                    kind: KeyKind::Data,
                    payload_off: (end - 512) as u32,
                    crc: 0,
                },
                cache.geometry.block_shift(),
            );
            let seq = Seq(1_000_000 + number);
            let bytes = builder.finish(seed, number as u32, seq, Epoch(0), Proof::Fence);
            let off = (start + at) as usize;
            image[off..off + bytes.len()].copy_from_slice(bytes);
            traps += 1;
        }
    }
    check(traps > 200, || format!("only {traps} traps were set"))?;
    let base = machine.with_outside(|outside| outside.base.current_image());
    machine.crash(image, &base, 5, |_| ())
}

/// Two large writes fill a segment: every other batch seals one and opens another, on two cores.
pub(super) fn the_log_can_be_cut_wherever_it_enters_another_segment(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        gc_percent: 20,
        yield_percent: 10,
        ..Setup::default()
    };
    let mut steps = Vec::new();
    for round in 0..14 {
        steps.extend([
            Step::Write(0, round * 5, 7, 0),
            Step::Write(1, round * 5 + 3, 7, 0),
            Step::Core(0),
            Step::Core(1),
        ]);
        if round % 3 == 2 {
            steps.extend([Step::DrainStart, Step::Turns(8)]);
        }
    }
    context.cut_script(&setup, &steps)
}

/// A kset on the media.
struct Found {
    segment: SegId,
    kset: Kset,
    keys: Vec<Key>,
    sealed: bool,
    /// The last one of its segment.
    last: bool,
}

fn ksets_of(image: &ImagePmem, superblock: &Superblock) -> Vec<Found> {
    let checksums = Checksums::new(superblock.uuid);
    let geometry = &superblock.geometry;
    let mut found: Vec<Found> = Vec::new();
    for segment in (0..geometry.segment_count()).map(SegId) {
        let info = SegmentInfo::load(image, geometry, &checksums, segment);
        let (info, _) = info.expect("the image is whole");
        let blocks = superblock.base.block_count;
        let context = KsetContext::new(geometry, blocks, &checksums, segment, info.generation);
        let (mut off, mut number) = (KEYS_START_BYTES, 0);
        let mut reader = KsetReader::default();
        let mut keys = Vec::new();
        while let Ok(kset) = reader.read(image, &context, off, number, &mut keys) {
            if number > 0
                && let Some(before) = found.last_mut()
            {
                before.last = false;
            }
            let (sealed, last) = (info.sealed.is_some(), true);
            let keys = std::mem::take(&mut keys);
            found.push(Found {
                segment,
                kset,
                keys,
                sealed,
                last,
            });
            off += kset.size_bytes;
            number += 1;
        }
    }
    found
}

/// How a flipped bit may end.
#[derive(Debug, Default)]
struct Verdicts {
    refused: u32,
    harmless: u32,
    /// The last kset of a segment that was open when the power went: it cannot be told from one that is torn.
    taken_for_torn: u32,
}

/// One bit of each word of each kset: between the tails, behind them, at the end of the log.
pub(super) fn a_flipped_bit_in_the_log_is_reported_or_harmless(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        gc_percent: 90,
        core_count: 2,
        ..in_order()
    };
    let mut steps = Vec::new();
    for round in 0..4 {
        // Fills segments of both streams; the first half is written back.
        steps.extend([Step::Write(0, round * 9, 7, 0), Step::Core(0)]);
        steps.extend([Step::Write(1, round * 9 + 4, 7, 0), Step::Core(1)]);
    }
    steps.extend([Step::Settle, Step::Drain]);
    for round in 0..5 {
        steps.extend([Step::Write(0, 40 + round * 4, 6, 0), Step::Core(0)]);
        steps.extend([Step::Write(1, round * 3, 1, 0), Step::Core(1)]);
        steps.extend([Step::Unmap(1, 80 + round, 4), Step::Core(1), Step::Settle]);
    }
    let machine = apply(context.machine(&setup)?, &steps)?;
    let bytes = machine.pmem().live_image();
    let superblock = superblock_of(machine.pmem());
    let dirty_tail = machine.cache().dirty_tail();
    let found = ksets_of(&ImagePmem::new(bytes.clone()), &superblock);
    let mut verdicts = Verdicts::default();
    for kset in &found {
        let start = superblock
            .geometry
            .segment_off(kset.segment)
            .plus(u64::from(kset.kset.off));
        for word in 0..u64::from(kset.kset.size_bytes) / 8 {
            let off = start.plus(word * 8 + word % 8);
            flip_and_open(
                &machine,
                &bytes,
                kset,
                off,
                (word % 7) as u32,
                &mut verdicts,
            )?;
        }
    }
    let behind = found.iter().filter(|kset| kset.kset.seq > dirty_tail);
    let (dirty_sealed, dirty_open) = behind.fold((0, 0), |(sealed, open), kset| {
        (
            sealed + u32::from(kset.sealed),
            open + u32::from(!kset.sealed),
        )
    });
    check(dirty_sealed > 1 && dirty_open > 3, || {
        format!("{dirty_sealed} dirty ksets in sealed segments, {dirty_open} in open ones")
    })?;
    check(verdicts.refused > 50 && verdicts.harmless > 20, || {
        format!("{verdicts:?}")
    })
}

fn flip_and_open(
    machine: &Machine,
    bytes: &[u8],
    kset: &Found,
    off: PmemOff,
    bit: u32,
    verdicts: &mut Verdicts,
) -> Result<(), Violation> {
    let mut damaged = bytes.to_vec();
    damaged[off.0 as usize] ^= 1 << bit;
    let image = ImagePmem::new(damaged.clone());
    let options = machine.setup().options(FormatPolicy::Auto);
    machine.with_outside(|outside| {
        let base = outside.base.current_image();
        let opened = recover::open(image.clone(), options, |lba, len| base.blocks(lba, len));
        let Ok(cache) = opened else {
            verdicts.refused += 1;
            return check(image.bytes() == damaged, || {
                format!("the cache is refused for a bit at {off}, but was written to")
            });
        };
        let found = recover::look(&cache, &base, outside.base.block_count())?;
        match Expectation::of(&outside.model).check(|lba| found[lba as usize]) {
            Ok(_) => verdicts.harmless += 1,
            Err(violation) => {
                let named = |lba: u64| {
                    let holds = |key: &Key| {
                        (key.lba.0..key.lba.0 + u64::from(key.len_blocks)).contains(&lba)
                    };
                    kset.keys.iter().any(holds)
                };
                let others_are_right = (0..).zip(&found).all(|(lba, stamp)| {
                    let certain = outside.model.certain(lba);
                    named(lba) || certain.is_none() || stamp.ok() == certain
                });
                check(kset.last && !kset.sealed && others_are_right, || {
                    format!("a bit at {off} is flipped, and nobody says so: {violation}")
                })?;
                verdicts.taken_for_torn += 1;
            }
        }
        Ok(())
    })
}

/// What is written is told by its bytes.
const PAGE: usize = 4096;

/// A life of a cache: two pages are written, and the power goes when their kset, the first one of a segment, was stored and
/// is not fenced, as their payloads are: there is too much of it for checksums in place of that fence. Of the kset these
/// words get there. Returns the image, and the kset that was stored.
fn life_of_one_write(
    setup: &Setup,
    image: Vec<u8>,
    lba: u64,
    words: &'static [u64],
) -> Result<(Vec<u8>, Vec<u8>), Violation> {
    let pmem = SimPmem::from_image(image);
    let options = setup.options(FormatPolicy::Auto);
    let base = vec![0; setup.block_count as usize * PAGE];
    let plain = Plain::new(pmem.clone(), base, options, BackgroundRuns::InDrains);
    let mut plain = plain.map_err(|error| Violation(format!("it does not open: {error}")))?;
    let start = plain.cache.geometry.segment_off(SegId(0)).0 + u64::from(KEYS_START_BYTES);
    let kset = start..start + kset_size_bytes(2) as u64;
    let seen = Arc::new(Mutex::new(None));
    let cut = Arc::clone(&seen);
    let hook = move |state: &SimState, _| {
        let pending = state.pending_words();
        let is_first_kset = pending.iter().all(|word| kset.contains(&word.off.0));
        if is_first_kset && !pending.is_empty() {
            let is_kept = |at: usize| words.contains(&((pending[at].off.0 - kset.start) / 8));
            let image = state.crash_image(|at, _| usize::from(is_kept(at)));
            let stored = state.live_image()[kset.start as usize..kset.end as usize].to_vec();
            *cut.lock().unwrap_or_else(PoisonError::into_inner) = Some((image, stored));
        }
    };
    pmem.on_crash_point(Some(Box::new(hook)));
    let buf = IovBuf::new(&[lba as u8; 2 * PAGE], &[]);
    plain.run(0, Op::Write(buf.cursor(), Fua::No), lba, 2);
    pmem.on_crash_point(None);
    let cut = seen.lock().unwrap_or_else(PoisonError::into_inner).take();
    cut.ok_or_else(|| Violation("the write does not begin segment 0".to_owned()))
}

/// Two power cuts. Of the first kset of a segment the first one leaves checksum and addresses, the second one all the rest
/// of the next kset there, which says the same but for these: it is then the first, whole, and names what was written for
/// the second (INV-LOG-9).
pub(super) fn what_a_cut_has_left_of_a_kset_is_dead_before_the_next_one_comes(
    _context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        block_size_bytes: PAGE as u32,
        block_count: 16,
        segment_size_bytes: 32 << 10,
        core_count: 1,
        ..in_order()
    };
    let (first, second) = (3, 9);
    let blank = vec![0; setup.device_size_bytes() as usize];
    let (image, stored) = life_of_one_write(&setup, blank, first, &[0, 4, 7])?;
    let (image, _) = life_of_one_write(&setup, image, second, &[2, 3, 5, 6, 8, 9])?;
    let geometry = superblock_of(&ImagePmem::new(image.clone())).geometry;
    let start = geometry.segment_off(SegId(0)).0 as usize + KEYS_START_BYTES as usize;
    check(image[start..][..stored.len()] == stored, || {
        "the two cuts do not leave the first kset whole".to_owned()
    })?;
    let options = setup.options(FormatPolicy::Auto);
    let cache = recover::open(ImagePmem::new(image), options, |_, _| &[0; PAGE])
        .map_err(|error| Violation(format!("it does not open: {error}")))?;
    for lba in [first, first + 1, second, second + 1] {
        let mut found = vec![0; PAGE];
        let read = cache.peek(Lba(lba), &mut found);
        check(read.is_ok() && found == [0; PAGE], || {
            format!("a torn kset was completed: block {lba} holds {}", found[0])
        })?;
    }
    Ok(())
}
