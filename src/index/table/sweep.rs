//! Going through all entries, for a segment whose keys cannot tell what lies in it.

use super::Index;
use crate::index::bucket::{BUCKET_WORDS, SlotKind};
use crate::media::Place;
use crate::sched;
use std::sync::atomic::Ordering;

impl Index {
    /// Forgets what lies where `dead` says among the entries of a bucket. `false`: somebody is at one of them; again
    /// later.
    pub(crate) fn sweep_bucket(
        &self,
        bucket: usize,
        owner: u16,
        dead: impl Fn(Place) -> bool,
    ) -> bool {
        for slot in 1..BUCKET_WORDS {
            sched::point();
            let value = self.buckets.line(bucket)[slot].load(Ordering::Acquire);
            if !self.may_name(value, &dead) {
                continue;
            }
            if !self.evict_entry(bucket, slot, value, owner, &dead) {
                return false;
            }
        }
        true
    }

    /// Whether a slot names a place that is `wanted`; of a split page, whose line is not looked at, it may. `wanted` says the
    /// same of all places of a segment.
    pub(super) fn may_name(&self, value: u64, wanted: &impl Fn(Place) -> bool) -> bool {
        self.layout.kind(value) == SlotKind::Split || self.layout.place(value).is_some_and(wanted)
    }
}
