//! How much of a core background work takes from requests, and which cache's turn it is: all caches of a core share what one
//! of them would get.
//!
//! Work comes in slices, and after each of them the requests of the core have theirs, whoever's slice it was. How long that
//! is goes by whoever needs most among those who have something to do. Between these the turns go by start-time fair queueing:
//! a slice moves its cache back the further the longer it took and the less the work was needed, and the next is of the
//! one that lies first. So two caches with the same need get as much, and none is passed by for ever.
//!
//! Where requests take longer than such a rest each time they are asked for, which nobody can cut short, slices are longer
//! instead: else the share would never be had, however badly it is needed, and writers would use up all room and wait
//! until a batch has reached the base.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::engine::Pressure;
use crate::units::Now;

/// How long a background that found nothing to do is left alone. Its watermarks and ages are far coarser.
const IDLE_NAP_NS: u64 = 50_000;
/// How many polls go by at the most between two looks at the clock while a background is left alone: reading it costs
/// as much as the rest of such a poll.
const NAP_POLLS: u32 = 8;
/// A look that finds nothing to do postpones nobody, if it takes no longer than this: there is one of each cache every
/// [`IDLE_NAP_NS`], and they would add up.
const LOOK_NS_MAX: u64 = 1_000;
/// The least share of the core that background work gets beside requests, in percent; it grows with the pressure,
/// to all of it.
const SHARE_PERCENT_MIN: u64 = 20;

/// A share of the core, in percent; not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Share(u64);

impl Share {
    const MIN: Self = Self(SHARE_PERCENT_MIN);
    const ALL: Self = Self(100);
    /// The most as long as no request waits for background work.
    const UNAWAITED_MAX: Self = Self::of(Pressure::UNAWAITED_MAX);

    const fn of(pressure: Pressure) -> Self {
        Self(SHARE_PERCENT_MIN + (100 - SHARE_PERCENT_MIN) * pressure.percent() / 100)
    }

    /// How long the requests of the core come first after a slice of work that took `took_ns`.
    fn rest_ns(self, took_ns: u64) -> u64 {
        took_ns * (100 - self.0) / self.0
    }

    /// How long a slice of work may last after the requests of the core have taken `rest_ns`.
    fn work_ns(self, rest_ns: u64) -> u64 {
        // All of the core would be a slice without end: as long as there are requests, whoever is to have all of it has the
        // most that there is before they wait.
        let percent = self.min(Self::UNAWAITED_MAX).0;
        rest_ns * percent / (100 - percent)
    }

    /// How far such a slice moves its cache back.
    fn steps(self, took_ns: u64) -> u64 {
        took_ns * 100 / self.0
    }
}

/// What the caches of a core know of each other.
#[derive(Debug, Default)]
pub(crate) struct CoreTime {
    places: RefCell<Vec<Rc<Place>>>,
    /// The last slice beside requests: when it ended, and how long it took.
    last_end: Cell<Now>,
    last_took_ns: Cell<u64>,
    /// Of all slices.
    worked_ns: Cell<u64>,
    /// How long all else of the core took, once around its pollers, the last time that was measured.
    turn_ns: Cell<u64>,
    /// Where the cache lay that had the last slice. Whoever comes begins here.
    served: Cell<u64>,
}

/// Where a cache lies.
#[derive(Debug)]
struct Place {
    /// It would begin a slice now, as far as it is known.
    wants: Cell<bool>,
    /// How much it needs, as its last slice ended.
    share: Cell<Share>,
    /// Where its last slice has moved it to.
    at: Cell<u64>,
}

impl CoreTime {
    /// Where a cache lies now: one that had nothing to do meanwhile has saved up nothing.
    fn start_of(&self, place: &Place) -> u64 {
        place.at.get().max(self.served.get())
    }

    /// When the requests have had their time.
    fn rested_at(&self) -> Now {
        let places = self.places.borrow();
        let wanting = places.iter().filter(|place| place.wants.get());
        let most = wanting.map(|place| place.share.get()).max();
        let rest_ns = most.unwrap_or(Share::MIN).rest_ns(self.last_took_ns.get());
        Now(self.last_end.get().0 + rest_ns)
    }

    /// How many polls a background lets go by that has nothing to do for so long, if all turns take as long as the last one.
    fn polls_in(&self, span_ns: u64) -> u32 {
        let polls = span_ns / self.turn_ns.get().max(1);
        u32::try_from(polls).map_or(NAP_POLLS, |polls| polls.min(NAP_POLLS))
    }

    /// How many caches want so much of the core, at least 1.
    fn count_of(&self, share: Share) -> u64 {
        let places = self.places.borrow();
        let wanting = places.iter().filter(|place| place.wants.get());
        let count = wanting.filter(|place| place.share.get() == share).count();
        count.max(1) as u64
    }

    /// Whether nobody else lies before this one.
    fn is_first(&self, place: &Place) -> bool {
        let start = self.start_of(place);
        let places = self.places.borrow();
        let mut wanting = places.iter().filter(|other| other.wants.get());
        wanting.all(|other| start <= self.start_of(other))
    }
}

/// What a slice did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Done {
    /// There was nothing to do.
    Nothing,
    /// What there was.
    All,
    /// Not all of it.
    Part,
}

/// Who else had something to do on the core since the last slice of the same cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beside {
    Nobody,
    Requests,
}

/// A cache among those of its core.
#[derive(Debug)]
pub(crate) struct Contender {
    core: Rc<CoreTime>,
    place: Rc<Place>,
    /// Nothing is done before unless something new has come: there was nothing to do.
    nap_until: Cell<Now>,
    /// Polls until the clock is looked at again.
    polls_left: Cell<u32>,
    /// When its last slice ended, and how long all had been then, until it is asked again.
    slice_end: Cell<Option<(Now, u64)>>,
}

impl Contender {
    /// One more cache on the core.
    pub(crate) fn new(core: Rc<CoreTime>) -> Self {
        let place = Rc::new(Place {
            wants: Cell::new(false),
            share: Cell::new(Share::MIN),
            at: Cell::new(0),
        });
        core.places.borrow_mut().push(Rc::clone(&place));
        Self {
            core,
            place,
            nap_until: Cell::new(Now(0)),
            polls_left: Cell::new(0),
            slice_end: Cell::new(None),
        }
    }

    /// There is something new to do.
    pub(crate) fn wake(&self) {
        if self.nap_until.replace(Now(0)) != Now(0) {
            self.polls_left.set(0);
        }
    }

    /// Whether it is worth while to look at the clock in this poll.
    pub(crate) fn is_worth_a_look(&self) -> bool {
        let left = self.polls_left.get();
        self.polls_left.set(left.saturating_sub(1));
        left == 0
    }

    /// Whether a slice may begin.
    pub(crate) fn may_begin(&self, now: Now) -> bool {
        // Everybody else was asked since, the other caches as well.
        if let Some((end, worked_ns)) = self.slice_end.take() {
            let worked_ns = self.core.worked_ns.get() - worked_ns;
            let turn_ns = now.since_ns(end).saturating_sub(worked_ns);
            self.core.turn_ns.set(turn_ns);
        }
        self.place.wants.set(now >= self.nap_until.get());
        let due = self.nap_until.get().max(self.core.rested_at());
        if now < due {
            self.polls_left.set(self.core.polls_in(due.since_ns(now)));
            return false;
        }
        self.core.is_first(&self.place)
    }

    /// How long a slice lasts beside requests: `least_ns`, unless that is less than the cache's share because all requests of the
    /// core have their turn between two slices, which takes the longer the more they are; `most_ns` at the most.
    pub(crate) fn slice_ns(&self, least_ns: u64, most_ns: u64) -> u64 {
        let (core, share) = (&self.core, self.place.share.get());
        // Those of caches without a rest follow one another in the same turn.
        let count = if share == Share::ALL {
            core.count_of(share)
        } else {
            1
        };
        let work_ns = share.work_ns(core.turn_ns.get()) / count;
        work_ns.clamp(least_ns, least_ns.max(most_ns / count))
    }

    /// A slice that began and ended so.
    pub(crate) fn ended(
        &self,
        (start, end): (Now, Now),
        beside: Beside,
        done: Done,
        pressure: Pressure,
    ) {
        let took_ns = end.since_ns(start);
        let share = Share::of(pressure);
        self.place.share.set(share);
        self.place.wants.set(done == Done::Part);
        if done != Done::Part {
            self.nap_until.set(Now(end.0 + IDLE_NAP_NS));
        }
        if done == Done::Nothing && took_ns <= LOOK_NS_MAX {
            return;
        }
        let core = &self.core;
        core.served.set(core.start_of(&self.place));
        self.place.at.set(core.served.get() + share.steps(took_ns));
        if beside == Beside::Requests {
            core.last_end.set(end);
            core.last_took_ns.set(took_ns);
        }
        core.worked_ns.set(core.worked_ns.get() + took_ns);
        self.slice_end.set(Some((end, core.worked_ns.get())));
    }

    /// There will be no more of them, and nobody waits for one.
    pub(crate) fn give_up(&self) {
        self.place.wants.set(false);
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        let mut places = self.core.places.borrow_mut();
        places.retain(|place| !Rc::ptr_eq(place, &self.place));
    }
}

#[cfg(test)]
mod tests;
