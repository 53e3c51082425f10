//! Drives a cache's background work, write-back and reclaim, on the app thread.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::base::Base;
use super::base_queue::{BaseQueue, Room};
use super::memory::DmaBuf;
use super::thread::{Polled, now};
use crate::core_time::{Beside, Contender, CoreTime, Done};
use crate::engine::{Background, Budget, Cache, Outbox, Progress};
use crate::pmem::MappedPmem;
use crate::units::Now;

/// How long a slice of work lasts, beside requests of the same core and without: what it takes, they wait. It
/// is made of polls of the engine, which are shorter.
const SLICE_NS_BUSY: u64 = 8_000;
/// Beside requests that take long themselves, where the work is needed. With more the tail of a deep queue gets no shorter
/// (docs/adr/0012-pacing.md).
const SLICE_NS_BUSY_MAX: u64 = 64_000;
const SLICE_NS_ALONE: u64 = 50_000;
/// Bytes that a poll hands to a base that copies them at once, beside requests.
const COPIED_BYTES_BUSY: u64 = 64 << 10;
thread_local! {
    /// Polls of channels that found something to do, on this core. The background takes time from the
    /// requests of its own core only.
    static BUSY_POLLS: Cell<u64> = const { Cell::new(0) };
    /// What the backgrounds on this core share. The app thread, on which they all are, stays on its core.
    static CORE_TIME: Rc<CoreTime> = Rc::new(CoreTime::default());
}

/// A channel on this core had something to do.
pub(super) fn note_busy_poll() {
    BUSY_POLLS.with(|polls| polls.set(polls.get().wrapping_add(1)));
}

/// The background of one cache.
#[derive(Debug)]
pub(super) struct Driver {
    engine: RefCell<Background<MappedPmem>>,
    queue: Rc<BaseQueue>,
    outbox: RefCell<Outbox>,
    contender: Contender,
    /// [`BUSY_POLLS`] when the last slice ended.
    busy_polls_seen: Cell<u64>,
    /// Starting a base write moves its data, and clearing writes zeroes.
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
        let queue = BaseQueue::new(base, Room::BACKGROUND, bounce)?;
        Some(Self {
            engine: RefCell::new(cache.background()?),
            queue,
            outbox: RefCell::new(Outbox::new()),
            contender: Contender::new(CORE_TIME.with(Rc::clone)),
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
            engine.note_zeroes(self.queue.zeroes_went());
            engine.on_base_done(op, result, *ended.get_or_insert_with(now));
        });
        if ended.is_some() || engine.has_new_held_writes() {
            self.contender.wake();
        }
        if !self.contender.is_worth_a_look() {
            return Polled::Idle;
        }
        let start = now();
        if !self.contender.may_begin(start) {
            return Polled::Idle;
        }
        let busy_polls = BUSY_POLLS.with(Cell::get);
        let beside = if self.busy_polls_seen.replace(busy_polls) == busy_polls {
            Beside::Nobody
        } else {
            Beside::Requests
        };
        let done = self.slice(&mut engine, start, beside);
        let slice = (start, now());
        self.contender.ended(slice, beside, done, engine.pressure());
        match done {
            Done::Part => Polled::Busy,
            Done::Nothing | Done::All => Polled::Idle,
        }
    }

    /// Polls the engine until it has nothing to do, or for as long as a slice lasts.
    fn slice(&self, engine: &mut Background<MappedPmem>, start: Now, beside: Beside) -> Done {
        let mut budget = Budget::default();
        let slice_ns = match beside {
            Beside::Requests => self.contender.slice_ns(SLICE_NS_BUSY, SLICE_NS_BUSY_MAX),
            Beside::Nobody => SLICE_NS_ALONE,
        };
        if beside == Beside::Requests && self.copies {
            budget.base_write_bytes = COPIED_BYTES_BUSY;
            budget.base_clear_bytes = COPIED_BYTES_BUSY;
        }
        // Nobody submits or completes to this queue from outside, so the borrow may be held: SPDK calls
        // nothing of the background's back but `part_landed`, which only notes.
        let outbox = &mut *self.outbox.borrow_mut();
        let (mut at, mut done) = (start, Done::Nothing);
        loop {
            let progress = engine.poll(at, budget, outbox);
            for request in &outbox.base {
                self.queue.start(request, &outbox.sources);
            }
            outbox.clear();
            if progress == Progress::Idle {
                return done;
            }
            at = now();
            if at.since_ns(start) >= slice_ns {
                return Done::Part;
            }
            done = Done::All;
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
        self.contender.give_up();
    }

    /// See [`Background::progress`].
    pub(super) fn progress(&self) -> u64 {
        match self.state.get() {
            DriverState::Running => self.engine.borrow().progress(),
            DriverState::Broken => 0,
        }
    }

    /// The queue of its base operations.
    pub(super) fn queue(&self) -> &BaseQueue {
        &self.queue
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
