//! From a cache device to a cache: format a blank one, or find out what an existing one holds.
//!
//! Opening goes in steps. Everything up to and including the witness only reads: a cache that is refused is
//! left as it was. Repairs come last, each of them idempotent, so that a cut during recovery changes nothing.

#[cfg(test)]
mod compat_tests;
mod error;
mod format;
#[cfg(test)]
mod hostile_tests;
pub(crate) mod opening;
#[cfg(test)]
mod order_tests;
mod pass;
mod pass_memory;
mod recovered;
#[cfg(test)]
mod room_tests;
mod seqs;
pub(crate) mod tails;
mod torn;
#[cfg(test)]
mod torn_tests;
mod waiting;
pub(crate) mod walk;
pub(crate) mod witness;
mod worker;

pub use crate::memory::NoMemory;
pub use error::OpenError;
pub use opening::{OpenStep, Opening, check_header};
pub use pass::RecoveryProgress;
pub use worker::{Work, Worker};
