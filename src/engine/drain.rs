//! Drains: what is dirty at some moment is wanted on the base.

use super::cache::Cache;
use crate::canary::{self, Canary};
use crate::pmem::Pmem;
use crate::units::Seq;
use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};

/// How far a drain is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DrainStatus {
    /// Whether one is running.
    pub in_progress: bool,
    /// Dirty bytes when it was asked for.
    pub dirty_bytes_start: u64,
    /// Dirty bytes now, those written since included.
    pub dirty_bytes_left: u64,
    /// Progress from 0 to 100.
    pub percent: u8,
    /// Why it does not get on, if something is wrong.
    pub error: Option<String>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Drain {
    /// Everything below this is to be written back; 0: nothing is asked for.
    upto: AtomicU64,
    bytes_start: AtomicU64,
}

impl Drain {
    pub(super) fn start<P>(&self, cache: &Cache<P>) {
        let dirty_bytes = cache.dirty_bytes.load(Ordering::Relaxed);
        self.bytes_start.store(dirty_bytes, Ordering::Relaxed);
        let seq_next = cache.seq_next.load(Ordering::SeqCst);
        self.upto.store(seq_next, Ordering::Release);
    }

    pub(super) fn is_running(&self, dirty_tail: Seq) -> bool {
        let upto = self.upto.load(Ordering::Acquire);
        let left = u64::from(canary::is(Canary::DrainEndsEarly));
        upto != 0 && dirty_tail.0 + 1 + left < upto
    }

    /// See [`Cache::end_drains`].
    pub(super) fn end(&self, settled: Seq) {
        let upto = self.upto.load(Ordering::Acquire);
        if upto <= settled.0 {
            // Failing, it was another drain's.
            let _ = self
                .upto
                .compare_exchange(upto, 0, Ordering::AcqRel, Ordering::Acquire);
        }
    }
}

impl<P: Pmem> Cache<P> {
    /// Asks for everything that is dirty now to be written to the base. `false`: a drain is running already.
    pub fn drain_start(&self) -> bool {
        if self.drain_running() {
            return false;
        }
        self.drain.start(self);
        true
    }

    /// As [`Cache::drain_start`], with whatever a drain that is running would leave out.
    pub fn drain_everything(&self) {
        self.drain.start(self);
    }

    /// Whether a drain was asked for and is not done.
    pub(crate) fn drain_running(&self) -> bool {
        self.drain.is_running(self.dirty_tail())
    }

    /// Whether the log may hold what the base lacks: data, or zeroes, which count as no bytes. Of read fills that have just come
    /// it is said, too: the dirty tail passes them a moment later.
    pub fn may_be_dirty(&self) -> bool {
        let is_at_end = self.dirty_tail().0 + 1 >= self.seq_next.load(Ordering::SeqCst);
        self.dirty_bytes.load(Ordering::Relaxed) > 0 || !is_at_end
    }

    /// The log holds nothing below `settled` that is not on the base: a drain up to there is done, even if the
    /// dirty tail stands lower. Numbers that were drawn for batches which a crash cut off are never reached.
    pub(crate) fn end_drains(&self, settled: Seq) {
        self.drain.end(settled);
        self.mode.switch.end(settled);
    }

    /// How far the drain is that was asked for last.
    pub fn drain_status(&self) -> DrainStatus {
        let in_progress = self.drain_running();
        let start = self.drain.bytes_start.load(Ordering::Relaxed);
        let left = self.dirty_bytes.load(Ordering::Relaxed);
        let done = start.saturating_sub(left);
        let percent = if !in_progress {
            100
        } else {
            done * 100 / start.max(1)
        };
        DrainStatus {
            in_progress,
            dirty_bytes_start: start,
            dirty_bytes_left: left,
            percent: u8::try_from(percent.min(if in_progress { 99 } else { 100 })).unwrap_or(99),
            error: self.trouble().or_else(|| {
                let id = self.checkpoint.holder().filter(|_| in_progress)?;
                Some(format!("checkpoint {id} holds the base"))
            }),
        }
    }
}
