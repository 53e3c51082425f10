//! Drives a cache's background work, write-back and reclaim, on the app thread.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::base::Base;
use super::base_queue::BaseQueue;
use super::memory::DmaBuf;
use super::thread::{Polled, now};
use crate::engine::{Background, Cache, Outbox, Pressure, Progress};
use crate::pmem::MappedPmem;
use crate::units::Now;

/// How long an idle background is left alone. Its watermarks and ages are far coarser.
const IDLE_NAP_NS: u64 = 50_000;
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

/// For how many times as long as a slice of work took, the requests of the core come first afterwards.
fn rest_factor(pressure: Pressure) -> u64 {
    match pressure {
        Pressure::Low => 4,
        Pressure::High => 1,
        Pressure::Waiting => 0,
    }
}

/// The background of one cache.
#[derive(Debug)]
pub(super) struct Driver {
    engine: RefCell<Background<MappedPmem>>,
    queue: Rc<BaseQueue>,
    outbox: RefCell<Outbox>,
    /// Nothing is done before.
    rest_until: Cell<Now>,
    /// It rests because it found nothing to do.
    idle: Cell<bool>,
    /// Polls until the clock is looked at again.
    rest_polls_left: Cell<u32>,
    /// [`BUSY_POLLS`] when the last slice ended.
    busy_polls_seen: Cell<u64>,
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
    ) -> Option<Self> {
        let queue = BaseQueue::new(base, bounce)?;
        Some(Self {
            engine: RefCell::new(cache.background()?),
            queue,
            outbox: RefCell::new(Outbox::new()),
            rest_until: Cell::new(Now(0)),
            idle: Cell::new(false),
            rest_polls_left: Cell::new(0),
            busy_polls_seen: Cell::new(0),
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
        let mut news = false;
        self.queue.advance(|op, result| {
            news = true;
            engine.on_base_done(op, result);
        });
        if (news || engine.has_new_held_writes()) && self.idle.replace(false) {
            // What it was idle for has come, or somebody waits.
            self.rest_until.set(Now(0));
            self.rest_polls_left.set(0);
        }
        let left = self.rest_polls_left.get();
        if left > 0 {
            self.rest_polls_left.set(left - 1);
            return Polled::Idle;
        }
        let start = now();
        if start < self.rest_until.get() {
            self.rest_polls_left.set(NAP_POLLS);
            return Polled::Idle;
        }
        // Nobody submits or completes to this queue from outside, so the borrows may be held: SPDK calls
        // nothing of the background's back but `part_landed`, which only notes.
        let outbox = &mut *self.outbox.borrow_mut();
        let progress = engine.poll(start, outbox);
        for request in &outbox.base {
            self.queue.start(request, &outbox.sources);
        }
        outbox.clear();
        self.rest(start, progress, engine.pressure());
        match progress {
            Progress::Busy => Polled::Busy,
            Progress::Idle => Polled::Idle,
        }
    }

    /// Decides when to go on after a slice that began at `start`.
    fn rest(&self, start: Now, progress: Progress, pressure: Pressure) {
        let busy_polls = BUSY_POLLS.with(Cell::get);
        let core_is_busy = self.busy_polls_seen.replace(busy_polls) != busy_polls;
        self.idle.set(progress == Progress::Idle);
        let rest_ns = match progress {
            Progress::Idle => IDLE_NAP_NS,
            Progress::Busy if core_is_busy => {
                let end = now();
                end.since_ns(start) * (rest_factor(pressure) + 1)
            }
            Progress::Busy => 0,
        };
        self.rest_until.set(Now(start.0 + rest_ns));
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

    /// Base operations whose end the engine has not heard of.
    pub(super) fn in_flight(&self) -> usize {
        let engine = match self.state.get() {
            DriverState::Running => self.engine.borrow().in_flight(),
            DriverState::Broken => 0,
        };
        engine.max(self.queue.in_flight())
    }
}
