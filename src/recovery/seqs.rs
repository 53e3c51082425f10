//! The seqs of the ksets that count: no two have the same (INV-LOG-3).

use crate::media::Geometry;
use crate::memory::{self, NoMemory};
use crate::pmem::LINE_SIZE_BYTES;
use crate::units::Seq;
use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

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

/// For the error.
const WHAT: &str = "the set of numbers that recovery has met";
/// Of the set that grows.
const STRAY_PARTS: usize = 1024;

/// A set of seqs above the key tail. Most that lie above it are of ksets that are still there, so that a bit for each
/// kset for which there is room takes them in; memory is used only where bits are set. Where the key tail has stayed
/// behind, since nothing but read fills was reclaimed for many laps, there is a set that is slow and grows: in parts, so that
/// no slice of work has to move much of it.
#[derive(Debug)]
pub(super) struct SeqSet {
    first: Seq,
    bits: Vec<AtomicU64>,
    strays: Mutex<Vec<HashSet<Seq>>>,
}

impl SeqSet {
    pub(super) fn new(geometry: &Geometry) -> Result<Self, NoMemory> {
        let segments = u64::from(geometry.segment_count());
        let ksets = segments * (geometry.segment_size_bytes() / LINE_SIZE_BYTES);
        let words = usize::try_from(ksets.div_ceil(64)).unwrap_or(usize::MAX);
        Ok(Self {
            first: Seq(1),
            bits: memory::zeroed(WHAT, words)?,
            strays: Mutex::default(),
        })
    }

    /// All that are noted lie above this; it is said before the first.
    pub(super) fn set_key_tail(&mut self, key_tail: Seq) {
        self.first = Seq(key_tail.0 + 1);
    }

    /// Notes a seq above the key tail.
    #[inline]
    pub(super) fn note(&self, seq: Seq) -> Result<Noted, NoMemory> {
        let number = seq.0.saturating_sub(self.first.0);
        let word = usize::try_from(number / 64).unwrap_or(usize::MAX);
        let Some(word) = self.bits.get(word) else {
            return self.note_stray(seq);
        };
        let bit = 1 << (number % 64);
        Ok(if word.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            Noted::New
        } else {
            Noted::Twice
        })
    }

    #[cold]
    fn note_stray(&self, seq: Seq) -> Result<Noted, NoMemory> {
        let Ok(mut strays) = self.strays.try_lock() else {
            return Ok(Noted::Busy);
        };
        if strays.is_empty() {
            strays.resize_with(STRAY_PARTS, HashSet::new);
        }
        // Below the number of parts.
        let part = &mut strays[seq.0 as usize % STRAY_PARTS];
        memory::grow(WHAT, part)?;
        Ok(if part.insert(seq) {
            Noted::New
        } else {
            Noted::Twice
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seq_is_new_once_wherever_it_lies() {
        let geometry = Geometry::plan(1 << 20, 16 << 10, 4096).unwrap();
        let mut seqs = SeqSet::new(&geometry).unwrap();
        seqs.set_key_tail(Seq(70));
        for seq in [71, 72, 134, 135, 71 + 60 * 256, 1 << 40, (1 << 62) - 1] {
            assert_eq!(seqs.note(Seq(seq)), Ok(Noted::New), "{seq}");
            assert_eq!(seqs.note(Seq(seq)), Ok(Noted::Twice), "{seq}");
        }
        let (without, _) = memory::short_at(0, || seqs.note(Seq(1 << 42)));
        assert_eq!(without.unwrap_err().what, WHAT);
        assert_eq!(seqs.note(Seq(1 << 42)), Ok(Noted::New));
        let _held = seqs.strays.lock().unwrap();
        assert_eq!(seqs.note(Seq(73)), Ok(Noted::New));
        assert_eq!(seqs.note(Seq(1 << 41)), Ok(Noted::Busy));
    }
}
