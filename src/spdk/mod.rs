//! The adapter: a bdev module around the engine. One of the two islands of unsafe code, and the only code
//! that knows SPDK.
//!
//! - `module`: start and end of the module, what is saved in configurations.
//! - `registry`: the caches that exist, are being opened, or wait for their base device.
//! - `create`: from a definition to a registered bdev; `recovery`: its work on other cores. `remove`: the way back.
//! - `node`: a cache with its bdev. `channel`: one per bdev and SPDK thread; `background`: one per bdev.
//! - `reset`: RESET of the bdev, and of its base. `zcopy`: what a channel lends, and how it comes back.
//! - `base`: the base bdev's descriptor; `base_queue`: operations on it; `memory`: how they reach the mapping.
//! - `rpc`, `json`: the management interface; [`crate::rpc`] knows its parameters.
//! - `thread`, `trampoline`, `log`: what keeps all of it safe at the border.
//!
//! Rules that hold throughout:
//!
//! - Everything but the channels lives on SPDK's app thread ([`thread::AppCell`]).
//! - A trampoline (an `extern "C"` function) checks, casts and calls. It never lets a panic out.
//! - No borrow of ours is held while SPDK is called: SPDK calls back (a completion submits the next request,
//!   a registration examines). State is taken out, or touched in steps.

#![warn(clippy::undocumented_unsafe_blocks)]

#[cfg(feature = "canary")]
compile_error!(
    "the feature `canary` seeds bugs: it is for the tests of the engine, never for a module"
);

mod background;
mod base;
mod base_queue;
mod channel;
mod create;
mod json;
mod log;
mod mapping;
mod memory;
mod module;
mod node;
mod recovery;
mod registry;
mod remove;
mod reset;
mod rpc;
mod thread;
mod trampoline;
mod watch;
mod witness_reads;
mod zcopy;
