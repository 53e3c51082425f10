//! The dirty tail passes what is clean: read fills and copies have numbers, and write-back has nothing to do with them.

use super::{Context, State, Writeback};
use crate::engine::Cache;
use crate::pmem::Pmem;
use crate::units::{NS_PER_MS, Now, Seq};
use std::sync::atomic::Ordering;

/// How often, at most.
const PASS_CLEAN_NS: u64 = 10 * NS_PER_MS;

impl Writeback {
    /// When nothing dirty is below the settled point the dirty tail goes there, now and then: what is asked of it, as
    /// age and what counts as on the base after a restart, does not depend on when something was written last.
    pub(super) fn pass_clean<P: Pmem>(&mut self, context: &mut Context<'_, P>, now: Now) {
        let upto = Seq(self.settled.0.saturating_sub(1));
        let all_clean = self.is_all_clean();
        if all_clean && self.salvage.is_miscounted {
            self.count_anew(context.cache);
        }
        if !all_clean || upto <= context.tails.dirty_tail || now < self.pass_clean_at {
            return;
        }
        self.pass_clean_at = Now(now.0 + PASS_CLEAN_NS);
        context.tails.dirty_tail = upto;
        context.cache.persist_tails(context.tails, context.agent);
    }

    /// Whether nothing dirty is below the settled point.
    pub(super) fn is_all_clean(&self) -> bool {
        self.state == State::Idle
            && !self.salvage.is_pending()
            && self.next.is_nothing()
            && !self.log.has_below(self.settled)
    }

    /// Nothing dirty is below the settled point. If that is still the end of the log, nothing is dirty at all.
    fn count_anew<P: Pmem>(&mut self, cache: &Cache<P>) {
        let is_end = || cache.seq_next.load(Ordering::SeqCst) == self.settled.0;
        // Whoever adds to this has drawn a number before.
        let left_bytes = cache.dirty_bytes.load(Ordering::Acquire);
        if is_end() {
            cache.dirty_bytes.fetch_sub(left_bytes, Ordering::Relaxed);
            self.salvage.is_miscounted = false;
        }
    }
}
