//! Where things lie on the cache device.

use super::Key;
use crate::units::{Lba, PAGE_SIZE_BYTES, Page, PmemOff, SegId};
use std::ops::Range;

/// The two copies of the superblock.
pub(super) const SUPERBLOCK_OFFS: [PmemOff; 2] = [PmemOff(0), PmemOff(32 << 10)];
/// The two copies of the tails.
pub(super) const TAILS_OFFS: [PmemOff; 2] = [PmemOff(8 << 10), PmemOff(40 << 10)];
/// The first segment starts here or behind; everything before it is the header area.
pub const SEGMENTS_START_MIN_BYTES: u64 = 64 << 10;
/// Distance between the two copies of a segment's info.
pub(super) const SEGMENT_INFO_STRIDE_BYTES: u64 = 4 << 10;
/// The first kset of a segment lies here.
pub const KEYS_START_BYTES: u32 = 8 << 10;
/// The smallest segment: its info, some keys, some data. Tests use it; the adapter asks for more.
const SEGMENT_SIZE_MIN_BYTES: u64 = 16 << 10;
/// The largest segment: offsets within one are 32 bits wide.
pub const SEGMENT_SIZE_MAX_BYTES: u64 = 1 << 30;
/// With fewer the log could not move while something is being reclaimed.
const SEGMENT_COUNT_MIN: u64 = 4;
/// Segments start at a multiple of this where they are large enough, so that DMA can use huge pages.
const SEGMENT_ALIGN_BYTES: u64 = 2 << 20;

/// A block of the data area, counted in blocks of the base device from the first segment's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place(pub u64);

/// Why a geometry cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Not 512 or 4096.
    #[error("block size {0} is not supported: 512 or 4096 bytes are")]
    BlockSize(u32),
    /// Not a power of two in range.
    #[error(
        "segment size {0} bytes is not possible: it is a power of two from {SEGMENT_SIZE_MIN_BYTES} to {SEGMENT_SIZE_MAX_BYTES} bytes"
    )]
    SegmentSize(u64),
    /// Too few segments.
    #[error(
        "a cache device of {device} bytes is too small for segments of {segment} bytes: at least {needed} bytes are needed"
    )]
    TooSmall {
        /// Size of the device.
        device: u64,
        /// Size of a segment.
        segment: u64,
        /// The least size.
        needed: u64,
    },
    /// More segments than their numbers can name.
    #[error("{0} segments are too many: use larger segments")]
    TooMany(u64),
}

/// Sizes and offsets, derived once, checked at derivation. That all shifts are shorter than a word is known from
/// there: it is not checked again at every use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    block_shift: u32,
    /// log2 of the blocks in an index page.
    page_shift: u32,
    segment_shift: u32,
    segment_count: u32,
    segments_start: u64,
}

/// A range cut at multiples of `align`, a power of two.
#[inline]
pub(crate) fn aligned_pieces(range: Range<u64>, align: u64) -> impl Iterator<Item = Range<u64>> {
    let (mut next, end) = (range.start, range.end);
    std::iter::from_fn(move || {
        let start = next;
        (start < end).then(|| {
            next = ((start | (align - 1)) + 1).min(end);
            start..next
        })
    })
}

impl Geometry {
    /// The geometry of a new cache on a device of `device_size_bytes`.
    ///
    /// # Errors
    /// A size is not possible.
    pub fn plan(
        device_size_bytes: u64,
        segment_size_bytes: u64,
        block_size_bytes: u32,
    ) -> Result<Self, GeometryError> {
        if !segment_size_bytes.is_power_of_two()
            || !(SEGMENT_SIZE_MIN_BYTES..=SEGMENT_SIZE_MAX_BYTES).contains(&segment_size_bytes)
        {
            return Err(GeometryError::SegmentSize(segment_size_bytes));
        }
        let start =
            SEGMENTS_START_MIN_BYTES.next_multiple_of(segment_size_bytes.min(SEGMENT_ALIGN_BYTES));
        let count = device_size_bytes.saturating_sub(start) / segment_size_bytes;
        Self::from_media(
            device_size_bytes,
            start,
            segment_size_bytes,
            count,
            block_size_bytes,
        )
    }

    /// The geometry that a superblock names.
    ///
    /// # Errors
    /// A number is out of range for the device.
    pub fn from_media(
        device_size_bytes: u64,
        segments_start: u64,
        segment_size_bytes: u64,
        segment_count: u64,
        block_size_bytes: u32,
    ) -> Result<Self, GeometryError> {
        if block_size_bytes != 512 && block_size_bytes != 4096 {
            return Err(GeometryError::BlockSize(block_size_bytes));
        }
        if !segment_size_bytes.is_power_of_two()
            || !(SEGMENT_SIZE_MIN_BYTES..=SEGMENT_SIZE_MAX_BYTES).contains(&segment_size_bytes)
        {
            return Err(GeometryError::SegmentSize(segment_size_bytes));
        }
        let needed_count = segment_count.max(SEGMENT_COUNT_MIN);
        let needed = needed_count
            .checked_mul(segment_size_bytes)
            .and_then(|bytes| bytes.checked_add(segments_start))
            .ok_or(GeometryError::TooMany(segment_count))?;
        if device_size_bytes < needed
            || segment_count < SEGMENT_COUNT_MIN
            || segments_start < SEGMENTS_START_MIN_BYTES
            || !segments_start.is_multiple_of(u64::from(PAGE_SIZE_BYTES))
        {
            return Err(GeometryError::TooSmall {
                device: device_size_bytes,
                segment: segment_size_bytes,
                needed,
            });
        }
        let segment_count =
            u32::try_from(segment_count).map_err(|_| GeometryError::TooMany(segment_count))?;
        Ok(Self {
            block_shift: block_size_bytes.trailing_zeros(),
            page_shift: PAGE_SIZE_BYTES.trailing_zeros() - block_size_bytes.trailing_zeros(),
            segment_shift: segment_size_bytes.trailing_zeros(),
            segment_count,
            segments_start,
        })
    }

    /// The largest power of two, up to 16 MiB, of which the device holds 32 or more; 256 KiB at least, so that a write
    /// of 64 KiB is atomic on any device.
    #[must_use]
    pub fn segment_size_default_bytes(device_size_bytes: u64) -> u64 {
        let mut size = 16 << 20;
        while size > 256 << 10 && device_size_bytes / size < 33 {
            size /= 2;
        }
        size
    }

    /// Size of a logical block in bytes.
    #[must_use]
    pub fn block_size_bytes(&self) -> u32 {
        1u32.wrapping_shl(self.block_shift)
    }

    /// log2 of the block size.
    #[must_use]
    pub fn block_shift(&self) -> u32 {
        self.block_shift
    }

    /// Blocks in an index page: 8 or 1.
    #[must_use]
    pub fn blocks_per_page(&self) -> u32 {
        PAGE_SIZE_BYTES.wrapping_shr(self.block_shift)
    }

    /// The index page in which a block lies.
    #[must_use]
    pub fn page_of(&self, lba: Lba) -> Page {
        Page(lba.0.wrapping_shr(self.page_shift))
    }

    /// An extent cut where pages end: first block and number of blocks of each piece.
    #[inline]
    pub fn page_pieces(
        &self,
        lba: Lba,
        len_blocks: u64,
    ) -> impl Iterator<Item = (Lba, u32)> + use<> {
        // A page has 8 blocks at most.
        let pieces = self.group_pieces(lba, len_blocks, 1);
        pieces.map(|(lba, len_blocks)| (lba, len_blocks as u32))
    }

    /// As [`Geometry::page_pieces`], cut where aligned groups of so many pages end, a power of two.
    #[inline]
    pub fn group_pieces(
        &self,
        lba: Lba,
        len_blocks: u64,
        page_count: u64,
    ) -> impl Iterator<Item = (Lba, u64)> + use<> {
        let group_blocks = u64::from(self.blocks_per_page()) * page_count;
        let pieces = aligned_pieces(lba.0..lba.0 + len_blocks, group_blocks);
        pieces.map(|piece| (Lba(piece.start), piece.end - piece.start))
    }

    /// How many index pages an extent lies in, wholly or in part. It is not empty.
    #[must_use]
    pub fn pages_touched(&self, lba: Lba, len_blocks: u64) -> u64 {
        let last = Lba(lba.0 + len_blocks - 1);
        self.page_of(last).0 + 1 - self.page_of(lba).0
    }

    /// The first block of an index page.
    #[must_use]
    pub fn page_start(&self, page: Page) -> Lba {
        Lba(page.0.wrapping_shl(self.page_shift))
    }

    /// Size of a segment in bytes.
    #[must_use]
    pub fn segment_size_bytes(&self) -> u64 {
        1u64.wrapping_shl(self.segment_shift)
    }

    /// Number of segments.
    #[must_use]
    pub fn segment_count(&self) -> u32 {
        self.segment_count
    }

    /// Where the first segment starts.
    #[must_use]
    pub fn segments_start_bytes(&self) -> u64 {
        self.segments_start
    }

    /// Where a segment starts.
    #[must_use]
    pub fn segment_off(&self, segment: SegId) -> PmemOff {
        debug_assert!(segment.0 < self.segment_count);
        PmemOff(self.segments_start + u64::from(segment.0).wrapping_shl(self.segment_shift))
    }

    /// Where the payload of a key of this segment lies.
    #[inline]
    #[must_use]
    pub fn payload_off(&self, segment: SegId, key: &Key) -> PmemOff {
        self.segment_off(segment).plus(key.payload_off.into())
    }

    /// The two copies of a segment's info.
    #[must_use]
    pub(super) fn info_offs(&self, segment: SegId) -> [PmemOff; 2] {
        let start = self.segment_off(segment);
        [start, start.plus(SEGMENT_INFO_STRIDE_BYTES)]
    }

    /// Bytes of a segment that keys and data share.
    #[must_use]
    pub fn segment_room_bytes(&self) -> u64 {
        self.segment_size_bytes() - u64::from(KEYS_START_BYTES)
    }

    /// The place of the block at byte `in_segment` of a segment.
    #[must_use]
    pub fn place(&self, segment: SegId, in_segment_bytes: u32) -> Place {
        Place(
            (u64::from(segment.0).wrapping_shl(self.segment_shift) + u64::from(in_segment_bytes))
                .wrapping_shr(self.block_shift),
        )
    }

    /// The segment in which a place lies.
    #[must_use]
    pub fn segment_of(&self, place: Place) -> SegId {
        // Places are made by `place`, from a segment number of 32 bits.
        SegId(place.0.wrapping_shr(self.place_shift()) as u32)
    }

    /// The places of a segment.
    #[must_use]
    pub fn segment_places(&self, SegId(id): SegId) -> Range<u64> {
        let start = |id: u64| id.wrapping_shl(self.place_shift());
        start(u64::from(id))..start(u64::from(id) + 1)
    }

    /// Of the number of a segment among the places.
    fn place_shift(&self) -> u32 {
        // A segment has many blocks.
        self.segment_shift.wrapping_sub(self.block_shift)
    }

    /// Where a place lies on the device.
    #[must_use]
    pub fn place_off(&self, place: Place) -> PmemOff {
        PmemOff(self.segments_start + place.0.wrapping_shl(self.block_shift))
    }

    /// How many bits a place needs.
    #[must_use]
    pub fn place_bits(&self) -> u32 {
        let places = (u64::from(self.segment_count) << self.segment_shift) >> self.block_shift;
        64 - places.leading_zeros()
    }

    /// Bytes that `blocks` blocks take.
    #[must_use]
    pub fn bytes(&self, len_blocks: u64) -> u64 {
        len_blocks.wrapping_shl(self.block_shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_lie_apart_and_inside_the_header() {
        for offs in [SUPERBLOCK_OFFS, TAILS_OFFS] {
            assert!(offs[1].0 - offs[0].0 >= 4096);
            assert!(offs[1].0 + 4096 <= SEGMENTS_START_MIN_BYTES);
        }
    }

    #[test]
    fn a_place_finds_its_segment_and_offset_again() {
        let g = Geometry::plan(1 << 30, 1 << 20, 512).unwrap();
        let p = g.place(SegId(7), 4096 + 512);
        assert_eq!(g.segment_of(p), SegId(7));
        assert_eq!(g.place_off(p), g.segment_off(SegId(7)).plus(4096 + 512));
        assert!(p.0 < 1 << g.place_bits());
    }

    #[test]
    fn impossible_sizes_are_refused_with_the_numbers() {
        assert_eq!(
            Geometry::plan(1 << 30, 3 << 20, 512),
            Err(GeometryError::SegmentSize(3 << 20))
        );
        assert_eq!(
            Geometry::plan(1 << 30, 1 << 20, 520),
            Err(GeometryError::BlockSize(520))
        );
        assert!(matches!(
            Geometry::plan(1 << 20, 1 << 20, 512),
            Err(GeometryError::TooSmall { needed, .. }) if needed == (4 << 20) + (1 << 20)
        ));
        assert!(Geometry::from_media(1 << 30, 0, 1 << 20, 8, 512).is_err());
        assert!(Geometry::from_media(1 << 30, 1 << 20, 1 << 20, u64::MAX, 512).is_err());
    }

    #[test]
    fn default_segments_suit_the_device() {
        assert_eq!(Geometry::segment_size_default_bytes(1 << 20), 256 << 10);
        assert_eq!(Geometry::segment_size_default_bytes(16 << 20), 256 << 10);
        assert_eq!(Geometry::segment_size_default_bytes(33 << 20), 1 << 20);
        assert_eq!(Geometry::segment_size_default_bytes(4 << 30), 16 << 20);
    }
}
