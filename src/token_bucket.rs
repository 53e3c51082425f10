//! Keeps background work below a rate: a bucket of bytes that fills evenly.

use crate::units::{NS_PER_S, Now};

/// See the module. Empty at first.
#[derive(Debug, Default)]
pub(crate) struct TokenBucket {
    bytes: u64,
    /// What was taken beyond that, and has to come first.
    owed_bytes: u64,
    /// What is left of a byte, in parts of a second.
    rest_ns_bytes: u64,
    filled_at: Option<Now>,
}

impl TokenBucket {
    /// Lets in what has come since the last call, at a rate in MiB a second, up to `room_bytes`. Returns how much is in
    /// it. A pause counts for a second at the most.
    pub(crate) fn fill(&mut self, rate_mib_s: u32, room_bytes: u64, now: Now) -> u64 {
        let since = self.filled_at.replace(now).unwrap_or(now);
        let passed_ns = now.since_ns(since).min(NS_PER_S);
        let rate = u128::from(rate_mib_s) << 20;
        let come = rate * u128::from(passed_ns) + u128::from(self.rest_ns_bytes);
        // Less than 2^52 bytes in a second, and less than a second.
        self.rest_ns_bytes = (come % u128::from(NS_PER_S)) as u64;
        let come = (come / u128::from(NS_PER_S)) as u64;
        if rate_mib_s == 0 {
            self.owed_bytes = 0;
        }
        let paid = come.min(self.owed_bytes);
        self.owed_bytes -= paid;
        self.bytes = (self.bytes + come - paid).min(room_bytes);
        self.bytes
    }

    /// Takes out what was used; that may be more than there was, which is missing later.
    pub(crate) fn take(&mut self, bytes: u64) {
        self.owed_bytes += bytes.saturating_sub(self.bytes);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_however_often_it_is_asked_for() {
        for step_ns in [7, 1000, 333_333, NS_PER_S / 3] {
            let mut bucket = TokenBucket::default();
            assert_eq!(bucket.fill(3, 1 << 20, Now(50)), 0, "empty at first");
            let (mut taken, mut now) = (0, 50);
            while now < 50 + NS_PER_S / 100 {
                now += step_ns;
                let bytes = bucket.fill(3, u64::MAX, Now(now));
                bucket.take(bytes);
                taken += bytes;
            }
            let passed_ns = u128::from(now - 50);
            assert_eq!(
                u128::from(taken),
                (3 << 20) * passed_ns / u128::from(NS_PER_S)
            );
        }
    }

    #[test]
    fn it_holds_no_more_than_its_room_and_a_pause_is_a_second() {
        let mut bucket = TokenBucket::default();
        bucket.fill(1, u64::MAX, Now(0));
        assert_eq!(bucket.fill(1, u64::MAX, Now(100 * NS_PER_S)), 1 << 20);
        assert_eq!(bucket.fill(1, 4096, Now(101 * NS_PER_S)), 4096);
        bucket.take(5000);
        assert_eq!(bucket.fill(1, 4096, Now(101 * NS_PER_S)), 0);
        assert_eq!(bucket.fill(0, 4096, Now(102 * NS_PER_S)), 0, "no rate");
    }

    #[test]
    fn what_was_taken_beyond_it_comes_first() {
        let mut bucket = TokenBucket::default();
        bucket.fill(1, u64::MAX, Now(0));
        assert_eq!(bucket.fill(1, u64::MAX, Now(NS_PER_S)), 1 << 20);
        bucket.take(4 << 20);
        let at = |bucket: &mut TokenBucket, seconds: u64| {
            bucket.fill(1, u64::MAX, Now(seconds * NS_PER_S))
        };
        assert_eq!([2, 3, 4].map(|seconds| at(&mut bucket, seconds)), [0; 3]);
        assert_eq!(at(&mut bucket, 5), 1 << 20);
        // Without a rate nothing is owed.
        bucket.take(9 << 20);
        bucket.fill(0, u64::MAX, Now(6 * NS_PER_S));
        assert_eq!(at(&mut bucket, 7), 1 << 20);
    }
}
