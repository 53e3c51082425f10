//! Extents of requests: what they need of the log, and the pages they touch.

use crate::engine::cache::Cache;
use crate::engine::io::{HostIo, Op};
use crate::pmem::Pmem;
use crate::units::{Lba, Page};

/// What an extent needs of the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    pub(super) key_count: usize,
    pub(super) payload_bytes: u64,
    pub(super) page_count: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HasPayload {
    No,
    Yes,
}

pub(super) fn has_payload(io: &HostIo) -> HasPayload {
    if matches!(io.op, Op::Write(..)) {
        HasPayload::Yes
    } else {
        HasPayload::No
    }
}

pub(super) fn need<P: Pmem>(
    cache: &Cache<P>,
    lba: Lba,
    len_blocks: u64,
    payload: HasPayload,
) -> Need {
    let page_count = pages(cache, lba, len_blocks).count();
    match payload {
        HasPayload::Yes => Need {
            key_count: page_count,
            payload_bytes: cache.geometry.bytes(len_blocks),
            page_count,
        },
        HasPayload::No => Need {
            key_count: 1,
            payload_bytes: 0,
            page_count,
        },
    }
}

/// The pages that an extent touches.
pub(super) fn pages<P: Pmem>(
    cache: &Cache<P>,
    lba: Lba,
    len_blocks: u64,
) -> impl Iterator<Item = Page> + use<P> {
    let per_page = u64::from(cache.geometry.blocks_per_page());
    (lba.0 / per_page..(lba.0 + len_blocks).div_ceil(per_page)).map(Page)
}

/// An extent cut at page borders: first block and number of blocks of each piece.
pub(super) fn page_pieces<P: Pmem>(
    cache: &Cache<P>,
    lba: Lba,
    len_blocks: u64,
) -> impl Iterator<Item = (Lba, u32)> + use<P> {
    let per_page = u64::from(cache.geometry.blocks_per_page());
    let end = lba.0 + len_blocks;
    pages(cache, lba, len_blocks).map(move |page| {
        let first = lba.0.max(page.0 * per_page);
        let last = end.min((page.0 + 1) * per_page);
        // A page has 8 blocks at most.
        (Lba(first), (last - first) as u32)
    })
}
