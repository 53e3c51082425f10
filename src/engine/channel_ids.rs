//! The numbers of channels. The lowest that is free is given out: a channel that comes when another has gone appends to the
//! segment that the other has left open, and not to one more.

use super::cache::CHANNEL_COUNT_MAX;
use std::sync::atomic::{AtomicU64, Ordering};

/// A bit for each number that is given out.
#[derive(Debug, Default)]
pub(super) struct ChannelIds([AtomicU64; WORDS]);

const WORDS: usize = CHANNEL_COUNT_MAX as usize / u64::BITS as usize;
const _: () = assert!(WORDS * u64::BITS as usize == CHANNEL_COUNT_MAX as usize);

impl ChannelIds {
    /// `None`: all are given out.
    pub(super) fn take(&self) -> Option<u16> {
        (0..CHANNEL_COUNT_MAX).find(|id| {
            let (word, bit) = self.place(*id);
            // Whoever had it before has left behind all that he did.
            word.load(Ordering::Relaxed) & bit == 0
                && word.fetch_or(bit, Ordering::Acquire) & bit == 0
        })
    }

    pub(super) fn put(&self, id: u16) {
        let (word, bit) = self.place(id);
        let before = word.fetch_and(!bit, Ordering::Release);
        assert!(
            before & bit != 0,
            "INV-PMEM-2: a channel's id is given back once"
        );
    }

    /// Those that are given out.
    pub(super) fn taken(&self) -> impl Iterator<Item = u16> {
        (0..).zip(&self.0).flat_map(|(number, word): (u16, _)| {
            let mut bits = word.load(Ordering::Relaxed);
            std::iter::from_fn(move || {
                let bit = u16::try_from(bits.trailing_zeros())
                    .ok()
                    .filter(|bit| *bit < 64)?;
                bits &= bits - 1;
                Some(number * 64 + bit)
            })
        })
    }

    /// How many are given out.
    pub(super) fn count(&self) -> usize {
        let counts = self
            .0
            .iter()
            .map(|word| word.load(Ordering::Relaxed).count_ones());
        counts.sum::<u32>() as usize
    }

    fn place(&self, id: u16) -> (&AtomicU64, u64) {
        (&self.0[usize::from(id) / 64], 1 << (id % 64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_number_that_is_free_is_given_out() {
        let ids = ChannelIds::default();
        let all: Vec<_> = std::iter::from_fn(|| ids.take()).collect();
        assert_eq!(all, (0..CHANNEL_COUNT_MAX).collect::<Vec<_>>());
        [200, 70, 255].into_iter().for_each(|id| ids.put(id));
        assert_eq!(ids.count(), 253);
        assert!(
            ids.taken()
                .eq((0..255).filter(|id| ![70, 200].contains(id)))
        );
        assert_eq!(
            [(); 4].map(|()| ids.take()),
            [Some(70), Some(200), Some(255), None]
        );
    }
}
