//! The words of a bucket: bookkeeping and slots.

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
    pub(super) payload_bits: u32,
    pub(super) tag_bits: u32,
}

/// Bits that tag and payload may take together.
pub(super) const TAG_AND_PAYLOAD_BITS_MAX: u32 = 56;
/// How many buckets, the home one included, may hold a page.
pub(super) const PROBE_MAX: usize = 32;

impl SlotLayout {
    pub(super) fn make(self, kind: SlotKind, distance: usize, tag: u64, payload: u64) -> u64 {
        debug_assert!(payload <= self.payload_mask());
        debug_assert!(distance < PROBE_MAX);
        let code: u64 = match kind {
            SlotKind::Empty => 0,
            SlotKind::Reserved => 1,
            SlotKind::Mapped => 2,
            SlotKind::Zero => 3,
            SlotKind::Split => 4,
        };
        code << 61 | (distance as u64) << 56 | tag << self.payload_bits | payload
    }

    pub(super) fn kind(self, slot: u64) -> SlotKind {
        match slot >> 61 {
            1 => SlotKind::Reserved,
            2 => SlotKind::Mapped,
            3 => SlotKind::Zero,
            4 => SlotKind::Split,
            _ => SlotKind::Empty,
        }
    }

    pub(super) fn payload_mask(self) -> u64 {
        (1 << self.payload_bits) - 1
    }

    pub(super) fn payload(self, slot: u64) -> u64 {
        slot & self.payload_mask()
    }

    pub(super) fn distance(self, slot: u64) -> usize {
        (slot >> 56 & (PROBE_MAX as u64 - 1)) as usize
    }

    /// The same page under another kind and payload.
    pub(super) fn with(self, slot: u64, kind: SlotKind, payload: u64) -> u64 {
        let tag = slot >> self.payload_bits & ((1 << self.tag_bits) - 1);
        self.make(kind, self.distance(slot), tag, payload)
    }

    /// Whether a slot holds the page of this tag, seen so far from its home.
    pub(super) fn is(self, slot: u64, distance: usize, tag: u64) -> bool {
        slot >> 61 != 0
            && slot << 3 >> 3 >> self.payload_bits
                == ((distance as u64) << 56 | tag << self.payload_bits) >> self.payload_bits
    }
}
