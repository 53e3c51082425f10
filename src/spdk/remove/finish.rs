//! The end of a cache that was in use: its device is unmapped on a thread of its own, then SPDK is told, and whoever asked.

use std::ffi::{c_int, c_void};
use std::mem;
use std::sync::Arc;

use spdk_sys as sys;

use super::{After, Removal};
use crate::rpc::{Drain, RpcError};
use crate::spdk::json::{Json, Request};
use crate::spdk::mapping::Job;
use crate::spdk::node::Node;
use crate::spdk::registry::{self, EntryId};
use crate::spdk::thread::{Polled, Poller};
use crate::spdk::trampoline::guard;

/// How often the thread that unmaps is looked at.
const UNMAP_LOOK_US: u64 = 200;

/// Nothing refers to the io_device any more.
pub(super) fn finish(node: Arc<Node>) {
    // SAFETY: published, and the io_device is unregistered: this is its callback, which comes once.
    let bdev = unsafe { node.retire() };
    let removal = mem::replace(&mut *node.app.get().removal.borrow_mut(), Removal::none());
    let mut finishing = Box::new(Finishing {
        id: node.id,
        bdev,
        after: removal.after,
        requests: removal.requests,
        outcome: removal.outcome,
        unmapping: None,
        poller: None,
    });
    let cache = Arc::clone(&node.cache);
    let access = node.app.get().access.borrow_mut().take();
    // Memory that has gone bad takes no stores: then the last segments stay open, as after a kill.
    guard((), || cache.seal_streams(), |why| cache.poison(why));
    registry::closed(node.id, cache.info().dirty_bytes);
    if Arc::strong_count(&node) != 1 {
        log::error!("{}: something still refers to the closed cache", node.name);
    }
    // Closes the base.
    drop(node);
    registry::on_base_closed();
    // In this order, on whatever thread: what is unmapped must not be registered.
    let mapping = (access, cache);
    finishing.unmapping = Job::start("pcache-unmap", move || drop(mapping));
    let raw = Box::into_raw(finishing);
    // SAFETY: the box is only taken back by `look_at_unmapping`, when it drops the poller, or below, where there is none.
    let poller = unsafe {
        Poller::register(
            look_at_unmapping,
            raw.cast(),
            UNMAP_LOOK_US,
            c"pcache_unmap",
        )
    };
    if poller.is_none() {
        log::warn!(
            "no poller to wait for the unmapping of a cache device with: it is waited for here"
        );
        // SAFETY: made by `Box::into_raw` above, and nobody else has got it.
        let finishing = unsafe { Box::from_raw(raw) };
        return finishing.end();
    }
    // SAFETY: the poller has not run yet: that takes a return to SPDK.
    unsafe { (*raw).poller = poller };
}

/// A cache that only has to be unmapped yet.
#[derive(Debug)]
struct Finishing {
    id: EntryId,
    bdev: *mut sys::spdk_bdev,
    after: After,
    requests: Vec<(Request, Drain)>,
    outcome: Result<(), RpcError>,
    unmapping: Option<Job<()>>,
    poller: Option<Poller>,
}

unsafe extern "C" fn look_at_unmapping(arg: *mut c_void) -> c_int {
    let finishing = arg.cast::<Finishing>();
    // SAFETY: registered with a boxed `Finishing` that only this function takes back, below.
    let done = unsafe { (*finishing).unmapping.as_ref().is_none_or(Job::is_done) };
    if done {
        // SAFETY: made by `Box::into_raw` in `finish`; the poller, which goes with it, does not run again.
        let finishing = unsafe { Box::from_raw(finishing) };
        guard((), || finishing.end(), |_| ());
    }
    Polled::Idle.code()
}

impl Finishing {
    fn end(mut self) {
        self.poller = None;
        if let Some(unmapping) = self.unmapping.take() {
            unmapping.finish();
        }
        // SAFETY: its destruction was said to take its time; this is the end of it, told once. Nothing
        // refers to the bdev afterwards.
        unsafe {
            sys::spdk_bdev_destruct_done(self.bdev, 0);
            sys::pcache_bdev_free(self.bdev);
        }
        registry::removed(self.id, self.after);
        for (request, drain) in self.requests.drain(..) {
            let outcome = match drain {
                Drain::Yes => self.outcome.clone(),
                Drain::No => Ok(()),
            };
            request.answer(outcome.map(|()| Json::yes()));
        }
    }
}
