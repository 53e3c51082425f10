//! Write-back: dirty data to the base device, in the order of the log.
//!
//! A batch is everything between the dirty tail and a sequence number, overlaid so that the newest wins,
//! sorted by address and merged. It is written, the base is flushed, and only then does the dirty tail move:
//! between batches the base is an exact past state of the cache. In strict order a batch never spans an
//! epoch border, so that the barriers of the application hold on the base at any moment.
//!
//! The larger a batch, the more overwrites it absorbs and the longer its base writes; but a writer that waits
//! for room waits for a whole batch. So a batch is what the base lately took in a certain time: a longer one
//! while there is room, a shorter one while there is little.

mod batch;
mod clearing;
mod index_share;
mod log;
mod lost;
mod next;
mod overlay;
mod pace;
mod parts;
mod pass_clean;
mod salvage;
mod trouble;
mod wanted;
mod witness;

use crate::canary::{self, Canary};
use crate::engine::{
    BaseError, BaseKind, BaseOpId, BaseRequest, Budget, Cache, CheckpointNeed, Counters, Health,
    Outbox, Progress, WritebackOrder, ZeroesWent,
};
use crate::gc::Lack;
use crate::media::{Geometry, KEY_SIZE_BYTES, KSET_KEYS_MAX, Tails};
use crate::memory::NoMemory;
use crate::pmem::Pmem;
use crate::units::{Agent, Lba, NS_PER_MS, NS_PER_S, Now, Seq};
use batch::Batch;
pub(crate) use batch::{BASE_WRITE_BYTES_MAX, BASE_WRITE_EXTENTS_MAX, BATCH_OPS_MAX};
pub(crate) use clearing::BASE_CLEAR_BYTES_MAX;
use clearing::{BaseRates, Load};
use index_share::IndexShare;
use log::{KeysLost, LogReader};
use next::{Hurry, Next};
use pace::{Reasons, Throttle};
pub(crate) use pace::{excess, is_above_low};
use parts::Behind;
use salvage::Salvage;
use std::mem;
use std::sync::atomic::Ordering;
use trouble::note_error;
use wanted::BATCH_KEYS_MAX;

/// The first pause after an error of the base, and the longest.
const BACKOFF_NS_MIN: u64 = 50 * NS_PER_MS;
const BACKOFF_NS_MAX: u64 = 5 * NS_PER_S;
/// How often it is looked whether damaged data have been overwritten.
const DAMAGE_LOOK_NS: u64 = 10 * NS_PER_MS;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No batch is being written.
    Idle,
    /// Operations of the batch are under way.
    Writing,
    /// The flush behind the batch is under way.
    Flushing,
    /// After an error: what failed is repeated from then on.
    Backoff(Now),
    /// Dirty data are damaged. Whether they have been overwritten is looked at from then on.
    Damaged(Now),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Writeback {
    /// Of `batch`.
    state: State,
    log: LogReader,
    salvage: Salvage,
    /// Everything below this was in the log when it was looked at last.
    settled: Seq,
    next: Next,
    batch: Batch,
    batch_start: Now,
    flush_start: Now,
    stopping: bool,
    base_rates: BaseRates,
    backoff_ns: u64,
    /// Of this batch, a flush has.
    flush_failed: bool,
    reasons: Reasons,
    throttle: Throttle,
    index_share: IndexShare,
    /// Everything below this is wanted on the base.
    target: Seq,
    /// Up to here base writes have failed since the cache's memory cannot be read, or may have ended the process.
    read_upto: Seq,
    /// When the tail may pass what is clean again.
    pass_clean_at: Now,
    /// A batch has room for so many keys, and for those of one kset more.
    room: usize,
    /// See [`Writeback::progress`].
    progress: u64,
    /// What has been done of the batch since it was begun, or begun again, and the most that ever was.
    done: u64,
    done_max: u64,
}

/// The number of the flush among the operations of the background.
const FLUSH_OP: BaseOpId = BaseOpId(u32::MAX);

/// What write-back works with.
pub(crate) struct Context<'a, P> {
    pub(crate) cache: &'a Cache<P>,
    pub(crate) tails: &'a mut Tails,
    pub(crate) agent: Agent,
    pub(crate) counters: &'a Counters,
    pub(crate) order: WritebackOrder,
    /// For want of what something has to become clean.
    pub(crate) lack: Lack,
}

impl Writeback {
    /// For a cache of this geometry.
    pub(crate) fn new(geometry: &Geometry) -> Result<Self, NoMemory> {
        let device_bytes = u64::from(geometry.segment_count()) * geometry.segment_size_bytes();
        // A small cache has no room for more keys.
        let keys_max = (device_bytes / KEY_SIZE_BYTES as u64).min(BATCH_KEYS_MAX) as usize;
        let key_count = keys_max + KSET_KEYS_MAX;
        Ok(Self {
            state: State::Idle,
            log: LogReader::new(geometry.segment_count() as usize)?,
            salvage: Salvage::default(),
            settled: Seq(0),
            next: Next::new(key_count)?,
            batch: Batch::new(key_count)?,
            batch_start: Now(0),
            flush_start: Now(0),
            stopping: false,
            base_rates: BaseRates::default(),
            backoff_ns: BACKOFF_NS_MIN,
            flush_failed: false,
            reasons: Reasons::default(),
            throttle: Throttle::default(),
            index_share: IndexShare::default(),
            target: Seq(0),
            read_upto: Seq(0),
            pass_clean_at: Now(0),
            room: keys_max,
            progress: 0,
            done: 0,
            done_max: 0,
        })
    }

    /// Changes whenever write-back has got farther than it was, be it within a batch. What is done once more for an error does
    /// not count, but for the first time that all of it is, behind a flush that failed.
    pub(crate) fn progress(&self) -> u64 {
        self.progress
    }

    /// More of the batch has been gathered, or is on the base.
    fn get_on(&mut self) {
        self.done += 1;
        if self.done > self.done_max {
            self.done_max = self.done;
            self.progress += 1;
        }
    }

    /// For a cache that has been opened, whose next number this is. What it holds from before is read as a whole before it is
    /// handed to the base: a base that copies with the CPU and meets lost memory ends the process (`guard.rs`), and would do so
    /// again after each start.
    pub(crate) fn begin_behind(&mut self, seq_next: Seq) {
        self.read_upto = Seq(seq_next.0.saturating_sub(1));
    }

    /// Base operations that were asked for and have not ended.
    pub(crate) fn in_flight(&self) -> usize {
        self.batch.in_flight() + usize::from(self.state == State::Flushing)
    }

    /// A bounded piece of work, of some microseconds: for the batch under way, and for the next one.
    pub(crate) fn poll<P: Pmem>(
        &mut self,
        context: &mut Context<'_, P>,
        now: Now,
        budget: Budget,
        out: &mut Outbox,
    ) -> Progress {
        self.tell_age(context.cache, now);
        self.index_share.poll(context.cache, now);
        let prepared = self.prepare(context, now);
        let need = self.checkpoint_need(context.cache, now);
        let tail_stands = need == CheckpointNeed::Hold || self.is_held_up();
        let cache = context.cache;
        cache.tail_stands.store(tail_stands, Ordering::Relaxed);
        match need {
            CheckpointNeed::Hold => return prepared,
            CheckpointNeed::WriteBack(upto) => self.target = self.target.max(upto),
            CheckpointNeed::Nothing => {}
        }
        if self.state == State::Idle {
            if self.next.is_ready() {
                self.begin(context, now);
            } else if self.next.is_damaged() {
                self.stand_still(context.cache, now);
            }
        }
        self.pass_clean(context, now);
        let written = self.write(context, now, budget, out);
        if prepared == Progress::Busy {
            prepared
        } else {
            written
        }
    }

    fn write<P: Pmem>(
        &mut self,
        context: &mut Context<'_, P>,
        now: Now,
        budget: Budget,
        out: &mut Outbox,
    ) -> Progress {
        self.batch.looked_for_cause = false;
        match self.state {
            State::Writing => self.go_on(context, now, budget, out),
            State::Backoff(until) if now >= until && self.batch.source_lost => {
                self.start_over();
                Progress::Busy
            }
            State::Backoff(until) if now >= until && self.batch.is_void => {
                self.batch.is_void = false;
                self.state = State::Idle;
                Progress::Busy
            }
            State::Backoff(until) if now >= until => {
                self.batch.failed = false;
                self.state = State::Writing;
                self.go_on(context, now, budget, out)
            }
            State::Damaged(until) if now >= until => self.look_at_damage(context, now),
            State::Idle | State::Flushing | State::Backoff(_) | State::Damaged(_) => Progress::Idle,
        }
    }

    /// From now on no batch is begun, but for a salvage.
    pub(crate) fn stop(&mut self) {
        self.stopping = true;
    }

    /// After a stop: ends the batch under way, so that the base is an exact past state, and a salvage, so that the keys which
    /// are lost are not missed at the next start; unless something fails.
    pub(crate) fn poll_last<P: Pmem>(
        &mut self,
        context: &mut Context<'_, P>,
        now: Now,
        budget: Budget,
        out: &mut Outbox,
    ) -> Progress {
        self.batch.looked_for_cause = false;
        match self.state {
            State::Writing if self.batch.behind != Behind::Nothing => {
                let prepared = self.prepare(context, now);
                let written = self.go_on(context, now, budget, out);
                if prepared == Progress::Busy {
                    prepared
                } else {
                    written
                }
            }
            State::Writing => self.go_on(context, now, budget, out),
            State::Idle if self.salvages_last(context.cache) => self.salvage_last(context, now),
            State::Backoff(until) if now >= until && self.retries_last(context.cache) => {
                self.salvage.has_retried = true;
                self.write(context, now, budget, out)
            }
            State::Idle | State::Flushing | State::Backoff(_) | State::Damaged(_) => Progress::Idle,
        }
    }

    /// After a stop: operations still to end, or to be started.
    pub(crate) fn left_to_stop<P>(&self, cache: &Cache<P>) -> usize {
        let unfinished = match self.state {
            State::Writing => !self.batch.failed || self.retries_last(cache),
            State::Idle => self.salvages_last(cache),
            State::Backoff(_) => self.retries_last(cache),
            State::Flushing | State::Damaged(_) => false,
        };
        self.in_flight().max(usize::from(unfinished))
    }

    /// What a checkpoint wants when no batch is under way: the last one has ended, and no other has begun, so
    /// the base is at a cut (INV-CKPT-1).
    fn checkpoint_need<P: Pmem>(&self, cache: &Cache<P>, now: Now) -> CheckpointNeed {
        if self.state != State::Idle {
            return CheckpointNeed::Nothing;
        }
        let is_on_base = |upto| {
            let gathered = self.next.taken.first_seq;
            upto <= self.settled
                && !self.salvage.is_pending()
                && !self.log.has_below(upto)
                && gathered.is_none_or(|first_seq| first_seq >= upto)
        };
        cache.checkpoint.need(now, cache.dirty_tail(), is_on_base)
    }

    /// How old the oldest data are that the base does not hold, at the most, for those who look.
    fn tell_age<P: Pmem>(&mut self, cache: &Cache<P>, now: Now) {
        let (dirty_tail, seq_next) = (cache.dirty_tail(), cache.seq_next());
        self.reasons.ages.note(dirty_tail, seq_next, now);
        // An unmap has no bytes.
        let is_dirty = cache.dirty_bytes.load(Ordering::Relaxed) > 0 || !self.is_all_clean();
        let age_ns = if is_dirty {
            self.reasons.ages.since_ns(dirty_tail, now)
        } else {
            0
        };
        cache
            .dirty_age_ms
            .store(age_ns / NS_PER_MS, Ordering::Relaxed);
    }

    /// Goes on with the next batch, or begins one if there is a reason.
    fn prepare<P: Pmem>(&mut self, context: &Context<'_, P>, now: Now) -> Progress {
        if !self.look_for_losses(context, now) {
            return Progress::Idle;
        }
        let prepared = self.try_prepare(context, now);
        prepared.unwrap_or_else(|KeysLost(id)| {
            if context.cache.segments.lose_keys(id) {
                context.counters.key_errors.add(1);
            }
            self.demand_salvage(context.cache);
            Progress::Busy
        })
    }

    fn try_prepare<P: Pmem>(
        &mut self,
        context: &Context<'_, P>,
        now: Now,
    ) -> Result<Progress, KeysLost> {
        if self.next.is_dry() {
            let Some(settled) = self.log.look(context.cache)? else {
                return Ok(Progress::Busy);
            };
            self.settled = settled;
            if !self.next.is_nothing() {
                self.next.extend(settled);
            } else if let Some(extent) = self.wanted(context, settled, now) {
                let limits = self.limits(context, settled, extent, now);
                self.next.begin(limits, now);
            }
        }
        let hurry = if self.state == State::Writing && !self.batch.is_handed_out() {
            Hurry::No
        } else {
            Hurry::Yes
        };
        let is_ready = self.next.is_ready();
        let (cache, counters) = (context.cache, context.counters);
        let progress = self.next.go_on(cache, counters, &mut self.log, hurry)?;
        if progress == Progress::Busy {
            self.get_on();
        }
        if self.next.is_ready() && !is_ready {
            let histogram = &counters.histograms.gather_us;
            histogram.note_length(self.next.begun, now);
        }
        Ok(progress)
    }

    /// Begins to write the batch that is ready.
    fn begin<P: Pmem>(&mut self, context: &mut Context<'_, P>, now: Now) {
        let batch_end = context.tails.batch_end;
        self.take_over(context, now);
        if context.tails.batch_end != batch_end && !canary::is(Canary::BatchEndNotRecorded) {
            context.cache.persist_tails(context.tails, context.agent);
        }
    }

    /// Makes the next batch the one under way. The tails are to be persisted before its first base write:
    /// after a cut in the middle of the batch the next one goes at least as far, and the base is an exact
    /// past state again at its end (INV-WB-2).
    fn take_over<P: Pmem>(&mut self, context: &mut Context<'_, P>, now: Now) {
        let Some(last_seq) = self.next.taken.last_seq else {
            unreachable!("INV-WB-2: a batch that is ready has an end");
        };
        mem::swap(&mut self.batch.overlay, &mut self.next.overlay);
        if self.next.part.is_some() {
            self.take_over_part(last_seq);
        } else {
            self.batch.last_seq = last_seq;
            self.batch.reach = last_seq;
            self.batch.after = Seq(0);
            self.batch.has_parts = false;
            self.batch.dirty_bytes = self.next.taken.dirty_bytes;
            self.batch.rewind();
            self.batch_start = now;
        }
        self.gather_behind(now);
        if self.batch.has_ops {
            context.tails.batch_end = context.tails.batch_end.max(last_seq);
        }
        self.state = State::Writing;
    }

    /// Starts operations as long as there is room, and ends the batch when all are done.
    fn go_on<P: Pmem>(
        &mut self,
        context: &mut Context<'_, P>,
        now: Now,
        budget: Budget,
        out: &mut Outbox,
    ) -> Progress {
        if self.batch.failed {
            if self.batch.in_flight() == 0 && self.batch.source_lost {
                self.take_again(context, now);
            } else if self.batch.in_flight() == 0 {
                self.back_off(now);
            }
            return Progress::Idle;
        }
        assert!(
            !self.batch.has_ops || self.batch.reach <= context.tails.batch_end,
            "INV-WB-2: a batch up to {:?} is begun, but the tails say {:?}",
            self.batch.reach,
            context.tails.batch_end
        );
        let (cache, manners) = (context.cache, self.manners(context));
        let data_bytes = if self.stopping && !canary::is(Canary::StopKeepsToRate) {
            // Whoever stops waits for it.
            budget.base_write_bytes
        } else {
            self.throttle.allowance(cache, budget.base_write_bytes, now)
        };
        let load_max = Load {
            data_bytes,
            cleared_bytes: budget.base_clear_bytes,
        };
        let started = self
            .batch
            .start_ops(cache, context.tails, manners, load_max, now, out);
        self.throttle
            .take(cache, started.map_or(0, |load| load.data_bytes));
        if !self.batch.is_done() {
            return match started {
                Some(_) => Progress::Busy,
                None => Progress::Idle,
            };
        }
        if self.batch.behind != Behind::Nothing {
            return self.go_on_with_parts(context, now);
        }
        if self.batch.has_ops {
            let histogram = &context.counters.histograms.base_write_us;
            histogram.note_length(self.batch_start, now);
        }
        if self.batch.has_ops && cache.base_caps.flush {
            if canary::is(Canary::TailBeforeBaseFlush) {
                context.tails.dirty_tail = self.batch.last_seq;
                cache.persist_tails(context.tails, context.agent);
            }
            self.state = State::Flushing;
            self.flush_start = now;
            out.base.push(BaseRequest {
                op: FLUSH_OP,
                kind: BaseKind::Flush,
                lba: Lba(0),
                len_blocks: cache.block_count(),
            });
        } else {
            self.finish(context, now);
        }
        Progress::Busy
    }

    pub(crate) fn note_zeroes(&mut self, went: ZeroesWent) {
        self.batch.clearing_base.zeroes_went = went;
    }

    /// An operation has ended.
    pub(crate) fn on_base_done<P: Pmem>(
        &mut self,
        context: &mut Context<'_, P>,
        op: BaseOpId,
        result: Result<(), BaseError>,
        now: Now,
    ) {
        if op != FLUSH_OP {
            let is_told = self.batch.failed && !self.batch.source_lost;
            if result.is_ok() {
                self.get_on();
            }
            let failed = self.batch.on_done(op, result, now);
            if let Some(error) = failed
                && self.batch.look_for_cause(context.cache, op, error)
            {
                // No error of the base: taken again, the data are found to be damaged.
                return;
            }
            let errors = &context.counters.base_write_errors;
            errors.add(u64::from(result.is_err()));
            // What fails with it, before the next try, needs no other text.
            if let Some(error) = failed
                && !is_told
            {
                note_error(context, "write", error);
            }
            return;
        }
        let histogram = &context.counters.histograms.base_flush_us;
        histogram.note_length(self.flush_start, now);
        match result {
            Ok(()) => self.finish(context, now),
            Err(_) if canary::is(Canary::FailedBaseFlushIgnored) => self.finish(context, now),
            // A flush that failed may have lost what was written: all of it is written again.
            Err(error) => {
                if self.batch.has_parts && !canary::is(Canary::LastPartRepeated) {
                    self.start_over();
                    self.batch.is_void = true;
                } else if !canary::is(Canary::OnlyBaseFlushRepeated) {
                    self.batch.rewind();
                }
                self.done = 0;
                if !self.flush_failed {
                    self.done_max = 0;
                }
                self.flush_failed = true;
                context.counters.base_flush_errors.add(1);
                note_error(context, "flush", error);
                self.back_off(now);
            }
        }
    }

    /// An operation has ended after an internal error: the base owes it no more.
    pub(crate) fn count_off(&mut self, op: BaseOpId, now: Now) {
        if op == FLUSH_OP {
            self.state = State::Idle;
        } else {
            self.batch.on_done(op, Ok(()), now);
        }
    }

    /// Everything of the batch is on the base and flushed: the dirty tail moves. If the next batch is ready, its
    /// end is made durable in the same step.
    fn finish<P: Pmem>(&mut self, context: &mut Context<'_, P>, now: Now) {
        let (cache, batch) = (context.cache, &self.batch);
        assert!(
            batch.is_done() && !batch.failed && batch.behind == Behind::Nothing,
            "INV-TAIL-3: the dirty tail moves to {:?} with base operations left",
            batch.last_seq
        );
        if !canary::is(Canary::WitnessNotRenewed) {
            batch.witness.apply(context.tails);
        }
        context.tails.dirty_tail = batch.last_seq;
        let (dirty_bytes, written_bytes) = (batch.dirty_bytes, batch.written_bytes);
        let zeroes_bytes = batch.written.data_bytes - written_bytes;
        self.learn_rate(now);
        self.backoff_ns = BACKOFF_NS_MIN;
        self.flush_failed = false;
        (self.done, self.done_max) = (0, 0);
        self.salvage.end();
        self.state = State::Idle;
        // A checkpoint is asked first, between two batches: else it waits for as long as batch follows batch.
        let follows = self.next.is_ready()
            && !self.stopping
            && !cache.checkpoint.is_writing_back()
            && !canary::is(Canary::BatchEndNotRecorded);
        if follows {
            self.take_over(context, now);
        }
        cache.persist_tails(context.tails, context.agent);
        cache.dirty_bytes.fetch_sub(dirty_bytes, Ordering::Relaxed);
        let counters = context.counters;
        counters.writeback_batches.add(1);
        counters.writeback_dirty_bytes.add(dirty_bytes);
        counters.writeback_bytes.add(written_bytes);
        counters.writeback_zeroes_bytes.add(zeroes_bytes);
        counters
            .absorbed_bytes
            .add(dirty_bytes.saturating_sub(written_bytes));
        cache.forget_overwritten_damage();
        if !cache.is_online() && !self.salvage.is_pending() {
            // It got on; whatever held it up has passed.
            cache.set_health(Health::Online);
        }
    }

    /// Learns from a batch what the base takes.
    fn learn_rate(&mut self, now: Now) {
        let took_ns = now.since_ns(self.batch_start);
        self.base_rates.learn(self.batch.written, took_ns);
    }
}
