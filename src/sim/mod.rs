//! Stand-ins for hardware, for tests: a persistent memory that can lose power, a base device that can fail.
#![forbid(unsafe_code)]

pub mod pmem;
pub mod tracing;
