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
mod log;
mod overlay;
mod witness;

use crate::canary::{self, Canary};
use crate::engine::{
    BaseError, BaseKind, BaseOpId, BaseRequest, Cache, CheckpointNeed, Counters, Health, Outbox,
    Progress, WritebackOrder,
};
use crate::media::Tails;
use crate::pmem::Pmem;
use crate::units::{Agent, Lba, NS_PER_MS, NS_PER_S, Now, PAGE_SIZE_BYTES, Seq};
use batch::Batch;
use log::{Gathered, Limits, LogReader, LogStop, Taken};
use overlay::Overlay;
use std::sync::atomic::Ordering;

/// Dirty data older than about this are written back even if there is room.
const DIRTY_AGE_NS: u64 = 5 * NS_PER_S;
/// Above this share of the cache, in percent, dirty data are written back: enough of it stays free to take a
/// burst meanwhile.
const DIRTY_HIGH_PERCENT: u64 = 30;
/// Above this share it becomes urgent.
const DIRTY_URGENT_PERCENT: u64 = 45;
/// The first pause after an error of the base, and the longest.
const BACKOFF_NS_MIN: u64 = 50 * NS_PER_MS;
const BACKOFF_NS_MAX: u64 = 5 * NS_PER_S;
/// How long the base should need for a batch: while there is room, and while there is little.
const BATCH_MS: u64 = 60;
const BATCH_MS_URGENT: u64 = 20;
/// Payload of a batch: the least limit, and the first.
const BATCH_BYTES_MIN: u64 = 16 << 20;
/// The rate of the base is not learnt from shorter batches.
const RATE_BYTES_MIN: u64 = 4 << 20;
/// A batch takes at most this part of the cache.
const BATCH_CACHE_PARTS: u64 = 8;
/// Keys of a batch, at most: bounds the DRAM of the overlay (32 bytes each) to 16 MiB.
const BATCH_KEYS_MAX: usize = 512 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing under way.
    Idle,
    /// The keys of the batch are being taken from the log.
    Gathering,
    /// Operations of the batch are under way.
    Writing,
    /// The flush behind the batch is under way.
    Flushing,
    /// After an error: what failed is repeated from then on.
    Backoff(Now),
    /// Dirty data or their keys are damaged: standing still keeps everything that is left.
    Halted,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Writeback {
    state: State,
    log: LogReader,
    overlay: Overlay,
    taken: Taken,
    limits: Limits,
    batch: Batch,
    batch_start: Now,
    /// What the base lately took, in bytes a millisecond, its flushes included.
    base_rate: u64,
    backoff_ns: u64,
    dirty_since: Option<Now>,
    /// Everything below this is wanted on the base.
    target: Seq,
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
    /// Somebody needs space that only write-back can make.
    pub(crate) urgent: bool,
}

impl Writeback {
    pub(crate) fn new(segment_count: usize) -> Self {
        Self {
            state: State::Idle,
            log: LogReader::new(segment_count),
            overlay: Overlay::default(),
            taken: Taken::NOTHING,
            limits: Limits {
                settled: Seq(0),
                order: WritebackOrder::Strict,
                bytes: 0,
                key_count: 0,
                reach: Seq(0),
            },
            batch: Batch::new(),
            batch_start: Now(0),
            base_rate: 0,
            backoff_ns: BACKOFF_NS_MIN,
            dirty_since: None,
            target: Seq(0),
        }
    }

    /// Base operations that were asked for and have not ended.
    pub(crate) fn in_flight(&self) -> usize {
        self.batch.in_flight() + usize::from(self.state == State::Flushing)
    }

    pub(crate) fn poll<P: Pmem>(
        &mut self,
        context: &mut Context<'_, P>,
        now: Now,
        out: &mut Outbox,
    ) -> Progress {
        match self.state {
            State::Idle => self.begin(context, now),
            State::Gathering => self.gather(context),
            State::Writing => self.go_on(context, now, out),
            State::Backoff(until) if now >= until => {
                self.batch.failed = false;
                self.state = State::Writing;
                self.go_on(context, now, out)
            }
            State::Flushing | State::Backoff(_) | State::Halted => Progress::Idle,
        }
    }

    /// After a stop: ends the batch under way, so that the base is an exact past state, unless it fails.
    pub(crate) fn poll_last<P: Pmem>(
        &mut self,
        context: &mut Context<'_, P>,
        now: Now,
        out: &mut Outbox,
    ) -> Progress {
        if self.state == State::Writing {
            self.go_on(context, now, out)
        } else {
            Progress::Idle
        }
    }

    /// After a stop: operations still to end, or to be started.
    pub(crate) fn left_to_stop(&self) -> usize {
        let unfinished = self.state == State::Writing && !self.batch.failed;
        self.in_flight().max(usize::from(unfinished))
    }

    /// Whether there is a reason to write back now.
    fn is_wanted<P: Pmem>(
        &mut self,
        context: &Context<'_, P>,
        settled: Seq,
        checkpoint: CheckpointNeed,
        now: Now,
    ) -> bool {
        let cache = context.cache;
        if !self.log.has_below(settled) {
            self.dirty_since = None;
            cache.end_drain(settled);
            return false;
        }
        let since = *self.dirty_since.get_or_insert(now);
        let old = now.since_ns(since) >= DIRTY_AGE_NS;
        let much = dirty_percent(cache) >= DIRTY_HIGH_PERCENT;
        if context.urgent || old || much || cache.drain_running() {
            self.target = settled;
        }
        if let CheckpointNeed::WriteBack(upto) = checkpoint {
            self.target = self.target.max(upto);
        }
        cache.dirty_tail().0 + 1 < self.target.0
    }

    /// Begins a batch if there is a reason for one.
    fn begin<P: Pmem>(&mut self, context: &mut Context<'_, P>, now: Now) -> Progress {
        // Everything below this is in the log before its end is looked for.
        let settled = context.cache.seq_settled();
        if let Err(stop) = self.log.refresh(context.cache) {
            return self.halt(context, &stop);
        }
        // The last batch has ended, and no other has begun: the base is at a cut (INV-CKPT-1).
        let checkpoint = context
            .cache
            .checkpoint
            .need(now, context.cache.dirty_tail(), |upto| {
                upto <= settled && !self.log.has_below(upto)
            });
        let wanted = self.is_wanted(context, settled, checkpoint, now);
        if !wanted || checkpoint == CheckpointNeed::Hold {
            return Progress::Idle;
        }
        let wanted_ms = if context.urgent || is_urgent(context.cache) {
            BATCH_MS_URGENT
        } else {
            BATCH_MS
        };
        let bytes = self
            .base_rate
            .saturating_mul(wanted_ms)
            .max(BATCH_BYTES_MIN);
        let bytes_max = (capacity_bytes(context.cache) / BATCH_CACHE_PARTS).max(1);
        self.limits = Limits {
            settled,
            order: context.order,
            bytes: bytes.min(bytes_max),
            key_count: BATCH_KEYS_MAX,
            reach: context.tails.batch_end,
        };
        self.overlay.clear();
        self.taken = Taken::NOTHING;
        self.batch_start = now;
        self.state = State::Gathering;
        self.gather(context)
    }

    /// Takes the next ksets of the log.
    fn gather<P: Pmem>(&mut self, context: &mut Context<'_, P>) -> Progress {
        let (taken, overlay) = (&mut self.taken, &mut self.overlay);
        match self.log.gather(context.cache, &self.limits, taken, overlay) {
            Err(stop) => return self.halt(context, &stop),
            Ok(Gathered::InPart) => return Progress::Busy,
            Ok(Gathered::Complete) => {}
        }
        let Some(last_seq) = self.taken.last_seq else {
            self.state = State::Idle;
            return Progress::Idle;
        };
        self.batch.last_seq = last_seq;
        self.batch.dirty_bytes = self.taken.dirty_bytes;
        self.batch.rewind(&mut self.overlay);
        if self.batch.has_ops && last_seq > context.tails.batch_end {
            // Before the first base write: after a cut in the middle of the batch the next one goes at least
            // as far, and the base is an exact past state again at its end (INV-WB-2).
            context.tails.batch_end = last_seq;
            if !canary::is(Canary::BatchEndNotRecorded) {
                context.cache.persist_tails(context.tails, context.agent);
            }
        }
        self.state = State::Writing;
        Progress::Busy
    }

    /// Starts operations as long as there is room, and ends the batch when all are done.
    fn go_on<P: Pmem>(
        &mut self,
        context: &mut Context<'_, P>,
        now: Now,
        out: &mut Outbox,
    ) -> Progress {
        if self.batch.failed {
            if self.batch.in_flight() == 0 {
                self.back_off(now);
            }
            return Progress::Idle;
        }
        assert!(
            !self.batch.has_ops || self.batch.last_seq <= context.tails.batch_end,
            "INV-WB-2: a batch up to {:?} is begun, but the tails say {:?}",
            self.batch.last_seq,
            context.tails.batch_end
        );
        let cache = context.cache;
        let started = self
            .batch
            .start_ops(cache, context.tails, &mut self.overlay, out);
        if !self.batch.is_done() {
            return if started {
                Progress::Busy
            } else {
                Progress::Idle
            };
        }
        if self.batch.has_ops && cache.base_caps.flush {
            if canary::is(Canary::TailBeforeBaseFlush) {
                context.tails.dirty_tail = self.batch.last_seq;
                cache.persist_tails(context.tails, context.agent);
            }
            self.state = State::Flushing;
            out.base.push(BaseRequest {
                op: FLUSH_OP,
                kind: BaseKind::Flush,
                lba: Lba(0),
                len_blocks: cache.base.block_count,
            });
        } else {
            self.finish(context, now);
        }
        Progress::Busy
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
            if let Some(error) = self.batch.on_done(op, result) {
                note_error(context, "write", error);
            }
            return;
        }
        match result {
            Ok(()) => self.finish(context, now),
            Err(_) if canary::is(Canary::FailedBaseFlushIgnored) => self.finish(context, now),
            // A flush that failed may have lost what was written: all of it is written again.
            Err(error) => {
                if !canary::is(Canary::OnlyBaseFlushRepeated) {
                    self.batch.rewind(&mut self.overlay);
                }
                note_error(context, "flush", error);
                self.back_off(now);
            }
        }
    }

    fn back_off(&mut self, now: Now) {
        self.state = State::Backoff(Now(now.0 + self.backoff_ns));
        self.backoff_ns = (self.backoff_ns * 2).min(BACKOFF_NS_MAX);
    }

    /// Everything of the batch is on the base and flushed: the dirty tail moves.
    fn finish<P: Pmem>(&mut self, context: &mut Context<'_, P>, now: Now) {
        let (cache, batch) = (context.cache, &self.batch);
        assert!(
            batch.is_done() && !batch.failed,
            "INV-TAIL-3: the dirty tail moves to {:?} with base operations left",
            batch.last_seq
        );
        if !canary::is(Canary::WitnessNotRenewed) {
            batch.witness.apply(context.tails);
        }
        context.tails.dirty_tail = batch.last_seq;
        cache.persist_tails(context.tails, context.agent);
        cache
            .dirty_bytes
            .fetch_sub(batch.dirty_bytes, Ordering::Relaxed);
        let counters = context.counters;
        counters.writeback_batches.add(1);
        counters.writeback_bytes.add(batch.written_bytes);
        counters
            .absorbed_bytes
            .add(batch.dirty_bytes.saturating_sub(batch.written_bytes));
        if matches!(cache.health(), Health::WritebackFailing(_)) {
            cache.set_health(Health::Online);
        }
        self.learn_rate(now);
        self.backoff_ns = BACKOFF_NS_MIN;
        self.dirty_since = None;
        self.state = State::Idle;
    }

    /// Learns from a batch what the base takes.
    fn learn_rate(&mut self, now: Now) {
        let bytes = self.batch.dirty_bytes;
        if bytes < RATE_BYTES_MIN {
            return;
        }
        let took_ns = now.since_ns(self.batch_start).max(1);
        let rate = u128::from(bytes) * u128::from(NS_PER_MS) / u128::from(took_ns);
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        // Half of what was known stays, so that one lucky batch does not make the next one too long.
        self.base_rate = self.base_rate / 2 + rate / 2;
    }

    fn halt<P: Pmem>(&mut self, context: &Context<'_, P>, stop: &LogStop) -> Progress {
        self.state = State::Halted;
        context.counters.crc_errors.add(1);
        context.cache.set_health(Health::Degraded(stop.to_string()));
        context.cache.checkpoint.fail(&stop.to_string());
        Progress::Idle
    }
}

fn note_error<P: Pmem>(context: &Context<'_, P>, what: &str, error: BaseError) {
    context.counters.writeback_retries.add(1);
    let reason = format!("write-back waits: {error} ({what}); nothing is lost, it is repeated");
    context.cache.set_health(Health::WritebackFailing(reason));
}

/// Whether so much is dirty that write-back should not wait for a quiet moment.
pub(crate) fn is_urgent<P: Pmem>(cache: &Cache<P>) -> bool {
    dirty_percent(cache) >= DIRTY_URGENT_PERCENT
}

/// Dirty data, as a share of what the log has room for.
fn dirty_percent<P: Pmem>(cache: &Cache<P>) -> u64 {
    let dirty_bytes = cache.dirty_bytes.load(Ordering::Relaxed);
    dirty_bytes / (capacity_bytes(cache) / 100).max(1)
}

/// Payload that the log has room for, roughly.
fn capacity_bytes<P: Pmem>(cache: &Cache<P>) -> u64 {
    let pages_per_segment = cache.geometry.segment_room_bytes() / u64::from(PAGE_SIZE_BYTES);
    u64::from(cache.geometry.segment_count()) * pages_per_segment * u64::from(PAGE_SIZE_BYTES)
}
