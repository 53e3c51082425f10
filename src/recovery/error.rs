//! Why a cache device cannot be opened.

use crate::engine::{BaseError, SettingError};
use crate::media::{GeometryError, PairError, SuperblockError};
use crate::memory::NoMemory;
use crate::pmem::Poisoned;
use crate::units::{Lba, PmemOff};

/// Every text says what was found, what was expected, and what can be done. Nothing was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// An option is out of range.
    #[error("{name} {value} is not possible: {expected}")]
    BadOption {
        /// Its name.
        name: &'static str,
        /// What was asked for.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// A setting is out of range, or does not go with the others.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// Blank, and it is not to be formatted.
    #[error(
        "the cache device is blank, and format=never: if the cache is lost, so are its dirty data; see to the base before format=auto"
    )]
    Blank,
    /// The header area.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    /// Sizes.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The base is too large for the index.
    #[error("a base device of {pages} pages of 4 KiB is too large: {max} are the most")]
    BaseTooLarge {
        /// Its size.
        pages: u64,
        /// The limit.
        max: u64,
    },
    /// An option that was fixed at format differs.
    #[error(
        "{name} is {media} for this cache, fixed when it was formatted, but {asked} was asked for"
    )]
    OptionMismatch {
        /// Its name.
        name: &'static str,
        /// On the media.
        media: String,
        /// Asked for.
        asked: String,
    },
    /// The wrong base device.
    #[error(
        "this cache belongs to another base device: its {what} is {}, but that of the one given is {}",
        expected.escape_debug(),
        found.escape_debug()
    )]
    WrongBase {
        /// What differs.
        what: &'static str,
        /// In the superblock.
        expected: String,
        /// Of the base that was given.
        found: String,
    },
    /// A base device of another size.
    #[error(
        "this cache belongs to another base device: its number of blocks is {expected}, but that of the one given is {found}{}",
        growth_hint(*expected, *found)
    )]
    BaseSize {
        /// In the superblock.
        expected: u64,
        /// Of the base that was given.
        found: u64,
    },
    /// The base does not hold what was written back to it.
    #[error(
        "the base device does not hold what this cache wrote back to it at {lba}: its checksum is {found:#010x} instead of {expected:#010x}; it is another device, or it was written behind the cache's back. format=force would give up what the cache holds"
    )]
    Witness {
        /// Where.
        lba: Lba,
        /// In the cache.
        expected: u32,
        /// On the base.
        found: u32,
    },
    /// The base cannot be read.
    #[error("the witness at {lba} could not be read from the base device: {error}")]
    BaseRead {
        /// Where.
        lba: Lba,
        /// Why.
        error: BaseError,
    },
    /// The tails.
    #[error("the tails of the log are damaged: {0}; dirty data cannot be told from clean")]
    Tails(PairError),
    /// A number of the tails cannot be.
    #[error("the tails of the log hold {field} {value}, which is out of range")]
    TailsRange {
        /// Its name.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// One of the two copies of a record that has to be updated cannot be read.
    #[error(
        "one copy of the {record} of the cache, at {off}, cannot be read, and nothing is stored where memory is bad; the other copy is good: overwrite the 4096 bytes there with zeroes, and nothing else, and the cache opens (the offset counts from the start of the cache)"
    )]
    CopyUnreadable {
        /// Which.
        record: &'static str,
        /// Where the copy lies.
        off: PmemOff,
    },
    /// The info of a segment.
    #[error("the info of segment {segment} is damaged: {error}")]
    SegmentInfo {
        /// Number.
        segment: u32,
        /// What is wrong.
        error: PairError,
    },
    /// A segment with dirty data.
    #[error(
        "segment {segment} is damaged behind {ksets_valid} ksets at byte {off:#x}: {reason}; it may hold data that the base does not"
    )]
    Segment {
        /// Number.
        segment: u32,
        /// Ksets that are good.
        ksets_valid: u32,
        /// Where the damage begins.
        off: u32,
        /// What is wrong.
        reason: &'static str,
    },
    /// A counter that nobody can have counted so far.
    #[error(
        "{counter} is {value}: there are too few numbers left to work with the cache; nobody has counted so far, so the cache device is damaged"
    )]
    CountedOut {
        /// What it counts.
        counter: String,
        /// Its value.
        value: u64,
    },
    /// Two ksets claim the same place in the order.
    #[error("two segments both hold a kset with number {seq}; pcache-inspect verify tells which")]
    DuplicateSeq {
        /// The number.
        seq: u64,
    },
    /// The cache's memory cannot be read.
    #[error(transparent)]
    Poisoned(#[from] Poisoned),
    /// The host has not enough memory.
    #[error(transparent)]
    NoMemory(#[from] NoMemory),
}

fn growth_hint(expected: u64, found: u64) -> &'static str {
    if found > expected {
        "; if it is the same one and has grown, say base_growth=accept"
    } else {
        ""
    }
}

impl OpenError {
    /// The errno that fits best, positive.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            OpenError::BadOption { .. }
            | OpenError::Setting(_)
            | OpenError::Geometry(_)
            | OpenError::OptionMismatch { .. }
            | OpenError::BaseTooLarge { .. } => libc::EINVAL,
            OpenError::Blank => libc::ENOMEDIUM,
            OpenError::NoMemory(_) => libc::ENOMEM,
            OpenError::Superblock(error) => match error {
                SuperblockError::Foreign | SuperblockError::NotBlank { .. } => libc::EEXIST,
                SuperblockError::Geometry(_) => libc::EINVAL,
                SuperblockError::Truncated { .. } => libc::ENXIO,
                SuperblockError::Version { .. } | SuperblockError::Features { .. } => {
                    libc::EMEDIUMTYPE
                }
                _ => libc::EIO,
            },
            OpenError::WrongBase { .. }
            | OpenError::BaseSize { .. }
            | OpenError::Witness { .. } => libc::EMEDIUMTYPE,
            // Not EIO: nothing is damaged, and it may pass.
            OpenError::BaseRead { error, .. } => match error {
                BaseError::Io | BaseError::Reset => libc::EREMOTEIO,
                BaseError::Unsupported => libc::ENOTSUP,
                BaseError::Gone => libc::ENODEV,
            },
            OpenError::Tails(_)
            | OpenError::TailsRange { .. }
            | OpenError::CopyUnreadable { .. }
            | OpenError::CountedOut { .. }
            | OpenError::SegmentInfo { .. }
            | OpenError::Segment { .. }
            | OpenError::DuplicateSeq { .. }
            | OpenError::Poisoned(_) => libc::EIO,
        }
    }
}
