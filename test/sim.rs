//! The deterministic simulator.

use pcache::sim::simulate;

#[test]
fn histories_keep_every_promise() {
    let first: u64 = std::env::var("PCACHE_SEED").map_or(1, |s| s.parse().unwrap());
    let count: u64 = std::env::var("PCACHE_SIM_SEEDS").map_or(200, |s| s.parse().unwrap());
    for seed in first..first + count {
        if let Err(failure) = simulate::run_seed(seed) {
            panic!("{failure}");
        }
    }
}
