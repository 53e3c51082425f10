//! The base operations of a batch: made from the overlay as there is room, at most [`IN_FLIGHT_MAX`] at once.

use super::lost::is_source_lost;
use super::overlay::{Overlay, Piece};
use super::witness::WitnessUpdate;
use crate::canary::{self, Canary};
use crate::engine::{BaseError, BaseKind, BaseOpId, BaseRequest, Cache, Outbox};
use crate::media::{KeyKind, Tails};
use crate::pmem::Pmem;
use crate::units::{Lba, PmemOff, Seq};

/// Base operations under way at once.
pub(super) const IN_FLIGHT_MAX: usize = 32;
/// One base write: bytes and separate pieces of memory.
const BASE_WRITE_BYTES_MAX: u64 = 1 << 20;
const BASE_WRITE_EXTENTS_MAX: usize = 128;
/// What one poll starts, at most: pieces looked at, and bytes handed to the base, which may copy them at once.
const PIECES_PER_POLL: usize = 128;
const BYTES_PER_POLL: u64 = 256 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// The slot is free.
    Free,
    /// To be started, again.
    Todo,
    InFlight,
}

/// An operation on the base. Keeps its memory.
#[derive(Debug)]
pub(super) struct BaseOp {
    pub(super) kind: KeyKind,
    pub(super) lba: Lba,
    pub(super) len_blocks: u64,
    /// Of a write: its memory.
    pub(super) extents: Vec<(PmemOff, u64)>,
    progress: Progress,
}

/// What is being written.
#[derive(Debug)]
pub(super) struct Batch {
    ops: Vec<BaseOp>,
    /// The piece behind the last operation, which did not go with it.
    lookahead: Option<Piece>,
    in_flight: usize,
    /// No piece is left to be made an operation of.
    exhausted: bool,
    pub(super) failed: bool,
    /// One has failed because the cache's memory cannot be read.
    pub(super) source_lost: bool,
    /// Anything for the base at all.
    pub(super) has_ops: bool,
    pub(super) last_seq: Seq,
    pub(super) dirty_bytes: u64,
    pub(super) written_bytes: u64,
    pub(super) witness: WitnessUpdate,
}

impl Batch {
    pub(super) fn new() -> Self {
        let op = || BaseOp {
            kind: KeyKind::Data,
            lba: Lba(0),
            len_blocks: 0,
            extents: Vec::with_capacity(BASE_WRITE_EXTENTS_MAX),
            progress: Progress::Free,
        };
        Self {
            ops: (0..IN_FLIGHT_MAX).map(|_| op()).collect(),
            lookahead: None,
            in_flight: 0,
            exhausted: true,
            failed: false,
            source_lost: false,
            has_ops: false,
            last_seq: Seq(0),
            dirty_bytes: 0,
            written_bytes: 0,
            witness: WitnessUpdate::default(),
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Everything is on the base, as far as the base has said.
    pub(super) fn is_done(&self) -> bool {
        self.exhausted && self.ops.iter().all(|op| op.progress == Progress::Free)
    }

    /// Begins with the first piece of the overlay; nothing is in flight.
    pub(super) fn rewind(&mut self, overlay: &mut Overlay) {
        overlay.rewind();
        for op in &mut self.ops {
            op.progress = Progress::Free;
        }
        self.lookahead = overlay.next();
        self.exhausted = self.lookahead.is_none();
        self.has_ops = !self.exhausted;
        self.failed = false;
        self.source_lost = false;
        self.written_bytes = 0;
        self.witness = WitnessUpdate::default();
    }

    /// Starts operations as far as there is room. `true`: some were started.
    pub(super) fn start_ops<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        tails: &Tails,
        overlay: &mut Overlay,
        out: &mut Outbox,
    ) -> bool {
        let (mut pieces, mut bytes, mut started) = (0, 0, false);
        for number in 0..self.ops.len() {
            if pieces >= PIECES_PER_POLL || bytes >= BYTES_PER_POLL {
                break;
            }
            match self.ops[number].progress {
                Progress::InFlight => continue,
                Progress::Todo => {}
                Progress::Free => {
                    let Some(count) = self.make(number, cache, overlay) else {
                        continue;
                    };
                    pieces += count;
                    let op = &self.ops[number];
                    self.witness.note(op, cache, tails);
                }
            }
            let op = &mut self.ops[number];
            op.progress = Progress::InFlight;
            self.in_flight += 1;
            if op.kind == KeyKind::Data {
                bytes += cache.geometry.bytes(op.len_blocks);
            }
            hand_out(op, number, cache, out);
            started = true;
        }
        started
    }

    /// Makes an operation of the next pieces: neighbours go together. Returns their number.
    fn make<P: Pmem>(
        &mut self,
        number: usize,
        cache: &Cache<P>,
        overlay: &mut Overlay,
    ) -> Option<usize> {
        let first = self.lookahead?;
        let op = &mut self.ops[number];
        op.kind = base_kind(cache, &first);
        op.lba = first.lba;
        op.len_blocks = 0;
        op.extents.clear();
        let mut count = 0;
        let mut next = Some(first);
        while let Some(piece) = next
            && op.takes(cache, &piece)
        {
            op.append(cache, &piece);
            count += 1;
            next = overlay.next();
        }
        if op.kind == KeyKind::Data {
            self.written_bytes += cache.geometry.bytes(op.len_blocks);
        }
        self.lookahead = next;
        self.exhausted = next.is_none();
        Some(count)
    }

    /// After an error of the base: was it the source that could not be read?
    pub(super) fn look_for_cause<P: Pmem>(&mut self, cache: &Cache<P>, op: BaseOpId) {
        if let Some(op) = self.ops.get(op.0 as usize)
            && op.kind == KeyKind::Data
        {
            self.source_lost |= is_source_lost(cache, &op.extents);
        }
    }

    /// An operation has ended. `true`: with an error that is to be told.
    pub(super) fn on_done(
        &mut self,
        op: BaseOpId,
        result: Result<(), BaseError>,
    ) -> Option<BaseError> {
        let op = self.ops.get_mut(op.0 as usize)?;
        if op.progress != Progress::InFlight {
            return None;
        }
        self.in_flight -= 1;
        match result {
            Ok(()) => {
                op.progress = Progress::Free;
                None
            }
            Err(BaseError::Unsupported) if op.kind == KeyKind::Unmap => {
                op.kind = KeyKind::Zeroes;
                op.progress = Progress::Todo;
                None
            }
            Err(_) if canary::is(Canary::FailedBaseWriteIgnored) => {
                op.progress = Progress::Free;
                None
            }
            Err(error) => {
                op.progress = Progress::Todo;
                self.failed = true;
                Some(error)
            }
        }
    }
}

impl BaseOp {
    fn takes<P: Pmem>(&self, cache: &Cache<P>, piece: &Piece) -> bool {
        if self.len_blocks == 0 {
            return true;
        }
        let bytes = cache.geometry.bytes(self.len_blocks + piece.len_blocks);
        self.kind == base_kind(cache, piece)
            && self.lba.0 + self.len_blocks == piece.lba.0
            && (self.kind != KeyKind::Data
                || (bytes <= BASE_WRITE_BYTES_MAX && self.extents.len() < BASE_WRITE_EXTENTS_MAX))
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

fn base_kind<P: Pmem>(cache: &Cache<P>, piece: &Piece) -> KeyKind {
    match piece.kind {
        KeyKind::Unmap if !cache.base_caps.unmap => KeyKind::Zeroes,
        kind => kind,
    }
}

fn hand_out<P: Pmem>(op: &BaseOp, number: usize, cache: &Cache<P>, out: &mut Outbox) {
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
        op: BaseOpId(number as u32),
        kind,
        lba: op.lba,
        len_blocks: op.len_blocks,
    });
}
