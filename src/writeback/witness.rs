//! The witness: checksums of a few blocks that were just written to the base and flushed. They tell at the
//! next start whether it is still the same base, in the same state.

use super::batch::BaseOp;
use crate::engine::Cache;
use crate::media::{KeyKind, Tails, WITNESS_COUNT, Witness, WitnessPages};
use crate::pmem::Pmem;
use crate::units::{Lba, PAGE_SIZE_BYTES};

/// How many entries a batch renews beyond those that it overwrites.
const RENEWED_PER_BATCH: usize = 2;

const UNUSED: Witness = Witness {
    lba: Lba(0),
    len_blocks: 0,
    crc: 0,
};

/// What a batch does to the witness; it counts when the batch is finished.
#[derive(Clone, Copy, Debug)]
pub(super) struct WitnessUpdate {
    /// Entries whose blocks the batch overwrites.
    overwritten: [bool; WITNESS_COUNT],
    /// Blocks that the batch writes, spread over it.
    samples: [Witness; WITNESS_COUNT],
    write_count: u64,
    /// Of entries and samples. `None`: the batch has started nothing yet.
    pages: Option<WitnessPages>,
}

impl Default for WitnessUpdate {
    fn default() -> Self {
        Self {
            overwritten: [false; WITNESS_COUNT],
            samples: [UNUSED; WITNESS_COUNT],
            write_count: 0,
            pages: None,
        }
    }
}

impl WitnessUpdate {
    /// An operation of the batch is started for the first time. The tails have the same entries for all of a batch.
    pub(super) fn note<P: Pmem>(&mut self, op: &BaseOp, cache: &Cache<P>, tails: &Tails) {
        let geometry = &cache.geometry;
        let pages = self
            .pages
            .get_or_insert_with(|| WitnessPages::new(geometry, &tails.witness));
        if pages.may_hold(geometry, op.lba, op.len_blocks) {
            self.look_for_overlaps(op, tails);
        }
        if op.kind != KeyKind::Data {
            return;
        }
        // The first ones, then those whose number is a power of two: spread over a batch of any length, and
        // rare enough to cost nothing.
        let number = self.write_count;
        self.write_count += 1;
        let count = WITNESS_COUNT as u64;
        let at = if number < count {
            number
        } else if number.is_power_of_two() {
            u64::from(number.trailing_zeros()) % count
        } else {
            return;
        };
        if let Some(sample) = take(op, cache) {
            self.samples[at as usize] = sample;
            if let Some(pages) = &mut self.pages {
                pages.add(geometry, &sample);
            }
        }
    }

    #[inline(never)]
    fn look_for_overlaps(&mut self, op: &BaseOp, tails: &Tails) {
        for (overwritten, entry) in self.overwritten.iter_mut().zip(&tails.witness) {
            *overwritten |= overlaps(op, entry);
        }
        // A batch that catches up with itself writes blocks once more.
        for sample in &mut self.samples {
            if overlaps(op, sample) {
                *sample = UNUSED;
            }
        }
    }

    /// The batch is on the base, flushed: drops the entries that it has overwritten, and takes new ones. They
    /// are persisted with the tail that makes the batch clean (INV-WIT-1).
    pub(super) fn apply(&self, tails: &mut Tails) {
        for (entry, overwritten) in tails.witness.iter_mut().zip(self.overwritten) {
            if overwritten {
                *entry = UNUSED;
            }
        }
        let empty = tails.witness.iter().filter(|e| e.len_blocks == 0).count();
        let samples = self.samples.iter().filter(|sample| sample.len_blocks > 0);
        for (number, sample) in samples.take(empty.max(RENEWED_PER_BATCH)).enumerate() {
            let unused = tails.witness.iter().position(|e| e.len_blocks == 0);
            let turn = (tails.update as usize).wrapping_add(number) % WITNESS_COUNT;
            tails.witness[unused.unwrap_or(turn)] = *sample;
        }
    }
}

fn overlaps(op: &BaseOp, entry: &Witness) -> bool {
    op.lba.0 < entry.lba.0 + u64::from(entry.len_blocks) && entry.lba.0 < op.lba.0 + op.len_blocks
}

/// The witness of the first page of a write; `None` if its memory cannot be read.
fn take<P: Pmem>(op: &BaseOp, cache: &Cache<P>) -> Option<Witness> {
    let geometry = &cache.geometry;
    let len_blocks = op.len_blocks.min(u64::from(geometry.blocks_per_page())) as u32;
    let mut page = [0; PAGE_SIZE_BYTES as usize];
    let wanted = geometry.bytes(u64::from(len_blocks)) as usize;
    let mut filled = 0;
    for &(off, extent_bytes) in &op.extents {
        let len = (extent_bytes as usize).min(wanted - filled);
        cache.pmem.read(off, &mut page[filled..filled + len]).ok()?;
        filled += len;
        if filled == wanted {
            break;
        }
    }
    Some(Witness {
        lba: op.lba,
        len_blocks,
        crc: crc32c::crc32c(&page[..wanted]),
    })
}
