//! From a cache in use to nothing left of it in this process: deleted by RPC, its base removed, or the
//! application ending. The cache device keeps whatever is not on the base, in every case.
//!
//! The way: (drain while in use) -> unregister the bdev -> SPDK takes it from its users and destructs it ->
//! (drain the rest) -> wait for base operations -> unregister the io_device -> close the base, unmap on a
//! thread of its own -> tell SPDK and whoever asked.

mod finish;
mod hurry;

use std::ffi::c_void;
use std::mem;
use std::ptr;
use std::sync::Arc;

use spdk_sys as sys;

use super::background::Driver;
use super::base::c_string;
use super::json::Request;
use super::node::Node;
use super::registry;
use super::thread::now;
use super::trampoline::guard;
use crate::engine::Health;
use crate::rpc::{Drain, RpcError};
use crate::units::{NS_PER_MS, NS_PER_S, Now, Seq};
use hurry::Hurry;

/// How often a drain is looked at.
const DRAIN_LOOK_NS: u64 = NS_PER_MS;
/// How long a drain may meet errors without getting on before it is given up.
const DRAIN_PATIENCE_NS: u64 = 30 * NS_PER_S;
/// How long requests may go on once the bdev is unregistered. Those that wait for room, or for the base, are given up then:
/// some users let go of a bdev only when all that they have asked for is done.
const LEAVE_NS: u64 = NS_PER_S;

/// What becomes of the definition when the cache is closed.
#[derive(Debug)]
pub(super) enum After {
    Forget,
    /// The base was removed: the cache comes back with it.
    WaitForBase,
    /// Its bdev was not registered. Who asked for it is told, if anybody did.
    Refuse(RpcError, Option<Request>),
}

impl After {
    /// Whether there is a definition afterwards.
    pub(super) fn stays(&self) -> bool {
        match self {
            Self::Forget | Self::Refuse(_, Some(_)) => false,
            Self::WaitForBase | Self::Refuse(_, None) => true,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// In use.
    Online,
    /// In use, and being drained in order to be deleted.
    Draining { look: Now, patience: Patience },
    /// Unregistered; its users are letting go.
    Leaving { until: Now },
    /// Without users; what they wrote last is being drained.
    FinalDrain { look: Now, patience: Patience },
    /// Waiting for the base operations under way.
    Settling,
    /// The io_device is being unregistered.
    Closing,
}

/// How long a drain has got nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Patience {
    dirty_tail: Seq,
    /// Of write-back: a batch may take long.
    progress: u64,
    since: Now,
}

impl Patience {
    fn new(node: &Node, time: Now) -> Self {
        let driver = node.app.get().driver.borrow();
        Self {
            dirty_tail: node.cache.dirty_tail(),
            progress: driver.as_ref().map_or(0, Driver::progress),
            since: time,
        }
    }

    /// What keeps the drain from getting to its end, if anything has for too long.
    fn ends_with(&mut self, node: &Node, time: Now) -> Option<String> {
        let failing = match node.cache.health() {
            Health::Online => None,
            Health::WritebackFailing(reason) => Some(reason),
            Health::Degraded(reason) | Health::Failed(reason) => return Some(reason),
        };
        let now = Self::new(node, time);
        let stands = (now.dirty_tail, now.progress) == (self.dirty_tail, self.progress);
        if failing.is_none() || !stands {
            *self = now;
        }
        failing.filter(|_| time.since_ns(self.since) >= DRAIN_PATIENCE_NS)
    }
}

/// How far a node is on its way out.
#[derive(Debug)]
pub(super) struct Removal {
    stage: Stage,
    /// When it got to the stage, as it is called for those who look.
    since: Now,
    drain: Drain,
    after: After,
    /// Who waits for the end, and what he was promised.
    requests: Vec<(Request, Drain)>,
    /// What became of the drain.
    outcome: Result<(), RpcError>,
    hurry: Hurry,
}

impl Removal {
    pub(super) fn none() -> Self {
        Self {
            stage: Stage::Online,
            since: Now(0),
            drain: Drain::No,
            after: After::Forget,
            requests: Vec::new(),
            outcome: Ok(()),
            hurry: Hurry::default(),
        }
    }

    fn enter(&mut self, stage: Stage) {
        let name = self.state_name();
        self.stage = stage;
        if self.state_name() != name {
            self.since = now();
        }
    }

    /// For those who look, if there is anything to tell: a state, and for how many seconds it has been so.
    pub(super) fn state(&self) -> Option<(&'static str, u64)> {
        let name = self.state_name()?;
        Some((name, now().since_ns(self.since) / NS_PER_S))
    }

    fn state_name(&self) -> Option<&'static str> {
        match self.stage {
            Stage::Online => None,
            Stage::Draining { .. } => Some("draining"),
            _ => Some("removing"),
        }
    }
}

fn stage(node: &Node) -> Stage {
    node.app.get().removal.borrow().stage
}

fn set_stage(node: &Node, stage: Stage) {
    node.app.get().removal.borrow_mut().enter(stage);
}

/// Whether it is in use and nobody has asked for its end.
pub(super) fn is_staying(node: &Node) -> bool {
    matches!(stage(node), Stage::Online)
}

/// Whether what is dirty can be written back: its base is there, and nobody takes it out of use.
pub(super) fn writes_back(node: &Node) -> bool {
    matches!(stage(node), Stage::Online | Stage::Draining { .. }) && !node.base.is_gone()
}

/// Whether it is being deleted, with or without a bdev yet. One that is drained first may stay.
pub(super) fn is_leaving_for_good(node: &Node) -> bool {
    let removal = node.app.get().removal.borrow();
    let is_leaving = !matches!(removal.stage, Stage::Online | Stage::Draining { .. });
    is_leaving && !removal.after.stays()
}

/// Whether SPDK has no bdev of it any more, and the definition is going to stay.
pub(super) fn stays_without_bdev(node: &Node) -> bool {
    let removal = node.app.get().removal.borrow();
    let has_none = matches!(
        removal.stage,
        Stage::FinalDrain { .. } | Stage::Settling | Stage::Closing
    );
    has_none && removal.after.stays()
}

/// `bdev_pcache_delete` of a cache in use. Answers when nothing is left of it.
pub(super) fn delete(node: &Arc<Node>, drain: Drain, request: Request) {
    match (stage(node), drain) {
        (Stage::Online, Drain::Yes) => {
            if let Some(id) = node.cache.checkpoint_active(now()) {
                let message = format!(
                    "{} cannot be drained: checkpoint {id} keeps the base from being written to; end it first",
                    node.name
                );
                return request.answer(Err(RpcError::errno(libc::EBUSY, message)));
            }
            let (look, patience) = (now(), Patience::new(node, now()));
            let mut removal = node.app.get().removal.borrow_mut();
            removal.drain = Drain::Yes;
            removal.enter(Stage::Draining { look, patience });
            removal.requests.push((request, drain));
            // `false`: one is running already, which is looked at once more when it ends.
            node.cache.drain_start();
        }
        (Stage::Online, Drain::No) => {
            await_end(node, request, drain);
            leave(node, After::Forget);
        }
        (Stage::Draining { .. }, Drain::No) => {
            give_up_drain(node);
            await_end(node, request, drain);
            leave(node, After::Forget);
        }
        (Stage::Draining { .. }, Drain::Yes) => {
            await_end(node, request, drain);
        }
        // It is on its way out already.
        (_, Drain::No) => {
            if matches!(
                stage(node),
                Stage::Leaving { .. } | Stage::FinalDrain { .. }
            ) {
                give_up_drain(node);
            }
            let after = {
                let mut removal = node.app.get().removal.borrow_mut();
                removal.requests.push((request, drain));
                mem::replace(&mut removal.after, After::Forget)
            };
            if let After::Refuse(error, Some(creator)) = after {
                creator.answer(Err(error));
            }
        }
        (_, Drain::Yes) => {
            let mut removal = node.app.get().removal.borrow_mut();
            if removal.drain == Drain::Yes {
                return removal.requests.push((request, drain));
            }
            drop(removal);
            let message = format!(
                "{} cannot be drained: it is being closed without; its dirty data stay on the cache device",
                node.name
            );
            request.answer(Err(RpcError::errno(libc::EBUSY, message)));
        }
    }
}

/// `request` is answered when nothing is left of the cache.
fn await_end(node: &Node, request: Request, drain: Drain) {
    let mut removal = node.app.get().removal.borrow_mut();
    removal.requests.push((request, drain));
}

/// Somebody wants the cache deleted as it is, and whoever waits for a drain is told.
fn give_up_drain(node: &Arc<Node>) {
    let instead = RpcError::errno(
        libc::ECANCELED,
        format!(
            "the drain of {} was given up: it is deleted without",
            node.name
        ),
    );
    give_up(node, &instead);
    if matches!(stage(node), Stage::FinalDrain { .. }) {
        settle(node);
    }
}

/// Takes the bdev from its users. SPDK calls `on_destruct` when they have let go.
fn leave(node: &Arc<Node>, after: After) {
    {
        let mut removal = node.app.get().removal.borrow_mut();
        removal.enter(Stage::Leaving {
            until: Now(now().0 + LEAVE_NS),
        });
        removal.after = after;
    }
    let bdev = node.app.get().bdev.get();
    // SAFETY: the bdev is registered, and this is the first and only unregistration that we ask for; on the
    // app thread.
    unsafe { sys::spdk_bdev_unregister(bdev, None, ptr::null_mut()) }
}

/// The base bdev is being removed. Everything that is dirty stays on the cache device.
pub(super) fn on_base_gone(node: &Arc<Node>) {
    node.base.set_gone();
    stop_background(node);
    let base = &node.base.facts.identity.name;
    log::warn!(
        "{}: the base bdev {base} is removed; the cache keeps its data and comes back with it",
        node.name
    );
    let gone = || base_gone(node);
    match stage(node) {
        // The base waits until SPDK has come to this one.
        Stage::Online if registry::bdevs_are_being_taken() => {}
        Stage::Online => leave(node, After::WaitForBase),
        Stage::Draining { .. } => {
            give_up(node, &gone());
            leave(node, After::WaitForBase);
        }
        Stage::FinalDrain { .. } => {
            fail_drain(node, gone(), After::WaitForBase);
            settle(node);
        }
        // `on_destruct` sees to a drain.
        Stage::Leaving { .. } | Stage::Settling | Stage::Closing => {}
    }
}

fn base_gone(node: &Node) -> RpcError {
    let base = &node.base.facts.identity.name;
    RpcError::errno(
        libc::ENODEV,
        format!(
            "the base bdev {base} was removed; {} keeps its dirty data on the cache device and comes back with it",
            node.name
        ),
    )
}

/// The drain is over, and the base lacks something.
fn fail_drain(node: &Node, why: RpcError, after: After) {
    let mut removal = node.app.get().removal.borrow_mut();
    removal.outcome = Err(why);
    removal.after = after;
}

/// The application ends: a drain is not waited for, since nothing gets lost without.
pub(super) fn on_shutdown(node: &Arc<Node>) {
    match stage(node) {
        Stage::Draining { .. } => {
            give_up(node, &shutdown(node));
            set_stage(node, Stage::Online);
        }
        Stage::FinalDrain { .. } => {
            fail_drain(node, shutdown(node), After::Forget);
            settle(node);
        }
        _ => {}
    }
}

fn shutdown(node: &Node) -> RpcError {
    RpcError::errno(
        libc::ESHUTDOWN,
        format!(
            "the application ends; {} keeps its dirty data on the cache device",
            node.name
        ),
    )
}

/// SPDK: nobody has the bdev open any more.
pub(super) fn on_destruct(node: &Arc<Node>) {
    let drain = {
        let removal = node.app.get().removal.borrow();
        matches!(removal.stage, Stage::Leaving { .. }) && removal.drain == Drain::Yes
    };
    if !drain {
        // Somebody else may have had it unregistered.
        give_up(node, &shutdown(node));
        return settle(node);
    }
    // Without a user nothing gets dirty any more.
    let lacks = node.cache.may_be_dirty();
    if node.base.is_gone() || registry::is_shutting_down() {
        if lacks && node.base.is_gone() {
            fail_drain(node, base_gone(node), After::WaitForBase);
        } else if lacks {
            fail_drain(node, shutdown(node), After::Forget);
        }
        return settle(node);
    }
    node.cache.drain_everything();
    let (look, patience) = (now(), Patience::new(node, now()));
    set_stage(node, Stage::FinalDrain { look, patience });
}

/// The bdev was not registered.
pub(super) fn on_register_failed(node: &Arc<Node>, refusal: After) {
    node.app.get().removal.borrow_mut().after = refusal;
    let name = c_string(&node.name);
    // SAFETY: the name is only read; the result is only compared.
    let found = unsafe { sys::spdk_bdev_get_by_name(name.as_ptr()) };
    // For want of memory SPDK may have registered it and be taking it back: then it destructs it.
    if !ptr::eq(found, node.app.get().bdev.get()) {
        settle(node);
    }
}

fn settle(node: &Arc<Node>) {
    stop_background(node);
    set_stage(node, Stage::Settling);
}

fn stop_background(node: &Node) {
    if let Some(driver) = node.app.get().driver.borrow().as_ref() {
        driver.stop();
    }
}

/// The node's poller looks whether a stage is at its end.
pub(super) fn tick(node: &Arc<Node>) {
    match stage(node) {
        Stage::Online | Stage::Closing => {}
        Stage::Leaving { until } => {
            if node.gives_up_waiting() {
                hurry::look(node);
            } else if now() >= until {
                node.give_up_waiting();
            }
        }
        Stage::Draining { look, mut patience } => {
            let time = now();
            if time >= look {
                let stuck = patience.ends_with(node, time);
                let look = Now(time.0 + DRAIN_LOOK_NS);
                set_stage(node, Stage::Draining { look, patience });
                look_at_drain(node, stuck);
            }
        }
        Stage::FinalDrain { look, mut patience } => {
            hurry::look(node);
            let time = now();
            if time >= look {
                let stuck = patience.ends_with(node, time);
                let look = Now(time.0 + DRAIN_LOOK_NS);
                set_stage(node, Stage::FinalDrain { look, patience });
                look_at_final_drain(node, stuck);
            }
        }
        Stage::Settling => {
            let in_flight = node
                .app
                .get()
                .driver
                .borrow()
                .as_ref()
                .map_or(0, |driver| driver.in_flight());
            if in_flight == 0 {
                close(node);
            } else {
                hurry::look(node);
            }
        }
    }
}

fn look_at_drain(node: &Arc<Node>, stuck: Option<String>) {
    if let Some(reason) = stuck {
        let message = format!(
            "{} cannot be drained: {reason}; it stays as it is, and can be deleted without a drain",
            node.name
        );
        give_up(node, &RpcError::errno(libc::EIO, message));
        set_stage(node, Stage::Online);
    } else if !node.cache.drain_status().in_progress {
        leave(node, After::Forget);
    }
}

fn look_at_final_drain(node: &Arc<Node>, stuck: Option<String>) {
    let status = node.cache.drain_status();
    if !status.in_progress {
        settle(node);
    } else if let Some(reason) = stuck {
        let message = format!(
            "{} is closed, but {} bytes could not be written to the base: {reason}; they stay on the \
             cache device: create the cache again to go on",
            node.name, status.dirty_bytes_left
        );
        fail_drain(node, RpcError::errno(libc::EIO, message), After::Forget);
        settle(node);
    }
}

/// Nothing is under way any more: everything that uses the base goes.
fn close(node: &Arc<Node>) {
    set_stage(node, Stage::Closing);
    let app = node.app.get();
    registry::set_closing(node.id, &app.removal.borrow().after);
    // Taken out first: dropping them calls SPDK.
    let driver = app.driver.borrow_mut().take();
    drop(driver);
    let poller = app.poller.borrow_mut().take();
    drop(poller);
    // SAFETY: the node was registered by `publish`; its bdev has no channels any more, so ours are closed or
    // about to be, which SPDK waits for.
    unsafe { sys::spdk_io_device_unregister(node.as_ctx(), Some(closed)) }
}

/// # Safety
/// Called by SPDK with a node whose io_device is unregistered, on the app thread.
unsafe extern "C" fn closed(ctx: *mut c_void) {
    // SAFETY: SPDK's reference is still there; `retire` takes it back.
    let node = unsafe { Node::from_ctx(ctx) };
    guard((), || finish::finish(node), |_| ());
}

/// There is no drain any more, and whoever waits for one is told why.
fn give_up(node: &Node, why: &RpcError) {
    let waiting = {
        let mut removal = node.app.get().removal.borrow_mut();
        removal.drain = Drain::No;
        removal
            .requests
            .extract_if(.., |(_, drain)| *drain == Drain::Yes)
            .collect::<Vec<_>>()
    };
    for (request, _) in waiting {
        request.answer(Err(why.clone()));
    }
}
