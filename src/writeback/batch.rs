//! The batch that is being written: its base operations, made from the overlay as there is room.

use super::clearing::{BASE_CLEAR_BYTES_MAX, Clearing, ClearingBase, Load};
use super::lost::is_source_lost;
use super::overlay::{Ahead, Overlay, Piece};
use super::parts::Behind;
use super::witness::WitnessUpdate;
use crate::canary::{self, Canary};
use crate::engine::{BaseError, BaseKind, BaseOpId, BaseRequest, Cache, Outbox};
use crate::media::{Geometry, KeyKind, Tails};
use crate::memory::NoMemory;
use crate::pmem::Pmem;
use crate::units::{Lba, Now, PAGE_SIZE_BYTES, PmemOff, Seq};
use std::mem;

/// Base operations under way at once: enough for the queues of a fast device if they are small.
pub(crate) const BATCH_OPS_MAX: usize = 128;
/// Their bytes: enough for any device if they are large.
const IN_FLIGHT_BYTES_MAX: u64 = 32 << 20;
/// What they clear: one that does so at once has enough to do, one that writes zeroes ends something every few seconds.
const IN_FLIGHT_CLEARED_MAX: u64 = 1 << 30;
/// The number, the bytes, and what one clears, while reads of the application wait for the base, which come first.
const IN_FLIGHT_YIELDING: usize = 2;
const IN_FLIGHT_BYTES_YIELDING: u64 = 256 << 10;
const CLEAR_BYTES_YIELDING: u64 = 4 << 20;
/// One base write: bytes and separate pieces of memory.
pub(crate) const BASE_WRITE_BYTES_MAX: u64 = 1 << 20;
pub(crate) const BASE_WRITE_EXTENTS_MAX: usize = 128;
/// Pieces of memory, or of what is cleared, that one poll hands out, at most; one operation may go beyond.
const PIECES_PER_POLL: usize = 64;
/// Keys that one poll looks at to make them, at most.
const KEYS_LOOKED_AT_PER_POLL: usize = if cfg!(feature = "sim") { 24 } else { 512 };
/// Pieces of one operation that clears; those of a write are limited by its bytes, and by [`BASE_WRITE_EXTENTS_MAX`].
const PIECES_CLEARED_MAX: usize = 128;

/// An operation on the base. Keeps its memory.
#[derive(Debug)]
pub(super) struct BaseOp {
    pub(super) kind: KeyKind,
    pub(super) lba: Lba,
    pub(super) len_blocks: u64,
    /// Of a write: its memory.
    pub(super) extents: Vec<(PmemOff, u64)>,
    /// Of what it was made.
    piece_count: usize,
    is_in_flight: bool,
    /// What it counts for since it was started.
    load: Load,
}

/// How much of the base write-back may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manners {
    /// As much as it can.
    Full,
    /// Little: somebody else's reads come first.
    Yielding,
}

impl Manners {
    fn in_flight_max(self) -> (usize, Load) {
        let (count, data_bytes) = match self {
            Manners::Full => (BATCH_OPS_MAX, IN_FLIGHT_BYTES_MAX),
            Manners::Yielding => (IN_FLIGHT_YIELDING, IN_FLIGHT_BYTES_YIELDING),
        };
        let load = Load {
            data_bytes,
            // With one more it is not above.
            cleared_bytes: IN_FLIGHT_CLEARED_MAX - BASE_CLEAR_BYTES_MAX + 1,
        };
        (count, load)
    }

    /// The largest operation.
    fn op_max(self) -> Load {
        match self {
            Manners::Full => Load {
                data_bytes: BASE_WRITE_BYTES_MAX,
                cleared_bytes: BASE_CLEAR_BYTES_MAX,
            },
            Manners::Yielding => Load {
                data_bytes: IN_FLIGHT_BYTES_YIELDING,
                cleared_bytes: CLEAR_BYTES_YIELDING,
            },
        }
    }
}

/// What is being written.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) overlay: Overlay,
    ops: Vec<BaseOp>,
    /// Numbers of those that are not used.
    free: Vec<u32>,
    /// Numbers of those that are to be started again.
    again: Vec<u32>,
    /// What is behind the last operation, and did not go with it.
    lookahead: Ahead,
    in_flight: usize,
    in_flight_load: Load,
    pub(super) failed: bool,
    /// One has failed because the cache's memory cannot be read.
    pub(super) source_lost: bool,
    /// In this poll it was looked whether that is so.
    pub(super) looked_for_cause: bool,
    /// An operation has ended well since the last pause.
    pub(super) has_progressed: bool,
    /// Anything for the base at all.
    pub(super) has_ops: bool,
    /// It makes clean what is not above this.
    pub(super) last_seq: Seq,
    /// The base may hold parts of what is not above this: more only if a salvage has several parts.
    pub(super) reach: Seq,
    /// What is still to be written of it, when this part is.
    pub(super) behind: Behind,
    /// Its parts are made of what the log has behind this; the base has the rest. 0: behind the dirty tail.
    pub(super) after: Seq,
    /// The overlay holds a part behind the first one.
    pub(super) has_parts: bool,
    /// What was written of it counts for nothing: it is to be taken from the log again.
    pub(super) is_void: bool,
    pub(super) dirty_bytes: u64,
    /// Payload that the base has taken.
    pub(super) written_bytes: u64,
    /// The same, with what it has cleared.
    pub(super) written: Load,
    pub(super) witness: WitnessUpdate,
    pub(super) clearing_base: ClearingBase,
}

impl Batch {
    pub(super) fn new(key_count: usize) -> Result<Self, NoMemory> {
        let op = || BaseOp {
            kind: KeyKind::Data,
            lba: Lba(0),
            len_blocks: 0,
            extents: Vec::with_capacity(BASE_WRITE_EXTENTS_MAX),
            piece_count: 0,
            is_in_flight: false,
            load: Load::NOTHING,
        };
        Ok(Self {
            overlay: Overlay::new(key_count)?,
            ops: (0..BATCH_OPS_MAX).map(|_| op()).collect(),
            free: Vec::with_capacity(BATCH_OPS_MAX),
            again: Vec::with_capacity(BATCH_OPS_MAX),
            lookahead: Ahead::End,
            in_flight: 0,
            in_flight_load: Load::NOTHING,
            failed: false,
            source_lost: false,
            looked_for_cause: false,
            has_progressed: false,
            has_ops: false,
            last_seq: Seq(0),
            reach: Seq(0),
            behind: Behind::Nothing,
            after: Seq(0),
            has_parts: false,
            is_void: false,
            dirty_bytes: 0,
            written_bytes: 0,
            written: Load::NOTHING,
            witness: WitnessUpdate::default(),
            clearing_base: ClearingBase::default(),
        })
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Nothing is left that has not been handed to the base.
    pub(super) fn is_handed_out(&self) -> bool {
        self.lookahead == Ahead::End && self.again.is_empty()
    }

    /// Everything is on the base, as far as the base has said.
    pub(super) fn is_done(&self) -> bool {
        self.is_handed_out() && self.in_flight == 0
    }

    /// Begins with the first piece of the overlay; nothing is in flight.
    pub(super) fn rewind(&mut self) {
        self.has_ops = false;
        self.failed = false;
        self.source_lost = false;
        self.is_void = false;
        self.written_bytes = 0;
        self.written = Load::NOTHING;
        self.witness = WitnessUpdate::default();
        self.begin_part();
    }

    /// Begins with the first piece of the overlay; nothing is in flight. What was written before is a part of the same.
    pub(super) fn begin_part(&mut self) {
        self.overlay.rewind();
        self.free.clear();
        // The first one is taken from the end.
        self.free.extend((0..self.ops.len() as u32).rev());
        self.again.clear();
        let has_ops = self.overlay.key_count() > 0;
        self.has_ops |= has_ops;
        self.lookahead = if has_ops { Ahead::Unknown } else { Ahead::End };
    }

    /// Starts operations as far as there is room, and not much more than `load_max`. Returns what they count for; `None`:
    /// there was nothing to be started, or no room. Nothing yet, if more keys are to be looked at first.
    pub(super) fn start_ops<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        tails: &Tails,
        manners: Manners,
        load_max: Load,
        now: Now,
        out: &mut Outbox,
    ) -> Option<Load> {
        let (count_max, in_flight_max) = manners.in_flight_max();
        let clearing = self.clearing_base.clearing(cache.base_caps, now);
        let op_max = load_max.at_most(manners.op_max());
        let mut keys_left = KEYS_LOOKED_AT_PER_POLL;
        if self.lookahead == Ahead::Unknown {
            self.lookahead = self.overlay.next(&mut keys_left);
        }
        let (mut pieces, mut load, mut started) = (0, Load::NOTHING, false);
        while pieces < PIECES_PER_POLL
            && self.in_flight < count_max
            && let Some(kind) = self.next_kind()
        {
            let goes = clearing.goes(kind);
            if !load.has_room_for(goes, load_max)
                || !self.in_flight_load.has_room_for(goes, in_flight_max)
            {
                break;
            }
            let Some(number) = self.again.pop().or_else(|| {
                let number = self.make(cache, clearing, op_max.of(goes), &mut keys_left)?;
                self.witness.note(&self.ops[number as usize], cache, tails);
                Some(number)
            }) else {
                break;
            };
            let op = &mut self.ops[number as usize];
            op.is_in_flight = true;
            // One that comes again may have to be asked for in another way.
            op.kind = clearing.base_kind(kind);
            op.load = Load::new(goes, cache.geometry.bytes(op.len_blocks));
            pieces += op.pieces_handed_out();
            load += op.load;
            self.in_flight += 1;
            self.in_flight_load += op.load;
            hand_out(op, number, cache, out);
            started = true;
        }
        (started || self.lookahead == Ahead::Unknown).then_some(load)
    }

    /// What the next operation is of.
    fn next_kind(&self) -> Option<KeyKind> {
        match self.again.last() {
            Some(number) => Some(self.ops[*number as usize].kind),
            None => match self.lookahead {
                Ahead::Piece(piece) => Some(piece.kind),
                Ahead::Unknown | Ahead::End => None,
            },
        }
    }

    /// Makes an operation of the next pieces: neighbours go together. Returns its number.
    fn make<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        clearing: Clearing,
        bytes_max: u64,
        keys_left: &mut usize,
    ) -> Option<u32> {
        // Where it lies: a copy would be read in other pieces than it was stored in, and the CPU waits for that.
        let ahead = &mut self.lookahead;
        let Ahead::Piece(first) = ahead else {
            return None;
        };
        let number = self.free.pop()?;
        let op = &mut self.ops[number as usize];
        op.kind = clearing.base_kind(first.kind);
        op.lba = first.lba;
        op.len_blocks = 0;
        op.extents.clear();
        op.piece_count = 0;
        // A page is never too much, however little is left of a rate.
        let len_max = bytes_max.max(PAGE_SIZE_BYTES.into()) >> cache.geometry.block_shift();
        if first.len_blocks > len_max {
            let head = first.cut(len_max, &cache.geometry);
            op.append(cache, &head);
            return Some(number);
        }
        op.append(cache, first);
        *ahead = self.overlay.next(keys_left);
        while let Ahead::Piece(piece) = ahead
            && op.takes(piece, clearing, len_max)
        {
            op.append(cache, piece);
            *ahead = self.overlay.next(keys_left);
        }
        Some(number)
    }

    /// After an error of an operation: was it the source that could not be read? All of that is read, so one operation is
    /// looked at in each poll: where a base fails everything there may be many, and where one source is lost its operation
    /// is looked at when it is one of few that fail.
    pub(super) fn look_for_cause<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        op: BaseOpId,
        error: BaseError,
    ) -> bool {
        if error != BaseError::Io || self.looked_for_cause {
            return false;
        }
        let op = self.ops.get(op.0 as usize);
        let Some(op) = op.filter(|op| op.kind == KeyKind::Data) else {
            return false;
        };
        self.looked_for_cause = true;
        let is_lost = is_source_lost(cache, &op.extents);
        self.source_lost |= is_lost;
        is_lost
    }

    /// An operation has ended. Returns an error that is to be told.
    pub(super) fn on_done(
        &mut self,
        BaseOpId(number): BaseOpId,
        result: Result<(), BaseError>,
        now: Now,
    ) -> Option<BaseError> {
        let op = self.ops.get_mut(number as usize)?;
        if !mem::take(&mut op.is_in_flight) {
            return None;
        }
        self.in_flight -= 1;
        self.in_flight_load -= op.load;
        let asks_anew = self.clearing_base.note_end(op.kind, result, now);
        match result {
            Err(_) if asks_anew => {
                op.kind = KeyKind::Zeroes;
                self.again.push(number);
            }
            Err(_) if canary::is(Canary::FailedBaseWriteIgnored) => self.free.push(number),
            Ok(()) => {
                self.has_progressed = true;
                self.written += op.load;
                if op.kind == KeyKind::Data {
                    self.written_bytes += op.load.data_bytes;
                }
                self.free.push(number);
            }
            Err(error) => {
                self.again.push(number);
                self.failed = true;
                return Some(error);
            }
        }
        None
    }
}

impl BaseOp {
    fn pieces_handed_out(&self) -> usize {
        match self.kind {
            KeyKind::Data | KeyKind::Fill => self.extents.len(),
            KeyKind::Zeroes | KeyKind::Unmap => self.piece_count,
        }
    }

    fn takes(&self, piece: &Piece, clearing: Clearing, len_max: u64) -> bool {
        // Most are no neighbours.
        self.lba.0 + self.len_blocks == piece.lba.0
            && self.kind == clearing.base_kind(piece.kind)
            && self.len_blocks + piece.len_blocks <= len_max
            && match self.kind {
                KeyKind::Data | KeyKind::Fill => self.extents.len() < BASE_WRITE_EXTENTS_MAX,
                KeyKind::Zeroes | KeyKind::Unmap => self.piece_count < PIECES_CLEARED_MAX,
            }
    }

    fn append<P: Pmem>(&mut self, cache: &Cache<P>, piece: &Piece) {
        let bytes = cache.geometry.bytes(piece.len_blocks);
        self.len_blocks += piece.len_blocks;
        self.piece_count += 1;
        if self.kind != KeyKind::Data {
            return;
        }
        match self.extents.last_mut() {
            // The pages of one write lie one behind the other.
            Some((off, len)) if off.plus(*len) == piece.payload => *len += bytes,
            _ => self.extents.push((piece.payload, bytes)),
        }
    }
}

impl Piece {
    /// Cuts so many blocks off, which come first.
    fn cut(&mut self, len_blocks: u64, geometry: &Geometry) -> Piece {
        let head = Piece {
            len_blocks,
            ..*self
        };
        self.lba.0 += len_blocks;
        self.len_blocks -= len_blocks;
        self.payload = self.payload.plus(geometry.bytes(len_blocks));
        head
    }
}

fn hand_out<P: Pmem>(op: &BaseOp, number: u32, cache: &Cache<P>, out: &mut Outbox) {
    let kind = match op.kind {
        KeyKind::Data | KeyKind::Fill => {
            let first_source = out.sources.len() as u32;
            for &(off, len_bytes) in &op.extents {
                out.sources.push(cache.pmem.slice(off, len_bytes));
            }
            BaseKind::Write {
                first_source,
                source_count: op.extents.len() as u32,
            }
        }
        KeyKind::Zeroes => BaseKind::WriteZeroes,
        KeyKind::Unmap => BaseKind::Unmap,
    };
    out.base.push(BaseRequest {
        op: BaseOpId(number),
        kind,
        lba: op.lba,
        len_blocks: op.len_blocks,
    });
}

#[cfg(test)]
mod cause_tests;

#[cfg(test)]
mod tests;
