//! Every seeded bug is found, for the right reason; and the same search finds nothing where there is none.

use pcache::canary::{self, Canary};
use pcache::engine::WritebackOrder;
use pcache::sim::crash::{self, Limits};
use pcache::sim::machine::Setup;
use pcache::sim::model::Violation;
use pcache::sim::prng::{Prng, mix};
use pcache::sim::scenarios::{self, Scenario};
use pcache::sim::script::{self, Step, Weights};
use pcache::sim::simulate;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, ScopedJoinHandle};

/// A way to look for a broken promise.
struct Hunter {
    name: &'static str,
    /// Runs the history of a seed; returns the number of crashes that it recovered from.
    hunt: fn(u64) -> Result<u64, Violation>,
    seeds_per_round: u64,
}

fn hunters() -> [Hunter; 8] {
    [
        Hunter {
            name: "history",
            hunt: hunt_history,
            seeds_per_round: 12,
        },
        Hunter {
            name: "crowd",
            hunt: hunt_crowd,
            seeds_per_round: 12,
        },
        Hunter {
            name: "crash",
            hunt: hunt_crashes,
            seeds_per_round: 1,
        },
        Hunter {
            name: "crowd crash",
            hunt: hunt_crowd_crashes,
            seeds_per_round: 1,
        },
        Hunter {
            name: "readers",
            hunt: hunt_readers,
            seeds_per_round: 4,
        },
        Hunter {
            name: "copies",
            hunt: hunt_copies,
            seeds_per_round: 4,
        },
        Hunter {
            name: "batches",
            hunt: hunt_batches,
            seeds_per_round: 4,
        },
        Hunter {
            name: "scenario",
            hunt: hunt_scenario,
            seeds_per_round: laid().count() as u64,
        },
    ]
}

/// A canary that is not found in so many rounds is missed.
const ROUNDS_MAX: u64 = 50;

/// Of a history with a cut at every moment: far less thorough than the search that has no canary to find.
const LIMITS: Limits = Limits {
    lines_max: 1,
    random_images: 2,
    lazy_runs_max: 1,
    twice_every: 1000,
    go_on_every: 10_000,
    nested_every: 1000,
};

/// The history of a seed, with the crashes that are steps of it.
fn hunt_history(seed: u64) -> Result<u64, Violation> {
    let (setup, steps) = simulate::history(seed);
    script::run_caught(&setup, seed, &steps, None).map(|outcome| outcome.restarts)
}

/// A history of a crowded machine: several cores with long queues run into each other, and there is little
/// room.
fn crowd(seed: u64, step_count: usize) -> (Setup, Vec<Step>) {
    let mut prng = Prng::new(mix(seed, 2));
    let setup = Setup {
        segment_size_bytes: 16 << 10,
        segment_count: prng.between(5, 9),
        core_count: 4,
        stream_count_max: prng.between(1, 4) as u32,
        yield_percent: 30,
        ..script::setup_of(&mut prng)
    };
    let weights = Weights {
        crash: 0,
        fault: 0,
        key_loss: 10 * (seed % 2),
        busy_percent: 70,
    };
    let steps = script::draw(&mut prng, &setup, weights, step_count);
    (setup, steps)
}

fn hunt_crowd(seed: u64) -> Result<u64, Violation> {
    let (setup, steps) = crowd(seed, 200);
    script::run_caught(&setup, seed, &steps, None).map(|outcome| outcome.restarts)
}

/// A short history with a power cut at every moment of it.
fn hunt_crashes(seed: u64) -> Result<u64, Violation> {
    let (setup, steps) = crash::history(seed);
    crash::run(&setup, seed, &steps, LIMITS).map(|tally| tally.crash_states)
}

/// The same, crowded.
fn hunt_crowd_crashes(seed: u64) -> Result<u64, Violation> {
    let (setup, steps) = crowd(seed, 50);
    crash::run(&setup, seed, &steps, LIMITS).map(|tally| tally.crash_states)
}

/// Two cores on one stream, beside which segments are reclaimed all the time.
fn reclaiming(prng: &mut Prng) -> Setup {
    Setup {
        segment_size_bytes: 16 << 10,
        gc_percent: 0,
        core_count: 2,
        stream_count_max: 1,
        yield_percent: prng.pick(&[10, 30]),
        ..Setup::default()
    }
}

/// Long reads on one core, while writes of another and the background send segments around.
fn hunt_readers(seed: u64) -> Result<u64, Violation> {
    let mut prng = Prng::new(mix(seed, 3));
    let setup = Setup {
        block_count: 48,
        segment_count: 5,
        ..reclaiming(&mut prng)
    };
    let mut steps = Vec::new();
    for _ in 0..60 {
        for _ in 0..4 {
            steps.push(Step::Write(1, prng.below(41), 7, 0));
        }
        let len = prng.between(8, 40);
        steps.push(Step::Read(0, prng.below(48 - len), len, 0));
        steps.extend([
            Step::DrainStart,
            Step::Base(4),
            Step::Core(0),
            Step::Turns(2),
        ]);
    }
    script::run_caught(&setup, seed, &steps, None).map(|outcome| outcome.restarts)
}

/// What is left of overwritten segments is copied while the same blocks are written. It takes more segments than most
/// histories have.
fn hunt_copies(seed: u64) -> Result<u64, Violation> {
    let mut prng = Prng::new(mix(seed, 6));
    let setup = Setup {
        block_count: 64,
        segment_count: 16,
        ..reclaiming(&mut prng)
    };
    let mut steps = Vec::new();
    for _ in 0..60 {
        for _ in 0..3 {
            steps.extend([Step::Write(0, prng.below(60), 4, 0), Step::Core(0)]);
        }
        steps.extend([Step::DrainStart, Step::Base(4), Step::Background(4)]);
        for _ in 0..3 {
            steps.push(Step::Write(1, prng.below(60), 4, 0));
            steps.push(Step::Background(2));
        }
        steps.extend([Step::Turns(2), Step::Read(0, prng.below(48), 16, 0)]);
    }
    script::run_caught(&setup, seed, &steps, None).map(|outcome| outcome.restarts)
}

/// Batches that span barriers, cut in the middle. What is written back then would end at the first barrier, if
/// nobody knew how far the last batch went.
fn hunt_batches(seed: u64) -> Result<u64, Violation> {
    let mut prng = Prng::new(mix(seed, 4));
    let setup = Setup {
        block_count: 32,
        segment_size_bytes: 64 << 10,
        order: WritebackOrder::Relaxed,
        yield_percent: prng.pick(&[0, 5]),
        ..Setup::default()
    };
    let mut steps = Vec::new();
    for _ in 0..6 {
        steps.push(Step::Strict(false));
        for _ in 0..6 {
            steps.push(Step::Write(0, prng.below(30), 2, 0));
            steps.extend([Step::Core(0), Step::Flush(0), Step::Core(0)]);
        }
        steps.extend([
            Step::DrainStart,
            Step::Background(4),
            Step::Base(prng.between(1, 6)),
            Step::CutPower(prng.below(1 << 32), 2),
            Step::Strict(true),
            Step::DrainStart,
            Step::Turns(20),
        ]);
    }
    script::run_caught(&setup, seed, &steps, None).map(|outcome| outcome.restarts)
}

/// What histories that are drawn hardly ever come to, laid on purpose: shared misses, memory that goes bad, or is not to be
/// had, two cuts at the same line, writers of several cores that wait, batches without room.
fn laid() -> impl Iterator<Item = &'static Scenario> {
    let is_laid = |item| matches!(item, 13 | 18 | 31..=33 | 42 | 44..=51);
    { scenarios::ALL.iter() }.filter(move |scenario| is_laid(scenario.item))
}

/// One of them: what stops at another scenario hides nothing.
fn hunt_scenario(seed: u64) -> Result<u64, Violation> {
    let number = (seed as usize - 1) % laid().count();
    let scenario = laid().nth(number).expect("there are more");
    let mut context = scenarios::Context::new(seed, LIMITS);
    let run = AssertUnwindSafe(|| (scenario.run)(&mut context));
    catch_unwind(run).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(Violation(text.unwrap_or_default()))
    })?;
    Ok(1)
}

/// What a canary must be found by: one of these is in the text of the violation.
fn reasons(canary: Canary) -> &'static [&'static str] {
    const STALE: &str = "a read found block";
    const GARBAGE: &str = "a read of block";
    const LOST: &str = "recovery found block";
    const IN_PART: &str = "recovery found a write in part";
    const MIXED: &str = "recovery found writes mixed";
    const TORN: &str = "recovery found garbage";
    const REFUSED: &str = "the cache is refused";
    const CLEAN: &str = "counts as clean";
    const BARRIER: &str = "the base breaks Barriers";
    const CUT: &str = "the base breaks Cut";
    const HELD: &str = "a checkpoint holds the base, but";
    const DRAINED: &str = "after a drain block";
    const WITNESS: &str = "the base device does not hold what";
    const INDEX: &str = "INV-INDEX-2";
    const DEGRADED: &str = "dirty data are lost, and the cache is";
    match canary {
        Canary::PayloadsNotFenced | Canary::UnfencedKsetTrusted => &[TORN],
        Canary::KilledKsetTrusted => &[REFUSED, LOST, "a second recovery found block"],
        Canary::KsetFencedByAnotherCore => &["acknowledged too early"],
        Canary::PublishedBeforeDurable => &[LOST],
        Canary::AcknowledgedUnlogged => &[STALE, LOST, DRAINED, BARRIER, CUT],
        Canary::BatchSplitOverTwoKsets => &[IN_PART, MIXED, CUT],
        Canary::ClaimsIgnored => &[STALE, LOST, DRAINED, MIXED],
        Canary::FloorNotSet => &[STALE, DRAINED, CLEAN, BARRIER, CUT],
        Canary::OverlapLost => &[STALE, LOST, IN_PART, CLEAN],
        Canary::RunTakenForPage | Canary::SplitReadOnce | Canary::LineFreedInUse => {
            &[STALE, GARBAGE, LOST, TORN, CLEAN]
        }
        Canary::StaleFillInstalled => &[STALE, LOST, CLEAN],
        // Drawn histories see what comes of it once in two thousand.
        Canary::KnownPageRounded => &["the base is asked for [", STALE, LOST, CLEAN],
        Canary::PadFreedInUse => &[GARBAGE, CLEAN],
        Canary::FilledFromReader => &[GARBAGE],
        Canary::FetchNotWithdrawn => &["INV-READ-5", "a request does not end"],
        Canary::FetchWithdrawnEarly => &["the base is asked for what has arrived"],
        Canary::StaleReadJoined | Canary::DirtyDataPassedBy => &[STALE],
        Canary::ReadNotVerified => &[GARBAGE, "come from the base, not"],
        Canary::LoanNotVerified => &[GARBAGE],
        Canary::CrcNotedLate => &["has failed without a reason", "wrong checksums"],
        Canary::RecoveredCrcsForgotten => &["has failed without a reason", "come from the base"],
        Canary::WriteNotHeld => &["acknowledged before the base has it"],
        Canary::DirtyWriteForgotten => &[STALE, LOST],
        Canary::FlushClosesNoEpoch
        | Canary::FuaClosesNoEpoch
        | Canary::StrictBatchSpansBarrier
        | Canary::SpanningBatchTakesMore
        | Canary::EpochForgotten => &[BARRIER],
        Canary::KilledCopyTrusted
        | Canary::SecondCopyNotWritten
        | Canary::BothCopiesBeforeOneFence
        | Canary::ChecksumWithoutGeneration
        | Canary::SealedOneShort => &[REFUSED],
        Canary::UnreadableCopyStored => &["INV-PMEM-4"],
        Canary::TornKsetCompleted => &["a torn kset was completed"],
        Canary::PairChecksumIgnored => &[REFUSED, LOST, CLEAN],
        Canary::KsetChecksumIgnored => &[REFUSED, LOST, TORN],
        Canary::StaleLapAccepted | Canary::ChecksumWithoutUuid => {
            &[STALE, GARBAGE, LOST, TORN, CLEAN, INDEX]
        }
        Canary::TailBeforeBaseFlush
        | Canary::FailedBaseFlushIgnored
        | Canary::OnlyBaseFlushRepeated
        | Canary::FailedBaseWriteIgnored => &[CUT, BARRIER, CLEAN, WITNESS, DRAINED],
        Canary::FailedUnmapRepeated => &["a drain does not end"],
        Canary::OldestKeyWins | Canary::UnmapNotWrittenBack => {
            &[CUT, BARRIER, CLEAN, DRAINED, STALE]
        }
        Canary::BatchEndNotRecorded => &[CUT],
        Canary::WitnessNotRenewed => &[WITNESS],
        Canary::SalvageEndsEarly => &[CUT, CLEAN],
        Canary::SalvageLaidBelow | Canary::ClaimedPagesNotSalvaged => {
            &[CUT, DRAINED, CLEAN, STALE, LOST]
        }
        Canary::SalvageLeftAtStop => &["a start ends as"],
        Canary::PartLeftOut | Canary::PartTakesWrongPayload => &[CUT, CLEAN, DRAINED, STALE],
        Canary::LastPartRepeated | Canary::SalvageEndsWithLastPart => &[CUT, CLEAN, DRAINED],
        Canary::ZeroesWithoutWeight => &["faster than the rate"],
        Canary::StopKeepsToRate => &["a stop takes"],
        Canary::DrainEndsEarly => &[DRAINED],
        Canary::DamagedPayloadWritten => &[CUT, BARRIER, DEGRADED],
        Canary::LostSourceForgotten => &[DEGRADED],
        Canary::DirtyDamageReadFromBase => &["fail, not", "is not served without the base"],
        Canary::DamageJudgedByNeighbour => &["is not served without the base"],
        Canary::CheckpointHeldTooEarly => &[CUT],
        Canary::BatchBegunDuringHold => &[HELD],
        Canary::GenerationBeforeKeyTail => &[CLEAN, LOST],
        Canary::GenerationNotRaised => &[STALE, LOST, CLEAN, TORN],
        Canary::ReclaimIgnoresReaders => &[GARBAGE, STALE],
        Canary::StaleCopyInstalled | Canary::ReclaimedWithoutCopies => {
            &[STALE, LOST, CLEAN, MIXED, IN_PART, GARBAGE, INDEX]
        }
        Canary::HealerWaitsForRoom => &["writes still wait"],
        Canary::LateWriterGoesFirst => &["goes before those that wait"],
        Canary::ForgottenUnnoted => &[STALE, LOST, CLEAN],
        Canary::SuspectSegmentReused => &[
            "segments are quarantined",
            "on lost memory is",
            // Nor does the memory take what is stored there.
            "INV-PMEM-4",
            "has failed without a reason",
        ],
        Canary::ScrubDropsDirtyData => &[
            STALE,
            "damaged dirty data are not named",
            "is not served without the base",
        ],
        Canary::DirtySegmentReclaimed => &["INV-SEG-5", STALE, LOST],
        Canary::FillsAmongWrites => &["a write waits although little is dirty"],
        Canary::ScanNotOnProbation => &["a scan has driven out"],
        Canary::TailNotWatched => &["a request does not end", "a write waits"],
        Canary::RecoveredInSegmentOrder => &[LOST, IN_PART, MIXED, CLEAN, STALE],
        Canary::WaitingKeysDropped => &[LOST, IN_PART, MIXED, CLEAN, STALE],
        Canary::NewerBlocksBuried | Canary::RecoveryClaimsIgnored => {
            &[LOST, IN_PART, MIXED, CLEAN, STALE, INDEX]
        }
        Canary::KeyTailIgnored => &[INDEX, CLEAN, LOST],
        Canary::ZeroesForgotten => &[LOST, CLEAN, STALE],
        Canary::GrowthNotPersisted => &[REFUSED],
        Canary::FormattedWithoutMemory => &["without memory the device was written to"],
        Canary::SeqGivenOutAgain => &["both hold a kset with"],
    }
}

/// What has become of a search.
#[derive(Default)]
struct Search {
    histories: u64,
    crash_states: u64,
    caught: Option<(&'static str, Violation)>,
    /// Violations that are not what the canary must be found by.
    others: Vec<String>,
}

/// Runs the hunters, a few seeds of each in turn, until one finds something to be found by.
fn search(rounds: u64, reasons: &[&str]) -> Search {
    let mut search = Search::default();
    for round in 0..rounds {
        for hunter in hunters() {
            let first = 1 + round * hunter.seeds_per_round;
            for seed in first..first + hunter.seeds_per_round {
                search.histories += 1;
                match (hunter.hunt)(seed) {
                    Ok(states) => search.crash_states += states,
                    Err(violation) if reasons.iter().any(|text| violation.0.contains(text)) => {
                        search.caught = Some((hunter.name, violation));
                        return search;
                    }
                    Err(violation) => {
                        let text = format!("{} seed {seed}: {violation}", hunter.name);
                        search.others.push(text);
                    }
                }
            }
        }
    }
    search
}

/// Plants each canary and searches for it, as many at once as there are cores: a canary is planted for a thread, and
/// a simulation stays on its thread.
fn search_each(canaries: &[Canary]) -> Vec<(Canary, Search)> {
    let next = AtomicUsize::new(0);
    let hunt = || {
        let mut found = Vec::new();
        while let index = next.fetch_add(1, Ordering::Relaxed)
            && let Some(&canary) = canaries.get(index)
        {
            let _planted = canary::plant(canary);
            found.push((index, search(ROUNDS_MAX, reasons(canary))));
        }
        found
    };
    let mut found: Vec<(usize, Search)> = thread::scope(|scope| {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(hunt)).collect();
        let joined = threads.into_iter().map(ScopedJoinHandle::join);
        joined
            .flat_map(|found| found.expect("a panic of a hunter is caught"))
            .collect()
    });
    found.sort_by_key(|(index, _)| *index);
    let searches = found.into_iter().map(|(_, search)| search);
    canaries.iter().copied().zip(searches).collect()
}

#[test]
fn every_canary_is_caught_for_the_right_reason_and_nothing_else_is() {
    let hook = std::panic::take_hook();
    // Most canaries break invariants, many times.
    std::panic::set_hook(Box::new(|_| {}));
    // `PCACHE_CANARY`: this one alone.
    let only = std::env::var("PCACHE_CANARY").ok();
    let wanted = |canary: &Canary| only.as_deref().is_none_or(|only| canary.name() == only);
    let wanted: Vec<Canary> = Canary::ALL.iter().copied().filter(wanted).collect();
    let found = search_each(&wanted);
    let per_round: u64 = hunters().map(|hunter| hunter.seeds_per_round).iter().sum();
    let longest = found.iter().map(|(_, search)| search.histories).max();
    let rounds = longest.unwrap_or(0).div_ceil(per_round);
    let without = search(rounds, &[]);
    std::panic::set_hook(hook);

    for (canary, search) in &found {
        let (name, histories, states) = (canary.name(), search.histories, search.crash_states);
        let (hunter, text) = match &search.caught {
            Some((hunter, violation)) => (*hunter, violation.0.as_str()),
            None => ("-", search.others.first().map_or("nothing", String::as_str)),
        };
        let text: String = text.chars().take(70).collect();
        println!("{name:28} {hunter:12} {histories:5} histories {states:7} crash states: {text}");
    }
    let missed: Vec<&str> = found
        .iter()
        .filter(|(_, search)| search.caught.is_none())
        .map(|(canary, _)| canary.name())
        .collect();
    let report = serde_json::json!({
        "canaries_total": found.len(),
        "canaries_caught": found.len() - missed.len(),
        "histories_without_canary": without.histories,
        "crash_states_without_canary": without.crash_states,
        "violations_without_canary": without.others.len(),
    });
    println!("{report}");
    assert!(missed.is_empty(), "not caught: {missed:?}");
    assert_eq!(without.others, [""; 0], "found without a canary");
}
