//! What a base read brings that is to be kept goes through memory of the channel's own, a pad ([`Pads`]), and is copied
//! on from there: into the cache, to the reader, and to others who have joined the read.
//!
//! It is not taken from the reader's memory, which may hold something else by then (INV-READ-8): a guest may change its
//! memory while the base fills it; two blocks may be read into one place, by two requests or by one whose list names it
//! twice, as a host does that reads around pages it has; and a hit may be copied there before the fill is stored. To
//! a disk all that is the reader's own affair. In a cache it would become what everybody reads.
//!
//! What is not kept goes straight to its reader, and nobody joins it.

use super::misses::{Miss, Misses};
use super::rounding::Rest;
use crate::canary::{self, Canary};
use crate::media::Geometry;
use crate::pmem::{IovCursor, PadId, Pads};
use crate::units::Lba;

/// Memory for the pads of a channel: for 512 reads of 4 KiB, or 16 of 128 KiB, that are under way at once. What
/// finds none is not kept.
pub const PADS_SIZE_BYTES: usize = 2 << 20;

/// Of a miss that has a pad, what its reader has asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Staged {
    pad: PadId,
    pub(super) lba: Lba,
    pub(super) len_blocks: u64,
    /// Where in the reader's memory it goes.
    reader: IovCursor,
}

impl Misses {
    /// A pad for the pages of a miss that is to be kept. Where there is none it is not.
    pub(super) fn take_pad(&mut self, geometry: &Geometry, miss: &mut Miss) -> Option<PadId> {
        let page_count = geometry.pages_touched(miss.lba, miss.len_blocks);
        let pads = self.pads.as_mut().filter(|_| miss.admitted);
        let pad = pads.and_then(|pads| pads.take(page_count as usize));
        miss.admitted = pad.is_some();
        pad
    }

    /// Lets a miss, and the rest of its pages that is to come along, go through its pad.
    pub(super) fn stage(
        &mut self,
        geometry: &Geometry,
        miss: &mut Miss,
        pad: Option<PadId>,
        rest: Rest,
    ) {
        let (Some(pads), Some(pad)) = (&self.pads, pad) else {
            return;
        };
        miss.staged = Some(Staged {
            pad,
            lba: miss.lba,
            len_blocks: miss.len_blocks,
            reader: miss.cursor,
        });
        let (start, end) = rest.added_to(miss);
        if rest == Rest::default() && canary::is(Canary::FilledFromReader) {
            return;
        }
        miss.move_to(geometry, pads, pad, (Lba(start), end - start));
        if canary::is(Canary::PadFreedInUse) {
            self.put_back(Some(pad));
        }
    }

    /// Leaves the rest out again, of a base read that has ended. `false`: there is none.
    pub(super) fn leave_rest(&mut self, geometry: &Geometry, op: u32) -> bool {
        let (Some(miss), Some(pads)) = (self.table.get_mut(op), &self.pads) else {
            return false;
        };
        let Some(staged) = miss.staged else {
            return false;
        };
        let has_rest = (miss.lba, miss.len_blocks) != (staged.lba, staged.len_blocks);
        if has_rest {
            let blocks = (staged.lba, staged.len_blocks);
            miss.move_to(geometry, pads, staged.pad, blocks);
        }
        has_rest
    }

    /// The end of a miss whose base read has ended: its reader gets what that has brought.
    pub(super) fn remove(&mut self, geometry: &Geometry, op: u32) -> Option<Miss> {
        let miss = self.table.remove(op)?;
        if let Some(staged) = miss.staged {
            if miss.result == Some(Ok(())) {
                let bytes = |blocks| geometry.bytes(blocks) as usize;
                let (mut from, mut reader) = (miss.cursor, staged.reader);
                from.advance(bytes(staged.lba.0 - miss.lba.0));
                reader.copy_from(&mut from, bytes(staged.len_blocks));
            }
            if !canary::is(Canary::PadFreedInUse) {
                self.put_back(Some(staged.pad));
            }
        }
        Some(miss)
    }

    /// A pad that no base read uses (INV-READ-4).
    pub(super) fn put_back(&mut self, pad: Option<PadId>) {
        if let (Some(pads), Some(pad)) = (&mut self.pads, pad) {
            pads.put_back(pad);
        }
    }
}

impl Miss {
    /// So many blocks of the pages that the pad is for, where they lie in it.
    fn move_to(&mut self, geometry: &Geometry, pads: &Pads, pad: PadId, blocks: (Lba, u64)) {
        (self.lba, self.len_blocks) = blocks;
        let skipped = self.lba.0 - geometry.page_start(geometry.page_of(self.lba)).0;
        let bytes = |blocks| geometry.bytes(blocks) as usize;
        self.cursor = pads.cursor(pad, bytes(skipped), bytes(self.len_blocks));
    }
}
