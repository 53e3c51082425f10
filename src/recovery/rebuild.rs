//! The index from the keys, and the repairs.

use super::error::OpenError;
use super::opening::{OpenStep, new_index};
use super::scan::{FoundKset, Scan};
use super::witness::drop_overwritten;
use crate::canary::{self, Canary};
use crate::engine::{BACKGROUND_AGENT, SegmentStart, SegmentState, Segments};
use crate::index::{EarlierParts, Index, IndexFull, LineStock, Target};
use crate::media::{
    Checksums, Geometry, KEYS_START_BYTES, KSET_KEYS_MAX, Key, KeyKind, KsetContext, KsetReader,
    Sealed, SegmentInfo, Superblock, Tails, WITNESS_COUNT, Witness,
};
use crate::pmem::Pmem;
use crate::units::{Epoch, Generation, Page, SegId, Seq};

/// Ksets that one poll applies.
const KSETS_PER_POLL: usize = 512;
/// Segments that one poll repairs.
const REPAIRS_PER_POLL: usize = 64;
/// An index that is too small for what the log holds is built again, this much larger at the most.
const INDEX_FACTOR_MAX: u64 = 64;

/// What recovery hands to the cache.
pub(super) struct Found {
    pub(super) tails: Tails,
    pub(super) index: Index,
    pub(super) segments: Segments,
    pub(super) seq_next: Seq,
    pub(super) epoch: Epoch,
    pub(super) dirty_bytes: u64,
}

pub(super) struct Rebuild {
    scan: Scan,
    index: Index,
    index_factor: u64,
    lines: LineStock,
    next_kset: usize,
    dirty_bytes: u64,
    witness: [Witness; WITNESS_COUNT],
    reader: KsetReader,
    keys: Vec<Key>,
    next_repair: usize,
}

impl Rebuild {
    pub(super) fn new(mut scan: Scan, superblock: &Superblock) -> Result<Self, OpenError> {
        let key_tail = scan.tails.key_tail;
        if !canary::is(Canary::KeyTailIgnored) {
            scan.ksets.retain(|kset| kset.seq > key_tail);
        }
        if !canary::is(Canary::RecoveredInSegmentOrder) {
            scan.ksets.sort_unstable();
        }
        // INV-LOG-3.
        for pair in scan.ksets.windows(2) {
            if pair[0].seq == pair[1].seq {
                let (seq, a, b) = (pair[0].seq.0, pair[0].segment.0, pair[1].segment.0);
                return Err(OpenError::DuplicateSeq { seq, a, b });
            }
        }
        Ok(Self {
            index: new_index(superblock, 1),
            index_factor: 1,
            lines: LineStock::new(1),
            next_kset: 0,
            dirty_bytes: 0,
            witness: scan.tails.witness,
            reader: KsetReader::default(),
            keys: Vec::with_capacity(KSET_KEYS_MAX),
            next_repair: 0,
            scan,
        })
    }

    /// The witness without the entries that dirty data are about to overwrite on the base, or have already
    /// (INV-WIT-1).
    pub(super) fn witness(&self) -> [Witness; WITNESS_COUNT] {
        self.witness
    }

    /// A slice of the work; `None` when the index is complete.
    pub(super) fn poll<P: Pmem>(
        &mut self,
        pmem: &P,
        superblock: &Superblock,
    ) -> Result<Option<OpenStep>, OpenError> {
        let total = self.scan.ksets.len();
        let end = (self.next_kset + KSETS_PER_POLL).min(total);
        while self.next_kset < end {
            let kset = self.scan.ksets[self.next_kset];
            match self.apply(pmem, superblock, kset)? {
                Ok(()) => self.next_kset += 1,
                Err(IndexFull) if self.index_factor < INDEX_FACTOR_MAX => {
                    self.index_factor *= 2;
                    self.index = new_index(superblock, self.index_factor);
                    self.next_kset = 0;
                    self.dirty_bytes = 0;
                    break;
                }
                Err(IndexFull) => {
                    let reason = "its keys name more pages than a cache of this size can hold";
                    let (segment, off) = (kset.segment.0, kset.off);
                    let ksets_valid = kset.kset_index;
                    return Err(OpenError::Segment {
                        segment,
                        ksets_valid,
                        off,
                        reason,
                    });
                }
            }
        }
        let step = OpenStep::Working {
            done: self.next_kset as u64,
            total: total as u64,
        };
        Ok((self.next_kset < total).then_some(step))
    }

    /// Lets the keys of a kset take effect.
    fn apply<P: Pmem>(
        &mut self,
        pmem: &P,
        superblock: &Superblock,
        found: FoundKset,
    ) -> Result<Result<(), IndexFull>, OpenError> {
        let geometry = &superblock.geometry;
        let checksums = Checksums::new(superblock.uuid);
        let info = &self.scan.segments[found.segment.index()].info;
        let context = KsetContext::new(
            geometry,
            superblock.base.block_count,
            &checksums,
            found.segment,
            info.generation,
        );
        self.keys.clear();
        let (off, kset_index) = (found.off, found.kset_index);
        if self
            .reader
            .read(pmem, &context, off, kset_index, &mut self.keys)
            .is_err()
        {
            let reason = "a kset that was valid a moment ago is not any more";
            let segment = found.segment.0;
            return Err(OpenError::Segment {
                segment,
                ksets_valid: kset_index,
                off,
                reason,
            });
        }
        let dirty = found.seq > self.scan.tails.dirty_tail;
        for at in 0..self.keys.len() {
            let key = self.keys[at];
            if !key.kind.has_payload() && canary::is(Canary::ZeroesForgotten) {
                continue;
            }
            if let Err(full) = self.install(geometry, found.segment, &key) {
                return Ok(Err(full));
            }
            if dirty && key.kind.is_dirty() {
                self.note_dirty(geometry, &key);
            }
        }
        Ok(Ok(()))
    }

    fn install(&mut self, geometry: &Geometry, segment: SegId, key: &Key) -> Result<(), IndexFull> {
        let per_page = u64::from(geometry.blocks_per_page());
        let end = key.lba.0 + u64::from(key.len_blocks);
        let mut lba = key.lba.0;
        let place = geometry.place(segment, key.payload_off);
        let target = if key.kind.has_payload() {
            Target::Mapped(place)
        } else {
            Target::Zero(place)
        };
        while lba < end {
            let page = lba / per_page;
            let page_end = ((page + 1) * per_page).min(end);
            let (first, len_blocks) = ((lba % per_page) as u32, (page_end - lba) as u32);
            self.install_part(Page(page), first, len_blocks, target)?;
            lba = page_end;
        }
        Ok(())
    }

    fn install_part(
        &mut self,
        page: Page,
        first: u32,
        len_blocks: u32,
        target: Target,
    ) -> Result<(), IndexFull> {
        let (index, lines) = (&self.index, &mut self.lines);
        let slot = index.reserve(index.locate(page))?;
        let is_part = len_blocks < index.geometry().blocks_per_page();
        let splits = is_part && index.needs_line(slot, first, len_blocks, EarlierParts::No);
        if splits && !index.stock_line(lines) {
            return Err(IndexFull);
        }
        index.publish(slot, first, len_blocks, target, lines);
        index.clear_stock(lines);
        Ok(())
    }

    fn note_dirty(&mut self, geometry: &Geometry, key: &Key) {
        if key.kind == KeyKind::Data {
            self.dirty_bytes += geometry.bytes(u64::from(key.len_blocks));
        }
        drop_overwritten(&mut self.witness, key);
    }

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
        if let Some(copies) = &mut self.scan.tails_copies {
            copies.repair(pmem, BACKGROUND_AGENT)?;
        }
        if std::mem::take(&mut self.scan.tails_changed) {
            // 1. The key tail before any generation, as when a segment is reclaimed.
            drop(self.scan.tails.persist(pmem, BACKGROUND_AGENT, &checksums));
        }
        let total = self.scan.segments.len();
        let end = (self.next_repair + REPAIRS_PER_POLL).min(total);
        while self.next_repair < end {
            // 2. Segments, in any order.
            self.repair_segment(
                pmem,
                &superblock.geometry,
                &checksums,
                SegId(self.next_repair as u32),
            )?;
            self.next_repair += 1;
        }
        let step = OpenStep::Working {
            done: end as u64,
            total: total as u64,
        };
        Ok((end < total).then_some(step))
    }

    /// A segment of which nothing counts any more is freed; one that was open is sealed, so that nothing is
    /// ever appended behind what may be the rest of a torn kset.
    fn repair_segment<P: Pmem>(
        &mut self,
        pmem: &P,
        geometry: &Geometry,
        checksums: &Checksums,
        id: SegId,
    ) -> Result<(), OpenError> {
        let key_tail = self.scan.tails.key_tail;
        let found = &mut self.scan.segments[id.index()];
        found.copies.repair(pmem, BACKGROUND_AGENT)?;
        let used = found.kset_count > 0 || found.info.sealed.is_some();
        let dead = used && (found.given_up || found.last_seq <= key_tail || found.kset_count == 0);
        if dead {
            found.info.generation = Generation(found.info.generation.0 + 1);
            found.info.sealed = None;
            found.kset_count = 0;
            found.key_end = KEYS_START_BYTES;
            found.last_seq = Seq(0);
            found.given_up = false;
        } else if used && found.info.sealed.is_none() {
            let (kset_count, last_seq) = (found.kset_count, found.last_seq);
            found.info.sealed = Some(Sealed {
                kset_count,
                last_seq,
            });
        } else {
            return Ok(());
        }
        let info: &mut SegmentInfo = &mut found.info;
        drop(info.persist(pmem, BACKGROUND_AGENT, geometry, checksums, id));
        Ok(())
    }

    /// What was found, once everything is repaired.
    pub(super) fn into_found(self, geometry: &Geometry) -> Found {
        let mut scan = self.scan;
        assert!(
            scan.segments
                .iter()
                .all(|found| found.info.sealed.is_some() == (found.kset_count > 0)),
            "INV-LOG-6: a segment with ksets is open after recovery, or an empty one is sealed"
        );
        if canary::is(Canary::SeqGivenOutAgain) {
            scan.seq_max = Seq(0);
        }
        if canary::is(Canary::EpochForgotten) {
            scan.epoch_max = Epoch(0);
        }
        let starts: Vec<SegmentStart> = scan
            .segments
            .iter()
            .map(|found| SegmentStart {
                state: if found.kset_count == 0 {
                    SegmentState::Free
                } else {
                    SegmentState::Sealed
                },
                info: found.info,
                key_end: found.key_end,
                last_seq: found.last_seq,
            })
            .collect();
        Found {
            segments: Segments::new(geometry, &starts, scan.tails.dirty_tail),
            seq_next: Seq((scan.seq_max.0 + 1)
                .max(scan.tails.seq_next_min.0)
                .max(scan.tails.dirty_tail.0 + 1)),
            epoch: Epoch((scan.epoch_max.0 + 1).max(scan.tails.epoch_min)),
            tails: scan.tails,
            index: self.index,
            dirty_bytes: self.dirty_bytes,
        }
    }
}
