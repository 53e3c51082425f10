//! Segment infos, ksets and keys, one a line.

use super::header::{self, Header};
use super::notes::{note_damage, note_refusal};
use super::{Findings, InspectError, OutputFormat, ProgressLine};
use crate::media::{Key, KeyKind, Kset, Proof, SegmentInfo, Superblock, Tails};
use crate::pmem::PmemRead;
use crate::recovery::walk::{SegmentWalk, WalkBuf, load_info};
use crate::units::{Lba, SegId, Seq};
use serde::Serialize;
use std::io::Write;
use std::ops::Range;

/// What is to be written.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only this segment.
    pub segment: Option<u32>,
    /// Only keys that touch these blocks, with their ksets and segments.
    pub blocks: Option<Range<Lba>>,
}

impl Selection {
    fn takes(&self, key: &Key) -> bool {
        let end = key.end().0;
        let wanted = self.blocks.as_ref();
        wanted.is_none_or(|wanted| key.lba < wanted.end && wanted.start.0 < end)
    }
}

/// What becomes of a kset when the cache is opened.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum KsetState {
    /// Not written back.
    Dirty,
    /// The base holds it.
    Clean,
    /// It counts for nothing.
    Dead,
}

impl KsetState {
    fn of(seq: Seq, tails: &Tails) -> Self {
        if seq <= tails.key_tail {
            KsetState::Dead
        } else if seq <= tails.dirty_tail {
            KsetState::Clean
        } else {
            KsetState::Dirty
        }
    }

    fn name(self) -> &'static str {
        match self {
            KsetState::Dirty => "dirty",
            KsetState::Clean => "clean",
            KsetState::Dead => "dead",
        }
    }
}

/// A line.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Line {
    Segment {
        segment: u32,
        off: u64,
        generation: u64,
        sealed: bool,
        kset_count: Option<u32>,
        last_seq: Option<u64>,
        update: u64,
    },
    Kset {
        segment: u32,
        kset_index: u32,
        off: u32,
        seq: u64,
        epoch: u64,
        key_count: u32,
        payloads_unfenced: bool,
        state: KsetState,
    },
    Key {
        kind: &'static str,
        lba: u64,
        len_blocks: u32,
        payload_off: Option<u32>,
        crc: Option<u32>,
    },
}

impl Line {
    fn segment(superblock: &Superblock, id: SegId, info: &SegmentInfo) -> Self {
        Line::Segment {
            segment: id.0,
            off: superblock.geometry.segment_off(id).0,
            generation: info.generation.0,
            sealed: info.sealed.is_some(),
            kset_count: info.sealed.map(|sealed| sealed.kset_count),
            last_seq: info.sealed.map(|sealed| sealed.last_seq.0),
            update: info.update,
        }
    }

    fn kset(id: SegId, kset: &Kset, tails: &Tails) -> Self {
        Line::Kset {
            segment: id.0,
            kset_index: kset.kset_index,
            off: kset.off,
            seq: kset.seq.0,
            epoch: kset.epoch.0,
            key_count: kset.key_count,
            payloads_unfenced: kset.proof == Proof::Checksums,
            state: KsetState::of(kset.seq, tails),
        }
    }

    fn key(key: &Key) -> Self {
        Line::Key {
            kind: match key.kind {
                KeyKind::Data => "data",
                KeyKind::Fill => "fill",
                KeyKind::Zeroes => "zeroes",
                KeyKind::Unmap => "unmap",
            },
            lba: key.lba.0,
            len_blocks: key.len_blocks,
            payload_off: key.kind.has_payload().then_some(key.payload_off),
            crc: key.kind.has_payload().then_some(key.crc),
        }
    }

    fn write(&self, out: &mut dyn Write, format: OutputFormat) -> Result<(), InspectError> {
        match format {
            OutputFormat::Json => writeln!(
                out,
                "{}",
                serde_json::to_string(self).map_err(std::io::Error::from)?
            )?,
            OutputFormat::Text => self.write_text(out)?,
        }
        Ok(())
    }

    fn write_text(&self, out: &mut dyn Write) -> std::io::Result<()> {
        match self {
            Line::Segment {
                segment,
                off,
                generation,
                kset_count,
                last_seq,
                update,
                ..
            } => {
                write!(
                    out,
                    "segment {segment} at {off:#x} generation {generation} update {update} "
                )?;
                match kset_count.zip(*last_seq) {
                    Some((count, seq)) => writeln!(out, "sealed ksets {count} last_seq {seq}"),
                    None => writeln!(out, "unsealed"),
                }
            }
            Line::Kset {
                kset_index,
                off,
                seq,
                epoch,
                key_count,
                payloads_unfenced,
                state,
                ..
            } => {
                let unfenced = if *payloads_unfenced { " unfenced" } else { "" };
                let state = state.name();
                writeln!(
                    out,
                    "  kset {kset_index} at {off:#x} seq {seq} epoch {epoch} keys {key_count} {state}{unfenced}"
                )
            }
            Line::Key {
                kind,
                lba,
                len_blocks,
                payload_off,
                crc,
            } => {
                let end = lba + u64::from(*len_blocks);
                write!(out, "    key {kind} blocks {lba}..{end}")?;
                match payload_off.zip(*crc) {
                    Some((off, crc)) => writeln!(out, " payload {off:#x} crc {crc:#010x}"),
                    None => writeln!(out),
                }
            }
        }
    }
}

/// Writes what is selected.
///
/// # Errors
/// There is no cache on the device, or no such segment, or the output cannot be written.
pub fn dump<P: PmemRead>(
    pmem: &P,
    selection: &Selection,
    out: &mut dyn Write,
    format: OutputFormat,
    findings: &mut Findings<'_>,
    progress: &mut ProgressLine,
) -> Result<(), InspectError> {
    let Header { superblock, tails } = header::load(pmem, findings)?;
    let count = superblock.geometry.segment_count();
    let segments = match selection.segment {
        Some(asked) if asked >= count => return Err(InspectError::NoSegment { asked, count }),
        Some(asked) => asked..asked + 1,
        None => 0..count,
    };
    let mut buf = WalkBuf::default();
    for id in segments.map(SegId) {
        let info = match load_info(pmem, &superblock, id) {
            Ok((info, _)) => info,
            Err(error) => {
                note_refusal(findings, "segment info", &error, Some(id.0))?;
                continue;
            }
        };
        let mut segment_line = Some(Line::segment(&superblock, id, &info));
        let mut write_segment = |out: &mut dyn Write| match segment_line.take() {
            Some(line) => line.write(out, format),
            None => Ok(()),
        };
        if selection.blocks.is_none() {
            write_segment(out)?;
        }
        let mut walk = SegmentWalk::new(&superblock, tails.dirty_tail, id, info);
        while let Some(kset) = walk.next(pmem, &mut buf) {
            let mut keys = buf
                .keys
                .iter()
                .filter(|key| selection.takes(key))
                .peekable();
            if keys.peek().is_some() {
                write_segment(out)?;
                Line::kset(id, &kset, &tails).write(out, format)?;
            }
            for key in keys {
                Line::key(key).write(out, format)?;
            }
        }
        note_damage(pmem, &walk, &mut buf, &tails, findings)?;
        progress.show("looking at segments", u64::from(id.0), u64::from(count));
    }
    Ok(())
}
