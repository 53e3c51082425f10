//! Pins: while somebody looks at a place in a segment, it is not freed.
//!
//! A loan lasts as long as its holder likes: a host that does not read its socket keeps one for minutes. What one keeps cannot
//! be written to, so that all loans together may keep a part of the segments only, however many hosts there are, and the
//! rest is for those who write.

use super::cache::Cache;
use super::segments::Segment;
use crate::pmem::Pmem;
use crate::sched;
use std::sync::atomic::Ordering;

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
    /// leaves, and `Grace::leave` releases what `Grace::passed` acquires: so the pin is seen. Nobody finds a
    /// place in the segment from then on, and pins only go.
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

impl<P: Pmem> Cache<P> {
    /// So many segments the loans of a channel may keep. All channels together so keep no more than they may, or one each.
    /// Nothing is counted that channels share: a word that all of them change would cost more than it does to copy a page.
    pub(super) fn loan_share(&self) -> usize {
        let pinned_max = self.segments_in_service() * PINNED_PERCENT_MAX / 100;
        (pinned_max / self.channel_count().max(1)).max(1)
    }
}
