//! What several commands meet on their way, as findings.

use super::{Finding, Findings, InspectError, Severity};
use crate::media::{Copies, CopyState, Tails};
use crate::pmem::PmemRead;
use crate::recovery::OpenError;
use crate::recovery::walk::{SegmentWalk, WalkBuf};

/// Notes what is wrong with one of two copies.
pub(super) fn note_copies(
    findings: &mut Findings<'_>,
    what: &'static str,
    copies: &Copies,
    segment: Option<u32>,
) -> Result<(), InspectError> {
    if !copies.needs_repair() {
        return Ok(());
    }
    let owner = segment.map_or(String::new(), |segment| format!(" of segment {segment}"));
    for (number, (state, off)) in copies.states.into_iter().zip(copies.offs).enumerate() {
        let which = ["first", "second"][number];
        let trouble = match (state, copies.states[1 - number]) {
            (CopyState::Valid(ours), CopyState::Valid(other)) if ours < other => {
                format!("is of update {ours}, the other of update {other}: an update was cut short")
            }
            (CopyState::Valid(ours), CopyState::Valid(other)) if ours == other && number == 1 => {
                format!("differs from the first, though both are of update {ours}")
            }
            (CopyState::Valid(_), _) => continue,
            (CopyState::Damaged, _) => "is damaged".to_owned(),
            (CopyState::Poisoned, _) => "cannot be read".to_owned(),
        };
        let text = format!("the {which} copy of the {what}{owner} at {off} {trouble}");
        findings.add(&Finding {
            segment,
            off: Some(off.0),
            ..Finding::new(Severity::Repairable, what, text)
        })?;
    }
    Ok(())
}

/// Notes why recovery would refuse the cache.
pub(super) fn note_refusal(
    findings: &mut Findings<'_>,
    what: &'static str,
    error: &OpenError,
    segment: Option<u32>,
) -> Result<(), InspectError> {
    findings.add(&Finding {
        segment,
        ..Finding::new(Severity::Refused, what, error.to_string())
    })?;
    Ok(())
}

/// Whether the ksets of a segment end where they should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Damage {
    None,
    /// The base holds all of it, and it counts for nothing.
    GivenUp,
    Refused,
}

/// Notes damage that a walk has come to.
pub(super) fn note_damage<P: PmemRead>(
    pmem: &P,
    walk: &SegmentWalk,
    buf: &mut WalkBuf,
    tails: &Tails,
    findings: &mut Findings<'_>,
) -> Result<Damage, InspectError> {
    let segment = walk.segment().0;
    let reason = match walk.find_damage(pmem, buf) {
        Ok(None) => return Ok(Damage::None),
        Ok(Some(reason)) => reason,
        Err(error) => {
            note_refusal(findings, "ksets", &error, Some(segment))?;
            return Ok(Damage::Refused);
        }
    };
    if walk.end_on_base(tails.dirty_tail).is_none() {
        note_refusal(findings, "ksets", &walk.refusal(reason), Some(segment))?;
        return Ok(Damage::Refused);
    }
    let (count, off) = (walk.kset_count(), walk.key_end());
    let text = format!(
        "segment {segment} is damaged behind {count} ksets at byte {off:#x}: {reason}; the base holds all of it, and the next opening frees it"
    );
    findings.add(&Finding {
        segment: Some(segment),
        ..Finding::new(Severity::Clean, "ksets", text)
    })?;
    Ok(Damage::GivenUp)
}
