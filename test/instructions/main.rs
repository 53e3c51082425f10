//! What the real mapping executes is what the simulated device is told: the same lines stored, each once, past the
//! cache or with a flush, and the same fences, each behind the stores before it. The crash tests enumerate what the
//! simulated device could lose; this is why that holds for the machine code that ships.

#![expect(
    unsafe_code,
    reason = "ptrace, and a store that the product would never make"
)]
#![expect(clippy::unwrap_used, reason = "a test, its helpers included")]
#![cfg(target_arch = "x86_64")]

mod stepper;

use pcache::engine::{
    BaseCaps, BaseGrowth, BaseIdentity, DataCrc, FormatPolicy, Fua, Op, OpenOptions, Setting,
    SettingChange,
};
use pcache::pmem::{
    Durable, Extent, IovBuf, IovCursor, LINE_SIZE_BYTES, MapRequest, MappedPmem, MemSlice, Pmem,
    PmemRead, Poisoned,
};
use pcache::sim::pmem::{BYTES_CHECKSUMMED_PER_FENCE, SimPmem};
use pcache::sim::rig::Rig;
use pcache::sim::tracing::{PmemOp, TracingPmem};
use pcache::units::{Agent, PmemOff};
use std::path::{Path, PathBuf};
use stepper::{Alone, Event, watch};

const DEVICE_SIZE_BYTES: u64 = 9 * SEGMENT_SIZE_BYTES;
const SEGMENT_SIZE_BYTES: u64 = 64 << 10;
const BLOCK_SIZE_BYTES: usize = 512;
const BLOCK_COUNT: u64 = 256;
/// Longer stores go past the cache.
const RECORD_SIZE_BYTES_MAX: usize = 1024;
const A: Agent = Agent(0);

fn map(path: &Path, kernel: &str) -> MappedPmem {
    let request = MapRequest {
        path: path.to_owned(),
        extent: Extent::File {
            size_bytes: DEVICE_SIZE_BYTES,
        },
        size_bytes_min: DEVICE_SIZE_BYTES,
    };
    MappedPmem::open(&request)
        .unwrap()
        .with_store_kernel(kernel)
}

fn device() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("cache");
    (dir, path)
}

/// Whether `events` carry out `ops` in this order, and nothing else.
#[track_caller]
fn assert_carries_out(events: &[Event], ops: &[PmemOp], kernel: &str) {
    let mut events = events.iter().enumerate();
    for (op_number, op) in ops.iter().enumerate() {
        match op {
            PmemOp::Fence { .. } => {
                let event = events.next();
                assert!(
                    matches!(event, Some((_, Event::Fence))),
                    "{kernel}: {event:x?} for the fence that is operation {op_number}"
                );
            }
            PmemOp::Store { off, bytes, .. } => {
                let mut stored = vec![false; bytes.len()];
                let mut unflushed_line = None;
                while stored.contains(&false) || unflushed_line.is_some() {
                    let event = events.next();
                    let (at, len_bytes) = match event {
                        Some((_, Event::Stream { off, len_bytes })) => (*off, *len_bytes),
                        Some((_, Event::CachedStore { off: at, len_bytes }))
                            if bytes.len() <= RECORD_SIZE_BYTES_MAX =>
                        {
                            let line = at / LINE_SIZE_BYTES;
                            assert!(
                                unflushed_line.is_none_or(|unflushed| unflushed == line),
                                "{kernel}: {event:x?} before the last line is flushed"
                            );
                            unflushed_line = (!kernel.contains("no flush")).then_some(line);
                            (*at, *len_bytes)
                        }
                        Some((_, Event::Flush { off: at })) => {
                            let line = &stored[(at - off.0) as usize..][..LINE_SIZE_BYTES as usize];
                            assert!(
                                unflushed_line == Some(at / LINE_SIZE_BYTES)
                                    && !line.contains(&false),
                                "{kernel}: {event:x?} is not of the line that was stored last"
                            );
                            unflushed_line = None;
                            continue;
                        }
                        _ => panic!(
                            "{kernel}: {event:x?} within the store that is operation {op_number}"
                        ),
                    };
                    let from = at.checked_sub(off.0).unwrap_or(u64::MAX) as usize;
                    let part = stored.get_mut(from..from.saturating_add(len_bytes as usize));
                    let part = part.unwrap_or_else(|| {
                        panic!("{kernel}: {event:x?} lies outside of operation {op_number}")
                    });
                    assert!(!part.contains(&true), "{kernel}: {event:x?} stores twice");
                    part.fill(true);
                }
            }
        }
    }
    assert_eq!(events.next(), None, "{kernel}: more than was asked for");
}

fn pattern(len_bytes: usize) -> Vec<u8> {
    (0..len_bytes).map(|i| (i * 31 + i / 253) as u8).collect()
}

/// Stores of every method; sources of one piece, of many, and of none that is aligned.
fn store_all_ways(pmem: &impl Pmem, sources: &[(Vec<u8>, IovBuf)]) {
    let line = pattern(LINE_SIZE_BYTES as usize);
    pmem.store(A, PmemOff(0), &line);
    pmem.store(A, PmemOff(DEVICE_SIZE_BYTES - LINE_SIZE_BYTES), &line);
    let _ = pmem.fence(A);
    let mut off = PmemOff(LINE_SIZE_BYTES);
    for (bytes, buffer) in sources {
        let len_bytes = bytes.len() as u64;
        pmem.store(A, off, bytes);
        pmem.store_from(A, off, &mut buffer.cursor(), len_bytes);
        let _ = pmem.fence(A);
        off.0 += len_bytes;
        pmem.store_from_crc(A, off, &mut buffer.cursor(), len_bytes, 7);
        off.0 += len_bytes;
        let _ = pmem.fence(A);
    }
    pmem.store(A, off, &[]);
    let _ = pmem.fence(A);
    let _ = pmem.fence(A);
}

fn sources() -> Vec<(Vec<u8>, IovBuf)> {
    let lens_and_cuts: [(usize, &[usize]); 9] = [
        (64, &[]),
        (64, &[1, 40]),
        (192, &[63, 65]),
        (512, &[]),
        (4096, &[]),
        (4096, &[0, 100, 164, 165, 4000]),
        (4096 + 64, &[]),
        (4096 + 64, &[64]),
        (8192, &[512, 4096]),
    ];
    let source = |(len_bytes, cuts)| {
        let bytes = pattern(len_bytes);
        let buf = IovBuf::new(&bytes, cuts);
        (bytes, buf)
    };
    lens_and_cuts.into_iter().map(source).collect()
}

#[test]
fn every_kernel_stores_each_line_once_and_fences_behind_it() {
    let alone = Alone::wait();
    let sim = TracingPmem::new(SimPmem::new(DEVICE_SIZE_BYTES));
    store_all_ways(&sim, &sources());
    let ops = sim.trace().take();
    for kernel in &MappedPmem::store_kernel_names() {
        let (_dir, path) = device();
        let walk = alone.follow(
            &path,
            || (map(&path, kernel), sources()),
            |(pmem, sources)| {
                watch(|| store_all_ways(&pmem, &sources));
                pmem
            },
        );
        println!(
            "{kernel}: {} instructions, {} events",
            walk.steps,
            walk.events.len()
        );
        assert_carries_out(&walk.events, &ops, kernel);
        assert!(
            std::fs::read(&path).unwrap() == sim.inner().live_image(),
            "{kernel}: what was stored is not what was to be stored"
        );
    }
}

/// The real device; its stores and fences are followed. The rest of the engine has no unsafe code to store
/// with.
struct Watched(MappedPmem);

impl PmemRead for Watched {
    fn len_bytes(&self) -> u64 {
        self.0.len_bytes()
    }

    fn read(&self, off: PmemOff, buf: &mut [u8]) -> Result<(), Poisoned> {
        self.0.read(off, buf)
    }
}

impl Pmem for Watched {
    fn read_to(&self, off: PmemOff, dst: &mut IovCursor, len_bytes: u64) -> Result<(), Poisoned> {
        self.0.read_to(off, dst, len_bytes)
    }

    fn store(&self, agent: Agent, off: PmemOff, bytes: &[u8]) {
        watch(|| self.0.store(agent, off, bytes));
    }

    fn store_from(&self, agent: Agent, off: PmemOff, src: &mut IovCursor, len_bytes: u64) {
        watch(|| self.0.store_from(agent, off, src, len_bytes));
    }

    fn store_from_crc(
        &self,
        agent: Agent,
        off: PmemOff,
        src: &mut IovCursor,
        len_bytes: u64,
        seed: u32,
    ) -> u32 {
        watch(|| self.0.store_from_crc(agent, off, src, len_bytes, seed))
    }

    /// As the simulated one, whatever this machine would choose.
    fn bytes_checksummed_per_fence(&self) -> u64 {
        BYTES_CHECKSUMMED_PER_FENCE
    }

    fn assert_stores_taken(&self) {
        self.0.assert_stores_taken();
    }

    fn fence(&self, agent: Agent) -> Durable {
        watch(|| self.0.fence(agent))
    }

    fn slice(&self, off: PmemOff, len_bytes: u64) -> MemSlice {
        self.0.slice(off, len_bytes)
    }

    fn prefetch(&self, off: PmemOff, len_bytes: u64) {
        self.0.prefetch(off, len_bytes);
    }
}

fn options() -> OpenOptions {
    OpenOptions {
        base: BaseIdentity {
            uuid: [7; 16],
            name: "Base0".to_owned(),
            block_size_bytes: BLOCK_SIZE_BYTES as u32,
            block_count: BLOCK_COUNT,
        },
        base_caps: BaseCaps {
            flush: true,
            unmap: true,
            write_zeroes: true,
        },
        format: FormatPolicy::Auto,
        new_uuid: [9; 16],
        data_crc: Some(DataCrc::On),
        segment_size_bytes: Some(SEGMENT_SIZE_BYTES),
        // What is clean is reclaimed at once.
        base_growth: BaseGrowth::Refuse,
        settings: SettingChange::of(Setting::GcPercent, 0),
        stream_count_max: 2,
    }
}

/// Opens, and does a little of everything: segments are filled and sealed, written back, and reclaimed.
fn live<P: Pmem>(pmem: P, base: Vec<u8>) -> Rig<P> {
    let mut rig = Rig::open(pmem, base, options()).unwrap();
    for (number, len_blocks) in [1, 2, 7, 8, 9, 31, 32, 1, 32, 32, 32, 32]
        .into_iter()
        .enumerate()
    {
        let bytes = pattern(len_blocks * BLOCK_SIZE_BYTES);
        let fua = if number % 5 == 4 { Fua::Yes } else { Fua::No };
        rig.write(number as u64 * 17, &bytes, &[number * 100, 3000], fua);
    }
    rig.run(Op::Unmap, 3, 60);
    rig.run(Op::Flush, 0, 0);
    rig.run(Op::WriteZeroes, 100, 5);
    rig.drain();
    // A read fill.
    rig.read(BLOCK_COUNT - 16, 16);
    rig.write(8, &pattern(4096), &[], Fua::No);
    rig
}

#[test]
fn the_engine_on_the_real_device_executes_what_the_simulated_one_is_told() {
    let alone = Alone::wait();
    let (_dir, path) = device();
    let kernel = &MappedPmem::store_kernel_names()[0];
    let mut sim = SimPmem::new(DEVICE_SIZE_BYTES);
    let mut base = vec![0; BLOCK_COUNT as usize * BLOCK_SIZE_BYTES];
    for life in ["formatted", "recovered"] {
        let traced = TracingPmem::new(sim.clone());
        let trace = traced.trace();
        let rig = live(traced, base.clone());
        let stats = rig.cache().stats();
        assert!(
            stats.writeback_batches > 0 && stats.segments_reclaimed > 0,
            "{stats:?}"
        );
        let base_after = rig.close();
        let walk = alone.follow(
            &path,
            || Watched(map(&path, kernel)),
            |pmem| live(pmem, base.clone()),
        );
        println!(
            "{life}: {} instructions, {} events",
            walk.steps,
            walk.events.len()
        );
        assert_carries_out(&walk.events, &trace.take(), kernel);
        assert!(
            std::fs::read(&path).unwrap() == sim.durable_image(),
            "{life}: the real device holds something else than what is durable on the simulated one"
        );
        sim = SimPmem::from_image(sim.durable_image());
        base = base_after;
    }
}

#[test]
fn a_store_through_the_cache_and_a_flush_do_not_go_unseen() {
    let alone = Alone::wait();
    let (_dir, path) = device();
    let kernel = &MappedPmem::store_kernel_names()[0];
    let source = pattern(200);
    let walk = alone.follow(
        &path,
        || map(&path, kernel),
        |pmem| {
            let at = pmem.slice(PmemOff(4096), 4096).as_ptr();
            watch(|| {
                // SAFETY: 4096 mapped bytes begin there; nobody else uses the device.
                unsafe { at.cast::<u64>().write_volatile(1) };
                // SAFETY: as above.
                unsafe { std::arch::x86_64::_mm_clflush(at) };
                // SAFETY: as above, for the 200 bytes of the source.
                unsafe {
                    at.wrapping_add(8)
                        .copy_from_nonoverlapping(source.as_ptr(), 200)
                };
            });
            pmem
        },
    );
    let (first, rest) = walk.events.split_at(2);
    let store = Event::CachedStore {
        off: 4096,
        len_bytes: 8,
    };
    assert_eq!(first, [store, Event::Flush { off: 4096 }]);
    let mut seen = [false; 200];
    for event in rest {
        let Event::CachedStore { off, len_bytes } = event else {
            panic!("{event:x?}");
        };
        seen[(off - 4104) as usize..][..*len_bytes as usize].fill(true);
    }
    assert!(!seen.contains(&false), "all of the copy is seen");
}
