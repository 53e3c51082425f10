//! A cache in use: the engine's cache, its base and its bdev.

use std::cell::{Cell, RefCell};
use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;
use spdk_sys as sys;

use super::background::Driver;
use super::base::{Base, BaseFlush, c_string};
use super::json::Writer;
use super::memory::Access;
use super::registry::{self, EntryId};
use super::remove::{self, Removal};
use super::thread::{AppCell, Polled, Poller, on_app_thread, send_to_app};
use super::trampoline::guard;
use super::watch::StateWatch;
use super::zcopy::Zcopy;
use crate::engine::{Cache, CacheInfo, Health};
use crate::pmem::{Durability, MappedPmem};
use crate::rpc::{Statistics, WriteCache};

/// A cache with its bdev. SPDK knows it by its address: as the io_device that channels belong to, and as
/// the context of the bdev. That holds one reference, from `publish` to `retire`.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) id: EntryId,
    pub(super) name: String,
    pub(super) cache: Arc<Cache<MappedPmem>>,
    pub(super) base: Arc<Base>,
    pub(super) cache_path: PathBuf,
    /// If it is a part of the cache device.
    pub(super) cache_offset_mib: Option<u64>,
    pub(super) durability: Durability,
    /// How the base reaches the cache device's memory, for those who look.
    pub(super) access_text: String,
    pub(super) zcopy: Zcopy,
    pub(super) write_cache: WriteCache,
    /// Its users are to let go: requests that wait are given up.
    pub(super) sends_away: AtomicBool,
    pub(super) app: AppCell<NodeApp>,
}

/// What only the app thread touches.
#[derive(Debug)]
pub(super) struct NodeApp {
    /// Keeps the mapping registered for as long as base operations may be under way. Before `driver`, which
    /// may be the last to hold the cache: what is unmapped must not be registered.
    pub(super) access: RefCell<Option<Access>>,
    /// The background work; gone when the cache is being closed.
    pub(super) driver: RefCell<Option<Driver>>,
    pub(super) bdev: Cell<*mut sys::spdk_bdev>,
    pub(super) removal: RefCell<Removal>,
    pub(super) watch: StateWatch,
    pub(super) poller: RefCell<Option<Poller>>,
}

impl Node {
    pub(super) fn as_ctx(self: &Arc<Self>) -> *mut c_void {
        Arc::as_ptr(self).cast_mut().cast()
    }

    /// The node behind SPDK's pointer.
    ///
    /// # Safety
    /// `ctx` is from `as_ctx` of a node that is published.
    pub(super) unsafe fn from_ctx(ctx: *mut c_void) -> Arc<Self> {
        let node = ctx.cast_const().cast::<Self>();
        // SAFETY: SPDK's own reference keeps the node alive (contract); a second one is made of it.
        unsafe {
            Arc::increment_strong_count(node);
            Arc::from_raw(node)
        }
    }

    /// Makes the node known to SPDK as an io_device and makes its bdev, not registered yet.
    pub(super) fn publish(self: &Arc<Self>) -> Option<()> {
        let bdev = self.new_bdev()?;
        self.app.get().bdev.set(bdev.as_ptr());
        // SPDK's reference, given back by `retire`.
        let ctx = Arc::into_raw(Arc::clone(self)).cast_mut().cast();
        let name = c_string(&self.name);
        // SAFETY: the node lives until `retire`, which comes after the io_device is unregistered.
        unsafe { sys::pcache_io_device_register(ctx, name.as_ptr()) };
        Some(())
    }

    /// Starts the background work.
    pub(super) fn start_background(self: &Arc<Self>) -> Option<()> {
        // SAFETY: the poller is dropped by `remove`, before SPDK's reference to the node is given back.
        let poller = unsafe { Poller::register(poll, self.as_ctx(), 0, c"pcache_background") }?;
        *self.app.get().poller.borrow_mut() = Some(poller);
        Some(())
    }

    fn new_bdev(self: &Arc<Self>) -> Option<NonNull<sys::spdk_bdev>> {
        let identity = &self.base.facts.identity;
        let blocks = |bytes: u64| {
            u32::try_from(bytes / u64::from(identity.block_size_bytes)).unwrap_or(u32::MAX)
        };
        let unmap_blocks_max = blocks(self.cache.unmap_size_max_bytes());
        let name = c_string(&self.name);
        let media_uuid = self.cache.info().uuid;
        let mut uuid = [0; 16];
        // SAFETY: both buffers are as long as is said.
        unsafe {
            sys::pcache_uuid_from(uuid.as_mut_ptr(), media_uuid.as_ptr(), media_uuid.len());
        }
        let params = sys::pcache_bdev_params {
            name: name.as_ptr(),
            uuid,
            block_size_bytes: identity.block_size_bytes,
            phys_block_size_bytes: self.base.facts.phys_block_size_bytes,
            block_count: self.cache.block_count(),
            rw_blocks_max: blocks(self.cache.write_size_max_bytes()),
            unmap_blocks_max,
            write_zeroes_blocks_max: unmap_blocks_max,
            write_cache: self.write_cache == WriteCache::Reported,
        };
        // SAFETY: the parameters are copied.
        NonNull::new(unsafe { sys::pcache_bdev_new(self.as_ctx(), &raw const params) })
    }

    /// From now on no request waits for room, or for the base: it is given up.
    pub(super) fn give_up_waiting(&self) {
        self.sends_away.store(true, Ordering::Relaxed);
    }

    /// Whether requests that wait for room, or for the base, are given up: they might wait for ever.
    pub(super) fn gives_up_waiting(&self) -> bool {
        self.sends_away.load(Ordering::Relaxed) || self.base.is_gone()
    }

    /// Gives SPDK's reference back. The bdev's memory stays with the caller.
    ///
    /// # Safety
    /// `publish` succeeded, and the io_device has been unregistered since; called once.
    pub(super) unsafe fn retire(self: &Arc<Self>) -> *mut sys::spdk_bdev {
        // SAFETY: `publish` made this reference by `into_raw`; by the contract it is given back once.
        drop(unsafe { Arc::from_raw(Arc::as_ptr(self)) });
        self.app.get().bdev.replace(ptr::null_mut())
    }

    /// What `bdev_get_bdevs` and `bdev_pcache_get_bdevs` show.
    pub(super) fn describe(&self) -> Description<'_> {
        let app = on_app_thread().then(|| self.app.get());
        let removal = app.and_then(|app| app.removal.borrow().state());
        let health = app.map_or_else(|| self.cache.health(), |app| app.watch.state(self));
        let driver = |app: &NodeApp| app.driver.borrow().as_ref().map(Driver::in_flight);
        Description {
            name: &self.name,
            base_bdev_name: &self.base.facts.identity.name,
            cache_path: self.cache_path.to_string_lossy().into_owned(),
            cache_offset_mib: self.cache_offset_mib,
            durability: self.durability,
            base_write_path: &self.access_text,
            base_flush: self.base.facts.flush,
            state_age_s: match removal {
                Some((_, age_s)) => Some(age_s),
                None => app.map(|app| app.watch.state_age_s()),
            },
            state: match removal {
                Some((state, _)) => Shown::Leaving {
                    state,
                    reason: health.reason().map(str::to_owned),
                },
                None => Shown::InUse(health),
            },
            base_operations: app.and_then(driver),
            info: self.cache.info(),
        }
    }
}

/// A cache in use, for those who look.
#[derive(Debug, Serialize)]
pub(super) struct Description<'a> {
    name: &'a str,
    base_bdev_name: &'a str,
    cache_path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_offset_mib: Option<u64>,
    durability: Durability,
    base_write_path: &'a str,
    base_flush: BaseFlush,
    #[serde(flatten)]
    state: Shown,
    /// For how long it has been in this state, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    state_age_s: Option<u64>,
    /// Operations of write-back that the base has not ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    base_operations: Option<usize>,
    #[serde(flatten)]
    info: CacheInfo,
}

/// Whether a cache works, or how far it is on its way out.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Shown {
    InUse(Health),
    Leaving {
        state: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
}

unsafe extern "C" fn poll(ctx: *mut c_void) -> c_int {
    // SAFETY: registered with the address of a published node, and dropped before that ends. Borrowed, not
    // counted: this runs all the time.
    let node =
        std::mem::ManuallyDrop::new(unsafe { Arc::from_raw(ctx.cast_const().cast::<Node>()) });
    let polled = guard(
        Polled::Idle,
        || {
            let polled = node
                .app
                .get()
                .driver
                .borrow()
                .as_ref()
                .map_or(Polled::Idle, Driver::poll);
            node.app.get().watch.tick(&node);
            remove::tick(&node);
            polled
        },
        |why| {
            node.cache.poison(why);
            if let Some(driver) = node.app.get().driver.borrow().as_ref() {
                driver.set_broken();
            }
            log::error!("{}: write-back stopped after an internal error", node.name);
            Polled::Idle
        },
    );
    polled.code()
}

/// # Safety
/// `ctx` is the context of a bdev of ours, `writer` one that waits for a member.
#[unsafe(no_mangle)]
unsafe extern "C" fn pcache_up_dump_info(
    ctx: *mut c_void,
    writer: *mut sys::spdk_json_write_ctx,
) -> c_int {
    // SAFETY: by the contract of this function.
    let Some((node, mut writer)) = (unsafe { node_and_writer(ctx, writer) }) else {
        return 0;
    };
    guard((), || writer.member("pcache", &node.describe()), |_| ());
    0
}

/// # Safety
/// As `pcache_up_dump_info`.
#[unsafe(no_mangle)]
unsafe extern "C" fn pcache_up_dump_stat(ctx: *mut c_void, writer: *mut sys::spdk_json_write_ctx) {
    // SAFETY: by the contract of this function.
    let Some((node, mut writer)) = (unsafe { node_and_writer(ctx, writer) }) else {
        return;
    };
    let statistics = || Statistics::of(&node.cache);
    guard((), || writer.member("pcache", &statistics()), |_| ());
}

/// # Safety
/// `ctx` is the context of a bdev of ours.
#[unsafe(no_mangle)]
unsafe extern "C" fn pcache_up_reset_stat(ctx: *mut c_void) {
    // SAFETY: by the contract of this function.
    let node = unsafe { Node::from_ctx(ctx) };
    guard((), || node.cache.reset_stats(), |_| ());
}

/// # Safety
/// `ctx` is the context of a bdev of ours, `writer` one that waits for a value.
#[unsafe(no_mangle)]
unsafe extern "C" fn pcache_up_write_config(
    ctx: *mut c_void,
    writer: *mut sys::spdk_json_write_ctx,
) {
    // SAFETY: by the contract of this function.
    let Some((node, mut writer)) = (unsafe { node_and_writer(ctx, writer) }) else {
        return;
    };
    guard(
        (),
        || {
            if let Some(config) = registry::config_of(node.id) {
                writer.value(&config);
            }
        },
        |_| (),
    );
}

/// # Safety
/// `ctx` is the context of a bdev of ours, `writer` valid during the caller's callback or NULL.
unsafe fn node_and_writer(
    ctx: *mut c_void,
    writer: *mut sys::spdk_json_write_ctx,
) -> Option<(Arc<Node>, Writer)> {
    let writer = NonNull::new(writer)?;
    // SAFETY: both by the contract of this function.
    Some(unsafe { (Node::from_ctx(ctx), Writer::from_raw(writer)) })
}

/// SPDK has no further use for the bdev: nobody has it open, all its channels are closed.
///
/// # Safety
/// `ctx` is the context of a bdev of ours.
#[unsafe(no_mangle)]
unsafe extern "C" fn pcache_up_destruct(ctx: *mut c_void) -> c_int {
    if on_app_thread() {
        // SAFETY: by the contract of this function.
        unsafe { destruct(ctx) };
    } else {
        // Some releases let a bdev be unregistered from any thread.
        guard((), || send_to_app(destruct, ctx), |_| ());
    }
    // It will be told when it is done.
    1
}

/// # Safety
/// `ctx` is the context of a bdev of ours; on the app thread.
unsafe extern "C" fn destruct(ctx: *mut c_void) {
    // SAFETY: by the contract of this function.
    let node = unsafe { Node::from_ctx(ctx) };
    guard((), || remove::on_destruct(&node), |_| ());
}
