//! Every checksum, and everything that recovery relies on.
//!
//! Recovery stops at the first thing that makes it refuse a cache; this goes on. Whether it finds a reason to
//! refuse agrees with recovery, since it asks the same questions.

use super::header::{self, Header};
use super::notes::{Damage, note_copies, note_damage, note_refusal};
use super::payloads::Payloads;
use super::{BaseAccess, BaseFile, Finding, Findings, InspectError, ProgressLine, Severity};
use crate::engine::{BaseGrowth, BaseIdentity};
use crate::media::{SegmentInfo, Superblock, Tails, WITNESS_COUNT, Witness};
use crate::pmem::PmemRead;
use crate::recovery::OpenError;
use crate::recovery::opening::check_base;
use crate::recovery::walk::{SegmentWalk, WalkBuf, load_info};
use crate::recovery::witness::is_overwritten;
use crate::units::{PAGE_SIZE_BYTES, SegId, Seq};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::path::Path;

/// Verifies a cache; with the path of a base, also whether that is the right one. What is wrong goes to `findings`, all of it.
///
/// # Errors
/// The base cannot be read, or the findings not be written. What is wrong with the cache is no error.
pub fn verify<P: PmemRead>(
    pmem: &P,
    base: Option<&Path>,
    findings: &mut Findings<'_>,
    progress: &mut ProgressLine,
) -> Result<(), InspectError> {
    let Header { superblock, tails } = match header::load(pmem, findings) {
        Ok(header) => header,
        Err(error @ (InspectError::NoCache(_) | InspectError::Open(_))) => {
            let text = error.to_string();
            findings.add(&Finding::new(Severity::Refused, "superblock", text))?;
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let block_size_bytes = superblock.base.block_size_bytes;
    let base = base.map(|path| BaseFile::open(path, BaseAccess::Read, block_size_bytes));
    let base = base.transpose()?;
    let mut verifier = Verifier {
        pmem,
        superblock: &superblock,
        witness: tails.witness,
        key_tail: tails.key_tail,
        tails,
        buf: WalkBuf::default(),
        used: Vec::new(),
    };
    let count = superblock.geometry.segment_count();
    for id in (0..count).map(SegId) {
        verifier.check_segment(id, findings)?;
        progress.show("verifying", u64::from(id.0), u64::from(count));
    }
    verifier.check_order(findings)?;
    if let Some(base) = base {
        verifier.check_base(&base, findings)?;
    }
    Ok(())
}

struct Verifier<'a, P> {
    pmem: &'a P,
    superblock: &'a Superblock,
    tails: Tails,
    /// As recovery raises it for segments that it gives up.
    key_tail: Seq,
    /// Without the entries under dirty data.
    witness: [Witness; WITNESS_COUNT],
    buf: WalkBuf,
    /// Segments whose ksets count, if they have any.
    used: Vec<(SegId, SegmentInfo)>,
}

impl<P: PmemRead> Verifier<'_, P> {
    fn check_segment(
        &mut self,
        id: SegId,
        findings: &mut Findings<'_>,
    ) -> Result<(), InspectError> {
        let info = match load_info(self.pmem, self.superblock, id) {
            Ok((info, copies)) => {
                note_copies(findings, "segment info", &copies, Some(id.0))?;
                info
            }
            Err(error) => {
                return note_refusal(findings, "segment info", &error, Some(id.0));
            }
        };
        let dirty_tail = self.tails.dirty_tail;
        let mut walk = SegmentWalk::new(self.superblock, dirty_tail, id, info);
        let mut payloads = Payloads::new(self.superblock, id, &info, dirty_tail);
        while let Some(kset) = walk.next(self.pmem, &mut self.buf) {
            // What counts for nothing may be as it likes.
            if kset.seq <= self.tails.key_tail {
                continue;
            }
            payloads.check(self.pmem, &kset, &self.buf.keys, findings)?;
            if kset.seq > dirty_tail {
                let dirty = self.buf.keys.iter().filter(|key| key.kind.is_dirty());
                for key in dirty {
                    let entries = self.witness.iter_mut();
                    let overwritten = entries.filter(|entry| is_overwritten(entry, key));
                    overwritten.for_each(|entry| entry.len_blocks = 0);
                }
            }
        }
        payloads.check_places(walk.key_end(), findings)?;
        match note_damage(self.pmem, &walk, &mut self.buf, &self.tails, findings)? {
            Damage::GivenUp => {
                let end = walk.end_on_base(dirty_tail).unwrap_or_default();
                self.key_tail = self.key_tail.max(end);
            }
            Damage::None | Damage::Refused => self.used.push((id, info)),
        }
        Ok(())
    }

    /// No two ksets that count have the same seq. The segments are merged, each of them being in order, so
    /// that memory is needed for segments, not for ksets.
    fn check_order(&mut self, findings: &mut Findings<'_>) -> Result<(), InspectError> {
        let (superblock, dirty_tail) = (self.superblock, self.tails.dirty_tail);
        let used = std::mem::take(&mut self.used);
        let walks = used
            .iter()
            .map(|(id, info)| SegmentWalk::new(superblock, dirty_tail, *id, *info));
        let mut walks: Vec<SegmentWalk> = walks.collect();
        let mut heads = BinaryHeap::with_capacity(walks.len());
        let mut advance = |walk: &mut SegmentWalk| {
            std::iter::from_fn(|| walk.next(self.pmem, &mut self.buf))
                .map(|kset| kset.seq)
                .find(|seq| *seq > self.key_tail)
        };
        for (number, walk) in walks.iter_mut().enumerate() {
            heads.extend(advance(walk).map(|seq| Reverse((seq, number))));
        }
        let mut last: Option<(Seq, usize)> = None;
        while let Some(Reverse((seq, number))) = heads.pop() {
            if let Some((last_seq, other)) = last
                && last_seq == seq
            {
                let (a, b) = (walks[other].segment().0, walks[number].segment().0);
                let error = OpenError::DuplicateSeq { seq: seq.0 };
                findings.add(&Finding {
                    segment: Some(b),
                    ..Finding::new(
                        Severity::Refused,
                        "ksets",
                        format!("segments {a} and {b}: {error}"),
                    )
                })?;
            }
            last = Some((seq, number));
            heads.extend(advance(&mut walks[number]).map(|seq| Reverse((seq, number))));
        }
        Ok(())
    }

    fn check_base(&self, base: &BaseFile, findings: &mut Findings<'_>) -> Result<(), InspectError> {
        let ours = &self.superblock.base;
        let given = BaseIdentity {
            block_count: base.block_count(),
            ..ours.clone()
        };
        if let Err(error) = check_base(ours, &given, BaseGrowth::Refuse) {
            return note_refusal(findings, "base", &error, None);
        }
        let mut page = [0; PAGE_SIZE_BYTES as usize];
        for entry in &self.witness {
            // Those out of range were found with the tails, and left out.
            if entry.len_blocks == 0 {
                continue;
            }
            let len = (entry.len_blocks * ours.block_size_bytes) as usize;
            base.read(entry.lba, &mut page[..len])?;
            if let Some(error) = entry.difference(crc32c::crc32c(&page[..len])) {
                findings.add(&Finding {
                    lba: Some(entry.lba.0),
                    len_blocks: Some(entry.len_blocks),
                    ..Finding::new(Severity::Refused, "base", error.to_string())
                })?;
            }
        }
        Ok(())
    }
}
