//! How large the table is, and how many bits there are for what.

use super::GROUP_BITS;
use crate::index::bucket::{BUCKET_SLOTS, PROBE_MAX, PayloadBits};
use crate::media::Geometry;

/// Slots that are filled when as many pages are cached as the cache device has room for, in percent.
pub(super) const LOAD_PERCENT: u64 = 78;
/// Bits of a page number, at most; no base is larger than 2^60 bytes.
const PAGE_BITS_MAX: u32 = 48;

#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) bucket_count: u64,
    /// One for each slot, so that nobody ever waits for one for long; 0 where a page is one block.
    pub(super) line_count: u64,
    pub(super) payload: PayloadBits,
    /// Of a page number: as many as the tags have room for. What the base has now is of no account, so that it
    /// may grow. 0: there is no room at all.
    pub(super) page_bits: u32,
}

impl Sizes {
    pub(super) fn new(geometry: &Geometry, base_page_count: u64, factor: u64) -> Self {
        let cache_pages =
            u64::from(geometry.segment_count()) * (geometry.segment_room_bytes() / 4096);
        let pages = cache_pages.min(base_page_count).max(1) * factor;
        let slots = pages * 100 / LOAD_PERCENT;
        let bucket_count = (slots / BUCKET_SLOTS as u64 + 1).max(2 * PROBE_MAX as u64);
        let line_count = if geometry.blocks_per_page() > 1 {
            bucket_count * BUCKET_SLOTS as u64
        } else {
            0
        };
        let payload = PayloadBits {
            place_bits: geometry.place_bits(),
            line_bits: line_count.checked_ilog2().map(|log| log + 1),
        };
        let bucket_bits = bucket_count.ilog2();
        Self {
            bucket_count,
            line_count,
            payload,
            page_bits: payload
                .tag_bits_max()
                .filter(|bits| *bits >= GROUP_BITS)
                .map_or(0, |bits| (bits + bucket_bits).min(PAGE_BITS_MAX)),
        }
    }

    /// So that no two pages of one bucket have the same tag.
    pub(super) fn tag_bits(&self) -> u32 {
        self.page_bits.saturating_sub(self.bucket_count.ilog2())
    }

    pub(super) fn page_count_max(&self) -> u64 {
        if self.page_bits == 0 {
            0
        } else {
            1 << self.page_bits
        }
    }
}
