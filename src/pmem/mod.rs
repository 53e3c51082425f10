//! Persistent memory: the mapping, stores, fences. One of the two islands of unsafe code.
//!
//! The engine is generic over [`Pmem`]. `MappedPmem` is the real mapping; `sim::SimPmem` models which
//! stores would survive a power cut.

mod backing;
pub(crate) mod bounds;
mod copy;
mod crc;
mod dax;
mod error;
#[cfg(target_arch = "x86_64")]
mod folded;
#[cfg(target_arch = "x86_64")]
mod fused;
mod guard;
#[cfg(any(test, feature = "heap"))]
mod heap;
mod hint;
mod iov;
mod lines;
mod load;
mod mapped;
mod pads;
mod range_lock;
mod read_only;
mod regions;

pub use backing::{Extent, MapRequest, PART_ALIGN_BYTES, Part, Sharing};
pub(crate) use crc::crc32c_append_short;
pub use dax::{Backing, Durability};
pub use error::MapError;
#[cfg(any(test, feature = "sim"))]
pub(crate) use heap::simulated_fence;
#[cfg(any(test, feature = "heap"))]
pub use heap::{HeapRegion, IovBuf};
pub(crate) use hint::{prefetch_line, prefetch_line_to_write};
pub use iov::{IovCursor, MemSlice, SliceError};
pub(crate) use lines::Lines;
pub use mapped::{MappedPmem, PopulateProgress};
pub use pads::{PAD_PAGE_SIZE_BYTES, PadMemory};
pub(crate) use pads::{PadId, Pads};
pub use range_lock::LockRange;
pub use read_only::ReadOnlyPmem;

use crate::units::{Agent, PmemOff};

/// Every store to the cache device starts at a multiple of this and has a multiple of it as its length,
/// so that no line is ever stored in part.
pub const LINE_SIZE_BYTES: u64 = 64;

/// Size of a page of the kernel, the smallest.
const PROBE_STEP_BYTES: u64 = 4096;

/// Proof that everything its agent stored before was fenced. Made by [`Pmem::fence`] alone; an
/// acknowledgement of a write asks for one.
#[must_use]
#[derive(Debug)]
pub struct Durable {
    _only_by_fence: (),
}

/// The memory under a cache line cannot be read (poisoned, or the mapping has lost its backing).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cache device cannot be read at offset {:#x}", .at.0)]
pub struct Poisoned {
    /// Where the first unreadable line begins.
    pub at: PmemOff,
}

/// Bytes of a cache device that will be read soon, and have not been asked for yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coming {
    /// Where they begin.
    pub off: PmemOff,
    /// How many they are.
    pub len_bytes: u64,
}

impl Coming {
    /// None.
    pub const NOTHING: Self = Self {
        off: PmemOff(0),
        len_bytes: 0,
    };
}

/// What can be read of a cache device, and nothing else: whoever has no more than this cannot change a byte
/// of it. Offsets are bytes from the start of the region; a range outside of it is a bug of the caller and
/// panics before anything is touched.
pub trait PmemRead: Send + Sync + 'static {
    /// Size of the region in bytes.
    fn len_bytes(&self) -> u64;

    /// Copies `buf.len()` bytes at `off` into `buf`.
    ///
    /// # Errors
    /// The memory is poisoned; `buf` then holds unspecified bytes.
    fn read(&self, off: PmemOff, buf: &mut [u8]) -> Result<(), Poisoned>;

    /// Whether the byte at `off` can be read.
    ///
    /// # Errors
    /// The memory is poisoned.
    fn look_at(&self, off: PmemOff) -> Result<(), Poisoned> {
        self.read(off, &mut [0])
    }

    /// Whether the `len_bytes` bytes at `off` can be read, as far as a look at each page tells: the kernel takes
    /// unreadable memory away by the page. An error that nobody has met yet is not found.
    ///
    /// # Errors
    /// Part of the memory cannot be read.
    fn probe(&self, off: PmemOff, len_bytes: u64) -> Result<(), Poisoned> {
        let end = off.0 + len_bytes;
        let mut at = off.0;
        while at < end {
            self.look_at(PmemOff(at))?;
            at = (at + 1).next_multiple_of(PROBE_STEP_BYTES);
        }
        Ok(())
    }
}

/// A byte-addressable persistent memory region.
///
/// Stores leave the caches by themselves: they are pending until the same agent's next [`Pmem::fence`], and until
/// then any subset of their aligned 8-byte words may survive a power cut.
pub trait Pmem: PmemRead {
    /// Copies `len_bytes` bytes at `off` to the caller's memory at the cursor, and advances the cursor.
    ///
    /// # Errors
    /// The memory is poisoned; what lies under the cursor then holds unspecified bytes.
    fn read_to(&self, off: PmemOff, dst: &mut IovCursor, len_bytes: u64) -> Result<(), Poisoned>;

    /// As [`Pmem::read_to`]. Meanwhile `coming` is asked for, some of it while as much is copied: all at once its lines would
    /// wait for each other, and the copy for them.
    ///
    /// # Errors
    /// As [`Pmem::read_to`].
    fn read_to_and_ask(
        &self,
        off: PmemOff,
        dst: &mut IovCursor,
        len_bytes: u64,
        coming: Coming,
    ) -> Result<(), Poisoned> {
        self.prefetch(coming.off, coming.len_bytes.min(len_bytes));
        self.read_to(off, dst, len_bytes)
    }

    /// Stores `bytes` at `off`. Both ends are multiples of [`LINE_SIZE_BYTES`].
    fn store(&self, agent: Agent, off: PmemOff, bytes: &[u8]);

    /// Stores `len_bytes` bytes from the caller's memory at the cursor to `off`, and advances the cursor.
    /// Both ends of the target are multiples of [`LINE_SIZE_BYTES`]; the source may lie anywhere.
    fn store_from(&self, agent: Agent, off: PmemOff, src: &mut IovCursor, len_bytes: u64);

    /// As [`Pmem::store_from`], and returns `crc32c(seed, the bytes stored)`. Each source byte is read
    /// once, so that the checksum is that of what was stored even while the caller changes its memory.
    fn store_from_crc(
        &self,
        agent: Agent,
        off: PmemOff,
        src: &mut IovCursor,
        len_bytes: u64,
        seed: u32,
    ) -> u32;

    /// How many bytes [`Pmem::store_from_crc`] checksums in less time than a [`Pmem::fence`] takes that has to wait for stores.
    fn bytes_checksummed_per_fence(&self) -> u64;

    /// Panics if the device has not taken a store (INV-PMEM-4), of those that the calling core has made so far.
    fn assert_stores_taken(&self);

    /// Waits until everything that `agent` stored is in the persistence domain.
    fn fence(&self, agent: Agent) -> Durable;

    /// The memory itself, as the source of a write to the base device.
    fn slice(&self, off: PmemOff, len_bytes: u64) -> MemSlice;

    /// Hints that these bytes will be read soon.
    fn prefetch(&self, off: PmemOff, len_bytes: u64);
}
