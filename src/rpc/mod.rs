//! The parameters of the management interface: from JSON to what is asked for, or to an error that names
//! the parameter; and the statistics. Knows nothing of SPDK, so that it can be fuzzed.
//!
//! - `call`: the methods. `definition`: what a cache is made from.
//! - `params`, `members`: parameters one by one, and the object that they come in.
//! - `stats`: the answer of `bdev_pcache_get_stats`.

mod call;
mod definition;
mod error;
mod members;
mod params;
#[cfg(any(test, feature = "spdk"))]
mod stats;

#[cfg(feature = "spdk")]
pub(crate) use call::Drain;
pub(crate) use call::{Call, Method};
#[cfg(feature = "spdk")]
pub(crate) use definition::CACHE_SIZE_MIB_MIN;
pub(crate) use definition::Definition;
#[cfg(feature = "spdk")]
pub(crate) use definition::WriteCache;
pub(crate) use error::RpcError;
pub(crate) use members::Members;
use params::Params;
#[cfg(feature = "spdk")]
pub(crate) use stats::Statistics;
