//! Whether there is a reason for another batch, how far it may go, and how much of the base it may take.

use super::batch::Manners;
use super::clearing::Load;
use super::log::Limits;
use super::pace::{
    bytes_above_low, capacity_bytes, is_above_low, is_index_above_high, is_urgent,
    is_used_above_high,
};
use super::{Context, State, Writeback};
use crate::engine::Cache;
use crate::gc::Lack;
use crate::pmem::Pmem;
use crate::units::{Now, Seq};
use std::sync::atomic::Ordering;

/// How long the base should need for a batch: while there is room, and while there is little, when a writer
/// may wait for its end.
const BATCH_MS: u64 = 60;
const BATCH_MS_URGENT: u64 = 5;
/// What a batch may take: the least limit, and the first. A base that writes zeroes at 500 MB/s needs that time for what is
/// cleared.
const BATCH_MIN: Load = Load {
    data_bytes: 16 << 20,
    cleared_bytes: 32 << 20,
};
const BATCH_MIN_URGENT: Load = Load {
    data_bytes: 4 << 20,
    cleared_bytes: 4 << 20,
};
/// A batch takes at most this part of the cache.
const BATCH_CACHE_PARTS: u64 = 8;
/// Keys of a batch, at most, and of a part of one that has to take more: bounds the DRAM of both overlays, and of sorting
/// them, to 16 MiB.
pub(super) const BATCH_KEYS_MAX: u64 = 128 << 10;

/// How much of what is dirty the next batch is to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// As much as is dirty above the lower mark.
    ToLowerMark,
    /// As much as makes a batch.
    Batch,
}

impl Writeback {
    /// Whether there is a reason to write back what no batch has taken yet.
    pub(super) fn wanted<P: Pmem>(
        &mut self,
        context: &Context<'_, P>,
        settled: Seq,
        now: Now,
    ) -> Option<Extent> {
        let cache = context.cache;
        if !self.log.has_below(settled) {
            if self.state == State::Idle {
                cache.end_drains(settled);
            }
            return None;
        }
        let under_way = self.under_way();
        let (taken_upto, taken_bytes) = under_way.unwrap_or((cache.dirty_tail(), 0));
        let all = self.reasons.want_all(cache, taken_upto, now);
        // Not for want of room: who waits for that needs some of it, and what is dirty absorbs overwrites.
        if all || cache.drain_wanted() {
            self.target = settled;
        }
        // Kept up to date, whatever else is wanted.
        let is_above = self.reasons.want_less(cache, taken_bytes);
        if taken_upto.0 + 1 < self.target.0 || context.lack >= Lack::Free {
            return Some(Extent::Batch);
        }
        if is_above {
            return Some(Extent::ToLowerMark);
        }
        // What the batch under way makes clean may be enough.
        if self.state == State::Idle && is_index_above_high(cache) {
            return Some(Extent::Batch);
        }
        let is_ahead = context.lack == Lack::Ahead && self.state == State::Idle;
        if is_ahead { ahead(cache) } else { None }
    }

    /// Up to where the batch under way goes, and how much it makes clean.
    fn under_way(&self) -> Option<(Seq, u64)> {
        match self.state {
            State::Idle | State::Damaged(_) => None,
            State::Writing | State::Flushing | State::Backoff(_) => {
                Some((self.batch.last_seq, self.batch.dirty_bytes))
            }
        }
    }

    /// Reads of the application come first as long as nothing is short, and nobody has asked for write-back.
    pub(super) fn manners<P: Pmem>(&self, context: &Context<'_, P>) -> Manners {
        let cache = context.cache;
        if cache.base_reads.load(Ordering::Relaxed) == 0 {
            return Manners::Full;
        }
        let pressing = context.lack >= Lack::Free
            || is_urgent(cache)
            || cache.drain_wanted()
            || self.salvage.is_pending()
            || cache.checkpoint.is_writing_back();
        if pressing {
            Manners::Full
        } else {
            Manners::Yielding
        }
    }

    /// How far the next batch may go.
    pub(super) fn limits<P: Pmem>(
        &self,
        context: &Context<'_, P>,
        settled: Seq,
        extent: Extent,
        now: Now,
    ) -> Limits {
        let cache = context.cache;
        let (wanted_ms, least) = if context.lack >= Lack::Free || is_urgent(cache) {
            (BATCH_MS_URGENT, BATCH_MIN_URGENT)
        } else {
            (BATCH_MS, BATCH_MIN)
        };
        let mut load = self.base_rates.load_in(wanted_ms, least);
        let data_bytes_max = (capacity_bytes(cache) / BATCH_CACHE_PARTS).max(1);
        load.data_bytes = load.data_bytes.min(data_bytes_max);
        // Behind one that is under way it takes what comes until that has ended: how much is not known yet.
        if extent == Extent::ToLowerMark && self.under_way().is_none() {
            let above_bytes = bytes_above_low(cache);
            load.data_bytes = load.data_bytes.min(above_bytes.max(1));
        }
        Limits {
            settled,
            order: context.order,
            load,
            clearing: self.batch.clearing_base.clearing(cache.base_caps, now),
            key_count: self.room,
            room: room(self.room, cache.dirty_tail()),
            reach: context.tails.batch_end,
            read_upto: self.read_upto,
        }
    }
}

/// How many keys a batch gathers behind this dirty tail before room is made. In simulations there is little to be had as a
/// rule, so that small batches are written in parts, as enormous ones are.
fn room(room: usize, dirty_tail: Seq) -> usize {
    if cfg!(feature = "sim") {
        let rooms = [4, 16, room];
        rooms[(dirty_tail.0 % 3) as usize].min(room)
    } else {
        room
    }
}

/// Reclaiming ahead of need finds nothing clean. It gets something as long as more is dirty than the lower mark says, and
/// below that only where little data take so many segments that these would be above the upper mark: small writes, and
/// unmaps.
fn ahead<P: Pmem>(cache: &Cache<P>) -> Option<Extent> {
    if is_above_low(cache, 0) {
        Some(Extent::ToLowerMark)
    } else if is_used_above_high(cache) {
        Some(Extent::Batch)
    } else {
        None
    }
}
