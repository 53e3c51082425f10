//! What a write of a part of a page will touch, asked for in time.

use super::Index;
use crate::index::bucket::BUCKET_SLOTS;
use crate::index::table::SlotRef;
use crate::pmem::prefetch_line;
use std::sync::atomic::{AtomicU64, Ordering};

impl Index {
    /// Asks for the line of the side table that a page has, or will be given, to be brought into the cache. Returns
    /// bucket and number of the slot, as far as its home bucket tells; that bucket should be in the cache already.
    #[inline]
    pub(in crate::index) fn prefetch_parts(&self, at: SlotRef) -> Option<(usize, usize)> {
        let lines = self.splits.as_ref()?;
        let words = self.buckets.line(at.bucket);
        let key = self.layout.key(0, at.tag);
        // Nothing is removed while an index is filled: behind the first slot that is free there is none.
        let is_it = |word: &AtomicU64| {
            let value = word.load(Ordering::Relaxed);
            value == 0 || self.layout.is(value, key)
        };
        let number = 1 + words[1..].iter().position(is_it)?;
        prefetch_line(&lines.line(at.bucket * BUCKET_SLOTS + number - 1)[0]);
        Some((at.bucket, number))
    }
}
