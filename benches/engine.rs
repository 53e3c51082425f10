//! The engine alone, without SPDK: requests per second of one core.
//!
//! `cargo bench --features heap --bench engine -- [CACHE_PATH] [CACHE_MIB]` (default: a file on /dev/hugepages if
//! that is mounted, else on /dev/shm; 1024 MiB). `parts` has the limits to compare with.

mod device;
mod random;
mod rig;

use device::{Base, map, open};
use pcache::engine::{DataCrc, Fua, Op};
use pcache::pmem::IovCursor;
use rig::{Load, Pattern, Rig, now};
use std::path::PathBuf;
use std::time::Duration;

const BLOCK_SIZE_BYTES: u32 = 4096;
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_millis(400);

/// Requests per second of one round.
fn round(rig: &mut Rig, load: Load, make: impl Fn(IovCursor) -> Op) -> f64 {
    let start = now();
    let done = rig.run(load, make, |_| start.elapsed() > ROUND);
    done as f64 / start.elapsed().as_secs_f64()
}

fn report(name: &str, mut figures: Vec<f64>) {
    figures.sort_by(f64::total_cmp);
    println!(
        "{name:<44} {:>8.3} M/s   ({:.3} .. {:.3})",
        figures[figures.len() / 2] / 1e6,
        figures[0] / 1e6,
        figures[figures.len() - 1] / 1e6
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
        let _ = std::fs::remove_file(&path);
        let base = Base {
            block_size_bytes: BLOCK_SIZE_BYTES,
            block_count: (mib << 20) / 2 / u64::from(BLOCK_SIZE_BYTES),
        };
        let cache = open(map(&path, mib << 20), data_crc, base);
        println!("-- data_crc {data_crc:?}, engine {}", cache.info().uuid);
        let mut rig = Rig::new(&cache).with_noise();
        let write = |cursor| Op::Write(cursor, Fua::No);
        for (name, depth, len_blocks, pattern) in [
            ("4 KiB random write, depth 32", 32, 1, Pattern::Random),
            ("4 KiB random write, depth 1", 1, 1, Pattern::Random),
            ("4 KiB random write, depth 128", 128, 1, Pattern::Random),
            (
                "128 KiB sequential write, depth 8",
                8,
                32,
                Pattern::Sequential,
            ),
        ] {
            let load = Load {
                depth,
                len_blocks,
                pattern,
            };
            round(&mut rig, load, write);
            report(
                name,
                (0..ROUNDS).map(|_| round(&mut rig, load, write)).collect(),
            );
        }
        for depth in [32, 1] {
            let load = Load {
                depth,
                len_blocks: 1,
                pattern: Pattern::Random,
            };
            let rounds = (0..ROUNDS)
                .map(|_| round(&mut rig, load, Op::Read))
                .collect();
            report(&format!("4 KiB random read, depth {depth}"), rounds);
        }
        println!(
            "   {}",
            serde_json::to_string(&cache.stats()).unwrap_or_default()
        );
    }
    let _ = std::fs::remove_file(&path);
}
