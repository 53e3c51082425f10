//! Stand-ins for hardware, for tests: a persistent memory that can lose power, a base device that can fail;
//! and a machine made of them, an oracle, and the search for a crash that breaks a promise.
#![forbid(unsafe_code)]

pub mod base;
pub mod crash;
pub mod fuzzing;
pub mod image;
mod lazy;
mod loans;
pub mod machine;
pub mod model;
mod peek;
pub mod plain;
pub mod pmem;
pub mod prng;
pub mod recover;
pub mod rig;
pub mod scenarios;
pub mod script;
pub mod simulate;
pub mod stamp;
pub mod tracing;

pub use peek::Peek;
