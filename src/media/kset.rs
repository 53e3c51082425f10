//! Ksets: the atomic unit of the log. A header and the keys of one batch, in one checksum.

use super::{Checksums, Geometry, KEYS_START_BYTES};
use crate::canary::{self, Canary};
use crate::media::ChecksumSeed;
use crate::pmem::{LINE_SIZE_BYTES, PmemRead, Poisoned};
use crate::units::{Epoch, Generation, Lba, SegId, Seq};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Size of the header of a kset.
pub const KSET_HEADER_SIZE_BYTES: usize = size_of::<KsetHeaderOnMedia>();
/// Size of a key.
pub const KEY_SIZE_BYTES: usize = size_of::<KeyOnMedia>();
/// The most keys in a kset. One write of the largest size at any alignment must fit.
pub const KSET_KEYS_MAX: usize = 512;
/// The most bytes of the base that a key without payload covers. Recovery goes through all of their pages.
pub const CLEAR_SIZE_MAX_BYTES: u64 = 4 << 20;

/// Flag of a kset: [`Proof::Checksums`].
const FLAG_PAYLOADS_UNFENCED: u32 = 1;

/// What says that the payloads of a kset are whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// They were durable before it was stored.
    Fence,
    /// The checksums in its keys: it was stored before the fence that made them durable. Every later kset of its segment was
    /// stored behind that fence.
    Checksums,
}

impl Proof {
    fn flags(self) -> u32 {
        match self {
            Proof::Fence => 0,
            Proof::Checksums => FLAG_PAYLOADS_UNFENCED,
        }
    }

    fn of(flags: u32) -> Self {
        if flags & FLAG_PAYLOADS_UNFENCED == 0 {
            Proof::Fence
        } else {
            Proof::Checksums
        }
    }
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct KsetHeaderOnMedia {
    /// CRC-32C of the rest of the header and of the keys.
    crc: U32,
    key_count: U32,
    /// Number of the kset in its segment, from 0.
    kset_index: U32,
    flags: U32,
    seq: U64,
    epoch: U64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct KeyOnMedia {
    lba: U64,
    len_blocks: U32,
    /// Of the payload: blocks from the start of the segment.
    place: U32,
    /// Of the payload; 0 without payload checksums.
    crc: U32,
    kind: u8,
    rsv: [u8; 3],
}

impl KeyOnMedia {
    #[inline]
    fn new(key: &Key, block_shift: u32) -> Self {
        Self {
            lba: key.lba.0.into(),
            len_blocks: key.len_blocks.into(),
            place: key.payload_off.wrapping_shr(block_shift).into(),
            crc: key.crc.into(),
            kind: key.kind.code(),
            rsv: [0; 3],
        }
    }

    /// The key, and whether its kind is known.
    #[inline]
    fn decode(&self, block_shift: u32) -> (Key, bool) {
        let (kind, is_known) = match self.kind {
            1 => (KeyKind::Data, true),
            2 => (KeyKind::Fill, true),
            3 => (KeyKind::Zeroes, true),
            4 => (KeyKind::Unmap, true),
            _ => (KeyKind::Unmap, false),
        };
        let key = Key {
            lba: Lba(self.lba.get()),
            len_blocks: self.len_blocks.get(),
            kind,
            // A segment has 1 GiB at the most.
            payload_off: self.place.get() << block_shift,
            crc: self.crc.get(),
        };
        (key, is_known)
    }
}

#[cfg(any(test, feature = "sim"))]
impl KsetHeaderOnMedia {
    pub(super) fn key_count(&self) -> u32 {
        self.key_count.get()
    }

    pub(super) fn renumber(&mut self, kset_index: u32, add_to_seq: u64) {
        self.kset_index.set(kset_index);
        self.seq.set(self.seq.get().wrapping_add(add_to_seq));
    }
}

const _: () = {
    assert!(size_of::<KsetHeaderOnMedia>() == 32);
    assert!(size_of::<KeyOnMedia>() == 24);
    // One key and its header share a line.
    assert!(size_of::<KsetHeaderOnMedia>() + size_of::<KeyOnMedia>() <= LINE_SIZE_BYTES as usize);
};

/// Bytes that a kset of so many keys takes on the media.
#[must_use]
pub fn kset_size_bytes(key_count: usize) -> usize {
    (KSET_HEADER_SIZE_BYTES + key_count * KEY_SIZE_BYTES).next_multiple_of(LINE_SIZE_BYTES as usize)
}

/// What a key says of its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// Written by the host: the payload is to be written back. Lies within one page.
    Data,
    /// A copy of what the base holds. Lies within one page.
    Fill,
    /// The blocks read as zeroes, and the base is to be zeroed. No payload.
    Zeroes,
    /// As `Zeroes`, but the base is to discard the blocks.
    Unmap,
}

impl KeyKind {
    fn code(self) -> u8 {
        match self {
            KeyKind::Data => 1,
            KeyKind::Fill => 2,
            KeyKind::Zeroes => 3,
            KeyKind::Unmap => 4,
        }
    }

    /// Whether there is a payload in the segment.
    #[must_use]
    pub fn has_payload(self) -> bool {
        matches!(self, KeyKind::Data | KeyKind::Fill)
    }

    /// Whether the base has to be told.
    #[must_use]
    pub fn is_dirty(self) -> bool {
        !matches!(self, KeyKind::Fill)
    }
}

/// A decoded key: in range of the base device, its payload in range of the segment's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// First block.
    pub lba: Lba,
    /// Number of blocks, from 1.
    pub len_blocks: u32,
    /// What it says.
    pub kind: KeyKind,
    /// Byte offset of the payload in the segment; 0 without payload.
    pub payload_off: u32,
    /// Checksum of the payload; 0 where there is none.
    pub crc: u32,
}

impl Key {
    /// The block behind the last one.
    #[must_use]
    pub fn end(&self) -> Lba {
        Lba(self.lba.0 + u64::from(self.len_blocks))
    }
}

/// Keys that a line has room for, rounded up: so many behind the last one are part of its padding.
const KEYS_PER_LINE: usize = (LINE_SIZE_BYTES as usize).div_ceil(KEY_SIZE_BYTES);

/// A kset of any size, with its padding.
#[derive(Debug, FromZeros, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct KsetBytes {
    header: KsetHeaderOnMedia,
    keys: [KeyOnMedia; KSET_KEYS_MAX + KEYS_PER_LINE],
}

/// Builds the bytes of a kset. Reused; allocates once.
#[derive(Debug)]
pub struct KsetBuilder {
    media: Box<KsetBytes>,
    key_count: usize,
}

impl Default for KsetBuilder {
    fn default() -> Self {
        // Where there is no memory the program ends, as it does for any box.
        let media = KsetBytes::new_box_zeroed();
        Self {
            media: media.unwrap_or_else(|_| Box::new(KsetBytes::new_zeroed())),
            key_count: 0,
        }
    }
}

impl KsetBuilder {
    /// Forgets all keys.
    pub fn clear(&mut self) {
        self.key_count = 0;
    }

    /// Appends a key.
    ///
    /// # Panics
    /// There are [`KSET_KEYS_MAX`] already.
    #[inline]
    pub fn push(&mut self, key: &Key, block_shift: u32) {
        self.put(KeyOnMedia::new(key, block_shift));
    }

    /// Appends what a key says of blocks whose payload lies in one piece, in a key for each page. A checksum is that of one
    /// page alone.
    ///
    /// # Panics
    /// There are too many.
    #[inline(always)]
    pub fn push_pages(&mut self, key: &Key, geometry: &Geometry) {
        debug_assert!(
            key.crc == 0 || geometry.pages_touched(key.lba, key.len_blocks.into()) == 1,
            "a checksum of several pages"
        );
        let mut media = KeyOnMedia::new(key, geometry.block_shift());
        let mut place = media.place.get();
        for (lba, len_blocks) in geometry.page_pieces(key.lba, key.len_blocks.into()) {
            media.lba = lba.0.into();
            media.len_blocks = len_blocks.into();
            media.place = place.into();
            self.put(media);
            place += len_blocks;
        }
    }

    #[inline]
    fn put(&mut self, media: KeyOnMedia) {
        debug_assert!(self.key_count < KSET_KEYS_MAX);
        self.media.keys[self.key_count] = media;
        self.key_count += 1;
    }

    /// How many keys there are.
    #[must_use]
    pub fn key_count(&self) -> usize {
        self.key_count
    }

    /// The keys, with the shift that they were appended with.
    pub fn keys(&self, block_shift: u32) -> impl Iterator<Item = Key> {
        let keys = &self.media.keys[..self.key_count];
        keys.iter().map(move |media| media.decode(block_shift).0)
    }

    /// The finished bytes: checksummed, padded to whole lines.
    #[inline]
    pub fn finish(
        &mut self,
        seed: ChecksumSeed,
        kset_index: u32,
        seq: Seq,
        epoch: Epoch,
        proof: Proof,
    ) -> &[u8] {
        let count = self.key_count;
        let media = &mut *self.media;
        // What an earlier kset has left there. A length that is known beats one that fits.
        if let Some(padding) = media.keys[count..].first_chunk_mut::<KEYS_PER_LINE>() {
            *padding = [KeyOnMedia::new_zeroed(); KEYS_PER_LINE];
        }
        media.header = KsetHeaderOnMedia {
            crc: U32::ZERO,
            // KSET_KEYS_MAX at the most.
            key_count: (count as u32).into(),
            kset_index: kset_index.into(),
            flags: proof.flags().into(),
            seq: seq.0.into(),
            epoch: epoch.0.into(),
        };
        let used = KSET_HEADER_SIZE_BYTES + count * KEY_SIZE_BYTES;
        let crc = seed.checksum(&media.as_bytes()[4..used]);
        media.header.crc = crc.into();
        self.bytes()
    }

    /// What [`KsetBuilder::finish`] has made.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        &self.media.as_bytes()[..kset_size_bytes(self.key_count)]
    }
}

/// The header of a valid kset, and where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kset {
    /// Number in its segment.
    pub kset_index: u32,
    /// Place in the global order.
    pub seq: Seq,
    /// Its epoch.
    pub epoch: Epoch,
    /// Byte offset in the segment.
    pub off: u32,
    /// Bytes it takes.
    pub size_bytes: u32,
    /// Number of keys.
    pub key_count: u32,
    /// Of its payloads.
    pub proof: Proof,
}

/// Why there is no valid kset at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KsetError {
    /// Not a kset, or not the one that must come next. The end of the log, unless more is known.
    #[error("there is no valid kset")]
    Invalid,
    /// Its checksum is good, but a key in it cannot be.
    #[error("a key of the kset is out of range")]
    KeyRange,
    /// The memory cannot be read.
    #[error(transparent)]
    Poisoned(#[from] Poisoned),
}

/// Reads the ksets of one segment. Owns the buffer; allocates once.
#[derive(Debug)]
pub struct KsetReader {
    buf: Vec<u8>,
}

impl Default for KsetReader {
    fn default() -> Self {
        Self {
            buf: vec![0; kset_size_bytes(KSET_KEYS_MAX)],
        }
    }
}

/// Which segment, and under which rules its ksets are valid.
#[derive(Clone, Copy, Debug)]
pub struct KsetContext {
    geometry: Geometry,
    base_block_count: u64,
    segment: SegId,
    seed: ChecksumSeed,
}

impl KsetContext {
    /// For a segment under a generation.
    #[must_use]
    pub fn new(
        geometry: &Geometry,
        base_block_count: u64,
        checksums: &Checksums,
        segment: SegId,
        generation: Generation,
    ) -> Self {
        let seed = checksums.kset(segment.0, generation.0);
        Self {
            geometry: *geometry,
            base_block_count,
            segment,
            seed,
        }
    }

    /// Of the device.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The segment.
    #[must_use]
    pub fn segment(&self) -> SegId {
        self.segment
    }
}

impl KsetReader {
    /// Reads the kset number `kset_index` at byte `off` of the segment, and pushes its keys on `keys`.
    ///
    /// # Errors
    /// There is no such kset; `keys` is as it was.
    pub fn read<P: PmemRead>(
        &mut self,
        pmem: &P,
        context: &KsetContext,
        off: u32,
        kset_index: u32,
        keys: &mut Vec<Key>,
    ) -> Result<Kset, KsetError> {
        // INV-LOG-2.
        let kset = self.load(pmem, context, off, |index| index == kset_index)?;
        let keys_before = keys.len();
        let bounds = KeyBounds::of(context, &kset);
        // Where they lie: a copy would be read in other pieces than it was stored in, and the CPU waits for that.
        let bytes = &self.buf[KSET_HEADER_SIZE_BYTES..];
        let count = kset.key_count as usize;
        let (media, _) = <[KeyOnMedia]>::ref_from_prefix_with_elems(bytes, count)
            .map_err(|_| KsetError::Invalid)?;
        let mut are_good = true;
        // Their number is known: room for one after the other would be looked for, and their count stored.
        keys.extend(media.iter().map(|media| {
            let (key, is_good) = bounds.decode(media);
            are_good &= is_good;
            key
        }));
        if !are_good {
            keys.truncate(keys_before);
            return Err(KsetError::KeyRange);
        }
        Ok(kset)
    }

    /// The bytes of the kset that was read last, its padding included.
    #[must_use]
    pub fn bytes(&self, kset: &Kset) -> &[u8] {
        &self.buf[..kset.size_bytes as usize]
    }

    /// Whether the kset number `kset_index` is at byte `off`, as far as its header and its checksum say.
    pub fn is_at<P: PmemRead>(
        &mut self,
        pmem: &P,
        context: &KsetContext,
        off: u32,
        kset_index: u32,
    ) -> bool {
        self.load(pmem, context, off, |index| index == kset_index)
            .is_ok()
    }

    /// Looks for a valid kset with a number above `kset_index` within `window_bytes` behind byte `off`: there is none where the
    /// log ends, so one that is found says that what comes before it is damaged.
    ///
    /// # Errors
    /// The memory cannot be read.
    pub fn find_later<P: PmemRead>(
        &mut self,
        pmem: &P,
        context: &KsetContext,
        off: u32,
        kset_index: u32,
        window_bytes: u32,
    ) -> Result<Option<u32>, Poisoned> {
        let window_end = u64::from(off) + u64::from(window_bytes);
        let end = context.geometry.segment_size_bytes().min(window_end + 1);
        let mut at = u64::from(off) + LINE_SIZE_BYTES;
        while at < end {
            let here = u32::try_from(at).unwrap_or(u32::MAX);
            match self.load(pmem, context, here, |index| index > kset_index) {
                Ok(_) => return Ok(Some(here)),
                Err(KsetError::Poisoned(error)) => return Err(error),
                Err(_) => at += LINE_SIZE_BYTES,
            }
        }
        Ok(None)
    }

    /// Leaves the bytes of the kset at `off` in the buffer if its number is wanted and its checksum good.
    fn load<P: PmemRead>(
        &mut self,
        pmem: &P,
        context: &KsetContext,
        off: u32,
        wanted: impl Fn(u32) -> bool,
    ) -> Result<Kset, KsetError> {
        let size = context.geometry.segment_size_bytes();
        let room = size.saturating_sub(u64::from(off));
        if off < KEYS_START_BYTES || room < LINE_SIZE_BYTES {
            return Err(KsetError::Invalid);
        }
        let at = context
            .geometry
            .segment_off(context.segment)
            .plus(u64::from(off));
        let line = LINE_SIZE_BYTES as usize;
        pmem.read(at, &mut self.buf[..line])?;
        let header = KsetHeaderOnMedia::read_from_prefix(&self.buf);
        let (header, _) = header.map_err(|_| KsetError::Invalid)?;
        let (count, index) = (header.key_count.get(), header.kset_index.get());
        if count == 0 || count as usize > KSET_KEYS_MAX || !wanted(index) {
            return Err(KsetError::Invalid);
        }
        let padded = kset_size_bytes(count as usize);
        if padded as u64 > room {
            return Err(KsetError::Invalid);
        }
        pmem.read(at.plus(LINE_SIZE_BYTES), &mut self.buf[line..padded])?;
        let used = KSET_HEADER_SIZE_BYTES + count as usize * KEY_SIZE_BYTES;
        let is_good = context.seed.checksum(&self.buf[4..used]) == header.crc.get();
        if !is_good && !canary::is(Canary::KsetChecksumIgnored) {
            return Err(KsetError::Invalid);
        }
        Ok(Kset {
            kset_index: index,
            seq: Seq(header.seq.get()),
            epoch: Epoch(header.epoch.get()),
            off,
            size_bytes: u32::try_from(padded).map_err(|_| KsetError::Invalid)?,
            key_count: count,
            proof: Proof::of(header.flags.get()),
        })
    }
}

/// What the numbers of a kset's keys are held against (INV-OPEN-3): in blocks, so that nothing is converted for each of them.
#[derive(Clone, Copy, Debug)]
struct KeyBounds {
    base_block_count: u64,
    /// Blocks of a page differ in these bits alone.
    in_page: u64,
    /// Payloads lie behind the keys, and in the segment.
    place_min: u64,
    place_end: u64,
    /// The longest key without a payload.
    clear_len_max: u64,
    block_shift: u32,
}

impl KeyBounds {
    fn of(context: &KsetContext, kset: &Kset) -> Self {
        let geometry = &context.geometry;
        let block_shift = geometry.block_shift();
        let keys_end = u64::from(kset.off) + u64::from(kset.size_bytes);
        Self {
            base_block_count: context.base_block_count,
            in_page: u64::from(geometry.blocks_per_page()) - 1,
            place_min: keys_end.div_ceil(geometry.bytes(1)),
            place_end: geometry.segment_size_bytes() >> block_shift,
            clear_len_max: CLEAR_SIZE_MAX_BYTES >> block_shift,
            block_shift,
        }
    }

    /// A key, and whether its numbers are in range; it is not to be looked at if they are not.
    #[inline]
    fn decode(&self, media: &KeyOnMedia) -> (Key, bool) {
        let (key, is_known) = media.decode(self.block_shift);
        let kind = key.kind;
        let (lba, len) = (media.lba.get(), u64::from(media.len_blocks.get()));
        // Not behind its start if it has no blocks, or too many.
        let end = lba.wrapping_add(len);
        let is_on_base = lba < end && end <= self.base_block_count;
        let place = u64::from(media.place.get());
        let is_placed = if kind.has_payload() {
            let is_in_one_page = (lba ^ end.wrapping_sub(1)) <= self.in_page;
            is_in_one_page && place >= self.place_min && place + len <= self.place_end
        } else {
            place == 0 && len <= self.clear_len_max
        };
        (key, is_known && is_on_base && is_placed)
    }
}

#[cfg(test)]
mod tests;
