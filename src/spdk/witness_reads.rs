//! Reads of a few blocks of the base while a cache is opened.

use std::ffi::c_int;
use std::mem;
use std::rc::Rc;
use std::sync::Arc;

use libc::iovec;

use super::base::Base;
use super::base_queue::{BaseQueue, Room};
use super::create::{no_channel, no_memory};
use super::memory::DmaBuf;
use crate::engine::{BaseError, BaseKind, BaseOpId, BaseRequest};
use crate::pmem::IovCursor;
use crate::rpc::RpcError;
use crate::units::{Lba, PAGE_SIZE_BYTES};

/// Reads under way at once.
const READ_COUNT: usize = 8;

/// A place for one read.
#[derive(Debug)]
struct Place {
    buf: DmaBuf,
    /// Describes the part of `buf` that is read into.
    iov: Box<iovec>,
    /// The read that is under way here.
    slot: Option<u32>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct WitnessReads {
    base: Arc<Base>,
    queue: Rc<BaseQueue>,
    places: Vec<Place>,
}

impl WitnessReads {
    /// # Errors
    /// There is no memory, or no channel.
    pub(super) fn new(base: Arc<Base>) -> Result<Self, RpcError> {
        let room = Room {
            ops: READ_COUNT,
            sources: 0,
        };
        let queue = BaseQueue::new(Arc::clone(&base), room, Vec::new()).ok_or_else(no_channel)?;
        let places = (0..READ_COUNT)
            .map(|_| {
                let buf = DmaBuf::new(PAGE_SIZE_BYTES as usize)?;
                let iov = Box::new(iovec {
                    iov_base: buf.as_ptr().cast(),
                    iov_len: 0,
                });
                Some(Place {
                    buf,
                    iov,
                    slot: None,
                })
            })
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| {
                let kib = (READ_COUNT * PAGE_SIZE_BYTES as usize) >> 10;
                no_memory(&format!("reading the base: {kib} KiB of hugepages"))
            })?;
        Ok(Self {
            base,
            queue,
            places,
        })
    }

    /// Whether `start` would find a place.
    pub(super) fn has_room(&self) -> bool {
        self.places.iter().any(|place| place.slot.is_none())
    }

    /// Reads, and a reset, whose end was not told yet. Not dropped before there are none.
    pub(super) fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }

    /// Has the base reset, unless that is under way, which makes it end the reads.
    ///
    /// # Errors
    /// It was not begun; the number of the error.
    pub(super) fn reset_base(&self) -> Result<(), c_int> {
        self.queue.reset()
    }

    /// Starts a read of at most a page. `false`: it is larger, or there is no place.
    pub(super) fn start(&mut self, slot: u32, lba: Lba, len_blocks: u64) -> bool {
        let block_size = u64::from(self.base.facts.identity.block_size_bytes);
        let len_bytes = len_blocks.saturating_mul(block_size);
        let Some(index) = self.places.iter().position(|place| place.slot.is_none()) else {
            return false;
        };
        if len_bytes > u64::from(PAGE_SIZE_BYTES) {
            return false;
        }
        let place = &mut self.places[index];
        place.slot = Some(slot);
        place.iov.iov_len = len_bytes as usize;
        // SAFETY: list and memory are boxed and stay as they are until the read has ended and the place is
        // free again; nothing refers to the memory meanwhile, and it is apart from the mapping.
        let cursor = unsafe { IovCursor::new(&raw const *place.iov, 1) };
        let op = BaseOpId(u32::try_from(index).unwrap_or(u32::MAX));
        let kind = BaseKind::Read(cursor);
        self.queue.start(
            &BaseRequest {
                op,
                kind,
                lba,
                len_blocks,
            },
            &[],
        );
        true
    }

    /// Tells `ended` of the reads that have ended.
    pub(super) fn advance(&mut self, mut ended: impl FnMut(u32, Result<&[u8], BaseError>)) {
        let places = &mut self.places;
        self.queue.advance(|op, result| {
            let Some(place) = places.get_mut(op.0 as usize) else {
                return;
            };
            let Some(slot) = place.slot.take() else {
                return;
            };
            // SAFETY: the device has filled the first `iov_len` bytes of the buffer and has let go of it; it
            // is not read into again before the slice is gone.
            let bytes =
                unsafe { std::slice::from_raw_parts(place.buf.as_ptr(), place.iov.iov_len) };
            ended(slot, result.map(|()| bytes));
        });
    }
}

impl Drop for WitnessReads {
    fn drop(&mut self) {
        if self.in_flight() > 0 {
            // Behind an internal error alone. The base still reads into the places, and its answers come to the queue.
            let kept = (Rc::clone(&self.queue), mem::take(&mut self.places));
            Box::leak(Box::new(kept));
        }
    }
}
