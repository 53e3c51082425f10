//! Who waits for room in the log, in order.
//!
//! Within a channel writes wait in the order of their submission. Between channels this keeps whoever polls most often
//! from taking each segment that becomes free: a channel whose write meets no room draws a number, and a free segment is
//! taken by those with the lowest numbers. It counts free segments instead of handing them out one by one: a channel may
//! take one as long as there are more of them than channels before it. So one that is slow to come keeps a single segment
//! from the others, and no more; nobody waits for anybody.
//!
//! Room that is left in an open segment is taken by whoever is at its stream, unless it is for what heals (`heal.rs`).

use super::cache::Cache;
use super::channel::Core;
use crate::canary::{self, Canary};
use crate::sched;
use crate::units::Agent;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// See the module.
#[derive(Debug)]
pub(super) struct RoomQueue {
    /// The last number that was drawn.
    drawn: AtomicU64,
    /// Of each channel: its number, 0 if it does not wait.
    numbers: Box<[AtomicU64]>,
    /// Those that are not 0.
    waiting: AtomicU32,
}

impl RoomQueue {
    pub(super) fn new(channel_count: usize) -> Self {
        Self {
            drawn: AtomicU64::new(0),
            numbers: (0..channel_count).map(|_| AtomicU64::new(0)).collect(),
            waiting: AtomicU32::new(0),
        }
    }

    /// The channel waits from now on, behind all that do.
    fn enter(&self, channel: Agent) {
        let number = self.drawn.fetch_add(1, Ordering::Relaxed) + 1;
        sched::point();
        self.numbers[place(channel)].store(number, Ordering::Relaxed);
        self.waiting.fetch_add(1, Ordering::Relaxed);
    }

    /// It does not wait any more. `true`: nobody does.
    fn leave(&self, channel: Agent) -> bool {
        self.numbers[place(channel)].store(0, Ordering::Relaxed);
        self.waiting.fetch_sub(1, Ordering::Relaxed) == 1
    }

    /// Whether a channel, or the background, which never waits, may take one of so many free segments.
    pub(super) fn may_take(&self, who: Agent, free_count: usize) -> bool {
        if self.waiting.load(Ordering::Relaxed) == 0 || canary::is(Canary::LateWriterGoesFirst) {
            return true;
        }
        let number_of = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let own = match self.numbers.get(place(who)).map_or(0, number_of) {
            0 => u64::MAX,
            number => number,
        };
        let numbers = self.numbers.iter().map(number_of);
        let before = numbers.filter(|number| (1..own).contains(number)).count();
        before < free_count
    }
}

impl<P> Cache<P> {
    /// Channels that wait for room.
    pub(crate) fn channels_that_wait(&self) -> usize {
        self.room_queue.waiting.load(Ordering::Relaxed) as usize
    }
}

fn place(Agent(number): Agent) -> usize {
    // Channels count from 1.
    usize::from(number) - 1
}

impl Core {
    /// The write at the head of the queue finds no room: it waits, and with it whatever is behind it now.
    #[cold]
    pub(super) fn wait_for_room<P>(&mut self, cache: &Cache<P>) {
        if self.turn == 0 {
            self.turn = self.writes.len() + self.gathered.conflicted_count();
            cache.room_queue.enter(Agent(self.owner()));
        }
        cache.space_wanted.store(true, Ordering::Release);
    }

    /// After a poll that began in the queue, with so many writes: those that waited when the channel entered it are its
    /// turn. Whatever came later is behind the others that wait by now.
    #[cold]
    pub(super) fn count_turn<P>(&mut self, cache: &Cache<P>, queued: usize) {
        let done = queued.saturating_sub(self.writes.len());
        if self.writes.is_empty() || done >= self.turn {
            self.leave_room_queue(cache);
        } else {
            self.turn -= done;
        }
    }

    /// Some that heal have gone before their time, and others are at the head now. `of_turn`: of all of them, those that were of
    /// the turn, which come first.
    pub(super) fn count_healers<P>(
        &mut self,
        cache: &Cache<P>,
        of_turn: usize,
        gone: usize,
        left: usize,
    ) {
        let gone_of_turn = gone.min(of_turn);
        let new_at_head = left - (of_turn - gone_of_turn);
        match self.turn + new_at_head - gone_of_turn {
            0 => self.leave_room_queue(cache),
            turn => self.turn = turn,
        }
    }

    /// If the channel is in the queue. The last one takes back that room is wanted: writes that were given up want none,
    /// and whoever still does says so with the next poll.
    #[inline]
    pub(super) fn leave_room_queue<P>(&mut self, cache: &Cache<P>) {
        if self.turn > 0 {
            self.turn = 0;
            if cache.room_queue.leave(Agent(self.owner())) {
                cache.space_wanted.store(false, Ordering::Release);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_came_first_takes_the_first_segment_and_one_who_does_not_come_keeps_one() {
        let queue = RoomQueue::new(4);
        let [first, second, third, fourth] = [1, 2, 3, 4].map(Agent);
        let background = Agent(5);
        assert!(queue.may_take(fourth, 1), "nobody waits");
        queue.enter(third);
        queue.enter(first);
        let may_take = |free_count| {
            let all = [first, second, third, fourth, background];
            all.map(|who| queue.may_take(who, free_count))
        };
        assert_eq!(may_take(0), [false; 5]);
        assert_eq!(may_take(1), [false, false, true, false, false]);
        assert_eq!(may_take(2), [true, false, true, false, false]);
        assert_eq!(may_take(3), [true; 5], "who does not wait is last");
        assert!(!queue.leave(third));
        assert!(queue.may_take(first, 1) && !queue.may_take(third, 1));
        // Again, and behind.
        queue.enter(third);
        assert!(queue.may_take(first, 1) && !queue.may_take(third, 1));
        assert!(!queue.leave(first) && queue.leave(third));
        assert!(queue.may_take(second, 1));
    }
}
