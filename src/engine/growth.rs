//! The base device has become larger while the cache is in use.
//!
//! 1. The superblock gets the new size, durably, by the background.
//! 2. Only then are requests for the new blocks taken: a key behind the size that the superblock names would
//!    be taken for damage by the next recovery.

use super::cache::{BACKGROUND_AGENT, Cache, lock};
use crate::canary::{self, Canary};
use crate::media::{persist_superblock, superblock_copies};
use crate::pmem::Pmem;
use std::sync::atomic::Ordering;

/// Why the cache does not follow its base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrowError {
    /// It has become smaller.
    #[error(
        "the base device shrank from {now} to {asked} blocks; the cache keeps its size, and what lies behind the base's new end cannot be written back"
    )]
    Shrunk {
        /// Blocks of the cache.
        now: u64,
        /// Of the base.
        asked: u64,
    },
    /// The index cannot name its pages without being built anew.
    #[error(
        "the base device grew to {asked} blocks; {max} are the most that the cache can follow to while in use: delete and create it again to go further"
    )]
    TooLarge {
        /// Of the base.
        asked: u64,
        /// The most.
        max: u64,
    },
    /// Nothing is stored to its device any more.
    #[error("the cache has failed, and does not follow its base device to another size")]
    Failed,
}

impl<P: Pmem> Cache<P> {
    /// Blocks that can be asked for.
    #[inline]
    pub fn block_count(&self) -> u64 {
        // Acquire: whoever sees the size sees nothing older of the superblock.
        self.block_count.load(Ordering::Acquire)
    }

    /// The base has `block_count` blocks now. Once the superblock says so, [`Cache::block_count`] does too.
    ///
    /// # Errors
    /// The cache cannot follow, and stays as it is.
    pub fn grow(&self, block_count: u64) -> Result<(), GrowError> {
        if self.has_failed() {
            return Err(GrowError::Failed);
        }
        let mut superblock = lock(&self.superblock);
        let now = superblock.base.block_count;
        if block_count < now {
            return Err(GrowError::Shrunk {
                now,
                asked: block_count,
            });
        }
        if block_count == now {
            return Ok(());
        }
        let max = self.base_block_count_max();
        if block_count > max {
            return Err(GrowError::TooLarge {
                asked: block_count,
                max,
            });
        }
        superblock.base.block_count = block_count;
        if canary::is(Canary::GrowthNotPersisted) {
            self.block_count.store(block_count, Ordering::Release);
            return Ok(());
        }
        self.superblock_changed.store(true, Ordering::Release);
        Ok(())
    }

    /// How often settings, or a new size, could not be stored: for whoever watches it, at the cost of a load.
    pub fn changes_not_kept(&self) -> u64 {
        self.changes_not_kept.load(Ordering::Relaxed)
    }

    /// The background, or an orderly end after it: what was changed in the superblock becomes durable, and then visible.
    pub(super) fn persist_changes(&self) {
        if !self.superblock_changed.swap(false, Ordering::AcqRel) {
            return;
        }
        let mut superblock = lock(&self.superblock);
        // One copy stays whole while the other is written: a damaged one is made so first. If none is, both are durable.
        let is_whole = match superblock_copies(&self.pmem) {
            Ok(mut copies) if copies.needs_repair() => {
                copies.unreadable().is_none() && copies.repair(&self.pmem, BACKGROUND_AGENT).is_ok()
            }
            Ok(_) => true,
            Err(error) => error.can_be_written(),
        };
        if !is_whole {
            // INV-PAIR-3: settings hold until the end, and the cache keeps its size.
            self.background_counters().metadata_errors.add(1);
            self.changes_not_kept.fetch_add(1, Ordering::Relaxed);
            return;
        }
        // 1. Durable.
        drop(persist_superblock(
            &self.pmem,
            BACKGROUND_AGENT,
            &mut superblock,
        ));
        // 2. Visible (INV-GROW-1).
        self.block_count
            .store(superblock.base.block_count, Ordering::Release);
    }
}
