//! The words of a bucket: bookkeeping and slots.

use super::GROUP_PAGES;
use super::map::{BlockMap, PAGE_BLOCKS_MAX, Run};
use crate::media::Place;
use crate::sched;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};

/// Words in a bucket; the first one is the bookkeeping.
pub(super) const BUCKET_WORDS: usize = 8;
/// Slots in a bucket.
pub(super) const BUCKET_SLOTS: usize = BUCKET_WORDS - 1;

/// How often a bucket was held: by somebody who wrote to one of its pages (36 bits), and by others (8 bits below
/// those; one of 256 that carries over counts as a write).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Version(u64);

impl Version {
    /// Later than no other version of a bucket: 44 bits wide ones never reach it.
    pub(crate) const UNSTABLE: Version = Version(u64::MAX);
    const OTHERS_BITS: u32 = 8;

    /// Whether the pages of the bucket hold the same as they did `then`, cached or not.
    #[inline]
    pub(crate) fn is_unwritten_since(self, then: Version) -> bool {
        self.0 >> Self::OTHERS_BITS == then.0 >> Self::OTHERS_BITS && then != Version::UNSTABLE
    }
}

/// What the holder of a bucket has done to the content of its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Some may hold something new.
    Written,
    /// At most, what they hold came into the cache, left it, or lies elsewhere now.
    Moved,
}

/// The highest number of a holder.
pub(crate) const OWNER_MAX: u16 = (1 << Meta::OWNER_BITS) - 1;

/// The bookkeeping word: version (44 bits), entries that passed by (10), owner (10; 0: nobody).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meta(pub(super) u64);

impl Meta {
    const OWNER_BITS: u32 = 10;
    const PASSED_BITS: u32 = 10;
    const VERSION_SHIFT: u32 = Self::OWNER_BITS + Self::PASSED_BITS;
    /// Added for each entry that passes by. `PROBE_MAX` buckets of seven slots, and one more for each agent that is just
    /// removing one, cannot overflow 10 bits.
    pub(super) const ONE_PASSED: u64 = 1 << Self::OWNER_BITS;

    pub(super) fn owner(self) -> u16 {
        (self.0 & u64::from(OWNER_MAX)) as u16
    }

    pub(super) fn passed(self) -> u64 {
        (self.0 >> Self::OWNER_BITS) & ((1 << Self::PASSED_BITS) - 1)
    }

    pub(super) fn version(self) -> Version {
        Version(self.0 >> Self::VERSION_SHIFT)
    }

    pub(super) fn claimed_by(self, owner: u16) -> Self {
        debug_assert!(owner <= OWNER_MAX);
        Self(self.0 | u64::from(owner))
    }

    /// What is added to give up a claim and count it. The version wraps at the top of the word.
    #[inline]
    pub(super) fn release_delta(owner: u16, change: Change) -> u64 {
        let count = match change {
            Change::Written => 1u64 << (Self::VERSION_SHIFT + Version::OTHERS_BITS),
            Change::Moved => 1u64 << Self::VERSION_SHIFT,
        };
        count.wrapping_sub(u64::from(owner))
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
    /// Some blocks of the page, neighbours, lie at one place; the payload says which. The rest is absent.
    MappedRun,
    /// Some blocks of the page, neighbours, read as zeroes; as above.
    ZeroRun,
    /// A line of the side table says, block by block; the payload is its number.
    Split,
}

/// How the bits of a slot are used: kind (3 bits), distance from home (5), tag, payload.
///
/// A payload is a place; or a place, and above it the first block of a run (3 bits) and one less than its
/// length (3); or the number of a line.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlotLayout {
    payload_bits: u32,
    payload_mask: u64,
    key_mask: u64,
    place_bits: u32,
}

/// What slots must have room for.
#[derive(Clone, Copy, Debug)]
pub(super) struct PayloadBits {
    /// For a place, from 0 to less than a power of two.
    pub(super) place_bits: u32,
    /// For the number of a line; `None`: there are none, nor runs.
    pub(super) line_bits: Option<u32>,
}

impl PayloadBits {
    /// Bits that this leaves for a tag; `None`: not even none.
    pub(super) fn tag_bits_max(self) -> Option<u32> {
        let needed = match self.line_bits {
            None => self.place_bits,
            Some(line_bits) => (self.place_bits + RUN_BITS).max(line_bits),
        };
        TAG_AND_PAYLOAD_BITS.checked_sub(needed)
    }
}

/// Distance and tag, at their places in a slot: tells the pages of one bucket apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotKey(u64);

/// Bits that tag and payload take together.
const TAG_AND_PAYLOAD_BITS: u32 = 56;
/// Bits for the first block of a run, and as many for its length.
const RUN_END_BITS: u32 = PAGE_BLOCKS_MAX.ilog2();
const RUN_BITS: u32 = 2 * RUN_END_BITS;
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
            SlotKind::MappedRun => 5,
            SlotKind::ZeroRun => 6,
        };
        code << KIND_SHIFT
    }
}

/// Slots of a bucket whose value is so, a bit for each: that of its number.
#[inline(always)]
fn matching_slots(words: &[AtomicU64; BUCKET_WORDS], is_so: impl Fn(u64) -> bool) -> u32 {
    let matches = |(number, word): (u32, &AtomicU64)| {
        u32::from(is_so(word.load(Ordering::Acquire))) << number
    };
    (1..)
        .zip(&words[1..])
        .map(matches)
        .fold(0, |all, one| all | one)
}

#[inline(always)]
fn first_slot(words: &[AtomicU64; BUCKET_WORDS], is_so: impl Fn(u64) -> bool) -> Option<usize> {
    let matching = matching_slots(words, is_so);
    (matching != 0).then(|| matching.trailing_zeros() as usize)
}

impl SlotLayout {
    /// The payload takes what tags of `tag_bits` bits leave, which must be no more than there is.
    pub(super) fn new(bits: PayloadBits, tag_bits: u32) -> Self {
        assert!(
            bits.tag_bits_max().is_some_and(|max| tag_bits <= max),
            "no room for tags of {tag_bits} bits beside {bits:?}"
        );
        let payload_bits = TAG_AND_PAYLOAD_BITS - tag_bits;
        let payload_mask = (1 << payload_bits) - 1;
        let tag_mask = ((1 << tag_bits) - 1) << payload_bits;
        let distance_mask = (PROBE_MAX as u64 - 1) << DISTANCE_SHIFT;
        Self {
            payload_bits,
            payload_mask,
            key_mask: distance_mask | tag_mask,
            place_bits: bits.place_bits,
        }
    }

    #[inline]
    pub(super) fn key(self, distance: usize, tag: u64) -> SlotKey {
        debug_assert!(distance < PROBE_MAX);
        // Masks that depend on the sizes take the place of shifts that do: each would be checked. This one is
        // by 56 at the most.
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
            5 => SlotKind::MappedRun,
            6 => SlotKind::ZeroRun,
            _ => SlotKind::Empty,
        }
    }

    pub(super) fn payload(self, slot: u64) -> u64 {
        slot & self.payload_mask
    }

    /// Where what a slot holds begins; zeroes, where the key lies that says so. `None`: it holds nothing, or its line says.
    #[inline]
    pub(super) fn place(self, slot: u64) -> Option<Place> {
        match self.kind(slot) {
            SlotKind::Empty | SlotKind::Reserved | SlotKind::Split => None,
            SlotKind::Mapped | SlotKind::Zero => Some(Place(self.payload(slot))),
            SlotKind::MappedRun | SlotKind::ZeroRun => Some(self.run(slot).place()),
        }
    }

    /// A slot for some blocks of a page, of which one at the least is not absent.
    pub(super) fn make_run(self, key: SlotKey, run: Run) -> u64 {
        let ends = u64::from(run.first | (run.len_blocks - 1) << RUN_END_BITS);
        let (kind, Place(place)) = match run.map {
            BlockMap::Mapped(place) => (SlotKind::MappedRun, place),
            BlockMap::Zero(place) => (SlotKind::ZeroRun, place),
            BlockMap::Absent => unreachable!("a run lies somewhere"),
        };
        self.make(kind, key, ends.wrapping_shl(self.place_bits) | place)
    }

    /// What a slot of kind `MappedRun` or `ZeroRun` says.
    pub(super) fn run(self, slot: u64) -> Run {
        let payload = self.payload(slot);
        let place = Place(payload & (1u64.wrapping_shl(self.place_bits) - 1));
        let ends = payload.wrapping_shr(self.place_bits) as u32;
        let end_mask = (1 << RUN_END_BITS) - 1;
        Run {
            first: ends & end_mask,
            len_blocks: (ends >> RUN_END_BITS & end_mask) + 1,
            map: match self.kind(slot) {
                SlotKind::ZeroRun => BlockMap::Zero(place),
                _ => BlockMap::Mapped(place),
            },
        }
    }

    /// The line that a slot of kind `Split` names.
    pub(super) fn line(self, slot: u64) -> u32 {
        // Lines have numbers of 32 bits.
        self.payload(slot) as u32
    }

    /// The key of the page that a slot holds.
    #[inline]
    pub(super) fn key_of(self, slot: u64) -> SlotKey {
        SlotKey(slot & self.key_mask)
    }

    /// The tag of the page that a slot holds.
    pub(super) fn tag(self, slot: u64) -> u64 {
        let tag_mask = (1u64 << DISTANCE_SHIFT) - 1;
        (slot & self.key_mask & tag_mask).wrapping_shr(self.payload_bits)
    }

    pub(super) fn distance(self, slot: u64) -> usize {
        (slot >> DISTANCE_SHIFT & (PROBE_MAX as u64 - 1)) as usize
    }

    /// The slot of a bucket that holds the page of this key. All are looked at, without a branch: in which of seven a page
    /// lies, no CPU foresees.
    #[inline(always)]
    pub(super) fn slot_of(self, words: &[AtomicU64; BUCKET_WORDS], key: SlotKey) -> Option<usize> {
        if key.0 == 0 {
            return first_slot(words, |value| self.is(value, key));
        }
        // What is empty has no bit of the key.
        first_slot(words, |value| value & self.key_mask == key.0)
    }

    /// A slot of a bucket in which nothing is: the last one.
    #[inline]
    pub(super) fn free_slot(words: &[AtomicU64; BUCKET_WORDS]) -> Option<usize> {
        let empty = matching_slots(words, |value| value == 0);
        empty.checked_ilog2().map(|number| number as usize)
    }

    /// What `tell` says, of its number and its value, of the slot of each page of a group, of the first of which this is the
    /// key; 0 of those that are not there. One look serves all, where [`SlotLayout::slot_of`] would take one for each. All are
    /// 0 where the key is, which is not told from what is empty.
    #[inline(always)]
    pub(super) fn of_group(
        self,
        words: &[AtomicU64; BUCKET_WORDS],
        first: SlotKey,
        tell: impl Fn(u64, u64) -> u64,
    ) -> [u64; GROUP_PAGES as usize] {
        const OTHERS: usize = GROUP_PAGES as usize;
        // As wide as they are loaded, or the loads would wait for the stores.
        let mut told = [0; OTHERS + 1];
        for (number, word) in (1..).zip(&words[1..]) {
            sched::point();
            let value = word.load(Ordering::Acquire);
            let differs = (value ^ first.0) & self.key_mask;
            let member = differs.wrapping_shr(self.payload_bits) as usize;
            told[member.min(OTHERS)] = tell(number, value);
        }
        if first.0 == 0 {
            return [0; OTHERS];
        }
        let [members @ .., _] = told;
        members
    }

    /// Whether a slot holds the page of this key.
    #[inline]
    pub(super) fn is(self, slot: u64, key: SlotKey) -> bool {
        // One that is not empty has bits of its kind.
        (slot & self.key_mask == key.0) & (slot != 0)
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

    /// Number of the word among those of all buckets.
    pub(super) fn word(self) -> usize {
        self.word.get()
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
