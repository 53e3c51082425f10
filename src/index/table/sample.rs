//! What lies where, bucket by bucket or by a sample of the table: to count all of a large one takes seconds.

use super::sizes::LOAD_PERCENT;
use super::{BlockMap, Index, Meta};
use crate::index::bucket::{BUCKET_SLOTS, BUCKET_WORDS, SlotKind};
use crate::media::Place;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Odd, for places that follow no pattern that pages could follow too.
const SCATTER: usize = 0x9e37_79b9;

/// How much of the table was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    pub(crate) buckets: u64,
    pub(crate) buckets_all: u64,
}

impl Sample {
    /// From what was found in the sample, what there is in all: exact if all was looked at.
    pub(crate) fn scale(&self, found: u64) -> u64 {
        let all = u128::from(found) * u128::from(self.buckets_all);
        u64::try_from(all / u128::from(self.buckets.max(1))).unwrap_or(u64::MAX)
    }
}

impl Index {
    /// Calls `found` with place and number of the blocks that lie on the device, from so many buckets at the most,
    /// spread evenly: pages are spread over buckets by a hash, so those tell of the rest. A page that changes
    /// meanwhile may be left out.
    pub(crate) fn sample(&self, buckets_max: usize, mut found: impl FnMut(Place, u64)) -> Sample {
        let all = self.bucket_count();
        let count = all.min(buckets_max);
        for number in 0..count {
            self.look_at_bucket(self.sampled_bucket(number, count), &mut found);
        }
        Sample {
            buckets: count as u64,
            buckets_all: all as u64,
        }
    }

    /// The bucket of this number of `count`, which are spread over all.
    fn sampled_bucket(&self, number: usize, count: usize) -> usize {
        let all = self.bucket_count();
        // One of so many next to each other.
        let width = (all / count.max(1)).max(1);
        let start = (number as u128 * all as u128 / count.max(1) as u128) as usize;
        start + number.wrapping_mul(SCATTER) % width
    }

    /// Asks for buckets of such a sample to be brought into the cache.
    pub(crate) fn prefetch_sampled(&self, numbers: Range<usize>, count: usize) {
        for number in numbers {
            self.prefetch_bucket(self.sampled_bucket(number, count));
        }
    }

    /// For each of some questions, how many entries name a place for which `asked` says yes, in bucket `number` of such a
    /// sample. Of a page that is split, zeroes do not count.
    pub(crate) fn sampled_slots<const QUESTIONS: usize>(
        &self,
        number: usize,
        count: usize,
        asked: impl Fn(Place) -> [bool; QUESTIONS],
    ) -> [u64; QUESTIONS] {
        let bucket = self.sampled_bucket(number, count);
        let mut counts = [0; QUESTIONS];
        for slot in 1..BUCKET_WORDS {
            let value = self.buckets.line(bucket)[slot].load(Ordering::Acquire);
            let mut answers = [false; QUESTIONS];
            if let Some(place) = self.layout.place(value) {
                answers = asked(place);
            } else {
                self.look_at_slot(bucket, slot, &mut |place, _| {
                    for (answer, more) in answers.iter_mut().zip(asked(place)) {
                        *answer |= more;
                    }
                });
            }
            for (count, answer) in counts.iter_mut().zip(answers) {
                *count += u64::from(answer);
            }
        }
        counts
    }

    /// How many pages it is made for: with more, pages may find no slot.
    pub(crate) fn page_room(&self) -> u64 {
        self.bucket_count * BUCKET_SLOTS as u64 * LOAD_PERCENT / 100
    }

    /// Calls `found` with place and number of the blocks that lie on the device, by the entries of a bucket. A page
    /// that changes meanwhile may be left out.
    pub(crate) fn look_at_bucket(&self, bucket: usize, found: &mut impl FnMut(Place, u64)) {
        for slot in 1..BUCKET_WORDS {
            self.look_at_slot(bucket, slot, found);
        }
    }

    fn look_at_slot(&self, bucket: usize, slot: usize, found: &mut impl FnMut(Place, u64)) {
        let word = &self.buckets.line(bucket)[slot];
        let value = word.load(Ordering::Acquire);
        match self.layout.kind(value) {
            SlotKind::Empty | SlotKind::Reserved | SlotKind::Zero | SlotKind::ZeroRun => {}
            SlotKind::Mapped => found(
                Place(self.layout.payload(value)),
                u64::from(self.blocks_per_page),
            ),
            SlotKind::MappedRun => {
                let run = self.layout.run(value);
                found(run.place(), u64::from(run.len_blocks));
            }
            SlotKind::Split => {
                let home = self.meta(self.home_of(bucket, self.layout.distance(value)));
                let version = || Meta(home.load(Ordering::Acquire)).version();
                let before = version();
                if word.load(Ordering::Acquire) != value {
                    return;
                }
                let blocks = self.side().read(self.layout.line(value));
                // The line is another page's unless nothing has happened (INV-INDEX-9): what it says may be no place.
                if word.load(Ordering::Acquire) == value && version() == before {
                    for map in blocks {
                        if let BlockMap::Mapped(place) = map {
                            found(place, 1);
                        }
                    }
                }
            }
        }
    }
}
