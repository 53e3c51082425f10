//! The background: write-back, reclaiming, scrubbing, and options that are to be persisted. One thread runs it.

use super::cache::{BACKGROUND_AGENT, Cache};
use super::cache_memory::BackgroundMemory;
use super::health::{Health, StallWatch};
use super::io::{BaseError, BaseOpId, Outbox, Progress};
use super::stats::Counters;
use crate::gc::{Gc, Lack};
use crate::media::Tails;
use crate::pmem::Pmem;
use crate::scrub::{self, Scrub};
use crate::units::{Agent, NS_PER_US, Now, Seq};
use crate::writeback::{Context, Writeback};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// How much one poll may do, for whoever shares a core between it and requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of base writes to be started, at most; also the size of the largest. A base that copies at once
    /// takes as long as that copy.
    pub base_write_bytes: u64,
    /// The same for what the base is to clear.
    pub base_clear_bytes: u64,
}

/// How the zeroes went to the base that were asked of it last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroesWent {
    /// By WRITE_ZEROES.
    #[default]
    AsAsked,
    /// It has failed that, and they were written.
    AsData,
}

impl Default for Budget {
    /// Nobody waits.
    fn default() -> Self {
        Self {
            base_write_bytes: crate::writeback::BASE_WRITE_BYTES_MAX,
            base_clear_bytes: crate::writeback::BASE_CLEAR_BYTES_MAX,
        }
    }
}

/// How badly background work is needed, in percent: 0, there is room, and requests come first; 100, requests
/// wait for it. For whoever shares a core between it and requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pressure(u8);

impl Pressure {
    /// There is room.
    pub(crate) const NONE: Pressure = Pressure(0);
    /// Requests wait for it.
    pub const WAITING: Pressure = Pressure(100);
    /// A drain or a checkpoint was asked for, a write waits for the base, keys are lost, or nothing can be reclaimed before more
    /// is written back, be it that few segments are free, or that more is dirty than the lower mark says.
    pub(crate) const WANTED: Pressure = Pressure(60);
    /// The most as long as no request waits.
    pub(crate) const UNAWAITED_MAX: Pressure = Pressure(90);

    /// Grows evenly with `part` of `whole`.
    fn of(part: u64, whole: u64) -> Self {
        let percent = part.min(whole) * Self::UNAWAITED_MAX.percent() / whole.max(1);
        Self(u8::try_from(percent).unwrap_or(u8::MAX))
    }

    /// In percent.
    #[must_use]
    pub const fn percent(self) -> u64 {
        self.0 as u64
    }
}

/// A time in which writes wait for room.
#[derive(Clone, Copy, Debug)]
struct Stalled {
    since: Now,
    /// How much of it has been counted.
    counted_us: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Background<P: Pmem> {
    cache: Arc<Cache<P>>,
    tails: Tails,
    writeback: Writeback,
    gc: Gc,
    scrub: Scrub,
    stopping: bool,
    /// Writes wait for room.
    stalled: Option<Stalled>,
    /// Up to here writes were known to wait for the base when the last poll began.
    held_seen: Seq,
    stall: StallWatch,
    read_stall: StallWatch,
    /// Base reads that had ended at the last look.
    reads_ended: u64,
    /// What was said of reads that the base does not answer.
    silence_told: Option<Health>,
}

impl<P: Pmem> Background<P> {
    pub(super) fn new(cache: Arc<Cache<P>>, tails: Tails, memory: BackgroundMemory) -> Self {
        let mut writeback = memory.writeback;
        writeback.begin_behind(cache.seq_next());
        Self {
            cache,
            tails,
            writeback,
            gc: memory.gc,
            scrub: Scrub::default(),
            stopping: false,
            stalled: None,
            held_seen: Seq(0),
            stall: StallWatch::default(),
            read_stall: StallWatch::default(),
            reads_ended: 0,
            silence_told: None,
        }
    }

    #[cfg(test)]
    pub(super) fn tails(&self) -> Tails {
        self.tails
    }

    /// Does a bounded piece of work, of some microseconds.
    pub fn poll(&mut self, now: Now, budget: Budget, out: &mut Outbox) -> Progress {
        if self.cache.has_failed() {
            return Progress::Idle;
        }
        self.cache.persist_changes();
        if self.stopping {
            return self.poll_last(now, budget, out);
        }
        self.held_seen = self.cache.mode.held_upto();
        self.watch_base(now);
        self.watch_reads(now);
        self.note_stall(now);
        let reclaimed = self.gc.poll(
            &self.cache,
            &mut self.tails,
            BACKGROUND_AGENT,
            self.cache.background_counters(),
        );
        let mut context = context(&self.cache, &mut self.tails);
        context.lack = self.gc.lack();
        let written = self.writeback.poll(&mut context, now, budget, out);
        let mut context = scrub::Context {
            cache: &self.cache,
            tails: &mut self.tails,
            agent: BACKGROUND_AGENT,
            counters: self.cache.background_counters(),
        };
        let scrubbed = self.scrub.poll(&mut context, now);
        if [reclaimed, written, scrubbed].contains(&Progress::Busy) {
            Progress::Busy
        } else {
            Progress::Idle
        }
    }

    /// To be told before the end of a WRITE_ZEROES: whether a base that claims to take it has. What comes next counts as that.
    pub fn note_zeroes(&mut self, went: ZeroesWent) {
        self.writeback.note_zeroes(went);
    }

    /// A base operation has ended.
    pub fn on_base_done(&mut self, op: BaseOpId, result: Result<(), BaseError>, now: Now) {
        self.stall.heard();
        if self.cache.has_failed() {
            // Nothing more is stored. Nor does anything follow from it.
            return self.writeback.count_off(op, now);
        }
        let mut context = context(&self.cache, &mut self.tails);
        self.writeback.on_base_done(&mut context, op, result, now);
    }

    /// Says so if the base answers no reads, and takes it back when it does.
    fn watch_reads(&mut self, now: Now) {
        let ended = self.cache.base_reads_ended.load(Ordering::Relaxed);
        if ended != self.reads_ended {
            self.reads_ended = ended;
            self.read_stall.heard();
        }
        let under_way = self.cache.base_reads.load(Ordering::Relaxed);
        if let Some(silent_s) = self.read_stall.silent_s(now, under_way as usize) {
            let told = self.tell_silence(silent_s, format_args!("{under_way} reads"));
            self.silence_told = told.or(self.silence_told.take());
        } else if let Some(told) = self.silence_told.take()
            && self.cache.health() == told
        {
            self.cache.set_health(Health::Online);
        }
    }

    /// Says so if the base does not answer. The next batch that ends takes it back.
    fn watch_base(&mut self, now: Now) {
        let in_flight = self.writeback.in_flight();
        let Some(silent_s) = self.stall.silent_s(now, in_flight) else {
            return;
        };
        self.tell_silence(
            silent_s,
            format_args!("{in_flight} operations of write-back"),
        );
    }

    /// Says that the base does not answer, unless something is wrong already. What was said.
    fn tell_silence(&self, silent_s: u64, under_way: fmt::Arguments<'_>) -> Option<Health> {
        if !self.cache.is_online() {
            return None;
        }
        let reason = format!(
            "the base has not answered for {silent_s} s, with {under_way} under way; nothing is lost"
        );
        let silent = Health::WritebackFailing(reason);
        self.cache.set_health(silent.clone());
        Some(silent)
    }

    fn poll_last(&mut self, now: Now, budget: Budget, out: &mut Outbox) -> Progress {
        let mut context = context(&self.cache, &mut self.tails);
        self.writeback.poll_last(&mut context, now, budget, out)
    }

    /// From now on only the batch under way, and what has to be saved, are brought to their end, and given up at the first
    /// error.
    pub fn stop(&mut self) {
        self.stopping = true;
        self.writeback.stop();
    }

    /// Whether writes that wait for nothing but the base have come since the last poll.
    #[must_use]
    pub fn has_new_held_writes(&self) -> bool {
        self.cache.mode.held_upto() > self.held_seen
    }

    /// Changes whenever write-back has got somewhere, be it within a batch, which may be long.
    #[must_use]
    pub fn progress(&self) -> u64 {
        self.writeback.progress()
    }

    /// How badly its work is needed now.
    #[must_use]
    pub fn pressure(&self) -> Pressure {
        let cache = &*self.cache;
        if cache.space_wanted.load(Ordering::Relaxed) {
            return Pressure::WAITING;
        }
        // Free segments and dirty data are kept from getting scarce, rather than fetched when they are.
        let wanted = cache.free_segments_wanted() as u64;
        let missing = wanted.saturating_sub(cache.segments.free_count() as u64);
        let space = Pressure::of(missing, wanted);
        let dirty = crate::writeback::excess(cache);
        let dirty = Pressure::of(dirty.part, dirty.whole);
        let lack = self.gc.lack();
        let wanted = lack >= Lack::Free
            || (lack == Lack::Ahead && crate::writeback::is_above_low(cache, 0))
            || self.writeback.is_salvaging()
            || cache.drain_wanted()
            || cache.checkpoint.is_writing_back();
        let least = if wanted {
            Pressure::WANTED
        } else {
            Pressure::NONE
        };
        space.max(dirty).max(least)
    }

    /// Base operations that were asked for and have not ended; after [`Background::stop`], those still to
    /// come count too.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        if self.stopping && !self.cache.has_failed() {
            self.writeback.left_to_stop(&self.cache)
        } else {
            self.writeback.in_flight()
        }
    }

    /// Measures for how long writes wait for room, and counts it as time passes: who looks at one that does not end
    /// sees it grow.
    fn note_stall(&mut self, now: Now) {
        let waiting = self.cache.space_wanted.load(Ordering::Relaxed);
        if !waiting && self.stalled.is_none() {
            return;
        }
        let counters = self.cache.background_counters();
        let stalled = self.stalled.get_or_insert_with(|| {
            counters.stalls.add(1);
            Stalled {
                since: now,
                counted_us: 0,
            }
        });
        let stall_us = (now.since_ns(stalled.since) / NS_PER_US).max(stalled.counted_us);
        counters.stall_us.add(stall_us - stalled.counted_us);
        stalled.counted_us = stall_us;
        let longest = &self.cache.stall_us_max;
        longest.fetch_max(stall_us, Ordering::Relaxed);
        if !waiting {
            self.stalled = None;
        }
    }
}

/// What write-back works with, without hurry.
fn context<'a, P>(cache: &'a Cache<P>, tails: &'a mut Tails) -> Context<'a, P> {
    Context {
        cache,
        tails,
        agent: BACKGROUND_AGENT,
        counters: cache.background_counters(),
        order: cache.settings.writeback_order(),
        lack: Lack::Nothing,
    }
}

impl<P> Cache<P> {
    /// The background's own.
    pub(crate) fn background_counters(&self) -> &Counters {
        &self.counters[self.counters.len() - 1]
    }
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
