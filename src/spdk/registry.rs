//! The caches that were asked for: waiting for their base, being opened, in use, or being closed. App thread
//! only. No borrow of the registry is held while SPDK or another module of ours is called.

mod attach;
mod config;
mod look;

use std::borrow::Cow;
use std::cell::RefCell;
use std::ffi::c_void;
use std::rc::Rc;
use std::sync::Arc;

use serde::Serialize;
use spdk_sys as sys;

use super::base::Seen;
use super::create::Creation;
use super::json::{Json, Request};
use super::node::{Description, Node};
use super::remove::{self, After};
use super::thread::{AppCell, now};
use super::watch;
use crate::recovery::RecoveryProgress;
use crate::rpc::{Definition, Drain, RpcError};
use crate::units::{NS_PER_S, Now};
use attach::{AWAITS_EXAMINATIONS, Awaiting, give_up_awaiting, try_attach, waits_for};
pub(super) use attach::{create, on_examine};
pub(super) use config::{config_of, configs_without_bdev};
pub(super) use look::on_base_closed;

/// Names an entry; never used twice. Callbacks that may come late carry it instead of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EntryId(usize);

impl EntryId {
    pub(super) fn as_ctx(self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0)
    }

    pub(super) fn from_ctx(ctx: *mut c_void) -> Self {
        Self(ctx.addr())
    }
}

#[derive(Debug)]
enum State {
    /// For the base bdev, or for somebody to mend what is wrong.
    Waiting {
        why: String,
    },
    /// For a base that is in use, until those who examine it are done.
    Awaiting(Awaiting),
    Creating(Rc<Creation>),
    Online(Arc<Node>),
    Closing {
        stays: bool,
        /// Who has deleted it since, and waits for the end.
        deleters: Vec<Request>,
    },
}

#[derive(Debug)]
struct Entry {
    id: EntryId,
    definition: Definition,
    state: State,
    /// It was told that the cache waits, and nothing since.
    pending_since: Option<Now>,
    /// When it was last in use, the log held so much that the base lacks.
    dirty_bytes: Option<u64>,
    /// The base that was there when it was last tried to open the cache.
    tried: Option<Seen>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// The application ends. SPDK has not come to the bdevs yet: others may still use the caches.
    Stopping,
    /// SPDK has come to the bdevs, and waits for our word.
    Ending,
    /// The word was given.
    Ended,
}

#[derive(Debug)]
struct Registry {
    entries: Vec<Entry>,
    next_id: usize,
    phase: Phase,
}

static REGISTRY: AppCell<RefCell<Registry>> = AppCell::new(RefCell::new(Registry {
    entries: Vec::new(),
    next_id: 1,
    phase: Phase::Running,
}));

/// Looks at the registry, or changes it. `body` calls nothing outside.
fn with<R>(body: impl FnOnce(&mut Registry) -> R) -> R {
    body(&mut REGISTRY.get().borrow_mut())
}

fn with_entry<R>(id: EntryId, body: impl FnOnce(&mut Entry) -> R) -> Option<R> {
    with(|registry| {
        registry
            .entries
            .iter_mut()
            .find(|entry| entry.id == id)
            .map(body)
    })
}

fn set_state(id: EntryId, state: State) {
    // What was there before may call SPDK when dropped: not under the borrow.
    let before = with_entry(id, |entry| std::mem::replace(&mut entry.state, state));
    drop(before);
}

/// The cache is not in use from now on, and why. Told once.
fn wait(id: EntryId, why: String) {
    set_state(id, State::Waiting { why });
    let name = with_entry(id, |entry| {
        let is_news = entry.pending_since.is_none();
        entry.pending_since.get_or_insert_with(now);
        is_news.then(|| entry.definition.name.clone())
    });
    if let Some(name) = name.flatten() {
        watch::tell_pending(&name);
    }
}

fn forget(id: EntryId) {
    let entry = with(|registry| {
        let index = registry.entries.iter().position(|entry| entry.id == id)?;
        Some(registry.entries.remove(index))
    });
    drop(entry);
    look::note_done(id);
}

/// Whether the application is ending.
pub(super) fn is_shutting_down() -> bool {
    with(|registry| registry.phase != Phase::Running)
}

/// Whether SPDK goes through all bdevs and takes them away. One that is on its way out already it would take from its list
/// twice.
pub(super) fn bdevs_are_being_taken() -> bool {
    with(|registry| registry.phase == Phase::Ended)
}

/// The module starts (again).
pub(super) fn start() {
    with(|registry| registry.phase = Phase::Running);
    look::start();
}

/// The cache could not be opened. Somebody who waits for it is told, and the definition is gone; a cache
/// that was opened because its base turned up keeps waiting, and says why.
pub(super) fn creation_failed(id: EntryId, error: RpcError, request: Option<Request>) {
    match request {
        Some(request) => {
            forget(id);
            request.answer(Err(error));
        }
        None => {
            let name = with_entry(id, |entry| entry.definition.name.clone()).unwrap_or_default();
            log::error!("{name}: {error}");
            look::note_failed(id, &error);
            wait(id, error.message);
        }
    }
    end_if_idle();
}

/// The cache is open; its bdev is about to be registered.
pub(super) fn created(id: EntryId, node: &Arc<Node>) {
    look::note_done(id);
    set_state(id, State::Online(Arc::clone(node)));
}

/// Its bdev is registered. Without one the cache might have to be made anew.
pub(super) fn registered(id: EntryId, node: &Node) {
    let info = node.cache.info();
    let was_pending = with_entry(id, |entry| {
        entry.definition.settle(&info);
        entry.pending_since.take()
    });
    if was_pending.flatten().is_some() {
        watch::tell_online(&node.name);
    }
}

/// The cache is being closed.
pub(super) fn set_closing(id: EntryId, after: &After) {
    let (stays, deleters) = (after.stays(), Vec::new());
    set_state(id, State::Closing { stays, deleters });
}

/// The cache is closed, with so much in its log that the base lacks.
pub(super) fn closed(id: EntryId, dirty_bytes: u64) {
    with_entry(id, |entry| entry.dirty_bytes = Some(dirty_bytes));
}

/// Nothing is left of the cache.
pub(super) fn removed(id: EntryId, after: After) {
    let deleters = with_entry(id, |entry| match &mut entry.state {
        State::Closing { deleters, .. } => std::mem::take(deleters),
        _ => Vec::new(),
    });
    let deleters = deleters.unwrap_or_default();
    let is_deleted = !deleters.is_empty();
    match after {
        After::WaitForBase if !is_deleted && !is_shutting_down() => wait_again(id),
        After::Refuse(error, request) if !is_deleted || request.is_some() => {
            creation_failed(id, error, request);
        }
        After::WaitForBase | After::Forget | After::Refuse(..) => {
            forget(id);
            end_if_idle();
        }
    }
    for request in deleters {
        request.answer(Ok(Json::yes()));
    }
}

/// A cache was closed because its base has gone, which may have come back meanwhile.
fn wait_again(id: EntryId) {
    let base_name = with_entry(id, |entry| entry.definition.base_bdev_name.clone());
    if let Some(base_name) = base_name {
        wait(id, waits_for(&base_name));
        try_attach(id);
    }
}

/// Whether the examination of the bdev is to wait until the cache in front of it is there (or failed), so
/// that whatever is configured afterwards finds it.
pub(super) fn holds_examination(bdev: *const sys::spdk_bdev) -> bool {
    let creations = creations();
    !is_shutting_down()
        && creations
            .iter()
            .any(|creation| creation.hold_examination(bdev))
}

fn creations() -> Vec<Rc<Creation>> {
    with(|registry| {
        let creating = registry
            .entries
            .iter()
            .filter_map(|entry| match &entry.state {
                State::Creating(creation) => Some(Rc::clone(creation)),
                _ => None,
            });
        creating.collect()
    })
}

fn nodes() -> Vec<Arc<Node>> {
    with(|registry| {
        let online = registry
            .entries
            .iter()
            .filter_map(|entry| match &entry.state {
                State::Online(node) => Some(Arc::clone(node)),
                _ => None,
            });
        online.collect()
    })
}

/// SPDK takes the base bdev away.
pub(super) fn on_base_removed(id: EntryId) {
    if let Some(node) = node_of(id) {
        return remove::on_base_gone(&node);
    }
    let creation = creations().into_iter().find(|creation| creation.id == id);
    if let Some(creation) = creation {
        creation.cancel(RpcError::errno(
            libc::ENODEV,
            "the base bdev was removed meanwhile",
        ));
    }
}

/// The base bdev has another size now. A cache follows one that has grown.
pub(super) fn on_base_resized(id: EntryId) {
    let Some(node) = node_of(id) else { return };
    if let Err(error) = node.cache.grow(node.base.block_count_now()) {
        log::error!("{}: {error}", node.name);
    }
}

fn node_of(id: EntryId) -> Option<Arc<Node>> {
    with_entry(id, |entry| match &entry.state {
        State::Online(node) => Some(Arc::clone(node)),
        _ => None,
    })
    .flatten()
}

/// The cache of this name, which must be in use.
pub(super) fn online(name: &str) -> Result<Arc<Node>, RpcError> {
    let found = with(|registry| {
        let entry = registry
            .entries
            .iter()
            .find(|entry| entry.definition.name == name)?;
        Some(match &entry.state {
            State::Online(node) => Ok(Arc::clone(node)),
            State::Waiting { why } => Err(format!("the cache {name} is not in use: {why}")),
            State::Awaiting(_) => Err(format!("the cache {name} is {AWAITS_EXAMINATIONS}")),
            State::Creating(_) => Err(format!("the cache {name} is still being opened")),
            State::Closing { .. } => Err(format!("the cache {name} is being closed")),
        })
    });
    match found {
        None => Err(no_such(name)),
        Some(Err(message)) => Err(RpcError::errno(libc::ENXIO, message)),
        Some(Ok(node)) => Ok(node),
    }
}

fn no_such(name: &str) -> RpcError {
    RpcError::errno(libc::ENODEV, format!("there is no cache {name}"))
}

/// All caches in use, in the order of their creation.
pub(super) fn all_online() -> Vec<Arc<Node>> {
    nodes()
}

/// `bdev_pcache_delete`, whatever state the cache is in.
pub(super) fn delete(name: &str, drain: Drain, request: Request) {
    // A drain would keep the application from ending, and `remove::on_shutdown` has given up those before.
    if bdevs_are_being_taken() || is_shutting_down() && drain == Drain::Yes {
        return request.answer(Err(ending()));
    }
    enum Found {
        /// And why.
        Waiting(EntryId, String),
        Awaiting(EntryId, Option<Request>),
        Creating(Rc<Creation>),
        /// What is being opened, or is going to be, cannot be drained.
        Opening,
        Online(Arc<Node>),
        Closing(EntryId),
    }
    let found = with(|registry| {
        let entry = registry
            .entries
            .iter_mut()
            .find(|entry| entry.definition.name == name)?;
        Some(match &mut entry.state {
            State::Waiting { why } => Found::Waiting(entry.id, why.clone()),
            State::Awaiting(_) | State::Creating(_) if drain == Drain::Yes => Found::Opening,
            State::Awaiting(awaiting) => Found::Awaiting(entry.id, awaiting.request.take()),
            State::Creating(creation) => Found::Creating(Rc::clone(creation)),
            State::Online(node) => Found::Online(Arc::clone(node)),
            State::Closing { .. } => Found::Closing(entry.id),
        })
    });
    match found {
        None => request.answer(Err(no_such(name))),
        Some(Found::Waiting(id, _)) if drain == Drain::No => {
            forget(id);
            request.answer(Ok(Json::yes()));
        }
        Some(Found::Awaiting(id, creator)) => {
            forget(id);
            if let Some(creator) = creator {
                creator.answer(Err(deleted_meanwhile(name)));
            }
            request.answer(Ok(Json::yes()));
        }
        Some(Found::Waiting(_, why)) => request.answer(Err(RpcError::errno(
            libc::ENXIO,
            format!("the cache {name} cannot be drained, it is not in use: {why}"),
        ))),
        Some(Found::Creating(creation)) => creation.delete(request),
        Some(Found::Opening) => request.answer(Err(RpcError::errno(
            libc::EBUSY,
            format!("the cache {name} cannot be drained: it is still being opened"),
        ))),
        Some(Found::Online(node)) => remove::delete(&node, drain, request),
        Some(Found::Closing(id)) if drain == Drain::No => forget_when_closed(id, request),
        Some(Found::Closing(_)) => request.answer(Err(RpcError::errno(
            libc::EBUSY,
            format!("the cache {name} is being closed already"),
        ))),
    }
}

/// A cache that is being closed is not to come back; `request` is answered when it is closed.
fn forget_when_closed(id: EntryId, request: Request) {
    with_entry(id, |entry| {
        if let State::Closing { stays, deleters } = &mut entry.state {
            *stays = false;
            deleters.push(request);
        }
    });
}

/// What the creator of a cache is told that was deleted before it was there.
pub(super) fn deleted_meanwhile(name: &str) -> RpcError {
    let message = format!("{name} was deleted while it was being opened");
    RpcError::errno(libc::ECANCELED, message)
}

/// A creation was cancelled by a delete.
pub(super) fn creation_deleted(id: EntryId) {
    forget(id);
    end_if_idle();
}

/// All caches, or the one of this name, in whatever state.
pub(super) fn describe(name: Option<&str>) -> Result<Json, RpcError> {
    let wanted = |entry: &&Entry| name.is_none_or(|name| entry.definition.name == name);
    with(|registry| {
        let found: Vec<_> = registry
            .entries
            .iter()
            .filter(wanted)
            .map(describe_one)
            .collect();
        match name {
            Some(name) if found.is_empty() => Err(no_such(name)),
            _ => Ok(Json::of(&found)),
        }
    })
}

/// A cache in whatever state.
#[derive(Serialize)]
#[serde(untagged)]
enum Described<'a> {
    Online(Box<Description<'a>>),
    Other {
        name: &'a str,
        base_bdev_name: &'a str,
        cache_path: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        cache_offset_mib: Option<u64>,
        state: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<Cow<'a, str>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        state_age_s: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        dirty_bytes: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        percent: Option<u64>,
        #[serde(flatten)]
        recovery: Option<DescribedRecovery>,
    },
}

/// How far a recovery is.
#[derive(Serialize)]
struct DescribedRecovery {
    recovery_percent: u64,
    segments_scanned: u32,
    segments_total: u32,
    keys: u64,
}

impl From<RecoveryProgress> for DescribedRecovery {
    fn from(progress: RecoveryProgress) -> Self {
        let (done, total) = (progress.segments_scanned, progress.segments_total);
        Self {
            recovery_percent: u64::from(done) * 100 / u64::from(total.max(1)),
            segments_scanned: done,
            segments_total: total,
            keys: progress.keys,
        }
    }
}

fn describe_one(entry: &Entry) -> Described<'_> {
    let mut recovery = None;
    let pending_since = entry.pending_since;
    let mut state_age_s = None;
    let pending_age_s = pending_since.map(|since| now().since_ns(since) / NS_PER_S);
    let (state, reason, percent) = match &entry.state {
        State::Online(node) => return Described::Online(Box::new(node.describe())),
        State::Waiting { why } => {
            state_age_s = pending_age_s;
            ("pending", Some(Cow::from(why)), None)
        }
        State::Awaiting(_) => {
            state_age_s = pending_age_s;
            ("pending", Some(Cow::from(AWAITS_EXAMINATIONS)), None)
        }
        State::Creating(creation) => {
            recovery = creation.recovery();
            state_age_s = Some(creation.state_age_s());
            let reason = creation.waits_for().map(Cow::from);
            match recovery {
                Some(_) => ("recovering", reason, None),
                None => ("opening", reason, Some(creation.percent())),
            }
        }
        State::Closing { .. } => ("removing", None, None),
    };
    let definition = &entry.definition;
    let pending_since = pending_since.filter(|_| state == "pending");
    Described::Other {
        name: &definition.name,
        base_bdev_name: &definition.base_bdev_name,
        cache_path: definition.cache_path.to_string_lossy().into_owned(),
        cache_offset_mib: definition.cache_offset_mib,
        state,
        reason,
        state_age_s,
        dirty_bytes: pending_since.and(entry.dirty_bytes),
        percent,
        recovery: recovery.map(DescribedRecovery::from),
    }
}

/// What is refused while the application ends is told this.
fn ending() -> RpcError {
    RpcError::errno(libc::ESHUTDOWN, "the application is ending")
}

/// The application begins to end. SPDK comes to the bdevs when it is done with what uses them, and not before all examinations
/// have ended: what holds one, or would begin now, is given up.
pub(super) fn stop_opening() {
    with(|registry| registry.phase = Phase::Stopping);
    for creation in creations() {
        creation.cancel(ending());
        creation.release_examination();
    }
    give_up_awaiting();
}

/// The application ends. SPDK goes on when `end_if_idle` gives the word.
pub(super) fn shut_down() {
    with(|registry| registry.phase = Phase::Ending);
    for creation in creations() {
        creation.cancel(ending());
    }
    give_up_awaiting();
    for node in nodes() {
        remove::on_shutdown(&node);
    }
    end_if_idle();
}

/// While the application ends: once nothing is being opened or closed, the bdevs can go.
fn end_if_idle() {
    let ends_now = with(|registry| {
        let busy = |entry: &Entry| match &entry.state {
            State::Waiting { .. } | State::Awaiting(_) => false,
            State::Creating(_) | State::Closing { .. } => true,
            // One that is staying is SPDK's to unregister.
            State::Online(node) => !remove::is_staying(node),
        };
        let ends = registry.phase == Phase::Ending && !registry.entries.iter().any(busy);
        if ends {
            registry.phase = Phase::Ended;
        }
        ends
    });
    if ends_now {
        // SAFETY: SPDK called fini_start and waits for this; it is said once per `shut_down`.
        unsafe { sys::spdk_bdev_module_fini_start_done() }
    }
}

/// The module ends: no bdev is left.
pub(super) fn clear() {
    look::stop();
    let entries = with(|registry| std::mem::take(&mut registry.entries));
    drop(entries);
}
