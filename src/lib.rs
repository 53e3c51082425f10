//! pcache: persistent memory in front of any SPDK block device, as a write-back and read cache.
//!
//! The **engine** ([`engine`]) is plain Rust driven by events: no SPDK, no threads, no clock. It stores to a
//! [`pmem::Pmem`] and answers with effects. The SPDK adapter (feature `spdk`) is the only part that knows
//! SPDK. `docs/ARCHITECTURE.md` explains the whole, `docs/FORMAT.md` what lies on the cache device.

#[cfg(any(test, feature = "spdk"))]
mod abi;
pub mod canary;
#[cfg(any(test, feature = "spdk"))]
mod core_time;
pub mod engine;
mod gc;
#[cfg(not(feature = "heap"))]
mod index;
#[cfg(feature = "heap")]
pub mod index;
#[cfg(feature = "inspect")]
pub mod inspect;
pub mod media;
mod memory;
#[expect(
    unsafe_code,
    reason = "mapping, non-temporal stores, caller's memory: island 1 of 2"
)]
pub mod pmem;
pub mod recovery;
#[cfg(any(test, feature = "spdk"))]
mod retry;
#[cfg(any(test, feature = "sim", feature = "spdk"))]
mod rpc;
mod sched;
mod scrub;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
#[cfg(feature = "spdk")]
#[expect(unsafe_code, reason = "calls from and to SPDK: island 2 of 2")]
pub mod spdk;
mod token_bucket;
pub mod units;
mod writeback;
