//! The scan: what each segment holds. Only reads.

use super::error::OpenError;
use super::opening::OpenStep;
use crate::canary::{self, Canary};
use crate::media::{
    COUNTER_MAX, Checksums, KEYS_START_BYTES, KSET_KEYS_MAX, Key, Kset, KsetContext, KsetError,
    KsetReader, Sealed, SegmentInfo, StaleCopy, Superblock, Tails, kset_size_bytes,
};
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
    pub(super) stale: Option<StaleCopy>,
    pub(super) key_end: u32,
    pub(super) kset_count: u32,
    pub(super) last_seq: Seq,
    /// Its keys are damaged, but the base holds all that was in it.
    pub(super) given_up: bool,
}

#[derive(Debug)]
pub(super) struct Scan {
    pub(super) tails: Tails,
    pub(super) tails_stale: Option<StaleCopy>,
    /// They are not what the media say any more.
    pub(super) tails_changed: bool,
    pub(super) segments: Vec<FoundSegment>,
    pub(super) ksets: Vec<FoundKset>,
    pub(super) seq_max: Seq,
    pub(super) epoch_max: Epoch,
    reader: KsetReader,
    keys: Vec<Key>,
}

/// The witness names blocks of the base, a page at most for each entry.
fn check_witness(superblock: &Superblock, tails: &Tails) -> Result<(), OpenError> {
    let per_page = superblock.geometry.blocks_per_page();
    for entry in &tails.witness {
        let end = entry.lba.0.checked_add(u64::from(entry.len_blocks));
        let in_range = end.is_some_and(|end| end <= superblock.base.block_count);
        if entry.len_blocks > per_page || !in_range {
            return Err(OpenError::TailsRange {
                field: "witness",
                value: entry.lba.0,
            });
        }
    }
    Ok(())
}

/// Where the ksets of a segment end, and why.
struct LogEnd {
    off: u32,
    kset_count: u32,
    error: Option<KsetError>,
}

impl Scan {
    pub(super) fn new(
        superblock: &Superblock,
        tails: Tails,
        tails_stale: Option<StaleCopy>,
    ) -> Result<Self, OpenError> {
        let numbers = [
            ("dirty_tail", tails.dirty_tail.0),
            ("batch_end", tails.batch_end.0),
            ("seq_next_min", tails.seq_next_min.0),
            ("epoch_min", tails.epoch_min),
        ];
        for (field, value) in numbers {
            if value > COUNTER_MAX {
                return Err(OpenError::TailsRange { field, value });
            }
        }
        // INV-TAIL-1.
        if tails.key_tail > tails.dirty_tail {
            return Err(OpenError::TailsRange {
                field: "key_tail",
                value: tails.key_tail.0,
            });
        }
        check_witness(superblock, &tails)?;
        Ok(Self {
            tails,
            tails_stale,
            tails_changed: false,
            segments: Vec::with_capacity(superblock.geometry.segment_count() as usize),
            ksets: Vec::new(),
            seq_max: Seq(0),
            epoch_max: Epoch(0),
            reader: KsetReader::default(),
            keys: Vec::with_capacity(KSET_KEYS_MAX),
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
        let geometry = &superblock.geometry;
        let checksums = Checksums::new(superblock.uuid);
        let (info, stale) = SegmentInfo::load(pmem, geometry, &checksums, id).map_err(|error| {
            OpenError::SegmentInfo {
                segment: id.0,
                error,
            }
        })?;
        let context = KsetContext::new(
            geometry,
            superblock.base.block_count,
            &checksums,
            id,
            info.generation,
        );
        let ksets_before = self.ksets.len();
        let mut found = FoundSegment {
            info,
            stale,
            key_end: KEYS_START_BYTES,
            kset_count: 0,
            last_seq: Seq(0),
            given_up: false,
        };
        let end = self.walk(pmem, &context, &mut found);
        if let Some(reason) = self.find_damage(pmem, &context, &found, &end)? {
            let Some(Sealed { last_seq, .. }) =
                info.sealed.filter(|s| s.last_seq <= self.tails.dirty_tail)
            else {
                // INV-OPEN-4.
                let (ksets_valid, off) = (end.kset_count, end.off);
                return Err(OpenError::Segment {
                    segment: id.0,
                    ksets_valid,
                    off,
                    reason,
                });
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

    /// Notes the ksets of a segment up to the first place without one.
    fn walk<P: Pmem>(
        &mut self,
        pmem: &P,
        context: &KsetContext<'_>,
        found: &mut FoundSegment,
    ) -> LogEnd {
        loop {
            let (off, kset_count) = (found.key_end, found.kset_count);
            if found
                .info
                .sealed
                .is_some_and(|sealed| sealed.kset_count == kset_count)
            {
                return LogEnd {
                    off,
                    kset_count,
                    error: None,
                };
            }
            self.keys.clear();
            let kset = match self
                .reader
                .read(pmem, context, off, kset_count, &mut self.keys)
            {
                Ok(kset) => kset,
                Err(error) => {
                    return LogEnd {
                        off,
                        kset_count,
                        error: Some(error),
                    };
                }
            };
            if !self.is_plausible(&kset, found) {
                return LogEnd {
                    off,
                    kset_count,
                    error: Some(KsetError::KeyRange),
                };
            }
            self.note(context, &kset, found);
        }
    }

    /// INV-LOG-3, and counters that somebody can have reached (INV-OPEN-3).
    fn is_plausible(&self, kset: &Kset, found: &FoundSegment) -> bool {
        let seq_is_next = found.kset_count == 0
            || kset.seq > found.last_seq
            || canary::is(Canary::StaleLapAccepted);
        seq_is_next && kset.seq.0 > 0 && kset.seq.0 < COUNTER_MAX && kset.epoch.0 < COUNTER_MAX
    }

    fn note(&mut self, context: &KsetContext<'_>, kset: &Kset, found: &mut FoundSegment) {
        found.last_seq = kset.seq;
        found.kset_count += 1;
        found.key_end += kset.size_bytes;
        self.seq_max = self.seq_max.max(kset.seq);
        self.epoch_max = self.epoch_max.max(kset.epoch);
        self.ksets.push(FoundKset {
            seq: kset.seq,
            segment: context.segment(),
            off: kset.off,
            kset_index: kset.kset_index,
        });
    }

    /// Whether the ksets of a segment end where they should. Each kset is durable before the next is stored,
    /// so behind the last one there is nothing valid unless something before it was damaged.
    fn find_damage<P: Pmem>(
        &mut self,
        pmem: &P,
        context: &KsetContext<'_>,
        found: &FoundSegment,
        end: &LogEnd,
    ) -> Result<Option<&'static str>, OpenError> {
        match (end.error, found.info.sealed) {
            (None, Some(sealed)) if sealed.last_seq == found.last_seq => Ok(None),
            (None, _) => Ok(Some("its last kset is not the one that was sealed")),
            (Some(KsetError::Poisoned(_)), _) => Ok(Some("its keys cannot be read")),
            (Some(KsetError::KeyRange), _) => Ok(Some("a key is out of range")),
            (Some(KsetError::Invalid), Some(_)) => Ok(Some("it was sealed with more ksets")),
            (Some(KsetError::Invalid), None) => {
                let window = kset_size_bytes(KSET_KEYS_MAX) as u32;
                let later =
                    self.reader
                        .find_later(pmem, context, end.off, end.kset_count, window)?;
                Ok(later.map(|_| "a valid kset follows a damaged one"))
            }
        }
    }
}
