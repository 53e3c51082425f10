//! Going through all entries: to count what lies in each segment, or for a segment whose keys cannot tell what lies in
//! it.

use super::{Claim, Index};
use crate::index::bucket::{BUCKET_WORDS, SlotKind};
use crate::index::map::BlockMap;
use crate::media::Place;
use crate::sched;
use std::sync::atomic::Ordering;

impl Index {
    /// Calls `found` with what lies somewhere, by the entries of a bucket: where, and how many blocks. Zeroes lie
    /// nowhere. Whatever changes meanwhile is found as it was, as it will be, or not at all; of a split page parts may
    /// be another's.
    pub(crate) fn count_bucket(&self, bucket: usize, mut found: impl FnMut(Place, u32)) {
        for slot in 1..BUCKET_WORDS {
            let value = self.buckets.line(bucket)[slot].load(Ordering::Acquire);
            match self.layout.kind(value) {
                SlotKind::Mapped => found(Place(self.layout.payload(value)), self.blocks_per_page),
                SlotKind::MappedRun => {
                    let run = self.layout.run(value);
                    found(run.place(), run.len_blocks);
                }
                SlotKind::Split => {
                    for map in self.side().read(self.layout.line(value)) {
                        if let BlockMap::Mapped(place) = map {
                            found(place, 1);
                        }
                    }
                }
                SlotKind::Empty | SlotKind::Reserved | SlotKind::Zero | SlotKind::ZeroRun => {}
            }
        }
    }

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
            let may_be_dead = match self.layout.kind(value) {
                SlotKind::Empty | SlotKind::Reserved => false,
                SlotKind::Mapped | SlotKind::Zero => dead(Place(self.layout.payload(value))),
                SlotKind::MappedRun | SlotKind::ZeroRun => dead(self.layout.run(value).place()),
                SlotKind::Split => true,
            };
            if !may_be_dead {
                continue;
            }
            let home = self.home_of(bucket, self.layout.distance(value));
            if self.claim_bucket(home, owner) != Claim::Taken {
                return false;
            }
            // What has changed meanwhile is newer, and lies elsewhere.
            if self.buckets.line(bucket)[slot].load(Ordering::Acquire) == value {
                self.evict_slot(bucket, slot, value, &dead);
            }
            self.release(home, owner);
        }
        true
    }
}
