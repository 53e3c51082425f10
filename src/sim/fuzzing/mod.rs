//! What the fuzz targets in `fuzz/` run, one function each. A promise that an input breaks is a panic.
//!
//! They live here so that `test/corpus.rs` can replay the committed inputs without a fuzzer. With
//! `PCACHE_FUZZ_TRACE` set, they tell on stderr what an input stands for.

mod hostile;
mod layout;
mod mutation;
mod sparse;

pub use sparse::seeds as media_recovery_seeds;

use super::prng::Prng;
use super::script::{self, Weights};
use crate::rpc::{Call, Definition, Members, Method};
use std::fmt::Debug;

/// Steps of a history, at most: an input is run in some milliseconds.
const STEPS_MAX: usize = 200;

/// Bytes as a small cache device: it is opened and used, or refused and left as it was.
pub fn media_recovery(input: &[u8]) {
    let (media, mut rest) = sparse::decode(input);
    trace("refusal", &hostile::exercise(&media, &mut rest));
}

/// A valid cache device of which some structures are changed, most of them with good checksums.
pub fn media_mutations(input: &[u8]) {
    let mut prng = Prng::from_input(input);
    let media = mutation::draw(&mut prng);
    trace("refusal", &hostile::exercise(&media, &mut prng));
}

/// A history of the simulated machine, which checks every promise.
pub fn engine_ops(input: &[u8]) {
    let mut prng = Prng::from_input(input);
    let setup = script::setup_of(&mut prng);
    let weights = Weights {
        crash: prng.pick(&[5, 20, 60]),
        fault: prng.pick(&[0, 10, 40]),
        key_loss: 0,
        busy_percent: prng.pick(&[0, 0, 60]),
    };
    let seed = prng.below(256);
    let mut steps = Vec::new();
    while !prng.is_at_end() && steps.len() < STEPS_MAX {
        steps.extend(script::draw(&mut prng, &setup, weights, 1));
    }
    trace("setup", &setup);
    trace("seed", &seed);
    trace("steps", &steps);
    if let Err(violation) = script::run(&setup, seed, &steps, None) {
        panic!("{violation}\nseed {seed}, {setup:?}\nsteps: {steps:?}");
    }
}

/// The parameters of an RPC: the first byte is the method, the others the text.
pub fn rpc_params(input: &[u8]) {
    const METHODS: [Method; 11] = [
        Method::Create,
        Method::Delete,
        Method::GetBdevs,
        Method::GetStats,
        Method::ResetStats,
        Method::FlushStart,
        Method::FlushStatus,
        Method::SetOptions,
        Method::CheckpointBegin,
        Method::CheckpointEnd,
        Method::CheckpointStatus,
    ];
    let Some((first, text)) = input.split_first() else {
        return;
    };
    let method = METHODS[usize::from(*first) % METHODS.len()];
    let call = Members::parse(text).and_then(|members| Call::from_params(method, members));
    trace("call", &call);
    match call {
        Err(error) => assert!(error.code < 0 && !error.message.is_empty(), "{error:?}"),
        Ok(Call::Create(definition)) => check_round_trip(&definition),
        Ok(_) => {}
    }
}

/// What is saved of a definition makes the same cache again, but never formats by force.
fn check_round_trip(definition: &Definition) {
    let config = definition.to_config();
    let text = config["params"].to_string();
    let members = Members::parse(text.as_bytes());
    let call = members.and_then(|members| Call::from_params(Method::Create, members));
    let Ok(Call::Create(again)) = call else {
        panic!("{text} is saved and not understood: {call:?}");
    };
    let expected = Definition {
        format: again.format,
        ..definition.clone()
    };
    assert_eq!(again, expected, "{text}");
    assert_ne!(again.format, crate::engine::FormatPolicy::Force);
}

fn trace(what: &str, value: &impl Debug) {
    if std::env::var_os("PCACHE_FUZZ_TRACE").is_some() {
        eprintln!("{what}: {value:?}");
    }
}
