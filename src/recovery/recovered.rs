//! What recovery has understood, and the repairs.

use super::error::OpenError;
use super::opening::OpenStep;
use super::pass::{FoundSegment, Known};
use super::torn::{end_torn_kset, store_last_again};
use super::walk::WalkBuf;
use crate::canary::{self, Canary};
use crate::engine::{
    BACKGROUND_AGENT, BackgroundMemory, CacheMemory, Damage, Heat, PlaceCrcs, SegmentStart,
    SegmentState, Segments,
};
use crate::index::Index;
use crate::media::{
    Checksums, Geometry, KEYS_START_BYTES, Sealed, SegmentInfo, Superblock, Tails, WITNESS_COUNT,
    Witness,
};
use crate::pmem::{LINE_SIZE_BYTES, Pmem};
use crate::units::{Epoch, Generation, SegId, Seq};

/// Segments that one poll repairs.
const REPAIRS_PER_POLL: usize = 64;
/// So much of what is to be used again one poll looks at: a load for each page.
const PROBED_PER_POLL_BYTES: u64 = 4 << 20;

/// What recovery hands to the cache.
pub(super) struct Found {
    pub(super) tails: Tails,
    pub(super) index: Index,
    pub(super) place_crcs: Option<PlaceCrcs>,
    pub(super) segments: Segments,
    pub(super) damage: Damage,
    pub(super) heat: Heat,
    pub(super) background: BackgroundMemory,
    pub(super) seq_next: Seq,
    pub(super) epoch: Epoch,
    pub(super) dirty_bytes: u64,
}

/// What a pass over all segments has come to.
pub(super) struct Recovered {
    pub(super) known: Known,
    pub(super) segments: Vec<FoundSegment>,
    pub(super) index: Index,
    pub(super) place_crcs: Option<PlaceCrcs>,
    /// For the cache.
    pub(super) memory: CacheMemory,
    /// Without the entries that dirty data are about to overwrite on the base, or have already.
    pub(super) witness: [Witness; WITNESS_COUNT],
    pub(super) dirty_bytes: u64,
    pub(super) seq_max: Seq,
    pub(super) epoch_max: Epoch,
    pub(super) next_repair: usize,
    pub(super) buf: WalkBuf,
    /// So much of that segment was looked at.
    pub(super) probed_bytes: u64,
}

/// How far a segment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Repair {
    Done,
    /// There is more of it to look at.
    Begun,
}

/// What a segment holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    None,
    Used,
    /// Nothing that counts any more.
    Dead,
}

/// What the look at a segment that is to be used again has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probe {
    Readable,
    Unreadable,
    Begun,
}

impl Recovered {
    /// Makes the media what was understood of them; `None` when all is done. A cut in here changes nothing
    /// of what the next recovery finds.
    ///
    /// # Errors
    /// What was read a moment ago cannot be read any more.
    pub(super) fn repair<P: Pmem>(
        &mut self,
        pmem: &P,
        superblock: &Superblock,
    ) -> Result<Option<OpenStep>, OpenError> {
        let checksums = Checksums::new(superblock.uuid);
        if let Some(mut copies) = self.known.tails_copies.take() {
            copies.repair(pmem, BACKGROUND_AGENT)?;
        }
        if std::mem::take(&mut self.known.tails_changed) {
            // 1. The key tail before any generation, as when a segment is reclaimed.
            drop(self.known.tails.persist(pmem, BACKGROUND_AGENT, &checksums));
        }
        let total = self.segments.len();
        let end = (self.next_repair + REPAIRS_PER_POLL).min(total);
        let mut probe_left_bytes = PROBED_PER_POLL_BYTES;
        while self.next_repair < end {
            // 2. Segments, in any order.
            let repair = self.repair_segment(
                pmem,
                superblock,
                &checksums,
                SegId(self.next_repair as u32),
                &mut probe_left_bytes,
            )?;
            if repair == Repair::Begun {
                break;
            }
            self.next_repair += 1;
        }
        let step = OpenStep::Working {
            done: self.next_repair as u64,
            total: total as u64,
        };
        Ok((self.next_repair < total).then_some(step))
    }

    /// Whether all of the next segment can be read, as far as `left_bytes` go.
    fn probe<P: Pmem>(&mut self, pmem: &P, geometry: &Geometry, left_bytes: &mut u64) -> Probe {
        let (size_bytes, begun) = (geometry.segment_size_bytes(), self.probed_bytes);
        let len_bytes = (size_bytes - begun).min(*left_bytes);
        *left_bytes -= len_bytes;
        let start = geometry.segment_off(SegId(self.next_repair as u32));
        let is_readable = len_bytes == 0 || pmem.probe(start.plus(begun), len_bytes).is_ok();
        self.probed_bytes = begun + len_bytes;
        if is_readable && self.probed_bytes < size_bytes {
            return Probe::Begun;
        }
        self.probed_bytes = 0;
        if is_readable {
            Probe::Readable
        } else {
            Probe::Unreadable
        }
    }

    /// A segment of which nothing counts any more is freed; one that was open is sealed, so that nothing is
    /// ever appended behind what may be the rest of a torn kset. In one that is empty such a rest may lie where its first
    /// kset comes, and what a cut leaves of that could make it whole: it gets another generation too.
    fn repair_segment<P: Pmem>(
        &mut self,
        pmem: &P,
        superblock: &Superblock,
        checksums: &Checksums,
        id: SegId,
        probe_left_bytes: &mut u64,
    ) -> Result<Repair, OpenError> {
        let geometry = &superblock.geometry;
        let content = self.content_of(id);
        let is_lost = self.segments[id.index()].copies.unreadable().is_some();
        if is_lost && !canary::is(Canary::UnreadableCopyStored) {
            return self.leave_segment(pmem, superblock, id, content);
        }
        if content == Content::Dead {
            match self.probe(pmem, geometry, probe_left_bytes) {
                Probe::Readable => {}
                Probe::Begun => return Ok(Repair::Begun),
                Probe::Unreadable => return self.leave_segment(pmem, superblock, id, content),
            }
        }
        let found = &mut self.segments[id.index()];
        found.copies.repair(pmem, BACKGROUND_AGENT)?;
        // INV-LOG-9.
        let torn = content == Content::None
            && !is_blank(pmem, geometry, id)?
            && !canary::is(Canary::TornKsetCompleted);
        if content == Content::Dead || torn {
            found.info.generation = Generation(found.info.generation.0 + 1);
            found.info.sealed = None;
            found.kset_count = 0;
            found.key_end = KEYS_START_BYTES;
            found.last_seq = Seq(0);
            found.given_up = false;
        } else if content == Content::Used && found.info.sealed.is_none() {
            store_last_again(pmem, superblock, id, found, &mut self.buf)?;
            let (kset_count, last_seq) = (found.kset_count, found.last_seq);
            found.info.sealed = Some(Sealed {
                kset_count,
                last_seq,
            });
        } else {
            return Ok(Repair::Done);
        }
        let info: &mut SegmentInfo = &mut found.info;
        drop(info.persist(pmem, BACKGROUND_AGENT, geometry, checksums, id));
        Ok(Repair::Done)
    }

    fn content_of(&self, id: SegId) -> Content {
        let found = &self.segments[id.index()];
        if found.kset_count == 0 && found.info.sealed.is_none() {
            Content::None
        } else if found.given_up
            || found.last_seq <= self.known.tails.key_tail
            || found.kset_count == 0
        {
            Content::Dead
        } else {
            Content::Used
        }
    }

    /// A segment of which part of the memory cannot be read is neither sealed nor freed: it stays as it is, so that the next
    /// recovery finds the same (INV-PAIR-3, INV-SEG-7), but for what a crash has left of its last batch.
    fn leave_segment<P: Pmem>(
        &mut self,
        pmem: &P,
        superblock: &Superblock,
        id: SegId,
        content: Content,
    ) -> Result<Repair, OpenError> {
        let found = &mut self.segments[id.index()];
        end_torn_kset(pmem, &superblock.geometry, id, found);
        found.suspect = content == Content::Used;
        found.quarantined = !found.suspect;
        if found.suspect && found.info.sealed.is_none() {
            store_last_again(pmem, superblock, id, found, &mut self.buf)?;
        }
        Ok(Repair::Done)
    }

    /// What was found, once everything is repaired.
    pub(super) fn into_found(mut self) -> Found {
        let tails = self.known.tails;
        assert!(
            self.segments.iter().all(|found| found.quarantined
                || found.suspect
                || found.info.sealed.is_some() == (found.kset_count > 0)),
            "INV-LOG-6: a segment with ksets is open after recovery, or an empty one is sealed"
        );
        if canary::is(Canary::SeqGivenOutAgain) {
            self.seq_max = Seq(0);
        }
        if canary::is(Canary::EpochForgotten) {
            self.epoch_max = Epoch(0);
        }
        let starts = self.segments.iter().map(|found| SegmentStart {
            state: if found.quarantined {
                SegmentState::Quarantined
            } else if found.kset_count == 0 {
                SegmentState::Free
            } else {
                SegmentState::Sealed
            },
            info: found.info,
            key_end: found.key_end,
            last_seq: found.last_seq,
        });
        let segments = Segments::new(self.memory.segments, starts, tails.dirty_tail);
        let suspects = segments.ids().zip(&self.segments);
        for (id, _) in suspects.filter(|(_, found)| found.suspect) {
            segments.suspect(id);
        }
        Found {
            segments,
            damage: self.memory.damage,
            heat: self.memory.heat,
            background: self.memory.background,
            seq_next: Seq((self.seq_max.0 + 1)
                .max(tails.seq_next_min.0)
                .max(tails.dirty_tail.0 + 1)),
            epoch: Epoch((self.epoch_max.0 + 1).max(tails.epoch_min)),
            tails,
            index: self.index,
            place_crcs: self.place_crcs,
            dirty_bytes: self.dirty_bytes,
        }
    }
}

/// Whether there is nothing in a segment where the first line of its first kset comes. A rest of one can become a kset
/// again only if that line has something of its checksum.
fn is_blank<P: Pmem>(pmem: &P, geometry: &Geometry, id: SegId) -> Result<bool, OpenError> {
    let mut line = [0; LINE_SIZE_BYTES as usize];
    let start = geometry.segment_off(id);
    pmem.read(start.plus(u64::from(KEYS_START_BYTES)), &mut line)?;
    Ok(line == [0; LINE_SIZE_BYTES as usize])
}
