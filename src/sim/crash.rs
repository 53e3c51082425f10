//! The crash enumerator: at every fence and every acknowledgement of a history it recovers from what a power
//! cut could leave, and compares that with the oracle.
//!
//! Levels, as in `docs/TESTING.md`: L1 nothing or everything of what is pending; L2 all but a few lines, or
//! only a few lines; L3 every prefix of one line; L4 random words; L5 every combination of words that recovery
//! can tell apart, as far as the budget goes. Recovery itself is cut too, at each of its own fences.

mod images;

use super::base::BaseImage;
use super::image::ImagePmem;
use super::lazy::LazyPmem;
use super::machine::{Machine, Moment, Observer, Outside, Setup};
use super::model::{Expectation, Violation};
use super::pmem::{PendingWord, SimPmem, SimState};
use super::prng::{Prng, mix};
use super::stamp::Stamp;
use super::{recover, script};
use crate::pmem::{Pmem, PmemRead};
use images::{Image, Images};
use std::collections::HashSet;
use std::hash::BuildHasherDefault;
use std::sync::{Arc, Mutex, PoisonError};

/// How thorough to be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// L2, L3: lines that are looked at in one moment; if more are pending, random ones.
    pub lines_max: usize,
    /// L4: images of one moment.
    pub random_images: u32,
    /// L5: recoveries of one moment.
    pub lazy_runs_max: u32,
    /// One of so many states is recovered a second time.
    pub twice_every: u64,
    /// One of so many states is worked with afterwards.
    pub go_on_every: u64,
    /// In one of so many states in which recovery writes, it is cut too; and at one of an eighth as many moments the process is
    /// killed first.
    pub nested_every: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            lines_max: 12,
            random_images: 16,
            lazy_runs_max: 300,
            twice_every: 7,
            go_on_every: 499,
            nested_every: 61,
        }
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Fences and acknowledgements at which a cut was tried.
    pub moments: u64,
    /// States that were recovered from and judged, all levels and nested ones included.
    pub crash_states: u64,
    /// Of these, by L5.
    pub lazy_states: u64,
    /// Moments of which L5 has visited every state.
    pub moments_exhausted: u64,
    /// Of the states, those left by a cut in the middle of a recovery.
    pub nested_states: u64,
    /// States that were recovered a second time.
    pub twice: u64,
    /// States that were worked with afterwards.
    pub gone_on: u64,
}

impl Tally {
    /// Adds another tally.
    pub fn add(&mut self, other: &Tally) {
        self.moments += other.moments;
        self.crash_states += other.crash_states;
        self.lazy_states += other.lazy_states;
        self.moments_exhausted += other.moments_exhausted;
        self.nested_states += other.nested_states;
        self.twice += other.twice;
        self.gone_on += other.gone_on;
    }
}

/// Hashes are numbers already; their order never matters.
type Seen = HashSet<u64, BuildHasherDefault<std::hash::DefaultHasher>>;

/// See the module. Hand it to a [`Machine`] as its observer.
#[derive(Debug)]
pub struct Enumerator {
    limits: Limits,
    setup: Setup,
    prng: Prng,
    tally: Tally,
    violation: Option<Violation>,
    seen: Seen,
    /// For the states of a moment, and for those of a cut within a recovery.
    image: Option<ImagePmem>,
    nested: Option<ImagePmem>,
}

impl Observer for Enumerator {
    fn look(&mut self, moment: Moment, state: &SimState, outside: &Outside) {
        if self.violation.is_some() {
            return;
        }
        self.tally.moments += 1;
        if let Err(violation) = self.enumerate(state, outside) {
            let text = format!("{violation} (cut at {moment:?} {})", self.tally.moments);
            self.violation = Some(Violation(text));
        }
    }
}

/// One moment.
struct Cut<'a> {
    outside: &'a Outside,
    expectation: Expectation,
    /// What may be on the base: durable only, everything, a mixture.
    bases: Vec<BaseImage>,
}

impl Enumerator {
    /// For machines of this setup (their number of cores does not matter).
    #[must_use]
    pub fn new(setup: &Setup, limits: Limits, seed: u64) -> Self {
        Self {
            limits,
            setup: setup.clone(),
            prng: Prng::new(seed),
            tally: Tally::default(),
            violation: None,
            seen: Seen::default(),
            image: None,
            nested: None,
        }
    }

    /// What was done so far.
    #[must_use]
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// The first promise that was broken.
    ///
    /// # Errors
    /// There is one.
    pub fn verdict(&self) -> Result<(), Violation> {
        self.violation.clone().map_or(Ok(()), Err)
    }

    fn enumerate(&mut self, state: &SimState, outside: &Outside) -> Result<(), Violation> {
        outside.check_base_order()?;
        let bases = (0..3).map(|_| outside.base.crash_image(&mut self.prng));
        let cut = Cut {
            outside,
            expectation: Expectation::of(&outside.model),
            bases: bases.collect(),
        };
        for base in &cut.bases {
            outside.check_held_after_cut(base)?;
        }
        let words = state.pending_words();
        let image = load(&mut self.image, state.durable());
        self.seen.clear();
        let images = Images::new(state, &words, self.limits.lines_max, &mut self.prng);
        for number in 0..images.count() + u64::from(self.limits.random_images) {
            let choices = images.choose(number, &mut self.prng);
            if self.seen.insert(choices.hash()) {
                let base = &cut.bases[self.prng.index(cut.bases.len())];
                self.judge(&cut, &image, &words, &choices, base)?;
            }
            image.roll_back();
        }
        // A moment has many states.
        let every = self.limits.nested_every.div_ceil(8);
        if !words.is_empty() && self.prng.below(every) == 0 {
            self.cut_behind_kill(&cut, state)?;
        }
        self.enumerate_lazily(&cut, &image, &words)
    }

    /// L1 to L4: one state. Leaves its traces in `image`.
    fn judge(
        &mut self,
        cut: &Cut<'_>,
        image: &ImagePmem,
        words: &[PendingWord],
        choices: &Image,
        base: &BaseImage,
    ) -> Result<(), Violation> {
        choices.apply(words, image);
        let patches = image.writes_since_mark();
        let told =
            |violation: Violation| Violation(format!("{violation} [{}]", choices.describe(words)));
        let stamps = self.recover(cut, image.clone(), base).map_err(told)?;
        let number = self.tally.crash_states;
        let repaired = image.writes_since_mark() > patches;
        if number.is_multiple_of(self.limits.twice_every) {
            self.tally.twice += 1;
            self.recover_again(cut, image.clone(), base, &stamps)
                .map_err(told)?;
        }
        let nested = repaired && self.prng.below(self.limits.nested_every) == 0;
        let go_on = self.prng.below(self.limits.go_on_every) == 0;
        if nested || go_on {
            image.roll_back();
            choices.apply(words, image);
        }
        if nested {
            self.cut_recovery(cut, image.bytes(), base, &stamps)
                .map_err(told)?;
        }
        if go_on {
            self.go_on(cut, image.bytes(), base, &stamps)
                .map_err(told)?;
        }
        Ok(())
    }

    fn recover<P: Pmem>(
        &mut self,
        cut: &Cut<'_>,
        image: P,
        base: &BaseImage,
    ) -> Result<Vec<Stamp>, Violation> {
        self.tally.crash_states += 1;
        recover::judge_with(image, &self.setup, &cut.expectation, base).map(|(stamps, _)| stamps)
    }

    /// A recovery that follows another finds the same.
    fn recover_again<P: Pmem>(
        &mut self,
        cut: &Cut<'_>,
        image: P,
        base: &BaseImage,
        stamps: &[Stamp],
    ) -> Result<(), Violation> {
        let again = self.recover(cut, image, base)?;
        match again.iter().zip(stamps).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(at) => Err(Violation(format!(
                "a second recovery found block {at} with {:?}, the first one with {:?}",
                again[at], stamps[at]
            ))),
        }
    }

    /// Cuts the recovery from `bytes` at each of its fences, and recovers from that.
    fn cut_recovery(
        &mut self,
        cut: &Cut<'_>,
        bytes: Vec<u8>,
        base: &BaseImage,
        stamps: &[Stamp],
    ) -> Result<(), Violation> {
        let pmem = SimPmem::from_image(bytes);
        let cuts = Cuts::of(&pmem, 4, 4, self.prng.fork());
        self.recover(cut, pmem, base)?;
        let states = cuts.take();
        for bytes in states {
            self.tally.nested_states += 1;
            let image = load(&mut self.nested, &bytes);
            self.recover_again(cut, image, base, stamps)
                .map_err(|v| Violation(format!("{v} (after a cut in the middle of a recovery)")))?;
        }
        Ok(())
    }

    /// Kills the process, and cuts the power at each fence of the recovery behind that, and when it is at its end. Up to there
    /// what nobody had fenced may be lost; what it has found in the end is there for good.
    fn cut_behind_kill(&mut self, cut: &Cut<'_>, state: &SimState) -> Result<(), Violation> {
        let base = &cut.bases[self.prng.index(cut.bases.len())];
        let pmem = state.killed();
        let cuts = Cuts::of(&pmem, 4, 4, self.prng.fork());
        let stamps = self.recover(cut, pmem.clone(), base)?;
        pmem.on_crash_point(None);
        let told = |v: Violation| Violation(format!("{v} (after a kill, and a cut behind that)"));
        for bytes in cuts.take() {
            self.tally.nested_states += 1;
            let image = load(&mut self.nested, &bytes);
            self.recover(cut, image, base).map_err(told)?;
        }
        for number in 0..4 {
            self.tally.nested_states += 1;
            // All of it is lost the first time.
            let choose = |_, count| self.prng.index(if number == 0 { 1 } else { count });
            let image = load(&mut self.nested, &pmem.crash_image(choose));
            self.recover_again(cut, image, base, &stamps)
                .map_err(told)?;
        }
        Ok(())
    }

    /// Works with what was recovered: bugs hide in what a recovery leaves in DRAM.
    fn go_on(
        &mut self,
        cut: &Cut<'_>,
        bytes: Vec<u8>,
        base: &BaseImage,
        stamps: &[Stamp],
    ) -> Result<(), Violation> {
        self.tally.gone_on += 1;
        let mut model = cut.outside.model.clone();
        model.restart(stamps);
        let seed = self.prng.next_u64();
        let machine = Machine::resume(self.setup.clone(), bytes, base, model, seed)?;
        let mut prng = Prng::new(seed);
        script::go_on(machine, &mut prng)
            .map_err(|v| Violation(format!("{v} (some requests after a recovery, seed {seed})")))
    }

    /// L5.
    fn enumerate_lazily(
        &mut self,
        cut: &Cut<'_>,
        image: &ImagePmem,
        words: &[PendingWord],
    ) -> Result<(), Violation> {
        let base = &cut.bases[self.prng.index(cut.bases.len())];
        let lazy = LazyPmem::new(image.clone(), words);
        for _ in 0..self.limits.lazy_runs_max {
            self.tally.lazy_states += 1;
            self.recover(cut, lazy.clone(), base)
                .map_err(|v| Violation(format!("{v} [L5: {}]", lazy.describe())))?;
            if !lazy.next_run() {
                self.tally.moments_exhausted += 1;
                return Ok(());
            }
        }
        image.roll_back();
        Ok(())
    }
}

/// What cuts at the fences of a device would leave, collected for later: who looks at a fence must not use the
/// device.
pub(super) struct Cuts(Arc<Mutex<Vec<Vec<u8>>>>);

impl Cuts {
    /// Of all fences from now on: all images of L1 to L3 over `lines_max` lines, and some random ones. There
    /// should be few of them.
    pub(super) fn of(pmem: &SimPmem, lines_max: usize, random_images: u64, mut dice: Prng) -> Self {
        let states = Arc::new(Mutex::new(Vec::new()));
        let collected = Arc::clone(&states);
        pmem.on_crash_point(Some(Box::new(move |state, _| {
            let words = state.pending_words();
            let images = Images::new(state, &words, lines_max, &mut dice);
            let mut states = collected.lock().unwrap_or_else(PoisonError::into_inner);
            for number in 0..images.count() + random_images {
                let mut image = state.durable().to_vec();
                images.choose(number, &mut dice).write(&words, &mut image);
                states.push(image);
            }
        })));
        Self(states)
    }

    /// Those of the fences so far.
    pub(super) fn take(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// An image with these bytes, marked; made once.
fn load(slot: &mut Option<ImagePmem>, bytes: &[u8]) -> ImagePmem {
    match slot {
        Some(image) if image.len_bytes() == bytes.len() as u64 => image.load(bytes),
        _ => *slot = Some(ImagePmem::new(bytes.to_vec())),
    }
    let Some(image) = slot else {
        unreachable!("it was just made")
    };
    image.mark();
    image.clone()
}

/// Runs the history of a seed with a cut at every moment.
///
/// # Errors
/// It broke a promise.
pub fn run_seed(seed: u64, limits: Limits) -> Result<Tally, Box<super::simulate::Failure>> {
    let (setup, steps) = history(seed);
    run(&setup, seed, &steps, limits).map_err(|violation| {
        let fails = |fewer: &[script::Step]| run(&setup, seed, fewer, limits).is_err();
        let steps = script::shrink(&steps, fails);
        let violation = run(&setup, seed, &steps, limits).err().unwrap_or(violation);
        Box::new(super::simulate::Failure {
            seed,
            violation,
            setup: setup.clone(),
            steps,
        })
    })
}

/// A short history on a small machine.
#[must_use]
pub fn history(seed: u64) -> (Setup, Vec<script::Step>) {
    let mut prng = Prng::new(mix(seed, 0xc4a5));
    let mut setup = script::setup_of(&mut prng);
    setup.segment_size_bytes = 16 << 10;
    setup.segment_count = prng.between(4, 7);
    setup.block_count = setup.block_count.min(64);
    // A base only grows.
    setup.block_count_first =
        (setup.block_count_first).map(|first| first.min(setup.block_count / 2));
    let weights = script::Weights {
        crash: prng.pick(&[0, 10, 30]),
        fault: prng.pick(&[0, 0, 20]),
        key_loss: prng.pick(&[0, 0, 0, 20]),
        busy_percent: prng.pick(&[0, 0, 50]),
    };
    let count = prng.between(20, 120) as usize;
    let steps = script::draw(&mut prng, &setup, weights, count);
    (setup, steps)
}

/// Runs a history with a cut at every moment.
///
/// # Errors
/// It broke a promise.
pub fn run(
    setup: &Setup,
    seed: u64,
    steps: &[script::Step],
    limits: Limits,
) -> Result<Tally, Violation> {
    let enumerator = Arc::new(Mutex::new(Enumerator::new(setup, limits, seed)));
    let ran = script::run_caught(setup, seed, steps, Some(enumerator.clone()));
    let enumerator = enumerator.lock().unwrap_or_else(PoisonError::into_inner);
    enumerator.verdict()?;
    ran.map(|_| enumerator.tally())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bases_of_short_histories_grow_and_never_shrink() {
        let firsts: Vec<_> = (0..10_000)
            .map(|seed| history(seed).0)
            .filter_map(|setup| Some((setup.block_count_first?, setup.block_count)))
            .collect();
        assert!(!firsts.is_empty());
        assert!(firsts.iter().all(|(first, count)| first < count));
    }
}
