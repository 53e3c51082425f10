//! RESET: on every channel what has not begun is given up, and the rest is waited for. That is reads of the base: if
//! they do not end, the base is reset too, which makes it end them; again and again, since a channel that is not reached
//! yet may ask it for more, but less and less often, down to once a minute.

use std::cell::{Cell, RefCell};
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Arc;

use spdk_sys as sys;

use super::base::os_text;
use super::channel::{ChannelState, Health, complete};
use super::thread::{Polled, Poller};
use super::trampoline::guard;
use crate::engine::Status;
use crate::retry::is_rare;

/// So long a base may take for what is under way: as long as SPDK advises modules to wait before they reset a device
/// (`SPDK_BDEV_RESET_IO_DRAIN_RECOMMENDED_VALUE`). A reset fails what write-back has under way, too.
const BASE_RESET_AFTER_US: u64 = 5_000_000;

/// At last every so many looks: once a minute.
const BASE_RESETS_APART: u32 = 12;

/// A reset that came by this channel.
#[derive(Debug)]
struct Asked {
    bdev_io: *mut sys::spdk_bdev_io,
    /// All channels have run empty, or not.
    emptied: Option<Status>,
    /// How often it was looked whether it is time to reset the base.
    looks: u32,
    /// Looks whether it is time to reset the base.
    _poller: Option<Poller>,
}

/// What a channel has to do with resets. SPDK has one of a bdev under way at a time.
#[derive(Debug)]
pub(super) struct Resets {
    /// One that waits for this channel to run empty.
    iter: Cell<*mut sys::spdk_io_channel_iter>,
    asked: RefCell<Option<Asked>>,
    /// The base is being reset for this channel.
    resets_base: Cell<bool>,
}

impl Default for Resets {
    fn default() -> Self {
        Self {
            iter: Cell::new(ptr::null_mut()),
            asked: RefCell::new(None),
            resets_base: Cell::new(false),
        }
    }
}

impl Resets {
    /// This channel has run empty.
    pub(super) fn go_on(&self) {
        let iter = self.iter.replace(ptr::null_mut());
        if !iter.is_null() {
            // SAFETY: SPDK handed the iterator to `reset_channel` on this thread and waits for this call.
            unsafe { sys::spdk_for_each_channel_continue(iter, 0) }
        }
    }

    /// Whether a request waits for channels to run empty.
    fn waits(&self) -> bool {
        let asked = self.asked.borrow();
        asked.as_ref().is_some_and(|asked| asked.emptied.is_none())
    }

    /// Notes another look at a request that waits. Whether it is time for something that is done less and less often.
    fn is_due(&self) -> bool {
        let mut asked = self.asked.borrow_mut();
        asked.as_mut().is_some_and(|asked| {
            asked.looks += 1;
            is_rare(asked.looks, BASE_RESETS_APART)
        })
    }

    /// All channels have run empty, or not.
    fn note_emptied(&self, status: Status) {
        if let Some(asked) = self.asked.borrow_mut().as_mut() {
            asked.emptied = Some(status);
        }
    }
}

impl ChannelState {
    pub(super) fn start_reset(&self, bdev_io: *mut sys::spdk_bdev_io) {
        let this = ptr::from_ref(self).cast_mut().cast();
        // SAFETY: the poller goes with the request, and SPDK keeps the channel until that is completed.
        let poller =
            unsafe { Poller::register(on_time, this, BASE_RESET_AFTER_US, c"pcache_reset") };
        if poller.is_none() {
            log::warn!(
                "{}: no poller: a reset waits for reads of the base as long as they take",
                self.node.name
            );
        }
        *self.resets.asked.borrow_mut() = Some(Asked {
            bdev_io,
            emptied: None,
            looks: 0,
            _poller: poller,
        });
        let device = Arc::as_ptr(&self.node).cast_mut().cast();
        // SAFETY: the node is the registered io_device of this channel. SPDK has one reset of a bdev under
        // way at a time, and keeps the request, and with it this channel, until it is completed.
        unsafe {
            sys::spdk_for_each_channel(device, Some(reset_channel), this, Some(reset_done));
        }
    }

    fn reset(&self, iter: *mut sys::spdk_io_channel_iter) {
        if self.health.get() == Health::Sound {
            self.engine.borrow_mut().abort_waiting();
        }
        self.resets.iter.set(iter);
        // The poll that finds the channel empty goes on.
        self.awake.set(true);
    }

    /// Completes the request when nobody works for it any more.
    fn end_reset_if_done(&self) {
        if self.resets.resets_base.get() {
            return;
        }
        let is_done = |asked: &mut Asked| asked.emptied.is_some();
        let ended = self.resets.asked.borrow_mut().take_if(is_done);
        if let Some(Asked {
            bdev_io,
            emptied: Some(status),
            ..
        }) = ended
        {
            complete(bdev_io, status);
        }
    }

    /// Does so if some channel still waits for the base.
    fn reset_base(&self) {
        let is_due = self.resets.is_due();
        if !is_due || !self.resets.waits() || self.node.base.is_resetting() {
            return;
        }
        let name = &self.node.name;
        log::warn!("{name}: reads of the base do not end: it is reset");
        let this = ptr::from_ref(self).cast_mut().cast();
        self.begin_base_reset();
        // SAFETY: the request is not completed before `base_was_reset`, so this channel stays, and its queue.
        let errno = unsafe { self.base.reset_base(base_was_reset, this) };
        if errno != 0 {
            self.end_base_reset();
            log::warn!("{name}: the base cannot be reset yet: {}", os_text(errno));
        }
    }

    fn begin_base_reset(&self) {
        self.node.base.begin_reset();
        self.resets.resets_base.set(true);
    }

    fn end_base_reset(&self) {
        self.node.base.end_reset();
        self.resets.resets_base.set(false);
    }
}

/// # Safety
/// `this` is the state of the channel by which a reset has come that is under way.
unsafe fn channel_of<'a>(this: *mut c_void) -> &'a ChannelState {
    // SAFETY: by the contract of this function; nothing makes a `&mut` of a channel's state.
    unsafe { &*this.cast::<ChannelState>() }
}

unsafe extern "C" fn on_time(this: *mut c_void) -> c_int {
    // SAFETY: registered by `start_reset`, and gone with the request.
    let state = unsafe { channel_of(this) };
    guard((), || state.reset_base(), |why| state.on_panic(why));
    Polled::Busy.code()
}

/// SPDK tells that the base was reset, or not.
unsafe extern "C" fn base_was_reset(
    bdev_io: *mut sys::spdk_bdev_io,
    success: bool,
    this: *mut c_void,
) {
    // SAFETY: the request is SPDK's and is given back once, here; the state is what `reset_base` passed, whose request
    // waits for this call.
    let state = unsafe {
        sys::spdk_bdev_free_io(bdev_io);
        channel_of(this)
    };
    guard(
        (),
        || {
            if !success {
                log::warn!("{}: the base has failed its reset", state.node.name);
            }
            state.end_base_reset();
            state.end_reset_if_done();
        },
        |why| state.on_panic(why),
    );
}

/// # Safety
/// Called by SPDK with an iterator over the channels of a node.
unsafe extern "C" fn reset_channel(iter: *mut sys::spdk_io_channel_iter) {
    // SAFETY: the iterator is at a channel of this thread; its state lives as long as the channel.
    let state = unsafe {
        let channel = sys::spdk_io_channel_iter_get_channel(iter);
        &*sys::pcache_channel_state(channel).cast::<ChannelState>()
    };
    guard(
        (),
        || state.reset(iter),
        |why| {
            state.on_panic(why);
            state.resets.iter.set(iter);
        },
    );
}

/// # Safety
/// Called by SPDK at the end of the iteration that `start_reset` began, on the thread of the reset.
unsafe extern "C" fn reset_done(iter: *mut sys::spdk_io_channel_iter, status: c_int) {
    // SAFETY: the context is the channel by which the reset came, which is not completed before.
    let state = unsafe { channel_of(sys::spdk_io_channel_iter_get_ctx(iter)) };
    let status = if status == 0 {
        Status::Success
    } else {
        Status::Failed
    };
    guard(
        (),
        || {
            state.resets.note_emptied(status);
            state.end_reset_if_done();
        },
        |why| state.on_panic(why),
    );
}
