//! One operation on the base bdev: what it does, where its data are, and the part of it that is under way.

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;

use libc::iovec;
use spdk_sys as sys;

use super::{BaseQueue, Copying};
use crate::engine::{BASE_WRITE_SOURCES_MAX, BaseKind, BaseOpId, BaseRequest, ZeroesWent};
use crate::pmem::{IovCursor, MemSlice, SliceError};
use crate::spdk::memory::DmaBuf;

/// Elements of one scatter list handed to the base, at most: below the kernel's limit (1024), and few enough
/// for a device's own list. A read into more pieces goes in several parts.
const IOV_COUNT_MAX: usize = 128;
const _: () = assert!(BASE_WRITE_SOURCES_MAX <= IOV_COUNT_MAX);

/// Room for SPDK's wait entry.
const WAIT_ENTRY_WORDS: usize =
    (sys::PCACHE_WAIT_ENTRY_SIZE_BYTES as usize).div_ceil(size_of::<*mut c_void>());

/// Where the data of an operation is.
#[derive(Debug)]
pub(super) enum Payload {
    /// UNMAP, WRITE_ZEROES, FLUSH.
    None,
    Read(IovCursor),
    /// In place, in one piece: its address and length. Most writes of random places are such.
    Flat(*mut u8, usize),
    /// In place: `Op::iovs` name all of it.
    InPlace,
    /// `Op::sources`, to be copied to bounce buffers.
    Bounced,
    /// A WRITE_ZEROES that the base has failed, as data: address and length of zeroes.
    Zeroes(*mut u8, usize),
}

/// What an operation does; a copy of the request's kind.
#[derive(Clone, Copy, Debug)]
pub(super) enum Verb {
    Read,
    Write,
    Unmap,
    WriteZeroes,
    Flush,
}

/// An operation under way. Never moves: SPDK has its address.
///
/// What a write in one piece needs comes first, in one line: many are under way at once, and each line of them is far from
/// the CPU by the time it is asked for.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Op {
    pub(super) queue: NonNull<BaseQueue>,
    /// Blocks that are still to do.
    pub(super) left: Range<u64>,
    /// So many of them, the first, are under way.
    pub(super) part_blocks: u64,
    pub(super) id: BaseOpId,
    pub(super) verb: Verb,
    pub(super) payload: Payload,
    /// Has room for [`IOV_COUNT_MAX`]. A read of one block into more pieces lets it grow.
    pub(super) iovs: Vec<iovec>,
    /// What goes through bounce buffers.
    pub(super) sources: Vec<MemSlice>,
    /// The first source that is not used up, and how much of it is.
    pub(super) source_at: (usize, usize),
    /// There is none but for a payload of kind `Bounced`.
    pub(super) bounce: Option<DmaBuf>,
    /// SPDK's, while the operation waits for one of SPDK's requests.
    pub(super) wait_entry: [*mut c_void; WAIT_ENTRY_WORDS],
}

impl Op {
    pub(super) fn new(queue: NonNull<BaseQueue>, source_count_max: usize) -> Self {
        Self {
            queue,
            left: 0..0,
            part_blocks: 0,
            id: BaseOpId(0),
            verb: Verb::Flush,
            payload: Payload::None,
            iovs: Vec::with_capacity(IOV_COUNT_MAX),
            sources: Vec::with_capacity(source_count_max),
            source_at: (0, 0),
            bounce: None,
            wait_entry: [std::ptr::null_mut(); WAIT_ENTRY_WORDS],
        }
    }

    pub(super) fn fill(&mut self, request: &BaseRequest, sources: &[MemSlice], copying: Copying) {
        self.id = request.op;
        self.left = request.lba.0..request.lba.0 + request.len_blocks;
        self.part_blocks = 0;
        (self.verb, self.payload) = match request.kind {
            BaseKind::Read(cursor) => (Verb::Read, Payload::Read(cursor)),
            BaseKind::Write {
                first_source,
                source_count,
            } => {
                let first = first_source as usize;
                let sources = &sources[first..first + source_count as usize];
                let payload = match (copying, sources) {
                    (Copying::Direct, [source]) => {
                        let iovec { iov_base, iov_len } = source.as_iovec();
                        Payload::Flat(iov_base.cast(), iov_len)
                    }
                    (Copying::Direct, _) => {
                        self.iovs.clear();
                        self.iovs.extend(sources.iter().map(MemSlice::as_iovec));
                        Payload::InPlace
                    }
                    (Copying::Bounced, _) => {
                        self.sources.clear();
                        self.sources.extend_from_slice(sources);
                        self.source_at = (0, 0);
                        Payload::Bounced
                    }
                };
                (Verb::Write, payload)
            }
            BaseKind::Unmap => (Verb::Unmap, Payload::None),
            BaseKind::WriteZeroes => (Verb::WriteZeroes, Payload::None),
            BaseKind::Flush => (Verb::Flush, Payload::None),
        };
    }

    fn blocks_left(&self) -> u64 {
        self.left.end - self.left.start
    }

    /// The part under way has ended. `true`: there is no other behind it.
    pub(super) fn end_part(&mut self) -> bool {
        self.left.start += self.part_blocks;
        self.left.is_empty() || matches!(self.verb, Verb::Flush)
    }

    /// How it goes to the base if it is a WRITE_ZEROES.
    pub(super) fn zeroes_went(&self) -> Option<ZeroesWent> {
        match (&self.payload, self.verb) {
            (Payload::Zeroes(..), _) => Some(ZeroesWent::AsData),
            (_, Verb::WriteZeroes) => Some(ZeroesWent::AsAsked),
            _ => None,
        }
    }

    pub(super) fn needs_bounce(&self) -> bool {
        matches!(self.payload, Payload::Bounced) && self.bounce.is_none()
    }

    /// Makes the scatter list of the next part.
    ///
    /// # Errors
    /// There is nothing that could be written; why.
    pub(super) fn prepare(&mut self, block_shift: u32) -> Result<(), &'static str> {
        let blocks_left = self.blocks_left();
        let len_bytes = match self.payload {
            Payload::None => {
                self.part_blocks = blocks_left;
                return Ok(());
            }
            Payload::Read(ref mut cursor) => {
                self.iovs.clear();
                let (left, block) = ((blocks_left as usize) << block_shift, 1 << block_shift);
                let len_bytes = cursor.take_iovecs(left, block, IOV_COUNT_MAX, &mut self.iovs);
                self.part_blocks = (len_bytes >> block_shift) as u64;
                return Ok(());
            }
            Payload::Zeroes(_, len_bytes) => {
                self.part_blocks = blocks_left.min((len_bytes >> block_shift) as u64);
                return Ok(());
            }
            Payload::Flat(_, len_bytes) => {
                self.part_blocks = blocks_left;
                return is_all(blocks_left, len_bytes, block_shift);
            }
            Payload::InPlace => {
                self.part_blocks = blocks_left;
                let len_bytes = self.iovs.iter().map(|iov| iov.iov_len).sum();
                return is_all(blocks_left, len_bytes, block_shift);
            }
            Payload::Bounced => {
                self.iovs.clear();
                self.copy_to_bounce()
                    .map_err(|SliceError| "the cache device's memory cannot be read")?
            }
        };
        self.part_blocks = (len_bytes >> block_shift) as u64;
        let is_whole = len_bytes > 0
            && len_bytes == (self.part_blocks as usize) << block_shift
            && self.part_blocks <= blocks_left;
        if is_whole {
            Ok(())
        } else {
            Err("it is not made of whole blocks")
        }
    }

    /// Copies the next sources to the bounce buffer, which it has. Returns how many bytes that was.
    fn copy_to_bounce(&mut self) -> Result<usize, SliceError> {
        let bounce = self.bounce.as_ref();
        let Some((to, room_bytes)) = bounce.map(|buf| (buf.as_ptr(), buf.len_bytes())) else {
            return Ok(0);
        };
        let mut filled = 0;
        while filled < room_bytes
            && let Some(source) = self.sources.get(self.source_at.0)
        {
            let used = self.source_at.1;
            let len = (source.len_bytes() - used).min(room_bytes - filled);
            // SAFETY: the cache device stays mapped while operations on its base are under way; `filled +
            // len` is at most the buffer's length, and the buffer is DMA memory apart from the mapping.
            unsafe { source.part(used, len).copy_to_ptr(to.wrapping_add(filled)) }?;
            filled += len;
            self.source_at = if used + len == source.len_bytes() {
                (self.source_at.0 + 1, 0)
            } else {
                (self.source_at.0, used + len)
            };
        }
        self.iovs.push(iovec {
            iov_base: to.cast(),
            iov_len: filled,
        });
        Ok(filled)
    }
}

/// Whether sources of so many bytes are all of what is left to write.
fn is_all(blocks_left: u64, len_bytes: usize, block_shift: u32) -> Result<(), &'static str> {
    let is_all = blocks_left > 0 && len_bytes == (blocks_left as usize) << block_shift;
    is_all
        .then_some(())
        .ok_or("it is not as long as its sources")
}
