//! The caller's memory: scatter lists that are copied from and to, never turned into references, because a
//! guest or a device may change them at any time.
//!
//! All copies here are raw: a byte that somebody else changes meanwhile arrives with its old or its new
//! value, which is what a disk's DMA engine would do too.

use std::ptr;

use libc::iovec;

use super::copy::Kernel;
use super::regions;

/// A piece of the cache device's memory. It stays mapped for as long as the `Pmem` that handed it out; that
/// its content stays is the promise of whoever pins the segment around it.
#[derive(Clone, Copy, Debug)]
pub struct MemSlice {
    ptr: *mut u8,
    len_bytes: usize,
}

/// The memory of a slice cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory of the cache device cannot be read")]
pub struct SliceError;

// SAFETY: a MemSlice is an address and a length. The memory behind it is shared by all threads, belongs to
// none, and is only copied from, never referenced; `copy_to` checks that it is still mapped.
unsafe impl Send for MemSlice {}

impl MemSlice {
    /// Safe, because nothing is read through it without a check (`copy_to`) or a promise of the caller's
    /// (`copy_to_ptr`).
    pub(super) fn new(ptr: *mut u8, len_bytes: usize) -> Self {
        Self { ptr, len_bytes }
    }

    /// The address.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// The length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// The `len_bytes` bytes from `offset_bytes` on.
    ///
    /// # Panics
    /// The part does not lie inside the slice.
    #[must_use]
    pub fn part(&self, offset_bytes: usize, len_bytes: usize) -> Self {
        let end = offset_bytes.checked_add(len_bytes);
        assert!(
            end.is_some_and(|end| end <= self.len_bytes),
            "part {offset_bytes}+{len_bytes} of a slice of {} bytes",
            self.len_bytes
        );
        Self::new(self.ptr.wrapping_add(offset_bytes), len_bytes)
    }

    /// As an element of a scatter list for the base device.
    #[must_use]
    pub fn as_iovec(&self) -> iovec {
        iovec {
            iov_base: self.ptr.cast(),
            iov_len: self.len_bytes,
        }
    }

    /// Copies the whole slice into `buf`. Takes a lock that all regions share; where that is too slow, use
    /// [`MemSlice::copy_to_ptr`].
    ///
    /// # Errors
    /// Not all of it can be read; `buf` then holds unspecified bytes.
    ///
    /// # Panics
    /// `buf` is not as long as the slice, or the cache device has been closed since.
    pub fn copy_to(&self, buf: &mut [u8]) -> Result<(), SliceError> {
        assert_eq!(
            buf.len(),
            self.len_bytes,
            "the buffer is not as long as the slice"
        );
        regions::while_live(self.ptr, self.len_bytes, || {
            // SAFETY: `while_live` has checked that these bytes lie inside a mapped region and keeps it
            // mapped meanwhile; `buf` is as long (asserted), and cannot overlap the region, of which no
            // reference exists.
            unsafe { self.copy_to_ptr(buf.as_mut_ptr()) }
        })
    }

    /// Copies the whole slice to `dst`.
    ///
    /// # Errors
    /// Not all of it can be read; `dst` then holds unspecified bytes.
    ///
    /// # Safety
    /// The `Pmem` that handed the slice out is still alive, and `dst` is valid for writes of
    /// [`MemSlice::len_bytes`] bytes that do not overlap the slice.
    pub unsafe fn copy_to_ptr(&self, dst: *mut u8) -> Result<(), SliceError> {
        // SAFETY: both by the contract of this function.
        let loaded = unsafe { Kernel::best().load(dst, self.ptr, self.len_bytes) };
        loaded.map_err(|_| SliceError)
    }
}

/// A position in a caller's scatter list. Moves forward as bytes are copied. Elements may have any length,
/// zero included, and any alignment. A copy of a cursor is another position in the same list.
#[derive(Clone, Copy, Debug)]
pub struct IovCursor {
    /// What is left of the current element. At hand from the start, when whoever made the array has just had it.
    ptr: *mut u8,
    left: usize,
    /// The elements behind it.
    next: *const iovec,
    next_count: usize,
}

// SAFETY: the contract of `IovCursor::new` makes the array and the memory valid on whatever thread the
// request is worked on until it completes; a cursor only copies bytes and forms no reference to them.
unsafe impl Send for IovCursor {}

impl IovCursor {
    /// A cursor at the start of the `count` elements at `iov`.
    ///
    /// # Safety
    /// Until the request that the list describes completes, the array and the memory that it names stay
    /// valid, on every thread, for reads and (for a request that fills it) for writes, no Rust reference to
    /// that memory exists, and no cursor made of this one is used afterwards. The array does not change; the
    /// memory may. The memory does not overlap the part of the cache device that is copied from or to.
    #[must_use]
    pub unsafe fn new(iov: *const iovec, count: usize) -> Self {
        let mut cursor = Self {
            ptr: ptr::null_mut(),
            left: 0,
            next: iov,
            next_count: count,
        };
        cursor.go_on();
        cursor
    }

    /// A cursor at the start of one piece of memory.
    ///
    /// # Safety
    /// As for [`IovCursor::new`], of a list whose one element it is.
    pub(super) unsafe fn of_piece(ptr: *mut u8, len_bytes: usize) -> Self {
        Self {
            ptr,
            left: len_bytes,
            next: ptr::null(),
            next_count: 0,
        }
    }

    /// Bytes from the cursor to the end of the list. Walks all elements.
    #[must_use]
    pub fn remaining(&self) -> usize {
        let mut cursor = *self;
        let mut total = 0;
        while let Some((_, len_bytes)) = cursor.piece() {
            total += len_bytes;
            cursor.skip(len_bytes);
        }
        total
    }

    /// Skips `len_bytes` bytes.
    ///
    /// # Panics
    /// The list ends before.
    pub fn advance(&mut self, len_bytes: usize) {
        self.chunks(len_bytes, |_, _| {});
    }

    /// Appends the scatter list of the next `len_bytes` bytes to `out`, without empty elements: what a base
    /// device is asked to fill. The cursor stays.
    ///
    /// # Panics
    /// The list ends before.
    pub fn fill_iovecs(&self, len_bytes: usize, out: &mut Vec<iovec>) {
        let mut cursor = *self;
        cursor.chunks(len_bytes, |ptr, len| {
            out.push(iovec {
                iov_base: ptr.cast(),
                iov_len: len,
            });
        });
    }

    /// Puts the scatter list of the next bytes into `out`, without empty elements, and advances: of `len_bytes` at most, in
    /// whole units, and in `count_max` elements at most, unless not even one unit goes into so many. Returns how many bytes.
    ///
    /// # Panics
    /// The list ends before.
    pub fn take_iovecs(
        &mut self,
        len_bytes: usize,
        unit_bytes: usize,
        count_max: usize,
        out: &mut Vec<iovec>,
    ) -> usize {
        out.clear();
        let (start, mut taken) = (*self, 0);
        while taken < len_bytes && (out.len() < count_max || taken < unit_bytes) {
            let Some((ptr, len)) = self.piece() else {
                panic!("the caller's scatter list ends before its request does");
            };
            // What does not go into so many is one unit and no more.
            let limit = if out.len() < count_max {
                len_bytes
            } else {
                unit_bytes
            };
            let len = len.min(limit - taken);
            self.skip(len);
            taken += len;
            out.push(iovec {
                iov_base: ptr.cast(),
                iov_len: len,
            });
        }
        let mut excess = if taken < len_bytes {
            taken % unit_bytes
        } else {
            0
        };
        if excess > 0 {
            taken -= excess;
            *self = start;
            self.advance(taken);
        }
        while let Some(last) = out.last_mut().filter(|_| excess > 0) {
            let cut = excess.min(last.iov_len);
            last.iov_len -= cut;
            excess -= cut;
            if last.iov_len == 0 {
                out.pop();
            }
        }
        taken
    }

    /// Writes zeroes to the next `len_bytes` bytes of the caller's memory, and advances.
    ///
    /// # Panics
    /// The list ends before; what there is of it is then zeroed.
    pub fn zero(&mut self, len_bytes: usize) {
        self.chunks(len_bytes, |dst, len| {
            // SAFETY: `chunks` names memory that is valid for writes by the contract of `new`.
            unsafe { ptr::write_bytes(dst, 0, len) }
        });
    }

    /// Copies the next `len_bytes` bytes of another list to the caller's memory, and advances both. The memory of
    /// the two may be the same.
    ///
    /// # Panics
    /// One of the lists ends before; what there is of it is then copied.
    pub fn copy_from(&mut self, other: &mut Self, len_bytes: usize) {
        other.chunks(len_bytes, |src, len| {
            let mut src = src;
            self.chunks(len, |dst, len| {
                // SAFETY: both `chunks` name `len` bytes that are valid by the contract of `new`, those of the
                // other list for reads, these for writes; they may overlap.
                unsafe { ptr::copy(src, dst, len) };
                src = src.wrapping_add(len);
            });
        });
    }

    /// Copies the next `buf.len()` bytes of the caller's memory into `buf`, each read once, and advances.
    ///
    /// # Panics
    /// The list ends before.
    pub fn read_into(&mut self, buf: &mut [u8]) {
        // SAFETY: a slice is valid for writes of its length, and by the contract of `new` nothing of the
        // caller's memory is referenced, so it cannot overlap.
        unsafe { self.read_into_ptr(buf.as_mut_ptr(), buf.len()) }
    }

    /// As [`IovCursor::read_into`], into memory that need not be initialised.
    ///
    /// # Safety
    /// `dst` is valid for writes of `len_bytes` bytes and does not overlap the caller's memory.
    pub(super) unsafe fn read_into_ptr(&mut self, dst: *mut u8, len_bytes: usize) {
        let mut dst = dst;
        self.chunks(len_bytes, |src, len| {
            // SAFETY: `chunks` names `len` readable bytes (contract of `new`), and never more in sum than
            // the `len_bytes` for which `dst` is valid.
            unsafe { ptr::copy_nonoverlapping(src, dst, len) };
            dst = dst.wrapping_add(len);
        });
    }

    /// Copies `bytes` to the caller's memory, and advances.
    ///
    /// # Panics
    /// The list ends before; what there is of it is then filled.
    pub fn write_from(&mut self, bytes: &[u8]) {
        // SAFETY: a slice is valid for reads of its length, and overlaps nothing of the caller's memory, to
        // which no reference exists by the contract of `new`.
        unsafe { self.write_from_ptr(bytes.as_ptr(), bytes.len()) }
    }

    /// As [`IovCursor::write_from`], from memory that is not referenced, such as the mapping.
    ///
    /// # Safety
    /// `src` is valid for reads of `len_bytes` bytes and does not overlap the caller's memory.
    pub(super) unsafe fn write_from_ptr(&mut self, src: *const u8, len_bytes: usize) {
        let mut src = src;
        self.chunks(len_bytes, |dst, len| {
            // SAFETY: `chunks` names `len` writable bytes (contract of `new`), and never more in sum than
            // the `len_bytes` for which `src` is valid.
            unsafe { ptr::copy_nonoverlapping(src, dst, len) };
            src = src.wrapping_add(len);
        });
    }

    /// Calls `f` with address and length of each piece of the next `len_bytes` bytes, none of them empty,
    /// and advances.
    ///
    /// # Panics
    /// The list ends before; `f` has then seen all there is.
    pub(super) fn chunks(&mut self, len_bytes: usize, mut f: impl FnMut(*mut u8, usize)) {
        let mut left = len_bytes;
        while left > 0 {
            let Some((ptr, len)) = self.piece() else {
                panic!("the caller's scatter list ends {left} bytes before its request does");
            };
            let len = len.min(left);
            self.skip(len);
            left -= len;
            f(ptr, len);
        }
    }

    /// The next `len_bytes` bytes, skipped, if they lie in one piece.
    pub(super) fn contiguous(&mut self, len_bytes: usize) -> Option<*const u8> {
        let (ptr, _) = self.piece().filter(|(_, left)| *left >= len_bytes)?;
        self.skip(len_bytes);
        Some(ptr)
    }

    /// What is left of the current element, or all of the next one that is not empty.
    #[inline]
    fn piece(&mut self) -> Option<(*mut u8, usize)> {
        while self.left == 0 {
            if !self.go_on() {
                return None;
            }
        }
        Some((self.ptr, self.left))
    }

    /// Passes over bytes of the current element, of which there are so many.
    #[inline]
    fn skip(&mut self, len_bytes: usize) {
        self.ptr = self.ptr.wrapping_add(len_bytes);
        self.left -= len_bytes;
    }

    /// Takes the next element. `false`: there is none.
    #[inline]
    fn go_on(&mut self) -> bool {
        if self.next_count == 0 {
            return false;
        }
        // SAFETY: `next` is the first of `next_count` elements of the array, which is valid by the contract of
        // `new`; that is not 0.
        let element = unsafe { self.next.read() };
        (self.ptr, self.left) = (element.iov_base.cast(), element.iov_len);
        self.next = self.next.wrapping_add(1);
        self.next_count -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::{HeapRegion, IovBuf};

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
    }

    proptest! {
        #[test]
        fn any_shape_reads_like_the_flat_bytes(
            len in 0usize..300,
            cuts in vec(0usize..300, 0..8),
            steps in vec(0usize..80, 0..12),
        ) {
            let flat = pattern(len);
            let buf = IovBuf::new(&flat, &cuts);
            let mut cursor = buf.cursor();
            let mut at = 0;
            for step in steps {
                let step = step.min(len - at);
                prop_assert_eq!(cursor.remaining(), len - at);
                let mut got = vec![0; step];
                let mut ahead = cursor;
                ahead.read_into(&mut got);
                prop_assert_eq!(&got[..], &flat[at..at + step]);
                cursor.advance(step);
                prop_assert_eq!(cursor.remaining(), ahead.remaining());
                at += step;
            }
        }

        #[test]
        fn a_list_is_taken_in_whole_units_and_few_elements(
            units in 1usize..40,
            cuts in vec(0usize..300, 0..60),
            count_max in 1usize..8,
        ) {
            const UNIT_BYTES: usize = 8;
            let len = units * UNIT_BYTES;
            let flat = pattern(len);
            let buf = IovBuf::new(&flat, &cuts);
            let (mut cursor, mut list, mut at) = (buf.cursor(), Vec::new(), 0);
            while at < len {
                let taken = cursor.take_iovecs(len - at, UNIT_BYTES, count_max, &mut list);
                prop_assert!(taken >= UNIT_BYTES && taken.is_multiple_of(UNIT_BYTES));
                prop_assert!(list.len() <= count_max || taken == UNIT_BYTES);
                let elements = list.iter().map(|iov| {
                    // SAFETY: the list names memory of `buf`, to which nobody writes meanwhile.
                    unsafe { std::slice::from_raw_parts(iov.iov_base.cast::<u8>(), iov.iov_len) }
                });
                let got: Vec<u8> = elements.flatten().copied().collect();
                prop_assert_eq!(&got[..], &flat[at..at + taken]);
                at += taken;
                prop_assert_eq!(cursor.remaining(), len - at);
            }
        }

        #[test]
        fn any_shape_is_written_like_the_flat_bytes(
            len in 0usize..300,
            cuts in vec(0usize..300, 0..8),
            from in 0usize..300,
            count in 0usize..300,
            zeroes in 0usize..300,
        ) {
            let mut flat = pattern(len);
            let buf = IovBuf::new(&flat, &cuts);
            let from = from.min(len);
            let count = count.min(len - from);
            let zeroes = zeroes.min(len - from - count);
            let mut cursor = buf.cursor();
            cursor.advance(from);
            cursor.write_from(&vec![0xee; count]);
            cursor.zero(zeroes);
            flat[from..from + count].fill(0xee);
            flat[from + count..from + count + zeroes].fill(0);
            prop_assert_eq!(buf.bytes(), flat);
        }

        #[test]
        fn a_list_is_copied_from_a_list_of_another_shape(
            len in 0usize..300,
            cuts in vec(0usize..300, 0..8),
            other_cuts in vec(0usize..300, 0..8),
            from in 0usize..300,
            count in 0usize..300,
        ) {
            let (from, flat) = (from.min(len), pattern(len));
            let count = count.min(len - from);
            let (source, target) = (IovBuf::new(&flat, &other_cuts), IovBuf::new(&vec![0xee; len], &cuts));
            let (mut reader, mut writer) = (source.cursor(), target.cursor());
            reader.advance(from);
            writer.copy_from(&mut reader, count);
            prop_assert_eq!((reader.remaining(), writer.remaining()), (len - from - count, len - count));
            let mut expected = vec![0xee; len];
            expected[..count].copy_from_slice(&flat[from..from + count]);
            prop_assert_eq!(target.bytes(), expected);
        }

        #[test]
        fn iovecs_of_a_part_cover_it_without_empty_elements(
            len in 0usize..300,
            cuts in vec(0usize..300, 0..8),
            from in 0usize..300,
            count in 0usize..300,
        ) {
            let buf = IovBuf::new(&pattern(len), &cuts);
            let from = from.min(len);
            let count = count.min(len - from);
            let mut cursor = buf.cursor();
            cursor.advance(from);
            let mut out = Vec::new();
            cursor.fill_iovecs(count, &mut out);
            prop_assert!(out.iter().all(|element| element.iov_len > 0));
            prop_assert_eq!(out.iter().map(|element| element.iov_len).sum::<usize>(), count);
            prop_assert_eq!(cursor.remaining(), len - from);
        }
    }

    #[test]
    #[should_panic(expected = "ends 1 bytes before")]
    fn a_cursor_does_not_run_past_the_end() {
        IovBuf::new(&[1, 2, 3], &[1]).cursor().advance(4);
    }

    #[test]
    fn a_slice_copies_its_part_of_the_region() {
        let mut region = HeapRegion::new(4096);
        region.write(100, &[1, 2, 3, 4]);
        let mut got = [0; 2];
        region.slice(100, 4).part(1, 2).copy_to(&mut got).unwrap();
        assert_eq!(got, [2, 3]);
    }

    #[test]
    #[should_panic(expected = "the cache device has been closed")]
    fn a_slice_of_a_closed_region_is_not_read() {
        // Far larger than anything else that the tests allocate, so that nobody takes its addresses.
        let region = HeapRegion::new(1 << 30);
        let slice = region.slice(1 << 29, 4);
        drop(region);
        slice.copy_to(&mut [0; 4]).unwrap();
    }
}
