//! Resets of the base: they make it end what it keeps.

use std::ffi::{c_int, c_void};
use std::ptr;

use spdk_sys as sys;

use super::BaseQueue;
use crate::spdk::trampoline::guard;

impl BaseQueue {
    /// Has the base reset, unless that is under way, which makes it end what it has.
    ///
    /// # Errors
    /// It was not begun; the number of the error.
    pub(in crate::spdk) fn reset(&self) -> Result<(), c_int> {
        if self.is_resetting.replace(true) {
            return Ok(());
        }
        self.base.begin_reset();
        let this = ptr::from_ref(self).cast_mut().cast();
        // SAFETY: `was_reset` is called once; `in_flight` counts the reset until then.
        let errno = unsafe { self.reset_base(was_reset, this) };
        if errno == 0 {
            return Ok(());
        }
        self.end_reset();
        Err(errno)
    }

    fn end_reset(&self) {
        self.base.end_reset();
        self.is_resetting.set(false);
    }

    /// Has the base reset, which makes it end what is under way there, whoever asked for it. 0, or an errno value: it was
    /// not begun.
    ///
    /// # Safety
    /// `ended` is called once with `arg`, later, on this thread; until then the queue is not dropped.
    pub(in crate::spdk) unsafe fn reset_base(
        &self,
        ended: unsafe extern "C" fn(*mut sys::spdk_bdev_io, bool, *mut c_void),
        arg: *mut c_void,
    ) -> c_int {
        let (desc, channel) = (self.base.desc(), self.channel.as_ptr());
        // SAFETY: the descriptor is open while the base lives, the channel is of this thread, and put by `drop` only; for
        // the rest see the contract of this function.
        -unsafe { sys::spdk_bdev_reset(desc, channel, Some(ended), arg) }
    }
}

/// SPDK tells that the base was reset, or not: then what it has may not end, and whoever waits has it reset again.
unsafe extern "C" fn was_reset(bdev_io: *mut sys::spdk_bdev_io, _: bool, this: *mut c_void) {
    guard(
        (),
        || {
            // SAFETY: the request is SPDK's and is given back once, here; `this` is the queue of `reset`, which is not dropped
            // before this call.
            let queue = unsafe {
                sys::spdk_bdev_free_io(bdev_io);
                &*this.cast::<BaseQueue>()
            };
            queue.end_reset();
        },
        |_| (),
    );
}
