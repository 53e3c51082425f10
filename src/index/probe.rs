//! The index alone, for the benches.

use super::table::{Claim, EarlierParts, Index};
use super::{BlockMap, Change, LineStock, Target};
use crate::media::{Geometry, GeometryError, Place};
use crate::memory::NoMemory;
use crate::units::Page;

const SEGMENT_SIZE_BYTES: u64 = 16 << 20;
const OWNER: u16 = 1;

/// Why there is no such index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// There is no such cache.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// It is too large.
    #[error(transparent)]
    NoMemory(#[from] NoMemory),
}

/// An index that nobody else uses.
#[derive(Debug)]
pub struct Probe {
    index: Index,
    lines: LineStock,
}

impl Probe {
    /// For a cache with room for `cache_page_count` pages, in front of a base with `base_page_count`.
    ///
    /// # Errors
    /// There is no such cache, or no memory.
    pub fn new(
        cache_page_count: u64,
        base_page_count: u64,
        block_size_bytes: u32,
    ) -> Result<Self, ProbeError> {
        // All but 8 KiB of a segment is room.
        let segments = cache_page_count.div_ceil(SEGMENT_SIZE_BYTES / 4096 - 2);
        let device_size_bytes = (segments + 1) * SEGMENT_SIZE_BYTES;
        let geometry = Geometry::plan(device_size_bytes, SEGMENT_SIZE_BYTES, block_size_bytes)?;
        Ok(Self {
            index: Index::new(geometry, base_page_count, 1)?,
            lines: LineStock::new(1),
        })
    }

    /// Does what a write of `len_blocks` blocks from block `first` of a page on does to the index. Whether there
    /// was room.
    pub fn insert(&mut self, page: u64, first: u32, len_blocks: u32, place: u64) -> bool {
        let (index, lines) = (&self.index, &mut self.lines);
        let at = index.locate(Page(page));
        if index.claim(at, OWNER) != Claim::Taken {
            return false;
        }
        let mut done = false;
        if let Ok(slot) = index.reserve(at) {
            let is_part = len_blocks < index.geometry().blocks_per_page();
            let splits = is_part && index.needs_line(slot, first, len_blocks, EarlierParts::No);
            if !splits || index.stock_line(lines) {
                let target = Target::Mapped(Place(place));
                index.publish(slot, first, len_blocks, target, lines);
                done = true;
            } else {
                index.unreserve(slot);
            }
        }
        index.release(at.bucket(), OWNER, Change::Written);
        index.clear_stock(lines);
        done
    }

    /// Where a block of a page lies.
    #[inline]
    #[must_use]
    pub fn find(&self, page: u64, block: u32) -> Option<u64> {
        let found = self.index.lookup(self.index.locate(Page(page)))?;
        match found.map.block(block) {
            BlockMap::Mapped(place) => Some(place.0),
            BlockMap::Absent | BlockMap::Zero(_) => None,
        }
    }

    /// Asks for what [`Probe::find`] will look at.
    #[inline]
    pub fn prefetch(&self, page: u64) {
        self.index.prefetch(self.index.locate(Page(page)));
    }
}
