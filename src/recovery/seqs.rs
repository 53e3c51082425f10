//! The seqs of the ksets that count: no two have the same (INV-LOG-3).

use crate::media::Geometry;
use crate::pmem::LINE_SIZE_BYTES;
use crate::units::Seq;
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use zerocopy::FromZeros;

/// What has become of a seq that was noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Noted {
    /// It is there for the first time.
    New,
    /// It was there before.
    Twice,
    /// Another worker is at it: to be tried again.
    Busy,
}

/// A set of seqs above the key tail. Most that lie above it are of ksets that are still there, so that a bit for each
/// kset for which there is room takes them in; memory is used only where bits are set. Where the key tail has stayed
/// behind, since nothing but read fills was reclaimed for many laps, there is a set that is slow and grows.
#[derive(Debug)]
pub(super) struct SeqSet {
    first: Seq,
    bits: Vec<AtomicU64>,
    strays: Mutex<BTreeSet<Seq>>,
}

impl SeqSet {
    pub(super) fn new(geometry: &Geometry, key_tail: Seq) -> Self {
        let segments = u64::from(geometry.segment_count());
        let ksets = segments * (geometry.segment_size_bytes() / LINE_SIZE_BYTES);
        let words = usize::try_from(ksets.div_ceil(64)).unwrap_or(usize::MAX);
        Self {
            first: Seq(key_tail.0 + 1),
            // Without memory for them all are strays.
            bits: AtomicU64::new_vec_zeroed(words).unwrap_or_default(),
            strays: Mutex::default(),
        }
    }

    /// Notes a seq above the key tail.
    #[inline]
    pub(super) fn note(&self, seq: Seq) -> Noted {
        let number = seq.0.saturating_sub(self.first.0);
        let word = usize::try_from(number / 64).unwrap_or(usize::MAX);
        let Some(word) = self.bits.get(word) else {
            return self.note_stray(seq);
        };
        let bit = 1 << (number % 64);
        if word.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            Noted::New
        } else {
            Noted::Twice
        }
    }

    #[cold]
    fn note_stray(&self, seq: Seq) -> Noted {
        let Ok(mut strays) = self.strays.try_lock() else {
            return Noted::Busy;
        };
        if strays.insert(seq) {
            Noted::New
        } else {
            Noted::Twice
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seq_is_new_once_wherever_it_lies() {
        let geometry = Geometry::plan(1 << 20, 16 << 10, 4096).unwrap();
        let seqs = SeqSet::new(&geometry, Seq(70));
        for seq in [71, 72, 134, 135, 71 + 60 * 256, 1 << 40, (1 << 62) - 1] {
            assert_eq!(seqs.note(Seq(seq)), Noted::New, "{seq}");
            assert_eq!(seqs.note(Seq(seq)), Noted::Twice, "{seq}");
        }
        let _held = seqs.strays.lock().unwrap();
        assert_eq!(seqs.note(Seq(73)), Noted::New);
        assert_eq!(seqs.note(Seq(1 << 41)), Noted::Busy);
    }
}
