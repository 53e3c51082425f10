//! What a write of a part of a page will touch, asked for in time.

use super::Index;
use crate::index::bucket::{SlotKind, SlotLayout};
use crate::index::table::SlotRef;
use std::sync::atomic::Ordering;

impl Index {
    /// Asks for the line of the side table that a page has to be brought into the cache. Returns bucket and number
    /// of the slot that it has, or will be given, as far as its home bucket tells; that bucket should be in the
    /// cache already.
    #[inline]
    pub(in crate::index) fn prefetch_parts(&self, at: SlotRef) -> Option<(usize, usize)> {
        let side = self.side.as_ref()?;
        let key = self.layout.key(0, at.tag);
        let words = self.buckets.line(at.bucket);
        if let Some(slot) = self.layout.slot_of(words, key) {
            let value = words[slot].load(Ordering::Relaxed);
            if self.layout.kind(value) == SlotKind::Split {
                side.prefetch(self.layout.line(value));
            }
            return Some((at.bucket, slot));
        }
        Some((at.bucket, SlotLayout::free_slot(words)?))
    }
}
