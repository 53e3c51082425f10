//! What an operator is told without asking: a cache that changes from one state to another, or begins to wait, one that
//! cannot keep a change, and a base that changes its size. Once for each change, in the log and as a notification of SPDK
//! (`notify_get_notifications`); what lasts is not repeated, nor is what comes and goes.

use std::cell::{Cell, RefCell};
use std::ffi::CStr;
use std::mem::discriminant;
use std::sync::Once;

use spdk_sys as sys;

use super::base::{c_string, os_text};
use super::node::Node;
use super::remove;
use super::thread::now;
use crate::engine::Health;
use crate::units::{NS_PER_S, Now};

/// So long a cache must have been well before it is said that trouble is over: as long as the longest pause that write-back
/// makes after an error.
const CALM_NS: u64 = 5 * NS_PER_S;

/// The types of the notifications. Each has the name of the cache as its context.
const PENDING: &CStr = c"bdev_pcache_pending";
const ONLINE: &CStr = c"bdev_pcache_online";
const WRITEBACK_FAILING: &CStr = c"bdev_pcache_writeback_failing";
const DEGRADED: &CStr = c"bdev_pcache_degraded";
const FAILED: &CStr = c"bdev_pcache_failed";
const RESIZED: &CStr = c"bdev_pcache_resized";

/// Lets `notify_get_types` list them.
pub(super) fn register_notifications() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for name in [
            PENDING,
            ONLINE,
            WRITEBACK_FAILING,
            DEGRADED,
            FAILED,
            RESIZED,
        ] {
            // SAFETY: the name is a static, NUL-terminated text; SPDK copies it.
            let registered = unsafe { sys::spdk_notify_type_register(name.as_ptr()) };
            if registered.is_null() {
                log::warn!("notifications of type {name:?} cannot be registered");
            }
        }
    });
}

/// What was told last.
#[derive(Debug)]
pub(super) struct StateWatch {
    health_changes: Cell<u64>,
    told: RefCell<Health>,
    since: Cell<Now>,
    /// The trouble that was told is over, since then.
    calm_since: Cell<Option<Now>>,
    changes_not_kept: Cell<u64>,
    block_count: Cell<u64>,
}

impl StateWatch {
    /// Of a cache that works, from now on.
    pub(super) fn new(block_count: u64) -> Self {
        Self {
            health_changes: Cell::new(0),
            told: RefCell::new(Health::Online),
            since: Cell::new(now()),
            calm_since: Cell::new(None),
            changes_not_kept: Cell::new(0),
            block_count: Cell::new(block_count),
        }
    }

    /// The state for those who look. Trouble stays for a while after it is over.
    pub(super) fn state(&self, node: &Node) -> Health {
        match node.cache.health() {
            Health::Online => self.told.borrow().clone(),
            trouble => trouble,
        }
    }

    /// For how long the cache has been in its present state, in seconds.
    pub(super) fn state_age_s(&self) -> u64 {
        now().since_ns(self.since.get()) / NS_PER_S
    }

    /// To be called again and again, on the app thread.
    pub(super) fn tick(&self, node: &Node) {
        let changes = node.cache.health_changes();
        if self.health_changes.replace(changes) != changes {
            self.look(node);
        } else if let Some(since) = self.calm_since.get()
            && now().since_ns(since) >= CALM_NS
        {
            self.calm_since.set(None);
            self.tell(node, Health::Online);
        }
        let not_kept = node.cache.changes_not_kept();
        if self.changes_not_kept.replace(not_kept) != not_kept {
            log::error!(
                "{}: the cache device cannot keep a change: a copy of what it knows of itself cannot be read. Settings hold \
                 until the cache is closed, and it stays as large as it is",
                node.name
            );
        }
        let block_count = node.cache.block_count();
        if self.block_count.get() != block_count && remove::is_staying(node) {
            self.tell_size(node, block_count);
        }
    }

    /// The state is another one, or was meanwhile.
    fn look(&self, node: &Node) {
        let health = node.cache.health();
        let is_told = discriminant(&*self.told.borrow()) == discriminant(&health);
        let is_over = health == Health::Online && !is_told;
        self.calm_since.set(is_over.then(now));
        if is_told {
            *self.told.borrow_mut() = health;
        } else if !is_over {
            self.tell(node, health);
        }
    }

    fn tell(&self, node: &Node, health: Health) {
        let (name, lasted_s) = (&node.name, self.state_age_s());
        self.since.set(now());
        *self.told.borrow_mut() = health.clone();
        match health {
            Health::Online => {
                log::warn!("{name}: write-back works again, after {lasted_s} s");
                notify(ONLINE, name);
            }
            Health::WritebackFailing(reason) => {
                log::warn!("{name}: {reason}");
                notify(WRITEBACK_FAILING, name);
            }
            Health::Degraded(reason) => {
                log::error!("{name}: write-back stands still: {reason}");
                notify(DEGRADED, name);
            }
            Health::Failed(reason) => {
                log::error!("{name}: every request fails from now on: {reason}");
                notify(FAILED, name);
            }
        }
    }

    /// The cache takes requests for the new blocks by now: so may its users.
    fn tell_size(&self, node: &Node, block_count: u64) {
        let bdev = node.app.get().bdev.get();
        // SAFETY: the bdev is registered for as long as the background runs, which calls this on the app
        // thread.
        let rc = unsafe { sys::spdk_bdev_notify_blockcnt_change(bdev, block_count) };
        let before = self.block_count.replace(block_count);
        if rc == 0 {
            log::info!(
                "{}: grew from {before} to {block_count} blocks, with its base",
                node.name
            );
            notify(RESIZED, &node.name);
        } else {
            let why = os_text(-rc);
            log::error!(
                "{}: its users cannot be told of {block_count} blocks: {why}",
                node.name
            );
        }
    }
}

/// A cache waits for its base, or for somebody to mend what is wrong.
pub(super) fn tell_pending(name: &str) {
    notify(PENDING, name);
}

/// A cache that has waited is in use (again).
pub(super) fn tell_online(name: &str) {
    notify(ONLINE, name);
}

fn notify(kind: &CStr, name: &str) {
    let name = c_string(name);
    // SAFETY: both texts are copied.
    unsafe { sys::spdk_notify_send(kind.as_ptr(), name.as_ptr()) };
}
