//! Writes that are held: in the modes that promise so, a write completes when the base has it.
//!
//! It has gone through the log like any other, is durable and can be read. Its completion waits until the dirty tail
//! has passed its sequence number: then the base holds it and everything that was acknowledged before it, flushed.
//! One batch of write-back releases all that wait.

use super::cache::Cache;
use super::channel::{Core, REQUEST_COUNT_MAX, REQUESTS_PER_POLL, RequestId};
use super::io::{HostIo, Outbox, Status};
use super::write_path::pages;
use crate::canary::{self, Canary};
use crate::pmem::Pmem;
use crate::units::{Now, Seq};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;

/// Pages that one poll takes out of the index, at most; one request may go beyond.
const PAGES_PER_POLL: u64 = 1024;

/// A write that is in the log.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    seq: Seq,
    id: RequestId,
    since: Now,
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
    /// A write that was committed under `seq` waits for the base. Returns what it was, as [`Core::complete`] does.
    pub(super) fn hold<P>(&mut self, cache: &Cache<P>, seq: Seq, id: RequestId) -> Option<HostIo> {
        let since = self.now;
        self.held.waiting.push_back(Waiting { seq, id, since });
        // Write-back has a reason now.
        cache.mode.hold(seq);
        self.requests.get(id).map(|request| request.io)
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
            let Some(Waiting { seq, id, since }) = self.held.waiting.front().copied() else {
                return;
            };
            // INV-MODE-1: what is acknowledged in such a mode is on the base.
            let there = seq <= dirty_tail;
            let status = if there || !mode.holds_writes() {
                Status::Success
            } else if self.held.given_up > 0 || in_vain {
                Status::Failed
            } else {
                return;
            };
            if there && mode.forgets_writes() && !self.forget(cache, id, &mut pages_left) {
                return;
            }
            self.held.waiting.pop_front();
            self.held.given_up = self.held.given_up.saturating_sub(1);
            let histogram = &self.counters(cache).histograms.held_write_us;
            histogram.note_length(since, self.now);
            self.complete(cache, id, status, out);
        }
    }

    /// Takes the pages of a write out of the index, as far as the base has them. `false`: not now.
    fn forget<P: Pmem>(&self, cache: &Cache<P>, id: RequestId, pages_left: &mut u64) -> bool {
        let Some(request) = self.requests.get(id) else {
            return true;
        };
        let (index, owner) = (&cache.index, self.owner());
        if *pages_left == 0 {
            return false;
        }
        for page in pages(cache, request.io.lba, request.io.len_blocks) {
            let at = index.locate(page);
            // INV-MODE-2: a newer write of the same page, which the base does not have yet, stays.
            let on_base =
                |place| cache.forget_if_clean(place) || canary::is(Canary::DirtyWriteForgotten);
            if !index.evict(at, owner, on_base) {
                return false;
            }
            *pages_left = pages_left.saturating_sub(1);
        }
        true
    }

    /// After an internal error.
    pub(super) fn fail_held<P>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        while let Some(Waiting { id, .. }) = self.held.waiting.pop_front() {
            self.complete(cache, id, Status::Failed, out);
        }
    }
}
