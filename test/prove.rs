//! The search for a history that breaks a promise: the crash enumerator and the simulator, on all processors.
//!
//! `prove crash`, `prove sim`, or both; a few seconds each unless the environment asks for more. With
//! `scenarios`, these too, more thoroughly than their own tests do it:
//!
//! - `PCACHE_SEED`: the first seed (1);
//! - `PCACHE_CRASH_STATES`: crash states to check, at least;
//! - `PCACHE_SIM_SEEDS`: histories to simulate;
//! - `PCACHE_CANARIES`: a file with the JSON line of the canary test, to be told with the result.
//!
//! Prints its progress, and ends with one line of JSON. A failure prints its seed and a script that is as
//! short as it could be made.
//!
//! What would show here if it were broken, beyond what the code asserts by itself:
//!
//! - by what a recovery finds after a cut: INV-LOG-3 to INV-LOG-8, INV-TAIL-3, INV-TAIL-4, INV-SEG-6,
//!   INV-SEG-8, INV-SEG-9;
//! - by what a read returns: INV-READ-1, INV-READ-6, INV-READ-7, INV-FILL-1, INV-GRACE-1, INV-INDEX-2, INV-CRC-2,
//!   INV-MODE-2, INV-MODE-3;
//! - by what is on the base, at any moment, between batches and during a checkpoint: INV-EPOCH-1,
//!   INV-EPOCH-2, INV-WB-1 to INV-WB-3, INV-WB-6, INV-WB-8, INV-CKPT-1;
//! - by what is on the base when a write is acknowledged in a mode that holds writes: INV-MODE-1;
//! - by a base that is refused although it is the right one: INV-WIT-1, INV-GROW-1;
//! - by a request that completes twice or not at all: INV-IO-1;
//! - by stores of two cores to one line, or not fenced by the one that made them: INV-PMEM-2, INV-PMEM-3.
#![expect(
    clippy::disallowed_methods,
    reason = "a program, not the engine: it reports how long it takes"
)]

use pcache::sim::crash::{self, Limits, Tally};
use pcache::sim::scenarios::{self, Context};
use pcache::sim::simulate;
use serde::Serialize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often progress is told.
const PROGRESS: Duration = Duration::from_secs(5);

/// What was done; the last line of the output.
#[derive(Debug, Default, Serialize)]
struct Report {
    first_seed: u64,
    scenarios: u64,
    crash_states: u64,
    crash_states_nested: u64,
    crash_states_lazy: u64,
    moments: u64,
    moments_exhausted: u64,
    seeds: u64,
    virtual_operations: u64,
    restarts: u64,
    awaited_reads: u64,
    canaries_caught: u64,
    canaries_total: u64,
    violations: u64,
    seconds: u64,
}

/// What the workers share.
struct Search {
    report: Mutex<Report>,
    next_seed: AtomicU64,
    stop: AtomicBool,
    start: Instant,
    told: Mutex<Instant>,
}

impl Search {
    fn new(first_seed: u64) -> Self {
        Self {
            report: Mutex::new(Report {
                first_seed,
                ..Report::default()
            }),
            next_seed: AtomicU64::new(first_seed),
            stop: AtomicBool::new(false),
            start: Instant::now(),
            told: Mutex::new(Instant::now()),
        }
    }

    fn add<R>(&self, change: impl FnOnce(&mut Report) -> R) -> R {
        change(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn add_tally(&self, tally: &Tally) {
        self.add(|report| {
            report.crash_states += tally.crash_states;
            report.crash_states_nested += tally.nested_states;
            report.crash_states_lazy += tally.lazy_states;
            report.moments += tally.moments;
            report.moments_exhausted += tally.moments_exhausted;
        });
    }

    fn fail(&self, what: &str) {
        println!("VIOLATION: {what}");
        self.add(|report| report.violations += 1);
        self.stop.store(true, Ordering::Relaxed);
    }

    fn tell(&self, what: &str, done: u64, wanted: u64) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.elapsed() >= PROGRESS {
            *told = Instant::now();
            let seconds = self.start.elapsed().as_secs();
            println!("[{seconds:4} s] {what}: {done} of {wanted}");
        }
    }

    /// Runs `work` for one seed after the other, on all processors, as long as it says so.
    fn run(&self, work: impl Fn(u64) -> bool + Sync) {
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while !self.stop.load(Ordering::Relaxed) {
                        if !work(self.next_seed.fetch_add(1, Ordering::Relaxed)) {
                            break;
                        }
                    }
                });
            }
        });
    }

    fn scenarios(&self, seed: u64) {
        self.next_seed.store(0, Ordering::Relaxed);
        let count = scenarios::ALL.len() as u64;
        self.run(|number| {
            let Some(scenario) = scenarios::ALL.get(number as usize) else {
                return false;
            };
            let mut context = Context::new(seed, Limits::default());
            let ran = catch_unwind(AssertUnwindSafe(|| (scenario.run)(&mut context)));
            match ran {
                Ok(Ok(())) => {}
                Ok(Err(violation)) => self.fail(&format!("{}: {violation}", scenario.name)),
                Err(_) => self.fail(&format!("{}: a panic", scenario.name)),
            }
            self.add_tally(&context.tally());
            self.add(|report| report.scenarios += 1);
            self.tell("scenarios", number + 1, count);
            true
        });
    }

    fn crash(&self, first: u64, states: u64) {
        self.next_seed.store(first, Ordering::Relaxed);
        let done = AtomicU64::new(0);
        self.run(|seed| {
            match crash::run_seed(seed, Limits::default()) {
                Ok(tally) => {
                    done.fetch_add(tally.crash_states, Ordering::Relaxed);
                    self.add_tally(&tally);
                }
                Err(failure) => self.fail(&failure.to_string()),
            }
            let done = done.load(Ordering::Relaxed);
            self.tell("crash states", done, states);
            done < states
        });
    }

    fn sim(&self, first: u64, seeds: u64) {
        self.next_seed.store(first, Ordering::Relaxed);
        self.run(|seed| {
            if seed >= first + seeds {
                return false;
            }
            match simulate::run_seed(seed) {
                Ok(outcome) => self.add(|report| {
                    report.seeds += 1;
                    report.virtual_operations += outcome.requests;
                    report.restarts += outcome.restarts;
                    report.awaited_reads += outcome.awaited_reads;
                }),
                Err(failure) => self.fail(&failure.to_string()),
            }
            self.tell("histories", seed - first + 1, seeds);
            true
        });
    }
}

/// So many histories have reads that wait for the base reads of other cores, or they are not what they are meant to be.
const HISTORIES_WITH_WAITS: u64 = 100;

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Err(_) => default,
        Ok(text) => text.parse().unwrap_or_else(|_| {
            eprintln!("prove: {name}={text} is not a number from 0 on");
            std::process::exit(2)
        }),
    }
}

/// Caught and total, from the line that the canary test has left.
fn canaries() -> (u64, u64) {
    let Ok(path) = std::env::var("PCACHE_CANARIES") else {
        return (0, 0);
    };
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let line = text.lines().rfind(|line| line.starts_with('{'));
    let line: serde_json::Value = serde_json::from_str(line.unwrap_or("{}")).unwrap_or_default();
    let field = |name: &str| line[name].as_u64().unwrap_or(0);
    (field("canaries_caught"), field("canaries_total"))
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| words.iter().any(|other| other == word);
    if has("--list") {
        // What runs tests one by one asks for their names first. None of these is ignored.
        if !has("--ignored") {
            println!("crash: test\nsim: test");
        }
        return;
    }
    let (scenarios, crash, sim) = (has("scenarios"), has("crash"), has("sim"));
    let first_seed = number("PCACHE_SEED", 1);
    let search = Search::new(first_seed);
    if scenarios {
        search.scenarios(first_seed);
    }
    if crash || !sim {
        search.crash(first_seed, number("PCACHE_CRASH_STATES", 50_000));
    }
    if sim || !crash {
        search.sim(first_seed, number("PCACHE_SIM_SEEDS", 300));
        let (seeds, awaited_reads) = search.add(|report| (report.seeds, report.awaited_reads));
        if seeds >= HISTORIES_WITH_WAITS && awaited_reads == 0 {
            search.fail("no read has waited for the base read of another core");
        }
    }
    let mut report = search
        .report
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    (report.canaries_caught, report.canaries_total) = canaries();
    report.seconds = search.start.elapsed().as_secs();
    let failed = report.violations > 0 || report.canaries_caught < report.canaries_total;
    println!("{}", serde_json::to_string(&report).unwrap_or_default());
    if failed {
        std::process::exit(1);
    }
}
