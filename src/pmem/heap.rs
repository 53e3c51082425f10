//! Memory from the heap in the place of the cache device and of a guest's buffers, behind a safe interface:
//! for the simulator, the tests and the benches.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::ptr::{self, NonNull};
use std::sync::{Mutex, PoisonError};

use libc::iovec;

#[cfg(any(test, feature = "sim"))]
use super::Durable;
use super::bounds;
use super::iov::{IovCursor, MemSlice};
use super::pads::{PAD_PAGE_SIZE_BYTES, PadMemory};
use super::regions::LiveRegion;
use crate::units::PmemOff;

/// Alignment of regions and buffers, as that of a mapping and of an SPDK DMA buffer.
const HEAP_ALIGN_BYTES: usize = 4096;

/// The token for a fence that a simulator has carried out on its own model.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn simulated_fence() -> Durable {
    Durable { _only_by_fence: () }
}

fn allocate(len_bytes: usize) -> NonNull<u8> {
    let layout = heap_layout(len_bytes);
    // SAFETY: `heap_layout` never returns a layout of size 0.
    let ptr = unsafe { alloc_zeroed(layout) };
    NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(layout))
}

fn heap_layout(len_bytes: usize) -> Layout {
    Layout::from_size_align(len_bytes.max(1), HEAP_ALIGN_BYTES)
        .expect("a region is smaller than the address space")
}

/// An owned, 4 KiB-aligned region that can hand out [`MemSlice`]s of itself, as a mapping does.
#[derive(Debug)]
pub struct HeapRegion {
    base: NonNull<u8>,
    len_bytes: usize,
    /// `None` only inside of `drop`.
    live: Option<LiveRegion>,
}

// SAFETY: the region owns its memory; who holds it exclusively may write it from any thread.
unsafe impl Send for HeapRegion {}
// SAFETY: `&self` only reads. A `MemSlice` reads too, with the reservation of every piece of a cache device:
// what is overwritten meanwhile is read in part old, in part new.
unsafe impl Sync for HeapRegion {}

impl HeapRegion {
    /// A region of `len_bytes` zeroes.
    #[must_use]
    pub fn new(len_bytes: usize) -> Self {
        let base = allocate(len_bytes);
        let live = Some(LiveRegion::new(base.as_ptr(), len_bytes));
        Self {
            base,
            len_bytes,
            live,
        }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Copies the bytes at `offset` into `buf`.
    ///
    /// # Panics
    /// They lie outside of the region.
    pub fn read(&self, offset: usize, buf: &mut [u8]) {
        let src = self.at(offset, buf.len());
        // SAFETY: `at` has checked that `buf.len()` bytes at `src` lie inside the region; `buf` is a
        // reference, so it is not part of it.
        unsafe { ptr::copy_nonoverlapping(src, buf.as_mut_ptr(), buf.len()) }
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Panics
    /// The target lies outside of the region.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        let dst = self.at(offset, bytes.len());
        // SAFETY: `at` has checked that `bytes.len()` bytes at `dst` lie inside the region, which is held
        // exclusively; `bytes` is a reference, so it is not part of it.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), dst, bytes.len()) }
    }

    /// Copies the `len_bytes` bytes at `offset` to the caller's memory at `dst`, which advances.
    ///
    /// # Panics
    /// They lie outside of the region.
    pub fn read_to(&self, offset: usize, dst: &mut IovCursor, len_bytes: usize) {
        let src = self.at(offset, len_bytes);
        // SAFETY: `at` has checked that `len_bytes` bytes at `src` lie inside the region; the contract of
        // `IovCursor::new` keeps the caller's memory apart from it.
        unsafe { dst.write_from_ptr(src, len_bytes) }
    }

    /// The `len_bytes` bytes at `offset` as they lie in memory.
    ///
    /// # Panics
    /// They lie outside of the region.
    #[must_use]
    pub fn slice(&self, offset: usize, len_bytes: usize) -> MemSlice {
        MemSlice::new(self.at(offset, len_bytes), len_bytes)
    }

    #[track_caller]
    fn at(&self, offset: usize, len_bytes: usize) -> *mut u8 {
        let off = PmemOff(offset as u64);
        let offset = bounds::range_at(off, len_bytes as u64, self.len_bytes as u64);
        self.base.as_ptr().wrapping_add(offset)
    }
}

impl Drop for HeapRegion {
    fn drop(&mut self) {
        // Waits for readers of slices; later ones are refused.
        drop(self.live.take());
        // SAFETY: `base` came from `allocate(len_bytes)`, which uses the same layout, and nobody can reach
        // it any more.
        unsafe { dealloc(self.base.as_ptr(), heap_layout(self.len_bytes)) }
    }
}

/// Distance of two elements of an [`IovBuf`], filled with [`GUARD_BYTE`]. Odd, so that alignments vary.
const GUARD_LEN_BYTES: usize = 67;
const GUARD_BYTE: u8 = 0xa5;

/// Blocks that dropped [`IovBuf`]s leave, by shape. They are never given back to the allocator, and the
/// array keeps its place and its number of slots, so that a cursor which outlives its buffer finds nonsense
/// but never memory of somebody else; they are reused, so that a long simulation does not grow.
static SPARE: Mutex<BTreeMap<BlockShape, Vec<Block>>> = Mutex::new(BTreeMap::new());

/// Both powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct BlockShape {
    /// For elements and guards; the array of iovecs follows.
    data_size_bytes: usize,
    iovec_slots: usize,
}

#[derive(Debug)]
struct Block {
    base: NonNull<u8>,
    shape: BlockShape,
}

// SAFETY: a block is owned memory that only raw copies touch.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    fn take(data_len_bytes: usize, iovec_count: usize) -> Self {
        let shape = BlockShape {
            data_size_bytes: data_len_bytes.max(HEAP_ALIGN_BYTES).next_power_of_two(),
            iovec_slots: iovec_count.next_power_of_two(),
        };
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        let reused = spare.get_mut(&shape).and_then(Vec::pop);
        drop(spare);
        reused.unwrap_or_else(|| {
            let array_size_bytes = shape.iovec_slots * size_of::<iovec>();
            Self {
                base: allocate(shape.data_size_bytes + array_size_bytes),
                shape,
            }
        })
    }

    fn data(&self, offset: usize) -> *mut u8 {
        self.base.as_ptr().wrapping_add(offset)
    }

    fn array(&self) -> *mut iovec {
        self.data(self.shape.data_size_bytes).cast()
    }

    /// Writes the whole array: `elements`, then empty ones.
    fn write_array(&self, elements: &[(usize, usize)]) {
        assert!(
            elements.len() <= self.shape.iovec_slots,
            "the block was taken for that many"
        );
        for index in 0..self.shape.iovec_slots {
            let (offset, len) = elements.get(index).copied().unwrap_or((0, 0));
            let element = iovec {
                iov_base: self.data(offset).cast(),
                iov_len: len,
            };
            // SAFETY: `index` is below the number of slots behind the data, whose size is a power of two
            // from 4096 on, so they are aligned; nobody references them.
            unsafe { self.array().wrapping_add(index).write(element) };
        }
    }
}

/// A guest's buffer: bytes cut into the elements of a scatter list, with guard bytes between them.
///
/// The first element is 4 KiB-aligned, the others lie at odd addresses.
#[derive(Debug)]
pub struct IovBuf {
    /// `None` only inside of `drop`.
    block: Option<Block>,
    /// Offset in the block and length of each element.
    elements: Vec<(usize, usize)>,
}

impl IovBuf {
    /// A buffer that holds `bytes`, cut at the positions `cuts`, in any order. A position that occurs twice,
    /// 0 and the end make empty elements; those past the end count as the end.
    #[must_use]
    pub fn new(bytes: &[u8], cuts: &[usize]) -> Self {
        let mut ends: Vec<usize> = cuts.iter().map(|cut| (*cut).min(bytes.len())).collect();
        ends.push(bytes.len());
        ends.sort_unstable();
        let mut elements = Vec::with_capacity(ends.len());
        let (mut start, mut offset) = (0, 0);
        for end in ends {
            elements.push((offset, end - start));
            offset += end - start + GUARD_LEN_BYTES;
            start = end;
        }
        let block = Block::take(offset, elements.len());
        block.write_array(&elements);
        let buf = Self {
            block: Some(block),
            elements,
        };
        buf.write_guards();
        buf.cursor().write_from(bytes);
        buf
    }

    /// A buffer of `len_bytes` zeroes in one element.
    #[must_use]
    pub fn zeroed(len_bytes: usize) -> Self {
        Self::new(&vec![0; len_bytes], &[])
    }

    /// A cursor at the start. The buffer should live as long as the request: a cursor that outlives it finds
    /// whatever the next buffer holds.
    #[must_use]
    pub fn cursor(&self) -> IovCursor {
        let block = self.block();
        // SAFETY: `write_array` has filled every slot with memory of the block; blocks are never freed,
        // nobody forms references to them, and they are no part of a cache device. The next buffer in the
        // block rewrites the slots, again with memory of the block.
        unsafe { IovCursor::new(block.array(), self.elements.len()) }
    }

    /// Length in bytes, without guards.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.elements.iter().map(|(_, len)| len).sum()
    }

    /// A copy of what it holds now.
    ///
    /// # Panics
    /// Somebody wrote next to an element.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        for (offset, len) in &self.elements {
            let mut guard = [0; GUARD_LEN_BYTES];
            let src = self.block().data(offset + len);
            // SAFETY: `new` has laid out that many guard bytes behind each element, inside the block.
            unsafe { ptr::copy_nonoverlapping(src, guard.as_mut_ptr(), GUARD_LEN_BYTES) };
            assert!(
                guard.iter().all(|byte| *byte == GUARD_BYTE),
                "a write past a buffer's element"
            );
        }
        let mut bytes = vec![0; self.len_bytes()];
        self.cursor().read_into(&mut bytes);
        bytes
    }

    fn block(&self) -> &Block {
        self.block.as_ref().expect("the block is there until drop")
    }

    fn write_guards(&self) {
        for (offset, len) in &self.elements {
            let guard = self.block().data(offset + len);
            // SAFETY: `new` has laid out that many guard bytes behind each element, inside the block.
            unsafe { ptr::write_bytes(guard, GUARD_BYTE, GUARD_LEN_BYTES) };
        }
    }
}

impl Drop for IovBuf {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
            spare.entry(block.shape).or_default().push(block);
        }
    }
}

/// Blocks that dropped [`PadMemory`] leaves. They are never given back either, and become pads again and nothing else:
/// a cursor that outlives its pad finds memory, if another one's.
static SPARE_PADS: Mutex<Vec<Block>> = Mutex::new(Vec::new());
const _: () = assert!(PAD_PAGE_SIZE_BYTES == HEAP_ALIGN_BYTES);

#[derive(Debug)]
struct HeapPads {
    /// `None` only inside of `drop`.
    block: Option<Block>,
}

impl PadMemory {
    /// Memory from the heap for pads of so many pages in all.
    #[must_use]
    pub fn from_heap(page_count: usize) -> Self {
        let shape = BlockShape {
            data_size_bytes: page_count * PAD_PAGE_SIZE_BYTES,
            iovec_slots: 0,
        };
        let mut spare = SPARE_PADS.lock().unwrap_or_else(PoisonError::into_inner);
        let found = spare.iter().position(|block| block.shape == shape);
        let reused = found.map(|at| spare.swap_remove(at));
        drop(spare);
        let block = reused.unwrap_or_else(|| Block {
            base: allocate(shape.data_size_bytes),
            shape,
        });
        let start = block.base;
        let owner = Box::new(HeapPads { block: Some(block) });
        // SAFETY: the block is that long, came zeroed and aligned from `allocate`, is never freed, and is given to
        // nobody else before `owner` is dropped. It is never a part of a cache device. A cursor that is used later
        // finds the block all the same.
        unsafe { Self::new(start, shape.data_size_bytes, owner) }
    }
}

impl Drop for HeapPads {
    fn drop(&mut self) {
        let mut spare = SPARE_PADS.lock().unwrap_or_else(PoisonError::into_inner);
        spare.extend(self.block.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_aligned_and_zeroed() {
        let region = HeapRegion::new(10_000);
        assert!(
            region
                .slice(0, 1)
                .as_ptr()
                .addr()
                .is_multiple_of(HEAP_ALIGN_BYTES)
        );
        let mut bytes = vec![1; 10_000];
        region.read(0, &mut bytes);
        assert_eq!(bytes, vec![0; 10_000]);
    }

    #[test]
    #[should_panic(expected = "lie outside")]
    fn a_region_is_not_read_past_its_end() {
        HeapRegion::new(100).read(99, &mut [0; 2]);
    }

    #[test]
    #[should_panic(expected = "a write past a buffer's element")]
    fn a_write_past_an_element_is_seen() {
        let buf = IovBuf::new(&[1, 2, 3, 4], &[2]);
        let end = buf.block().data(2);
        // SAFETY: guard bytes follow the element of 2 bytes.
        unsafe { end.write(0) };
        let _ = buf.bytes();
    }

    #[test]
    fn a_buffer_gives_back_what_it_was_made_of() {
        let bytes: Vec<u8> = (0..200).collect();
        let buf = IovBuf::new(&bytes, &[0, 5, 5, 64, 200, 999]);
        assert_eq!(buf.bytes(), bytes);
        assert_eq!(buf.len_bytes(), 200);
    }
}
