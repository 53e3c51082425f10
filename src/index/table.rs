//! The table itself: look-up, claim, reserve, publish, evict.

mod change;
#[cfg(any(test, feature = "sim"))]
mod check;
mod prefetch;
mod sample;
mod sizes;
mod sweep;
mod visit;

use super::bucket::{Change, Meta, PROBE_MAX, PageSlot, SlotKey, SlotKind, SlotLayout, Version};
use super::map::{BlockMap, Blocks, PageMap};
use super::side::SideTable;
use crate::canary::{self, Canary};
use crate::media::{Geometry, Place};
use crate::memory::NoMemory;
use crate::pmem::Lines;
use crate::sched;
use crate::units::Page;
pub(crate) use change::EarlierParts;
use sizes::Sizes;
use std::sync::atomic::{AtomicU64, Ordering};

/// 2^64 divided by the golden ratio: multiples of it spread evenly (Knuth, TAOCP 6.4), so that most pages in a row find
/// slots at home.
pub(crate) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
/// Pages of an aligned group of so many (a power of two) share a bucket: requests of several pages, and the log of what
/// was written in order, touch fewer lines. More would fill buckets too unevenly.
pub(crate) const GROUP_PAGES: u64 = 4;
/// Pages of a group differ in so many bits, which are the lowest of the tag.
const GROUP_BITS: u32 = GROUP_PAGES.ilog2();
/// Upper bits of a page number are folded into lower ones, so that pages far apart in regular steps spread too.
const FOLD_SHIFTS: [u32; 2] = [7, 13];
/// How often a reader looks again when a line changes under its eyes.
const SPLIT_READ_TRIES: usize = 16;

/// A look-up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lookup {
    pub(crate) map: PageMap,
    /// Of the bucket, read before the slot.
    pub(crate) version: Version,
}

/// Where the entry of a page is to be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotRef {
    bucket: usize,
    tag: u64,
}

impl SlotRef {
    /// The home bucket: what a claim is taken on.
    pub(crate) fn bucket(&self) -> usize {
        self.bucket
    }

    #[cfg(test)]
    pub(crate) fn tag(&self) -> u64 {
        self.tag
    }

    /// The page so many behind this one, of the same group.
    #[inline]
    pub(crate) fn later(self, page_count: u64) -> Self {
        let tag = self.tag + page_count;
        debug_assert_eq!(tag >> GROUP_BITS, self.tag >> GROUP_BITS);
        Self { tag, ..self }
    }
}

/// How an attempt to claim a bucket ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// It is the caller's now, and must be released.
    Taken,
    /// It was the caller's already.
    Held,
    /// Somebody else holds it.
    Busy,
}

/// No slot within reach of the page's home bucket is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IndexFull;

/// See the module.
#[derive(Debug)]
pub(crate) struct Index {
    buckets: Lines<AtomicU64>,
    bucket_count: u64,
    /// `None` where a page is one block.
    side: Option<SideTable>,
    layout: SlotLayout,
    page_count_max: u64,
    /// Odd, and then shifted so that the bits of the number of a group come out at the top of a word.
    multiplier: u64,
    /// Brings all but one of the bits above a group's part of the tag out of a word.
    tag_shift: u32,
    blocks_per_page: u32,
    geometry: Geometry,
}

impl Index {
    /// An empty index for a base of `base_page_count` pages. `factor` enlarges it beyond what the cache device
    /// has room for.
    ///
    /// # Errors
    /// There is no memory.
    ///
    /// # Panics
    /// The base has more pages than [`Index::page_count_max_of`] says.
    pub(crate) fn new(
        geometry: Geometry,
        base_page_count: u64,
        factor: u64,
    ) -> Result<Self, NoMemory> {
        let sizes = Sizes::new(&geometry, base_page_count, factor);
        assert!(
            base_page_count <= sizes.page_count_max(),
            "a base of {base_page_count} pages is too large for the index"
        );
        let bucket_lines = usize::try_from(sizes.bucket_count).unwrap_or(usize::MAX);
        let tag_bits = sizes.tag_bits();
        let hash_shift = 64 - (sizes.page_bits - GROUP_BITS);
        let buckets = Lines::new_dense("the index", bucket_lines)?;
        let side = (sizes.line_count > 0)
            .then(|| SideTable::new(sizes.line_count, geometry.place_bits()))
            .transpose()?;
        Ok(Self {
            buckets,
            bucket_count: sizes.bucket_count,
            side,
            layout: SlotLayout::new(sizes.payload, tag_bits),
            page_count_max: sizes.page_count_max(),
            multiplier: (GOLDEN >> hash_shift | 1) << hash_shift,
            tag_shift: 63 - (tag_bits - GROUP_BITS),
            blocks_per_page: geometry.blocks_per_page(),
            geometry,
        })
    }

    /// How many pages a base may have with an index that is made for `base_page_count`; fewer than that, if
    /// those are too many already.
    pub(crate) fn page_count_max_of(geometry: &Geometry, base_page_count: u64) -> u64 {
        Sizes::new(geometry, base_page_count, 1).page_count_max()
    }

    /// How many pages the base may come to have while this is in use: the table serves them all, with the slots
    /// that it has.
    pub(crate) fn page_count_max(&self) -> u64 {
        self.page_count_max
    }

    /// DRAM in use, in bytes: the table, and as much of the side table as was ever needed.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.bucket_count * 64 + self.side.as_ref().map_or(0, SideTable::used_bytes)
    }

    /// How many buckets there are.
    pub(crate) fn bucket_count(&self) -> usize {
        self.bucket_count as usize
    }

    /// Where the entry of a page would be. Equal for no two pages (INV-INDEX-7).
    #[inline]
    pub(crate) fn locate(&self, page: Page) -> SlotRef {
        let [near, far] = FOLD_SHIFTS;
        let (group, member) = (page.0 >> GROUP_BITS, page.0 & (GROUP_PAGES - 1));
        let mixed = group ^ group >> near ^ group >> far;
        let hash = mixed.wrapping_mul(self.multiplier);
        let wide = u128::from(hash) * u128::from(self.bucket_count);
        // Two hashes are 2^(64 - bits) apart or more, so within a bucket their low parts differ by
        // bucket_count times that: the upper bits of them, as many as the tag has besides the member's, are different.
        let low = wide as u64;
        // Two shifts, since there may be no such bits; by less than 64, by construction.
        let group_tag = (low >> 1).wrapping_shr(self.tag_shift);
        SlotRef {
            bucket: (wide >> 64) as usize,
            tag: group_tag << GROUP_BITS | member,
        }
    }

    /// Asks for the home bucket of a page to be brought into the cache.
    #[inline]
    pub(crate) fn prefetch(&self, at: SlotRef) {
        self.prefetch_bucket(at.bucket);
    }

    /// As [`Index::prefetch`], to be claimed: other cores are to give it up meanwhile.
    #[inline]
    pub(crate) fn prefetch_to_claim(&self, at: SlotRef) {
        crate::pmem::prefetch_line_to_write(self.meta(at.bucket));
    }

    /// Asks for a bucket to be brought into the cache.
    #[inline]
    pub(crate) fn prefetch_bucket(&self, bucket: usize) {
        crate::pmem::prefetch_line(&self.buckets.line(bucket)[0]);
    }

    #[inline]
    fn meta(&self, bucket: usize) -> &AtomicU64 {
        &self.buckets.line(bucket)[0]
    }

    fn bucket_at(&self, home: usize, distance: usize) -> usize {
        let bucket = home + distance;
        let count = self.bucket_count as usize;
        if bucket >= count {
            bucket - count
        } else {
            bucket
        }
    }

    fn home_of(&self, bucket: usize, distance: usize) -> usize {
        if bucket >= distance {
            bucket - distance
        } else {
            bucket + self.bucket_count as usize - distance
        }
    }

    /// The slot of a page: bucket and number of the slot, and its value.
    #[inline]
    fn find(&self, at: SlotRef) -> Option<(usize, usize, u64)> {
        // Most pages lie in their home bucket.
        let words = self.buckets.line(at.bucket);
        let key = self.layout.key(0, at.tag);
        if let Some(slot) = self.layout.slot_of(words, key) {
            sched::point();
            let value = words[slot].load(Ordering::Acquire);
            // Or it has just left the slot, and may lie in another one by now.
            return if self.layout.is(value, key) {
                Some((at.bucket, slot, value))
            } else {
                self.find_from(at, 0)
            };
        }
        if Meta(words[0].load(Ordering::Acquire)).passed() == 0 {
            return None;
        }
        self.find_from(at, 1)
    }

    /// As [`Index::find`], in the buckets from this distance on.
    #[inline(never)]
    fn find_from(&self, at: SlotRef, distance: usize) -> Option<(usize, usize, u64)> {
        for distance in distance..PROBE_MAX {
            let bucket = self.bucket_at(at.bucket, distance);
            let words = self.buckets.line(bucket);
            let key = self.layout.key(distance, at.tag);
            for (slot, word) in (1..).zip(&words[1..]) {
                let value = word.load(Ordering::Acquire);
                if self.layout.is(value, key) {
                    return Some((bucket, slot, value));
                }
            }
            if Meta(words[0].load(Ordering::Acquire)).passed() == 0 {
                return None;
            }
        }
        None
    }

    /// What is known of a page. `None`: it changes too fast, ask again later.
    #[inline]
    pub(crate) fn lookup(&self, at: SlotRef) -> Option<Lookup> {
        for _ in 0..SPLIT_READ_TRIES {
            sched::point();
            let meta = Meta(self.meta(at.bucket).load(Ordering::Acquire));
            let version = if meta.owner() == 0 {
                meta.version()
            } else {
                Version::UNSTABLE
            };
            sched::point();
            let Some(found) = self.find(at) else {
                let map = PageMap::Whole(BlockMap::Absent);
                return Some(Lookup { map, version });
            };
            let (_, _, value) = found;
            let place = Place(self.layout.payload(value));
            let map = match self.layout.kind(value) {
                SlotKind::Mapped => PageMap::Whole(BlockMap::Mapped(place)),
                SlotKind::Zero => PageMap::Whole(BlockMap::Zero(place)),
                SlotKind::Empty | SlotKind::Reserved => PageMap::Whole(BlockMap::Absent),
                SlotKind::MappedRun | SlotKind::ZeroRun => {
                    PageMap::Blocks(self.layout.run(value).alone())
                }
                SlotKind::Split => match self.look_at_line(at, meta.version(), found) {
                    Some(blocks) => PageMap::Blocks(blocks),
                    None => continue,
                },
            };
            return Some(Lookup { map, version });
        }
        None
    }

    /// What is known of the pages of a group, of which this is the first, where it is the same for all blocks of one. `None`:
    /// it is not, or nothing is known, or the page has no slot in its home bucket, or its tag does not tell (see
    /// [`SlotLayout::of_group`]); then there is [`Index::lookup`].
    #[inline]
    pub(crate) fn lookup_group(&self, first: SlotRef) -> [Option<BlockMap>; GROUP_PAGES as usize] {
        let words = self.buckets.line(first.bucket);
        let key = self.layout.key(0, first.tag);
        let values = self.layout.of_group(words, key, |_, value| value);
        values.map(|value| {
            let place = Place(self.layout.payload(value));
            match self.layout.kind(value) {
                SlotKind::Mapped => Some(BlockMap::Mapped(place)),
                SlotKind::Zero => Some(BlockMap::Zero(place)),
                _ => None,
            }
        })
    }

    /// What the line of a split page says, unless the page has changed since its slot was `found`. The line may
    /// have become another page's. It may even be this one's again; not while the bucket has had one holder
    /// alone (INV-INDEX-9), of which the version tells.
    #[inline(never)]
    fn look_at_line(
        &self,
        at: SlotRef,
        version: Version,
        found: (usize, usize, u64),
    ) -> Option<Blocks> {
        sched::point();
        let blocks = self.side().read(self.layout.line(found.2));
        sched::point();
        let unchanged = self.find(at) == Some(found) && self.version(at) == version;
        (unchanged || canary::is(Canary::SplitReadOnce)).then_some(blocks)
    }

    fn side(&self) -> &SideTable {
        match &self.side {
            Some(side) => side,
            None => unreachable!("INV-INDEX-3: a page of one block is never split"),
        }
    }

    /// Claims the home bucket of a page for `owner`, which is not 0.
    #[inline]
    pub(crate) fn claim(&self, at: SlotRef, owner: u16) -> Claim {
        self.claim_bucket(at.bucket, owner)
    }

    #[inline]
    fn claim_bucket(&self, bucket: usize, owner: u16) -> Claim {
        sched::point();
        let word = self.meta(bucket);
        let mut meta = Meta(word.load(Ordering::Relaxed));
        // The word also changes when a neighbour's entry passes by: then it is worth another try, but not
        // an endless one.
        for _ in 0..4 {
            if meta.owner() == owner {
                return Claim::Held;
            }
            if meta.owner() != 0 {
                return Claim::Busy;
            }
            let claimed = meta.claimed_by(owner);
            match word.compare_exchange_weak(
                meta.0,
                claimed.0,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Claim::Taken,
                Err(now) => meta = Meta(now),
            }
        }
        Claim::Busy
    }

    /// The version of a page's bucket.
    pub(crate) fn version(&self, at: SlotRef) -> Version {
        Meta(self.meta(at.bucket).load(Ordering::Acquire)).version()
    }

    /// Gives up a claim. What was published before becomes visible, and the version counts up.
    #[inline]
    pub(crate) fn release(&self, bucket: usize, owner: u16, change: Change) {
        sched::point();
        let before = self
            .meta(bucket)
            .fetch_add(Meta::release_delta(owner, change), Ordering::Release);
        debug_assert_eq!(
            Meta(before).owner(),
            owner,
            "INV-INDEX-4: a claim is released by its holder"
        );
    }

    /// The slots of the pages of a group, of which this is the first, for the holder of their claim. `None`: it has none in its
    /// home bucket, or its tag does not tell (see [`SlotLayout::of_group`]); then there is [`Index::reserve`].
    #[inline]
    pub(crate) fn slots_of_group(
        &self,
        first: SlotRef,
    ) -> [Option<PageSlot>; GROUP_PAGES as usize] {
        let words = self.buckets.line(first.bucket);
        let key = self.layout.key(0, first.tag);
        let numbers = self.layout.of_group(words, key, |number, _| number);
        std::array::from_fn(|member| {
            let (number, at) = (numbers[member] as usize, first.later(member as u64));
            let key = self.layout.key(0, at.tag);
            (number > 0).then(|| self.held_slot(first.bucket, number, key))
        })
    }

    /// The slot of a page that is there: only the holder of the claim removes it.
    #[inline(always)]
    fn held_slot(&self, bucket: usize, number: usize, key: SlotKey) -> PageSlot {
        PageSlot::new(bucket, number, self.layout.make(SlotKind::Empty, key, 0))
    }

    /// Makes sure that the page has a slot, for the holder of the claim. One that was not there before is given
    /// back by [`Index::unreserve`].
    #[inline]
    pub(crate) fn reserve(&self, at: SlotRef) -> Result<PageSlot, IndexFull> {
        // Most pages lie in their home bucket, or have room in it.
        let words = self.buckets.line(at.bucket);
        let key = self.layout.key(0, at.tag);
        if let Some(number) = self.layout.slot_of(words, key) {
            return Ok(self.held_slot(at.bucket, number, key));
        }
        // It lies nowhere else if no entry passed by, and the claim keeps everybody else from putting it there.
        if let Some(number) = SlotLayout::free_slot(words)
            && Meta(words[0].load(Ordering::Acquire)).passed() == 0
        {
            let reserved = self.layout.make(SlotKind::Reserved, key, 0);
            if take(&words[number], reserved) {
                return Ok(PageSlot::new(at.bucket, number, reserved));
            }
        }
        self.reserve_far(at)
    }

    /// As [`Index::reserve`], wherever the page lies or there is room.
    #[inline(never)]
    fn reserve_far(&self, at: SlotRef) -> Result<PageSlot, IndexFull> {
        if let Some((bucket, number, value)) = self.find(at) {
            return Ok(self.held_slot(bucket, number, self.layout.key_of(value)));
        }
        for distance in 0..PROBE_MAX {
            let bucket = self.bucket_at(at.bucket, distance);
            let key = self.layout.key(distance, at.tag);
            let reserved = self.layout.make(SlotKind::Reserved, key, 0);
            let words = self.buckets.line(bucket);
            for (number, word) in (1..).zip(&words[1..]) {
                if word.load(Ordering::Relaxed) == 0 && take(word, reserved) {
                    self.count_passed(at.bucket, distance, Meta::ONE_PASSED);
                    return Ok(PageSlot::new(bucket, number, reserved));
                }
            }
        }
        Err(IndexFull)
    }

    /// Adds `delta` to the bookkeeping of the buckets between a page's home and where it lies.
    fn count_passed(&self, home: usize, distance: usize, delta: u64) {
        for passed in 0..distance {
            self.meta(self.bucket_at(home, passed))
                .fetch_add(delta, Ordering::AcqRel);
        }
    }

    /// The geometry that places refer to.
    pub(crate) fn geometry(&self) -> &Geometry {
        &self.geometry
    }
}

/// Whether a free slot is the caller's now.
fn take(word: &AtomicU64, reserved: u64) -> bool {
    word.compare_exchange(0, reserved, Ordering::AcqRel, Ordering::Relaxed)
        .is_ok()
}
