//! Coordinates and quantities. Every number that names a place or an amount has a type of its own,
//! so that a block address cannot be passed where a segment number is meant.

use std::fmt;

/// Size of an index page: the unit in which the cache maps the base device.
pub const PAGE_SIZE_BYTES: u32 = 4096;

/// A logical block address on the base device, in blocks of its block size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lba(pub u64);

impl fmt::Display for Lba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {}", self.0)
    }
}

/// A 4 KiB page of the base device: `lba / blocks_per_page`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Page(pub u64);

/// A byte offset on the cache device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PmemOff(pub u64);

impl PmemOff {
    /// The offset `bytes` further on.
    #[must_use]
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

impl fmt::Display for PmemOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cache offset {:#x}", self.0)
    }
}

/// The number of a segment, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegId(pub u32);

impl SegId {
    /// As an index into a table of segments.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Counts what a segment is used for, one after the other; everything written under another generation is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u64);

impl Generation {
    /// Of no segment: a cursor under it was not put on one yet.
    pub const NONE: Generation = Generation(0);
    /// What formatting gives to all segments.
    pub const FIRST: Generation = Generation(1);
}

/// The place of a kset in the global order of all ksets of the cache, over all streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Seq(pub u64);

/// The number of application barriers (FLUSH, FUA) that came before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u64);

/// A moment on the host's monotonic clock, in nanoseconds. Time is an argument, never asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Now(pub u64);

impl Now {
    /// Nanoseconds since `earlier`; 0 if that lies ahead.
    #[must_use]
    pub fn since_ns(self, earlier: Now) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// One milliard of nanoseconds.
pub const NS_PER_S: u64 = 1_000_000_000;
/// Nanoseconds in a microsecond.
pub const NS_PER_US: u64 = 1000;
/// Nanoseconds in a millisecond.
pub const NS_PER_MS: u64 = 1_000_000;

/// Who stores: a core, as far as persistence goes. A fence orders the stores of its own agent only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Agent(pub u16);
