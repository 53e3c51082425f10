//! Drives a cache's background work, write-back and reclaim, on the app thread.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::base::Base;
use super::base_queue::BaseQueue;
use super::memory::DmaBuf;
use super::thread::{Polled, now};
use crate::engine::{Background, Cache, Outbox, Progress};
use crate::pmem::MappedPmem;
use crate::units::Now;

/// How long an idle background is left alone. Its watermarks and ages are far coarser.
const IDLE_NAP_NS: u64 = 50_000;

/// The background of one cache.
#[derive(Debug)]
pub(super) struct Driver {
    engine: RefCell<Background<MappedPmem>>,
    queue: Rc<BaseQueue>,
    outbox: RefCell<Outbox>,
    idle_since: Cell<Option<Now>>,
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
            idle_since: Cell::new(None),
            state: Cell::new(DriverState::Running),
        })
    }

    /// A bounded piece of work.
    pub(super) fn poll(&self) -> Polled {
        if self.state.get() == DriverState::Broken {
            self.queue.advance(|_, _| {});
            return Polled::Idle;
        }
        let time = now();
        let mut news = false;
        let mut engine = self.engine.borrow_mut();
        self.queue.advance(|op, result| {
            news = true;
            engine.on_base_done(op, result);
        });
        let napping = self
            .idle_since
            .get()
            .is_some_and(|since| time.since_ns(since) < IDLE_NAP_NS);
        if napping && !news {
            return Polled::Idle;
        }
        // Nobody submits or completes to this queue from outside, so the borrows may be held: SPDK calls
        // nothing of the background's back but `part_landed`, which only notes.
        let outbox = &mut *self.outbox.borrow_mut();
        let progress = engine.poll(time, outbox);
        for request in &outbox.base {
            self.queue.start(request, &outbox.sources);
        }
        outbox.clear();
        match progress {
            Progress::Busy => {
                self.idle_since.set(None);
                Polled::Busy
            }
            Progress::Idle => {
                self.idle_since.set(Some(time));
                Polled::Idle
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

    /// Base operations whose end the engine has not heard of.
    pub(super) fn in_flight(&self) -> usize {
        let engine = match self.state.get() {
            DriverState::Running => self.engine.borrow().in_flight(),
            DriverState::Broken => 0,
        };
        engine.max(self.queue.in_flight())
    }
}
