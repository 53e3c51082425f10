//! Pads: memory for what a base read brings beside what its reader has room for.
//!
//! A pad is two pages. What comes before the reader's blocks ends where the first page of it does, what comes
//! behind them begins with the second: a device that wants whole pages between the ends of a transfer finds them,
//! as far as the reader's own memory has them. The scatter list lies at the very start, where no rest of a page
//! reaches: it has a block less than a page.

use std::fmt::Debug;
use std::ptr::NonNull;

use libc::iovec;

use super::iov::IovCursor;
use crate::units::PAGE_SIZE_BYTES;

/// Size of a pad.
pub const PAD_SIZE_BYTES: usize = 2 * HALF_SIZE_BYTES;
/// Alignment of [`PadMemory`].
pub const PAD_ALIGN_BYTES: usize = HALF_SIZE_BYTES;
const HALF_SIZE_BYTES: usize = PAGE_SIZE_BYTES as usize;
/// Of a pad, from its start; the smallest block.
const LIST_SIZE_BYTES: usize = 512;
const LIST_LEN_MAX: usize = LIST_SIZE_BYTES / size_of::<iovec>();
/// What has room on either side.
const REST_SIZE_BYTES_MAX: usize = HALF_SIZE_BYTES - LIST_SIZE_BYTES;

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
    /// initialised, aligned to [`PAD_ALIGN_BYTES`], reachable for the base device, no part of a cache device, and
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
pub(crate) struct PadId(usize);

/// The pads of a channel.
#[derive(Debug)]
pub(crate) struct Pads {
    memory: PadMemory,
    count: usize,
    free: Vec<PadId>,
}

impl Pads {
    pub(crate) fn new(memory: PadMemory) -> Self {
        let count = memory.len_bytes / PAD_SIZE_BYTES;
        Self {
            memory,
            count,
            free: (0..count).rev().map(PadId).collect(),
        }
    }

    pub(crate) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Takes a pad for a scatter list: `head_bytes` of the pad, the next `len_bytes` at `reader`, `tail_bytes` of the
    /// pad. `None`: no pad is free, or the reader's memory is in too many pieces. The cursor is good until the pad is
    /// put back, and for as long as `reader` is.
    ///
    /// # Panics
    /// Head or tail is longer than a rest of a page, or the reader's list ends before.
    pub(crate) fn wrap(
        &mut self,
        reader: IovCursor,
        (head_bytes, len_bytes, tail_bytes): (usize, usize, usize),
    ) -> Option<(PadId, IovCursor)> {
        assert!(
            head_bytes.max(tail_bytes) <= REST_SIZE_BYTES_MAX,
            "a pad has no room for {head_bytes} bytes before, or {tail_bytes} behind"
        );
        let id = *self.free.last()?;
        let start = self
            .memory
            .start
            .as_ptr()
            .wrapping_add(id.0 * PAD_SIZE_BYTES);
        let middle = start.wrapping_add(HALF_SIZE_BYTES);
        let list = start.cast::<iovec>();
        let mut len = 0;
        let mut push = |ptr: *mut u8, len_bytes: usize| {
            if len_bytes > 0 && len < LIST_LEN_MAX {
                let element = iovec {
                    iov_base: ptr.cast(),
                    iov_len: len_bytes,
                };
                // SAFETY: `id` is below the number of pads, so all of this one is valid memory by the contract of
                // `PadMemory::new`, and `len` below the number of elements that fit before anything else in it. The
                // pad is free: nobody has a cursor over it.
                unsafe { list.wrapping_add(len).write(element) };
            }
            len += usize::from(len_bytes > 0);
        };
        push(middle.wrapping_sub(head_bytes), head_bytes);
        let mut reader = reader;
        reader.chunks(len_bytes, &mut push);
        push(middle, tail_bytes);
        if len > LIST_LEN_MAX {
            return None;
        }
        self.free.pop();
        // SAFETY: `len` elements were written just now, and stay until the pad is put back, which is when the base
        // read that the list describes is dealt with. They name memory of the pad, valid by the contract of
        // `PadMemory::new`, and of the reader, by the contract under which its cursor was made; by both no cursor is
        // used later.
        Some((id, unsafe { IovCursor::new(list, len) }))
    }

    /// The base read for which the pad was taken has ended, and what it has brought is not needed any more.
    ///
    /// # Panics
    /// More pads are put back than were taken.
    pub(crate) fn put_back(&mut self, id: PadId) {
        assert!(
            self.free.len() < self.count,
            "INV-READ-4: a pad is put back once"
        );
        self.free.push(id);
    }
}

#[cfg(test)]
mod tests {
    use super::super::IovBuf;
    use super::*;

    fn pads(count: usize) -> Pads {
        Pads::new(PadMemory::from_heap(count))
    }

    #[test]
    fn a_list_goes_through_the_pad_the_reader_and_the_pad() {
        let mut pads = pads(2);
        let buf = IovBuf::new(&[0xee; 1100], &[100, 600]);
        let mut reader = buf.cursor();
        reader.advance(50);
        let lens = (3584, 1000, 3584);
        let (_, cursor) = pads.wrap(reader, lens).unwrap();
        let bytes: Vec<u8> = (0..8168).map(|at| (at % 251) as u8).collect();
        cursor.clone().write_from(&bytes);
        let mut expected = vec![0xee; 1100];
        expected[50..1050].copy_from_slice(&bytes[3584..4584]);
        assert_eq!(buf.bytes(), expected);
        let mut got = vec![0; 8168];
        cursor.clone().read_into(&mut got);
        assert_eq!(got, bytes);
        assert_eq!(cursor.remaining(), 8168);
    }

    #[test]
    fn rests_meet_the_reader_at_the_border_of_a_page() {
        let mut pads = pads(1);
        let buf = IovBuf::zeroed(4096);
        let (_, cursor) = pads.wrap(buf.cursor(), (3584, 4096, 512)).unwrap();
        let mut list = Vec::new();
        cursor.fill_iovecs(8192, &mut list);
        let start = |at: usize| list[at].iov_base.addr();
        assert_eq!((start(0) + 3584) % PAD_ALIGN_BYTES, 0);
        assert_eq!(start(1) % PAD_ALIGN_BYTES, 0);
        assert_eq!(start(2) % PAD_ALIGN_BYTES, 0);
    }

    #[test]
    fn a_side_without_a_rest_has_no_element() {
        let mut pads = pads(2);
        let buf = IovBuf::zeroed(512);
        let mut lens = |head, tail| {
            let (_, cursor) = pads.wrap(buf.cursor(), (head, 512, tail)).unwrap();
            let mut list = Vec::new();
            cursor.fill_iovecs(head + 512 + tail, &mut list);
            list.iter()
                .map(|element| element.iov_len)
                .collect::<Vec<_>>()
        };
        assert_eq!(lens(1024, 0), [1024, 512]);
        assert_eq!(lens(0, 3584), [512, 3584]);
    }

    #[test]
    fn there_are_as_many_pads_as_the_memory_has_room_for() {
        let mut pads = pads(2);
        let buf = IovBuf::zeroed(512);
        let take = |pads: &mut Pads| pads.wrap(buf.cursor(), (512, 512, 0)).map(|(id, _)| id);
        let (first, second) = (take(&mut pads).unwrap(), take(&mut pads).unwrap());
        assert_ne!(first, second);
        assert_eq!(take(&mut pads), None);
        pads.put_back(second);
        assert_eq!(take(&mut pads), Some(second));
    }

    #[test]
    fn memory_in_too_many_pieces_takes_no_pad() {
        let mut pads = pads(1);
        let pieces = |count: usize| {
            let cuts: Vec<usize> = (1..count).map(|piece| piece * 8).collect();
            IovBuf::new(&[0; 512], &cuts)
        };
        let most = LIST_LEN_MAX - 2;
        let (fits, does_not) = (pieces(most), pieces(most + 1));
        assert_eq!(
            pads.wrap(does_not.cursor(), (512, 512, 512)).map(|_| ()),
            None
        );
        assert!(pads.wrap(fits.cursor(), (512, 512, 512)).is_some());
    }

    #[test]
    #[should_panic(expected = "INV-READ-4")]
    fn a_pad_is_not_put_back_twice() {
        let mut pads = pads(1);
        let buf = IovBuf::zeroed(512);
        let (id, _) = pads.wrap(buf.cursor(), (512, 512, 0)).unwrap();
        pads.put_back(id);
        pads.put_back(id);
    }
}
