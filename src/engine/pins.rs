//! Pins: while somebody looks at a place in a segment, it is not freed.
//!
//! A loan lasts as long as its holder likes: a host that does not read its socket keeps one for minutes. What one keeps cannot
//! be written to, so that all loans together may keep a part of the segments only, however many hosts there are, and the
//! rest is for those who write.

use super::cache::{CHANNEL_COUNT_MAX, Cache};
use super::segments::Segment;
use crate::pmem::Pmem;
use crate::sched;
use crossbeam_utils::CachePadded;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Of the segments in service: those that loans may keep.
const PINNED_PERCENT_MAX: usize = 75;

impl Segment {
    /// Keeps the segment from being freed. To be called in the grace period in which the index named a place
    /// in it.
    ///
    /// Why a pin never comes too late (INV-PIN-1): whoever frees the segment first takes its places out of
    /// the index, then draws a ticket, and looks at the pins when the ticket has passed. Who has found a
    /// place in it either entered after the ticket was drawn, which cannot be, for then the index named no
    /// such place any more; or was inside, and the ticket does not pass before it has left. It pins before it
    /// leaves, and `Grace::leave`, or the next `Grace::enter`, releases what `Grace::passed` acquires: so the pin is seen.
    /// Nobody finds a place in the segment from then on, and pins only go.
    pub(crate) fn pin(&self) {
        sched::point();
        self.pins.fetch_add(1, Ordering::Relaxed);
    }

    /// The end of a pin. All that was read under it was read before.
    pub(crate) fn unpin(&self) {
        sched::point();
        let before = self.pins.fetch_sub(1, Ordering::Release);
        debug_assert!(before > 0, "INV-PIN-2: a loan is given back once");
    }

    /// Whether somebody looks at it. `false` is final once a ticket has passed that was drawn after the last
    /// of its places had left the index.
    pub(crate) fn is_pinned(&self) -> bool {
        sched::point();
        self.pins.load(Ordering::Acquire) > 0
    }
}

/// How many loans each channel has. A word that all of them change would cost more than it does to copy a page: each has a line
/// of its own, which others look at once in a poll.
#[derive(Debug)]
pub(super) struct LoanCounts(Box<[CachePadded<AtomicUsize>]>);

impl Default for LoanCounts {
    fn default() -> Self {
        let counts = (0..CHANNEL_COUNT_MAX).map(|_| CachePadded::default());
        Self(counts.collect())
    }
}

impl LoanCounts {
    pub(super) fn note(&self, channel: u16, count: usize) {
        self.0[usize::from(channel)].store(count, Ordering::Relaxed);
    }
}

impl<P: Pmem> Cache<P> {
    /// So many segments the loans of a channel may keep: what those of the others leave, each of which may keep one. A few
    /// more if several channels lend at once.
    pub(super) fn segments_to_lend(&self, channel: u16) -> usize {
        let pinned_max = self.segments_in_service() * PINNED_PERCENT_MAX / 100;
        let others = self.channel_ids.taken().filter(|other| *other != channel);
        let count_of = |other: u16| self.loan_counts.0[usize::from(other)].load(Ordering::Relaxed);
        pinned_max.saturating_sub(others.map(count_of).sum())
    }
}
