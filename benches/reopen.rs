//! The recovery of a cache without SPDK.

use crate::device::{Base, options, poll};
use crate::rig::now;
use pcache::engine::FormatPolicy;
use pcache::pmem::MappedPmem;
use pcache::recovery::{Opening, Work};
use std::time::Duration;

/// How a recovery went.
pub(crate) struct Recovered {
    pub(crate) keys: u64,
    pub(crate) span: Duration,
}

/// Opens a cache with so many workers, each in a thread.
#[expect(
    clippy::disallowed_methods,
    reason = "there are no cores of an application"
)]
pub(crate) fn reopen(pmem: MappedPmem, base: Base, worker_count: usize) -> Recovered {
    let options = options(FormatPolicy::Never, None, base);
    let start = now();
    let mut opening = Opening::begin(pmem, options).expect("there is a cache");
    let workers: Vec<_> = (1..worker_count).map(|_| opening.worker()).collect();
    let threads = workers
        .into_iter()
        .map(|mut worker| std::thread::spawn(move || while worker.work() != Work::Over {}));
    let threads: Vec<_> = threads.collect();
    while !poll(&mut opening, base) {}
    let span = start.elapsed();
    for thread in threads {
        thread.join().expect("a worker does not fail");
    }
    let keys = opening.recovery().expect("it was recovered").keys;
    Recovered { keys, span }
}
