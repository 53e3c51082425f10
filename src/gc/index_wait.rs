//! A wait for the index, in a cache with segments enough: what becomes clean ends it, and a segment emptied is no help.

use crate::engine::{Cache, Sealing, SealingStep};
use crate::pmem::Pmem;
use crate::units::Seq;

/// See the module.
#[derive(Debug)]
pub(super) struct IndexWait {
    /// Until everything below this is clean, no segment is emptied.
    upto: Seq,
    /// What is to be sealed when that is so and the wait goes on. Most of what fills the index may lie in open segments,
    /// to which other channels append.
    sealing: Option<Sealing>,
}

impl IndexWait {
    /// It begins.
    pub(super) fn new<P: Pmem>(cache: &Cache<P>) -> Self {
        Self {
            upto: cache.seq_settled(),
            sealing: Some(Sealing::default()),
        }
    }

    /// Whether write-back may end it. That is not for ever: a writer leaves alone what shares buckets with its own pages.
    pub(super) fn poll<P: Pmem>(&mut self, cache: &Cache<P>) -> bool {
        let is_below = |upto: Seq| cache.dirty_tail().0 + 1 < upto.0;
        if is_below(self.upto) {
            return true;
        }
        let Some(sealing) = &mut self.sealing else {
            return false;
        };
        if sealing.poll(cache) == SealingStep::More {
            return true;
        }
        if sealing.has_sealed() {
            self.upto = cache.seq_settled();
        }
        self.sealing = None;
        is_below(self.upto)
    }
}
