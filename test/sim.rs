//! The deterministic simulator.
//!
//! What a history would show if it were broken, beyond what the code asserts by itself:
//!
//! - by what a recovery finds after a cut: INV-LOG-3 to INV-LOG-8, INV-TAIL-3, INV-TAIL-4, INV-SEG-6;
//! - by what a read returns: INV-READ-1, INV-FILL-1, INV-GRACE-1, INV-INDEX-2;
//! - by what is on the base, at any moment and between batches: INV-EPOCH-1, INV-EPOCH-2, INV-WB-1 to INV-WB-3;
//! - by a base that is refused although it is the right one: INV-WIT-1;
//! - by a request that completes twice or not at all: INV-IO-1;
//! - by stores of two cores to one line, or not fenced by the one that made them: INV-PMEM-2, INV-PMEM-3.

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
