//! Writes that are held: in the modes that promise so, a write completes when the base has it.
//!
//! It has gone through the log like any other, is durable and can be read. Its completion waits until the dirty tail
//! has passed its sequence number: then the base holds it and everything that was acknowledged before it, flushed.
//! One batch of write-back releases all that wait.

use super::cache::Cache;
use super::channel::{Core, REQUEST_COUNT_MAX, REQUESTS_PER_POLL, RequestId};
use super::io::{Outbox, Status};
use super::write_path::{Extent, pages};
use crate::canary::{self, Canary};
use crate::index::{BlockMap, SlotRef};
use crate::media::Place;
use crate::pmem::Pmem;
use crate::units::{Generation, Now, SegId, Seq};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Pages that one poll takes out of the index, at most; one request may go beyond.
const PAGES_PER_POLL: u64 = 1024;

/// Where the payload of a write lies in the log: in one piece.
#[derive(Clone, Copy, Debug)]
pub(super) struct Logged {
    segment: SegId,
    /// With another one, something else lies there.
    generation: Generation,
    first: Place,
    /// 0: it has no payload.
    len_blocks: u64,
}

impl Logged {
    /// Of a write, in an open segment.
    pub(super) fn new<P>(cache: &Cache<P>, segment: SegId, extent: &Extent) -> Self {
        Self {
            segment,
            generation: cache.segments.get(segment).generation(),
            first: cache.geometry.place(segment, extent.payload_off),
            len_blocks: if extent.kind.has_payload() {
                extent.len_blocks
            } else {
                0
            },
        }
    }

    fn places(&self) -> Range<u64> {
        self.first.0..self.first.0 + self.len_blocks
    }
}

/// A write that is in the log.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    seq: Seq,
    id: RequestId,
    since: Now,
    logged: Logged,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Held {
    /// In the order of their numbers: a channel draws rising ones.
    waiting: VecDeque<Waiting>,
    /// So many from the front on are not waited for any more.
    given_up: usize,
}

impl Held {
    pub(super) fn new() -> Self {
        Self {
            waiting: VecDeque::with_capacity(REQUEST_COUNT_MAX),
            given_up: 0,
        }
    }

    /// All that wait now fail with the next poll: they are in the log, but nobody waits for the base any more.
    pub(super) fn give_up(&mut self) {
        self.given_up = self.waiting.len();
    }
}

impl Core {
    /// A write that was committed under `seq` waits for the base.
    pub(super) fn hold<P>(&mut self, cache: &Cache<P>, seq: Seq, logged: Logged, id: RequestId) {
        self.held.waiting.push_back(Waiting {
            seq,
            id,
            since: self.now,
            logged,
        });
        // Write-back has a reason now.
        cache.mode.hold(seq);
    }

    /// Completes what the base has by now.
    pub(super) fn poll_held<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        if self.held.waiting.is_empty() {
            return;
        }
        let mode = cache.settings.cache_mode();
        let dirty_tail = cache.dirty_tail();
        let in_vain = cache.writeback_stands.load(Ordering::Relaxed);
        let mut pages_left = PAGES_PER_POLL;
        for _ in 0..REQUESTS_PER_POLL {
            let Some(write) = self.held.waiting.front().copied() else {
                return;
            };
            // INV-MODE-1: what is acknowledged in such a mode is on the base.
            let there = write.seq <= dirty_tail;
            let status = if there || !mode.holds_writes() {
                Status::Success
            } else if self.held.given_up > 0 || in_vain {
                Status::Failed
            } else {
                return;
            };
            if there && mode.forgets_writes() && !self.forget(cache, &write, &mut pages_left) {
                return;
            }
            self.held.waiting.pop_front();
            self.held.given_up = self.held.given_up.saturating_sub(1);
            let histogram = &self.counters(cache).histograms.held_write_us;
            histogram.note_length(write.since, self.now);
            self.complete(cache, write.id, status, out);
        }
    }

    /// Takes the pages of a write that the base has out of the index, as far as the base has them. `false`: not now.
    fn forget<P: Pmem>(&self, cache: &Cache<P>, write: &Waiting, pages_left: &mut u64) -> bool {
        let Some(request) = self.requests.get(write.id) else {
            return true;
        };
        if *pages_left == 0 {
            return false;
        }
        for page in pages(cache, request.io.lba, request.io.len_blocks) {
            let at = cache.index.locate(page);
            // INV-MODE-2: a newer write of the same page, which the base does not have yet, stays.
            let on_base =
                |place| cache.forget_if_clean(place) || canary::is(Canary::DirtyWriteForgotten);
            let is_done = cache.index.evict(at, self.owner(), on_base)
                && self.forget_logged(cache, at, &write.logged);
            if !is_done {
                return false;
            }
            *pages_left = pages_left.saturating_sub(1);
        }
        true
    }

    /// The same of what lies where the write itself was put: something newer in the same segment may still be dirty, and
    /// then the segment is not clean, but this is. `false`: not now.
    fn forget_logged<P: Pmem>(&self, cache: &Cache<P>, at: SlotRef, logged: &Logged) -> bool {
        let (index, places) = (&cache.index, logged.places());
        let Some(found) = index.lookup(at) else {
            return false;
        };
        let is_left = (0..cache.geometry.blocks_per_page()).any(|block| {
            matches!(found.map.block(block), BlockMap::Mapped(place) if places.contains(&place.0))
        });
        if !is_left {
            return true;
        }
        let segment = cache.segments.get(logged.segment);
        let evict = || {
            // Whoever publishes a place of another life of the segment does it under this claim, after that has begun.
            if segment.generation() != logged.generation {
                return true;
            }
            // INV-SEG-8.
            segment.note_forgotten();
            index.evict_places(at, &places)
        };
        index.with_claim(at, self.owner(), evict) == Some(true)
    }

    /// After an internal error.
    pub(super) fn fail_held<P>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        while let Some(Waiting { id, .. }) = self.held.waiting.pop_front() {
            self.complete(cache, id, Status::Failed, out);
        }
    }
}
