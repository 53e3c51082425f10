//! Extents of requests: what they need of the log, and the pages they touch.

use crate::engine::cache::Cache;
use crate::engine::io::{HostIo, Op};
use crate::index::GROUP_PAGES;
use crate::media::{Key, KeyKind, aligned_pieces};
use crate::pmem::Pmem;
use crate::units::{Lba, Page};
use std::ops::Range;

/// What a batch says of neighbouring blocks: in one key, or, if it has a payload, in one for each page.
#[derive(Clone, Copy, Debug)]
pub(in crate::engine) struct Extent {
    pub(in crate::engine) lba: Lba,
    pub(in crate::engine) len_blocks: u64,
    pub(in crate::engine) kind: KeyKind,
    /// Byte offset of the payload in the segment, in one piece; 0 without payload.
    pub(in crate::engine) payload_off: u32,
}

impl From<&Key> for Extent {
    fn from(key: &Key) -> Self {
        Self {
            lba: key.lba,
            len_blocks: u64::from(key.len_blocks),
            kind: key.kind,
            payload_off: key.payload_off,
        }
    }
}

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
    let page_count = pages(cache, lba, len_blocks).page_count();
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

/// The pages that an extent touches, which has a block at the least.
#[derive(Clone, Debug)]
pub(in crate::engine) struct PageRange {
    next: u64,
    last: u64,
}

impl PageRange {
    fn page_count(&self) -> usize {
        (self.last - self.next) as usize + 1
    }

    /// The page, if it is one.
    #[inline]
    pub(super) fn only(&self) -> Option<Page> {
        (self.next == self.last).then_some(Page(self.next))
    }

    /// The first of them, no more than `page_count`.
    #[inline]
    pub(in crate::engine) fn first(self, page_count: u64) -> Self {
        let last = self.last.min(self.next + page_count - 1);
        Self { last, ..self }
    }

    /// Cut where groups of the index end.
    #[inline]
    pub(in crate::engine) fn groups(self) -> impl Iterator<Item = Range<u64>> {
        aligned_pieces(self.next..self.last + 1, GROUP_PAGES)
    }
}

impl Iterator for PageRange {
    type Item = Page;

    #[inline]
    fn next(&mut self) -> Option<Page> {
        let page = self.next;
        (page <= self.last).then(|| {
            // The base has fewer pages than would let it overflow.
            self.next = page.wrapping_add(1);
            Page(page)
        })
    }
}

/// The pages of an extent.
#[inline]
pub(in crate::engine) fn pages<P: Pmem>(cache: &Cache<P>, lba: Lba, len_blocks: u64) -> PageRange {
    let geometry = &cache.geometry;
    PageRange {
        next: geometry.page_of(lba).0,
        last: geometry.page_of(Lba(lba.0 + len_blocks - 1)).0,
    }
}
