//! What the holders of claims do: publish, forget, make room.

use super::{Claim, Index, SlotRef};
use crate::canary::{self, Canary};
use crate::index::bucket::{BUCKET_WORDS, Change, Meta, PROBE_MAX, PageSlot, SlotKey, SlotKind};
use crate::index::map::{BlockMap, Blocks, PAGE_BLOCKS_MAX, Run, Shape, Target};
use crate::index::side::LineStock;
use crate::media::Place;
use crate::sched;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Whether a part of a page is not the first that is published under a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EarlierParts {
    No,
    Maybe,
}

/// What is lost with a page that is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// It is zeroes, or nobody has read it again.
    Little,
    Hot,
}

impl Index {
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

    /// Whether a part of a page may need a line when it is published, for the holder of the claim. `earlier`:
    /// whether parts of the page may be published before it under the same claim.
    pub(crate) fn needs_line(
        &self,
        at: PageSlot,
        first: u32,
        len_blocks: u32,
        earlier: EarlierParts,
    ) -> bool {
        if self.layout.kind(at.value()) == SlotKind::Reserved {
            // Taken for this part. It will be a run.
            return false;
        }
        let value = self.word(at).load(Ordering::Acquire);
        match (earlier, self.layout.kind(value)) {
            // It stays split, or becomes a run.
            (EarlierParts::No, SlotKind::Split) => false,
            (EarlierParts::No, SlotKind::MappedRun | SlotKind::ZeroRun) => {
                !self.layout.run(value).lies_within(first, len_blocks)
            }
            _ => true,
        }
    }

    /// Puts a line into the stock. `false`: there is none for the moment; some batches have more than they will
    /// need.
    pub(crate) fn stock_line(&self, stock: &mut LineStock) -> bool {
        let line = self.side().take();
        line.inspect(|line| stock.put(*line)).is_some()
    }

    /// Takes lines out of the stock again; `keep` stay.
    pub(crate) fn cut_stock(&self, stock: &mut LineStock, keep: usize) {
        if stock.spare_count() > keep {
            stock.cut(keep, self.side());
        }
    }

    /// Takes everything that is left in the stock, at the end of a batch.
    #[inline]
    pub(crate) fn clear_stock(&self, stock: &mut LineStock) {
        if !stock.is_empty() {
            stock.clear(self.side());
        }
    }

    #[inline]
    fn word(&self, at: PageSlot) -> &AtomicU64 {
        self.buckets.word(at.word())
    }

    /// Sets `len_blocks` blocks of a page from block `first` on, for the holder of the claim, whose stock has a
    /// line for each part of a page for which [`Index::needs_line`] asked for one.
    #[inline]
    pub(crate) fn publish(
        &self,
        at: PageSlot,
        first: u32,
        len_blocks: u32,
        target: Target,
        stock: &mut LineStock,
    ) {
        if len_blocks == self.blocks_per_page {
            return self.publish_page(at, target, stock);
        }
        let value = self.claimed(at);
        let run = Run {
            first,
            len_blocks,
            map: target.into(),
        };
        self.publish_part(at, value, run, stock);
    }

    /// As [`Index::publish`], of a whole page.
    #[inline(always)]
    pub(crate) fn publish_page(&self, at: PageSlot, target: Target, stock: &mut LineStock) {
        let value = self.claimed(at);
        let key = self.layout.key_of(at.value());
        let new = match target {
            Target::Mapped(place) => self.layout.make(SlotKind::Mapped, key, place.0),
            Target::Zero(place) => self.layout.make(SlotKind::Zero, key, place.0),
        };
        self.word(at).store(new, Ordering::Release);
        if let Some(line) = self.line_of(value) {
            stock.set_free(line);
        }
    }

    /// What the slot of a page says, for the holder of the claim.
    #[inline(always)]
    fn claimed(&self, at: PageSlot) -> u64 {
        let value = self.word(at).load(Ordering::Acquire);
        assert!(
            self.layout.is(value, self.layout.key_of(at.value())),
            "INV-INDEX-1: a page is published without a slot reserved for it"
        );
        sched::point();
        value
    }

    /// Lays a run over what a slot says.
    #[inline(never)]
    fn publish_part(&self, at: PageSlot, value: u64, mut run: Run, stock: &mut LineStock) {
        let side = self.side();
        if canary::is(Canary::OverlapLost) && run.len_blocks > 1 {
            run.len_blocks -= 1;
        }
        if let Some(line) = self.line_of(value)
            && side.write_beside_others(line, &run)
        {
            return sched::point();
        }
        let before = self.blocks(value);
        let mut blocks = before;
        run.lay_over(&mut blocks);
        let key = self.layout.key_of(at.value());
        let word = self.word(at);
        match (self.simple(key, &blocks), self.line_of(value)) {
            (Some(new), line) => {
                word.store(new, Ordering::Release);
                // Whoever still reads it finds the slot changed.
                line.inspect(|line| stock.set_free(*line));
            }
            (None, Some(line)) => self.write_line(line, &before, &blocks),
            (None, None) => {
                let Some(line) = stock.take() else {
                    unreachable!("INV-INDEX-8: a page is split without a line reserved for it")
                };
                side.write_all(line, &blocks);
                self.name_line(word, key, line);
            }
        }
    }

    /// Lets a slot name a line that has been written.
    fn name_line(&self, word: &AtomicU64, key: SlotKey, line: u32) {
        sched::point();
        let new = self.layout.make(SlotKind::Split, key, u64::from(line));
        word.store(new, Ordering::Release);
    }

    /// The line that a slot names, if it does.
    fn line_of(&self, value: u64) -> Option<u32> {
        (self.layout.kind(value) == SlotKind::Split).then(|| self.layout.line(value))
    }

    /// What a slot says of a page that needs no line; `None`: it does.
    fn simple(&self, key: SlotKey, blocks: &Blocks) -> Option<u64> {
        match Shape::of(blocks) {
            Shape::Absent => Some(0),
            Shape::Runs => None,
            Shape::Run(run) if run.len_blocks < self.blocks_per_page => {
                Some(self.layout.make_run(key, run))
            }
            Shape::Run(run) => Some(match run.map {
                BlockMap::Mapped(place) => self.layout.make(SlotKind::Mapped, key, place.0),
                BlockMap::Zero(place) => self.layout.make(SlotKind::Zero, key, place.0),
                BlockMap::Absent => 0,
            }),
        }
    }

    /// What is known of each block of a page, for the holder of the claim.
    pub(in crate::index) fn blocks_of(&self, at: PageSlot) -> Blocks {
        self.blocks(self.word(at).load(Ordering::Acquire))
    }

    /// What a slot says of each block, for the holder of the claim.
    fn blocks(&self, value: u64) -> Blocks {
        let place = Place(self.layout.payload(value));
        let whole = |map| {
            let len_blocks = self.blocks_per_page;
            Run {
                first: 0,
                len_blocks,
                map,
            }
            .alone()
        };
        match self.layout.kind(value) {
            SlotKind::Empty | SlotKind::Reserved => [BlockMap::Absent; PAGE_BLOCKS_MAX],
            SlotKind::Mapped => whole(BlockMap::Mapped(place)),
            SlotKind::Zero => whole(BlockMap::Zero(place)),
            SlotKind::MappedRun | SlotKind::ZeroRun => self.layout.run(value).alone(),
            SlotKind::Split => self.side().read(self.layout.line(value)),
        }
    }

    /// Changes a line that readers look at.
    fn write_line(&self, line: u32, before: &Blocks, after: &Blocks) {
        for (block, (before, after)) in before.iter().zip(after).enumerate() {
            if before != after {
                self.side().write(line, block, *after);
            }
        }
        sched::point();
    }

    /// Does something to a page under the claim of its home bucket, other than writing. `None`: somebody holds that,
    /// nothing was done.
    #[inline]
    pub(crate) fn with_claim<R>(
        &self,
        at: SlotRef,
        owner: u16,
        act: impl FnOnce() -> R,
    ) -> Option<R> {
        if self.claim(at, owner) != Claim::Taken {
            return None;
        }
        let result = act();
        self.release(at.bucket(), owner, Change::Moved);
        Some(result)
    }

    /// Forgets those blocks of a page that lie where `dead` says, which says the same of all places of a segment. Most
    /// often there are none, which is found out without a claim: that would be a locked instruction, and refuse read fills
    /// of neighbours that are admitted at that moment. `false`: somebody is at the page; again later.
    #[must_use]
    #[inline]
    pub(crate) fn evict(&self, at: SlotRef, owner: u16, dead: impl Fn(Place) -> bool) -> bool {
        // Most pages lie in their home bucket.
        let words = self.buckets.line(at.bucket);
        let key = self.layout.key(0, at.tag);
        let Some(slot) = self.layout.slot_of(words, key) else {
            return self.evict_any(at, owner, &dead);
        };
        sched::point();
        let value = words[slot].load(Ordering::Acquire);
        // Or it has just left the slot.
        let Some(place) = self
            .layout
            .place(value)
            .filter(|_| self.layout.is(value, key))
        else {
            return self.evict_any(at, owner, &dead);
        };
        if !dead(place) {
            return true;
        }
        // What `evict_entry` does for a page anywhere takes 50 instructions more.
        if self.claim_bucket(at.bucket, owner) != Claim::Taken {
            return false;
        }
        let now = words[slot].load(Ordering::Acquire);
        if now != value {
            self.evict_claimed(at.bucket, slot, (value, now), &dead);
        } else if dead(place) {
            // It passes by no bucket.
            words[slot].store(0, Ordering::Release);
        }
        self.release(at.bucket, owner, Change::Moved);
        true
    }

    /// As [`Index::evict`], wherever the page lies.
    #[inline(never)]
    fn evict_any(&self, at: SlotRef, owner: u16, dead: &impl Fn(Place) -> bool) -> bool {
        let Some((bucket, slot, value)) = self.find(at) else {
            return true;
        };
        let is_there = if self.layout.kind(value) == SlotKind::Split {
            let found = self.lookup(at);
            found.is_none_or(|found| found.map.any(self.blocks_per_page, dead))
        } else {
            self.may_name(value, dead)
        };
        !is_there || self.evict_entry(bucket, slot, value, owner, dead)
    }

    /// Forgets what lies where `dead` says of the entry that had this value, under the claim of its home bucket. `false`:
    /// somebody holds that.
    #[must_use]
    pub(super) fn evict_entry(
        &self,
        bucket: usize,
        slot: usize,
        value: u64,
        owner: u16,
        dead: &impl Fn(Place) -> bool,
    ) -> bool {
        let home = self.home_of(bucket, self.layout.distance(value));
        if self.claim_bucket(home, owner) != Claim::Taken {
            return false;
        }
        let now = self.buckets.line(bucket)[slot].load(Ordering::Acquire);
        self.evict_claimed(bucket, slot, (value, now), dead);
        self.release(home, owner, Change::Moved);
        true
    }

    /// As [`Index::evict_entry`], for the holder of the claim.
    fn evict_claimed(
        &self,
        bucket: usize,
        slot: usize,
        (then, now): (u64, u64),
        dead: &impl Fn(Place) -> bool,
    ) {
        // A part of the page may have been written meanwhile, and the rest lies where it lay. Another page is newer, and
        // lies elsewhere.
        if self.layout.key_of(now) == self.layout.key_of(then) {
            self.evict_slot(bucket, slot, now, dead);
        }
    }

    /// Forgets those blocks of a page that lie at `places`, for the holder of the claim; zeroes lie nowhere. Their
    /// neighbours in a run stay, for which a line may be needed. `false`: there is none for the moment, and nothing
    /// is forgotten.
    #[must_use]
    pub(crate) fn evict_places(&self, at: SlotRef, places: &Range<u64>) -> bool {
        let Some((bucket, slot, value)) = self.find(at) else {
            return true;
        };
        let before = self.blocks(value);
        let left = before.map(|map| match map {
            BlockMap::Mapped(place) if places.contains(&place.0) => BlockMap::Absent,
            map => map,
        });
        left == before || self.shrink(bucket, slot, value, &before, &left)
    }

    fn evict_slot(&self, bucket: usize, slot: usize, value: u64, dead: &impl Fn(Place) -> bool) {
        if self.layout.kind(value) == SlotKind::Split {
            self.evict_blocks(bucket, slot, value, dead);
        } else if self.layout.place(value).is_some_and(dead) {
            // All of it lies in one segment, since none begins with payload.
            self.remove(bucket, slot, value);
        }
    }

    #[inline(never)]
    fn evict_blocks(&self, bucket: usize, slot: usize, value: u64, dead: &impl Fn(Place) -> bool) {
        let before = self.blocks(value);
        let left = before.map(|map| match map {
            BlockMap::Mapped(place) | BlockMap::Zero(place) if dead(place) => BlockMap::Absent,
            map => map,
        });
        let done = self.shrink(bucket, slot, value, &before, &left);
        debug_assert!(done, "INV-INDEX-8: a page that is split has a line");
    }

    /// Lets a page say what is `left` of what it said `before`. `false`: it takes a line, and there is none.
    fn shrink(
        &self,
        bucket: usize,
        slot: usize,
        value: u64,
        before: &Blocks,
        left: &Blocks,
    ) -> bool {
        let key = self.layout.key_of(value);
        let word = &self.buckets.line(bucket)[slot];
        let line = self.line_of(value);
        match (self.simple(key, left), line) {
            (Some(0), _) => self.remove(bucket, slot, value),
            (Some(new), _) => word.store(new, Ordering::Release),
            (None, Some(line)) => {
                self.write_line(line, before, left);
                if !canary::is(Canary::LineFreedInUse) {
                    return true;
                }
            }
            (None, None) => {
                let Some(line) = self.side().take() else {
                    return false;
                };
                self.side().write_all(line, left);
                self.name_line(word, key, line);
                return true;
            }
        }
        if let Some(line) = line {
            self.side().give_back(&[line]);
        }
        true
    }

    /// Forgets clean pages within reach of `at`, so that it can be reserved: those of the nearest bucket that has any which
    /// are missed by few, being zeroes or not read again; if there is no such bucket, one other. A bucket each time, since
    /// looking at all of them takes microseconds, and a request of many pages asks for each. Leaves alone what others hold.
    /// If somebody else is faster, it is to be tried again later. `is_clean` and `is_hot` choose; `forget` says the same as
    /// the first, and is asked when what lies there goes.
    #[cold]
    pub(crate) fn make_room(
        &self,
        at: SlotRef,
        owner: u16,
        is_clean: impl Fn(Place) -> bool,
        is_hot: impl Fn(Place) -> bool,
        forget: impl Fn(Place) -> bool,
    ) {
        let goes = |bucket: usize, slot: usize, value| {
            self.evict_entry(bucket, slot, value, owner, &forget)
                && self.buckets.line(bucket)[slot].load(Ordering::Acquire) == 0
        };
        let mut hot = None;
        for distance in 0..PROBE_MAX {
            let mut has_room = false;
            for (bucket, slot, value) in self.entries_of(at, distance) {
                match self.loss_of(value, &is_clean, &is_hot) {
                    Some(Loss::Little) => has_room |= goes(bucket, slot, value),
                    Some(Loss::Hot) if hot.is_none() => hot = Some((bucket, slot, value)),
                    Some(Loss::Hot) | None => {}
                }
            }
            if has_room {
                return;
            }
        }
        if let Some((bucket, slot, value)) = hot {
            goes(bucket, slot, value);
            return;
        }
        // What a split page says is known under the claim alone.
        let all = (0..PROBE_MAX).flat_map(|distance| self.entries_of(at, distance));
        for (bucket, slot, value) in all {
            if self.layout.kind(value) == SlotKind::Split && goes(bucket, slot, value) {
                return;
            }
        }
    }

    /// Bucket, slot and value of the entries so far from the home of `at`, in whose place it could be, without those that
    /// somebody holds: they belong to a write of the same batch, or to somebody else.
    fn entries_of(
        &self,
        at: SlotRef,
        distance: usize,
    ) -> impl Iterator<Item = (usize, usize, u64)> {
        let bucket = self.bucket_at(at.bucket, distance);
        (1..BUCKET_WORDS).filter_map(move |slot| {
            let value = self.buckets.line(bucket)[slot].load(Ordering::Acquire);
            let home = self.home_of(bucket, self.layout.distance(value));
            let is_held = Meta(self.meta(home).load(Ordering::Relaxed)).owner() != 0;
            (!is_held).then_some((bucket, slot, value))
        })
    }

    /// What is lost with an entry. `None`: it has to stay, or is none, or is that of a split page.
    fn loss_of(
        &self,
        value: u64,
        is_clean: &impl Fn(Place) -> bool,
        is_hot: &impl Fn(Place) -> bool,
    ) -> Option<Loss> {
        let kind = self.layout.kind(value);
        let place = self.layout.place(value)?;
        if !is_clean(place) {
            None
        } else if !matches!(kind, SlotKind::Zero | SlotKind::ZeroRun) && is_hot(place) {
            Some(Loss::Hot)
        } else {
            Some(Loss::Little)
        }
    }
}
