//! What goes in and out of the engine: host requests, effects, base operations.

use super::channel::{MISS_COUNT_MAX, REQUEST_COUNT_MAX};
use crate::pmem::{IovCursor, MemSlice};
use crate::units::Lba;

/// The host's name for a request; the engine only hands it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IoToken(pub u64);

/// Whether a write asks for Force Unit Access. Every write of pcache is durable when it completes; the flag
/// matters for the order in which the base sees it (a FUA write closes an epoch).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fua {
    /// An ordinary write.
    No,
    /// A write with FUA set.
    Yes,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// Fill the buffer with `len_blocks` blocks from `lba` on.
    Read(IovCursor),
    /// Tell where `len_blocks` blocks from `lba` on lie in the mapping, and keep them there as they are until
    /// the loan is given back ([`super::Channel::give_back`]).
    Lend,
    /// Write the buffer to `lba`.
    Write(IovCursor, Fua),
    /// Make the blocks read as zeroes.
    WriteZeroes,
    /// The blocks are not needed any more. Until the base has been told, they read as zeroes.
    Unmap,
    /// Everything completed so far comes before everything submitted after this completes.
    Flush,
}

/// One request of the host. It must be completed exactly once.
#[derive(Clone, Copy, Debug)]
pub struct HostIo {
    /// Handed back with the completion.
    pub token: IoToken,
    /// What to do. The caller's buffers stay valid until the completion.
    pub op: Op,
    /// First block; ignored for a flush.
    pub lba: Lba,
    /// Number of blocks; ignored for a flush.
    pub len_blocks: u64,
}

/// Names what a channel has lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LoanId(pub u32);

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done; a write is durable.
    Success,
    /// The base device failed, or the cache's memory did.
    Failed,
    /// Given up on demand (abort, reset) before anything of it was done.
    Aborted,
    /// The blocks can be looked at in place: [`super::Channel::loan`].
    Lent(LoanId),
    /// The blocks do not lie in one readable piece of the mapping: they have to be read.
    NotLent,
}

/// One finished request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Of the request.
    pub token: IoToken,
    /// How it ended.
    pub status: Status,
}

/// Operations on the base device that a channel has under way at once, at most.
pub const CHANNEL_BASE_OPS_MAX: usize = MISS_COUNT_MAX;
/// The same for the background: those of a batch, and a flush.
pub const BACKGROUND_BASE_OPS_MAX: usize = crate::writeback::BATCH_OPS_MAX + 1;
/// Pieces that one of them writes, at most.
pub const BASE_WRITE_SOURCES_MAX: usize = crate::writeback::BASE_WRITE_EXTENTS_MAX;

/// Names an operation on the base device, within the channel (or the background) that asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BaseOpId(pub u32);

/// What the base device is asked to do.
#[derive(Clone, Copy, Debug)]
pub enum BaseKind {
    /// Read into the caller's memory, from the cursor on.
    Read(IovCursor),
    /// Write these pieces of the cache device, in order: indices into [`Outbox::sources`].
    Write {
        /// First piece.
        first_source: u32,
        /// Number of pieces.
        source_count: u32,
    },
    /// Discard the blocks.
    Unmap,
    /// Zero the blocks.
    WriteZeroes,
    /// Make all finished writes durable.
    Flush,
}

/// An operation on the base device. Its end is told by `on_base_done` of whoever asked.
#[derive(Clone, Copy, Debug)]
pub struct BaseRequest {
    /// To be handed back.
    pub op: BaseOpId,
    /// What to do.
    pub kind: BaseKind,
    /// First block; 0 for a flush.
    pub lba: Lba,
    /// Number of blocks; the whole device for a flush.
    pub len_blocks: u64,
}

/// Why an operation on the base device failed. A shortage of resources is the adapter's business: it waits
/// and repeats, and the engine never hears of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BaseError {
    /// The device reported an error.
    #[error("the base device reported an I/O error")]
    Io,
    /// The device does not know this operation.
    #[error("the base device does not support the operation")]
    Unsupported,
    /// The device is gone.
    #[error("the base device is gone")]
    Gone,
    /// The device was reset meanwhile, which says nothing about the operation.
    #[error("the base device was reset")]
    Reset,
}

/// What a poll asks of its caller. Cleared by the caller, filled by the engine, never beyond its capacity.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Finished requests.
    pub completions: Vec<Completion>,
    /// Operations to start on the base device, in this order.
    pub base: Vec<BaseRequest>,
    /// Memory that the write operations in `base` refer to. It stays valid until their end.
    pub sources: Vec<MemSlice>,
}

impl Outbox {
    /// An empty outbox with room for what one poll produces: no more can complete than was submitted.
    #[must_use]
    pub fn new() -> Self {
        Self {
            completions: Vec::with_capacity(REQUEST_COUNT_MAX),
            base: Vec::with_capacity(MISS_COUNT_MAX),
            sources: Vec::with_capacity(8192),
        }
    }

    /// Forgets everything; keeps the capacity.
    pub fn clear(&mut self) {
        self.completions.clear();
        self.base.clear();
        self.sources.clear();
    }
}

/// Whether a poll found something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing to do.
    Idle,
    /// Some work was done.
    Busy,
}
