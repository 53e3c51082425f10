//! The engine alone, without SPDK: requests per second of one core, beside the bare copy.
//!
//! `cargo bench --bench engine -- [CACHE_PATH] [CACHE_MIB]` (default: a file on /dev/hugepages if that is
//! mounted, else on /dev/shm; 1024 MiB). The base is memory that answers at once.

use pcache::engine::{
    Background, BaseCaps, BaseIdentity, BaseKind, Cache, Channel, DataCrc, FormatPolicy, Fua,
    HostIo, IoToken, Op, OpenOptions, Outbox,
};
use pcache::pmem::{IovBuf, IovCursor, MapRequest, MappedPmem, Pmem};
use pcache::recovery::{OpenStep, Opening};
use pcache::units::{Agent, Lba, Now, PmemOff};
use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

const BLOCK: u64 = 4096;
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_millis(400);

struct Rng(u64);

impl Rng {
    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[expect(clippy::disallowed_methods, reason = "a bench measures time")]
fn now() -> Instant {
    Instant::now()
}

fn open(path: &PathBuf, mib: u64, data_crc: DataCrc, blocks: u64) -> Arc<Cache<MappedPmem>> {
    let _ = std::fs::remove_file(path);
    let size = mib << 20;
    let request = MapRequest {
        path: path.clone(),
        create_size_bytes: Some(size),
        size_bytes_min: 1 << 20,
    };
    let mut pmem = MappedPmem::open(&request).expect("the cache file can be mapped");
    while pmem.populate_next().is_some() {}
    let options = OpenOptions {
        base: BaseIdentity {
            uuid: [1; 16],
            name: "bench".to_owned(),
            block_size_bytes: BLOCK as u32,
            block_count: blocks,
        },
        base_caps: BaseCaps {
            flush: true,
            unmap: true,
        },
        format: FormatPolicy::Force,
        new_uuid: [2; 16],
        data_crc: Some(data_crc),
        segment_size_bytes: None,
        gc_percent: None,
        writeback_order: None,
        stream_count_max: 2,
    };
    let mut opening = Opening::begin(pmem, options).expect("a new file is formatted");
    loop {
        match opening.poll().expect("a new cache opens") {
            OpenStep::ReadBase {
                slot, len_blocks, ..
            } => {
                opening.on_base_block(slot, Ok(&vec![0; (len_blocks * BLOCK) as usize]));
            }
            OpenStep::Ready => return opening.finish(),
            OpenStep::Working { .. } | OpenStep::AwaitingBase => {}
        }
    }
}

struct Rig {
    channel: Channel<MappedPmem>,
    background: Background<MappedPmem>,
    buffers: Vec<IovBuf>,
    out: Outbox,
    background_out: Outbox,
    rng: Rng,
    clock: Instant,
    blocks: u64,
}

impl Rig {
    /// Keeps `depth` requests under way for one round; returns requests per second.
    fn round(&mut self, depth: usize, make: impl Fn(IovCursor) -> Op, len_blocks: u64) -> f64 {
        let start = now();
        let mut done = 0u64;
        for slot in 0..depth {
            self.submit(slot, &make, len_blocks);
        }
        let mut stopping = false;
        let mut under_way = depth;
        while under_way > 0 {
            self.out.clear();
            let at = Now(self.clock.elapsed().as_nanos() as u64);
            self.channel.poll(at, &mut self.out);
            self.run_background(at);
            for number in 0..self.out.completions.len() {
                let slot = self.out.completions[number].token.0 as usize;
                done += 1;
                if stopping {
                    under_way -= 1;
                } else {
                    self.submit(slot, &make, len_blocks);
                }
            }
            for request in std::mem::take(&mut self.out.base) {
                self.channel.on_base_done(request.op, Ok(()));
            }
            stopping = start.elapsed() > ROUND;
        }
        done as f64 / start.elapsed().as_secs_f64()
    }

    fn submit(&mut self, slot: usize, make: &impl Fn(IovCursor) -> Op, len_blocks: u64) {
        let lba = self.rng.next() % (self.blocks / len_blocks) * len_blocks;
        let op = make(self.buffers[slot].cursor());
        let io = HostIo {
            token: IoToken(slot as u64),
            op,
            lba: Lba(lba),
            len_blocks,
        };
        self.channel.submit(io).expect("the table has room");
    }

    fn run_background(&mut self, at: Now) {
        self.background_out.clear();
        self.background.poll(at, &mut self.background_out);
        for request in &self.background_out.base {
            black_box(matches!(request.kind, BaseKind::Flush));
            self.background.on_base_done(request.op, Ok(()));
        }
    }
}

/// Copies of a batch, then one fence: what the store instructions alone allow.
fn bare_copy(pmem: &impl Pmem, buffers: &[IovBuf], rng: &mut Rng, batch: usize) -> f64 {
    let start = now();
    let pages = (pmem.len_bytes() - (2 << 20)) / BLOCK;
    let mut done = 0u64;
    while start.elapsed() < ROUND {
        for buffer in &buffers[..batch] {
            let off = PmemOff((2 << 20) + rng.next() % pages * BLOCK);
            pmem.store_from(Agent(1), off, &mut buffer.cursor(), BLOCK);
        }
        drop(pmem.fence(Agent(1)));
        done += batch as u64;
    }
    done as f64 / start.elapsed().as_secs_f64()
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn report(name: &str, figures: Vec<f64>) {
    let (low, high) = figures
        .iter()
        .fold((f64::MAX, 0f64), |(l, h), &f| (l.min(f), h.max(f)));
    println!(
        "{name:<44} {:>8.3} M/s   ({:.3} .. {:.3})",
        median(figures) / 1e6,
        low / 1e6,
        high / 1e6
    );
}

fn main() {
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| arg != "--bench")
        .collect();
    let huge = std::fs::read_to_string("/proc/mounts").is_ok_and(|m| m.contains("/dev/hugepages "));
    let folder = if huge { "/dev/hugepages" } else { "/dev/shm" };
    let path = PathBuf::from(
        args.first()
            .map_or(format!("{folder}/pcache-bench"), Clone::clone),
    );
    let mib: u64 = args.get(1).and_then(|mib| mib.parse().ok()).unwrap_or(1024);
    println!(
        "cache {} of {mib} MiB; medians of {ROUNDS} rounds of {ROUND:?}",
        path.display()
    );

    for data_crc in [DataCrc::Off, DataCrc::On] {
        let blocks = (mib << 20) / 2 / BLOCK;
        let cache = open(&path, mib, data_crc, blocks);
        println!("-- data_crc {data_crc:?}, engine {}", cache.info().uuid);
        let mut rig = Rig {
            channel: cache.channel().expect("a channel"),
            background: cache.background().expect("the background"),
            buffers: (0..128).map(|_| IovBuf::zeroed(128 << 10)).collect(),
            out: Outbox::new(),
            background_out: Outbox::new(),
            rng: Rng(1),
            clock: now(),
            blocks,
        };
        for (name, depth, len_blocks, fua) in [
            ("4 KiB random write, depth 32", 32, 1, Fua::No),
            ("4 KiB random write, depth 1", 1, 1, Fua::No),
            ("4 KiB random write, depth 128", 128, 1, Fua::No),
            ("128 KiB random write, depth 8", 8, 32, Fua::No),
        ] {
            rig.round(depth, |cursor| Op::Write(cursor, fua), len_blocks);
            let rounds = (0..ROUNDS)
                .map(|_| rig.round(depth, |cursor| Op::Write(cursor, fua), len_blocks))
                .collect();
            report(name, rounds);
        }
        for depth in [32, 1] {
            let rounds = (0..ROUNDS).map(|_| rig.round(depth, Op::Read, 1)).collect();
            report(&format!("4 KiB random read, depth {depth}"), rounds);
        }
        println!(
            "   {}",
            serde_json::to_string(&cache.stats()).unwrap_or_default()
        );
    }
    let _ = std::fs::remove_file(&path);
    let request = MapRequest {
        path: path.clone(),
        create_size_bytes: Some(mib << 20),
        size_bytes_min: 1,
    };
    let mut pmem = MappedPmem::open(&request).expect("the cache file can be mapped");
    while pmem.populate_next().is_some() {}
    let buffers: Vec<IovBuf> = (0..32).map(|_| IovBuf::zeroed(4096)).collect();
    let mut rng = Rng(3);
    for batch in [32, 1] {
        let rounds = (0..ROUNDS)
            .map(|_| bare_copy(&pmem, &buffers, &mut rng, batch))
            .collect();
        report(
            &format!("bare 4 KiB copies to random places, {batch} a fence"),
            rounds,
        );
    }
    drop(pmem);
    let _ = std::fs::remove_file(&path);
}
