//! Looks for base bdevs that turn up without being examined by the name that a cache waits for. SPDK gives some of them
//! that name, an alias like `lvs0/lvol0`, behind their examination only; it examines none at all if it is told so
//! (`bdev_set_options`); and it tells nobody of a claim that is given back. So whatever waits is looked at now and then, and so
//! is what could not be opened for a reason that may pass.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::ptr;

use super::{EntryId, Phase, State, try_attach, with, with_entry};
use crate::retry::{Pause, may_pass};
use crate::rpc::RpcError;
use crate::spdk::base::{Seen, c_string};
use crate::spdk::thread::{AppCell, Polled, Poller, now};
use crate::spdk::trampoline::guard;
use crate::units::Now;

/// How often whatever waits is looked at.
const LOOK_US: u64 = 1_000_000;

/// Why a base that is there was not had. It is not tried again before that has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// Until another base is there.
    ForGood,
    /// Somebody else has claimed it: until a cache has given its base back.
    Claimed,
    /// Nobody has to do anything about it: until then, after a pause.
    Passing { until: Now, pause: Pause },
}

/// A cache that could not be opened.
#[derive(Debug)]
struct Refusal {
    id: EntryId,
    /// The base that was there then.
    base: Option<Seen>,
    why: Why,
}

impl Refusal {
    /// Whether there is reason to try this base.
    fn is_over(&self, base: Seen) -> bool {
        let has_passed = match self.why {
            Why::ForGood | Why::Claimed => false,
            Why::Passing { until, .. } => now() >= until,
        };
        has_passed || self.base != Some(base)
    }
}

#[derive(Debug)]
struct Look {
    refusals: Vec<Refusal>,
    poller: Option<Poller>,
}

static LOOK: AppCell<RefCell<Look>> = AppCell::new(RefCell::new(Look {
    refusals: Vec::new(),
    poller: None,
}));

/// Begins to look.
pub(super) fn start() {
    // SAFETY: the function takes no argument.
    let poller = unsafe { Poller::register(poll, ptr::null_mut(), LOOK_US, c"pcache_look") };
    if poller.is_none() {
        log::warn!(
            "no poller to look for base bdevs with: caches come with their examination only"
        );
    }
    LOOK.get().borrow_mut().poller = poller;
}

/// Looks no more.
pub(super) fn stop() {
    let before = LOOK.get().replace(Look {
        refusals: Vec::new(),
        poller: None,
    });
    drop(before);
}

/// A cache that waits could not be opened.
pub(super) fn note_failed(id: EntryId, error: &RpcError) {
    // There may be another one by now: it was let go of before the cache device was unmapped.
    let base = with_entry(id, |entry| entry.tried).flatten();
    let mut look = LOOK.get().borrow_mut();
    let before = look.refusals.iter().position(|before| before.id == id);
    let before = before.map(|index| look.refusals.swap_remove(index));
    let why = match -error.code {
        libc::EPERM => Why::Claimed,
        errno if may_pass(errno) => {
            let pause = match before {
                Some(Refusal {
                    base: same,
                    why: Why::Passing { pause, .. },
                    ..
                }) if same == base => pause.next(),
                _ => Pause::FIRST,
            };
            let until = pause.end(now());
            Why::Passing { until, pause }
        }
        _ => Why::ForGood,
    };
    look.refusals.push(Refusal { id, base, why });
}

/// A cache is there, or has gone.
pub(super) fn note_done(id: EntryId) {
    let mut look = LOOK.get().borrow_mut();
    look.refusals.retain(|refusal| refusal.id != id);
}

/// A base was closed: it may be what another cache waits for.
pub(in crate::spdk) fn on_base_closed() {
    let mut look = LOOK.get().borrow_mut();
    look.refusals.retain(|refusal| refusal.why != Why::Claimed);
}

/// Whether there is no reason to try this base.
fn is_refused(id: EntryId, base: Seen) -> bool {
    let look = LOOK.get().borrow();
    let refusal = look.refusals.iter().find(|refusal| refusal.id == id);
    refusal.is_some_and(|refusal| !refusal.is_over(base))
}

fn look() {
    let waiting: Vec<_> = with(|registry| {
        let running = registry.phase == Phase::Running;
        let waiting = registry
            .entries
            .iter()
            .filter(|entry| running && matches!(entry.state, State::Waiting { .. }));
        waiting
            .map(|entry| (entry.id, c_string(&entry.definition.base_bdev_name)))
            .collect()
    });
    for (id, name) in waiting {
        match Seen::named(&name) {
            None => note_done(id),
            Some(base) if is_refused(id, base) => {}
            Some(_) if with_entry(id, |_| ()).is_some() => try_attach(id),
            Some(_) => {}
        }
    }
}

unsafe extern "C" fn poll(_: *mut c_void) -> c_int {
    guard((), look, |_| ());
    Polled::Idle.code()
}
