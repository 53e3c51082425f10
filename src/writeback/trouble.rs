//! Errors of the base, and damage: pauses, and what is taken again behind them.

use super::lost::Fate;
use super::{BACKOFF_NS_MAX, BACKOFF_NS_MIN, Context, DAMAGE_LOOK_NS, State, Writeback};
use crate::engine::{BaseError, Cache, Health, Progress};
use crate::pmem::Pmem;
use crate::units::Now;
use std::mem;
use std::sync::atomic::Ordering;

impl Writeback {
    /// The memory of the batch cannot be read: all of it is read when it is taken again, and what is lost is found to be
    /// damaged. If that has been done before, and has found nothing, there is a pause first.
    pub(super) fn take_again<P: Pmem>(&mut self, context: &Context<'_, P>, now: Now) {
        let is_new = self.read_upto <= context.tails.dirty_tail;
        self.read_upto = self.read_upto.max(self.batch.last_seq);
        if is_new {
            self.start_over();
            return;
        }
        self.back_off(now);
        let reason = "write-back waits: part of the cache device cannot be read at one time and can at another; \
                      nothing is known to be lost, it is repeated";
        let health = Health::WritebackFailing(reason.to_owned());
        context.cache.set_health(health);
    }

    /// Takes everything behind the dirty tail again. Part of it may be on the base, up to the recorded end of
    /// the batch, where the next one ends as well (INV-WB-2).
    pub(super) fn start_over(&mut self) {
        self.log.restart();
        self.next.clear();
        self.done = 0;
        self.salvage.start_over();
        self.state = State::Idle;
    }

    /// Goes on if all that was damaged has been overwritten.
    pub(super) fn look_at_damage<P: Pmem>(
        &mut self,
        context: &mut Context<'_, P>,
        now: Now,
    ) -> Progress {
        let cache = context.cache;
        cache.forget_overwritten_damage();
        let fate = self.next.lost.look(cache);
        cache.damage.hold(self.next.lost.blocks());
        match fate {
            Fate::Overwritten => {}
            Fate::Unclear => return Progress::Busy,
            Fate::Lost => {
                self.state = State::Damaged(Now(now.0 + DAMAGE_LOOK_NS));
                return Progress::Idle;
            }
        }
        cache.writeback_stands.store(false, Ordering::Relaxed);
        if matches!(cache.health(), Health::Degraded(_)) {
            // It gets on, and may take long to get to the end of a batch. If there is more, that is told.
            cache.set_health(Health::Online);
        }
        self.start_over();
        Progress::Busy
    }

    /// Whether an error or damage keeps the batch under way from its end.
    pub(super) fn is_held_up(&self) -> bool {
        let has_failed = self.backoff_ns > BACKOFF_NS_MIN;
        has_failed || matches!(self.state, State::Backoff(_) | State::Damaged(_))
    }

    /// After an error. The pauses grow as long as nothing ends well between them: of a base that fails a few operations of
    /// many, each round has some that do. Writes that a failed flush may have lost are nothing that has ended well.
    pub(super) fn back_off(&mut self, now: Now) {
        if mem::take(&mut self.batch.has_progressed) && !self.flush_failed {
            self.backoff_ns = BACKOFF_NS_MIN;
        }
        self.state = State::Backoff(Now(now.0 + self.backoff_ns));
        self.backoff_ns = (self.backoff_ns * 2).min(BACKOFF_NS_MAX);
    }

    /// Because of damage: whoever waits for the base waits in vain.
    pub(super) fn stand_still<P: Pmem>(&mut self, cache: &Cache<P>, now: Now) {
        self.state = State::Damaged(Now(now.0 + DAMAGE_LOOK_NS));
        cache.writeback_stands.store(true, Ordering::Relaxed);
        let lost = &self.next.lost;
        cache.damage.hold(lost.blocks());
        cache.set_health(Health::Degraded(lost.text()));
    }
}

pub(super) fn note_error<P: Pmem>(context: &Context<'_, P>, what: &str, error: BaseError) {
    let reason = format!("write-back waits: {error} ({what}); nothing is lost, it is repeated");
    context.cache.set_health(Health::WritebackFailing(reason));
}
