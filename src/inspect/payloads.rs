//! The payloads of one segment: their checksums, and whether they keep apart.

use super::{Finding, Findings, InspectError, Severity};
use crate::engine::DataCrc;
use crate::media::{ChecksumSeed, Checksums, Key, KeyKind, Kset, Proof, SegmentInfo, Superblock};
use crate::pmem::PmemRead;
use crate::units::{Lba, PAGE_SIZE_BYTES, SegId, Seq};

/// Goes through the ksets of a segment in order.
pub(super) struct Payloads<'a> {
    superblock: &'a Superblock,
    segment: SegId,
    seed: ChecksumSeed,
    dirty_tail: Seq,
    page: [u8; PAGE_SIZE_BYTES as usize],
    extents: Vec<Extent>,
}

/// Where a payload lies in its segment, in bytes.
struct Extent {
    start: u32,
    end: u32,
    lba: Lba,
    dirty: bool,
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
            page: [0; PAGE_SIZE_BYTES as usize],
            extents: Vec::new(),
        }
    }

    /// The checksum of every payload that has one. Without, whether what is dirty can be read.
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
            let data_crc = self.superblock.data_crc == DataCrc::On;
            let has_crc = data_crc || kset.proof == Proof::Checksums;
            // Within a page, as the key was decoded.
            let len_bytes = geometry.bytes(u64::from(key.len_blocks)) as u32;
            self.extents.push(Extent {
                start: key.payload_off,
                end: key.payload_off + len_bytes,
                lba: key.lba,
                dirty,
            });
            if !has_crc && !dirty {
                continue;
            }
            let bytes = &mut self.page[..len_bytes as usize];
            let off = geometry.payload_off(self.segment, key);
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
                true if data_crc => "the base does not hold it, and a drain stops here",
                true => "the base does not hold it, and gets it as it is",
                false => "the base holds it, but a read from the cache returns it as it is",
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
                ..Finding::new(severity(dirty), "payload", text)
            })?;
        }
        Ok(())
    }

    /// After the last kset: no payload lies over another one, nor over the keys, which end at byte `key_end`.
    pub(super) fn check_places(
        &mut self,
        key_end: u32,
        findings: &mut Findings<'_>,
    ) -> Result<(), InspectError> {
        self.extents.sort_unstable_by_key(|extent| extent.start);
        let under_keys = self.extents.iter().filter(|extent| extent.start < key_end);
        for extent in under_keys {
            self.note_overlap(extent, "the keys", extent.dirty, findings)?;
        }
        let mut highest: Option<&Extent> = None;
        for extent in &self.extents {
            if let Some(below) = highest.filter(|below| below.end > extent.start) {
                let other = format!("that of {}", below.lba);
                self.note_overlap(extent, &other, extent.dirty || below.dirty, findings)?;
            }
            if highest.is_none_or(|below| below.end < extent.end) {
                highest = Some(extent);
            }
        }
        Ok(())
    }

    fn note_overlap(
        &self,
        extent: &Extent,
        other: &str,
        dirty: bool,
        findings: &mut Findings<'_>,
    ) -> Result<(), InspectError> {
        let (segment, start) = (self.segment.0, extent.start);
        let text = format!(
            "the payload of {} in segment {segment} at byte {start:#x} lies over {other}",
            extent.lba
        );
        findings.add(&Finding {
            segment: Some(segment),
            lba: Some(extent.lba.0),
            ..Finding::new(severity(dirty), "payload", text)
        })?;
        Ok(())
    }
}

fn severity(dirty: bool) -> Severity {
    if dirty {
        Severity::Dirty
    } else {
        Severity::Clean
    }
}
