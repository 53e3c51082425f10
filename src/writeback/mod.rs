//! Write-back: dirty data to the base device, in the order of the log.
//!
//! A batch is everything between the dirty tail and a sequence number, overlaid so that the newest wins,
//! sorted by address and merged. It is written, the base is flushed, and only then does the dirty tail move:
//! between batches the base is an exact past state of the cache. In strict order a batch never spans an
//! epoch border, so that the barriers of the application hold on the base at any moment.

mod log;
mod overlay;
mod witness;

use crate::engine::{
    BaseError, BaseKind, BaseOpId, BaseRequest, Cache, Counters, Health, Outbox, Progress,
    WritebackOrder,
};
use crate::media::{KeyKind, Tails};
use crate::pmem::{MemSlice, Pmem};
use crate::units::{Agent, NS_PER_MS, NS_PER_S, Now, Seq};
use log::{LogReader, LogStop};
use overlay::{Overlay, Piece};

/// Base operations under way at once.
const IN_FLIGHT_MAX: usize = 32;
/// Dirty data older than about this are written back even if there is room.
const DIRTY_AGE_NS: u64 = NS_PER_S;
/// The first pause after an error of the base, and the longest.
const BACKOFF_NS_MIN: u64 = 50 * NS_PER_MS;
const BACKOFF_NS_MAX: u64 = 5 * NS_PER_S;
/// One base write: bytes and pieces of memory.
const BASE_WRITE_BYTES_MAX: u64 = 1 << 20;
const BASE_WRITE_PIECES_MAX: usize = 128;

/// An operation on the base.
#[derive(Clone, Copy, Debug)]
struct BaseOp {
    kind: KeyKind,
    lba: crate::units::Lba,
    len_blocks: u64,
    /// Of a write: its memory, in `Batch::slices`.
    first_slice: usize,
    slice_count: usize,
    progress: OpProgress,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OpProgress {
    Todo,
    InFlight,
    Done,
}

/// What is being written. Its vectors keep their memory from batch to batch.
#[derive(Debug, Default)]
struct Batch {
    ops: Vec<BaseOp>,
    slices: Vec<MemSlice>,
    next_op: usize,
    in_flight: usize,
    failed: bool,
    last_seq: Seq,
    dirty_bytes: u64,
    written_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing under way.
    Idle,
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
    batch: Batch,
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
            batch: Batch::default(),
            backoff_ns: BACKOFF_NS_MIN,
            dirty_since: None,
            target: Seq(0),
        }
    }

    /// Base operations that were asked for and have not ended.
    pub(crate) fn in_flight(&self) -> usize {
        self.batch.in_flight + usize::from(self.state == State::Flushing)
    }

    pub(crate) fn poll<P: Pmem>(
        &mut self,
        context: &mut Context<'_, P>,
        now: Now,
        out: &mut Outbox,
    ) -> Progress {
        match self.state {
            State::Idle => self.start_batch(context, now, out),
            State::Writing => self.go_on(context, now, out),
            State::Backoff(until) if now >= until => {
                self.batch.failed = false;
                self.batch.next_op = 0;
                self.state = State::Writing;
                self.go_on(context, now, out)
            }
            State::Flushing | State::Backoff(_) | State::Halted => Progress::Idle,
        }
    }

    /// Whether there is a reason to write back now.
    fn is_wanted<P: Pmem>(&mut self, context: &Context<'_, P>, settled: Seq, now: Now) -> bool {
        if !self.log.has_below(settled) {
            self.dirty_since = None;
            return false;
        }
        let since = *self.dirty_since.get_or_insert(now);
        let drain = context.cache.drain_running();
        if context.urgent || drain || now.since_ns(since) >= DIRTY_AGE_NS {
            self.target = settled;
        }
        context.cache.dirty_tail().0 + 1 < self.target.0
    }

    /// Gathers the next batch and starts on it.
    fn start_batch<P: Pmem>(
        &mut self,
        context: &mut Context<'_, P>,
        now: Now,
        out: &mut Outbox,
    ) -> Progress {
        // Everything below this is in the log before its end is looked for.
        let settled = context.cache.seq_settled();
        if let Err(stop) = self.log.refresh(context.cache) {
            return self.halt(context, &stop.to_string());
        }
        if !self.is_wanted(context, settled, now) {
            return Progress::Idle;
        }
        if let Err(stop) = self.gather(context, settled) {
            return self.halt(context, &stop.to_string());
        }
        if self.log.batch_end().is_none() {
            return Progress::Idle;
        }
        self.state = State::Writing;
        self.go_on(context, now, out);
        Progress::Busy
    }

    /// Takes the next ksets of the log and turns them into base operations.
    fn gather<P: Pmem>(&mut self, context: &Context<'_, P>, settled: Seq) -> Result<(), LogStop> {
        let cache = context.cache;
        self.overlay.clear();
        let taken = self
            .log
            .take_batch(cache, settled, context.order, &mut self.overlay)?;
        self.batch.ops.clear();
        self.batch.slices.clear();
        self.batch.next_op = 0;
        self.batch.failed = false;
        self.batch.last_seq = taken.last_seq;
        self.batch.dirty_bytes = taken.dirty_bytes;
        self.batch.written_bytes = 0;
        let batch = &mut self.batch;
        self.overlay.resolve(|piece| batch.push(cache, piece));
        Ok(())
    }

    /// Starts operations as long as there is room, and ends the batch when all are done.
    fn go_on<P: Pmem>(
        &mut self,
        context: &mut Context<'_, P>,
        now: Now,
        out: &mut Outbox,
    ) -> Progress {
        if self.batch.failed {
            if self.batch.in_flight == 0 {
                self.back_off(context, now);
            }
            return Progress::Idle;
        }
        let started = self.start_ops(out);
        if self.batch.in_flight > 0 || self.batch.next_op < self.batch.ops.len() {
            return if started {
                Progress::Busy
            } else {
                Progress::Idle
            };
        }
        if !self.batch.ops.is_empty() && context.cache.base_caps.flush {
            self.state = State::Flushing;
            let len_blocks = context.cache.base.block_count;
            let lba = crate::units::Lba(0);
            out.base.push(BaseRequest {
                op: FLUSH_OP,
                kind: BaseKind::Flush,
                lba,
                len_blocks,
            });
        } else {
            self.finish(context);
        }
        Progress::Busy
    }

    fn start_ops(&mut self, out: &mut Outbox) -> bool {
        let batch = &mut self.batch;
        let before = batch.next_op;
        while batch.in_flight < IN_FLIGHT_MAX && batch.next_op < batch.ops.len() {
            let number = batch.next_op;
            batch.next_op += 1;
            let op = &mut batch.ops[number];
            if op.progress == OpProgress::Done {
                continue;
            }
            op.progress = OpProgress::InFlight;
            batch.in_flight += 1;
            let kind = match op.kind {
                KeyKind::Data | KeyKind::Fill => {
                    let first_source = out.sources.len() as u32;
                    let slices = &batch.slices[op.first_slice..op.first_slice + op.slice_count];
                    out.sources.extend_from_slice(slices);
                    BaseKind::Write {
                        first_source,
                        source_count: op.slice_count as u32,
                    }
                }
                KeyKind::Zeroes => BaseKind::WriteZeroes,
                KeyKind::Unmap => BaseKind::Unmap,
            };
            let (lba, len_blocks) = (op.lba, op.len_blocks);
            out.base.push(BaseRequest {
                op: BaseOpId(number as u32),
                kind,
                lba,
                len_blocks,
            });
        }
        batch.next_op > before
    }

    /// An operation has ended.
    pub(crate) fn on_base_done<P: Pmem>(
        &mut self,
        context: &mut Context<'_, P>,
        op: BaseOpId,
        result: Result<(), BaseError>,
        now: Now,
    ) {
        if op == FLUSH_OP {
            match result {
                Ok(()) => self.finish(context),
                // A flush that failed may have lost what was written: all of it is written again.
                Err(error) => {
                    for op in &mut self.batch.ops {
                        op.progress = OpProgress::Todo;
                    }
                    self.note_error(context, "flush", error);
                    self.back_off(context, now);
                }
            }
            return;
        }
        let Some(base_op) = self.batch.ops.get_mut(op.0 as usize) else {
            return;
        };
        self.batch.in_flight -= 1;
        match result {
            Ok(()) => base_op.progress = OpProgress::Done,
            Err(BaseError::Unsupported) if base_op.kind == KeyKind::Unmap => {
                base_op.kind = KeyKind::Zeroes;
                base_op.progress = OpProgress::Todo;
                self.batch.next_op = 0;
            }
            Err(error) => {
                base_op.progress = OpProgress::Todo;
                self.batch.failed = true;
                self.note_error(context, "write", error);
            }
        }
    }

    fn note_error<P: Pmem>(&self, context: &Context<'_, P>, what: &str, error: BaseError) {
        context.counters.writeback_retries.add(1);
        let reason = format!("write-back waits: {error} ({what}); nothing is lost, it is repeated");
        context.cache.set_health(Health::WritebackFailing(reason));
    }

    fn back_off<P: Pmem>(&mut self, _context: &Context<'_, P>, now: Now) {
        self.state = State::Backoff(Now(now.0 + self.backoff_ns));
        self.backoff_ns = (self.backoff_ns * 2).min(BACKOFF_NS_MAX);
    }

    /// Everything of the batch is on the base and flushed: the dirty tail moves.
    fn finish<P: Pmem>(&mut self, context: &mut Context<'_, P>) {
        let (cache, batch) = (context.cache, &self.batch);
        witness::update(context.tails, batch, &cache.geometry);
        context.tails.dirty_tail = batch.last_seq;
        cache.persist_tails(context.tails, context.agent);
        let _ = cache
            .dirty_bytes
            .fetch_sub(batch.dirty_bytes, std::sync::atomic::Ordering::Relaxed);
        let counters = context.counters;
        counters.writeback_batches.add(1);
        counters.writeback_bytes.add(batch.written_bytes);
        counters
            .absorbed_bytes
            .add(batch.dirty_bytes.saturating_sub(batch.written_bytes));
        if matches!(cache.health(), Health::WritebackFailing(_)) {
            cache.set_health(Health::Online);
        }
        self.backoff_ns = BACKOFF_NS_MIN;
        self.dirty_since = None;
        self.log.end_batch();
        self.state = State::Idle;
    }

    fn halt<P: Pmem>(&mut self, context: &Context<'_, P>, reason: &str) -> Progress {
        self.state = State::Halted;
        context.counters.crc_errors.add(1);
        context
            .cache
            .set_health(Health::Degraded(reason.to_owned()));
        Progress::Idle
    }
}

impl Batch {
    /// Adds a piece; pieces come sorted and do not overlap. Neighbours become one operation.
    fn push<P: Pmem>(&mut self, cache: &Cache<P>, piece: &Piece) {
        let bytes = cache.geometry.bytes(piece.len_blocks);
        let kind = match piece.kind {
            KeyKind::Unmap if !cache.base_caps.unmap => KeyKind::Zeroes,
            kind => kind,
        };
        let slice = piece.kind.has_payload().then(|| {
            self.written_bytes += bytes;
            cache.pmem.slice(piece.payload, bytes)
        });
        if let Some(last) = self.ops.last_mut()
            && last.kind == kind
            && last.lba.0 + last.len_blocks == piece.lba.0
            && (slice.is_none()
                || (cache.geometry.bytes(last.len_blocks) + bytes <= BASE_WRITE_BYTES_MAX
                    && last.slice_count < BASE_WRITE_PIECES_MAX))
        {
            last.len_blocks += piece.len_blocks;
            last.slice_count += slice.iter().count();
        } else {
            self.ops.push(BaseOp {
                kind,
                lba: piece.lba,
                len_blocks: piece.len_blocks,
                first_slice: self.slices.len(),
                slice_count: slice.iter().count(),
                progress: OpProgress::Todo,
            });
        }
        self.slices.extend(slice);
    }
}
