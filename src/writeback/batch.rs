//! The batch that is being written: its base operations, made from the overlay as there is room.

use super::lost::is_source_lost;
use super::overlay::{Overlay, Piece};
use super::witness::WitnessUpdate;
use crate::canary::{self, Canary};
use crate::engine::{BaseError, BaseKind, BaseOpId, BaseRequest, Cache, Outbox};
use crate::media::{KeyKind, Tails};
use crate::pmem::Pmem;
use crate::units::{Lba, NS_PER_S, Now, PmemOff, Seq};
use std::mem;

/// Base operations under way at once: enough for the queues of a fast device if they are small.
const IN_FLIGHT_MAX: usize = 128;
/// Their bytes: enough for any device if they are large.
const IN_FLIGHT_BYTES_MAX: u64 = 32 << 20;
/// Both, while reads of the application wait for the base, which come first.
const IN_FLIGHT_YIELDING: usize = 2;
const IN_FLIGHT_BYTES_YIELDING: u64 = 256 << 10;
/// One base write: bytes and separate pieces of memory.
pub(crate) const BASE_WRITE_BYTES_MAX: u64 = 1 << 20;
const BASE_WRITE_EXTENTS_MAX: usize = 128;
/// Pieces of memory that one poll hands out, at most; one operation may go beyond.
const PIECES_PER_POLL: usize = 64;
/// For so long after the base has failed an unmap they all go to it as zeroes: one that fails each of them is not asked
/// for thousands, and one that was sick gets them again.
const UNMAPS_AS_ZEROES_NS: u64 = 60 * NS_PER_S;

/// An operation on the base. Keeps its memory.
#[derive(Debug)]
pub(super) struct BaseOp {
    pub(super) kind: KeyKind,
    pub(super) lba: Lba,
    pub(super) len_blocks: u64,
    /// Of a write: its memory.
    pub(super) extents: Vec<(PmemOff, u64)>,
    is_in_flight: bool,
}

/// How much of the base write-back may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manners {
    /// As much as it can.
    Full,
    /// Little: somebody else's reads come first.
    Yielding,
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
    /// The piece behind the last operation, which did not go with it.
    lookahead: Option<Piece>,
    in_flight: usize,
    in_flight_bytes: u64,
    pub(super) failed: bool,
    /// One has failed because the cache's memory cannot be read.
    pub(super) source_lost: bool,
    /// Anything for the base at all.
    pub(super) has_ops: bool,
    pub(super) last_seq: Seq,
    pub(super) dirty_bytes: u64,
    pub(super) written_bytes: u64,
    pub(super) witness: WitnessUpdate,
    /// Until then unmaps go to the base as zeroes.
    unmaps_from: Now,
}

impl Batch {
    pub(super) fn new(key_count: usize) -> Self {
        let op = || BaseOp {
            kind: KeyKind::Data,
            lba: Lba(0),
            len_blocks: 0,
            extents: Vec::with_capacity(BASE_WRITE_EXTENTS_MAX),
            is_in_flight: false,
        };
        Self {
            overlay: Overlay::new(key_count),
            ops: (0..IN_FLIGHT_MAX).map(|_| op()).collect(),
            free: Vec::with_capacity(IN_FLIGHT_MAX),
            again: Vec::with_capacity(IN_FLIGHT_MAX),
            lookahead: None,
            in_flight: 0,
            in_flight_bytes: 0,
            failed: false,
            source_lost: false,
            has_ops: false,
            last_seq: Seq(0),
            dirty_bytes: 0,
            written_bytes: 0,
            witness: WitnessUpdate::default(),
            unmaps_from: Now(0),
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Nothing is left that has not been handed to the base.
    pub(super) fn is_handed_out(&self) -> bool {
        self.lookahead.is_none() && self.again.is_empty()
    }

    /// Everything is on the base, as far as the base has said.
    pub(super) fn is_done(&self) -> bool {
        self.is_handed_out() && self.in_flight == 0
    }

    /// Begins with the first piece of the overlay; nothing is in flight.
    pub(super) fn rewind(&mut self) {
        self.overlay.rewind();
        self.free.clear();
        // The first one is taken from the end.
        self.free.extend((0..self.ops.len() as u32).rev());
        self.again.clear();
        self.lookahead = self.overlay.next();
        self.has_ops = self.lookahead.is_some();
        self.failed = false;
        self.source_lost = false;
        self.written_bytes = 0;
        self.witness = WitnessUpdate::default();
    }

    /// Starts operations as far as there is room, of about `bytes_max` bytes. Returns how many bytes that
    /// were; `None`: there was nothing to be started, or no room.
    pub(super) fn start_ops<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        tails: &Tails,
        manners: Manners,
        bytes_max: u64,
        now: Now,
        out: &mut Outbox,
    ) -> Option<u64> {
        let (count_max, in_flight_bytes_max) = match manners {
            Manners::Full => (IN_FLIGHT_MAX, IN_FLIGHT_BYTES_MAX),
            Manners::Yielding => (IN_FLIGHT_YIELDING, IN_FLIGHT_BYTES_YIELDING),
        };
        let op_bytes_max = bytes_max.min(in_flight_bytes_max).min(BASE_WRITE_BYTES_MAX);
        let unmap_kind = self.unmap_kind(cache, now);
        let (mut pieces, mut bytes, mut started) = (0, 0, false);
        while pieces < PIECES_PER_POLL
            && bytes < bytes_max
            && self.in_flight < count_max
            && self.in_flight_bytes < in_flight_bytes_max
        {
            let Some(number) = self.again.pop().or_else(|| {
                let number = self.make(cache, unmap_kind, op_bytes_max)?;
                self.witness.note(&self.ops[number as usize], cache, tails);
                Some(number)
            }) else {
                break;
            };
            let op = &mut self.ops[number as usize];
            op.is_in_flight = true;
            pieces += op.extents.len().max(1);
            bytes += op.bytes(cache);
            self.in_flight += 1;
            self.in_flight_bytes += op.bytes(cache);
            hand_out(op, number, cache, out);
            started = true;
        }
        started.then_some(bytes)
    }

    /// Makes an operation of the next pieces: neighbours go together. Returns its number.
    fn make<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        unmap_kind: KeyKind,
        bytes_max: u64,
    ) -> Option<u32> {
        let first = self.lookahead?;
        let number = self.free.pop()?;
        let op = &mut self.ops[number as usize];
        op.kind = base_kind(&first, unmap_kind);
        op.lba = first.lba;
        op.len_blocks = 0;
        op.extents.clear();
        let mut next = Some(first);
        while let Some(piece) = next
            && op.takes(cache, &piece, unmap_kind, bytes_max)
        {
            op.append(cache, &piece);
            next = self.overlay.next();
        }
        self.written_bytes += op.bytes(cache);
        self.lookahead = next;
        Some(number)
    }

    /// As what the base gets an unmap.
    fn unmap_kind<P>(&self, cache: &Cache<P>, now: Now) -> KeyKind {
        if cache.base_caps.unmap && now >= self.unmaps_from {
            KeyKind::Unmap
        } else {
            KeyKind::Zeroes
        }
    }

    /// After an error of the base: was it the source that could not be read?
    pub(super) fn look_for_cause<P: Pmem>(&mut self, cache: &Cache<P>, op: BaseOpId) {
        if let Some(op) = self.ops.get(op.0 as usize)
            && op.kind == KeyKind::Data
        {
            self.source_lost |= is_source_lost(cache, &op.extents);
        }
    }

    /// An operation has ended. Returns an error that is to be told.
    pub(super) fn on_done<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        BaseOpId(number): BaseOpId,
        result: Result<(), BaseError>,
        now: Now,
    ) -> Option<BaseError> {
        let op = self.ops.get_mut(number as usize)?;
        if !mem::take(&mut op.is_in_flight) {
            return None;
        }
        self.in_flight -= 1;
        self.in_flight_bytes -= op.bytes(cache);
        match result {
            Ok(()) => self.free.push(number),
            Err(_) if canary::is(Canary::FailedBaseWriteIgnored) => self.free.push(number),
            // A base may claim unmaps and fail each of them: SPDK's aio bdev does, on what knows no discard. What follows
            // tells whether it is the unmap that it fails, or everything (INV-WB-7).
            Err(BaseError::Unsupported | BaseError::Io)
                if op.kind == KeyKind::Unmap && !canary::is(Canary::FailedUnmapRepeated) =>
            {
                op.kind = KeyKind::Zeroes;
                self.unmaps_from = Now(now.0 + UNMAPS_AS_ZEROES_NS);
                self.again.push(number);
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
    /// Of payload.
    fn bytes<P: Pmem>(&self, cache: &Cache<P>) -> u64 {
        match self.kind {
            KeyKind::Data | KeyKind::Fill => cache.geometry.bytes(self.len_blocks),
            KeyKind::Zeroes | KeyKind::Unmap => 0,
        }
    }

    fn takes<P: Pmem>(
        &self,
        cache: &Cache<P>,
        piece: &Piece,
        unmap_kind: KeyKind,
        bytes_max: u64,
    ) -> bool {
        if self.len_blocks == 0 {
            return true;
        }
        let bytes = cache.geometry.bytes(self.len_blocks + piece.len_blocks);
        self.kind == base_kind(piece, unmap_kind)
            && self.lba.0 + self.len_blocks == piece.lba.0
            && (self.kind != KeyKind::Data
                || (bytes <= bytes_max && self.extents.len() < BASE_WRITE_EXTENTS_MAX))
    }

    fn append<P: Pmem>(&mut self, cache: &Cache<P>, piece: &Piece) {
        let bytes = cache.geometry.bytes(piece.len_blocks);
        self.len_blocks += piece.len_blocks;
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

fn base_kind(piece: &Piece, unmap_kind: KeyKind) -> KeyKind {
    match piece.kind {
        KeyKind::Unmap => unmap_kind,
        kind => kind,
    }
}

fn hand_out<P: Pmem>(op: &BaseOp, number: u32, cache: &Cache<P>, out: &mut Outbox) {
    let kind = match op.kind {
        KeyKind::Data | KeyKind::Fill => {
            let first_source = out.sources.len() as u32;
            let slices = op.extents.iter();
            out.sources
                .extend(slices.map(|&(off, len)| cache.pmem.slice(off, len)));
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
