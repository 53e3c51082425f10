//! From a definition to an open base: at once, when the base turns up, or when nobody looks at it any more.
//!
//! Whoever registers a bdev has SPDK's modules examine it, and some of them open it for writing meanwhile, while the cache
//! has to be its only writer. So a base that is in use is tried again when all examinations have ended, and for a second from
//! then on: whoever has examined a bdev may close it a moment after saying that it is done. Examinations end with their
//! reads; SPDK itself waits for them without a limit.

use std::ffi::{c_int, c_void};
use std::mem;

use spdk_sys as sys;

use super::{
    Entry, EntryId, Phase, State, creation_failed, ending, is_shutting_down, set_state, wait, with,
    with_entry,
};
use crate::rpc::{Definition, RpcError};
use crate::spdk::base::{Base, OpenBaseError, Seen, c_string};
use crate::spdk::create::Creation;
use crate::spdk::json::{Json, Request};
use crate::spdk::thread::{Polled, Poller};
use crate::spdk::trampoline::guard;

/// Why a cache is not there yet.
pub(super) const AWAITS_EXAMINATIONS: &str = "waiting until new bdevs have been examined";

/// The pauses between attempts to get a base that was examined: the first, and the longest. Together they are a second.
const PAUSE_US_MIN: u64 = 2_000;
const PAUSE_US_MAX: u64 = 512_000;

/// How often a base was found to be in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    First,
    /// All examinations have ended.
    Examined,
    /// The same, and so long ago as the last pause.
    Paused(u64),
}

impl Attempt {
    /// The pause before the next one, if this has failed and there is another.
    fn pause_us(self) -> Option<u64> {
        match self {
            Attempt::First | Attempt::Examined => Some(PAUSE_US_MIN),
            Attempt::Paused(pause_us) => Some(pause_us * 2).filter(|next| *next <= PAUSE_US_MAX),
        }
    }
}

/// A cache whose base is in use, perhaps by somebody who examines it.
#[derive(Debug)]
pub(super) struct Awaiting {
    /// Who waits for the cache, if anybody does.
    pub(super) request: Option<Request>,
    attempt: Attempt,
    /// For the end of a pause.
    _poller: Option<Poller>,
}

/// `bdev_pcache_create`. Answers when the cache is there, or at once if its base is missing.
pub(in crate::spdk) fn create(definition: Definition, request: Request) {
    if let Err(error) = check_new(&definition) {
        return request.answer(Err(error));
    }
    let base_name = definition.base_bdev_name.clone();
    let id = with(|registry| {
        let id = EntryId(registry.next_id);
        registry.next_id += 1;
        let state = State::Waiting {
            why: waits_for(&base_name),
        };
        registry.entries.push(Entry {
            id,
            definition,
            state,
            pending_since: None,
            dirty_bytes: None,
            tried: None,
        });
        id
    });
    open_base(id, Some(request), Attempt::First);
}

/// A cache that waits for its base, which may be there now.
pub(super) fn try_attach(id: EntryId) {
    open_base(id, None, Attempt::First);
}

/// Opens the base of a cache that is not being opened yet, if it is there, and lets `request` be answered when the cache is.
fn open_base(id: EntryId, request: Option<Request>, attempt: Attempt) {
    let names = with_entry(id, |entry| {
        let base_name = entry.definition.base_bdev_name.clone();
        (entry.definition.name.clone(), base_name)
    });
    let Some((name, base_name)) = names else {
        return;
    };
    let base = Seen::named(&c_string(&base_name));
    with_entry(id, |entry| entry.tried = base);
    match Base::open(&base_name, &name, id) {
        Ok(base) => attach(id, base, request),
        Err(OpenBaseError::Missing) => {
            let why = waits_for(&base_name);
            if let Some(request) = request {
                log::info!("{name}: {why}");
                request.answer(Ok(Json::of(&name)));
            }
            wait(id, why);
        }
        Err(OpenBaseError::InUse(error)) => await_base(id, request, attempt, error),
        Err(OpenBaseError::Refused(error)) => creation_failed(id, error, request),
    }
}

/// The base is in use: tries again later, or gives up with this error.
fn await_base(id: EntryId, request: Option<Request>, attempt: Attempt, error: RpcError) {
    let Some(pause_us) = attempt.pause_us() else {
        return creation_failed(id, error, request);
    };
    if attempt == Attempt::First {
        set_awaiting(id, request, Attempt::Examined, None);
        // SAFETY: `id` stands for the entry as a mere number, which may be gone when the call comes: later, on this thread.
        let rc = unsafe { sys::spdk_bdev_wait_for_examine(Some(on_examined), id.as_ctx()) };
        if rc != 0 {
            go_on(id);
        }
        return;
    }
    // SAFETY: as above; the poller goes with the state of the entry.
    let poller = unsafe { Poller::register(on_pause, id.as_ctx(), pause_us, c"pcache_await_base") };
    if poller.is_none() {
        return creation_failed(id, error, request);
    }
    set_awaiting(id, request, Attempt::Paused(pause_us), poller);
}

fn set_awaiting(id: EntryId, request: Option<Request>, attempt: Attempt, poller: Option<Poller>) {
    let awaiting = Awaiting {
        request,
        attempt,
        _poller: poller,
    };
    set_state(id, State::Awaiting(awaiting));
}

unsafe extern "C" fn on_examined(ctx: *mut c_void) {
    guard((), || go_on(EntryId::from_ctx(ctx)), |_| ());
}

unsafe extern "C" fn on_pause(ctx: *mut c_void) -> c_int {
    guard((), || go_on(EntryId::from_ctx(ctx)), |_| ());
    Polled::Busy.code()
}

/// It is time for the next attempt. The cache may have been deleted meanwhile.
fn go_on(id: EntryId) {
    let found = with_entry(id, |entry| match &mut entry.state {
        State::Awaiting(awaiting) => Some((awaiting.request.take(), awaiting.attempt)),
        _ => None,
    });
    if let Some((request, attempt)) = found.flatten() {
        open_base(id, request, attempt);
    }
}

/// The application ends: nobody is going to try again.
pub(super) fn give_up_awaiting() {
    let awaiting: Vec<_> = with(|registry| {
        let states = registry.entries.iter_mut().map(|entry| &mut entry.state);
        let why = "the application is ending".to_owned();
        let awaiting = states.filter(|state| matches!(state, State::Awaiting(_)));
        awaiting
            .map(|state| mem::replace(state, State::Waiting { why: why.clone() }))
            .collect()
    });
    for state in awaiting {
        if let State::Awaiting(Awaiting {
            request: Some(request),
            ..
        }) = state
        {
            request.answer(Err(ending()));
        }
    }
}

pub(super) fn waits_for(base_name: &str) -> String {
    format!("waiting for the base bdev {base_name}")
}

/// Whether there is room for another cache of this name on this cache device.
fn check_new(definition: &Definition) -> Result<(), RpcError> {
    if is_shutting_down() {
        return Err(ending());
    }
    let name = &definition.name;
    with(|registry| {
        for entry in &registry.entries {
            let other = &entry.definition;
            if other.name == *name {
                return Err(RpcError::errno(
                    libc::EEXIST,
                    format!("there is a cache {name} already"),
                ));
            }
            if other.collides_with(definition) {
                let path = definition.cache_path.display();
                let message = format!(
                    "cache_path {path} belongs to the cache {} already: {} is wanted, {} is taken",
                    other.name,
                    definition.extent_text(),
                    other.extent_text()
                );
                return Err(RpcError::errno(libc::EEXIST, message));
            }
        }
        Ok(())
    })?;
    check_no_bdev(name)
}

fn check_no_bdev(name: &str) -> Result<(), RpcError> {
    let c_name = c_string(name);
    // SAFETY: the name is only read; the result is only compared.
    if unsafe { sys::spdk_bdev_get_by_name(c_name.as_ptr()).is_null() } {
        return Ok(());
    }
    Err(RpcError::errno(
        libc::EEXIST,
        format!("there is a bdev {name} already"),
    ))
}

/// The base is there: the cache is opened.
fn attach(id: EntryId, base: Base, request: Option<Request>) {
    let Some(definition) = with_entry(id, |entry| entry.definition.clone()) else {
        return;
    };
    // It may have been free when the cache began to wait.
    if let Err(error) = check_no_bdev(&definition.name) {
        return creation_failed(id, error, request);
    }
    match Creation::start(id, definition, base, request) {
        Ok(creation) => set_state(id, State::Creating(creation)),
        Err((error, request)) => creation_failed(id, error, request),
    }
}

/// A new bdev: is it what a cache waits for?
pub(in crate::spdk) fn on_examine(bdev: *const sys::spdk_bdev) {
    let waiting: Vec<_> = with(|registry| {
        let running = registry.phase == Phase::Running;
        registry
            .entries
            .iter()
            .filter(|entry| running && matches!(entry.state, State::Waiting { .. }))
            .map(|entry| (entry.id, c_string(&entry.definition.base_bdev_name)))
            .collect()
    });
    for (id, c_name) in waiting {
        // SAFETY: the bdev exists during its examination; both are only read.
        if unsafe { sys::pcache_bdev_is_called(bdev, c_name.as_ptr()) } {
            try_attach(id);
        }
    }
}
