//! A miss of a part of a page is rounded out to the whole page, if nothing of it is cached.
//!
//! The rest costs the base next to nothing, and whoever reads on from there, or reads the page at another
//! alignment, finds it. It goes to a pad ([`Pads`]), from where the fill takes it. It is no read-ahead: a page of
//! which the reader wants nothing is not asked for.

use super::cache::Cache;
use super::channel::Core;
use super::io::{BaseError, BaseRequest, Outbox};
use super::misses::{Miss, Misses};
use crate::canary::{self, Canary};
use crate::index::{BlockMap, PageMap, Version};
use crate::pmem::Pmem;
use crate::units::{Lba, PAGE_SIZE_BYTES, Page};
use std::sync::atomic::Ordering;

/// Blocks of the first page of a miss before it, and of the last one behind it, that are to come along.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rest {
    head_blocks: u64,
    tail_blocks: u64,
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

impl<P: Pmem> Cache<P> {
    /// What is to come along with a miss, if that is to be kept. That nothing is known of a page is asked again, of the
    /// same version of its bucket as when the miss was found: so it was so then (INV-READ-3).
    pub(super) fn rest_of(&self, miss: &Miss) -> Rest {
        let geometry = &self.geometry;
        if !miss.admitted || geometry.blocks_per_page() == 1 {
            return Rest::default();
        }
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

impl Misses {
    /// A base read that has failed, without the rest that it had. `None`: it had none.
    fn without_rest<P>(&mut self, cache: &Cache<P>, op: u32) -> Option<BaseRequest> {
        let has_failed = match self.table.get(op)?.result {
            // Somebody wants reads to end.
            None | Some(Ok(()) | Err(BaseError::Reset)) => false,
            Some(Err(_)) => true,
        };
        if !has_failed || !self.leave_rest(&cache.geometry, op) {
            return None;
        }
        let miss = self.table.get_mut(op)?;
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
