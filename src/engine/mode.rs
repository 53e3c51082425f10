//! Cache modes: which one holds, and what has to be written back because of it.

use super::cache::Cache;
use super::config::CacheMode;
use super::drain::Drain;
use crate::pmem::Pmem;
use crate::units::Seq;
use crossbeam_utils::CachePadded;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct ModeState {
    /// Since a mode was asked for in which the base has what is acknowledged: what is older than that.
    pub(super) switch: Drain,
    /// The mode before the one that was asked for.
    before: AtomicU32,
    /// Somebody waits until everything up to here is on the base.
    held_upto: CachePadded<AtomicU64>,
}

impl ModeState {
    /// The highest number under which a write has ever waited for the base.
    pub(super) fn held_upto(&self) -> Seq {
        Seq(self.held_upto.load(Ordering::Acquire))
    }

    /// A write of this number waits for the base.
    pub(super) fn hold(&self, seq: Seq) {
        self.held_upto.fetch_max(seq.0, Ordering::Release);
    }
}

impl<P: Pmem> Cache<P> {
    /// Another mode was asked for, or one was found on the media. It holds for requests from now on.
    pub(super) fn mode_asked(&self, before: CacheMode, mode: CacheMode) {
        if before == mode {
            return;
        }
        let state = &self.mode;
        if !state.switch.is_running(self.dirty_tail()) {
            state.before.store(before as u32, Ordering::Relaxed);
        }
        if !mode.holds_writes() {
            state.switch.end(Seq(u64::MAX));
        } else if !before.holds_writes() {
            // The mode was stored before, and the end of the log is looked at now. A batch draws its number, fences
            // its stores, and then looks at the mode: it is below that end, or it sees the mode. What keeps its look behind
            // its drawing is the locked instruction of that on x86-64, and the barrier of `Pmem::fence` on aarch64.
            fence(Ordering::SeqCst);
            state.switch.start(self);
        }
    }

    /// The mode that holds for everything that is in the cache. It is the one that was asked for, except while
    /// dirty data of an earlier one are left.
    pub fn mode_now(&self) -> CacheMode {
        if self.mode.switch.is_running(self.dirty_tail()) {
            CacheMode::from_setting(self.mode.before.load(Ordering::Relaxed))
        } else {
            self.settings.cache_mode()
        }
    }

    /// Whether a write waits for nothing but the base.
    fn has_held_writes(&self) -> bool {
        self.mode.held_upto() > self.dirty_tail()
    }

    /// Whether everything that is dirty is to be written back as soon as possible: for a drain, for a mode, or
    /// because a write waits for the base.
    pub(crate) fn drain_wanted(&self) -> bool {
        let dirty_tail = self.dirty_tail();
        self.has_held_writes() || self.drain_running() || self.mode.switch.is_running(dirty_tail)
    }
}
