//! Looks for base bdevs that turn up without being examined by the name that a cache waits for. SPDK gives some of them
//! that name, an alias like `lvs0/lvol0`, behind their examination only; it examines none at all if it is told so
//! (`bdev_set_options`); and it tells nobody of a claim that is given back. So whatever waits is looked at now and then.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::ptr;

use spdk_sys as sys;

use super::{EntryId, Phase, State, try_attach, with, with_entry};
use crate::rpc::RpcError;
use crate::spdk::base::c_string;
use crate::spdk::thread::{AppCell, Polled, Poller};
use crate::spdk::trampoline::guard;

/// How often whatever waits is looked at.
const LOOK_US: u64 = 1_000_000;

/// Why a base that is there was not had. It is not tried again before that has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refused {
    /// Until the base is there anew.
    ForGood,
    /// Somebody else has claimed it: until a cache has given its base back.
    Claimed,
}

#[derive(Debug)]
struct Look {
    refused: Vec<(EntryId, Refused)>,
    poller: Option<Poller>,
}

static LOOK: AppCell<RefCell<Look>> = AppCell::new(RefCell::new(Look {
    refused: Vec::new(),
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
        refused: Vec::new(),
        poller: None,
    });
    drop(before);
}

/// A cache that waits could not be opened.
pub(super) fn note_failed(id: EntryId, error: &RpcError) {
    let why = if error.code == -libc::EPERM {
        Refused::Claimed
    } else {
        Refused::ForGood
    };
    note_done(id);
    LOOK.get().borrow_mut().refused.push((id, why));
}

/// A cache is there, or has gone.
pub(super) fn note_done(id: EntryId) {
    let mut look = LOOK.get().borrow_mut();
    look.refused.retain(|(other, _)| *other != id);
}

/// A base was closed: it may be what another cache waits for.
pub(in crate::spdk) fn on_base_closed() {
    let mut look = LOOK.get().borrow_mut();
    look.refused.retain(|(_, why)| *why != Refused::Claimed);
}

fn is_refused(id: EntryId) -> bool {
    let look = LOOK.get().borrow();
    look.refused.iter().any(|(other, _)| *other == id)
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
    for (id, c_name) in waiting {
        // SAFETY: the name is only read; the result is only compared.
        if unsafe { sys::spdk_bdev_get_by_name(c_name.as_ptr()).is_null() } {
            note_done(id);
        } else if !is_refused(id) && with_entry(id, |_| ()).is_some() {
            try_attach(id);
        }
    }
}

unsafe extern "C" fn poll(_: *mut c_void) -> c_int {
    guard((), look, |_| ());
    Polled::Idle.code()
}
