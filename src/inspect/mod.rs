//! The offline tool: what lies on a cache device, whether it is whole, and its dirty data onto the base,
//! without SPDK. `docs/inspect.md` is its manual, `src/bin/pcache-inspect.rs` its command line.
//!
//! Nothing is decoded here. [`info`], [`dump`] and [`verify`] use the decoding of `media` and the walk of
//! `recovery`, over a [`PmemRead`](crate::pmem::PmemRead), so that they cannot write; [`drain`] runs the engine.
#![forbid(unsafe_code)]

mod base_file;
mod drain;
mod dump;
mod error;
mod finding;
mod header;
mod info;
mod notes;
mod payloads;
mod progress;
mod verify;

pub use base_file::{BaseAccess, BaseFile};
pub use drain::{Drained, drain};
pub use dump::{Selection, dump};
pub use error::{InspectError, exit_status};
pub use finding::{Finding, Findings, OutputFormat, Severity};
pub use info::{
    BaseInfo, GeometryInfo, Info, LogInfo, OptionInfo, SegmentStates, TailsInfo, WitnessInfo, info,
};
pub use progress::ProgressLine;
pub use verify::verify;
