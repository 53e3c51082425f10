//! Why the tool cannot do what it was asked for.

use super::Severity;
use crate::pmem::MapError;
use crate::recovery::OpenError;
use std::io;
use std::path::PathBuf;

/// Every text names what was found and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The cache device cannot be had.
    #[error(transparent)]
    Map(#[from] MapError),
    /// There is no cache that could be opened, or not with this base.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// There is nothing to look at.
    #[error("the device holds no cache: {0}")]
    NoCache(&'static str),
    /// Write-back stopped at damaged dirty data.
    #[error(
        "{reason}; {dirty_bytes_left} dirty bytes are still in the cache. pcache-inspect verify lists every damaged block"
    )]
    Damaged {
        /// What write-back said.
        reason: String,
        /// What is not on the base.
        dirty_bytes_left: u64,
    },
    /// The base is something else than a file or a block device.
    #[error("{} is {found}, which cannot be a base: name a regular file or a block device", .path.display())]
    BaseType {
        /// The base.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The base is in use.
    #[error(
        "the base {} is in use: stop what uses it (an SPDK application, a mount, another drain) first",
        .path.display()
    )]
    BaseInUse {
        /// The base.
        path: PathBuf,
    },
    /// A system call on the base failed.
    #[error("cannot {what} the base {}: {error}", .path.display())]
    BaseIo {
        /// The base.
        path: PathBuf,
        /// What was tried, as a verb with its preposition.
        what: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// A segment that does not exist was asked for.
    #[error("there is no segment {asked}: this cache has {count}, from 0 on")]
    NoSegment {
        /// Number.
        asked: u32,
        /// How many there are.
        count: u32,
    },
    /// The result cannot be written.
    #[error("cannot write the result: {0}")]
    Output(#[from] io::Error),
}

/// The exit status of a command, from the worst of its findings or the error that ended it: 0 nothing is
/// wrong, 1 something is but nothing is lost by it, 2 data are at risk or lost or the cache cannot be opened,
/// 3 the command could not be carried out.
#[must_use]
pub fn exit_status(result: &Result<Option<Severity>, InspectError>) -> u8 {
    match result {
        Ok(None) => 0,
        Ok(Some(Severity::Repairable | Severity::Clean)) => 1,
        Ok(Some(Severity::Dirty | Severity::Refused)) => 2,
        Err(InspectError::Open(OpenError::NoMemory(_))) => 3,
        Err(InspectError::Open(_) | InspectError::NoCache(_) | InspectError::Damaged { .. }) => 2,
        Err(_) => 3,
    }
}
