//! Which segments are open, for those who have no stream's mutex: each stream tells of its own.

use super::segments::Special;
use crate::units::SegId;
use std::sync::atomic::{AtomicU32, Ordering};

/// Streams that a cache may have, those for special purposes included.
const STREAM_COUNT_MAX: usize = 128;
/// Of these: for the writes of channels.
pub(crate) const CORE_STREAM_COUNT_MAX: u32 = (STREAM_COUNT_MAX - Special::ALL.len()) as u32;

/// See the module.
#[derive(Debug)]
pub(crate) struct OpenIds {
    /// Of each stream: the number of its open segment and 1, or 0.
    numbers: [AtomicU32; STREAM_COUNT_MAX],
}

impl Default for OpenIds {
    fn default() -> Self {
        Self {
            numbers: [const { AtomicU32::new(0) }; STREAM_COUNT_MAX],
        }
    }
}

impl OpenIds {
    /// The stream of this number has a segment open, or none. For whoever holds it.
    pub(crate) fn set(&self, stream: usize, id: Option<SegId>) {
        let number = id.map_or(0, |id| id.0 + 1);
        self.numbers[stream].store(number, Ordering::Relaxed);
    }

    /// The open segments. Meanwhile some may be sealed, and others opened.
    pub(crate) fn iter(&self) -> impl Iterator<Item = SegId> {
        let numbers = self.numbers.iter();
        let numbers = numbers.map(|number| number.load(Ordering::Relaxed));
        numbers.filter_map(|number| number.checked_sub(1).map(SegId))
    }
}
