//! The limits that bind, and what a request costs; each mode prints one line of JSON. `make bench` asks for them.
//!
//! - `parts copy PATH MIB SECONDS`: how fast the store instructions alone fill the file at PATH; it stays.
//! - `parts requests PATH MIB KIND DEPTH COUNT`: runs COUNT requests of 4 KiB, `write` or `read` (hits), with checksums
//!   `write_crc`, `read_crc`, `read_verified`, `write_busy` in a cache of half of what is written, and `write_128k` of that
//!   size, to be counted by a profiler. The difference of two counts is free of what the start costs.
//! - `parts recover PATH MIB KEYS BYTES`: how long the recovery of a cache with so many keys of 512 or 4096 bytes takes,
//!   on one core and on two; the file stays.
//! - `parts costs PATH MIB SECONDS`: what the parts of a 4 KiB write cost one by one.
//! - `parts index PATH MIB KIND PAGES`: DRAM that a cache takes with so many pages of 4 KiB in it: `dense`, or
//!   `scattered` over a terabyte, or the first 512 bytes of each: `scattered_512`.

mod device;
mod memory;
mod random;
mod reopen;
mod rig;

use device::{Base, map, open};
use memory::resident_bytes;
use pcache::engine::{Cache, DataCrc, Fua, Op, Setting, SettingChange};
use pcache::pmem::{Coming, IovBuf, MappedPmem, Pmem, PmemRead};
use pcache::units::{Agent, Page, PmemOff};
use random::Rng;
use reopen::{Recovered, reopen};
use rig::{Load, Pattern, Rig, noise, now};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// Where a real cache keeps its superblock; copies go behind it.
const START_BYTES: u64 = 2 << 20;
const AGENT: Agent = Agent(1);

/// Bytes per second of copies to the places that `next` names, `batch` before each fence.
fn copy_rate(
    pmem: &impl Pmem,
    len_bytes: u64,
    batch: usize,
    span: Duration,
    mut next: impl FnMut(u64) -> u64,
) -> f64 {
    let mut rng = Rng::new(7);
    let buffers: Vec<IovBuf> = (0..batch)
        .map(|_| IovBuf::new(&noise(&mut rng, len_bytes as usize), &[]))
        .collect();
    let places = (pmem.len_bytes() - START_BYTES) / len_bytes;
    let mut done = 0u64;
    let start = now();
    while start.elapsed() < span {
        for buffer in &buffers {
            let off = PmemOff(START_BYTES + next(places) * len_bytes);
            pmem.store_from(AGENT, off, &mut buffer.cursor(), len_bytes);
            done += 1;
        }
        drop(pmem.fence(AGENT));
    }
    (done * len_bytes) as f64 / start.elapsed().as_secs_f64()
}

/// As [`copy_rate`] of 4 KiB with a fence after 32, one behind the other as the log has them: on one core, and on two at
/// once, each in its half. They begin at different places of it: two that go through memory in step may meet in the same part
/// of it all the time.
fn copy_rates_in_sequence(pmem: &MappedPmem, span: Duration) -> [f64; 2] {
    let rate = |part: u64, parts: u64| {
        let mut done = 0;
        copy_rate(pmem, 4 << 10, 32, span, |places| {
            let own = places / parts;
            done += 1;
            part * own + (done + part * own / 3) % own
        })
    };
    let two = std::thread::scope(|scope| {
        let other = scope.spawn(|| rate(1, 2));
        rate(0, 2) + other.join().expect("it copies")
    });
    [rate(0, 1), two]
}

/// Bytes per second of 4 KiB from random places of the first bytes of the device to 32 buffers; the next place is asked for
/// meanwhile.
fn load_rate(pmem: &MappedPmem, within_bytes: u64, span: Duration) -> f64 {
    const LEN: u64 = 4096;
    let buffers: Vec<IovBuf> = (0..32).map(|_| IovBuf::zeroed(LEN as usize)).collect();
    let places = (within_bytes.min(pmem.len_bytes()) - START_BYTES) / LEN;
    let mut rng = Rng::new(9);
    let mut next = || PmemOff(START_BYTES + rng.next() % places * LEN);
    let (mut off, mut done) = (next(), 0u64);
    let start = now();
    while start.elapsed() < span {
        for buffer in &buffers {
            let coming = Coming {
                off: next(),
                len_bytes: LEN,
            };
            let read = pmem.read_to_and_ask(off, &mut buffer.cursor(), LEN, coming);
            read.expect("the memory is sound");
            off = coming.off;
            done += LEN;
        }
    }
    done as f64 / start.elapsed().as_secs_f64()
}

fn copy(path: &Path, size_bytes: u64, span: Duration) -> Value {
    let pmem = map(path, size_bytes);
    let mut rng = Rng::new(3);
    let mut at = 0;
    let mut sequential = |places: u64| {
        at = (at + 1) % places;
        at
    };
    let mut random = |places: u64| rng.next() % places;
    const MIB: f64 = 1048576.0;
    let [one_core, two_cores] = copy_rates_in_sequence(&pmem, span);
    json!({
        "store_kernel": pmem.store_kernel_name(),
        "durability": pmem.durability_reason(),
        "copy_128k_1_mibps": copy_rate(&pmem, 128 << 10, 1, span, &mut sequential) / MIB,
        "copy_128k_8_mibps": copy_rate(&pmem, 128 << 10, 8, span, &mut sequential) / MIB,
        "copy_4k_32_sequential_mibps": one_core / MIB,
        "copy_4k_32_sequential_2cores_mibps": two_cores / MIB,
        "load_4k_1g_mibps": load_rate(&pmem, 1 << 30, span) / MIB,
        "load_4k_12g_mibps": load_rate(&pmem, 12 << 30, span) / MIB,
        "copy_4k_1_mibps": copy_rate(&pmem, 4 << 10, 1, span, &mut random) / MIB,
        "copy_4k_32_mibps": copy_rate(&pmem, 4 << 10, 32, span, &mut random) / MIB,
    })
}

fn set(cache: &Cache<MappedPmem>, setting: Setting, value: u32) {
    let change = SettingChange::of(setting, value);
    cache
        .change_settings(&change)
        .expect("the setting is valid");
}

/// With checksums if the kind ends with `_crc`, and with reads that are compared with them if it is `read_verified`. With
/// write-back and reclaiming if it is `write_busy`. Of 128 KiB each if it is `write_128k`.
fn requests(path: &Path, size_bytes: u64, kind: &str, depth: usize, count: u64) -> Value {
    let (is_write, data_crc) = match kind {
        "write" | "write_busy" | "write_128k" => (true, DataCrc::Off),
        "write_crc" => (true, DataCrc::On),
        "read" => (false, DataCrc::Off),
        "read_crc" | "read_verified" => (false, DataCrc::On),
        _ => panic!("there are no requests of kind {kind}"),
    };
    let is_busy = kind == "write_busy";
    let pages = size_bytes / 4096;
    let base = Base {
        block_size_bytes: 4096,
        block_count: if is_busy { pages * 2 } else { pages / 2 },
    };
    let cache = open(map(path, size_bytes), data_crc, base);
    // Nothing is done at leisure.
    set(&cache, Setting::DirtyAgeS, 0);
    set(&cache, Setting::ScrubMibS, 0);
    set(
        &cache,
        Setting::VerifyReads,
        u32::from(kind == "read_verified"),
    );
    if is_busy {
        set(&cache, Setting::GcPercent, 90);
    } else {
        set(&cache, Setting::DirtyHighPercent, 95);
    }
    let mut rig = Rig::new(&cache);
    rig.counted_ns = Some(500);
    let load = Load {
        depth,
        len_blocks: if kind == "write_128k" { 32 } else { 1 },
        pattern: if is_busy {
            Pattern::Random
        } else {
            Pattern::Sequential
        },
    };
    let write = |cursor| Op::Write(cursor, Fua::No);
    if !is_write || is_busy {
        // As many writes as the larger of two counts would read, so that both start alike; more than a busy cache holds.
        rig.run(load, write, |done| done >= base.block_count);
    }
    let start = now();
    let done = if is_write {
        rig.run(load, write, |done| done >= count)
    } else {
        rig.run(load, Op::Read, |done| done >= count)
    };
    json!({
        "requests": done,
        "read_hits": cache.stats().read_hits,
        "ns_per_request": start.elapsed().as_nanos() as f64 / done as f64,
    })
}

/// Writes `keys` keys of a block to random places of two million, and recovers the cache on one core and on two.
fn recover(path: &Path, size_bytes: u64, keys: u64, block_size_bytes: u32) -> Value {
    let base = Base {
        block_size_bytes,
        block_count: 1 << 21,
    };
    let cache = open(map(path, size_bytes), DataCrc::Off, base);
    let mut rig = Rig::new(&cache);
    let load = Load {
        depth: 32,
        len_blocks: 1,
        pattern: Pattern::Random,
    };
    let write = |cursor| Op::Write(cursor, Fua::No);
    rig.run(load, write, |done| done >= keys);
    assert_eq!(cache.stats().segments_reclaimed, 0, "the cache has room");
    drop((rig, cache));
    let [one, two] = [1, 2].map(|worker_count| reopen(map(path, size_bytes), base, worker_count));
    assert_eq!(one.keys, two.keys, "both find the same");
    let ns_per_key =
        |recovered: &Recovered| recovered.span.as_nanos() as f64 / recovered.keys as f64;
    json!({
        "keys": one.keys,
        "one_core_ns_per_key": ns_per_key(&one),
        "two_cores_ns_per_key": ns_per_key(&two),
    })
}

/// Nanoseconds for each write of 4 KiB to a random place, in batches of 32, of the engine with its background.
fn write_ns(path: &Path, size_bytes: u64, base: Base, span: Duration) -> f64 {
    let cache = open(map(path, size_bytes), DataCrc::Off, base);
    set(&cache, Setting::GcPercent, 90);
    // Until a small one is full; a large one has room for all of it.
    let before = base.block_count;
    let most = if size_bytes > before * u64::from(base.block_size_bytes) {
        set(&cache, Setting::DirtyHighPercent, 95);
        size_bytes / 4096 * 3 / 4 - before
    } else {
        u64::MAX
    };
    let mut rig = Rig::new(&cache).with_noise();
    let load = Load {
        depth: 32,
        len_blocks: 1,
        pattern: Pattern::Random,
    };
    let write = |cursor| Op::Write(cursor, Fua::No);
    rig.run(load, write, |done| done >= before);
    let start = now();
    let done = rig.run(load, write, |done| start.elapsed() > span || done >= most);
    start.elapsed().as_nanos() as f64 / done as f64
}

/// Does numbered work for so long; nanoseconds for each.
fn ns_each(span: Duration, mut work: impl FnMut(u64)) -> f64 {
    let (start, mut done) = (now(), 0);
    while start.elapsed() < span {
        (done..done + 64).for_each(&mut work);
        done += 64;
    }
    start.elapsed().as_nanos() as f64 / done as f64
}

/// A payload of 4 KiB and the line of its kset, stored as a batch does it that has no other: with a checksum in place of the
/// fence between them if that is quicker.
fn lone_write_ns(pmem: &impl Pmem, size_bytes: u64, span: Duration) -> f64 {
    let is_checksummed = pmem.bytes_checksummed_per_fence() >= 4096;
    let source = IovBuf::new(&noise(&mut Rng::new(9), 4096), &[]);
    let (line, places) = (noise(&mut Rng::new(7), 64), size_bytes / 2 / 4096);
    ns_each(span, |number| {
        let payload = PmemOff(size_bytes - (1 + number % places) * 4096);
        let mut cursor = source.cursor();
        if is_checksummed {
            std::hint::black_box(pmem.store_from_crc(AGENT, payload, &mut cursor, 4096, 5));
        } else {
            pmem.store_from(AGENT, payload, &mut cursor, 4096);
            drop(pmem.fence(AGENT));
        }
        pmem.store(AGENT, PmemOff(START_BYTES + number % (1 << 20) * 64), &line);
        drop(pmem.fence(AGENT));
    })
}

/// A kset of 32 keys, which is 13 lines, and its fence.
fn long_kset_ns(pmem: &impl Pmem, span: Duration) -> f64 {
    let kset = noise(&mut Rng::new(7), 13 * 64);
    ns_each(span, |number| {
        let off = START_BYTES + number * kset.len() as u64 % (64 << 20);
        pmem.store(AGENT, PmemOff(off), &kset);
        drop(pmem.fence(AGENT));
    })
}

/// What the parts of a 4 KiB write cost, in nanoseconds for each write: at depth 1, and in batches of 32.
fn costs(path: &Path, size_bytes: u64, span: Duration) -> Value {
    const WORKING_SET_PAGES: u64 = 1 << 18;
    let pmem = map(path, size_bytes);
    let ns = |mibps: f64| 4096.0 / mibps * 1e9;
    let mut rng = Rng::new(3);
    // As the log does it: payloads lie one before the other.
    let mut at = 0;
    let mut downwards = |places: u64| {
        at = (at + places - 1) % places;
        at
    };
    let copy_1_ns = ns(copy_rate(&pmem, 4 << 10, 1, span, &mut downwards));
    let copy_32_ns = ns(copy_rate(&pmem, 4 << 10, 32, span, &mut downwards));
    let write_1_ns = lone_write_ns(&pmem, size_bytes, span);
    let (kset_1_ns, kset_32_ns) = (write_1_ns - copy_1_ns, long_kset_ns(&pmem, span) / 32.0);
    let base = Base {
        block_size_bytes: 4096,
        block_count: WORKING_SET_PAGES,
    };
    let cache = open(pmem, DataCrc::Off, base);
    let load = Load {
        depth: 32,
        len_blocks: 1,
        pattern: Pattern::Sequential,
    };
    let write = |cursor| Op::Write(cursor, Fua::No);
    Rig::new(&cache).run(load, write, |done| done >= WORKING_SET_PAGES);
    let mut index_ns = |batch: u64| {
        let (start, mut done) = (now(), 0u64);
        while start.elapsed() < span {
            let pages: Vec<Page> = (0..batch)
                .map(|_| Page(rng.next() % WORKING_SET_PAGES))
                .collect();
            cache.republish(&pages);
            done += batch;
        }
        start.elapsed().as_nanos() as f64 / done as f64
    };
    let (index_1_ns, index_32_ns) = (index_ns(1), index_ns(32));
    drop(cache);
    // What write-back and reclaiming add, in a cache of half the working set as in `pcache_busy`.
    let small = path.with_extension("small");
    let small_bytes = WORKING_SET_PAGES * 4096 / 2;
    let busy_ns = write_ns(&small, small_bytes, base, 2 * span);
    let _ = std::fs::remove_file(&small);
    let idle_ns = write_ns(path, size_bytes, base, span);
    json!({
        "background": { "write_back_and_reclaim": busy_ns - idle_ns },
        "qd1": { "copy_and_fence": copy_1_ns, "kset_and_fence": kset_1_ns, "index": index_1_ns },
        "qd32": { "copy_and_fence": copy_32_ns, "kset_and_fence": kset_32_ns, "index": index_32_ns },
    })
}

/// Memory of the process when a cache has taken `pages` pages of 4 KiB, or the first blocks of so many.
fn index(path: &Path, size_bytes: u64, kind: &str, pages: u64) -> Value {
    const TERABYTE: u64 = 1 << 40;
    let (block_size_bytes, base_size_bytes, pattern) = match kind {
        "dense" => (4096, size_bytes, Pattern::Sequential),
        "scattered" => (4096, TERABYTE, Pattern::Random),
        "scattered_512" => (512, TERABYTE, Pattern::Random),
        _ => panic!("there is no index of kind {kind}"),
    };
    let base = Base {
        block_size_bytes,
        block_count: base_size_bytes / u64::from(block_size_bytes),
    };
    let cache = open(map(path, size_bytes), DataCrc::Off, base);
    // Write-back has memory of its own for its batches, 16 MiB at the most, which is none of the index.
    set(&cache, Setting::DirtyHighPercent, 95);
    let mut rig = Rig::new(&cache);
    let load = Load {
        depth: 32,
        len_blocks: 1,
        pattern,
    };
    let write = |cursor| Op::Write(cursor, Fua::No);
    let done = rig.run(load, write, |done| done >= pages);
    assert_eq!(cache.stats().segments_reclaimed, 0, "the cache has room");
    json!({
        "pages": done,
        "resident_bytes": resident_bytes(),
        "table_bytes": cache.info().index_bytes,
    })
}

fn main() {
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u64>().expect("a number");
    let span = |text: &str| Duration::from_secs_f64(text.parse().expect("a number of seconds"));
    let [mode, path, mib, ..] = args[..] else {
        eprintln!(
            "parts copy|costs|requests|recover|index PATH MIB ...: see the head of the source"
        );
        std::process::exit(2);
    };
    let (path, size_bytes) = (Path::new(path), number(mib) << 20);
    let keep = ["copy", "costs", "recover"].contains(&mode);
    if !keep {
        let _ = std::fs::remove_file(path);
    }
    let answer = match (mode, &args[3..]) {
        ("copy", [seconds]) => copy(path, size_bytes, span(seconds)),
        ("costs", [seconds]) => costs(path, size_bytes, span(seconds)),
        ("recover", [keys, bytes]) => recover(path, size_bytes, number(keys), number(bytes) as u32),
        ("requests", [kind, depth, count]) => {
            let depth = number(depth) as usize;
            requests(path, size_bytes, kind, depth, number(count))
        }
        ("index", [kind, pages]) => index(path, size_bytes, kind, number(pages)),
        _ => panic!("no such mode: {args:?}"),
    };
    println!("{answer}");
    if !keep {
        let _ = std::fs::remove_file(path);
    }
}
