//! Whether what the header area says can be true, and be updated.

use super::error::OpenError;
use super::walk::check_counter;
use crate::media::{COUNTER_START_MAX, Copies, Superblock, Tails, Witness};

/// Whether the superblock can be updated often enough (INV-OPEN-9).
pub(crate) fn check_update(superblock: &Superblock) -> Result<(), OpenError> {
    check_counter(superblock.update, || {
        "the update number of the superblock".to_owned()
    })
}

/// Whether a record can be updated (INV-PAIR-3).
pub(crate) fn check_copies(record: &'static str, copies: &Copies) -> Result<(), OpenError> {
    match copies.unreadable() {
        Some(off) => Err(OpenError::CopyUnreadable { record, off }),
        None => Ok(()),
    }
}

/// What of the tails cannot be (INV-TAIL-1, INV-OPEN-3, INV-OPEN-9).
pub(crate) fn tails_out_of_range(
    superblock: &Superblock,
    tails: &Tails,
) -> impl Iterator<Item = OpenError> {
    let tails = *tails;
    let numbers = [
        ("update", tails.update, COUNTER_START_MAX),
        ("dirty_tail", tails.dirty_tail.0, COUNTER_START_MAX),
        ("seq_next_min", tails.seq_next_min.0, COUNTER_START_MAX),
        ("epoch_min", tails.epoch_min, COUNTER_START_MAX),
        ("key_tail", tails.key_tail.0, tails.dirty_tail.0),
        // It was in the log when it was noted. Write-back would wait for a number that never comes.
        (
            "batch_end",
            tails.batch_end.0,
            tails.seq_next_min.0.saturating_sub(1),
        ),
    ];
    let numbers = numbers.into_iter().filter(|&(_, value, max)| value > max);
    // The witness names blocks of the base, a page at most for each entry.
    let witness = tails.witness.into_iter();
    let witness = witness.filter(|entry| !is_in_range(superblock, entry));
    numbers
        .map(|(field, value, _)| (field, value))
        .chain(witness.map(|entry| ("witness", entry.lba.0)))
        .map(|(field, value)| OpenError::TailsRange { field, value })
}

/// Whether an entry of the witness can be.
pub(crate) fn is_in_range(superblock: &Superblock, entry: &Witness) -> bool {
    let end = entry.lba.0.checked_add(u64::from(entry.len_blocks));
    entry.len_blocks <= superblock.geometry.blocks_per_page()
        && end.is_some_and(|end| end <= superblock.base.block_count)
}
