//! When write-back has a reason to run, and how fast it may.

use super::batch::BASE_WRITE_BYTES_MAX;
use crate::engine::{Cache, Setting};
use crate::pmem::Pmem;
use crate::token_bucket::TokenBucket;
use crate::units::{NS_PER_MS, NS_PER_S, Now, PAGE_SIZE_BYTES, Seq};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;

/// Moments that are remembered.
const MARK_COUNT: usize = 64;
/// The least time between two of them.
const MARK_EVERY_NS_MIN: u64 = 20 * NS_PER_MS;
/// How often it is looked whether requests have come.
const LOOK_EVERY_NS: u64 = 2 * NS_PER_MS;
/// The rate of the base is not learnt from shorter batches.
const RATE_BYTES_MIN: u64 = 1 << 20;
/// What may be written at once after a pause, as a part of a second at the highest rate.
const BURST_PARTS: u64 = 20;

/// What is dirty above the mark from which on it is written back.
pub(crate) struct Excess {
    pub(crate) part: u64,
    /// What it can be at the most.
    pub(crate) whole: u64,
}

pub(crate) fn excess<P: Pmem>(cache: &Cache<P>) -> Excess {
    let high = high_percent(cache);
    Excess {
        part: full_percent(cache).saturating_sub(high),
        whole: 100 - high,
    }
}

/// Whether so much is dirty that batches should be short: a writer may have to wait for the end of one. That
/// is a fifth of the way from the upper mark to the end.
pub(super) fn is_urgent<P: Pmem>(cache: &Cache<P>) -> bool {
    let high = high_percent(cache);
    full_percent(cache) >= high + (100 - high) / 5
}

/// Whether the index has more to keep for the sake of dirty data than the upper mark says. It is the pages that count there,
/// however little of each is dirty.
pub(super) fn is_index_above_high<P: Pmem>(cache: &Cache<P>) -> bool {
    cache.index_dirty_percent.load(Ordering::Relaxed) >= high_percent(cache)
}

/// Dirty data as a share of what there is room for, in the log or in the index.
fn full_percent<P: Pmem>(cache: &Cache<P>) -> u64 {
    let index_percent = cache.index_dirty_percent.load(Ordering::Relaxed).min(100);
    dirty_percent(cache, 0).max(index_percent)
}

/// Whether more is dirty, apart from this, than the mark says at which write-back for want of room ends.
pub(crate) fn is_above_low<P: Pmem>(cache: &Cache<P>, apart_bytes: u64) -> bool {
    dirty_percent(cache, apart_bytes) > low_percent(cache)
}

/// How much more, of all that is dirty.
pub(super) fn bytes_above_low<P: Pmem>(cache: &Cache<P>) -> u64 {
    let dirty_bytes = cache.dirty_bytes.load(Ordering::Relaxed);
    let low_bytes = capacity_bytes(cache) / 100 * low_percent(cache);
    dirty_bytes.saturating_sub(low_bytes)
}

/// Whether more segments are in use than the upper mark says.
pub(super) fn is_used_above_high<P: Pmem>(cache: &Cache<P>) -> bool {
    let (used, all) = (cache.segments_used(), cache.segments_in_service());
    used as u64 * 100 >= all as u64 * high_percent(cache)
}

fn low_percent<P: Pmem>(cache: &Cache<P>) -> u64 {
    u64::from(cache.settings.get(Setting::DirtyLowPercent))
}

pub(super) fn high_percent<P: Pmem>(cache: &Cache<P>) -> u64 {
    u64::from(cache.settings.get(Setting::DirtyHighPercent))
}

/// Dirty data, without `apart_bytes` of them, as a share of what the log has room for.
fn dirty_percent<P: Pmem>(cache: &Cache<P>, apart_bytes: u64) -> u64 {
    let dirty_bytes = cache.dirty_bytes.load(Ordering::Relaxed);
    dirty_bytes.saturating_sub(apart_bytes) / (capacity_bytes(cache) / 100).max(1)
}

/// Payload that the log has room for, roughly.
pub(super) fn capacity_bytes<P: Pmem>(cache: &Cache<P>) -> u64 {
    let pages_per_segment = cache.geometry.segment_room_bytes() / u64::from(PAGE_SIZE_BYTES);
    u64::from(cache.geometry.segment_count()) * pages_per_segment * u64::from(PAGE_SIZE_BYTES)
}

/// What the base lately took, in bytes a millisecond, its flushes included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct BaseRate(u64);

impl BaseRate {
    /// A batch has ended, of which so much was written.
    pub(super) fn learn(&mut self, bytes: u64, took_ns: u64) {
        if bytes < RATE_BYTES_MIN {
            return;
        }
        let rate = u128::from(bytes) * u128::from(NS_PER_MS) / u128::from(took_ns.max(1));
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        // Half of what was known stays, so that one lucky batch does not make the next one too long.
        self.0 = self.0 / 2 + rate / 2;
    }

    /// What it takes in so many milliseconds.
    pub(super) fn bytes_in(self, ms: u64) -> u64 {
        self.0.saturating_mul(ms)
    }
}

/// Which reasons hold, apart from those that others have.
#[derive(Debug, Default)]
pub(super) struct Reasons {
    pub(super) ages: Ages,
    quiet: Quiet,
    /// Dirty data were above the upper mark, and are not below the lower one yet.
    is_lowering: bool,
}

impl Reasons {
    /// Whether everything that is dirty now is to be written back, `upto` being what batches have taken.
    pub(super) fn want_all<P: Pmem>(&mut self, cache: &Cache<P>, upto: Seq, now: Now) -> bool {
        let age_s = u64::from(cache.settings.get(Setting::DirtyAgeS));
        let old = age_s > 0 && self.ages.since_ns(upto, now) >= age_s * NS_PER_S;
        old || self.quiet.is_long_enough(cache, now)
    }

    /// Whether there is more dirty than there should be, apart from what the batch under way takes.
    pub(super) fn want_less<P: Pmem>(&mut self, cache: &Cache<P>, apart_bytes: u64) -> bool {
        let is_high = dirty_percent(cache, apart_bytes) >= high_percent(cache);
        self.is_lowering = is_high || (self.is_lowering && is_above_low(cache, apart_bytes));
        self.is_lowering
    }
}

/// Roughly, when which part of the log was written.
#[derive(Debug)]
pub(super) struct Ages {
    /// What was drawn after each moment has at least this seq.
    marks: VecDeque<(Seq, Now)>,
    every_ns: u64,
}

impl Default for Ages {
    fn default() -> Self {
        Self {
            marks: VecDeque::with_capacity(MARK_COUNT),
            every_ns: MARK_EVERY_NS_MIN,
        }
    }
}

impl Ages {
    /// `seq_next` is the next number now. Everything up to `dirty_tail` is forgotten.
    pub(super) fn note(&mut self, dirty_tail: Seq, seq_next: Seq, now: Now) {
        while let Some((seq, _)) = self.marks.get(1)
            && seq.0 <= dirty_tail.0 + 1
        {
            self.marks.pop_front();
        }
        let Some((last_seq, last)) = self.marks.back_mut() else {
            // What is there already is as old as it was: from now on it counts.
            self.marks.push_back((Seq(0), now));
            return;
        };
        if *last_seq == seq_next {
            // Nothing was drawn since.
            *last = now;
            return;
        }
        if now.since_ns(*last) < self.every_ns {
            return;
        }
        if self.marks.len() == 1 {
            self.every_ns = MARK_EVERY_NS_MIN;
        }
        if self.marks.len() == MARK_COUNT {
            // Every second one will do.
            let mut number = 0;
            self.marks.retain(|_| {
                number += 1;
                number % 2 == 1
            });
            self.every_ns *= 2;
        }
        self.marks.push_back((seq_next, now));
    }

    /// How old the oldest kset behind `upto` is at the most.
    pub(super) fn since_ns(&self, upto: Seq, now: Now) -> u64 {
        let before = self.marks.iter().take_while(|(seq, _)| seq.0 <= upto.0 + 1);
        before.last().map_or(0, |(_, at)| now.since_ns(*at))
    }
}

/// Since when there have been no requests.
#[derive(Debug, Default)]
struct Quiet {
    looked: Now,
    since: Now,
    request_count: u64,
}

impl Quiet {
    fn is_long_enough<P: Pmem>(&mut self, cache: &Cache<P>, now: Now) -> bool {
        let wanted_ms = u64::from(cache.settings.get(Setting::IdleWritebackMs));
        if wanted_ms == 0 {
            return false;
        }
        if now.since_ns(self.looked) >= LOOK_EVERY_NS {
            self.looked = now;
            let request_count = cache.request_count();
            if request_count != self.request_count {
                self.request_count = request_count;
                self.since = now;
            }
        }
        now.since_ns(self.since) >= wanted_ms * NS_PER_MS
    }
}

/// Keeps base writes below a rate.
#[derive(Debug, Default)]
pub(super) struct Throttle(TokenBucket);

impl Throttle {
    /// Bytes that may be written now: 0, or enough for an operation of a sensible size.
    pub(super) fn allowance<P: Pmem>(&mut self, cache: &Cache<P>, wanted: u64, now: Now) -> u64 {
        let rate_mib_s = cache.settings.get(Setting::WritebackRateMibS);
        let room = ((u64::from(rate_mib_s) << 20) / BURST_PARTS).max(BASE_WRITE_BYTES_MAX);
        let allowed = self.0.fill(rate_mib_s, room, now);
        if rate_mib_s == 0 {
            wanted
        } else if allowed < wanted.min(BASE_WRITE_BYTES_MAX) {
            0
        } else {
            wanted.min(allowed)
        }
    }

    /// So much was written.
    pub(super) fn take<P: Pmem>(&mut self, cache: &Cache<P>, bytes: u64) {
        // Nothing is owed for what no rate has limited.
        if cache.settings.get(Setting::WritebackRateMibS) > 0 {
            self.0.take(bytes);
        }
    }
}

#[cfg(test)]
mod tests;
