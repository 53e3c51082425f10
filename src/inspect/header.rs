//! The superblock and the tails, and what is wrong with them.

use super::{Finding, Findings, InspectError, Severity};
use crate::media::{Checksums, Copies, CopyState, HeaderState, Superblock, Tails, load_header};
use crate::pmem::PmemRead;
use crate::recovery::OpenError;
use crate::recovery::scan::tails_out_of_range;

/// What the header area says.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) superblock: Superblock,
    /// Without valid tails those of an empty log: then everything counts as dirty.
    pub(super) tails: Tails,
}

/// The superblock and its copies.
///
/// # Errors
/// As [`load`].
pub(super) fn load_superblock<P: PmemRead>(pmem: &P) -> Result<(Superblock, Copies), InspectError> {
    match load_header(pmem).map_err(OpenError::from)? {
        HeaderState::Cache(superblock, copies) => Ok((*superblock, copies)),
        HeaderState::Blank => Err(InspectError::NoCache("it is blank")),
        HeaderState::Unfinished => Err(InspectError::NoCache(
            "its formatting was cut short, so nothing was ever written to it",
        )),
    }
}

/// Loads it, and notes what is wrong.
///
/// # Errors
/// There is no cache on the device, or nothing is known of it.
pub(super) fn load<P: PmemRead>(
    pmem: &P,
    findings: &mut Findings<'_>,
) -> Result<Header, InspectError> {
    let (superblock, copies) = load_superblock(pmem)?;
    note_copies(findings, "superblock", &copies, None)?;
    let tails = match Tails::load(pmem, &Checksums::new(superblock.uuid)) {
        Ok((tails, copies)) => {
            note_copies(findings, "tails", &copies, None)?;
            tails
        }
        Err(error) => {
            note_refusal(findings, "tails", &OpenError::Tails(error), None)?;
            Tails::empty()
        }
    };
    for error in tails_out_of_range(&superblock, &tails) {
        note_refusal(findings, "tails", &error, None)?;
    }
    Ok(Header { superblock, tails })
}

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
