//! The limits that bind, and what a request costs; each mode prints one line of JSON. `make bench` asks for them.
//!
//! - `parts copy PATH MIB SECONDS`: how fast the store instructions alone fill the file at PATH; it stays.
//! - `parts requests PATH MIB KIND DEPTH COUNT`: runs COUNT requests of 4 KiB, `write` or `read` (hits), to be
//!   counted by a profiler. The difference of two counts is free of what the start costs.
//! - `parts index PATH MIB KIND PAGES`: DRAM that a cache takes with so many pages of 4 KiB in it: `dense`, or
//!   `scattered` over a terabyte, or the first 512 bytes of each: `scattered_512`.

mod memory;
mod random;
mod rig;

use memory::resident_bytes;
use pcache::engine::{DataCrc, Fua, Op};
use pcache::pmem::{IovBuf, Pmem};
use pcache::units::{Agent, PmemOff};
use random::Rng;
use rig::{Base, Load, Pattern, Rig, map, now, open};
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
    let buffers: Vec<IovBuf> = (0..batch)
        .map(|_| IovBuf::zeroed(len_bytes as usize))
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
    json!({
        "store_kernel": pmem.store_kernel_name(),
        "durability": pmem.durability_reason(),
        "copy_128k_1_mibps": copy_rate(&pmem, 128 << 10, 1, span, &mut sequential) / MIB,
        "copy_128k_8_mibps": copy_rate(&pmem, 128 << 10, 8, span, &mut sequential) / MIB,
        "copy_4k_1_mibps": copy_rate(&pmem, 4 << 10, 1, span, &mut random) / MIB,
        "copy_4k_32_mibps": copy_rate(&pmem, 4 << 10, 32, span, &mut random) / MIB,
    })
}

fn requests(path: &Path, size_bytes: u64, kind: &str, depth: usize, count: u64) -> Value {
    let base = Base {
        block_size_bytes: 4096,
        block_count: size_bytes / 2 / 4096,
    };
    let cache = open(map(path, size_bytes), DataCrc::Off, base);
    let mut rig = Rig::new(&cache);
    let load = Load {
        depth,
        len_blocks: 1,
        pattern: Pattern::Sequential,
    };
    let write = |cursor| Op::Write(cursor, Fua::No);
    let done = match kind {
        "write" => rig.run(load, write, |done| done >= count),
        "read" => {
            // As many writes as the larger of two counts would read, so that both start alike.
            rig.run(load, write, |done| done >= base.block_count);
            rig.run(load, Op::Read, |done| done >= count)
        }
        _ => panic!("there are no requests of kind {kind}"),
    };
    json!({ "requests": done, "read_hits": cache.stats().read_hits })
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
    let [mode, path, mib, ..] = args[..] else {
        eprintln!("parts copy|requests|index PATH MIB ...: see the head of the source");
        std::process::exit(2);
    };
    let (path, size_bytes) = (Path::new(path), number(mib) << 20);
    let keep = mode == "copy";
    if !keep {
        let _ = std::fs::remove_file(path);
    }
    let answer = match (mode, &args[3..]) {
        ("copy", [seconds]) => {
            let span = Duration::from_secs_f64(seconds.parse().expect("a number of seconds"));
            copy(path, size_bytes, span)
        }
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
