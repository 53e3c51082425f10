//! A miss of a part of a page is rounded out to the whole page, if nothing of it is cached.
//!
//! The rest costs the base next to nothing, and whoever reads on from there, or reads the page at another
//! alignment, finds it. It goes to a pad ([`Pads`]), from where the fill takes it. It is no read-ahead: a page of
//! which the reader wants nothing is not asked for.

use super::cache::Cache;
use super::channel::Core;
use super::io::{BaseRequest, Outbox};
use super::misses::{Miss, Misses};
use crate::canary::{self, Canary};
use crate::index::{BlockMap, PageMap, Version};
use crate::media::Geometry;
use crate::pmem::{IovCursor, PAD_SIZE_BYTES, PadId, Pads, Pmem};
use crate::units::{Lba, PAGE_SIZE_BYTES, Page};
use std::sync::atomic::Ordering;

/// Base reads of a channel that are rounded out at once, at most: enough for the queues of a guest or two.
const PAD_COUNT: usize = 64;

/// Blocks of the first page of a miss before it, and of the last one behind it, that are to come along.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rest {
    head_blocks: u64,
    tail_blocks: u64,
}

/// A miss that was rounded out, as it was before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pad: PadId,
    lba: Lba,
    len_blocks: u64,
    cursor: IovCursor,
}

impl Rest {
    /// Where a miss begins and ends with it.
    pub(super) fn added_to(self, miss: &Miss) -> (u64, u64) {
        let end = miss.lba.0 + miss.len_blocks;
        (miss.lba.0 - self.head_blocks, end + self.tail_blocks)
    }

    /// Of a miss that ends earlier, with a whole page.
    pub(super) fn without_tail(self) -> Self {
        Self {
            tail_blocks: 0,
            ..self
        }
    }
}

impl<P> Cache<P> {
    /// How much memory a channel needs to round misses out to whole pages; 0 where all blocks are whole pages.
    #[must_use]
    pub fn pads_size_bytes(&self) -> usize {
        match self.geometry.blocks_per_page() {
            1 => 0,
            _ => PAD_COUNT * PAD_SIZE_BYTES,
        }
    }
}

impl<P: Pmem> Cache<P> {
    /// What is to come along with a miss that is to be kept. That nothing is known of a page is asked again, of the same version of its
    /// bucket as when the miss was found: so it was so then (INV-READ-3).
    fn rest_of(&self, miss: &Miss) -> Rest {
        let geometry = &self.geometry;
        let end = miss.lba.0 + miss.len_blocks;
        let first = geometry.page_of(miss.lba);
        let last = geometry.page_of(Lba(end - 1));
        let unless_known = |page: Page, blocks: u64| {
            let version = miss.versions[(page.0 - first.0) as usize];
            if blocks > 0 && self.is_unknown(page, version) {
                blocks
            } else {
                0
            }
        };
        // The last page of the base may be a part of one.
        let last_end = geometry.page_start(Page(last.0 + 1)).0;
        let last_end = last_end.min(self.block_count());
        let rest = Rest {
            head_blocks: unless_known(first, miss.lba.0 - geometry.page_start(first).0),
            tail_blocks: unless_known(last, last_end.saturating_sub(end)),
        };
        let len_blocks = rest.head_blocks + miss.len_blocks + rest.tail_blocks;
        if geometry.bytes(len_blocks) > self.rounded_size_max_bytes() {
            return Rest::default();
        }
        rest
    }

    /// A read of the largest size that becomes a fill may be rounded out at both ends, if a segment has room for that.
    fn rounded_size_max_bytes(&self) -> u64 {
        let size_bytes = self.write_size_max_bytes() + 2 * PAGE_SIZE_BYTES as u64;
        if size_bytes <= self.geometry.segment_size_bytes() / 2 {
            size_bytes
        } else {
            self.write_size_max_bytes()
        }
    }

    fn is_unknown(&self, page: Page, version: Version) -> bool {
        let found = self.index.lookup(self.index.locate(page));
        found.is_some_and(|found| {
            let unknown = found.map == PageMap::Whole(BlockMap::Absent);
            let same = found.version == version && version != Version::UNSTABLE;
            same && (unknown || canary::is(Canary::KnownPageRounded))
        })
    }
}

impl Miss {
    /// Takes the rest along, if there is a pad for it.
    pub(super) fn round_out(&mut self, geometry: &Geometry, rest: Rest, pads: &mut Option<Pads>) {
        let Some(pads) = pads.as_mut().filter(|_| rest != Rest::default()) else {
            return;
        };
        let bytes = |blocks| geometry.bytes(blocks) as usize;
        let lens = (
            bytes(rest.head_blocks),
            bytes(self.len_blocks),
            bytes(rest.tail_blocks),
        );
        let Some((pad, cursor)) = pads.wrap(self.cursor, lens) else {
            return;
        };
        if canary::is(Canary::PadFreedInUse) {
            pads.put_back(pad);
        }
        self.asked = Some(Asked {
            pad,
            lba: self.lba,
            len_blocks: self.len_blocks,
            cursor: self.cursor,
        });
        self.lba.0 -= rest.head_blocks;
        self.len_blocks += rest.head_blocks + rest.tail_blocks;
        self.cursor = cursor;
    }

    /// Leaves the rest out again. `false`: there is none.
    fn round_back(&mut self, pads: &mut Option<Pads>) -> bool {
        let Some(asked) = self.asked.take() else {
            return false;
        };
        self.lba = asked.lba;
        self.len_blocks = asked.len_blocks;
        self.cursor = asked.cursor;
        put_back(pads, asked.pad);
        true
    }
}

/// The pad of a miss that is over, or that goes on without it (INV-READ-4): its base read has ended.
fn put_back(pads: &mut Option<Pads>, pad: PadId) {
    if let Some(pads) = pads
        && !canary::is(Canary::PadFreedInUse)
    {
        pads.put_back(pad);
    }
}

impl Misses {
    /// What is to come along with a miss, if there is a pad for it. What is not kept gains nothing.
    pub(super) fn rest_of<P: Pmem>(&self, cache: &Cache<P>, miss: &Miss) -> Rest {
        let has_pad = self.pads.as_ref().is_some_and(Pads::has_free);
        if miss.admitted && has_pad && cache.geometry.blocks_per_page() > 1 {
            cache.rest_of(miss)
        } else {
            Rest::default()
        }
    }

    pub(super) fn remove(&mut self, op: u32) -> Option<Miss> {
        let miss = self.table.remove(op)?;
        if let Some(asked) = miss.asked {
            put_back(&mut self.pads, asked.pad);
        }
        Some(miss)
    }

    /// A base read that has failed, without the rest that it had. `None`: it had none.
    fn without_rest<P>(&mut self, cache: &Cache<P>, op: u32) -> Option<BaseRequest> {
        let miss = self.table.get_mut(op)?;
        if !matches!(miss.result, Some(Err(_))) || !miss.round_back(&mut self.pads) {
            return None;
        }
        miss.result = None;
        // Others need not wait for a base that has failed once.
        miss.withdraw(cache);
        Some(miss.base_read(op))
    }
}

impl Core {
    /// A base read that took more along than was asked for may have failed because of that: it is repeated without.
    /// `false`: the result is that of what was asked for, or there was no error.
    pub(super) fn ask_without_rest<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        op: u32,
        out: &mut Outbox,
    ) -> bool {
        let request = self.misses.without_rest(cache, op);
        if let Some(request) = request {
            self.ask_base(cache, request, out);
        }
        request.is_some()
    }

    /// Starts a base read of a miss.
    pub(super) fn ask_base<P: Pmem>(
        &self,
        cache: &Cache<P>,
        request: BaseRequest,
        out: &mut Outbox,
    ) {
        let bytes = cache.geometry.bytes(request.len_blocks);
        self.counters(cache).base_read_bytes.add(bytes);
        cache.base_reads.fetch_add(1, Ordering::Relaxed);
        out.base.push(request);
    }
}
