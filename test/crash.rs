//! The crash enumerator.

use pcache::sim::crash::{self, Limits, Tally};

#[test]
fn every_cut_keeps_every_promise() {
    let first: u64 = std::env::var("PCACHE_SEED").map_or(1, |s| s.parse().unwrap());
    let count: u64 = std::env::var("PCACHE_CRASH_SEEDS").map_or(20, |s| s.parse().unwrap());
    let mut total = Tally::default();
    for seed in first..first + count {
        match crash::run_seed(seed, Limits::default()) {
            Ok(tally) => total.add(&tally),
            Err(failure) => panic!("{failure}"),
        }
    }
    println!("{total:?}");
}
