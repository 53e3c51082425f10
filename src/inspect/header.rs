//! The superblock and the tails, and what is wrong with them.

use super::notes::{note_copies, note_refusal};
use super::{Findings, InspectError};
use crate::media::{Checksums, Copies, HeaderState, Superblock, Tails, load_header};
use crate::pmem::PmemRead;
use crate::recovery::OpenError;
use crate::recovery::tails::{check_copies, check_update, is_in_range, tails_out_of_range};

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
    if let Err(error) = check_update(&superblock) {
        note_refusal(findings, "superblock", &error, None)?;
    }
    let mut tails = match Tails::load(pmem, &Checksums::new(superblock.uuid)) {
        Ok((tails, copies)) => {
            note_copies(findings, "tails", &copies, None)?;
            if let Err(error) = check_copies("tails", &copies) {
                note_refusal(findings, "tails", &error, None)?;
            }
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
    // Nobody compares these, or asks where they end (INV-OPEN-3).
    let unusable = tails.witness.iter_mut();
    unusable
        .filter(|entry| !is_in_range(&superblock, entry))
        .for_each(|entry| entry.len_blocks = 0);
    Ok(Header { superblock, tails })
}
