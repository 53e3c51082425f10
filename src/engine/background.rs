//! The background: write-back, reclaiming, and options that are to be persisted. One thread runs it.

use super::cache::{BACKGROUND_AGENT, Cache, lock};
use super::io::{BaseError, BaseOpId, Outbox, Progress};
use super::stats::Counters;
use crate::gc::Gc;
use crate::media::{Tails, persist_superblock};
use crate::pmem::Pmem;
use crate::units::{Agent, Now, Seq};
use crate::writeback::{Context, Writeback};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// How badly background work is needed, for whoever shares a core between it and requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// There is room: requests come first.
    Low,
    /// A drain or a checkpoint was asked for, or little room is left.
    High,
    /// Requests wait for it.
    Waiting,
}

/// See the module.
#[derive(Debug)]
pub struct Background<P: Pmem> {
    cache: Arc<Cache<P>>,
    tails: Tails,
    writeback: Writeback,
    gc: Gc,
    stopping: bool,
    now: Now,
}

impl<P: Pmem> Background<P> {
    pub(super) fn new(cache: Arc<Cache<P>>, tails: Tails) -> Self {
        let writeback = Writeback::new(cache.segments.count());
        Self {
            cache,
            tails,
            writeback,
            gc: Gc::default(),
            stopping: false,
            now: Now(0),
        }
    }

    #[cfg(test)]
    pub(super) fn tails(&self) -> Tails {
        self.tails
    }

    /// Does a bounded piece of work.
    pub fn poll(&mut self, now: Now, out: &mut Outbox) -> Progress {
        self.now = now;
        if self.cache.has_failed() {
            return Progress::Idle;
        }
        if self.stopping {
            return self.poll_last(now, out);
        }
        self.persist_options();
        let reclaimed = self.gc.poll(
            &self.cache,
            &mut self.tails,
            BACKGROUND_AGENT,
            counters(&self.cache),
        );
        let mut context = context(&self.cache, &mut self.tails);
        context.urgent = self.gc.needs_writeback();
        let written = self.writeback.poll(&mut context, now, out);
        if reclaimed == Progress::Busy {
            reclaimed
        } else {
            written
        }
    }

    /// A base operation has ended.
    pub fn on_base_done(&mut self, op: BaseOpId, result: Result<(), BaseError>) {
        let mut context = context(&self.cache, &mut self.tails);
        self.writeback
            .on_base_done(&mut context, op, result, self.now);
    }

    fn poll_last(&mut self, now: Now, out: &mut Outbox) -> Progress {
        let mut context = context(&self.cache, &mut self.tails);
        self.writeback.poll_last(&mut context, now, out)
    }

    /// From now on only the batch under way is brought to its end, and given up at the first error.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// How badly its work is needed now.
    #[must_use]
    pub fn pressure(&self) -> Pressure {
        if self.cache.space_wanted.load(Ordering::Relaxed) {
            Pressure::Waiting
        } else if self.gc.needs_writeback()
            || self.cache.drain_running()
            || self.cache.checkpoint.is_writing_back()
            || crate::writeback::is_urgent(&self.cache)
        {
            Pressure::High
        } else {
            Pressure::Low
        }
    }

    /// Base operations that were asked for and have not ended; after [`Background::stop`], those still to
    /// come count too.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        if self.stopping && !self.cache.has_failed() {
            self.writeback.left_to_stop()
        } else {
            self.writeback.in_flight()
        }
    }

    fn persist_options(&self) {
        if !self.cache.superblock_changed.swap(false, Ordering::AcqRel) {
            return;
        }
        let mut superblock = lock(&self.cache.superblock);
        drop(persist_superblock(
            &self.cache.pmem,
            BACKGROUND_AGENT,
            &mut superblock,
        ));
    }
}

impl<P: Pmem> Drop for Background<P> {
    fn drop(&mut self) {
        *lock(&self.cache.background_parts) = Some(self.tails);
    }
}

/// What write-back works with, without hurry.
fn context<'a, P>(cache: &'a Cache<P>, tails: &'a mut Tails) -> Context<'a, P> {
    Context {
        cache,
        tails,
        agent: BACKGROUND_AGENT,
        counters: counters(cache),
        order: cache.settings.writeback_order(),
        urgent: false,
    }
}

fn counters<P>(cache: &Cache<P>) -> &Counters {
    &cache.counters[cache.counters.len() - 1]
}

impl<P: Pmem> Cache<P> {
    /// Makes the tails durable, then lets everybody know.
    pub(crate) fn persist_tails(&self, tails: &mut Tails, agent: Agent) {
        let (seq_next, epoch) = (
            Seq(self.seq_next.load(Ordering::SeqCst)),
            self.epoch.load(Ordering::SeqCst),
        );
        assert!(
            tails.key_tail <= tails.dirty_tail && tails.dirty_tail < seq_next,
            "INV-TAIL-1: key_tail <= dirty_tail < {seq_next:?} in {tails:?}"
        );
        assert!(
            tails.dirty_tail >= self.dirty_tail()
                && tails.seq_next_min <= seq_next
                && tails.epoch_min <= epoch,
            "INV-TAIL-2: a tail goes back: {tails:?}, {seq_next:?}, epoch {epoch}"
        );
        tails.seq_next_min = seq_next;
        tails.epoch_min = epoch;
        drop(tails.persist(&self.pmem, agent, &self.checksums));
        // INV-TAIL-4: only now may anything count as clean that did not before.
        self.dirty_tail.store(tails.dirty_tail.0, Ordering::Release);
    }
}
