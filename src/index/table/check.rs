//! Checks of the whole table, for tests.

use super::{BlockMap, Index};
use crate::index::bucket::{BUCKET_WORDS, Meta, SlotKind};
use crate::media::Place;
use std::sync::atomic::Ordering;

impl Index {
    /// Checks what holds while no batch and no reclaiming is at work.
    ///
    /// # Panics
    /// It does not.
    pub(crate) fn check_at_rest(&self) {
        let count = self.bucket_count as usize;
        let mut passed = vec![0; count];
        for bucket in 0..count {
            for word in &self.buckets.line(bucket)[1..] {
                let value = word.load(Ordering::Acquire);
                let kind = self.layout.kind(value);
                assert!(
                    kind != SlotKind::Reserved,
                    "INV-INDEX-5: a slot of bucket {bucket} is left reserved"
                );
                if kind != SlotKind::Empty {
                    let distance = self.layout.distance(value);
                    let home = self.home_of(bucket, distance);
                    (0..distance).for_each(|step| passed[self.bucket_at(home, step)] += 1);
                }
            }
        }
        self.check_lines();
        for (bucket, passed) in passed.into_iter().enumerate() {
            let meta = Meta(self.meta(bucket).load(Ordering::Acquire));
            assert_eq!(
                meta.owner(),
                0,
                "INV-INDEX-5: bucket {bucket} is left claimed"
            );
            assert_eq!(
                meta.passed(),
                passed,
                "INV-INDEX-6: entries that pass bucket {bucket} by"
            );
        }
    }

    /// Each line that was ever used is one page's, or was given back.
    fn check_lines(&self) {
        let Some(side) = &self.side else { return };
        let mut users = vec![0u32; usize::try_from(side.used_count()).unwrap_or(usize::MAX)];
        for bucket in 0..self.bucket_count as usize {
            for word in &self.buckets.line(bucket)[1..] {
                let value = word.load(Ordering::Acquire);
                if self.layout.kind(value) == SlotKind::Split {
                    users[self.layout.line(value) as usize] += 1;
                }
            }
        }
        side.returned_lines()
            .for_each(|line| users[line as usize] += 1);
        for (line, users) in users.into_iter().enumerate() {
            assert_eq!(
                users, 1,
                "INV-INDEX-8: line {line} is one page's, or nobody's"
            );
        }
    }

    /// Calls `f` for every place that the index names, once for each slot or block. For checks; not while
    /// others write.
    pub(crate) fn for_each_place(&self, mut f: impl FnMut(Place)) {
        for bucket in 0..self.bucket_count as usize {
            for slot in 1..BUCKET_WORDS {
                let value = self.buckets.line(bucket)[slot].load(Ordering::Acquire);
                match self.layout.kind(value) {
                    SlotKind::Mapped | SlotKind::Zero => f(Place(self.layout.payload(value))),
                    SlotKind::MappedRun | SlotKind::ZeroRun => f(self.layout.run(value).place()),
                    SlotKind::Split => {
                        for block in self.side().read(self.layout.line(value)) {
                            if let BlockMap::Mapped(place) | BlockMap::Zero(place) = block {
                                f(place);
                            }
                        }
                    }
                    SlotKind::Empty | SlotKind::Reserved => {}
                }
            }
        }
    }
}
