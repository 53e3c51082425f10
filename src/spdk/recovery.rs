//! Recovery on the other cores of the application, and what is told of it meanwhile.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use spdk_sys as sys;

use super::thread::{Polled, Poller, now};
use super::trampoline::guard;
use crate::pmem::MappedPmem;
use crate::recovery::{Opening, RecoveryProgress, Work, Worker};
use crate::units::{NS_PER_MS, NS_PER_S, Now};

/// Workers beside the one of the app thread, at most: more would wait for the memory.
const HELPER_COUNT_MAX: usize = 31;
/// How often the log tells how far it is.
const LOG_INTERVAL_NS: u64 = 3 * NS_PER_S;

/// The workers on the other cores. Each has an SPDK thread of its own, for as long as there is work.
#[derive(Debug, Default)]
pub(super) struct Helpers(Arc<State>);

/// What the helpers and the app thread tell each other.
#[derive(Debug, Default)]
struct State {
    /// Helpers that are not gone yet.
    left: AtomicU32,
    /// One of them has panicked.
    failed: AtomicBool,
    /// The opening is given up.
    stop: AtomicBool,
}

/// A worker on its way to its thread, or there.
#[derive(Debug)]
struct Helper {
    worker: RefCell<Worker<MappedPmem>>,
    poller: RefCell<Option<Poller>>,
    /// Behind `worker`: when the helper is not counted any more it has let go of the device.
    counted: Counted,
}

/// One of the helpers that are left, for as long as it lives.
#[derive(Debug)]
struct Counted(Arc<State>);

impl Counted {
    fn new(state: &Arc<State>) -> Self {
        state.left.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(state))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.left.fetch_sub(1, Ordering::Release);
    }
}

impl Helpers {
    /// One on each core but this one.
    pub(super) fn start(opening: &mut Opening<MappedPmem>) -> Self {
        let helpers = Self::default();
        for core in other_cores().take(HELPER_COUNT_MAX) {
            helpers.start_on(core, opening);
        }
        helpers
    }

    /// Without a thread for it there is one helper less.
    fn start_on(&self, core: u32, opening: &mut Opening<MappedPmem>) {
        let Some(thread) = thread_on(core) else {
            log::warn!("there is no thread for recovery on core {core}");
            return;
        };
        let helper = Box::into_raw(Box::new(Helper {
            worker: RefCell::new(opening.worker()),
            poller: RefCell::new(None),
            counted: Counted::new(&self.0),
        }));
        // SAFETY: the thread was made just now and ends by `leave` alone; `begin` takes the helper over.
        let rc = unsafe { sys::spdk_thread_send_msg(thread.as_ptr(), Some(begin), helper.cast()) };
        assert_eq!(rc, 0, "a new thread takes no messages");
    }

    /// Those that are there, the one of the app thread included.
    pub(super) fn worker_count(&self) -> u32 {
        self.0.left.load(Ordering::Acquire) + 1
    }

    /// Whether none is left. Then nothing but the opening has hold of the device.
    pub(super) fn are_gone(&self) -> bool {
        self.0.left.load(Ordering::Acquire) == 0
    }

    pub(super) fn have_failed(&self) -> bool {
        self.0.failed.load(Ordering::Acquire)
    }

    /// Sends them away, whatever they are at.
    pub(super) fn stop(&self) {
        self.0.stop.store(true, Ordering::Release);
    }
}

impl Helper {
    fn poll(&self) -> Work {
        if self.counted.0.stop.load(Ordering::Acquire) {
            return Work::Over;
        }
        self.worker.borrow_mut().work()
    }
}

/// The cores of the application, without the current one.
fn other_cores() -> impl Iterator<Item = u32> {
    // SAFETY: no arguments; the environment is up when the module runs.
    let (here, first) = unsafe {
        (
            sys::spdk_env_get_current_core(),
            sys::spdk_env_get_first_core(),
        )
    };
    let next = |core: &u32| {
        // SAFETY: takes a number; what follows the last core is UINT32_MAX.
        let core = unsafe { sys::spdk_env_get_next_core(*core) };
        (core != u32::MAX).then_some(core)
    };
    std::iter::successors((first != u32::MAX).then_some(first), next)
        .filter(move |core| *core != here)
}

/// A new SPDK thread, for this core.
fn thread_on(core: u32) -> Option<ptr::NonNull<sys::spdk_thread>> {
    // SAFETY: the set is made, used and freed here, and not used if there is none; the thread copies set and name.
    let thread = unsafe {
        let cores = sys::spdk_cpuset_alloc();
        if cores.is_null() {
            return None;
        }
        sys::spdk_cpuset_set_cpu(cores, core, true);
        let thread = sys::spdk_thread_create(c"pcache_recovery".as_ptr(), cores);
        sys::spdk_cpuset_free(cores);
        thread
    };
    ptr::NonNull::new(thread)
}

/// The first message of a helper's thread.
unsafe extern "C" fn begin(arg: *mut c_void) {
    let helper = arg.cast::<Helper>();
    // SAFETY: registered on this thread; `leave` drops the poller before the helper goes.
    let poller = unsafe { Poller::register(poll, arg, 0, c"pcache_recovery") };
    if poller.is_none() {
        // SAFETY: `start_on` handed it over, and no poller has it.
        return unsafe { leave(helper) };
    }
    // SAFETY: it lives until `leave`, on this thread.
    *unsafe { &*helper }.poller.borrow_mut() = poller;
}

unsafe extern "C" fn poll(arg: *mut c_void) -> c_int {
    let helper = arg.cast::<Helper>();
    let work = {
        // SAFETY: `begin` registered this with a helper that lives until `leave`, which only this thread calls.
        let helper = unsafe { &*helper };
        guard(
            Work::Over,
            || helper.poll(),
            |_| {
                helper.counted.0.failed.store(true, Ordering::Release);
                Work::Over
            },
        )
    };
    match work {
        Work::Done => Polled::Busy.code(),
        Work::Nothing => Polled::Idle.code(),
        Work::Over => {
            // SAFETY: as above, and the reference is gone.
            unsafe { leave(helper) };
            Polled::Busy.code()
        }
    }
}

/// Ends a helper and its thread.
///
/// # Safety
/// Called once, on the helper's thread, while nothing refers to it.
unsafe fn leave(helper: *mut Helper) {
    // SAFETY: made by `Box::into_raw` in `start_on`, and given back once by the contract of this function.
    let helper = unsafe { Box::from_raw(helper) };
    let poller = helper.poller.borrow_mut().take();
    drop(poller);
    drop(helper);
    // SAFETY: this is the current thread's own context; it has no poller and no channel left.
    unsafe { sys::spdk_thread_exit(sys::spdk_get_thread()) };
}

/// Tells the log how far a recovery is.
#[derive(Debug)]
pub(super) struct Watch {
    began: Now,
    told: Now,
    worker_count: u32,
}

impl Watch {
    /// It begins.
    pub(super) fn begin(name: &str, progress: RecoveryProgress, worker_count: u32) -> Self {
        let segments = progress.segments_total;
        log::info!("{name}: recovering {segments} segments on {worker_count} cores");
        let now = now();
        Self {
            began: now,
            told: now,
            worker_count,
        }
    }

    /// It goes on.
    pub(super) fn tell(&mut self, name: &str, progress: RecoveryProgress) {
        let now = now();
        if now.since_ns(self.told) >= LOG_INTERVAL_NS {
            self.told = now;
            let RecoveryProgress {
                segments_scanned,
                segments_total,
                keys,
            } = progress;
            log::info!(
                "{name}: recovering: {segments_scanned} of {segments_total} segments, {keys} keys"
            );
        }
    }

    /// It has ended.
    pub(super) fn end(&self, name: &str, progress: RecoveryProgress) {
        let ns = now().since_ns(self.began);
        log::info!(
            "{name}: recovered {} keys from {} segments in {} ms on {} cores, {} keys/s",
            progress.keys,
            progress.segments_total,
            ns / NS_PER_MS,
            self.worker_count,
            u128::from(progress.keys) * u128::from(NS_PER_S) / u128::from(ns.max(1))
        );
    }
}
