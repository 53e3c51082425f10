//! Media with good checksums and impossible numbers, and devices that only look blank: an error that says
//! so, never a panic, and nothing is written (INV-OPEN-3).

use super::compat_tests::IMAGES;
use super::walk::{SegmentWalk, WalkBuf};
use crate::engine::{FormatPolicy, Fua, Op, Status};
use crate::media::{
    COUNTER_MAX, COUNTER_START_MAX, Checksums, FEATURES_COMPAT, SegmentInfo, Spot, Superblock,
    Tails, Witness, persist_superblock,
};
use crate::pmem::IovBuf;
use crate::sim::plain::{BackgroundRuns, Plain, open};
use crate::sim::pmem::SimPmem;
use crate::sim::recover::superblock_of;
use crate::units::{Agent, Generation, Lba, SegId, Seq};

const AGENT: Agent = Agent(9);

/// What opening an image says after `change`, which is given the device, its superblock and its checksums.
/// The device must be left as it was.
fn error_after(change: impl FnOnce(&SimPmem, Superblock, &Checksums)) -> String {
    let image = &IMAGES[0];
    let pmem = SimPmem::from_image(image.load());
    let superblock = superblock_of(&pmem);
    let checksums = Checksums::new(superblock.uuid);
    change(&pmem, superblock, &checksums);
    let before = pmem.durable_image();
    let error = open(pmem.clone(), &image.base_content(), image.options())
        .expect_err("it cannot be opened")
        .to_string();
    assert!(pmem.live_image() == before, "written to: {error}");
    error
}

fn change_info(segment: u32, change: impl FnOnce(&mut SegmentInfo)) -> String {
    error_after(|pmem, superblock, checksums| {
        let (geometry, id) = (superblock.geometry, SegId(segment));
        let (mut info, _) = SegmentInfo::load(pmem, &geometry, checksums, id).unwrap();
        change(&mut info);
        drop(info.persist(pmem, AGENT, &geometry, checksums, id));
    })
}

#[test]
fn a_witness_at_the_end_of_all_numbers_is_refused() {
    for (lba, len_blocks) in [(u64::MAX, 1), (u64::MAX - 3, 8), (0, 9), (255, 2)] {
        let error = error_after(|pmem, _, checksums| {
            let (mut tails, _) = Tails::load(pmem, checksums).unwrap();
            tails.witness[3] = Witness {
                lba: Lba(lba),
                len_blocks,
                crc: 0,
            };
            drop(tails.persist(pmem, AGENT, checksums));
        });
        assert!(
            error.contains("witness") && error.contains(&lba.to_string()),
            "{error}"
        );
    }
}

#[test]
fn counters_that_nobody_can_have_reached_are_damage() {
    for generation in [Generation::NONE, Generation(u64::MAX)] {
        let error = change_info(2, |info| info.generation = generation);
        assert!(error.contains("segment 2"), "{error}");
    }
    let error = change_info(2, |info| info.update = COUNTER_MAX);
    assert!(error.contains("segment 2"), "{error}");
    let error = error_after(|pmem, mut superblock, _| {
        superblock.update = u64::MAX - 1;
        drop(persist_superblock(pmem, AGENT, &mut superblock));
    });
    assert!(error.contains("superblock"), "{error}");
    let error = error_after(|pmem, _, checksums| {
        let (mut tails, _) = Tails::load(pmem, checksums).unwrap();
        tails.update = u64::MAX - 1;
        drop(tails.persist(pmem, AGENT, checksums));
    });
    assert!(error.contains("tails"), "{error}");
}

/// Sets a counter; all of them begin again from what is found.
type Count = fn(&SimPmem, Superblock, &Checksums, u64);

const COUNTS: [(&str, Count); 9] = [
    ("superblock", |pmem, mut superblock, _, value| {
        superblock.update = value - 1;
        drop(persist_superblock(pmem, AGENT, &mut superblock));
    }),
    ("update", |pmem, _, checksums, value| {
        edit_tails(pmem, checksums, |tails| tails.update = value - 1);
    }),
    ("dirty_tail", |pmem, _, checksums, value| {
        edit_tails(pmem, checksums, |tails| tails.dirty_tail = Seq(value));
    }),
    ("seq_next_min", |pmem, _, checksums, value| {
        edit_tails(pmem, checksums, |tails| tails.seq_next_min = Seq(value));
    }),
    ("epoch_min", |pmem, _, checksums, value| {
        edit_tails(pmem, checksums, |tails| tails.epoch_min = value);
    }),
    ("generation", |pmem, superblock, checksums, value| {
        edit_free_info(pmem, &superblock, checksums, |info| {
            info.generation = Generation(value)
        });
    }),
    ("update number", |pmem, superblock, checksums, value| {
        edit_free_info(pmem, &superblock, checksums, |info| info.update = value - 1);
    }),
    // Of a kset, where the seq is and where the epoch is.
    ("out of range", |pmem, superblock, checksums, value| {
        edit_last_kset(pmem, &superblock, checksums, 16, value);
    }),
    ("out of range", |pmem, superblock, checksums, value| {
        edit_last_kset(pmem, &superblock, checksums, 24, value);
    }),
];

fn edit_tails(pmem: &SimPmem, checksums: &Checksums, change: impl FnOnce(&mut Tails)) {
    let (mut tails, _) = Tails::load(pmem, checksums).unwrap();
    change(&mut tails);
    drop(tails.persist(pmem, AGENT, checksums));
}

/// Of every segment that holds no ksets.
fn edit_free_info(
    pmem: &SimPmem,
    superblock: &Superblock,
    checksums: &Checksums,
    change: impl Fn(&mut SegmentInfo),
) {
    let geometry = &superblock.geometry;
    let mut edited = 0;
    for id in (0..geometry.segment_count()).map(SegId) {
        let (mut info, _) = SegmentInfo::load(pmem, geometry, checksums, id).unwrap();
        let mut walk = SegmentWalk::new(superblock, Seq(0), id, info);
        if info.sealed.is_none() && walk.next(pmem, &mut WalkBuf::default()).is_none() {
            change(&mut info);
            drop(info.persist(pmem, AGENT, geometry, checksums, id));
            edited += 1;
        }
    }
    assert!(edited > 0);
}

/// Of the first segment that is open: the number at byte `at`.
fn edit_last_kset(
    pmem: &SimPmem,
    superblock: &Superblock,
    checksums: &Checksums,
    at: usize,
    value: u64,
) {
    let geometry = &superblock.geometry;
    for id in (0..geometry.segment_count()).map(SegId) {
        let (info, _) = SegmentInfo::load(pmem, geometry, checksums, id).unwrap();
        let (mut walk, mut buf) = (
            SegmentWalk::new(superblock, Seq(0), id, info),
            WalkBuf::default(),
        );
        let last = std::iter::from_fn(|| walk.next(pmem, &mut buf)).last();
        if let (None, Some(kset)) = (info.sealed, last) {
            let kset = Spot::kset(pmem, geometry, checksums, (id, info.generation), kset.off);
            let change = |bytes: &mut [u8]| bytes[at..][..8].copy_from_slice(&value.to_le_bytes());
            return kset.unwrap().edit(pmem, change);
        }
    }
    panic!("no segment is open");
}

/// INV-OPEN-9.
#[test]
fn a_cache_that_opens_can_be_used_and_opens_again_wherever_its_counters_stand() {
    for (name, count) in COUNTS {
        for value in [COUNTER_START_MAX + 1, COUNTER_MAX - 2, COUNTER_MAX - 1] {
            let error = error_after(|pmem, superblock, checksums| {
                count(pmem, superblock, checksums, value);
            });
            assert!(error.contains(name), "{name} {value:#x}: {error}");
        }
        let image = &IMAGES[0];
        let mut pmem = SimPmem::from_image(image.load());
        let superblock = superblock_of(&pmem);
        let checksums = Checksums::new(superblock.uuid);
        count(&pmem, superblock, &checksums, COUNTER_START_MAX - (1 << 16));
        let mut base = image.base_content();
        for round in 0..2 {
            let runs = BackgroundRuns::Always;
            let mut plain = Plain::new(pmem.clone(), base, image.options(), runs)
                .unwrap_or_else(|error| panic!("{name}, start {round}: {error}"));
            for lba in 0..40 {
                let buf = IovBuf::new(&[lba as u8 + 1; 512], &[]);
                let status = plain.run(0, Op::Write(buf.cursor(), Fua::Yes), lba, 1);
                assert_eq!(status, Status::Success, "{name}, {lba}");
            }
            assert!(plain.drain(), "{name}");
            (0..200).for_each(|_| plain.poll_background());
            base = std::mem::take(&mut plain.base);
            drop(plain);
            pmem = SimPmem::from_image(pmem.live_image());
        }
    }
}

#[test]
fn a_batch_that_ends_behind_all_numbers_is_refused() {
    let error = error_after(|pmem, _, checksums| {
        edit_tails(pmem, checksums, |tails| {
            tails.batch_end = tails.seq_next_min
        });
    });
    assert!(error.contains("batch_end"), "{error}");
}

#[test]
fn an_unknown_state_of_a_segment_is_damage() {
    let error = error_after(|pmem, superblock, checksums| {
        for copy in [0, 1] {
            let spot = Spot::segment_info(&superblock.geometry, checksums, SegId(1), copy);
            spot.edit(pmem, |bytes| {
                bytes[4..8].copy_from_slice(&7u32.to_le_bytes())
            });
        }
    });
    assert!(error.contains("segment 1"), "{error}");
}

#[test]
fn a_base_name_of_impossible_length_is_refused() {
    for len in [0usize, 256] {
        let error = error_after(|pmem, mut superblock, _| {
            superblock.base.name = "n".repeat(255);
            drop(persist_superblock(pmem, AGENT, &mut superblock));
            for copy in [0, 1] {
                Spot::superblock(copy).edit(pmem, |bytes| {
                    bytes[128..132].copy_from_slice(&(len as u32).to_le_bytes());
                });
            }
        });
        assert!(error.contains("base_name_len"), "{error}");
    }
}

#[test]
fn compatible_features_survive_a_change_of_the_superblock() {
    let image = &IMAGES[0];
    let pmem = SimPmem::from_image(image.load());
    let mut superblock = superblock_of(&pmem);
    superblock.features_compat = 0x50;
    drop(persist_superblock(&pmem, AGENT, &mut superblock));
    let mut options = image.options();
    options.base.uuid = [0x77; 16];
    open(pmem.clone(), &image.base_content(), options).unwrap();
    let after = superblock_of(&pmem);
    assert_eq!(after.features_compat, 0x50 | FEATURES_COMPAT);
    assert_eq!(after.base.uuid, [0x77; 16]);
}

#[test]
fn a_device_with_data_behind_a_blank_start_is_not_formatted_unasked() {
    let image = &IMAGES[0];
    let size = 4 << 20;
    // The superblock of btrfs; ZFS, RAID and GPT use the end.
    for at in [64 << 10, (1 << 20) - 1, size - (1 << 20), size - 1] {
        let mut bytes = vec![0; size];
        bytes[at] = 0x5f;
        let pmem = SimPmem::from_image(bytes.clone());
        let error = open(
            pmem.clone(),
            &image.base_content(),
            image.options_at_format(),
        )
        .expect_err("it holds data");
        assert_eq!(error.errno(), libc::EEXIST);
        assert!(error.to_string().contains("force"), "{error}");
        assert!(pmem.live_image() == bytes);
    }
}

#[test]
fn force_overwrites_whatever_a_superblock_says() {
    let image = &IMAGES[0];
    let pmem = SimPmem::from_image(image.load());
    for copy in [0, 1] {
        // A segment size that is no power of two.
        Spot::superblock(copy).edit(&pmem, |bytes| {
            bytes[80..88].copy_from_slice(&12345u64.to_le_bytes());
        });
    }
    let base = image.base_content();
    let error = open(pmem.clone(), &base, image.options()).expect_err("the geometry is impossible");
    assert!(error.to_string().contains("12345"), "{error}");
    let mut options = image.options_at_format();
    options.format = FormatPolicy::Force;
    open(pmem, &base, options).unwrap();
}

#[test]
fn damage_of_a_sealed_segment_is_refused_unless_the_base_holds_all_of_it() {
    // INV-OPEN-4.
    let (mut refused, mut opened) = (0, 0);
    for image in &IMAGES {
        let pristine = SimPmem::from_image(image.load());
        let superblock = superblock_of(&pristine);
        let checksums = Checksums::new(superblock.uuid);
        let (tails, _) = Tails::load(&pristine, &checksums).unwrap();
        for segment in (0..superblock.geometry.segment_count()).map(SegId) {
            let (info, _) =
                SegmentInfo::load(&pristine, &superblock.geometry, &checksums, segment).unwrap();
            let Some(sealed) = info.sealed else { continue };
            let pmem = SimPmem::from_image(image.load());
            let kset = superblock.geometry.segment_off(segment).plus(8 << 10);
            pmem.flip_bit(kset.plus(9), 3);
            let before = pmem.live_image();
            let result = open(pmem.clone(), &image.base_content(), image.options());
            let is_clean = sealed.last_seq <= tails.dirty_tail;
            assert_eq!(result.is_ok(), is_clean, "{segment:?}, {sealed:?}");
            let Err(error) = result else {
                opened += 1;
                continue;
            };
            let expected = format!("segment {} is damaged", segment.0);
            assert!(error.to_string().contains(&expected), "{error}");
            assert!(pmem.live_image() == before, "written to: {error}");
            refused += 1;
        }
    }
    assert!(
        refused > 0 && opened > 0,
        "{refused} refused, {opened} opened"
    );
}
