//! Whether what the header area says can be true, and be updated.

use super::error::OpenError;
use crate::media::{COUNTER_MAX, Copies, Superblock, Tails};

/// Whether a record can be updated (INV-PAIR-3).
pub(crate) fn check_copies(record: &'static str, copies: &Copies) -> Result<(), OpenError> {
    match copies.unreadable() {
        Some(off) => Err(OpenError::CopyUnreadable { record, off }),
        None => Ok(()),
    }
}

/// What of the tails cannot be (INV-TAIL-1, INV-OPEN-3).
pub(crate) fn tails_out_of_range(
    superblock: &Superblock,
    tails: &Tails,
) -> impl Iterator<Item = OpenError> {
    let (tails, per_page) = (*tails, superblock.geometry.blocks_per_page());
    let block_count = superblock.base.block_count;
    let numbers = [
        ("dirty_tail", tails.dirty_tail.0, COUNTER_MAX - 1),
        ("batch_end", tails.batch_end.0, COUNTER_MAX - 1),
        ("seq_next_min", tails.seq_next_min.0, COUNTER_MAX - 1),
        ("epoch_min", tails.epoch_min, COUNTER_MAX - 1),
        ("key_tail", tails.key_tail.0, tails.dirty_tail.0),
    ];
    let numbers = numbers.into_iter().filter(|&(_, value, max)| value > max);
    // The witness names blocks of the base, a page at most for each entry.
    let witness = tails.witness.into_iter().filter(move |entry| {
        let end = entry.lba.0.checked_add(u64::from(entry.len_blocks));
        entry.len_blocks > per_page || end.is_none_or(|end| end > block_count)
    });
    numbers
        .map(|(field, value, _)| (field, value))
        .chain(witness.map(|entry| ("witness", entry.lba.0)))
        .map(|(field, value)| OpenError::TailsRange { field, value })
}
