//! What a machine consists of, and the turns of its parts.

use super::super::base::{BaseDone, Client};
use super::super::loans::Held;
use super::super::model::{Time, Violation, WriteId};
use super::super::pmem::{SimPmem, SimState};
use super::super::prng::{Prng, mix};
use super::super::stamp::{self, Stamp};
use super::{Moment, Outside, Readers, Setup, SharedObserver};
use crate::engine::{
    Background, Budget, Cache, Channel, Completion, IoToken, LoanId, Outbox, Status,
};
use crate::pmem::IovBuf;
use crate::sched;
use crate::units::Now;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// How deep turns within turns go.
const YIELD_DEPTH_MAX: u32 = 3;
/// How many of the turns within turns are long ones, in percent, and how many turns of others these take: a
/// core may be stopped for long at any place.
const LONG_YIELD_PERCENT: u8 = 5;
const LONG_YIELD_TURNS_MAX: u64 = 60;
/// What a host writes to the memory of its reads. No block looks like that.
const SCRIBBLED: u8 = 0xcc;

#[derive(Debug)]
pub(super) enum Asked {
    Write(WriteId),
    Flush(Time),
    Read {
        begin: Time,
        lba: u64,
        /// Of the base, when it was submitted.
        failures: u64,
    },
    Lend {
        begin: Time,
        lba: u64,
        /// How long it is held.
        turns: u64,
    },
}

#[derive(Debug)]
pub(super) struct Pending {
    pub(super) token: IoToken,
    pub(super) asked: Asked,
    /// Lives as long as the request.
    pub(super) buf: Option<IovBuf>,
}

#[derive(Debug)]
pub(super) struct Core {
    pub(super) channel: Channel<SimPmem>,
    pub(super) pending: Vec<Pending>,
    pub(super) held: Vec<Held>,
    pub(super) out: Outbox,
}

#[derive(Debug)]
pub(super) struct Driver {
    pub(super) background: Background<SimPmem>,
    pub(super) out: Outbox,
}

pub(super) struct Shared {
    pub(super) setup: Setup,
    pub(super) pmem: SimPmem,
    pub(super) cache: Arc<Cache<SimPmem>>,
    pub(super) cores: Vec<Mutex<Core>>,
    pub(super) driver: Mutex<Driver>,
    pub(super) outside: Arc<Mutex<Outside>>,
    pub(super) observer: Option<SharedObserver>,
    /// Base operations that ended while their owner was busy.
    pub(super) undelivered: Mutex<Vec<BaseDone>>,
    pub(super) yields: Mutex<Prng>,
    pub(super) yield_depth: AtomicU32,
    pub(super) now: AtomicU64,
    pub(super) next_token: AtomicU64,
    pub(super) hash: AtomicU64,
    pub(super) completed: Mutex<Vec<Completion>>,
    pub(super) violation: Mutex<Option<Violation>>,
}

pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(guard)) => Some(guard.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

impl Pending {
    /// A reader whose memory changes while it is read into.
    fn scribbles(&self, setup: &Setup) -> bool {
        let is_read = matches!(self.asked, Asked::Read { .. });
        is_read && setup.readers == Readers::Scribbling && self.token.0 % 2 == 1
    }
}

impl Core {
    /// Hosts change the memory of their reads.
    fn scribble(&self, setup: &Setup) {
        let scribbling = self.pending.iter().filter(|read| read.scribbles(setup));
        for buf in scribbling.filter_map(|read| read.buf.as_ref()) {
            buf.cursor().write_from(&vec![SCRIBBLED; buf.len_bytes()]);
        }
    }

    /// Gives back the loans that `due` names.
    pub(super) fn give_back(
        &mut self,
        due: impl FnMut(&mut Held) -> bool,
    ) -> Result<(), Violation> {
        let back: Vec<Held> = self.held.extract_if(.., due).collect();
        let channel = &mut self.channel;
        let results: Vec<_> = back
            .into_iter()
            .map(|held| held.give_back(channel))
            .collect();
        results.into_iter().collect()
    }
}

impl Shared {
    pub(super) fn now(&self) -> Now {
        Now(self.now.load(Ordering::Relaxed))
    }

    pub(super) fn note(&self, a: u64, b: u64) {
        let hash = self.hash.load(Ordering::Relaxed);
        self.hash.store(mix(mix(hash, a), b), Ordering::Relaxed);
    }

    pub(super) fn fail(&self, violation: Violation) {
        lock(&self.violation).get_or_insert(violation);
    }

    /// Runs the engine, in which others may get turns.
    pub(super) fn with_turns<R>(self: &Arc<Self>, f: impl FnOnce() -> R) -> R {
        if self.setup.yield_percent == 0 {
            return f();
        }
        let shared = Arc::clone(self);
        sched::with_hook(Some(Rc::new(move || shared.yield_turn())), f)
    }

    /// Somebody else may have a turn, here and now.
    pub(super) fn yield_turn(self: &Arc<Self>) {
        if !lock(&self.yields).percent(self.setup.yield_percent) {
            return;
        }
        let depth = self.yield_depth.fetch_add(1, Ordering::Relaxed);
        let turns = match depth {
            0 if lock(&self.yields).percent(LONG_YIELD_PERCENT) => {
                lock(&self.yields).between(2, LONG_YIELD_TURNS_MAX)
            }
            0..YIELD_DEPTH_MAX => 1,
            _ => 0,
        };
        for _ in 0..turns {
            let choice = lock(&self.yields).index(self.cores.len() + 2);
            match choice.checked_sub(self.cores.len()) {
                None => self.poll_core(choice),
                Some(0) => self.poll_background(),
                Some(_) => self.complete_base(),
            }
        }
        self.yield_depth.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn poll_core(self: &Arc<Self>, at: usize) {
        let Some(mut core) = try_lock(&self.cores[at]) else {
            return;
        };
        let core = &mut *core;
        if let Err(violation) = core.give_back(Held::pass_turn) {
            self.fail(violation);
        }
        core.out.clear();
        core.scribble(&self.setup);
        self.with_turns(|| core.channel.poll(self.now(), &mut core.out));
        if !core.out.completions.is_empty() {
            self.check_fenced(core);
        }
        let mut acknowledged = false;
        {
            let outside = &mut *lock(&self.outside);
            let mut completions = std::mem::take(&mut core.out.completions);
            for completion in completions.drain(..) {
                self.note(completion.token.0, code_of(completion.status));
                lock(&self.completed).push(completion);
                match complete(outside, core, completion, &self.setup) {
                    Ok(Some(write)) => {
                        acknowledged = true;
                        // The mode changes between turns alone.
                        if self.cache.settings.cache_mode().holds_writes()
                            && let Err(violation) = outside.check_on_base(write)
                        {
                            self.fail(violation);
                        }
                    }
                    Ok(None) => {}
                    Err(violation) => self.fail(violation),
                }
            }
            core.out.completions = completions;
            for request in core.out.base.drain(..) {
                self.note(request.lba.0, request.len_blocks);
                let client = Client::Channel(at);
                outside.base.submit(client, request, &core.out.sources);
            }
        }
        if acknowledged && let Some(observer) = &self.observer {
            let look = |state: &SimState| {
                lock(observer).look(Moment::Acknowledged, state, &lock(&self.outside));
            };
            sched::with_hook(None, || self.pmem.with_state(look));
        }
    }

    /// At an acknowledgement nothing that the core has stored may be pending (INV-PMEM-2).
    pub(super) fn check_fenced(&self, core: &Core) {
        let agent = core.channel.agent();
        if let Some(at) = self.pmem.with_state(|state| state.first_unfenced(agent)) {
            self.fail(Violation(format!(
                "acknowledged too early: {at} holds a store of {agent:?} that is not fenced"
            )));
        }
    }

    pub(super) fn poll_background(self: &Arc<Self>) {
        let Some(mut driver) = try_lock(&self.driver) else {
            return;
        };
        let driver = &mut *driver;
        driver.out.clear();
        self.as_background(driver, |driver| {
            driver
                .background
                .poll(self.now(), Budget::default(), &mut driver.out);
        });
        let outside = &mut *lock(&self.outside);
        for request in driver.out.base.drain(..) {
            self.note(request.lba.0, request.len_blocks + 1);
            let client = Client::Background;
            outside.base.submit(client, request, &driver.out.sources);
        }
        self.look_at_checkpoint(outside);
    }

    /// Does something of the background. If it moves the dirty tail, a batch has ended: the base is an exact
    /// past state then.
    pub(super) fn as_background(
        self: &Arc<Self>,
        driver: &mut Driver,
        act: impl FnOnce(&mut Driver),
    ) {
        let before = self.cache.dirty_tail();
        self.with_turns(|| act(driver));
        if self.cache.dirty_tail() != before
            && let Err(violation) = lock(&self.outside).check_cut()
        {
            self.fail(violation);
        }
    }

    pub(super) fn complete_base(self: &Arc<Self>) {
        let mut undelivered = std::mem::take(&mut *lock(&self.undelivered));
        {
            let outside = &mut *lock(&self.outside);
            if let Some(done) = outside.base.complete_one() {
                self.note(u64::from(done.op.0), u64::from(done.result.is_ok()));
                if done.client == Client::Background
                    && let Err(violation) = outside.check_base_order()
                {
                    self.fail(violation);
                }
                undelivered.push(done);
            }
        }
        for done in undelivered {
            let delivered = match done.client {
                Client::Channel(at) => try_lock(&self.cores[at])
                    .map(|mut core| core.channel.on_base_done(done.op, done.result)),
                Client::Background => try_lock(&self.driver).map(|mut driver| {
                    self.as_background(&mut driver, |driver| {
                        let now = self.now();
                        driver.background.on_base_done(done.op, done.result, now);
                    });
                }),
            };
            if delivered.is_none() {
                lock(&self.undelivered).push(done);
            }
        }
        self.look_at_checkpoint(&mut lock(&self.outside));
    }
}

pub(super) fn stamps_of(bytes: &[u8], lba: u64, setup: &Setup) -> Result<Vec<Stamp>, Violation> {
    let blocks = bytes.chunks_exact(setup.block_size_bytes as usize);
    (lba..)
        .zip(blocks)
        .map(|(lba, block)| {
            stamp::read(block, lba)
                .map_err(|g| Violation(format!("a read of block {lba} is garbage: {g}")))
        })
        .collect()
}

/// For the event hash.
pub(super) fn code_of(status: Status) -> u64 {
    match status {
        Status::Success => 0,
        Status::Failed => 1,
        Status::Aborted => 2,
        Status::NotLent => 3,
        Status::Lent(LoanId(id)) => 4 + u64::from(id),
    }
}

/// Tells the oracle of a completion. Returns the write that was acknowledged, if one was.
pub(super) fn complete(
    outside: &mut Outside,
    core: &mut Core,
    completion: Completion,
    setup: &Setup,
) -> Result<Option<WriteId>, Violation> {
    let at = core
        .pending
        .iter()
        .position(|p| p.token == completion.token);
    let Some(at) = at else {
        let token = completion.token;
        return Err(Violation(format!("{token:?} completes twice")));
    };
    let pending = core.pending.swap_remove(at);
    let scribbles = pending.scribbles(setup);
    let Pending { asked, buf, .. } = pending;
    let model = &mut outside.model;
    match (asked, completion.status) {
        (Asked::Write(id), Status::Success) => {
            model.end_write(id);
            return Ok(Some(id));
        }
        (Asked::Write(id), Status::Aborted) => model.abort_write(id),
        (Asked::Write(_), Status::Failed) => {
            return Err(Violation("a write has failed".to_owned()));
        }
        (Asked::Flush(begin), Status::Success) => model.end_flush(begin),
        (Asked::Read { begin, .. }, Status::Success) if scribbles => {
            model.end_read(begin, 0, None)?;
        }
        (Asked::Read { begin, lba, .. }, Status::Success) => {
            let bytes = buf.map(|buf| buf.bytes()).unwrap_or_default();
            model.end_read(begin, lba, Some(&stamps_of(&bytes, lba, setup)?))?;
        }
        (Asked::Lend { begin, lba, turns }, Status::Lent(id)) => {
            let held = Held::new(&core.channel, id, turns);
            let held = held.ok_or_else(|| Violation("a loan of nothing".to_owned()))?;
            model.end_read(begin, lba, Some(&stamps_of(held.bytes(), lba, setup)?))?;
            core.held.push(held);
        }
        (Asked::Lend { begin, .. }, Status::NotLent | Status::Aborted) => {
            model.end_read(begin, 0, None)?;
        }
        (asked, Status::Lent(_) | Status::NotLent) | (asked @ Asked::Lend { .. }, _) => {
            let status = completion.status;
            return Err(Violation(format!("{asked:?} ends as {status:?}")));
        }
        (Asked::Read { failures, .. }, Status::Failed)
            if failures == outside.base.failure_count() =>
        {
            return Err(Violation("a read has failed without a reason".to_owned()));
        }
        (Asked::Read { begin, lba, .. }, Status::Failed | Status::Aborted) => {
            model.end_read(begin, lba, None)?;
        }
        (Asked::Flush(_), Status::Failed | Status::Aborted) => {}
    }
    Ok(None)
}
