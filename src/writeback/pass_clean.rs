//! The dirty tail passes what is clean: read fills and copies have numbers, and write-back has nothing to do with them.

use super::{Context, State, Writeback};
use crate::pmem::Pmem;
use crate::units::{NS_PER_MS, Now, Seq};

/// How often, at most.
const PASS_CLEAN_NS: u64 = 10 * NS_PER_MS;

impl Writeback {
    /// When nothing dirty is below the settled point the dirty tail goes there, now and then: what is asked of it, as
    /// age and what counts as on the base after a restart, does not depend on when something was written last.
    pub(super) fn pass_clean<P: Pmem>(&mut self, context: &mut Context<'_, P>, now: Now) {
        let upto = Seq(self.settled.0.saturating_sub(1));
        let all_clean = self.state == State::Idle
            && self.damage.is_none()
            && self.next.is_nothing()
            && !self.log.has_below(self.settled);
        if !all_clean || upto <= context.tails.dirty_tail || now < self.pass_clean_at {
            return;
        }
        self.pass_clean_at = Now(now.0 + PASS_CLEAN_NS);
        context.tails.dirty_tail = upto;
        context.cache.persist_tails(context.tails, context.agent);
    }
}
