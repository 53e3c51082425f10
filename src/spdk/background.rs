//! Drives a cache's background work, write-back and reclaim, on the app thread.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::base::Base;
use super::base_queue::BaseQueue;
use super::memory::DmaBuf;
use super::thread::{Polled, now};
use crate::engine::{Background, Budget, Cache, Outbox, Pressure, Progress};
use crate::pmem::MappedPmem;
use crate::units::Now;

/// How long an idle background is left alone. Its watermarks and ages are far coarser.
const IDLE_NAP_NS: u64 = 50_000;
/// How long a slice of work lasts, beside requests of the same core and without: what it takes, they wait. It
/// is made of polls of the engine, which are shorter.
const SLICE_NS_BUSY: u64 = 8_000;
const SLICE_NS_ALONE: u64 = 50_000;
/// Bytes that a poll hands to a base that copies them at once, beside requests.
const COPIED_BYTES_BUSY: u64 = 64 << 10;
/// How many polls go by between two looks at the clock while the background is left alone: reading it costs
/// as much as the rest of such a poll.
const NAP_POLLS: u32 = 8;

thread_local! {
    /// Polls of channels that found something to do, on this core. The background takes time from the
    /// requests of its own core only.
    static BUSY_POLLS: Cell<u64> = const { Cell::new(0) };
}

/// A channel on this core had something to do.
pub(super) fn note_busy_poll() {
    BUSY_POLLS.with(|polls| polls.set(polls.get().wrapping_add(1)));
}

/// The least share of the core that background work gets beside requests, in percent; it grows with the pressure,
/// to all of it.
const SHARE_PERCENT_MIN: u64 = 20;

/// How long the requests of the core come first after a slice of work that took `took_ns`.
fn rest_ns(took_ns: u64, pressure: Pressure) -> u64 {
    let share = SHARE_PERCENT_MIN + (100 - SHARE_PERCENT_MIN) * pressure.percent() / 100;
    took_ns * (100 - share) / share
}

/// The background of one cache.
#[derive(Debug)]
pub(super) struct Driver {
    engine: RefCell<Background<MappedPmem>>,
    queue: Rc<BaseQueue>,
    outbox: RefCell<Outbox>,
    /// Nothing is done before: the requests of the core have their share.
    rest_until: Cell<Now>,
    /// Nothing is done before unless the base has news, or a write waits for it: there was nothing to do.
    nap_until: Cell<Now>,
    /// Polls until the clock is looked at again.
    rest_polls_left: Cell<u32>,
    /// [`BUSY_POLLS`] when the last slice ended.
    busy_polls_seen: Cell<u64>,
    /// Starting a base write moves its data.
    copies: bool,
    state: Cell<DriverState>,
}

/// Whether the engine may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DriverState {
    Running,
    /// A panic left it in an unknown state: it is not touched again.
    Broken,
}

impl Driver {
    /// `None`: the base has no channel, or the background is taken.
    pub(super) fn new(
        cache: &Arc<Cache<MappedPmem>>,
        base: Arc<Base>,
        bounce: Vec<DmaBuf>,
        copies: bool,
    ) -> Option<Self> {
        let queue = BaseQueue::new(base, bounce)?;
        Some(Self {
            engine: RefCell::new(cache.background()?),
            queue,
            outbox: RefCell::new(Outbox::new()),
            rest_until: Cell::new(Now(0)),
            nap_until: Cell::new(Now(0)),
            rest_polls_left: Cell::new(0),
            busy_polls_seen: Cell::new(0),
            copies,
            state: Cell::new(DriverState::Running),
        })
    }

    /// A bounded piece of work.
    pub(super) fn poll(&self) -> Polled {
        if self.state.get() == DriverState::Broken {
            self.queue.advance(|_, _| {});
            return Polled::Idle;
        }
        let mut engine = self.engine.borrow_mut();
        // The clock is looked at once for all that has ended.
        let mut ended = None;
        self.queue.advance(|op, result| {
            engine.on_base_done(op, result, *ended.get_or_insert_with(now));
        });
        let wakes = ended.is_some() || engine.has_new_held_writes();
        if wakes && self.nap_until.replace(Now(0)) != Now(0) {
            self.rest_polls_left.set(0);
        }
        let left = self.rest_polls_left.get();
        if left > 0 {
            self.rest_polls_left.set(left - 1);
            return Polled::Idle;
        }
        let start = now();
        if start < self.rest_until.get().max(self.nap_until.get()) {
            self.rest_polls_left.set(NAP_POLLS);
            return Polled::Idle;
        }
        let busy_polls = BUSY_POLLS.with(Cell::get);
        let core_is_busy = self.busy_polls_seen.replace(busy_polls) != busy_polls;
        let progress = self.slice(&mut engine, start, core_is_busy);
        let end = now();
        if core_is_busy {
            let rest_ns = rest_ns(end.since_ns(start), engine.pressure());
            self.rest_until.set(Now(end.0 + rest_ns));
        }
        if progress == Progress::Idle {
            self.nap_until.set(Now(end.0 + IDLE_NAP_NS));
        }
        match progress {
            Progress::Busy => Polled::Busy,
            Progress::Idle => Polled::Idle,
        }
    }

    /// Polls the engine until it has nothing to do, or for as long as a slice lasts. What it did last.
    fn slice(
        &self,
        engine: &mut Background<MappedPmem>,
        start: Now,
        core_is_busy: bool,
    ) -> Progress {
        let mut budget = Budget::default();
        if core_is_busy && self.copies {
            budget.base_write_bytes = COPIED_BYTES_BUSY;
        }
        let slice_ns = if core_is_busy {
            SLICE_NS_BUSY
        } else {
            SLICE_NS_ALONE
        };
        // Nobody submits or completes to this queue from outside, so the borrow may be held: SPDK calls
        // nothing of the background's back but `part_landed`, which only notes.
        let outbox = &mut *self.outbox.borrow_mut();
        let mut at = start;
        loop {
            let progress = engine.poll(at, budget, outbox);
            for request in &outbox.base {
                self.queue.start(request, &outbox.sources);
            }
            outbox.clear();
            at = now();
            if progress == Progress::Idle || at.since_ns(start) >= slice_ns {
                return progress;
            }
        }
    }

    /// Begins nothing new.
    pub(super) fn stop(&self) {
        if self.state.get() == DriverState::Running {
            self.engine.borrow_mut().stop();
        }
    }

    /// After a panic in `poll`.
    pub(super) fn set_broken(&self) {
        self.state.set(DriverState::Broken);
    }

    /// Whether what lies in segments without keys is being saved, which takes its time.
    pub(super) fn is_salvaging(&self) -> bool {
        self.state.get() == DriverState::Running && self.engine.borrow().is_salvaging()
    }

    /// Base operations whose end the engine has not heard of.
    pub(super) fn in_flight(&self) -> usize {
        let engine = match self.state.get() {
            DriverState::Running => self.engine.borrow().in_flight(),
            DriverState::Broken => 0,
        };
        engine.max(self.queue.in_flight())
    }
}
