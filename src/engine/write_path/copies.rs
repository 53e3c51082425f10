//! Copies: what reclaiming keeps is appended to the log again, as a read fill whose data come from the cache.
//!
//! What is copied is on the base, so a copy makes nothing dirty; it is put into the index only if its page was not
//! written since it was found there (INV-FILL-1), and is durable before the segment that it came from is freed.

use super::batch::{Batch, Refusal};
use super::extent::HasPayload;
use crate::canary::{self, Canary};
use crate::engine::cache::{BACKGROUND_AGENT, Cache};
use crate::engine::segments::Special;
use crate::engine::stream::{OpenSegment, Stream};
use crate::index::Version;
use crate::media::KeyKind;
use crate::pmem::Pmem;
use crate::units::{Lba, PAGE_SIZE_BYTES};

/// Pages in one batch, at most: a poll of some ten microseconds.
const COPIES_MAX: usize = 16;
/// So many segments are left for writers when one is opened for copies.
const COPY_FREE_SEGMENTS_MIN: usize = 2;

/// A part of a page that is to be copied.
#[derive(Clone, Copy, Debug)]
struct Copy {
    lba: Lba,
    len_blocks: u32,
    /// Of the bucket of its page, from before it was found where it is copied from.
    version: Version,
    /// What it has of [`crate::engine::heat`] at its new place.
    heat: u8,
}

/// How a batch of copies ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyEnd {
    /// Each was copied, or its page was written.
    Done,
    /// Somebody is at one of the pages: again later.
    Busy,
    /// There is no room for copies.
    NoRoom,
    /// The memory that is free has to be looked at first, which goes on with each attempt.
    NotLookedAt,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Copier {
    batch: Batch,
    copies: Vec<Copy>,
    /// Numbers of those in the batch.
    admitted: Vec<usize>,
    payloads: Vec<u8>,
}

impl Default for Copier {
    fn default() -> Self {
        Self {
            batch: Batch::new(BACKGROUND_AGENT),
            copies: Vec::with_capacity(COPIES_MAX),
            admitted: Vec::with_capacity(COPIES_MAX),
            payloads: vec![0; COPIES_MAX * PAGE_SIZE_BYTES as usize],
        }
    }
}

impl Copier {
    pub(crate) fn is_full(&self) -> bool {
        self.copies.len() == COPIES_MAX
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// Where the payload of the next copy is to be put.
    pub(crate) fn next_payload(&mut self) -> &mut [u8] {
        let page_bytes = PAGE_SIZE_BYTES as usize;
        let start = self.copies.len() * page_bytes;
        &mut self.payloads[start..start + page_bytes]
    }

    /// Adds the copy whose payload was put where it belongs, a part of a page.
    pub(crate) fn add(&mut self, lba: Lba, len_blocks: u32, version: Version, heat: u8) {
        self.copies.push(Copy {
            lba,
            len_blocks,
            version,
            heat,
        });
    }

    /// Appends all copies to a stream and publishes them. `born` is the age of where they come from.
    pub(crate) fn commit<P: Pmem>(&mut self, cache: &Cache<P>, to: Special, born: u64) -> CopyEnd {
        let mut end = CopyEnd::Done;
        let mut next = 0;
        while next < self.copies.len() && matches!(end, CopyEnd::Done | CopyEnd::Busy) {
            let (left, now) = self.run_batch(cache, (to, born), next);
            next = left;
            if now != CopyEnd::Done {
                end = now;
            }
        }
        self.copies.clear();
        end
    }

    /// One batch, of as many copies from number `first` on as fit into it. Returns the number of the first that is left.
    fn run_batch<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        (to, born): (Special, u64),
        first: usize,
    ) -> (usize, CopyEnd) {
        let Some(number) = cache.special_stream(to) else {
            return (first, CopyEnd::NoRoom);
        };
        let Ok(mut stream) = cache.streams[number].try_lock() else {
            return (first, CopyEnd::NoRoom);
        };
        self.batch.clear();
        self.admitted.clear();
        let gathered = self.gather(cache, &mut stream, first);
        if let Some(open) = stream.open.as_mut().filter(|_| !self.admitted.is_empty()) {
            if to == Special::Compacted {
                let segment = cache.segments.get(open.id);
                segment.inherit_age(born);
            }
            self.append(cache, number, open);
        }
        gathered
    }

    fn gather<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        stream: &mut Stream,
        first: usize,
    ) -> (usize, CopyEnd) {
        let mut end = CopyEnd::Done;
        for (at, copy) in self.copies.iter().enumerate().skip(first) {
            let len_blocks = u64::from(copy.len_blocks);
            let mark = self.batch.mark();
            let payload_bytes = cache.geometry.bytes(len_blocks);
            if !self.batch.fits(stream, 1, payload_bytes)
                && cache.segments.free_count()
                    <= COPY_FREE_SEGMENTS_MIN + cache.segments_kept_free()
            {
                return (at, CopyEnd::NoRoom);
            }
            let batch = &mut self.batch;
            match batch.admit(cache, stream, copy.lba, len_blocks, HasPayload::Yes) {
                Ok(()) => {
                    let slot = cache.index.locate(cache.geometry.page_of(copy.lba));
                    // The batch holds the claim, and has nothing but copies.
                    let fresh = cache.index.version(slot).is_unwritten_since(copy.version);
                    if fresh || canary::is(Canary::StaleCopyInstalled) {
                        self.admitted.push(at);
                    } else {
                        // It may be a neighbour in the index that was written.
                        self.batch.roll_back(cache, mark);
                        end = CopyEnd::Busy;
                    }
                }
                Err(Refusal::Busy) => end = CopyEnd::Busy,
                Err(Refusal::BatchFull) => return (at, end),
                Err(Refusal::NoRoom) => return (at, CopyEnd::NoRoom),
                Err(Refusal::NotLookedAt) => return (at, CopyEnd::NotLookedAt),
            }
        }
        (self.copies.len(), end)
    }

    /// Appends what was admitted.
    fn append<P: Pmem>(&mut self, cache: &Cache<P>, number: usize, open: &mut OpenSegment) {
        let mut copied_bytes = 0;
        self.batch.draw(cache, number, open);
        for at in &self.admitted {
            let copy = &self.copies[*at];
            let start = at * PAGE_SIZE_BYTES as usize;
            let len_bytes = cache.geometry.bytes(u64::from(copy.len_blocks));
            // A page at the most.
            let payload = &self.payloads[start..start + len_bytes as usize];
            self.batch
                .store_piece(cache, open, (copy.lba, KeyKind::Fill), payload);
            copied_bytes += len_bytes;
        }
        drop(self.batch.commit(cache, number, open));
        for (extent, at) in self.batch.extents.iter().zip(&self.admitted) {
            let place = cache.geometry.place(open.id, extent.payload_off);
            cache.heat.set(open.id, place, self.copies[*at].heat);
        }
        cache
            .background_counters()
            .gc_copied_bytes
            .add(copied_bytes);
    }
}
