//! The table itself: look-up, claim, reserve, publish, evict.

#[cfg(any(test, feature = "sim"))]
mod check;
mod prefetch;
mod sweep;

use super::bucket::{
    BUCKET_SLOTS, BUCKET_WORDS, Meta, PROBE_MAX, PageSlot, SlotKind, SlotLayout, Version,
};
use super::lines::Lines;
use crate::canary::{self, Canary};
use crate::media::{Geometry, Place};
use crate::sched;
use crate::units::Page;
use std::sync::atomic::{AtomicU64, Ordering};

/// An odd number near 2^64 divided by the golden ratio: multiples of it spread evenly (Knuth, TAOCP 6.4).
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
/// Slots that are filled when as many pages are cached as the cache device has room for, in percent.
const LOAD_PERCENT: u64 = 78;
/// Bigger bases would not leave room for the tags.
pub(crate) const BASE_PAGES_MAX: u64 = 1 << 48;
/// Blocks in a page, at most.
const PAGE_BLOCKS_MAX: usize = 8;
/// How often a reader looks again when a line changes under its eyes.
const SPLIT_READ_TRIES: usize = 16;

const SUB_ABSENT: u64 = 0;
const SUB_MAPPED: u64 = 1 << 62;
const SUB_ZERO: u64 = 2 << 62;
const SUB_KIND_MASK: u64 = 3 << 62;

/// What is known of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockMap {
    /// Not cached.
    Absent,
    /// Lies here.
    Mapped(Place),
    /// Zeroes; the key that says so lies in the segment of this place.
    Zero(Place),
}

/// What is known of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageMap {
    /// The same for all blocks; places count up from the first one.
    Whole(BlockMap),
    /// Block by block.
    Split([BlockMap; PAGE_BLOCKS_MAX]),
}

impl PageMap {
    /// What is known of block number `block` of the page.
    pub(crate) fn block(&self, block: u32) -> BlockMap {
        match self {
            PageMap::Whole(BlockMap::Mapped(place)) => {
                BlockMap::Mapped(Place(place.0 + u64::from(block)))
            }
            PageMap::Whole(map) => *map,
            PageMap::Split(blocks) => blocks[block as usize],
        }
    }
}

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

/// What a page, or a part of one, is set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The first block of the range lies here, the others behind it.
    Mapped(Place),
    /// Zeroes, by a key in the segment of this place.
    Zero(Place),
}

/// No slot within reach of the page's home bucket is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IndexFull;

/// See the module.
#[derive(Debug)]
pub(crate) struct Index {
    buckets: Lines,
    bucket_count: u64,
    /// A line for each slot; empty where a page is one block.
    splits: Option<Lines>,
    split_lives: AtomicU64,
    layout: SlotLayout,
    /// Upper half of the bits of a page number, which is folded into the lower one.
    fold_shift: u32,
    /// Brings the bits of a page number to the top of a word.
    hash_shift: u32,
    /// Brings all but one of the bits above a tag out of a word.
    tag_shift: u32,
    blocks_per_page: u32,
    geometry: Geometry,
}

impl Index {
    /// How many pages the base may come to have while this is in use.
    pub(crate) fn page_count_max(&self) -> u64 {
        1 << (64 - self.hash_shift)
    }

    /// An empty index for a base of `base_page_count` pages, at most [`BASE_PAGES_MAX`]. `factor` enlarges
    /// it beyond what the cache device has room for.
    pub(crate) fn new(geometry: Geometry, base_page_count: u64, factor: u64) -> Self {
        let cache_pages =
            u64::from(geometry.segment_count()) * (geometry.segment_room_bytes() / 4096);
        let pages = cache_pages.min(base_page_count).max(1) * factor;
        let slots = pages * 100 / LOAD_PERCENT;
        let bucket_count = (slots / BUCKET_SLOTS as u64 + 1).max(2 * PROBE_MAX as u64);
        // The base may grow to four times its size while the cache is in use.
        let reach = (base_page_count.max(4) * 4).min(BASE_PAGES_MAX.max(base_page_count));
        let page_bits = 64 - (reach - 1).leading_zeros();
        let tag_bits = page_bits.saturating_sub(bucket_count.ilog2());
        let layout = SlotLayout::new(geometry.place_bits().max(16), tag_bits);
        let bucket_lines = usize::try_from(bucket_count).unwrap_or(usize::MAX);
        let blocks_per_page = geometry.blocks_per_page();
        Self {
            buckets: Lines::new(bucket_lines),
            bucket_count,
            splits: (blocks_per_page > 1).then(|| Lines::new(bucket_lines * BUCKET_SLOTS)),
            split_lives: AtomicU64::new(0),
            layout,
            fold_shift: page_bits / 2,
            hash_shift: 64 - page_bits,
            tag_shift: 63 - tag_bits,
            blocks_per_page,
            geometry,
        }
    }

    /// DRAM that the table takes, in bytes, without the side table for sub-page writes.
    pub(crate) fn table_size_bytes(&self) -> u64 {
        self.bucket_count * 64
    }

    /// Number of buckets.
    pub(super) fn bucket_lines(&self) -> usize {
        self.bucket_count as usize
    }

    /// Where the entry of a page would be. Equal for no two pages (INV-INDEX-7).
    #[inline]
    pub(crate) fn locate(&self, page: Page) -> SlotRef {
        // All shifts are by less than 64, by construction.
        let mixed = page.0 ^ page.0.wrapping_shr(self.fold_shift);
        let hash = mixed.wrapping_mul(MULTIPLIER).wrapping_shl(self.hash_shift);
        let wide = u128::from(hash) * u128::from(self.bucket_count);
        // Two hashes are 2^(64 - bits) apart or more, so within a bucket their low parts differ by
        // bucket_count times that: the upper tag_bits of them are different.
        let low = wide as u64;
        SlotRef {
            bucket: (wide >> 64) as usize,
            // Two shifts, since a tag may have no bits.
            tag: (low >> 1).wrapping_shr(self.tag_shift),
        }
    }

    /// Asks for the home bucket of a page to be brought into the cache.
    #[inline]
    pub(crate) fn prefetch(&self, at: SlotRef) {
        crate::pmem::prefetch_line(&self.buckets.line(at.bucket)[0]);
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

    /// The slot of a page: bucket and number of the slot, and its value.
    #[inline]
    fn find(&self, at: SlotRef) -> Option<(usize, usize, u64)> {
        // Most pages lie in their home bucket.
        let words = self.buckets.line(at.bucket);
        let key = self.layout.key(0, at.tag);
        for (slot, word) in (1..).zip(&words[1..]) {
            let value = word.load(Ordering::Acquire);
            if self.layout.is(value, key) {
                return Some((at.bucket, slot, value));
            }
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
        sched::point();
        let meta = Meta(self.meta(at.bucket).load(Ordering::Acquire));
        let version = if meta.owner() == 0 {
            meta.version()
        } else {
            Version::UNSTABLE
        };
        sched::point();
        let mut found = self.find(at);
        for _ in 0..SPLIT_READ_TRIES {
            let Some((bucket, slot, value)) = found else {
                return Some(Lookup {
                    map: PageMap::Whole(BlockMap::Absent),
                    version,
                });
            };
            let place = Place(self.layout.payload(value));
            let map = match self.layout.kind(value) {
                SlotKind::Empty | SlotKind::Reserved => PageMap::Whole(BlockMap::Absent),
                SlotKind::Mapped => PageMap::Whole(BlockMap::Mapped(place)),
                SlotKind::Zero => PageMap::Whole(BlockMap::Zero(place)),
                SlotKind::Split => {
                    sched::point();
                    let blocks = self.read_split(bucket, slot);
                    sched::point();
                    let again = self.find(at);
                    if again != found {
                        found = again;
                        continue;
                    }
                    PageMap::Split(blocks)
                }
            };
            return Some(Lookup { map, version });
        }
        None
    }

    fn split_line(&self, bucket: usize, slot: usize) -> &[AtomicU64; 8] {
        match &self.splits {
            Some(lines) => lines.line(bucket * BUCKET_SLOTS + slot - 1),
            None => unreachable!("INV-INDEX-3: a page of one block is never split"),
        }
    }

    fn read_split(&self, bucket: usize, slot: usize) -> [BlockMap; PAGE_BLOCKS_MAX] {
        let line = self.split_line(bucket, slot);
        std::array::from_fn(|block| decode_sub(line[block].load(Ordering::Acquire)))
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

    /// The version of a page's bucket, for the holder of the claim.
    pub(crate) fn version(&self, at: SlotRef) -> Version {
        Meta(self.meta(at.bucket).load(Ordering::Acquire)).version()
    }

    /// Gives up a claim. What was published before becomes visible, and the version counts up.
    #[inline]
    pub(crate) fn release(&self, bucket: usize, owner: u16) {
        sched::point();
        let before = self
            .meta(bucket)
            .fetch_add(Meta::release_delta(owner), Ordering::Release);
        debug_assert_eq!(
            Meta(before).owner(),
            owner,
            "INV-INDEX-4: a claim is released by its holder"
        );
    }

    /// Makes sure that the page has a slot, for the holder of the claim. One that was not there before is given
    /// back by [`Index::unreserve`].
    #[inline]
    pub(crate) fn reserve(&self, at: SlotRef) -> Result<PageSlot, IndexFull> {
        // Most pages lie in their home bucket, or have room in it: one look at it finds either.
        let words = self.buckets.line(at.bucket);
        let key = self.layout.key(0, at.tag);
        let mut free = None;
        for (number, word) in (1..).zip(&words[1..]) {
            let value = word.load(Ordering::Acquire);
            if value == 0 {
                free = Some((number, word));
            } else if self.layout.is(value, key) {
                let value = self.layout.make(SlotKind::Empty, key, 0);
                return Ok(PageSlot::new(at.bucket, number, value));
            }
        }
        // It lies nowhere else if no entry passed by, and the claim keeps everybody else from putting it there.
        if let Some((number, word)) = free
            && Meta(words[0].load(Ordering::Acquire)).passed() == 0
        {
            let reserved = self.layout.make(SlotKind::Reserved, key, 0);
            if take(word, reserved) {
                return Ok(PageSlot::new(at.bucket, number, reserved));
            }
        }
        self.reserve_far(at)
    }

    /// As [`Index::reserve`], wherever the page lies or there is room.
    #[inline(never)]
    fn reserve_far(&self, at: SlotRef) -> Result<PageSlot, IndexFull> {
        if let Some((bucket, number, value)) = self.find(at) {
            let key = self.layout.key_of(value);
            let value = self.layout.make(SlotKind::Empty, key, 0);
            return Ok(PageSlot::new(bucket, number, value));
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

    /// Gives back a slot that was taken and not published; one that was there before stays.
    pub(crate) fn unreserve(&self, at: PageSlot) {
        if self.layout.kind(at.value()) == SlotKind::Reserved {
            self.remove(at.bucket(), at.number(), at.value());
        }
    }

    fn remove(&self, bucket: usize, slot: usize, value: u64) {
        let distance = self.layout.distance(value);
        self.buckets.line(bucket)[slot].store(0, Ordering::Release);
        self.count_passed(
            self.home_of(bucket, distance),
            distance,
            Meta::ONE_PASSED.wrapping_neg(),
        );
    }

    fn home_of(&self, bucket: usize, distance: usize) -> usize {
        if bucket >= distance {
            bucket - distance
        } else {
            bucket + self.bucket_count as usize - distance
        }
    }

    /// Sets `len_blocks` blocks of a page from block `first` on, for the holder of the claim.
    #[inline]
    pub(crate) fn publish(&self, at: PageSlot, first: u32, len_blocks: u32, target: Target) {
        let (bucket, slot) = (at.bucket(), at.number());
        let word = &self.buckets.line(bucket)[slot];
        let value = word.load(Ordering::Acquire);
        let key = self.layout.key_of(at.value());
        assert!(
            self.layout.is(value, key),
            "INV-INDEX-1: a page is published without a slot reserved for it"
        );
        sched::point();
        if len_blocks == self.blocks_per_page {
            let new = match target {
                Target::Mapped(place) => self.layout.make(SlotKind::Mapped, key, place.0),
                Target::Zero(place) => self.layout.make(SlotKind::Zero, key, place.0),
            };
            word.store(new, Ordering::Release);
            return;
        }
        if self.layout.kind(value) != SlotKind::Split {
            self.fill_line(bucket, slot, value);
        }
        let line = self.split_line(bucket, slot);
        let lost = u32::from(canary::is(Canary::OverlapLost));
        for block in 0..len_blocks - lost {
            let sub = match target {
                Target::Mapped(place) => SUB_MAPPED | (place.0 + u64::from(block)),
                Target::Zero(place) => SUB_ZERO | place.0,
            };
            line[(first + block) as usize].store(sub, Ordering::Release);
        }
        sched::point();
        if self.layout.kind(value) != SlotKind::Split {
            let life =
                self.split_lives.fetch_add(1, Ordering::Relaxed) & self.layout.payload_mask();
            word.store(
                self.layout.make(SlotKind::Split, key, life),
                Ordering::Release,
            );
        }
    }

    /// Writes what a slot says of its whole page into its line of the side table, block by block.
    fn fill_line(&self, bucket: usize, slot: usize, value: u64) {
        let payload = self.layout.payload(value);
        let line = self.split_line(bucket, slot);
        for (block, word) in (0..self.blocks_per_page).zip(line) {
            let sub = match self.layout.kind(value) {
                SlotKind::Mapped => SUB_MAPPED | (payload + u64::from(block)),
                SlotKind::Zero => SUB_ZERO | payload,
                SlotKind::Empty | SlotKind::Reserved | SlotKind::Split => SUB_ABSENT,
            };
            word.store(sub, Ordering::Release);
        }
    }

    /// Forgets those blocks of a page that lie where `dead` says, for the holder of the claim.
    pub(crate) fn evict(&self, at: SlotRef, dead: impl Fn(Place) -> bool) {
        if let Some((bucket, slot, value)) = self.find(at) {
            self.evict_slot(bucket, slot, value, &dead);
        }
    }

    fn evict_slot(&self, bucket: usize, slot: usize, value: u64, dead: &impl Fn(Place) -> bool) {
        match self.layout.kind(value) {
            SlotKind::Mapped | SlotKind::Zero => {
                if dead(Place(self.layout.payload(value))) {
                    self.remove(bucket, slot, value);
                }
            }
            SlotKind::Split => {
                let mut left = false;
                for word in &self.split_line(bucket, slot)[..self.blocks_per_page as usize] {
                    match decode_sub(word.load(Ordering::Acquire)) {
                        BlockMap::Absent => {}
                        BlockMap::Mapped(place) | BlockMap::Zero(place) if dead(place) => {
                            word.store(SUB_ABSENT, Ordering::Release);
                        }
                        BlockMap::Mapped(_) | BlockMap::Zero(_) => left = true,
                    }
                }
                if !left {
                    self.remove(bucket, slot, value);
                }
            }
            SlotKind::Empty | SlotKind::Reserved => {}
        }
    }

    /// Forgets clean pages within reach of `at`, so that it can be reserved. Leaves alone what others hold.
    pub(crate) fn make_room(&self, at: SlotRef, owner: u16, clean: impl Fn(Place) -> bool) {
        for distance in 0..PROBE_MAX {
            let bucket = self.bucket_at(at.bucket, distance);
            for slot in 1..BUCKET_WORDS {
                let value = self.buckets.line(bucket)[slot].load(Ordering::Acquire);
                if matches!(
                    self.layout.kind(value),
                    SlotKind::Empty | SlotKind::Reserved
                ) {
                    continue;
                }
                let home = self.home_of(bucket, self.layout.distance(value));
                let claim = self.claim_bucket(home, owner);
                // A bucket held already belongs to a write of this very batch: leave its pages alone.
                if claim == Claim::Taken {
                    if self.buckets.line(bucket)[slot].load(Ordering::Acquire) == value {
                        self.evict_slot(bucket, slot, value, &clean);
                    }
                    self.release(home, owner);
                }
            }
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

fn decode_sub(sub: u64) -> BlockMap {
    let place = Place(sub & !SUB_KIND_MASK);
    match sub & SUB_KIND_MASK {
        SUB_MAPPED => BlockMap::Mapped(place),
        SUB_ZERO => BlockMap::Zero(place),
        _ => BlockMap::Absent,
    }
}
