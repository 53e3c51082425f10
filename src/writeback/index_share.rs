//! How much of the index is taken up by pages that are dirty.
//!
//! The marks of write-back are percent of what the log has room for. Parts of pages take a slot of the index as whole pages
//! do, and an unmap takes one for each page and no bytes at all: so the index may be full of what cannot be forgotten while
//! hardly any bytes are dirty.
//!
//! Channels count the pages of what they append, each time that one is written. That is the most that can be dirty, and most
//! often it is little. If it is not, the background looks at a sample of the index, some buckets in each poll, which pages
//! are spread over by a hash: a page that is overwritten again and again takes one slot.

use super::pace::high_percent;
use crate::engine::{BACKGROUND_AGENT, Cache, SegmentState};
use crate::pmem::Pmem;
use crate::units::{NS_PER_MS, NS_PER_US, Now, Seq};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;

/// Buckets of a sample: it is off by a few percent in most cases.
const BUCKETS: usize = 256;
/// How many of them one poll looks at: about a microsecond.
const BUCKETS_PER_POLL: usize = 8;
/// The least time between two polls that do.
const LOOK_EVERY_NS: u64 = 50 * NS_PER_US;
/// The same of those that add up what channels have counted.
const COUNT_EVERY_NS: u64 = NS_PER_MS;
/// Moments that are remembered.
const MARK_COUNT: usize = 64;

/// See the module.
#[derive(Debug)]
pub(super) struct IndexShare {
    /// Numbers of the log, and how many pages had been counted, all of them in ksets below: rising.
    marks: VecDeque<(Seq, u64)>,
    counted_at: Now,
    /// Pages that may be dirty, in percent of what the index is made for.
    percent_max: u64,
    sample: Sample,
}

#[derive(Debug, Default)]
struct Sample {
    looked_at: Now,
    /// When it began. Once it has moved, less is dirty.
    dirty_tail: Seq,
    bucket_count: usize,
    dirty_slots: u64,
    /// Those of them that open segments keep from becoming clean: something newer always comes to these.
    open_slots: u64,
}

impl Default for IndexShare {
    fn default() -> Self {
        Self {
            marks: VecDeque::with_capacity(MARK_COUNT),
            counted_at: Now(0),
            percent_max: 0,
            sample: Sample::default(),
        }
    }
}

impl IndexShare {
    /// Counts, and goes on with the sample if there is to be one. What is known is told to all.
    pub(super) fn poll<P: Pmem>(&mut self, cache: &Cache<P>, now: Now) {
        let dirty_tail = cache.dirty_tail();
        // With fewer pages each finds a slot.
        let blocks = cache.index.page_room() * u64::from(cache.geometry.blocks_per_page());
        if cache.block_count() <= blocks {
            return;
        }
        let has_moved = dirty_tail != self.sample.dirty_tail;
        if has_moved {
            self.sample.begin(dirty_tail);
        }
        if has_moved || now.since_ns(self.counted_at) >= COUNT_EVERY_NS {
            self.counted_at = now;
            self.count(cache, dirty_tail);
            // What the last sample has found holds until there is another one, as far as so much can be dirty: batches
            // may follow faster than samples.
            let told = cache.index_dirty_percent.load(Ordering::Relaxed);
            tell(cache, told.min(self.percent_max));
        }
        let is_due = now.since_ns(self.sample.looked_at) >= LOOK_EVERY_NS;
        if is_due && self.percent_max >= high_percent(cache) {
            self.sample.looked_at = now;
            self.look(cache, dirty_tail);
        }
    }

    fn count<P: Pmem>(&mut self, cache: &Cache<P>, dirty_tail: Seq) {
        // The order matters: what has been counted was drawn before.
        let pages = cache.pages_written();
        let seq_next = cache.seq_next();
        while let Some((seq, _)) = self.marks.get(1)
            && seq.0 <= dirty_tail.0 + 1
        {
            self.marks.pop_front();
        }
        if self.marks.back().is_none_or(|(seq, _)| *seq < seq_next) {
            if self.marks.len() == MARK_COUNT {
                // Every second one will do; the first tells how much is clean.
                let mut number = 0;
                self.marks.retain(|_| {
                    number += 1;
                    number % 2 == 1
                });
            }
            self.marks.push_back((seq_next, pages));
        }
        let first = self.marks.front();
        let clean = first.map_or(
            0,
            |(seq, pages)| {
                if seq.0 <= dirty_tail.0 + 1 { *pages } else { 0 }
            },
        );
        let dirty = pages.wrapping_sub(clean);
        self.percent_max = dirty.saturating_mul(100) / cache.index.page_room().max(1);
    }

    fn look<P: Pmem>(&mut self, cache: &Cache<P>, dirty_tail: Seq) {
        let all = cache.index.bucket_count().min(BUCKETS);
        let sample = &mut self.sample;
        let end = (sample.bucket_count + BUCKETS_PER_POLL).min(all);
        for number in sample.bucket_count..end {
            sample.look_at(cache, number, all);
        }
        sample.bucket_count = end;
        if end < all {
            return;
        }
        let share = sample.dirty_slots * cache.index.bucket_count() as u64 / all as u64;
        let percent = (share * 100 / cache.index.page_room().max(1)).min(self.percent_max);
        tell(cache, percent);
        if percent >= high_percent(cache) && 2 * sample.open_slots >= sample.dirty_slots {
            seal_streams(cache);
        }
        sample.begin(dirty_tail);
    }
}

impl Sample {
    fn begin(&mut self, dirty_tail: Seq) {
        *self = Self {
            looked_at: self.looked_at,
            dirty_tail,
            ..Self::default()
        };
    }

    fn look_at<P: Pmem>(&mut self, cache: &Cache<P>, number: usize, all: usize) {
        let is_dirty = |place| !cache.is_clean(place);
        let is_open = |place| {
            let segment = cache.segments.get(cache.geometry.segment_of(place));
            is_dirty(place) && segment.state() == SegmentState::Open
        };
        self.dirty_slots += cache.index.sampled_slots(number, all, is_dirty);
        self.open_slots += cache.index.sampled_slots(number, all, is_open);
    }
}

/// Ends the open segments of channels: a segment is clean when all of it is, and these hold most of the pages that are to
/// become clean.
fn seal_streams<P: Pmem>(cache: &Cache<P>) {
    for number in 0..cache.core_stream_count {
        cache.try_seal(number, BACKGROUND_AGENT, |open| open.kset_index > 0);
    }
}

fn tell<P: Pmem>(cache: &Cache<P>, percent: u64) {
    cache.index_dirty_percent.store(percent, Ordering::Relaxed);
}
