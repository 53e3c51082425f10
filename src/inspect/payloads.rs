//! The payloads of one segment: their checksums, and whether they keep apart.

use super::{Finding, Findings, InspectError, Severity};
use crate::engine::DataCrc;
use crate::media::{ChecksumSeed, Checksums, Key, KeyKind, Kset, SegmentInfo, Superblock};
use crate::pmem::PmemRead;
use crate::units::{PAGE_SIZE_BYTES, SegId, Seq};

/// Goes through the ksets of a segment in order.
pub(super) struct Payloads<'a> {
    superblock: &'a Superblock,
    segment: SegId,
    seed: ChecksumSeed,
    dirty_tail: Seq,
    /// Each kset has its payloads below those of all before it.
    lowest_off: u32,
    page: [u8; PAGE_SIZE_BYTES as usize],
    /// Of one kset: start and end.
    extents: Vec<(u32, u32)>,
}

impl<'a> Payloads<'a> {
    pub(super) fn new(
        superblock: &'a Superblock,
        segment: SegId,
        info: &SegmentInfo,
        dirty_tail: Seq,
    ) -> Self {
        let checksums = Checksums::new(superblock.uuid);
        Self {
            superblock,
            segment,
            seed: checksums.payload(segment.0, info.generation.0),
            dirty_tail,
            // A segment has at most 2^30 bytes.
            lowest_off: superblock.geometry.segment_size_bytes() as u32,
            page: [0; PAGE_SIZE_BYTES as usize],
            extents: Vec::new(),
        }
    }

    fn severity(&self, dirty: bool) -> Severity {
        if dirty {
            Severity::Dirty
        } else {
            Severity::Clean
        }
    }

    /// The checksum of every payload that has one. Without checksums, whether what is dirty can be read.
    pub(super) fn check<P: PmemRead>(
        &mut self,
        pmem: &P,
        kset: &Kset,
        keys: &[Key],
        findings: &mut Findings<'_>,
    ) -> Result<(), InspectError> {
        let geometry = &self.superblock.geometry;
        for key in keys.iter().filter(|key| key.kind.has_payload()) {
            let dirty = key.kind == KeyKind::Data && kset.seq > self.dirty_tail;
            let has_crc = self.superblock.data_crc == DataCrc::On;
            if !has_crc && !dirty {
                continue;
            }
            // Within a page, as the key was decoded.
            let bytes = &mut self.page[..geometry.bytes(u64::from(key.len_blocks)) as usize];
            let start = geometry.segment_off(self.segment);
            let off = start.plus(u64::from(key.payload_off));
            let trouble = match pmem.read(off, bytes).map(|()| self.seed.checksum(bytes)) {
                Ok(found) if has_crc && found != key.crc => {
                    format!("its checksum is {found:#010x}, not {:#010x}", key.crc)
                }
                Ok(_) => continue,
                Err(_) => "it cannot be read".to_owned(),
            };
            let (lba, segment) = (key.lba.0, self.segment.0);
            let end = lba + u64::from(key.len_blocks);
            let outcome = match dirty {
                true => "the base does not hold it, and a drain stops here",
                false => "the base holds it",
            };
            let text = format!(
                "the payload of blocks {lba}..{end} in segment {segment}, kset {} (seq {}), at {off} is damaged: {trouble}; {outcome}",
                kset.kset_index, kset.seq.0
            );
            findings.add(&Finding {
                segment: Some(segment),
                off: Some(off.0),
                lba: Some(lba),
                len_blocks: Some(key.len_blocks),
                ..Finding::new(self.severity(dirty), "payload", text)
            })?;
        }
        self.check_places(kset, keys, findings)
    }

    /// A writer lays payloads down from the end of the segment, and none over another.
    fn check_places(
        &mut self,
        kset: &Kset,
        keys: &[Key],
        findings: &mut Findings<'_>,
    ) -> Result<(), InspectError> {
        let geometry = &self.superblock.geometry;
        let with_payload = keys.iter().filter(|key| key.kind.has_payload());
        self.extents.clear();
        self.extents.extend(with_payload.map(|key| {
            let len = geometry.bytes(u64::from(key.len_blocks)) as u32;
            (key.payload_off, key.payload_off + len)
        }));
        self.extents.sort_unstable();
        let above = self.extents.iter().skip(1).map(|(start, _)| *start);
        let above = above.chain([self.lowest_off]);
        let overlap = self
            .extents
            .iter()
            .zip(above)
            .find(|((_, end), above)| end > above);
        if let Some(((start, _), _)) = overlap {
            let what = format!("the payload at byte {start:#x}");
            self.note_overlap(kset, &what, "another payload", findings)?;
        }
        if let Some((start, _)) = self.extents.first() {
            self.lowest_off = self.lowest_off.min(*start);
        }
        Ok(())
    }

    /// After the last kset, which ends at byte `key_end`.
    pub(super) fn check_end(
        &self,
        last: &Kset,
        findings: &mut Findings<'_>,
    ) -> Result<(), InspectError> {
        if self.lowest_off < last.off + last.size_bytes {
            let what = format!("the payload at byte {:#x}", self.lowest_off);
            self.note_overlap(last, &what, "the keys", findings)?;
        }
        Ok(())
    }

    fn note_overlap(
        &self,
        kset: &Kset,
        what: &str,
        other: &str,
        findings: &mut Findings<'_>,
    ) -> Result<(), InspectError> {
        let segment = self.segment.0;
        let text = format!(
            "in segment {segment}, kset {} (seq {}): {what} overlaps {other}",
            kset.kset_index, kset.seq.0
        );
        findings.add(&Finding {
            segment: Some(segment),
            ..Finding::new(self.severity(kset.seq > self.dirty_tail), "payload", text)
        })?;
        Ok(())
    }
}
