//! Grace periods: memory that readers may still look at is reused only when all of them have moved on.
//!
//! A channel enters before it looks reads up and leaves when it has copied them. What was taken out of the index before a
//! [`Ticket`] was drawn is out of every reader's sight once the ticket has passed.

use crate::sched;
use crossbeam_utils::CachePadded;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// A moment; passes when everybody who was inside then has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

/// See the module.
#[derive(Debug)]
pub(crate) struct Grace {
    now: CachePadded<AtomicU64>,
    /// For each participant: 0 while outside, else the moment of its entry or an earlier one.
    inside: Box<[CachePadded<AtomicU64>]>,
}

impl Grace {
    pub(crate) fn new(participant_count: usize) -> Self {
        Self {
            now: CachePadded::new(AtomicU64::new(1)),
            inside: (0..participant_count)
                .map(|_| CachePadded::new(AtomicU64::new(0)))
                .collect(),
        }
    }

    /// Participant `who` starts to look.
    pub(crate) fn enter(&self, who: usize) {
        sched::point();
        let now = self.now.load(Ordering::Acquire);
        sched::point();
        // Released like the leaving before it: whoever reads this and not that is to see what was done inside then.
        self.inside[who].store(now, Ordering::Release);
        // Whoever draws a ticket either sees this entry, or took things out before we look.
        fence(Ordering::SeqCst);
    }

    /// Participant `who` has stopped looking.
    pub(crate) fn leave(&self, who: usize) {
        sched::point();
        self.inside[who].store(0, Ordering::Release);
    }

    /// Draws a ticket; call it after taking things out.
    pub(crate) fn ticket(&self) -> Ticket {
        fence(Ordering::SeqCst);
        Ticket(self.now.fetch_add(1, Ordering::SeqCst) + 1)
    }

    /// Whether everybody who could have seen what was taken out before `ticket` has left.
    pub(crate) fn passed(&self, ticket: Ticket) -> bool {
        fence(Ordering::SeqCst);
        self.inside.iter().all(|inside| {
            let entered = inside.load(Ordering::Acquire);
            entered == 0 || entered >= ticket.0
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_waits_for_those_inside_and_for_nobody_else() {
        // INV-GRACE-1.
        let grace = Grace::new(2);
        grace.enter(0);
        let ticket = grace.ticket();
        grace.enter(1);
        assert!(!grace.passed(ticket));
        grace.leave(0);
        assert!(grace.passed(ticket));
        grace.leave(1);
        assert!(grace.passed(ticket));
    }
}
