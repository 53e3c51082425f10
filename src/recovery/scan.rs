//! The scan: what each segment holds. Only reads.

use super::error::OpenError;
use super::opening::OpenStep;
use super::walk::{SegmentWalk, WalkBuf, load_info};
use crate::media::{COUNTER_MAX, Copies, Kset, SegmentInfo, Superblock, Tails};
use crate::pmem::Pmem;
use crate::units::{Epoch, SegId, Seq};

/// Segments that one poll scans.
const SEGMENTS_PER_POLL: u32 = 1;

/// A kset that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FoundKset {
    pub(super) seq: Seq,
    pub(super) segment: SegId,
    pub(super) off: u32,
    pub(super) kset_index: u32,
}

/// A segment that was scanned.
#[derive(Clone, Copy, Debug)]
pub(super) struct FoundSegment {
    pub(super) info: SegmentInfo,
    pub(super) copies: Copies,
    pub(super) key_end: u32,
    pub(super) kset_count: u32,
    pub(super) last_seq: Seq,
    /// Its keys are damaged, but the base holds all that was in it.
    pub(super) given_up: bool,
    /// Part of its memory cannot be read: it is not used, and nothing is stored to it.
    pub(super) quarantined: bool,
}

#[derive(Debug)]
pub(super) struct Scan {
    pub(super) tails: Tails,
    pub(super) tails_copies: Option<Copies>,
    /// They are not what the media say any more.
    pub(super) tails_changed: bool,
    pub(super) segments: Vec<FoundSegment>,
    pub(super) ksets: Vec<FoundKset>,
    pub(super) seq_max: Seq,
    pub(super) epoch_max: Epoch,
    buf: WalkBuf,
}

/// What of the tails cannot be (INV-TAIL-1, INV-OPEN-3).
pub(crate) fn tails_out_of_range(
    superblock: &Superblock,
    tails: &Tails,
) -> impl Iterator<Item = OpenError> {
    let (tails, per_page) = (*tails, superblock.geometry.blocks_per_page());
    let block_count = superblock.base.block_count;
    let numbers = [
        ("dirty_tail", tails.dirty_tail.0, COUNTER_MAX - 1),
        ("batch_end", tails.batch_end.0, COUNTER_MAX - 1),
        ("seq_next_min", tails.seq_next_min.0, COUNTER_MAX - 1),
        ("epoch_min", tails.epoch_min, COUNTER_MAX - 1),
        ("key_tail", tails.key_tail.0, tails.dirty_tail.0),
    ];
    let numbers = numbers.into_iter().filter(|&(_, value, max)| value > max);
    // The witness names blocks of the base, a page at most for each entry.
    let witness = tails.witness.into_iter().filter(move |entry| {
        let end = entry.lba.0.checked_add(u64::from(entry.len_blocks));
        entry.len_blocks > per_page || end.is_none_or(|end| end > block_count)
    });
    numbers
        .map(|(field, value, _)| (field, value))
        .chain(witness.map(|entry| ("witness", entry.lba.0)))
        .map(|(field, value)| OpenError::TailsRange { field, value })
}

impl Scan {
    pub(super) fn new(
        superblock: &Superblock,
        tails: Tails,
        tails_copies: Option<Copies>,
    ) -> Result<Self, OpenError> {
        if let Some(error) = tails_out_of_range(superblock, &tails).next() {
            return Err(error);
        }
        Ok(Self {
            tails,
            tails_copies,
            tails_changed: false,
            segments: Vec::with_capacity(superblock.geometry.segment_count() as usize),
            ksets: Vec::new(),
            seq_max: Seq(0),
            epoch_max: Epoch(0),
            buf: WalkBuf::default(),
        })
    }

    /// A slice of the work; `None` when all segments are scanned.
    pub(super) fn poll<P: Pmem>(
        &mut self,
        pmem: &P,
        superblock: &Superblock,
    ) -> Result<Option<OpenStep>, OpenError> {
        let count = superblock.geometry.segment_count();
        for _ in 0..SEGMENTS_PER_POLL {
            let next = self.segments.len() as u32;
            if next == count {
                return Ok(None);
            }
            self.scan_segment(pmem, superblock, SegId(next))?;
        }
        let done = self.segments.len() as u64;
        Ok(Some(OpenStep::Working {
            done,
            total: u64::from(count),
        }))
    }

    fn scan_segment<P: Pmem>(
        &mut self,
        pmem: &P,
        superblock: &Superblock,
        id: SegId,
    ) -> Result<(), OpenError> {
        let (info, copies) = load_info(pmem, superblock, id)?;
        let ksets_before = self.ksets.len();
        let mut walk = SegmentWalk::new(superblock, id, info);
        while let Some(kset) = walk.next(pmem, &mut self.buf) {
            self.note(id, &kset);
        }
        let mut found = FoundSegment {
            info,
            copies,
            key_end: walk.key_end(),
            kset_count: walk.kset_count(),
            last_seq: walk.last_seq(),
            given_up: false,
            quarantined: false,
        };
        if let Some(reason) = walk.find_damage(pmem, &mut self.buf)? {
            let Some(last_seq) = walk.end_on_base(self.tails.dirty_tail) else {
                // INV-OPEN-4.
                return Err(walk.refusal(reason));
            };
            // The base holds all of it. But its keys cannot speak against older copies of their blocks any
            // more, so those may not count as cached either.
            self.ksets.truncate(ksets_before);
            self.tails.key_tail = self.tails.key_tail.max(last_seq);
            self.tails_changed = true;
            found.given_up = true;
            found.last_seq = last_seq;
        }
        self.segments.push(found);
        Ok(())
    }

    fn note(&mut self, segment: SegId, kset: &Kset) {
        self.seq_max = self.seq_max.max(kset.seq);
        self.epoch_max = self.epoch_max.max(kset.epoch);
        self.ksets.push(FoundKset {
            seq: kset.seq,
            segment,
            off: kset.off,
            kset_index: kset.kset_index,
        });
    }
}
