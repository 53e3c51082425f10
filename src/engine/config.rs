//! Options of a cache, and what it knows of its base device.

use super::settings::SettingChange;
use serde::{Deserialize, Serialize};

/// When a cache device is formatted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FormatPolicy {
    /// If it is blank; a cache is opened, anything else refused.
    #[default]
    Auto,
    /// Never; a blank device is refused too.
    Never,
    /// Always, whatever it holds. Dirty data of a previous cache is lost.
    Force,
}

/// Whether a base device may have become larger since the cache was last in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BaseGrowth {
    /// A base of another size is another base.
    #[default]
    Refuse,
    /// If everything else agrees, the witness too, a larger one is the same base, grown.
    Accept,
}

/// In which order dirty data reaches the base device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WritebackOrder {
    /// The barriers of the application (FLUSH, FUA) are kept on the base at any moment.
    #[default]
    Strict,
    /// The base is an exact past state between batches only.
    Relaxed,
}

impl WritebackOrder {
    pub(crate) fn from_setting(value: u32) -> Self {
        match value {
            1 => Self::Relaxed,
            _ => Self::Strict,
        }
    }
}

/// How read fills come into the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadAdmission {
    /// Those of long sequences of reads are on probation: reclaimed soon, unless they are read again. Others are kept
    /// as long as writes.
    #[default]
    Sequence,
    /// All are on probation.
    Probation,
    /// All are kept as long as writes.
    Always,
}

impl ReadAdmission {
    pub(crate) fn from_setting(value: u32) -> Self {
        match value {
            1 => Self::Probation,
            2 => Self::Always,
            _ => Self::Sequence,
        }
    }
}

/// What the cache does with reads and writes. In every mode a write goes through the log, so that it is atomic and
/// in order; the modes differ in when it is acknowledged and in what stays cached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// A write is acknowledged when it is durable in the cache. Reads populate the cache.
    #[default]
    Writeback,
    /// A write is acknowledged when it is durable on the base, and stays cached.
    Writethrough,
    /// A write is acknowledged when it is durable on the base, and does not stay cached.
    Writearound,
    /// As `Writeback`, but reads do not populate the cache.
    Writeonly,
    /// As `Writearound`; reads do not populate the cache, and are served by the base.
    Passthrough,
}

impl CacheMode {
    /// In the order of their numbers.
    pub const ALL: [CacheMode; 5] = [
        Self::Writeback,
        Self::Writethrough,
        Self::Writearound,
        Self::Writeonly,
        Self::Passthrough,
    ];

    pub(crate) fn from_setting(value: u32) -> Self {
        Self::ALL.get(value as usize).copied().unwrap_or_default()
    }

    /// A write is acknowledged when the base has it.
    #[must_use]
    pub fn holds_writes(self) -> bool {
        matches!(
            self,
            Self::Writethrough | Self::Writearound | Self::Passthrough
        )
    }

    /// What was written does not stay cached.
    pub(crate) fn forgets_writes(self) -> bool {
        matches!(self, Self::Writearound | Self::Passthrough)
    }

    /// What was read may stay cached.
    pub(crate) fn keeps_reads(self) -> bool {
        !matches!(self, Self::Writeonly | Self::Passthrough)
    }
}

/// Whether payloads carry checksums. Fixed at format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DataCrc {
    /// No checksums of payloads; metadata always has them.
    #[default]
    Off,
    /// A CRC-32C of each payload, verified before it is written back and on request at reads.
    On,
}

/// What to open, and how. `None` means: what the media say; at format: the default.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The device in front of which the cache stands.
    pub base: BaseIdentity,
    /// What the base device can do.
    pub base_caps: BaseCaps,
    /// Whether the base may have become larger.
    pub base_growth: BaseGrowth,
    /// When to format.
    pub format: FormatPolicy,
    /// The uuid for a new cache: random, from the adapter.
    pub new_uuid: [u8; 16],
    /// Checksums of payloads. A value other than that on the media is refused.
    pub data_crc: Option<DataCrc>,
    /// Size of a segment in bytes: a power of two. A value other than that on the media is refused.
    pub segment_size_bytes: Option<u64>,
    /// Settings that get another value than the media have.
    pub settings: SettingChange,
    /// How many cores may append at once, at most; fewer on a small cache.
    pub stream_count_max: u32,
}

/// By what a cache knows its base device again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseIdentity {
    /// The bdev's uuid. Random at each start for many kinds of bdev.
    pub uuid: [u8; 16],
    /// The bdev's name, up to 255 bytes.
    pub name: String,
    /// Logical block size in bytes: 512 or 4096.
    pub block_size_bytes: u32,
    /// Size in blocks.
    pub block_count: u64,
}

/// Which operations the base device supports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BaseCaps {
    /// FLUSH. Without it the base is taken for write-through.
    pub flush: bool,
    /// UNMAP. Without it, unmapped blocks are zeroed on the base.
    pub unmap: bool,
    /// WRITE_ZEROES, by the device itself. Without it somebody writes zeroes to it as data.
    pub write_zeroes: bool,
}
