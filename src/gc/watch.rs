//! When to look for a victim again: a look goes through all segments, which takes a millisecond where there are 65,536,
//! and without a victim it would be repeated with every poll, just when writers wait.

use super::victim::Wish;
use crate::canary::{self, Canary};
use crate::engine::Cache;
use crate::pmem::Pmem;
use crate::units::Seq;

/// A loan comes back without a word: while one is in the way, so many polls go by from look to look.
const LOAN_POLLS: u32 = 16;

/// Whatever decides whether there is a victim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ground {
    wish: Wish,
    dirty_tail: Seq,
    /// [`crate::engine::Segments::changes`].
    changes: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// As it was before the last look; `None`: that found a victim.
    ground: Option<Ground>,
    /// So many polls are left to the next look for loans.
    loan_polls: Option<u32>,
    #[cfg(test)]
    pub(super) look_count: usize,
}

impl Watch {
    /// Whether a look may find what the last one has not. If so, the caller looks.
    pub(super) fn is_due<P: Pmem>(&mut self, cache: &Cache<P>, wish: Wish) -> bool {
        // Taken before the look: what changes meanwhile is another reason for one.
        let dirty_tail = if canary::is(Canary::TailNotWatched) {
            Seq(0)
        } else {
            cache.dirty_tail()
        };
        let ground = Ground {
            wish,
            dirty_tail,
            changes: cache.segments.changes(),
        };
        let is_same = self.ground == Some(ground);
        if is_same && !self.is_loan_due() {
            return false;
        }
        self.ground = Some(ground);
        self.loan_polls = None;
        #[cfg(test)]
        {
            self.look_count += 1;
        }
        true
    }

    fn is_loan_due(&mut self) -> bool {
        let Some(left) = &mut self.loan_polls else {
            return false;
        };
        *left -= 1;
        *left == 0
    }

    /// There was a victim: another look may find the next.
    pub(super) fn forget(&mut self) {
        self.ground = None;
    }

    /// There was none, and there may be when what is lent comes back.
    pub(super) fn wait_for_loans(&mut self) {
        self.loan_polls = Some(LOAN_POLLS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::invariant_tests::new_cache;
    use std::sync::atomic::Ordering;

    const WISH: Wish = Wish {
        is_needed: true,
        is_urgent: false,
    };

    #[test]
    fn it_is_looked_again_only_when_something_has_changed() {
        let cache = new_cache();
        let mut watch = Watch::default();
        // Whether it is looked once, and not a second time.
        let mut is_due_once = |wish| {
            let is_due = watch.is_due(&cache, wish);
            assert!((0..100).all(|_| !watch.is_due(&cache, wish)));
            is_due
        };
        assert!(is_due_once(WISH));
        cache.dirty_tail.store(7, Ordering::Release);
        assert!(is_due_once(WISH), "more is on the base");
        let id = cache.segments.open_next(None).expect("all are free");
        assert!(!is_due_once(WISH));
        cache.segments.set_sealed(id);
        assert!(is_due_once(WISH), "one more may be reclaimed");
        cache.segments.suspect(id);
        assert!(is_due_once(WISH), "one is to be reclaimed");
        cache.segments.suspect(id);
        assert!(!is_due_once(WISH), "it is known already");
        let is_urgent = true;
        assert!(is_due_once(Wish { is_urgent, ..WISH }));
        assert!(is_due_once(WISH));
        watch.forget();
        assert!(watch.is_due(&cache, WISH), "there may be another victim");
    }

    #[test]
    fn it_is_looked_now_and_then_while_a_loan_is_in_the_way() {
        let cache = new_cache();
        let mut watch = Watch::default();
        for _ in 0..3 {
            assert!(watch.is_due(&cache, WISH));
            watch.wait_for_loans();
            assert!((1..LOAN_POLLS).all(|_| !watch.is_due(&cache, WISH)));
        }
    }
}
