//! What lies in segments whose keys have become unreadable goes to the base all the same: the index knows where each
//! current block lies, though not since when.
//!
//! Let X be these segments. Nothing is appended to them any more, and the log is read anew without them. The batch that
//! comes next is a *salvage*; it goes across barriers and limits, in three stages (INV-WB-6):
//!
//! 1. the log without X is gathered up to a settled point T above all numbers in X;
//! 2. the index is gone through, and whatever block lies in X is laid over that;
//! 3. the log without X is gathered on to a settled point E, not below the next number as it is after stage 2. The batch
//!    ends with the last number below E.
//!
//! At its end the base holds, of each block, the newest version below E, because
//!
//! 1. all versions in X are below T, since X was sealed before; all that stage 1 takes are below T, none that stage 3
//!    takes is. So whatever stage 3 takes is newer than anything in X, and is laid above it;
//! 2. of two versions of a block the newer is published later, and whatever is below a settled point is published. So
//!    when stage 2 looks at a block, the index says the newest version below T, or a newer one. If that lies in X, it is
//!    newer than all that stage 1 has taken of the block, and is laid above that;
//! 3. if the newest version below E lies in X, and the base does not have it, stage 2 finds it. It leaves the index only
//!    for a newer one, which is not below E: nothing that is dirty is forgotten, and of X only what the scrub finds damaged
//!    and knows to be clean;
//! 4. if the newest version below E lies elsewhere, stage 1 or stage 3 takes it, unless it is not above the dirty tail,
//!    and the base has it. An older one in X was laid below it, by 1 and 2, or not at all;
//! 5. if stage 2 finds a newer version in the place of one in X, its number was drawn before stage 2 ended. It is below E,
//!    so that the older one is not missed;
//! 6. read fills, and what is clean in X, may be laid as well. If the index names such a thing, nothing of its block is
//!    dirty that is older, by 2 and since fills are made of blocks that are not in the index. The base holds the same.
//!
//! One with too many keys is written in parts (`parts.rs`), and all of this holds for the blocks of each of them, with an E of
//! its own.
//!
//! If the keys of another segment turn out to be lost, it begins again, with that one in X. Blocks of X whose memory is
//! lost, or that are known to be damaged when stage 3 ends, hold the batch like any others (`lost.rs`). The checksums of
//! payloads are lost with their keys, from the first that cannot be read on; before that they are not looked for. So a
//! flipped bit that nobody has found before goes to the base, even one of a read fill, of which the base has the right
//! content. Nor is it known which blocks are clean: a lost one counts as dirty.

use super::log::Limits;
use super::lost::{Lost, RANGES_NAMED};
use super::next::{Next, Step};
use super::wanted::Extent;
use super::{Context, State, Writeback};
use crate::canary::{self, Canary};
use crate::engine::{
    Cache, CheckpointNeed, Counters, Depth, Flaw, Health, Progress, Segment, SegmentState,
};
use crate::index::{BlockMap, PageMap};
use crate::media::{Key, KeyKind, Place};
use crate::pmem::Pmem;
use crate::sched;
use crate::units::{Lba, NS_PER_S, Now, PAGE_SIZE_BYTES, Page, SegId, Seq};
use std::mem;
use std::sync::atomic::Ordering;

/// Buckets of the index that one poll goes through, at most: some microseconds. In simulations others get their turns
/// in between.
const BUCKETS_PER_POLL: usize = if cfg!(feature = "sim") { 4 } else { 64 };
/// The same, where all that lies there is read.
const BUCKETS_READ_PER_POLL: usize = 4;

/// After a stop, a salvage that others keep from going on is given up when it has waited for so long.
const STAND_NS_MAX: u64 = NS_PER_S;

/// What a batch is, and how far it is if it is a salvage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// It is none.
    #[default]
    Ordinary,
    /// 1: the log is gathered, to a settled point above this number.
    Below(Seq),
    /// 2: the index is gone through, from this bucket on.
    Visiting(usize),
    /// 3: the log is gathered, to a settled point not below this.
    Above(Seq),
}

/// What write-back knows of lost keys.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Salvage {
    /// So many losses were heard of.
    heard: usize,
    /// One is to begin when no batch is under way.
    is_due: bool,
    /// One has begun, and has not got to its end.
    is_begun: bool,
    /// After a stop: it gets nowhere.
    is_given_up: bool,
    /// After a stop: what failed before it was tried once more.
    pub(super) has_retried: bool,
    /// After a stop: since when nothing could be done.
    stands_since: Option<Now>,
    /// What each of its parts begins with.
    pub(super) first_stage: Stage,
    /// How many dirty bytes there are is not known for sure: what was overwritten in X was never counted off.
    pub(super) is_miscounted: bool,
}

impl Salvage {
    /// Whether the log lacks anything that the base does not hold.
    pub(super) fn is_pending(&self) -> bool {
        self.is_due || self.is_begun
    }

    /// The log begins anew: so does a salvage.
    pub(super) fn start_over(&mut self) {
        self.is_due |= self.is_begun;
    }

    /// A batch has got to its end.
    pub(super) fn end(&mut self) {
        self.is_miscounted |= mem::take(&mut self.is_begun);
    }
}

impl Writeback {
    /// Whether there is something to be saved, which is urgent.
    pub(crate) fn is_salvaging(&self) -> bool {
        self.salvage.is_pending()
    }

    /// Listens for losses, of whoever has met them, and begins a salvage when it is time. `false`: nothing else may
    /// be prepared.
    pub(super) fn look_for_losses<P: Pmem>(&mut self, context: &Context<'_, P>, now: Now) -> bool {
        let key_losses = context.cache.segments.key_losses();
        if self.salvage.heard != key_losses {
            self.salvage.heard = key_losses;
            let (segments, dirty_tail) = (&context.cache.segments, context.cache.dirty_tail());
            // The state comes first: a sealed segment gets no more, so what is read behind it stays as it is.
            let matters = |id: SegId| {
                let segment = segments.get(id);
                let is_open = segment.state() == SegmentState::Open;
                sched::point();
                (may_await(segment) && is_open) || segment.awaits_salvage(dirty_tail)
            };
            // Most that the scrub looks at is clean.
            if segments.keyless().any(matters) {
                self.demand_salvage(context.cache);
            }
        }
        if !self.salvage.is_due {
            return true;
        }
        // What is being written gets to its end before, or fails.
        self.state == State::Idle && self.begin_salvage(context, now)
    }

    /// After a stop: whether there is something to be saved first, or may be.
    pub(super) fn salvages_last<P>(&self, cache: &Cache<P>) -> bool {
        let is_news = self.salvage.heard != cache.segments.key_losses();
        let is_left = self.salvage.is_given_up || canary::is(Canary::SalvageLeftAtStop);
        (self.salvage.is_pending() || is_news) && !is_left
    }

    /// After a stop: whether what the base has failed before is to be tried once more, since a salvage waits for it.
    pub(super) fn retries_last<P>(&self, cache: &Cache<P>) -> bool {
        !self.salvage.has_retried && self.salvages_last(cache)
    }

    /// After a stop, with no batch under way: goes on with a salvage, and begins its batch when it is ready. It is given up
    /// if nothing can be done for a while, or a checkpoint holds the base.
    pub(super) fn salvage_last<P: Pmem>(
        &mut self,
        context: &mut Context<'_, P>,
        now: Now,
    ) -> Progress {
        let prepared = self.prepare(context, now);
        if !self.salvage.is_pending() {
            return Progress::Busy;
        }
        if self.next.is_damaged() {
            self.stand_still(context.cache, now);
            return Progress::Idle;
        }
        let is_held = matches!(
            self.checkpoint_need(context.cache, now),
            CheckpointNeed::Hold
        );
        if self.next.is_ready() && !is_held {
            self.salvage.stands_since = None;
            self.begin(context, now);
            return Progress::Busy;
        }
        if prepared == Progress::Busy && !is_held {
            self.salvage.stands_since = None;
        } else {
            let since = *self.salvage.stands_since.get_or_insert(now);
            self.salvage.is_given_up = is_held || now.since_ns(since) > STAND_NS_MAX;
        }
        prepared
    }

    /// The log cannot be read on as it was.
    pub(super) fn demand_salvage<P: Pmem>(&mut self, cache: &Cache<P>) {
        self.salvage.is_due = true;
        self.next.clear();
        tell(cache);
    }

    /// `false`: somebody is at a stream that appends where keys are lost.
    fn begin_salvage<P: Pmem>(&mut self, context: &Context<'_, P>, now: Now) -> bool {
        let (cache, segments) = (context.cache, &context.cache.segments);
        let lost = |id: SegId| may_await(segments.get(id));
        let is_open = |id: SegId| lost(id) && segments.get(id).state() == SegmentState::Open;
        if segments.keyless().any(is_open) {
            for number in 0..cache.streams.len() {
                cache.try_seal(number, context.agent, |open| lost(open.id));
            }
            if segments.keyless().any(is_open) {
                return false;
            }
        }
        self.salvage.is_due = false;
        self.log.restart();
        let dirty_tail = cache.dirty_tail();
        let keyless = segments.keyless().map(|id| segments.get(id));
        let Some(upto) = (keyless.filter(|segment| segment.awaits_salvage(dirty_tail)))
            .map(Segment::last_seq)
            .max()
        else {
            // The base has all of it by now.
            self.salvage.is_begun = false;
            if matches!(cache.health(), Health::WritebackFailing(_)) {
                cache.set_health(Health::Online);
            }
            return true;
        };
        self.salvage.is_begun = true;
        tell(cache);
        let limits = Limits {
            reach: Seq(u64::MAX),
            ..self.limits(context, Seq(0), Extent::Batch, now)
        };
        let stage = if canary::is(Canary::SalvageLaidBelow) {
            Stage::Visiting(0)
        } else {
            Stage::Below(upto)
        };
        self.next.begin_salvage(limits, stage, now);
        self.salvage.first_stage = stage;
        true
    }
}

/// Whether the keys of a segment are lost, and would be missed as soon as there is something dirty in it.
fn may_await(segment: &Segment) -> bool {
    segment.is_keyless() && !segment.has_fills_alone()
}

/// Says what is the matter, unless there is worse.
fn tell<P: Pmem>(cache: &Cache<P>) {
    if matches!(cache.health(), Health::Degraded(_)) {
        return;
    }
    let dirty_tail = cache.dirty_tail();
    let named: Vec<String> = (cache.segments.keyless())
        .filter(|id| cache.segments.get(*id).awaits_salvage(dirty_tail))
        .take(RANGES_NAMED)
        .map(|id| id.0.to_string())
        .collect();
    if !named.is_empty() {
        cache.set_health(Health::WritebackFailing(format!(
            "the keys of segments {} cannot be read; what lies there is found by the index and written to the base; \
             nothing is lost unless the application crashes before that",
            named.join(", ")
        )));
    }
}

impl Next {
    /// The log has no more for the stage, or the stage has nothing to do with the log.
    pub(super) fn salvage<P: Pmem>(&mut self, cache: &Cache<P>, counters: &Counters) -> Step {
        let settled = self.limits.settled;
        match self.stage {
            Stage::Below(upto) if settled > upto => {
                self.stage = Stage::Visiting(0);
                Step::Visiting
            }
            Stage::Visiting(bucket) => self.visit(cache, counters, bucket),
            Stage::Above(upto) if settled >= upto => self.end_salvage(cache),
            Stage::Ordinary | Stage::Below(_) | Stage::Above(_) => Step::Dry,
        }
    }

    fn visit<P: Pmem>(&mut self, cache: &Cache<P>, counters: &Counters, bucket: usize) -> Step {
        let dirty_tail = cache.dirty_tail();
        let awaits = |place| {
            let id = cache.geometry.segment_of(place);
            cache.segments.get(id).awaits_salvage(dirty_tail)
        };
        let end = cache.index.bucket_count();
        // The oldest of what is looked for may be just behind the tail.
        let depth = self.limits.depth(Seq(dirty_tail.0 + 1));
        let count = match depth {
            Depth::Probe => BUCKETS_PER_POLL,
            Depth::Read => BUCKETS_READ_PER_POLL,
        };
        for bucket in bucket..end.min(bucket + count) {
            // A bucket has fewer blocks than a kset has keys.
            if self.overlay.key_count() >= self.limits.room || self.lost.is_crowded() {
                self.stage = Stage::Visiting(bucket);
                return self.narrowing();
            }
            let laid = cache.index.visit_bucket(bucket, awaits, |page, map| {
                self.lay((cache, counters), (page, &map), depth, awaits);
            });
            if !laid {
                self.stage = Stage::Visiting(bucket);
                return Step::Visiting;
            }
        }
        if bucket + count < end {
            self.stage = Stage::Visiting(bucket + count);
            return Step::Visiting;
        }
        if canary::is(Canary::SalvageEndsEarly) {
            return self.end_salvage(cache);
        }
        // All of it is below the end, but for what is under way just now. What was overwritten in X cannot be counted off
        // otherwise.
        self.dirty_bytes = cache.dirty_bytes.load(Ordering::Acquire);
        // Whatever was found instead of what lies in X has drawn its number before.
        self.stage = Stage::Above(Seq(cache.seq_next.load(Ordering::SeqCst)));
        Step::Dry
    }

    /// It goes as far as the log was gathered, whatever was in that: X itself may be all there is.
    fn end_salvage<P: Pmem>(&mut self, cache: &Cache<P>) -> Step {
        self.taken.last_seq = Some(Seq(self.limits.settled.0 - 1));
        self.taken.dirty_bytes = self.taken.dirty_bytes.max(self.dirty_bytes);
        self.note_late_damage(cache);
        Step::Sorting
    }

    /// What was found to be damaged after it was laid (INV-WB-5).
    fn note_late_damage<P: Pmem>(&mut self, cache: &Cache<P>) {
        let dirty_tail = cache.dirty_tail();
        for range in cache.damage.ranges() {
            for lba in (range.lba..range.lba + range.len_blocks).map(Lba) {
                let page = cache.geometry.page_of(lba);
                let block = lba.0 - cache.geometry.page_start(page).0;
                let found = cache.index.lookup(cache.index.locate(page));
                // A page has 8 blocks at most.
                let map = found.map(|found| found.map.block(block as u32));
                if let Some(BlockMap::Mapped(place)) = map {
                    let segment = cache.segments.get(cache.geometry.segment_of(place));
                    if segment.awaits_salvage(dirty_tail) && cache.damage.covers(place, 1) {
                        self.lost.add(cache, lba, place);
                    }
                }
            }
        }
    }

    /// Lays the blocks of a page on the batch that await it.
    fn lay<P: Pmem>(
        &mut self,
        (cache, counters): (&Cache<P>, &Counters),
        (page, map): (Page, &PageMap),
        depth: Depth,
        awaits: impl Fn(Place) -> bool,
    ) {
        let (start, count) = (
            cache.geometry.page_start(page),
            cache.geometry.blocks_per_page(),
        );
        let mut block = 0;
        while block < count {
            let first = map.block(block);
            let (kind, place) = match first {
                BlockMap::Mapped(place) if awaits(place) => (KeyKind::Data, place),
                BlockMap::Zero(place) if awaits(place) => (KeyKind::Zeroes, place),
                _ => {
                    block += 1;
                    continue;
                }
            };
            let len_blocks = (1..count - block)
                .take_while(|number| map.block(block + number) == first.behind(*number))
                .count() as u32
                + 1;
            let id = cache.geometry.segment_of(place);
            let payload = cache.geometry.place_off(place);
            let payload_off = payload.0 - cache.geometry.segment_off(id).0;
            let key = Key {
                lba: Lba(start.0 + u64::from(block)),
                len_blocks,
                kind,
                // Segments have 1 GiB at most.
                payload_off: payload_off as u32,
                crc: 0,
            };
            block += len_blocks;
            if self.overlay.is_behind_first() && !self.overlay.holds_some_of(&key) {
                continue;
            }
            look_at(cache, counters, (id, place), &key, depth, &mut self.lost);
            self.overlay
                .push(&key, payload, cache.geometry.block_shift());
        }
    }
}

/// As much as can be said of a payload without its checksum (INV-WB-5).
fn look_at<P: Pmem>(
    cache: &Cache<P>,
    counters: &Counters,
    (id, place): (SegId, Place),
    key: &Key,
    depth: Depth,
    lost: &mut Lost,
) {
    lost.cover(key);
    if key.kind != KeyKind::Data {
        return;
    }
    let len_blocks = u64::from(key.len_blocks);
    let (off, len_bytes) = (
        cache.geometry.place_off(place),
        cache.geometry.bytes(len_blocks),
    );
    let mut buf = [0; PAGE_SIZE_BYTES as usize];
    let found = match depth {
        Depth::Probe => cache.pmem.probe(off, len_bytes),
        // A page at the most.
        Depth::Read => cache.pmem.read(off, &mut buf[..len_bytes as usize]),
    };
    if found.is_err() {
        cache.note_damage(
            counters,
            (id, key),
            Flaw::Poisoned,
            &mut buf,
            |lba, place| {
                lost.add(cache, lba, place);
            },
        );
    }
    if cache.damage.covers(place, len_blocks) {
        for block in 0..len_blocks {
            if cache.damage.covers(Place(place.0 + block), 1) {
                lost.add(cache, Lba(key.lba.0 + block), Place(place.0 + block));
            }
        }
    }
}
