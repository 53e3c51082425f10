//! A channel: one SPDK thread's way into a cache. Host requests come in by the trampolines, the poller runs
//! what was staged, starts base reads and completes.
//!
//! A completion may submit the next request at once, on the same stack. So no borrow of the channel's state
//! is held while SPDK is called: the engine is borrowed for its own calls only, and its outbox is taken out
//! before it is worked off.

use std::cell::{Cell, RefCell};
use std::ffi::{c_int, c_void};
use std::mem;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use spdk_sys as sys;

use super::background::note_busy_poll;
use super::base_queue::{BaseQueue, Room};
use super::memory::DmaBuf;
use super::node::Node;
use super::reset::Resets;
use super::thread::{Polled, Poller, Turns};
use super::trampoline::guard;
use super::zcopy::{Loans, get_zcopy_buf};
use crate::engine::{
    CHANNEL_COUNT_MAX, Channel, Completion, Fua, HostIo, IoToken, Op, Outbox, PADS_SIZE_BYTES,
    Progress, Status,
};
use crate::pmem::{IovCursor, MappedPmem};
use crate::units::Lba;

/// Requests that a channel takes at once; what comes beyond is handed back to SPDK, which repeats it.
pub(super) const REQUEST_COUNT_MAX: u32 = 4096;

/// Requests that have not been completed, by number. The number is what the engine calls them by; after a
/// panic in the engine the table is what they are found by.
#[derive(Debug)]
struct Requests {
    slots: Vec<*mut sys::spdk_bdev_io>,
    free: Vec<u32>,
}

impl Requests {
    fn new() -> Self {
        Self {
            slots: vec![ptr::null_mut(); REQUEST_COUNT_MAX as usize],
            free: (0..REQUEST_COUNT_MAX).rev().collect(),
        }
    }

    fn insert(&mut self, bdev_io: *mut sys::spdk_bdev_io) -> Option<IoToken> {
        let index = self.free.pop()?;
        self.slots[index as usize] = bdev_io;
        Some(IoToken(u64::from(index)))
    }

    /// `None`: no such request is open.
    fn remove(&mut self, token: IoToken) -> Option<NonNull<sys::spdk_bdev_io>> {
        let index = u32::try_from(token.0).ok()?;
        let slot = self.slots.get_mut(index as usize)?;
        let found = NonNull::new(mem::replace(slot, ptr::null_mut()))?;
        self.free.push(index);
        Some(found)
    }

    fn find(&self, bdev_io: *mut sys::spdk_bdev_io) -> Option<IoToken> {
        let index = self.slots.iter().position(|slot| *slot == bdev_io)?;
        Some(IoToken(index as u64))
    }

    fn any(&self) -> Option<IoToken> {
        let index = self.slots.iter().position(|slot| !slot.is_null())?;
        Some(IoToken(index as u64))
    }
}

/// Whether the engine may be asked anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Health {
    Sound,
    /// A panic left it in an unknown state. It is not touched again, and every request fails.
    Broken,
}

/// An abort that was granted. It completes after its target.
#[derive(Debug)]
struct Abort {
    bdev_io: NonNull<sys::spdk_bdev_io>,
    /// `None`: it has ended, and its number may be another one's.
    target: Option<IoToken>,
}

/// What belongs to an SPDK channel. Confined to its SPDK thread.
#[derive(Debug)]
pub(super) struct ChannelState {
    pub(super) node: Arc<Node>,
    pub(super) engine: RefCell<Channel<MappedPmem>>,
    requests: RefCell<Requests>,
    outbox: RefCell<Option<Box<Outbox>>>,
    pub(super) base: std::rc::Rc<BaseQueue>,
    pub(super) health: Cell<Health>,
    /// Whether the poller has anything to look after.
    pub(super) awake: Cell<bool>,
    pub(super) loans: Loans,
    /// Aborts that were granted, of a request each.
    aborts: RefCell<Vec<Abort>>,
    pub(super) resets: Resets,
    turns: Turns,
    poller: RefCell<Option<Poller>>,
}

/// Makes the state of a channel. NULL: impossible, the reason is in the log.
///
/// # Safety
/// `ctx` is the node of a registered io_device.
#[unsafe(no_mangle)]
unsafe extern "C" fn pcache_up_channel_create(ctx: *mut c_void) -> *mut c_void {
    guard(
        ptr::null_mut(),
        || {
            // SAFETY: by the contract of this function; the io_device holds a reference to the node.
            let node = unsafe { Node::from_ctx(ctx) };
            let name = node.name.clone();
            match ChannelState::new(node) {
                Ok(state) => Box::into_raw(state).cast(),
                Err(reason) => {
                    log::error!("{name}: no further channel can be opened: {reason}");
                    ptr::null_mut()
                }
            }
        },
        |_| ptr::null_mut(),
    )
}

/// # Safety
/// `state` is from `pcache_up_channel_create`, on the thread that made it, and is not used any more.
#[unsafe(no_mangle)]
unsafe extern "C" fn pcache_up_channel_destroy(state: *mut c_void) {
    // SAFETY: made by `Box::into_raw` in `pcache_up_channel_create`; by the contract its last use.
    guard(
        (),
        || unsafe { Box::from_raw(state.cast::<ChannelState>()) }.close(),
        |_| (),
    );
}

/// # Safety
/// `state` is the state of a channel of this thread; `bdev_io` was submitted to it, as `io` describes.
#[unsafe(no_mangle)]
unsafe extern "C" fn pcache_up_submit(
    state: *mut c_void,
    bdev_io: *mut sys::spdk_bdev_io,
    io: *const sys::pcache_io,
) {
    // SAFETY: by the contract of this function; nothing makes a `&mut` of a channel's state.
    let (state, io) = unsafe { (&*state.cast::<ChannelState>(), &*io) };
    guard((), || state.submit(bdev_io, io), |why| state.on_panic(why));
}

/// # Safety
/// As `pcache_up_submit`; the request is one for which `pcache_io_get_buf` or `pcache_io_get_zcopy_buf` was
/// called.
#[unsafe(no_mangle)]
unsafe extern "C" fn pcache_up_buf_ready(
    state: *mut c_void,
    bdev_io: *mut sys::spdk_bdev_io,
    io: *const sys::pcache_io,
    success: bool,
) {
    // SAFETY: by the contract of this function; nothing makes a `&mut` of a channel's state.
    let (state, io) = unsafe { (&*state.cast::<ChannelState>(), &*io) };
    guard(
        (),
        || {
            if !success {
                complete(bdev_io, Status::Failed)
            } else if io.kind == sys::PCACHE_IO_LEND_BUF {
                state.answer(bdev_io, Status::Success)
            } else {
                state.stage(bdev_io, io)
            }
        },
        |why| state.on_panic(why),
    );
}

unsafe extern "C" fn poll(arg: *mut c_void) -> c_int {
    // SAFETY: registered with the channel's state, which unregisters the poller before it goes.
    let state = unsafe { &*arg.cast::<ChannelState>() };
    // The common case of an idle channel.
    if !state.awake.get() {
        return Polled::Idle.code();
    }
    let polled = guard(
        Polled::Idle,
        || state.poll(),
        |why| {
            state.on_panic(why);
            Polled::Busy
        },
    );
    polled.code()
}

impl ChannelState {
    /// Or why there can be none.
    fn new(node: Arc<Node>) -> Result<Box<Self>, String> {
        // SAFETY: `close` abandons the pads if base reads are under way, and nothing else drops a channel that was in
        // use.
        let pads = unsafe { DmaBuf::pads(PADS_SIZE_BYTES) };
        if pads.is_none() {
            let (name, kib) = (&node.name, PADS_SIZE_BYTES >> 10);
            log::warn!(
                "{name}: no {kib} KiB for base reads: a channel puts nothing that it reads into the cache"
            );
        }
        let engine = (node.cache.channel_with(pads))
            .ok_or_else(|| format!("there are {CHANNEL_COUNT_MAX}, the most"))?;
        // Reads go straight to the caller's memory: nothing is bounced.
        let base = BaseQueue::new(Arc::clone(&node.base), Room::CHANNEL, Vec::new())
            .ok_or("its base bdev gives none")?;
        let turns = Turns::of_this_thread().ok_or("this is no SPDK thread")?;
        let state = Box::new(Self {
            node,
            engine: RefCell::new(engine),
            requests: RefCell::new(Requests::new()),
            outbox: RefCell::new(Some(Box::new(Outbox::new()))),
            base,
            health: Cell::new(Health::Sound),
            awake: Cell::new(false),
            loans: Loans::new(),
            aborts: RefCell::new(Vec::with_capacity(REQUEST_COUNT_MAX as usize)),
            resets: Resets::default(),
            turns,
            poller: RefCell::new(None),
        });
        let arg = ptr::from_ref(state.as_ref()).cast_mut().cast();
        // SAFETY: the state is boxed and drops its poller first.
        let poller = unsafe { Poller::register(poll, arg, 0, c"pcache_channel") };
        *state.poller.borrow_mut() = Some(poller.ok_or("there is no memory for a poller")?);
        Ok(state)
    }

    /// The end. SPDK has completed all requests before.
    fn close(self: Box<Self>) {
        *self.poller.borrow_mut() = None;
        self.loans.close();
        self.resets.go_on();
        let open = self.requests.borrow().any().is_some();
        if self.base.in_flight() != 0 {
            self.engine.borrow_mut().abandon_pads();
        }
        if open || self.base.in_flight() != 0 {
            log::error!(
                "{}: a channel is closed with requests under way",
                self.node.name
            );
        }
    }

    fn submit(&self, bdev_io: *mut sys::spdk_bdev_io, io: &sys::pcache_io) {
        match io.kind {
            sys::PCACHE_IO_READ if io.needs_buf => {
                // SAFETY: a read without memory, on its own thread; ends in `pcache_up_buf_ready`.
                unsafe { sys::pcache_io_get_buf(bdev_io) }
            }
            sys::PCACHE_IO_RESET => self.start_reset(bdev_io),
            sys::PCACHE_IO_ABORT => self.abort(bdev_io, io.abort_target),
            sys::PCACHE_IO_LEND if !self.node.zcopy.lends(io.block_count) => {
                get_zcopy_buf(bdev_io);
            }
            sys::PCACHE_IO_LEND_BUF => get_zcopy_buf(bdev_io),
            sys::PCACHE_IO_GIVE_BACK => self.give_back(bdev_io, io),
            _ => self.stage(bdev_io, io),
        }
    }

    /// Hands the request to the engine; the next poll works on it.
    fn stage(&self, bdev_io: *mut sys::spdk_bdev_io, io: &sys::pcache_io) {
        // SAFETY: SPDK keeps array and memory valid, on any thread, until the request is completed, which
        // happens after the engine has said so, and forms no Rust references to them. A caller that names
        // the mapping itself as its buffer is none of SPDK's: nobody else knows its address.
        let cursor = || unsafe { IovCursor::new(io.iovs, io.iov_count as usize) };
        let op = match io.kind {
            sys::PCACHE_IO_READ => Op::Read(cursor()),
            sys::PCACHE_IO_WRITE => Op::Write(cursor(), if io.fua { Fua::Yes } else { Fua::No }),
            sys::PCACHE_IO_LEND => Op::Lend,
            sys::PCACHE_IO_FLUSH => Op::Flush,
            sys::PCACHE_IO_UNMAP => Op::Unmap,
            sys::PCACHE_IO_WRITE_ZEROES => Op::WriteZeroes,
            _ => return complete(bdev_io, Status::Failed),
        };
        if self.health.get() == Health::Broken {
            return complete(bdev_io, Status::Failed);
        }
        let Some(token) = self.requests.borrow_mut().insert(bdev_io) else {
            return complete_as(bdev_io, sys::SPDK_BDEV_IO_STATUS_NOMEM);
        };
        let host_io = HostIo {
            token,
            op,
            lba: Lba(io.lba),
            len_blocks: io.block_count,
        };
        let refused = self.engine.borrow_mut().submit(host_io).is_err();
        self.awake.set(true);
        if refused {
            self.requests.borrow_mut().remove(token);
            complete_as(bdev_io, sys::SPDK_BDEV_IO_STATUS_NOMEM);
        }
    }

    fn poll(&self) -> Polled {
        if self.health.get() == Health::Broken {
            return self.fail_all();
        }
        // Taken out, so that a completion can stage further requests meanwhile.
        let mut outbox = self.outbox.borrow_mut().take().unwrap_or_default();
        let progress = {
            let mut engine = self.engine.borrow_mut();
            self.base
                .advance(|op, result| engine.on_base_done(op, result));
            // SAFETY: this runs on the thread that made the channel.
            let now = unsafe { self.turns.began() };
            let progress = engine.poll(now, &mut outbox);
            if engine.outstanding() > 0 && self.node.gives_up_waiting() {
                engine.abort_waiting();
            }
            progress
        };
        for request in &outbox.base {
            self.base.start(request, &outbox.sources);
        }
        for completion in &outbox.completions {
            self.complete(*completion);
        }
        let answered = self.loans.complete_answered();
        outbox.clear();
        *self.outbox.borrow_mut() = Some(outbox);
        if self.engine.borrow().outstanding() == 0 {
            self.resets.go_on();
            let idle = progress == Progress::Idle && !self.loans.has_answers();
            if idle && self.base.in_flight() == 0 {
                self.awake.set(false);
            }
        }
        if progress == Progress::Busy || answered {
            note_busy_poll();
            Polled::Busy
        } else {
            Polled::Idle
        }
    }

    fn complete(&self, completion: Completion) {
        let found = self.requests.borrow_mut().remove(completion.token);
        let mut is_aborted = false;
        for abort in self.aborts.borrow_mut().iter_mut() {
            if abort.target == Some(completion.token) {
                abort.target = None;
                is_aborted = true;
            }
        }
        match found {
            Some(bdev_io) => match completion.status {
                Status::Lent(loan) => self.lend(bdev_io, loan),
                Status::NotLent => get_zcopy_buf(bdev_io.as_ptr()),
                status => complete(bdev_io.as_ptr(), status),
            },
            None => log::error!("{}: a request was completed twice", self.node.name),
        }
        if is_aborted {
            self.complete_aborts();
        }
    }

    fn abort(&self, bdev_io: *mut sys::spdk_bdev_io, target: *mut sys::spdk_bdev_io) {
        let token = self.requests.borrow().find(target);
        let granted = self.health.get() == Health::Sound
            && token.is_some_and(|token| self.engine.borrow_mut().abort(token));
        match (token, NonNull::new(bdev_io)) {
            // After its target, which completes with one of the next polls.
            (Some(token), Some(bdev_io)) if granted => {
                let target = Some(token);
                self.aborts.borrow_mut().push(Abort { bdev_io, target });
                self.awake.set(true);
            }
            _ => complete(bdev_io, Status::Failed),
        }
    }

    /// Those whose target has ended.
    fn complete_aborts(&self) {
        loop {
            let mut aborts = self.aborts.borrow_mut();
            let Some(at) = aborts.iter().position(|abort| abort.target.is_none()) else {
                return;
            };
            let bdev_io = aborts.swap_remove(at).bdev_io;
            drop(aborts);
            complete(bdev_io.as_ptr(), Status::Success);
        }
    }

    /// After a panic: all requests fail, as soon as no base read can write into their memory any more.
    fn fail_all(&self) -> Polled {
        // The engine, which hears no more of them, would.
        self.base
            .advance(|_, _| self.node.cache.count_base_read_off());
        if self.base.in_flight() > 0 {
            return Polled::Idle;
        }
        loop {
            let token = self.requests.borrow().any();
            let found = token.and_then(|token| self.requests.borrow_mut().remove(token));
            let Some(bdev_io) = found else { break };
            complete(bdev_io.as_ptr(), Status::Failed);
        }
        self.loans.complete_answered();
        loop {
            let abort = self.aborts.borrow_mut().pop();
            let Some(Abort { bdev_io, .. }) = abort else {
                break;
            };
            complete(bdev_io.as_ptr(), Status::Success);
        }
        self.resets.go_on();
        self.awake.set(false);
        Polled::Busy
    }

    pub(super) fn on_panic(&self, why: &str) {
        self.health.set(Health::Broken);
        self.awake.set(true);
        self.node.cache.poison(why);
        log::error!(
            "{}: stopped after an internal error; its data are safe on the cache device",
            self.node.name
        );
    }
}

pub(super) fn complete(bdev_io: *mut sys::spdk_bdev_io, status: Status) {
    complete_as(
        bdev_io,
        match status {
            Status::Success => sys::SPDK_BDEV_IO_STATUS_SUCCESS,
            // The last two are not for SPDK, and never come here.
            Status::Failed | Status::Lent(_) | Status::NotLent => sys::SPDK_BDEV_IO_STATUS_FAILED,
            Status::Aborted => sys::SPDK_BDEV_IO_STATUS_ABORTED,
        },
    );
}

fn complete_as(bdev_io: *mut sys::spdk_bdev_io, status: sys::spdk_bdev_io_status) {
    // SAFETY: a request that SPDK handed to this channel and that has not been completed: callers take it out
    // of the table first, or never put it in.
    unsafe { sys::spdk_bdev_io_complete(bdev_io, status) }
}
