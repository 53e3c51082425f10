//! The engine: a cache as a value that is driven by events.
//!
//! - [`crate::recovery::Opening`] turns a cache device into a [`Cache`].
//! - A [`Channel`] per core takes host requests and answers with completions and base reads.
//! - One [`Background`] writes dirty data back and reclaims segments.
//!
//! Nothing here blocks, spins, spawns or asks for the time.

mod background;
mod cache;
mod cache_memory;
mod channel;
mod channel_ids;
mod checkpoint;
mod config;
mod damage;
mod drain;
mod fetches;
mod grace;
mod growth;
mod heal;
mod health;
mod heat;
mod held;
#[cfg(test)]
pub(crate) mod invariant_tests;
mod io;
mod key_search;
mod kset_cursor;
mod lend;
mod misses;
mod mode;
mod open_ids;
mod pins;
mod place_crcs;
mod read_path;
#[cfg(feature = "heap")]
mod republish;
mod room_queue;
mod rounding;
mod sealing;
mod segments;
mod sequences;
mod settings;
mod staging;
mod stats;
mod stream;
#[cfg(test)]
mod tests;
mod usage;
mod write_path;

pub use background::{Background, Budget, Pressure, ZeroesWent};
pub(crate) use cache::{BACKGROUND_AGENT, CacheParts, lock};
pub use cache::{CHANNEL_COUNT_MAX, Cache, CacheInfo, WRITE_SIZE_MAX_BYTES};
pub(crate) use cache_memory::{BackgroundMemory, CacheMemory};
pub use channel::Channel;
pub(crate) use checkpoint::CheckpointNeed;
pub use checkpoint::{
    CHECKPOINT_TIMEOUT_S_DEFAULT, CHECKPOINT_TIMEOUT_S_RANGE, CheckpointCut, CheckpointError,
    CheckpointId, CheckpointState, CheckpointStatus,
};
pub use config::*;
pub use damage::DamagedRange;
pub(crate) use damage::{
    ASKED_PER_POLL, DAMAGED_BLOCKS_MAX, Damage, Depth, Flaw, count_flaw, ranges_of,
};
pub use drain::DrainStatus;
pub(crate) use grace::Ticket;
pub use growth::GrowError;
pub use health::Health;
#[cfg(feature = "spdk")]
pub(crate) use health::StallWatch;
pub(crate) use heat::Heat;
pub use io::*;
pub(crate) use kset_cursor::KsetCursor;
pub use lend::LOAN_COUNT_MAX;
pub(crate) use place_crcs::PlaceCrcs;
pub(crate) use sealing::{Sealing, SealingStep};
pub(crate) use segments::{Class, Segment, SegmentStart, SegmentState, Segments, Special};
pub use settings::{
    ChangeError, SETTING_SLOT_COUNT, SETTINGS, Setting, SettingChange, SettingError, SettingInfo,
    SettingValueKind, SettingValues,
};
pub use staging::PADS_SIZE_BYTES;
pub(crate) use stats::Counters;
pub use stats::{Distribution, Distributions, Stats};
pub(crate) use stream::retire;
pub use usage::Usage;
pub(crate) use write_path::{Copier, CopyEnd};
