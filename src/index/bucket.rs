//! The words of a bucket: bookkeeping and slots.

use std::num::NonZeroUsize;

/// Words in a bucket; the first one is the bookkeeping.
pub(super) const BUCKET_WORDS: usize = 8;
/// Slots in a bucket.
pub(super) const BUCKET_SLOTS: usize = BUCKET_WORDS - 1;

/// How often a bucket was published to. A read fill compares two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Version(u64);

impl Version {
    /// Equal to no other version of a bucket: 36 bits wide ones never reach it.
    pub(crate) const UNSTABLE: Version = Version(u64::MAX);
}

/// The bookkeeping word: version (36 bits), entries that passed by (12), owner (16; 0: nobody).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meta(pub(super) u64);

impl Meta {
    const OWNER_BITS: u32 = 16;
    const PASSED_BITS: u32 = 12;
    const VERSION_SHIFT: u32 = Self::OWNER_BITS + Self::PASSED_BITS;
    /// Added for each entry that passes by. `PROBE_MAX` buckets of seven slots cannot overflow 12 bits.
    pub(super) const ONE_PASSED: u64 = 1 << Self::OWNER_BITS;

    pub(super) fn owner(self) -> u16 {
        (self.0 & 0xffff) as u16
    }

    pub(super) fn passed(self) -> u64 {
        (self.0 >> Self::OWNER_BITS) & ((1 << Self::PASSED_BITS) - 1)
    }

    pub(super) fn version(self) -> Version {
        Version(self.0 >> Self::VERSION_SHIFT)
    }

    pub(super) fn claimed_by(self, owner: u16) -> Self {
        Self(self.0 | u64::from(owner))
    }

    /// What is added to give up a claim and count a publication. The version wraps at the top of the word.
    pub(super) fn release_delta(owner: u16) -> u64 {
        (1u64 << Self::VERSION_SHIFT).wrapping_sub(u64::from(owner))
    }
}

/// What a slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotKind {
    Empty,
    /// Taken by a write that is under way; reads as absent.
    Reserved,
    /// The whole page lies at one place.
    Mapped,
    /// The whole page reads as zeroes; the payload names the segment whose key says so.
    Zero,
    /// The side table says, block by block; the payload tells one life of the line from the next.
    Split,
}

/// How the bits of a slot are used: kind (3 bits), distance from home (5), tag, payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlotLayout {
    payload_bits: u32,
    payload_mask: u64,
    key_mask: u64,
}

/// Distance and tag, at their places in a slot: tells the pages of one bucket apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotKey(u64);

/// Bits that tag and payload may take together.
pub(super) const TAG_AND_PAYLOAD_BITS_MAX: u32 = 56;
/// How many buckets, the home one included, may hold a page.
pub(super) const PROBE_MAX: usize = 32;

/// The kind of a slot lies from this bit on.
const KIND_SHIFT: u32 = 61;
/// And its distance from home from this one.
const DISTANCE_SHIFT: u32 = 56;

impl SlotKind {
    fn bits(self) -> u64 {
        let code: u64 = match self {
            SlotKind::Empty => 0,
            SlotKind::Reserved => 1,
            SlotKind::Mapped => 2,
            SlotKind::Zero => 3,
            SlotKind::Split => 4,
        };
        code << KIND_SHIFT
    }
}

impl SlotLayout {
    pub(super) fn new(payload_bits: u32, tag_bits: u32) -> Self {
        assert!(payload_bits + tag_bits <= TAG_AND_PAYLOAD_BITS_MAX);
        let payload_mask = (1 << payload_bits) - 1;
        let tag_mask = ((1 << tag_bits) - 1) << payload_bits;
        let distance_mask = (PROBE_MAX as u64 - 1) << DISTANCE_SHIFT;
        Self {
            payload_bits,
            payload_mask,
            key_mask: distance_mask | tag_mask,
        }
    }

    #[inline]
    pub(super) fn key(self, distance: usize, tag: u64) -> SlotKey {
        debug_assert!(distance < PROBE_MAX);
        // Masks that depend on the sizes take the place of shifts that do: each would be checked. This one is
        // by less than 56.
        SlotKey((distance as u64) << DISTANCE_SHIFT | tag.wrapping_shl(self.payload_bits))
    }

    #[inline]
    pub(super) fn make(self, kind: SlotKind, key: SlotKey, payload: u64) -> u64 {
        debug_assert!(payload <= self.payload_mask);
        kind.bits() | key.0 | payload
    }

    pub(super) fn kind(self, slot: u64) -> SlotKind {
        match slot >> KIND_SHIFT {
            1 => SlotKind::Reserved,
            2 => SlotKind::Mapped,
            3 => SlotKind::Zero,
            4 => SlotKind::Split,
            _ => SlotKind::Empty,
        }
    }

    pub(super) fn payload_mask(self) -> u64 {
        self.payload_mask
    }

    pub(super) fn payload(self, slot: u64) -> u64 {
        slot & self.payload_mask
    }

    /// The key of the page that a slot holds.
    #[inline]
    pub(super) fn key_of(self, slot: u64) -> SlotKey {
        SlotKey(slot & self.key_mask)
    }

    pub(super) fn distance(self, slot: u64) -> usize {
        (slot >> DISTANCE_SHIFT & (PROBE_MAX as u64 - 1)) as usize
    }

    /// Whether a slot holds the page of this key.
    #[inline]
    pub(super) fn is(self, slot: u64, key: SlotKey) -> bool {
        slot & self.key_mask == key.0 && slot >> KIND_SHIFT != 0
    }
}

/// The slot of a page, found or taken by the holder of its claim. It stays that page's until the claim is given
/// up: entries never move, and only the holder removes one (`evict`, `unreserve`; what `make_room`
/// removes it has claimed itself just before). Neighbours come and go in other slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageSlot {
    /// Number of the word among those of all buckets. Never 0, which is bookkeeping, so that two registers take
    /// a result of this.
    word: NonZeroUsize,
    /// Distance and tag of the page. Of kind `Reserved` if the slot was taken for this write, and reads as absent
    /// until it is published; of kind `Empty` if the page had it already.
    value: u64,
}

impl PageSlot {
    #[inline]
    pub(super) fn new(bucket: usize, number: usize, value: u64) -> Self {
        // Slots are numbered from 1.
        let Some(word) = NonZeroUsize::new(bucket * BUCKET_WORDS + number) else {
            unreachable!("word 0 is the bookkeeping of the first bucket")
        };
        Self { word, value }
    }

    pub(super) fn bucket(self) -> usize {
        self.word.get() / BUCKET_WORDS
    }

    pub(super) fn number(self) -> usize {
        self.word.get() % BUCKET_WORDS
    }

    pub(super) fn value(self) -> u64 {
        self.value
    }
}
