//! Pads: memory of a channel's own for what base reads bring that is to be kept, or given to other readers.
//!
//! A pad is some pages in a row. Blocks lie in it as they lie in their pages, so that a device that wants whole pages
//! between the ends of a transfer finds them.

use std::fmt::Debug;
use std::ptr::NonNull;

use super::iov::IovCursor;
use crate::units::PAGE_SIZE_BYTES;

/// Size of the pages of which pads are made, and alignment of [`PadMemory`].
pub const PAD_PAGE_SIZE_BYTES: usize = PAGE_SIZE_BYTES as usize;

/// Memory for the pads of a channel, from whoever makes the channel.
#[derive(Debug)]
pub struct PadMemory {
    start: NonNull<u8>,
    len_bytes: usize,
    /// Frees the memory when it is dropped.
    _owner: Box<dyn Debug + Send>,
}

// SAFETY: the contract of `PadMemory::new` makes the memory usable on every thread; the owner is `Send`.
unsafe impl Send for PadMemory {}

impl PadMemory {
    /// The `len_bytes` bytes at `start`, which `owner` frees when it is dropped.
    ///
    /// # Safety
    /// As long as `owner` lives, wherever it is moved to, the memory is valid for reads and writes on every thread,
    /// initialised, aligned to [`PAD_PAGE_SIZE_BYTES`], reachable for the base device, no part of a cache device, and
    /// nobody else's. The channel that gets it is not dropped while a base read that it has asked for is under way
    /// ([`crate::engine::Channel::abandon_pads`] otherwise), and no [`IovCursor`] of such a base read is used
    /// afterwards.
    #[must_use]
    pub unsafe fn new(start: NonNull<u8>, len_bytes: usize, owner: Box<dyn Debug + Send>) -> Self {
        Self {
            start,
            len_bytes,
            _owner: owner,
        }
    }
}

/// Names a pad that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PadId {
    first_page: usize,
    page_count: usize,
}

/// The pads of a channel.
#[derive(Debug)]
pub(crate) struct Pads {
    memory: PadMemory,
    /// For each page.
    in_use: Vec<bool>,
    /// Behind the pad that was taken last: what was put back long ago comes first.
    next: usize,
}

impl Pads {
    pub(crate) fn new(memory: PadMemory) -> Self {
        let page_count = memory.len_bytes / PAD_PAGE_SIZE_BYTES;
        Self {
            memory,
            in_use: vec![false; page_count],
            next: 0,
        }
    }

    /// Takes a pad of so many pages, from 1. `None`: there are not so many in a row that nobody uses.
    pub(crate) fn take(&mut self, page_count: usize) -> Option<PadId> {
        let behind = self.find(self.next, page_count);
        let first_page = behind.or_else(|| self.find(0, page_count))?;
        self.next = first_page + page_count;
        self.in_use[first_page..self.next].fill(true);
        Some(PadId {
            first_page,
            page_count,
        })
    }

    fn find(&self, from: usize, page_count: usize) -> Option<usize> {
        let mut free_from = from;
        for (page, in_use) in self.in_use.iter().enumerate().skip(from) {
            if *in_use {
                free_from = page + 1;
            } else if page + 1 - free_from == page_count {
                return Some(free_from);
            }
        }
        None
    }

    /// The `len_bytes` bytes of a pad behind the first `offset_bytes`. Good until the pad is put back.
    ///
    /// # Panics
    /// The pad is not so long.
    pub(crate) fn cursor(&self, id: PadId, offset_bytes: usize, len_bytes: usize) -> IovCursor {
        let size_bytes = id.page_count * PAD_PAGE_SIZE_BYTES;
        assert!(
            offset_bytes + len_bytes <= size_bytes,
            "{len_bytes} bytes at {offset_bytes} of a pad of {size_bytes}"
        );
        let start = id.first_page * PAD_PAGE_SIZE_BYTES + offset_bytes;
        let start = self.memory.start.as_ptr().wrapping_add(start);
        // SAFETY: the pages of `id` lie in the memory, which is valid by the contract of `PadMemory::new`, and the part
        // lies in them (asserted). They are one base read's until the pad is put back, which is when it has been dealt with;
        // by the contract no cursor is used later.
        unsafe { IovCursor::of_piece(start, len_bytes) }
    }

    /// The base read for which the pad was taken has ended, and what it has brought is not needed any more.
    ///
    /// # Panics
    /// It is put back already.
    pub(crate) fn put_back(&mut self, id: PadId) {
        let pages = &mut self.in_use[id.first_page..][..id.page_count];
        assert!(
            pages.iter().all(|in_use| *in_use),
            "INV-READ-4: a pad is put back once"
        );
        pages.fill(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pads(page_count: usize) -> Pads {
        Pads::new(PadMemory::from_heap(page_count))
    }

    fn address(cursor: IovCursor, len_bytes: usize) -> usize {
        let mut list = Vec::new();
        cursor.fill_iovecs(len_bytes, &mut list);
        assert_eq!(list.len(), 1, "one piece");
        list[0].iov_base.addr()
    }

    #[test]
    fn what_is_written_to_a_part_of_a_pad_is_found_there() {
        let mut pads = pads(3);
        let id = pads.take(2).unwrap();
        let bytes: Vec<u8> = (0..4096).map(|at| (at % 251) as u8).collect();
        pads.cursor(id, 512, 4096).write_from(&bytes);
        let mut got = vec![0; 1000];
        pads.cursor(id, 1512, 1000).read_into(&mut got);
        assert_eq!(got, bytes[1000..2000]);
        assert_eq!(
            address(pads.cursor(id, 0, 512), 512) % PAD_PAGE_SIZE_BYTES,
            0
        );
    }

    #[test]
    fn pads_in_use_have_no_page_in_common() {
        let mut pads = pads(7);
        let place = |pads: &Pads, id| address(pads.cursor(id, 0, 1), 1);
        let taken = [1, 3, 2].map(|page_count| pads.take(page_count).unwrap());
        let start = place(&pads, taken[0]);
        let at = |pages: usize| start + pages * PAD_PAGE_SIZE_BYTES;
        assert_eq!(taken.map(|id| place(&pads, id)), [at(0), at(1), at(4)]);
        assert_eq!(pads.take(2), None);
        pads.put_back(taken[0]);
        assert_eq!(pads.take(2), None, "two are free, and not in a row");
        pads.put_back(taken[1]);
        let large = pads.take(4).unwrap();
        assert_eq!(place(&pads, large), at(0));
        let last = pads.take(1).unwrap();
        assert_eq!(place(&pads, last), at(6));
        assert_eq!(pads.take(1), None);
    }

    #[test]
    fn a_pad_is_no_larger_than_the_memory() {
        let mut pads = pads(2);
        assert_eq!(pads.take(3), None);
        assert!(pads.take(2).is_some());
    }

    #[test]
    #[should_panic(expected = "of a pad of 4096")]
    fn nothing_lies_behind_the_end_of_a_pad() {
        let mut pads = pads(2);
        let id = pads.take(1).unwrap();
        pads.cursor(id, 512, 4096);
    }

    #[test]
    #[should_panic(expected = "INV-READ-4")]
    fn a_pad_is_not_put_back_twice() {
        let mut pads = pads(1);
        let id = pads.take(1).unwrap();
        pads.put_back(id);
        pads.put_back(id);
    }
}
