//! SPDK's threads and clock, as far as the adapter needs them.

use std::ffi::{c_int, c_void};
use std::ptr::{self, NonNull};
use std::sync::OnceLock;

use spdk_sys as sys;

use crate::units::{NS_PER_S, Now};

/// Something that only SPDK's app thread touches. SPDK runs a thread on one core at a time and hands it
/// over with the necessary barriers, so what is confined to one SPDK thread needs no lock.
#[derive(Debug)]
pub(super) struct AppCell<T>(T);

// SAFETY: `get` panics on every thread but SPDK's app thread, so the value is only ever touched by one
// thread at a time, with a happens-before between its moves from core to core.
unsafe impl<T> Sync for AppCell<T> {}
// SAFETY: as above. A cell may be dropped elsewhere only if nobody ever looked into it; the adapter drops
// its cells on the app thread.
unsafe impl<T> Send for AppCell<T> {}

impl<T> AppCell<T> {
    pub(super) const fn new(value: T) -> Self {
        Self(value)
    }

    /// The value.
    ///
    /// # Panics
    /// Called on another thread than the app thread.
    pub(super) fn get(&self) -> &T {
        assert!(
            on_app_thread(),
            "state of the app thread touched on another thread"
        );
        &self.0
    }
}

/// Whether this is SPDK's app thread.
pub(super) fn on_app_thread() -> bool {
    // SAFETY: takes no pointer (NULL stands for the current thread) and only compares.
    unsafe { sys::spdk_thread_is_app_thread(ptr::null_mut()) }
}

/// Runs `function` with `arg` on the app thread, later.
pub(super) fn send_to_app(function: unsafe extern "C" fn(*mut c_void), arg: *mut c_void) {
    // SAFETY: the app thread exists from the start of the application until after the modules' end.
    let rc = unsafe {
        sys::spdk_thread_send_msg(sys::spdk_thread_get_app_thread(), Some(function), arg)
    };
    assert_eq!(rc, 0, "the app thread takes no messages");
}

/// The host's monotonic clock.
pub(super) fn now() -> Now {
    // SAFETY: no arguments.
    moment(unsafe { sys::spdk_get_ticks() })
}

/// The current SPDK thread, for its own view of the time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turns(NonNull<sys::spdk_thread>);

impl Turns {
    /// `None`: this is no SPDK thread.
    pub(super) fn of_this_thread() -> Option<Self> {
        // SAFETY: no arguments.
        NonNull::new(unsafe { sys::spdk_get_thread() }).map(Self)
    }

    /// When the thread's turn began, which SPDK knows: it costs a load, and not a look at the clock.
    ///
    /// # Safety
    /// The thread has not ended; whoever runs on it may say so.
    pub(super) unsafe fn began(self) -> Now {
        // SAFETY: by the contract of this function.
        moment(unsafe { sys::spdk_thread_get_last_tsc(self.0.as_ptr()) })
    }
}

fn moment(ticks: u64) -> Now {
    static NS_PER_TICK_Q32: OnceLock<u64> = OnceLock::new();
    let factor = *NS_PER_TICK_Q32.get_or_init(|| {
        // SAFETY: no arguments; the environment is up when the module runs.
        let hz = unsafe { sys::spdk_get_ticks_hz() }.max(1);
        u64::try_from((u128::from(NS_PER_S) << 32) / u128::from(hz)).unwrap_or(u64::MAX)
    });
    // Fits: 2^64 ns are 584 years.
    #[expect(clippy::cast_possible_truncation, reason = "explained above")]
    Now(((u128::from(ticks) * u128::from(factor)) >> 32) as u64)
}

/// Tells SPDK whether a poller did something: its scheduler and `spdk_top` go by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Polled {
    Idle,
    Busy,
}

impl Polled {
    pub(super) fn code(self) -> c_int {
        let code = match self {
            Self::Idle => sys::SPDK_POLLER_IDLE,
            Self::Busy => sys::SPDK_POLLER_BUSY,
        };
        // Both are small.
        c_int::try_from(code).unwrap_or(0)
    }
}

/// A registered poller of the current SPDK thread; unregistered when dropped, on that same thread.
#[derive(Debug)]
pub(super) struct Poller(NonNull<sys::spdk_poller>);

impl Poller {
    /// Has `function` called with `arg` every `period_us` microseconds; 0: as often as possible.
    ///
    /// # Safety
    /// `function` may be called with `arg` on this thread until the poller is dropped.
    pub(super) unsafe fn register(
        function: unsafe extern "C" fn(*mut c_void) -> c_int,
        arg: *mut c_void,
        period_us: u64,
        name: &std::ffi::CStr,
    ) -> Option<Self> {
        // SAFETY: the name is copied; for the rest see the contract of this function.
        let poller = unsafe {
            sys::spdk_poller_register_named(Some(function), arg, period_us, name.as_ptr())
        };
        NonNull::new(poller).map(Self)
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        let mut poller = self.0.as_ptr();
        // SAFETY: registered by `register` and not unregistered since. SPDK allows it from within the
        // poller's own function too.
        unsafe { sys::spdk_poller_unregister(&raw mut poller) }
    }
}
