//! How values are distributed: powers of two, always on. A value costs two plain additions.

use super::Counter;
use crate::units::{NS_PER_US, Now};
use serde::Serialize;

/// The last one has no upper end: of microseconds, above four seconds.
pub(crate) const BUCKET_COUNT: usize = 24;

/// Values that were met, by size. One writer, as a [`Counter`] has.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    sum: Counter,
    buckets: [Counter; BUCKET_COUNT],
}

impl Histogram {
    #[inline]
    pub(crate) fn note(&self, value: u64) {
        self.sum.add(value);
        // 64 at the most.
        let bits = (u64::BITS - value.leading_zeros()) as usize;
        self.buckets[bits.min(BUCKET_COUNT - 1)].add(1);
    }

    /// Notes how long something took, in microseconds.
    #[inline]
    pub(crate) fn note_length(&self, since: Now, now: Now) {
        self.note(now.since_ns(since) / NS_PER_US);
    }
}

/// The values that one or several histograms have met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Distribution {
    /// All values, added up: with their number, the mean.
    pub sum: u64,
    /// How many values were below 2 to the power of the bucket's number, and in no bucket before. The last has the
    /// rest.
    pub buckets: [u64; BUCKET_COUNT],
}

impl Distribution {
    /// How many values there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    pub(super) fn add(&mut self, histogram: &Histogram) {
        self.sum = self.sum.wrapping_add(histogram.sum.get());
        for (bucket, more) in self.buckets.iter_mut().zip(&histogram.buckets) {
            *bucket = bucket.wrapping_add(more.get());
        }
    }

    pub(super) fn since(&self, earlier: &Distribution) -> Distribution {
        let bucket = |at: usize| self.buckets[at].wrapping_sub(earlier.buckets[at]);
        Distribution {
            sum: self.sum.wrapping_sub(earlier.sum),
            buckets: std::array::from_fn(bucket),
        }
    }
}

macro_rules! histograms {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// The histograms of one channel, or of the background.
        #[derive(Debug, Default)]
        pub(crate) struct Histograms {
            $($(#[doc = $doc])+ pub(crate) $name: Histogram,)+
        }

        /// Sizes and lengths since the creation of a cache or the last reset.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct Distributions {
            $($(#[doc = $doc])+ pub $name: Distribution,)+
        }

        impl Distributions {
            pub(super) fn add(&mut self, histograms: &Histograms) {
                $(self.$name.add(&histograms.$name);)+
            }

            pub(super) fn since(&self, earlier: &Distributions) -> Distributions {
                Distributions { $($name: self.$name.since(&earlier.$name),)+ }
            }
        }
    };
}

histograms! {
    /// Writes, unmaps, write-zeroes and read fills of a batch.
    batch_requests,
    /// From when a base read for a miss is asked for until its channel has seen the end of it, in microseconds.
    base_read_us,
    /// From when a write that waits for the base is in the log until its channel completes it, in microseconds.
    held_write_us,
    /// From when a batch of write-back begins to be gathered until it is sorted, in microseconds.
    gather_us,
    /// From when such a batch is ready for the base until the base has ended all writes of it, in microseconds.
    base_write_us,
    /// Of a flush behind such a batch, in microseconds.
    base_flush_us,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_by_their_power_of_two_and_added_up() {
        let histogram = Histogram::default();
        for value in [0, 1, 2, 3, 4, 1023, 1024, u64::MAX >> 1] {
            histogram.note(value);
        }
        let mut seen = Distribution::default();
        seen.add(&histogram);
        let mut expected = [0; BUCKET_COUNT];
        for (bucket, count) in [(0, 1), (1, 1), (2, 2), (3, 1), (10, 1), (11, 1), (23, 1)] {
            expected[bucket] = count;
        }
        assert_eq!(seen.buckets, expected);
        assert_eq!(seen.count(), 8);
        assert_eq!(seen.sum, 1 + 2 + 3 + 4 + 1023 + 1024 + (u64::MAX >> 1));
        assert_eq!(seen.since(&seen), Distribution::default());
    }
}
