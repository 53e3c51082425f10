//! The engine against a naive model, one request at a time: the first thing that must hold. With a log far
//! smaller than what is written, it goes through INV-LOG-1, INV-LOG-2, INV-LOG-10, INV-SEG-2 and INV-INDEX-2 all the time.

mod asking;
mod background;
mod changes;
mod counts;
mod damage;
mod deep_queues;
mod fetches;
mod fills;
mod flaws;
mod groups;
mod held;
mod lend;
mod lost_memory;
mod many_losses;
mod pages;
mod room;
mod rounding;
mod salvage;
mod sparse;
mod staging;
mod usage;

use super::*;
use crate::media::{Checksums, KEYS_START_BYTES, Tails};
use crate::pmem::{Extent, IovBuf, MapRequest, MappedPmem, Pmem};
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::sim::pmem::SimPmem;
use crate::sim::rig::Rig;
use crate::sim::tracing::{PmemOp, Trace, TracingPmem};
use crate::units::{Agent, PmemOff, Seq};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use std::path::Path;

const BLOCKS: u64 = 512;
const DEVICE_SIZE_BYTES: u64 = (64 << 10) + 14 * (64 << 10);

fn options(block_size_bytes: u32, data_crc: Option<DataCrc>) -> OpenOptions {
    OpenOptions {
        base: BaseIdentity {
            uuid: [7; 16],
            name: "Base0".to_owned(),
            block_size_bytes,
            block_count: BLOCKS,
        },
        base_caps: BaseCaps {
            flush: true,
            unmap: true,
            write_zeroes: true,
        },
        format: FormatPolicy::Auto,
        new_uuid: [9; 16],
        data_crc,
        segment_size_bytes: Some(64 << 10),
        base_growth: BaseGrowth::Refuse,
        settings: match data_crc {
            Some(DataCrc::On) => SettingChange::of(Setting::VerifyReads, 1),
            _ => SettingChange::default(),
        },
        stream_count_max: 2,
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write {
        lba: u64,
        len: u64,
        fill: u8,
        cut: usize,
        fua: Fua,
    },
    Read {
        lba: u64,
        len: u64,
    },
    Zero {
        lba: u64,
        len: u64,
    },
    Unmap {
        lba: u64,
        len: u64,
    },
    Flush,
    Reopen,
    Drain,
}

/// Of so many blocks at the most.
fn extent(len_max: u64) -> impl Strategy<Value = (u64, u64)> {
    (0..BLOCKS - 1, prop_oneof![1u64..4, 1..=len_max])
        .prop_map(|(lba, len)| (lba, len.min(BLOCKS - lba)))
}

fn step(len_max: u64) -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (extent(len_max), any::<u8>(), 0usize..5000, prop_oneof![4 => Just(Fua::No), 1 => Just(Fua::Yes)])
            .prop_map(|((lba, len), fill, cut, fua)| Step::Write { lba, len, fill, cut, fua }),
        6 => extent(len_max).prop_map(|(lba, len)| Step::Read { lba, len }),
        1 => extent(len_max).prop_map(|(lba, len)| Step::Zero { lba, len }),
        1 => extent(len_max).prop_map(|(lba, len)| Step::Unmap { lba, len }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => Just(Step::Drain),
    ]
}

/// What a history leaves.
#[derive(Debug)]
struct Played {
    /// The cache device's content.
    content: Vec<u8>,
    /// Of each life of the cache.
    stats: Vec<Stats>,
}

impl Played {
    fn total(&self, counter: impl Fn(&Stats) -> u64) -> u64 {
        self.stats.iter().map(counter).sum()
    }
}

/// `next_life` gives the device, the first time and after each restart.
fn check<P: Pmem>(
    steps: &[Step],
    block_size: u32,
    data_crc: DataCrc,
    next_life: impl FnMut() -> P,
) -> Played {
    check_in(steps, options(block_size, Some(data_crc)), next_life)
}

/// As [`check`], in a cache made with these options.
fn check_in<P: Pmem>(
    steps: &[Step],
    first_options: OpenOptions,
    mut next_life: impl FnMut() -> P,
) -> Played {
    let block_size = first_options.base.block_size_bytes;
    // Each write is limited to a quarter of a segment.
    let segment_size_bytes = first_options.segment_size_bytes.unwrap();
    let len_max = segment_size_bytes / 4 / u64::from(block_size);
    let block = block_size as usize;
    let mut model = vec![0u8; BLOCKS as usize * block];
    let later_options = OpenOptions {
        data_crc: None,
        settings: SettingChange::default(),
        ..first_options.clone()
    };
    let mut rig = Rig::open(next_life(), model.clone(), first_options).unwrap();
    let mut stats = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        match *step {
            Step::Write {
                lba,
                len,
                fill,
                cut,
                fua,
            } => {
                let len = len.min(len_max);
                let bytes: Vec<u8> = (0..len as usize * block)
                    .map(|at| {
                        fill.wrapping_add((at / 512) as u8)
                            .wrapping_add(number as u8)
                    })
                    .collect();
                rig.write(lba, &bytes, &[cut], fua);
                model[lba as usize * block..][..bytes.len()].copy_from_slice(&bytes);
            }
            Step::Read { lba, len } => {
                let range = lba as usize * block..(lba + len) as usize * block;
                assert!(
                    rig.read(lba, len) == model[range],
                    "step {number}: stale or misplaced data"
                );
            }
            Step::Zero { lba, len } | Step::Unmap { lba, len } => {
                let op = if matches!(step, Step::Zero { .. }) {
                    Op::WriteZeroes
                } else {
                    Op::Unmap
                };
                let len_max = rig.cache().unmap_size_max_bytes() / u64::from(block_size);
                let len = len.min(len_max);
                rig.run(op, lba, len);
                model[lba as usize * block..(lba + len) as usize * block].fill(0);
            }
            Step::Flush => rig.run(Op::Flush, 0, 0),
            Step::Reopen => {
                stats.push(rig.cache().stats());
                let base = rig.close();
                rig = Rig::open(next_life(), base, later_options.clone()).unwrap();
            }
            Step::Drain => {
                rig.drain();
                assert!(
                    rig.base() == model,
                    "step {number}: the base differs after a drain"
                );
            }
        }
        rig.cache().check_invariants();
        usage::check_usage(rig.cache());
    }
    assert!(rig.read(0, BLOCKS) == model);
    rig.drain();
    assert!(rig.base() == model);
    stats.push(rig.cache().stats());
    drop(rig);
    let device = next_life();
    let mut content = vec![0; device.len_bytes() as usize];
    device.read(PmemOff(0), &mut content).unwrap();
    Played { content, stats }
}

/// A device whose next life begins with what the last one has made durable.
fn simulated() -> impl FnMut() -> SimPmem {
    simulated_of(DEVICE_SIZE_BYTES)
}

fn simulated_of(size_bytes: u64) -> impl FnMut() -> SimPmem {
    let mut last = SimPmem::new(size_bytes);
    move || {
        last = SimPmem::from_image(last.durable_image());
        last.clone()
    }
}

/// A file in memory.
fn mapped(path: &Path) -> impl FnMut() -> MappedPmem + use<> {
    let request = MapRequest {
        path: path.to_owned(),
        extent: Extent::File {
            size_bytes: DEVICE_SIZE_BYTES,
        },
        size_bytes_min: DEVICE_SIZE_BYTES,
    };
    move || MappedPmem::open(&request).unwrap()
}

fn traced<P: Pmem>(
    trace: &Trace,
    mut next_life: impl FnMut() -> P,
) -> impl FnMut() -> TracingPmem<P> {
    move || TracingPmem::with_trace(next_life(), trace)
}

#[track_caller]
fn assert_same_ops(real: &[PmemOp], simulated: &[PmemOp]) {
    let differs =
        (0..real.len().max(simulated.len())).find(|at| real.get(*at) != simulated.get(*at));
    if let Some(at) = differs {
        let (real, simulated) = (real.get(at), simulated.get(at));
        panic!("operation {at} on the real device is {real:?}, on the simulated one {simulated:?}");
    }
}

#[test]
fn the_engine_does_the_same_to_the_real_and_to_the_simulated_device() {
    let mut runner = TestRunner::deterministic();
    for (block_size, data_crc) in [
        (512, DataCrc::Off),
        (512, DataCrc::On),
        (4096, DataCrc::Off),
        (4096, DataCrc::On),
    ] {
        let history = prop::collection::vec(step(31), 800);
        let steps = history.new_tree(&mut runner).unwrap().current();
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let (real_trace, sim_trace) = (Trace::default(), Trace::default());
        let real = traced(&real_trace, mapped(&dir.path().join("cache")));
        let real = check(&steps, block_size, data_crc, real);
        let sim = check(
            &steps,
            block_size,
            data_crc,
            traced(&sim_trace, simulated()),
        );
        assert_same_ops(&real_trace.take(), &sim_trace.take());
        assert!(
            real.content == sim.content,
            "the devices hold the same in the end"
        );
        assert_eq!(real.stats, sim.stats);
        assert!(sim.stats.len() > 10, "the cache was opened again and again");
        assert!(sim.total(|stats| stats.segments_reclaimed) > 10);
        assert!(sim.total(|stats| stats.writeback_batches) > 10);
        assert!(sim.total(|stats| stats.fua_writes) > 10);
        assert!(sim.total(|stats| stats.unmaps.min(stats.write_zeroes)) > 10);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_cache_behaves_like_a_disk_with_512_byte_blocks(
        steps in prop::collection::vec(step(31), 1..120),
        crc in prop_oneof![Just(DataCrc::Off), Just(DataCrc::On)],
    ) {
        check(&steps, 512, crc, simulated());
    }

    #[test]
    fn a_cache_behaves_like_a_disk_with_4096_byte_blocks(
        steps in prop::collection::vec(step(31), 1..120),
        crc in prop_oneof![Just(DataCrc::Off), Just(DataCrc::On)],
    ) {
        check(&steps, 4096, crc, simulated());
    }

    /// Requests of up to 40 pages: whole groups of the index, and parts of some.
    #[test]
    fn a_cache_behaves_like_a_disk_with_long_requests(
        (block_size, steps) in prop_oneof![Just(512u32), Just(4096)].prop_flat_map(|block_size| {
            let len_max = (40 << 12) / u64::from(block_size);
            (Just(block_size), prop::collection::vec(step(len_max), 1..80))
        }),
        crc in prop_oneof![Just(DataCrc::Off), Just(DataCrc::On)],
    ) {
        let segment_size_bytes = 1 << 20;
        let options = OpenOptions {
            segment_size_bytes: Some(segment_size_bytes),
            ..options(block_size, Some(crc))
        };
        check_in(&steps, options, simulated_of(6 * segment_size_bytes));
    }
}

#[test]
fn a_drain_ends_although_a_crash_cut_off_the_last_batches() {
    let base = vec![0; BLOCKS as usize * 512];
    let pmem = SimPmem::new(DEVICE_SIZE_BYTES);
    let mut rig = Rig::open(pmem, base, options(512, None)).unwrap();
    rig.write(0, &[1; 512], &[], Fua::No);
    let image = SimPmem::from_image(rig.pmem().durable_image());
    // Another core had drawn numbers when the tails were written, and its ksets did not arrive.
    let checksums = Checksums::new([9; 16]);
    let (mut tails, _) = Tails::load(&image, &checksums).unwrap();
    tails.seq_next_min = Seq(rig.cache().info().seq_next + 3);
    drop(tails.persist(&image, Agent(1), &checksums));
    let mut rig = Rig::open(image, rig.close(), options(512, None)).unwrap();
    rig.drain();
    assert_eq!(rig.base()[..512], [1; 512]);
    // Nor does one without anything dirty.
    rig.drain();
    rig.write(8, &[2; 512], &[], Fua::No);
    rig.drain();
    assert_eq!(rig.base()[8 * 512..9 * 512], [2; 512]);
}

#[test]
fn a_drain_of_everything_takes_what_was_written_since_the_last_one_began() {
    let mut is_left_out = false;
    for pause in 0..20 {
        let base = vec![0; BLOCKS as usize * 512];
        let pmem = SimPmem::new(DEVICE_SIZE_BYTES);
        let runs = BackgroundRuns::InDrains;
        let mut plain = Plain::new(pmem, base, options(512, None), runs).unwrap();
        let write = |plain: &mut Plain<_>, fill: u8| {
            let buf = IovBuf::new(&[fill; 512], &[]);
            plain.run(0, Op::Write(buf.cursor(), Fua::No), 3, 1)
        };
        assert_eq!(write(&mut plain, 1), Status::Success);
        assert!(plain.cache.drain_start());
        (0..pause).for_each(|_| plain.poll_background());
        assert_eq!(write(&mut plain, 2), Status::Success);
        // As long as one is running, another does not begin.
        let is_running = !plain.cache.drain_start();
        plain.cache.drain_everything();
        while plain.cache.drain_status().in_progress {
            plain.poll_background();
        }
        assert_eq!(plain.cache.drain_status().dirty_bytes_left, 0, "{pause}");
        assert_eq!(plain.base[3 * 512..4 * 512], [2; 512], "{pause}");
        is_left_out |= is_running && pause > 0;
    }
    assert!(is_left_out, "one was never running");
}

#[test]
fn after_an_orderly_stop_a_flipped_bit_in_the_last_kset_is_reported() {
    let base = vec![0; BLOCKS as usize * 512];
    let mut rig = Rig::open(SimPmem::new(DEVICE_SIZE_BYTES), base, options(512, None)).unwrap();
    for lba in 0..3 {
        rig.write(lba, &[lba as u8 + 1; 512], &[], Fua::No);
    }
    let killed = rig.pmem().live_image();
    rig.cache().seal_streams();
    let stopped = rig.pmem().live_image();
    let base = rig.close();
    let open = |mut image: Vec<u8>, damage: Option<usize>| {
        if let Some(at) = damage {
            image[at] ^= 4;
        }
        Rig::open(SimPmem::from_image(image), base.clone(), options(512, None))
    };
    // The last byte that differs from nothing before the payloads: in the last of three ksets.
    let segment = 64 << 10;
    let keys_end = segment + KEYS_START_BYTES as usize + 3 * 64;
    let last_kset = keys_end - 64 + 8;
    assert_ne!(stopped[last_kset], 0, "a kset lies there");
    assert!(
        open(killed, Some(last_kset)).is_ok(),
        "it looks like a torn kset"
    );
    let error = open(stopped.clone(), Some(last_kset)).expect_err("it was acknowledged");
    assert!(error.to_string().contains("sealed"), "{error}");
    assert_eq!(open(stopped, None).unwrap().read(2, 1), [3; 512]);
}
