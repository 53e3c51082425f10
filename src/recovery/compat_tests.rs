//! Images of every version of the format that was ever released must open, with every block as it was
//! written. They lie in `test/compat`.
//!
//! An image is what [`write_image`] once made of a script. A script is frozen together with its image: what
//! must be read is computed from it, and a change of it would make a good image look wrong.

use super::OpenError;
use crate::engine::{
    BaseCaps, BaseGrowth, BaseIdentity, CacheInfo, DataCrc, FormatPolicy, Fua, Op, OpenOptions,
    Setting, SettingChange, Status, WritebackOrder,
};
use crate::pmem::IovBuf;
use crate::sim::plain::{BackgroundRuns, Plain, open};
use crate::sim::pmem::SimPmem;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// 64 KiB of header area and ten segments of 16 KiB.
const DEVICE_SIZE_BYTES: u64 = (64 + 10 * 16) << 10;
const SEGMENT_SIZE_BYTES: u64 = 16 << 10;
const BASE_PAGES: u64 = 32;
const CACHE_UUID: [u8; 16] = *b"pcache v1 image.";
const GC_PERCENT: u32 = 85;

/// One step of a script. The number of a write is its place in the script, from 1.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Channel, first block, number of blocks.
    Write(usize, u64, u64),
    /// The same, with FUA.
    WriteFua(usize, u64, u64),
    /// What misses is put into the cache.
    Read(usize, u64, u64),
    Zero(usize, u64, u64),
    Unmap(usize, u64, u64),
    Flush,
    /// Everything to the base, then as much reclaiming as there is reason for.
    Drain,
}
use Step::{Drain, Flush, Read, Unmap, Write, WriteFua, Zero};

/// Two writes of seven blocks and a short one fill a segment. The first drain frees segment 0 or 1, the second
/// one some more, and what follows goes into segments of the second generation.
const SCRIPT_512: &[Step] = &[
    // Unaligned, so that most of them have two keys.
    Write(0, 0, 7),
    Write(1, 7, 7),
    Write(0, 18, 7),
    Write(1, 27, 7),
    Write(0, 36, 7),
    Write(1, 45, 7),
    Flush,
    Write(0, 54, 7),
    Write(1, 63, 7),
    Write(0, 72, 8),
    Write(1, 81, 7),
    // Overwrites across segments and streams.
    Write(1, 3, 2),
    Write(0, 38, 3),
    Write(1, 90, 7),
    Write(0, 99, 7),
    Write(1, 108, 7),
    Unmap(0, 64, 5),
    Drain,
    Write(0, 0, 8),
    Write(1, 117, 7),
    Read(1, 200, 3),
    WriteFua(0, 126, 6),
    Write(1, 20, 7),
    Zero(1, 30, 12),
    Write(0, 46, 4),
    Write(1, 135, 7),
    Write(0, 50, 6),
    Write(0, 142, 7),
    Drain,
    // From here on everything is dirty.
    Write(0, 2, 4),
    Write(1, 22, 3),
    Flush,
    Unmap(1, 90, 14),
    Write(0, 95, 2),
    Zero(0, 120, 8),
    WriteFua(1, 123, 1),
    Write(0, 150, 7),
    Write(1, 23, 7),
    Write(0, 152, 1),
    Zero(1, 255, 1),
    // Seals the segment of channel 0, with dirty data in it.
    Write(0, 211, 7),
];

/// A block and its key fill a segment of 16 KiB; keys without payload go into the rest.
const SCRIPT_4096: &[Step] = &[
    Write(0, 0, 1),
    Write(1, 1, 1),
    Write(0, 2, 1),
    Unmap(0, 9, 2),
    Write(1, 3, 1),
    Flush,
    Write(0, 4, 1),
    Write(1, 0, 1),
    Zero(1, 5, 1),
    Write(0, 6, 1),
    Drain,
    Write(1, 7, 1),
    Read(0, 20, 1),
    Write(0, 2, 1),
    Drain,
    // From here on everything is dirty.
    WriteFua(0, 4, 1),
    Write(1, 8, 1),
    Unmap(1, 6, 1),
    Zero(0, 11, 4),
    Flush,
    Write(0, 12, 1),
    Unmap(0, 31, 1),
];

/// An image, and what must be found in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Image {
    file: &'static str,
    block_size_bytes: u32,
    data_crc: DataCrc,
    writeback_order: WritebackOrder,
    /// Other settings, in the table of the superblock.
    settings: &'static [(Setting, u32)],
    script: &'static [Step],
    /// Blocks that the cache does not hold, as ranges.
    uncached: &'static [std::ops::Range<u64>],
    dirty_tail: u64,
    seq_next: u64,
    dirty_bytes: u64,
    segments_free: u64,
}

/// Written by the first version of the format.
const V1_512: Image = Image {
    file: "v1-512.img",
    block_size_bytes: 512,
    data_crc: DataCrc::On,
    writeback_order: WritebackOrder::Relaxed,
    settings: &[],
    script: SCRIPT_512,
    uncached: &[
        8..20,
        42..46,
        56..64,
        69..90,
        106..108,
        115..117,
        132..135,
        149..150,
        157..200,
        203..211,
        218..255,
    ],
    dirty_tail: 26,
    seq_next: 38,
    dirty_bytes: 16384,
    segments_free: 1,
};

pub(super) const IMAGES: [Image; 5] = [
    V1_512,
    // With the compatible feature `batch_end`.
    Image {
        file: "v1-512-batch-end.img",
        ..V1_512
    },
    // With the compatible feature `settings`.
    Image {
        file: "v1-512-settings.img",
        settings: &[(Setting::DirtyHighPercent, 80), (Setting::ScrubMibS, 0)],
        ..V1_512
    },
    // With the incompatible feature `unfenced_payloads`.
    Image {
        file: "v1-512-unfenced.img",
        data_crc: DataCrc::Off,
        uncached: &[
            8..20,
            42..46,
            56..64,
            69..90,
            104..117,
            132..135,
            149..150,
            157..200,
            208..211,
            218..255,
        ],
        segments_free: 2,
        ..V1_512
    },
    Image {
        file: "v1-4096.img",
        block_size_bytes: 4096,
        data_crc: DataCrc::Off,
        writeback_order: WritebackOrder::Strict,
        settings: &[],
        script: SCRIPT_4096,
        uncached: &[1..2, 3..4, 9..11, 15..20, 21..31],
        dirty_tail: 12,
        seq_next: 19,
        dirty_bytes: 12288,
        segments_free: 1,
    },
];

impl Image {
    fn path(&self) -> PathBuf {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        root.join("test/compat").join(self.file)
    }

    pub(super) fn load(&self) -> Vec<u8> {
        let bytes = std::fs::read(self.path()).unwrap();
        assert_eq!(bytes.len() as u64, DEVICE_SIZE_BYTES);
        bytes
    }

    fn block(&self) -> usize {
        self.block_size_bytes as usize
    }

    fn block_count(&self) -> u64 {
        BASE_PAGES * 4096 / u64::from(self.block_size_bytes)
    }

    /// The options with which the image was formatted.
    pub(super) fn options_at_format(&self) -> OpenOptions {
        OpenOptions {
            data_crc: Some(self.data_crc),
            segment_size_bytes: Some(SEGMENT_SIZE_BYTES),
            settings: self.settings.iter().fold(
                SettingChange::of(Setting::GcPercent, GC_PERCENT)
                    .and(Setting::WritebackOrder, self.writeback_order as u32),
                |change, (setting, value)| change.and(*setting, *value),
            ),
            format: FormatPolicy::Auto,
            ..self.options()
        }
    }

    /// The options with which it is opened: what it is must come from the media.
    pub(super) fn options(&self) -> OpenOptions {
        OpenOptions {
            base: BaseIdentity {
                uuid: *b"pcache v1 base..",
                name: "Base0".to_owned(),
                block_size_bytes: self.block_size_bytes,
                block_count: self.block_count(),
            },
            base_caps: BaseCaps {
                flush: true,
                unmap: true,
                write_zeroes: true,
            },
            format: FormatPolicy::Never,
            new_uuid: CACHE_UUID,
            data_crc: None,
            segment_size_bytes: None,
            base_growth: BaseGrowth::Refuse,
            settings: SettingChange::default(),
            stream_count_max: 2,
        }
    }

    /// What the blocks of the cached device hold after the first `step_count` steps.
    fn content_after(&self, step_count: usize) -> Vec<u8> {
        let block = self.block();
        let mut disk: Vec<u8> = (0..self.block_count())
            .flat_map(|lba| content(lba, 0, block))
            .collect();
        for (number, step) in (1..).zip(&self.script[..step_count]) {
            let (lba, len) = match *step {
                Write(_, lba, len) | WriteFua(_, lba, len) => (lba, len),
                Zero(_, lba, len) | Unmap(_, lba, len) => (lba, len),
                Read(..) | Flush | Drain => continue,
            };
            for lba in lba..lba + len {
                let bytes = match step {
                    Write(..) | WriteFua(..) => content(lba, number, block),
                    _ => vec![0; block],
                };
                disk[lba as usize * block..][..block].copy_from_slice(&bytes);
            }
        }
        disk
    }

    /// What the cached device holds.
    fn content(&self) -> Vec<u8> {
        self.content_after(self.script.len())
    }

    /// What the base holds: everything up to the last drain.
    pub(super) fn base_content(&self) -> Vec<u8> {
        let last_drain = self.script.iter().rposition(|step| matches!(step, Drain));
        self.content_after(last_drain.unwrap())
    }
}

/// What write `number` put into block `lba`: each word tells the block, the write and its place in the
/// block. Never a zero.
fn content(lba: u64, number: u64, block: usize) -> Vec<u8> {
    (0..block as u64 / 8)
        .flat_map(|word| (1 << 63 | number << 40 | lba << 16 | word).to_le_bytes())
        .collect()
}

/// The numbers of a script's steps tell the data of its writes.
fn run_step(machine: &mut Plain<SimPmem>, block: usize, number: u64, step: Step) {
    let data = |lba: u64, len: u64| -> Vec<u8> {
        let blocks = (lba..lba + len).flat_map(|lba| content(lba, number, block));
        blocks.collect()
    };
    let mut run = |channel, op, lba, len| {
        assert_eq!(machine.run(channel, op, lba, len), Status::Success);
    };
    match step {
        Write(channel, lba, len) | WriteFua(channel, lba, len) => {
            let fua = match step {
                WriteFua(..) => Fua::Yes,
                _ => Fua::No,
            };
            let buf = IovBuf::new(&data(lba, len), &[]);
            run(channel, Op::Write(buf.cursor(), fua), lba, len);
        }
        Read(channel, lba, len) => drop(read(machine, channel, lba, len)),
        Zero(channel, lba, len) => run(channel, Op::WriteZeroes, lba, len),
        Unmap(channel, lba, len) => run(channel, Op::Unmap, lba, len),
        Flush => run(0, Op::Flush, 0, 0),
        Drain => {
            assert!(machine.drain());
            // Reclaiming.
            for _ in 0..1000 {
                machine.poll_background();
            }
        }
    }
}

fn read(machine: &mut Plain<SimPmem>, channel: usize, lba: u64, len_blocks: u64) -> Vec<u8> {
    let (status, bytes) = machine.read(channel, lba, len_blocks);
    assert_eq!(status, Status::Success);
    bytes
}

fn machine(pmem: SimPmem, base: Vec<u8>, options: OpenOptions) -> Plain<SimPmem> {
    Plain::new(pmem, base, options, BackgroundRuns::InDrains).unwrap()
}

/// The cache device after the script: what a kill would leave, both streams with an open segment.
fn write_image(image: &Image) -> Vec<u8> {
    let mut machine = machine(
        SimPmem::new(DEVICE_SIZE_BYTES),
        image.content_after(0),
        image.options_at_format(),
    );
    for (number, step) in (1..).zip(image.script) {
        run_step(&mut machine, image.block(), number, *step);
        machine.cache.check_invariants();
    }
    assert!(
        machine.base == image.base_content(),
        "{}: the background ran outside of a drain",
        image.file
    );
    machine.pmem().durable_image()
}

#[test]
#[ignore = "writes images that do not exist yet, in the current version of the format"]
fn write_images() {
    for image in IMAGES.iter().filter(|image| !image.path().exists()) {
        std::fs::write(image.path(), write_image(image)).unwrap();
    }
}

fn open_image(image: &Image, bytes: Vec<u8>) -> Plain<SimPmem> {
    machine(
        SimPmem::from_image(bytes),
        image.base_content(),
        image.options(),
    )
}

fn check_info(image: &Image, info: &CacheInfo) {
    let uuid: String = CACHE_UUID
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(info.uuid, uuid);
    assert_eq!(info.block_size, image.block_size_bytes);
    assert_eq!(info.block_count, image.block_count());
    assert_eq!(info.cache_size_kib, DEVICE_SIZE_BYTES >> 10);
    assert_eq!(info.segment_size_kib, SEGMENT_SIZE_BYTES >> 10);
    assert_eq!(info.segment_count, 10);
    assert_eq!(info.data_crc, image.data_crc == DataCrc::On);
    assert_eq!(info.settings.get(Setting::GcPercent), GC_PERCENT);
    assert_eq!(info.settings.writeback_order(), image.writeback_order);
    for (setting, value) in image.settings {
        assert_eq!(info.settings.get(*setting), *value, "{setting:?}");
    }
    assert_eq!(
        (
            info.dirty_tail,
            info.seq_next,
            info.dirty_bytes,
            info.segments_free
        ),
        (
            image.dirty_tail,
            image.seq_next,
            image.dirty_bytes,
            image.segments_free
        ),
        "{}: dirty_tail, seq_next, dirty_bytes, segments_free",
        image.file
    );
}

/// Every block, one by one, so that each miss is seen.
fn check_content(image: &Image, machine: &mut Plain<SimPmem>) {
    let expected = image.content();
    for lba in 0..image.block_count() {
        let block = read(machine, (lba % 2) as usize, lba, 1);
        let range = lba as usize * image.block()..(lba as usize + 1) * image.block();
        assert!(
            block == expected[range],
            "{}: block {lba} is wrong",
            image.file
        );
    }
}

#[test]
fn every_block_of_every_image_reads_as_it_was_written() {
    for image in &IMAGES {
        let mut machine = open_image(image, image.load());
        check_info(image, &machine.cache.info());
        machine.cache.check_invariants();
        check_content(image, &mut machine);
        // Blocks that the cache holds came from the cache. All of it: INV-OPEN-5.
        let uncached: BTreeSet<u64> = image.uncached.iter().cloned().flatten().collect();
        assert_eq!(
            machine.missed, uncached,
            "{}: blocks not cached",
            image.file
        );
    }
}

#[test]
fn every_image_can_be_drained_and_opened_again() {
    for image in &IMAGES {
        let mut machine = open_image(image, image.load());
        assert!(machine.drain());
        assert!(machine.base == image.content(), "{}", image.file);
        machine.cache.check_invariants();
        let bytes = machine.pmem().durable_image();
        let base = machine.base.clone();
        let mut options = image.options();
        // Fewer cores, another uuid of the base: neither is a matter of the format.
        options.stream_count_max = 1;
        options.base.uuid = [1; 16];
        let mut again = self::machine(SimPmem::from_image(bytes), base, options);
        assert_eq!(again.cache.info().dirty_bytes, 0);
        check_content(image, &mut again);
    }
}

#[test]
fn either_copy_of_everything_may_be_lost() {
    for image in &IMAGES {
        let whole = open_image(image, image.load()).pmem().durable_image();
        for copy in 0..2 {
            let mut bytes = image.load();
            let infos = (64 << 10..DEVICE_SIZE_BYTES as usize)
                .step_by(SEGMENT_SIZE_BYTES as usize)
                .map(|segment| (segment + copy * 4096, 64));
            let header = [(copy << 15, 512), ((8 << 10) + (copy << 15), 192)];
            for (off, len) in header.into_iter().chain(infos) {
                assert!(bytes[off..off + len].iter().any(|byte| *byte != 0));
                bytes[off..off + len].fill(0);
            }
            let mut machine = open_image(image, bytes);
            check_info(image, &machine.cache.info());
            // What was lost is there again (INV-PAIR-2): only update numbers and checksums tell that.
            let repaired = machine.pmem().durable_image();
            let is_zero = |off: usize| repaired[off..off + 64].iter().all(|byte| *byte == 0);
            let segments = (64 << 10..whole.len()).step_by(SEGMENT_SIZE_BYTES as usize);
            for off in segments.flat_map(|segment| [segment, segment + 4096]) {
                assert!(!is_zero(off) && repaired[off + 16..off + 64] == whole[off + 16..off + 64]);
            }
            assert_eq!(repaired[16..512], whole[16..512]);
            assert_eq!(repaired[..512], repaired[32 << 10..][..512]);
            assert_eq!(repaired[8 << 10..][..192], repaired[40 << 10..][..192]);
            check_content(image, &mut machine);
        }
    }
}

#[test]
fn a_refused_image_is_left_as_it_was() {
    for image in &IMAGES {
        let bytes = image.load();
        let pmem = SimPmem::from_image(bytes.clone());
        // A base that is not the one to which the cache has written back (INV-OPEN-1, INV-WIT-1).
        let base = vec![0xA5; image.base_content().len()];
        let refused = open(pmem.clone(), &base, image.options());
        assert!(
            matches!(refused, Err(OpenError::Witness { .. })),
            "{refused:?}"
        );
        assert!(
            pmem.live_image() == bytes,
            "{}: it was written to",
            image.file
        );
    }
}
