//! Looks ahead: where the next read begins is looked up, and its data are asked for while another is copied.

use crate::engine::cache::Cache;
use crate::engine::channel::Core;
use crate::index::{BlockMap, Lookup, PageMap, Version};
use crate::pmem::{Coming, Pmem};
use crate::units::{Lba, Page};

/// Of the data of the next read, so much is asked for before the last is copied, and the rest of its first page meanwhile.
const PREFETCH_BYTES: u64 = 512;

/// A [`Lookup`] of a page that lies in one piece.
#[derive(Clone, Copy, Debug)]
pub(super) struct WholePage {
    pub(super) page: Page,
    pub(super) source: BlockMap,
    pub(super) version: Version,
    /// What the read wants of it, and has not asked for yet.
    pub(super) coming: Coming,
}

impl Core {
    /// Looks up where the first read in the queue begins, and asks for the data there: they come while another
    /// read is copied. The answer is good for as long as the grace period in which it was given.
    #[inline]
    pub(super) fn look_ahead<P: Pmem>(&self, cache: &Cache<P>) -> Option<WholePage> {
        let request = self.requests.get(*self.reads.front()?)?;
        let done_blocks = request.read?.done_blocks;
        let start = request.io.lba.0 + done_blocks;
        let page = cache.geometry.page_of(Lba(start));
        let Lookup { map, version } = cache.index.lookup(cache.index.locate(page))?;
        let PageMap::Whole(source @ BlockMap::Mapped(_)) = map else {
            return None;
        };
        let page_blocks = u64::from(cache.geometry.blocks_per_page());
        let first = start & (page_blocks - 1);
        // A page has 8 blocks at most.
        let BlockMap::Mapped(place) = source.behind(first as u32) else {
            return None;
        };
        let len_blocks = (page_blocks - first).min(request.io.len_blocks - done_blocks);
        let len_bytes = cache.geometry.bytes(len_blocks);
        let (off, at_once) = (
            cache.geometry.place_off(place),
            PREFETCH_BYTES.min(len_bytes),
        );
        cache.pmem.prefetch(off, at_once);
        cache.heat.prefetch(place);
        if let Some(crcs) = cache.verifying() {
            crcs.prefetch(place);
        }
        let coming = Coming {
            off: off.plus(at_once),
            len_bytes: len_bytes - at_once,
        };
        Some(WholePage {
            page,
            source,
            version,
            coming,
        })
    }
}
