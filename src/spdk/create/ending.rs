//! The end of a creation: nothing comes of it, or a cache in use has what it had.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use spdk_sys as sys;

use super::{Creation, Hold, OpeningStage, Stage};
use crate::rpc::RpcError;
use crate::spdk::base::os_text;
use crate::spdk::json::{Json, Request};
use crate::spdk::mapping::{self, Job, Origin};
use crate::spdk::registry;
use crate::spdk::thread::{Polled, now};
use crate::units::NS_PER_S;

/// So long a base may say nothing once nobody wants the cache any more; then it is reset, as for a RESET of a cache in use
/// (`reset.rs`).
const BASE_RESET_AFTER_NS: u64 = 5 * NS_PER_S;

impl Creation {
    /// Gives up, as soon as nothing is under way. While the cache device is being mapped nobody has to do with the base, so
    /// that goes at once: what the thread does there cannot be cut short.
    pub(in crate::spdk) fn cancel(&self, why: RpcError) {
        self.unwanted.store(true, Ordering::Relaxed);
        self.cancelled.borrow_mut().get_or_insert(why);
        let is_mapping = matches!(&*self.stage.borrow(), Stage::Mapping(_));
        if is_mapping {
            self.let_go_of_base();
        }
    }

    /// Gives up with an opening half-done, once its base reads have ended, and its helpers are gone.
    pub(super) fn abandon(
        self: &Rc<Self>,
        mut stage: Box<OpeningStage>,
        error: Option<RpcError>,
    ) -> Polled {
        if let Some(error) = error {
            self.cancel(error);
        }
        stage.helpers.stop();
        self.hurry(&mut stage);
        if stage.reads.in_flight() > 0 || !stage.helpers.are_gone() {
            *self.stage.borrow_mut() = Stage::Opening(stage);
            return Polled::Idle;
        }
        let OpeningStage {
            access,
            opening,
            reads,
            ..
        } = *stage;
        drop(reads);
        self.give_back((access, opening));
        Polled::Busy
    }

    /// A base that does not answer is reset, which makes it end the reads that are under way; again and again, since it may
    /// have begun with one later.
    fn hurry(&self, stage: &mut OpeningStage) {
        if stage.reads.in_flight() == 0 || stage.silence.silent_ns(now()) < BASE_RESET_AFTER_NS {
            return;
        }
        stage.silence.heard();
        let outcome = stage.reads.reset_base();
        if !std::mem::replace(&mut stage.told.reset, true) {
            let name = &self.definition.name;
            log::warn!(
                "{name}: reads of the base do not end, and the cache is not wanted any more: the base is reset"
            );
            if let Err(errno) = outcome {
                log::warn!("{name}: the base cannot be reset yet: {}", os_text(errno));
            }
        }
    }

    /// Nothing comes of it: the cache device is unmapped with what has hold of it, its registration first, and removed if it
    /// was made for this. The base, of which the caller has nothing any more, does not wait for that.
    pub(super) fn give_back(self: &Rc<Self>, holder: impl Send + 'static) {
        self.let_go_of_base();
        let (path, origin) = (self.definition.cache_path.clone(), self.origin.get());
        let job = Job::start("pcache-unmap", move || {
            drop(holder);
            mapping::discard(&path, origin);
        });
        let Some(job) = job else {
            // It was unmapped here, for want of a thread.
            return self.give_up();
        };
        self.origin.set(Origin::Existed);
        *self.stage.borrow_mut() = Stage::Unmapping(job);
    }

    /// It does not work, and nothing is under way. Who has deleted the cache meanwhile is told that it is gone.
    pub(super) fn refuse(self: &Rc<Self>, error: RpcError) {
        self.cancel(error);
        self.give_up();
    }

    /// Nothing is under way any more.
    pub(super) fn give_up(self: &Rc<Self>) {
        let why = self.cancelled.borrow_mut().take();
        let why = why.unwrap_or_else(|| RpcError::errno(libc::ECANCELED, "given up"));
        let deleters = self.deleters.take();
        if deleters.is_empty() {
            self.fail(why);
        } else {
            self.deleted(why, deleters);
        }
    }

    /// Removes a file of which no cache is to be.
    pub(super) fn discard(&self) {
        let origin = self.origin.replace(Origin::Existed);
        mapping::discard(&self.definition.cache_path, origin);
    }

    /// Tells whoever waits that there will be no cache.
    fn fail(self: &Rc<Self>, error: RpcError) {
        let request = self.request.borrow_mut().take();
        self.discard();
        self.end();
        registry::creation_failed(self.id, error, request);
    }

    /// The same, if the cache is not to wait for another attempt either.
    fn deleted(self: &Rc<Self>, why: RpcError, deleters: Vec<Request>) {
        let creator = self.request.borrow_mut().take();
        self.discard();
        self.end();
        registry::creation_deleted(self.id);
        match creator {
            Some(creator) => creator.answer(Err(why)),
            None => log::info!("{}: {why}", self.definition.name),
        }
        for request in deleters {
            request.answer(Ok(Json::yes()));
        }
    }

    /// The last that this creation does.
    pub(super) fn end(&self) {
        *self.stage.borrow_mut() = Stage::Taken;
        let poller = self.poller.borrow_mut().take();
        drop(poller);
        self.let_go_of_base();
    }

    /// The base is closed, unless a cache has it now or that was done before, and SPDK may go on.
    fn let_go_of_base(&self) {
        let base = self.base.borrow_mut().take();
        if let Some(base) = base {
            drop(base);
            registry::on_base_closed();
        }
        self.release_examination();
    }

    /// SPDK does not wait for the cache any more. The claim keeps others from the base all the same.
    pub(in crate::spdk) fn release_examination(&self) {
        if self.hold.replace(Hold::None) == Hold::Examination {
            // SAFETY: `pcache_up_examine_disk` said that this would come; it comes once.
            unsafe { sys::spdk_bdev_module_examine_done(sys::pcache_module()) }
        }
    }
}
