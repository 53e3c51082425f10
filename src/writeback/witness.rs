//! The witness: checksums of a few blocks that were just written to the base and flushed. They tell at the
//! next start whether it is still the same base, in the same state.

use super::{BaseOp, Batch};
use crate::media::{Geometry, KeyKind, Tails, WITNESS_COUNT, Witness};
use crate::units::{Lba, PAGE_SIZE_BYTES};

/// How many entries a batch renews beyond those that it overwrites.
const RENEWED_PER_BATCH: usize = 2;

/// Drops the entries that the batch has overwritten, and takes new ones from it.
pub(super) fn update(tails: &mut Tails, batch: &Batch, geometry: &Geometry) {
    for entry in &mut tails.witness {
        if batch.ops.iter().any(|op| overlaps(op, entry)) {
            *entry = Witness {
                lba: Lba(0),
                len_blocks: 0,
                crc: 0,
            };
        }
    }
    let writes = batch.ops.iter().filter(|op| op.kind == KeyKind::Data);
    let write_count = writes.clone().count();
    if write_count == 0 {
        return;
    }
    let empty = tails
        .witness
        .iter()
        .filter(|entry| entry.len_blocks == 0)
        .count();
    let wanted = empty.max(RENEWED_PER_BATCH).min(write_count);
    let step = write_count / wanted;
    for (number, op) in writes.step_by(step).take(wanted).enumerate() {
        let at = tails
            .witness
            .iter()
            .position(|entry| entry.len_blocks == 0)
            .unwrap_or((tails.update as usize).wrapping_add(number) % WITNESS_COUNT);
        tails.witness[at] = take(op, batch, geometry);
    }
}

fn overlaps(op: &BaseOp, entry: &Witness) -> bool {
    op.lba.0 < entry.lba.0 + u64::from(entry.len_blocks) && entry.lba.0 < op.lba.0 + op.len_blocks
}

/// The witness of the first page of a write.
fn take(op: &BaseOp, batch: &Batch, geometry: &Geometry) -> Witness {
    let len_blocks = op.len_blocks.min(u64::from(geometry.blocks_per_page())) as u32;
    let mut page = [0; PAGE_SIZE_BYTES as usize];
    let wanted = geometry.bytes(u64::from(len_blocks)) as usize;
    let mut filled = 0;
    for slice in &batch.slices[op.first_slice..op.first_slice + op.slice_count] {
        let len = slice.len_bytes().min(wanted - filled);
        slice.part(0, len).copy_to(&mut page[filled..filled + len]);
        filled += len;
        if filled == wanted {
            break;
        }
    }
    Witness {
        lba: op.lba,
        len_blocks,
        crc: crc32c::crc32c(&page[..wanted]),
    }
}
