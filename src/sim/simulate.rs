//! Many histories, each from a seed: one that fails is shrunk to a script for a regression test.

use super::machine::Setup;
use super::model::Violation;
use super::prng::{Prng, mix};
use super::script::{self, Outcome, Step, Weights};
use crate::engine::Setting;

/// A history that broke a promise.
#[derive(Clone, Debug)]
pub struct Failure {
    /// It comes from this.
    pub seed: u64,
    /// What was broken, by the shrunk history.
    pub violation: Violation,
    /// Of the machine.
    pub setup: Setup,
    /// What is left of the steps.
    pub steps: Vec<Step>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "seed {}: {}", self.seed, self.violation)?;
        writeln!(f, "{:?}", self.setup)?;
        writeln!(f, "steps: {:?}", self.steps)
    }
}

/// What the history of a seed is made of.
#[must_use]
pub fn history(seed: u64) -> (Setup, Vec<Step>) {
    let mut prng = Prng::new(seed);
    let setup = script::setup_of(&mut prng);
    let weights = Weights {
        crash: prng.pick(&[0, 5, 20, 60]),
        fault: prng.pick(&[0, 0, 10, 40]),
        key_loss: prng.pick(&[0, 0, 0, 15]),
        busy_percent: prng.pick(&[0, 0, 50, 80]),
    };
    // The end of a history is compared most thoroughly: many are short.
    let count_max = prng.pick(&[60, 200, 600]);
    let count = prng.between(20, count_max) as usize;
    let mut steps = script::draw(&mut prng, &setup, weights, count);
    let mut prng = Prng::new(mix(seed, 5));
    if prng.percent(30) {
        for _ in 0..prng.between(1, 3) {
            let at = prng.index(steps.len() + 1);
            steps.splice(at..at, crowd_of_readers(&mut prng, &setup));
        }
    }
    if setup.settings.get(Setting::VerifyReads) == Some(1) {
        let mut prng = Prng::new(mix(seed, 8));
        for _ in 0..prng.pick(&[0, 4, 20]) {
            let at = prng.index(steps.len() + 1);
            steps.insert(at, Step::FlipBit(prng.below(1 << 32)));
        }
    }
    (setup, steps)
}

/// All cores read a few blocks that are not cached any more, and some are written. Drawn steps alone hardly ever come to
/// that: they write more than they read, and a cache of this size holds nearly all.
fn crowd_of_readers(prng: &mut Prng, setup: &Setup) -> Vec<Step> {
    let span = setup.block_count_first.unwrap_or(setup.block_count);
    let len_max = setup.write_blocks_max().min(span / 2);
    let first = prng.below(span - len_max);
    let mut steps = vec![Step::GcPercent(0), Step::DrainStart, Step::Turns(40)];
    for _ in 0..prng.between(10, 40) {
        let (core, cut) = (prng.index(4), prng.index(4096));
        let len = prng.between(1, len_max);
        let lba = (first + prng.below(len_max)).min(span - len);
        steps.push(match prng.below(16) {
            0..=6 => Step::Read(core, lba, len, cut),
            7 => Step::Write(core, lba, len.min(2), cut),
            8 => Step::Base(1),
            _ => Step::Core(core),
        });
    }
    steps.push(Step::GcPercent(prng.between(0, 90) as u8));
    steps
}

/// Runs the history of a seed, twice: nothing but the seed may decide what happens.
///
/// # Errors
/// It broke a promise, or the two runs differ.
pub fn run_seed(seed: u64) -> Result<Outcome, Box<Failure>> {
    let (setup, steps) = history(seed);
    let ran = script::run_caught(&setup, seed, &steps, None);
    let again = script::run_caught(&setup, seed, &steps, None);
    match ran {
        Err(violation) => Err(Box::new(shrunk(seed, setup, &steps, violation))),
        Ok(outcome) if again.as_ref() == Ok(&outcome) => Ok(outcome),
        Ok(outcome) => Err(Box::new(Failure {
            seed,
            violation: Violation(format!(
                "two runs of one seed differ: {outcome:?}, {again:?}"
            )),
            setup,
            steps,
        })),
    }
}

fn shrunk(seed: u64, setup: Setup, steps: &[Step], violation: Violation) -> Failure {
    let fails = |fewer: &[Step]| script::run_caught(&setup, seed, fewer, None).is_err();
    let steps = script::shrink(steps, fails);
    let violation = match script::run_caught(&setup, seed, &steps, None) {
        Err(violation) => violation,
        // Not repeatable; which is a violation too.
        Ok(_) => violation,
    };
    Failure {
        seed,
        violation,
        setup,
        steps,
    }
}
