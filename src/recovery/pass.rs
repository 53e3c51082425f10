//! A pass over all segments: what its workers share, and what has come of it. Only reads.
//!
//! Segments are handed out one by one, and keys go into the index in any order: the later one wins there, whichever
//! is met first. So the order in which segments are scanned, and by whom, changes nothing (INV-OPEN-6). If a segment
//! had to be given up, or the index was too small, there is another pass. If that was because of what the base holds as well,
//! such as the zeroes of a large discard, the next one leaves all of that out (INV-OPEN-8).

use super::error::OpenError;
use super::pass_memory::PassMemory;
use super::recovered::Recovered;
use super::waiting::WaitingParts;
use super::walk::{WalkBuf, load_info};
use crate::media::{Copies, SegmentInfo, Superblock, Tails, WitnessPages};
use crate::memory::NoMemory;
use crate::pmem::Pmem;
use crate::units::{Epoch, SegId, Seq};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// An index that is too small for what the log holds is built again, this much larger at the most.
const INDEX_FACTOR_MAX: u64 = 64;

/// How far a recovery is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecoveryProgress {
    /// Segments that were scanned.
    pub segments_scanned: u32,
    /// Of so many.
    pub segments_total: u32,
    /// Keys that were found.
    pub keys: u64,
}

/// A segment that was scanned.
#[derive(Clone, Copy, Debug)]
pub(super) struct FoundSegment {
    pub(super) info: SegmentInfo,
    pub(super) copies: Copies,
    pub(super) key_end: u32,
    pub(super) last_kset_off: u32,
    /// A kset behind the last one, of which the payloads are torn.
    pub(super) torn_kset_off: Option<u32>,
    pub(super) kset_count: u32,
    pub(super) last_seq: Seq,
    /// Its keys are damaged, but the base holds all that was in it.
    pub(super) given_up: bool,
    /// Part of its memory cannot be read: it is not used, and nothing is stored to it.
    pub(super) quarantined: bool,
    /// A copy of its info cannot be read: it is used as it is, nothing is stored to it, and it is taken out of service as soon
    /// as the base holds all of it.
    pub(super) suspect: bool,
}

/// What is known before the segments are.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) superblock: Superblock,
    pub(super) tails: Tails,
    pub(super) tails_copies: Option<Copies>,
    /// They are not what the media say any more.
    pub(super) tails_changed: bool,
}

/// What a worker has counted.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) keys: u64,
    pub(super) dirty_bytes: u64,
    /// A bit for each entry of the witness under dirty data.
    pub(super) witness_dropped: u8,
    pub(super) seq_max: Seq,
    pub(super) epoch_max: Epoch,
}

/// See the module. Shared by the workers; nothing in here waits.
#[derive(Debug)]
pub(super) struct Pass<P> {
    pub(super) pmem: Arc<P>,
    pub(super) known: Known,
    /// Segments that an earlier pass has given up are in it from the start.
    pub(super) memory: PassMemory,
    pub(super) witness_pages: WitnessPages,
    /// Number of segments that were handed out.
    handed_out: AtomicU32,
    /// How many of these were gone through.
    scanned: AtomicU32,
    /// And of how many of those all keys are in the index.
    done: AtomicU32,
    /// Something is wrong: no more segments are handed out.
    stopped: AtomicBool,
    given_up_before: usize,
    /// A worker had to do without memory.
    no_memory: OnceLock<NoMemory>,
    /// The first segment for which the index was too small; `u32::MAX`: none.
    full_at: AtomicU32,
    /// The lowest seq that two ksets have; `u64::MAX`: none.
    seq_twice: AtomicU64,
    keys: AtomicU64,
    dirty_bytes: AtomicU64,
    witness_dropped: AtomicU8,
    seq_max: AtomicU64,
    epoch_max: AtomicU64,
}

/// What follows a pass.
pub(super) enum Verdict<P> {
    /// Everything is accepted.
    Accepted(Box<Recovered>),
    /// Another one, with what this one has learnt.
    Again(Box<Pass<P>>),
}

impl<P: Pmem> Pass<P> {
    pub(super) fn new(pmem: Arc<P>, known: Known, mut memory: PassMemory) -> Self {
        let geometry = &known.superblock.geometry;
        memory.seqs.set_key_tail(known.tails.key_tail);
        Self {
            memory,
            witness_pages: WitnessPages::new(geometry, &known.tails.witness),
            handed_out: AtomicU32::new(0),
            scanned: AtomicU32::new(0),
            done: AtomicU32::new(0),
            stopped: AtomicBool::new(false),
            given_up_before: 0,
            no_memory: OnceLock::new(),
            full_at: AtomicU32::new(u32::MAX),
            seq_twice: AtomicU64::new(u64::MAX),
            keys: AtomicU64::new(0),
            dirty_bytes: AtomicU64::new(0),
            witness_dropped: AtomicU8::new(0),
            seq_max: AtomicU64::new(0),
            epoch_max: AtomicU64::new(0),
            pmem,
            known,
        }
    }

    /// The next segment for a worker, which has to tell the end of it and that it is done with; `None`: there are no more.
    pub(super) fn take_segment(&self) -> Option<SegId> {
        let taken = self
            .handed_out
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |number| {
                let more = (number as usize) < self.memory.found.len();
                (more && !self.stopped.load(Ordering::Acquire)).then(|| number + 1)
            });
        taken.ok().map(SegId)
    }

    /// Memory for what a worker lets wait.
    pub(super) fn waiting_parts(&self) -> Result<WaitingParts, NoMemory> {
        // Whoever does not get hold of it asks for its own.
        let first = self.memory.waiting.try_lock().ok();
        let first = first.and_then(|mut waiting| waiting.take());
        first.map_or_else(|| WaitingParts::new(&self.memory.newest), Ok)
    }

    /// The info of a segment that was handed out; `None`: it need not be walked.
    pub(super) fn info_of(&self, id: SegId) -> Result<Option<(SegmentInfo, Copies)>, OpenError> {
        if self.memory.found[id.index()].get().is_some() {
            return Ok(None);
        }
        load_info(&*self.pmem, &self.known.superblock, id).map(Some)
    }

    /// A part of a segment was gone through.
    pub(super) fn add(&self, counts: &Counts) {
        let relaxed = Ordering::Relaxed;
        self.keys.fetch_add(counts.keys, relaxed);
        self.dirty_bytes.fetch_add(counts.dirty_bytes, relaxed);
        self.witness_dropped
            .fetch_or(counts.witness_dropped, relaxed);
        self.seq_max.fetch_max(counts.seq_max.0, relaxed);
        self.epoch_max.fetch_max(counts.epoch_max.0, relaxed);
    }

    /// A segment was gone through. `None`: it had not to be walked.
    pub(super) fn end_segment(&self, id: SegId, found: Option<Result<FoundSegment, OpenError>>) {
        if let Some(found) = found {
            if found.is_err() {
                self.stopped.store(true, Ordering::Release);
            }
            // It is handed out once.
            let _ = self.memory.found[id.index()].set(found);
        }
        self.scanned.fetch_add(1, Ordering::Relaxed);
    }

    /// So many segments are done with, each of which has been gone through: the last that a worker tells of them.
    pub(super) fn settle(&self, segment_count: u32) {
        self.done.fetch_add(segment_count, Ordering::AcqRel);
    }

    /// A worker cannot get on for want of memory.
    pub(super) fn note_no_memory(&self, error: NoMemory) {
        // The first of them is told.
        let _ = self.no_memory.set(error);
        self.stopped.store(true, Ordering::Release);
    }

    /// The index has no room for a key of this segment.
    pub(super) fn note_full(&self, id: SegId) {
        self.full_at.fetch_min(id.0, Ordering::AcqRel);
    }

    /// Whether there will be another pass, so that keys need not be installed any more.
    pub(super) fn is_full(&self) -> bool {
        self.full_at.load(Ordering::Acquire) != u32::MAX
    }

    /// Two ksets have this seq.
    pub(super) fn note_twice(&self, seq: Seq) {
        self.seq_twice.fetch_min(seq.0, Ordering::AcqRel);
    }

    /// Whether all segments that were handed out are done with, and no more will be. A worker may have one all the
    /// same that it took while the pass was being stopped: it has the pass as well then.
    pub(super) fn is_over(&self) -> bool {
        let stopped = self.stopped.load(Ordering::Acquire);
        let handed_out = self.handed_out.load(Ordering::Acquire);
        let no_more = stopped || handed_out as usize == self.memory.found.len();
        no_more && self.done.load(Ordering::Acquire) == handed_out
    }

    pub(super) fn progress(&self) -> RecoveryProgress {
        RecoveryProgress {
            segments_scanned: self.scanned.load(Ordering::Relaxed),
            segments_total: self.memory.found.len() as u32,
            keys: self.keys.load(Ordering::Relaxed),
        }
    }

    /// What has come of it, once it is over.
    ///
    /// # Errors
    /// The cache cannot be opened. Of several reasons the one of the first segment counts, whoever found it first.
    pub(super) fn judge(mut self) -> Result<Verdict<P>, OpenError> {
        if let Some(error) = self.no_memory.take() {
            return Err(error.into());
        }
        let mut segments = std::mem::take(&mut self.memory.segments);
        let found = std::mem::take(&mut self.memory.found);
        // All segments up to the first with an error were scanned.
        for found in found.into_iter().map_while(OnceLock::into_inner) {
            segments.push(found?);
        }
        let factor = self.memory.index_factor;
        if self.give_up(&segments) {
            return self.again(factor, &segments);
        }
        let seq = *self.seq_twice.get_mut();
        if seq != u64::MAX {
            return Err(OpenError::DuplicateSeq { seq });
        }
        let full_at = *self.full_at.get_mut();
        match segments.get(full_at as usize) {
            None => Ok(Verdict::Accepted(Box::new(self.accept(segments)))),
            Some(_) if self.leave_out_clean() => self.again(factor, &segments),
            Some(_) if factor < INDEX_FACTOR_MAX => self.again(factor * 2, &segments),
            Some(found) => Err(OpenError::Segment {
                segment: full_at,
                ksets_valid: found.kset_count,
                off: found.key_end,
                reason: "its keys name more pages than a cache of this size can hold",
            }),
        }
    }

    /// The base holds all of what was given up. But those keys cannot speak against older copies of their blocks any
    /// more, so these may not count as cached either. `false`: nothing was given up that had not been before.
    fn give_up(&mut self, segments: &[FoundSegment]) -> bool {
        let given_up = segments.iter().filter(|found| found.given_up);
        if given_up.clone().count() == self.given_up_before {
            return false;
        }
        let tails = &mut self.known.tails;
        for found in given_up {
            tails.key_tail = tails.key_tail.max(found.last_seq);
        }
        self.known.tails_changed = true;
        true
    }

    /// The base holds what is clean, so that no index has to be found room for it: a few keys may discard many times what
    /// the cache has room for. All or nothing: without the key of a discard, an older copy of its blocks would count. And
    /// for good, as what is written from now on does not know of it (INV-OPEN-8). `false`: nothing of that was in the index.
    fn leave_out_clean(&mut self) -> bool {
        let tails = &mut self.known.tails;
        if tails.key_tail == tails.dirty_tail {
            return false;
        }
        tails.key_tail = tails.dirty_tail;
        self.known.tails_changed = true;
        true
    }

    fn again(self, index_factor: u64, segments: &[FoundSegment]) -> Result<Verdict<P>, OpenError> {
        // The old index goes before there is a new one.
        let cache = self.memory.into_cache();
        let memory = PassMemory::again(&self.known.superblock, index_factor, cache)?;
        let mut next = Self::new(self.pmem, self.known, memory);
        for (id, found) in segments.iter().enumerate().filter(|(_, f)| f.given_up) {
            let _ = next.memory.found[id].set(Ok(*found));
            next.given_up_before += 1;
        }
        // Their ksets count here, although they are dropped.
        next.seq_max = self.seq_max;
        next.epoch_max = self.epoch_max;
        Ok(Verdict::Again(Box::new(next)))
    }

    fn accept(self, segments: Vec<FoundSegment>) -> Recovered {
        let dropped = self.witness_dropped.into_inner();
        let mut witness = self.known.tails.witness;
        for (number, entry) in witness.iter_mut().enumerate() {
            // INV-WIT-1.
            if dropped >> number & 1 != 0 {
                entry.len_blocks = 0;
            }
        }
        Recovered {
            known: self.known,
            segments,
            index: self.memory.index,
            place_crcs: self.memory.place_crcs,
            memory: self.memory.cache,
            witness,
            dirty_bytes: self.dirty_bytes.into_inner(),
            seq_max: Seq(self.seq_max.into_inner()),
            epoch_max: Epoch(self.epoch_max.into_inner()),
            next_repair: 0,
            buf: WalkBuf::default(),
            probed_bytes: 0,
        }
    }
}
