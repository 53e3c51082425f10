//! The copies between a caller's memory and the cache device: for the most part non-temporal stores, which go past the
//! cache and so need no flush, only the fence. All instructions that touch the device are guarded, see
//! [`super::guard`]: a store that the memory does not take is noted by its region, and skipped.
//!
//! Which instruction is used is decided once, at run time, by what the CPU has. Short records are an exception, see
//! `copy/records.rs`. Left out on purpose, by measurement (docs/adr/0015-stores.md): `movdir64b`, and payloads through
//! the cache, which take three times as long.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;

use super::LINE_SIZE_BYTES;
use super::iov::IovCursor;
use super::load::{Load, LoadAndAsk};

const LINE: usize = LINE_SIZE_BYTES as usize;

/// Size of the stack buffer through which a payload goes when it is checksummed: fits in the L1 cache.
const BOUNCE_SIZE_BYTES: usize = 4096;

/// How far a copy asks ahead of itself: the CPU's own prefetchers stop where a page ends.
const ASKED_AHEAD: usize = 4096;

/// One way to store lines past the cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    name: &'static str,
    /// `(dst, src, len_bytes)`: as [`Kernel::store`].
    stream: unsafe fn(*mut u8, *const u8, usize),
    checksummed: Option<Checksummed>,
    load: Load,
    load_and_ask: LoadAndAsk,
    /// `None`: as everything else.
    records: Option<Records>,
}

/// Store and checksum in one pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Checksummed {
    /// `(dst, src, len_bytes, crc)`: stores as [`Kernel::store`], and returns `crc32c(crc, the bytes)`.
    pub(super) store: unsafe fn(*mut u8, *const u8, usize, u32) -> u32,
    /// A power of two: multiples of this length are done so, up to [`BOUNCE_SIZE_BYTES`].
    pub(super) unit_bytes: usize,
    /// So much takes less time than a fence. Measured: docs/adr/0022-one-fence-for-small-batches.md.
    pub(super) bytes_per_fence: u64,
}

/// How short records are stored.
#[derive(Clone, Copy, Debug)]
struct Records {
    name: &'static str,
    /// As [`Kernel::store`], from one line on.
    store: unsafe fn(*mut u8, *const u8, usize),
    /// Longer ones are not short.
    size_bytes_max: usize,
}

/// Memory that is asked for while something else is copied. Nothing is required of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    ptr: *const u8,
    len_bytes: usize,
}

impl Asked {
    pub(super) fn new(ptr: *const u8, len_bytes: usize) -> Self {
        Self { ptr, len_bytes }
    }

    fn advance(&mut self, len_bytes: usize) {
        self.ptr = self.ptr.wrapping_add(len_bytes);
        self.len_bytes -= len_bytes;
    }
}

/// The memory at this address cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unreadable(pub(super) usize);

/// A line's worth of bytes, put together from several elements of a scatter list.
#[repr(C, align(64))]
struct LineBuf([u8; LINE]);

#[repr(C, align(64))]
struct Bounce(MaybeUninit<[u8; BOUNCE_SIZE_BYTES]>);

impl Kernel {
    /// The best kernel of this CPU.
    pub(super) fn best() -> Self {
        static BEST: OnceLock<Kernel> = OnceLock::new();
        *BEST.get_or_init(|| Self::available()[0])
    }

    /// All kernels that this CPU can run, the best first; never empty.
    pub(super) fn available() -> Vec<Self> {
        arch::kernels()
    }

    /// The best one where the platform saves the CPU's caches when the power fails.
    pub(super) fn best_with_saved_caches() -> Self {
        Self {
            records: arch::unflushed_records(),
            ..Self::best()
        }
    }

    /// For the log and for benches.
    pub(super) fn name(&self) -> String {
        match &self.records {
            Some(records) => format!("{}, records by {}", self.name, records.name),
            None => self.name.to_owned(),
        }
    }

    /// Stores `len_bytes` bytes from `src` to `dst`. They are durable after [`fence`] on the same CPU.
    ///
    /// # Safety
    /// `dst` is aligned to [`LINE`], `len_bytes` is a multiple of it, `dst` is valid for writes and `src`
    /// for reads of that many bytes, and they do not overlap.
    pub(super) unsafe fn store(&self, dst: *mut u8, src: *const u8, len_bytes: usize) {
        // SAFETY: `stream` has the contract of this function, and `available` lists only kernels whose
        // instructions this CPU has.
        unsafe { (self.stream)(dst, src, len_bytes) }
    }

    /// As [`super::Pmem::bytes_checksummed_per_fence`].
    pub(super) fn bytes_checksummed_per_fence(&self) -> u64 {
        let checksummed = self.checksummed.as_ref();
        checksummed.map_or(0, |checksummed| checksummed.bytes_per_fence)
    }

    /// As [`Kernel::store`], what is followed by a fence and not part of a payload.
    ///
    /// # Safety
    /// As [`Kernel::store`].
    pub(super) unsafe fn store_record(&self, dst: *mut u8, src: *const u8, len_bytes: usize) {
        match &self.records {
            Some(records) if (LINE..=records.size_bytes_max).contains(&len_bytes) => {
                // SAFETY: by the contract, and it is at least a line; `available` lists only what this CPU has.
                unsafe { (records.store)(dst, src, len_bytes) }
            }
            // SAFETY: as for this function.
            _ => unsafe { self.store(dst, src, len_bytes) },
        }
    }

    /// Stores the next `len_bytes` bytes of the caller's memory to `dst`, and advances `src`. Each is read
    /// once.
    ///
    /// # Panics
    /// The scatter list ends before.
    ///
    /// # Safety
    /// For `dst` and `len_bytes` as [`Kernel::store`].
    pub(super) unsafe fn store_from(&self, dst: *mut u8, src: &mut IovCursor, len_bytes: usize) {
        if let Some(piece) = src.contiguous(len_bytes) {
            // SAFETY: `piece` is one of `len_bytes` readable bytes; for the target by the contract.
            return unsafe { self.store(dst, piece, len_bytes) };
        }
        // SAFETY: as for this function.
        unsafe { self.store_pieces(dst, src, len_bytes) }
    }

    /// As [`Kernel::store_from`], from any number of elements.
    ///
    /// # Panics
    /// The scatter list ends before.
    ///
    /// # Safety
    /// For `dst` and `len_bytes` as [`Kernel::store`].
    #[inline(never)]
    unsafe fn store_pieces(&self, dst: *mut u8, src: &mut IovCursor, len_bytes: usize) {
        let mut dst = dst;
        let mut line = LineBuf([0; LINE]);
        let mut line_used = 0;
        src.chunks(len_bytes, |piece, piece_len_bytes| {
            let (mut piece, mut left) = (piece.cast_const(), piece_len_bytes);
            if line_used > 0 {
                let head = left.min(LINE - line_used);
                // SAFETY: `head` readable bytes are left of the piece.
                unsafe { line.fill(line_used, piece, head) };
                line_used += head;
                piece = piece.wrapping_add(head);
                left -= head;
                if line_used == LINE {
                    // SAFETY: a line of the target is still to come, as all bytes of all pieces together
                    // are `len_bytes`.
                    unsafe { self.store(dst, line.0.as_ptr(), LINE) };
                    dst = dst.wrapping_add(LINE);
                    line_used = 0;
                }
            }
            // The whole lines: none if the piece went up in the line above.
            let bulk = left / LINE * LINE;
            // SAFETY: `bulk` readable bytes are left of the piece, and as many of the target.
            unsafe { self.store(dst, piece, bulk) };
            dst = dst.wrapping_add(bulk);
            if left > bulk {
                // SAFETY: `left - bulk` readable bytes are left of the piece behind its whole lines.
                unsafe { line.fill(0, piece.wrapping_add(bulk), left - bulk) };
                line_used = left - bulk;
            }
        });
        assert_eq!(
            line_used, 0,
            "the length of a store is a multiple of a line"
        );
    }

    /// Copies `len_bytes` bytes from `src` to `dst`.
    ///
    /// # Errors
    /// `src` lies in a guarded region, and not all of it can be read; `dst` holds unspecified bytes.
    ///
    /// # Safety
    /// `src` is valid for reads of that many bytes or lies in a guarded region, `dst` is valid for writes, and
    /// they do not overlap.
    pub(super) unsafe fn load(
        &self,
        dst: *mut u8,
        src: *const u8,
        len_bytes: usize,
    ) -> Result<(), Unreadable> {
        // SAFETY: `load` has the contract of this function, and `available` lists only kernels whose
        // instructions this CPU has.
        match unsafe { (self.load)(dst, src, len_bytes) } {
            0 => Ok(()),
            addr => Err(Unreadable(addr)),
        }
    }

    /// As [`Kernel::load`], to the caller's memory at `dst`, which advances in any case. Meanwhile what lies [`ASKED_AHEAD`]
    /// further is asked for, and with the last of it as much of `ahead`.
    ///
    /// # Errors
    /// As [`Kernel::load`].
    ///
    /// # Panics
    /// The scatter list ends before.
    ///
    /// # Safety
    /// For `src` and `len_bytes` as [`Kernel::load`]; the caller's memory does not overlap it.
    pub(super) unsafe fn load_to(
        &self,
        dst: &mut IovCursor,
        src: *const u8,
        len_bytes: usize,
        ahead: Asked,
    ) -> Result<(), Unreadable> {
        let (mut src, mut ahead, mut result) = (src, ahead, Ok(()));
        let mut own = Asked::new(
            src.wrapping_add(ASKED_AHEAD),
            len_bytes.saturating_sub(ASKED_AHEAD),
        );
        dst.chunks(len_bytes, |dst, len| {
            let own_bytes = own.len_bytes.min(len);
            if result.is_ok() && own_bytes > 0 {
                // SAFETY: `chunks` names `len` writable bytes (contract of `IovCursor::new`), and never more in
                // sum than the `len_bytes` of the source; this is the first part of them.
                result = unsafe { self.load_and_ask(dst, src, own_bytes, &mut own) };
            }
            if result.is_ok() && len > own_bytes {
                let (dst, src) = (dst.wrapping_add(own_bytes), src.wrapping_add(own_bytes));
                // SAFETY: the rest of them.
                result = unsafe { self.load_and_ask(dst, src, len - own_bytes, &mut ahead) };
            }
            src = src.wrapping_add(len);
        });
        result
    }

    /// As [`Kernel::load`], and asks for as much of `ahead`, which goes on.
    ///
    /// # Errors
    /// As [`Kernel::load`].
    ///
    /// # Safety
    /// As [`Kernel::load`].
    #[inline]
    unsafe fn load_and_ask(
        &self,
        dst: *mut u8,
        src: *const u8,
        len_bytes: usize,
        ahead: &mut Asked,
    ) -> Result<(), Unreadable> {
        let asked_bytes = ahead.len_bytes.min(len_bytes);
        if asked_bytes > 0 {
            // SAFETY: by the contract, of which this is the first part; nothing is required of what is asked for.
            match unsafe { (self.load_and_ask)(dst, src, asked_bytes, ahead.ptr) } {
                0 => ahead.advance(asked_bytes),
                addr => return Err(Unreadable(addr)),
            }
        }
        if asked_bytes == len_bytes {
            return Ok(());
        }
        // SAFETY: the rest, by the contract.
        unsafe {
            self.load(
                dst.wrapping_add(asked_bytes),
                src.wrapping_add(asked_bytes),
                len_bytes - asked_bytes,
            )
        }
    }

    /// As [`Kernel::store_from`]; returns `crc32c(seed, the bytes stored)`.
    ///
    /// # Panics
    /// The scatter list ends before.
    ///
    /// # Safety
    /// For `dst` and `len_bytes` as [`Kernel::store`].
    pub(super) unsafe fn store_from_crc(
        &self,
        dst: *mut u8,
        src: &mut IovCursor,
        len_bytes: usize,
        seed: u32,
    ) -> u32 {
        let mut bounce = Bounce(MaybeUninit::uninit());
        let mut crc = seed;
        let mut done = 0;
        while done < len_bytes {
            let step = (len_bytes - done).min(BOUNCE_SIZE_BYTES);
            if let Some(checksummed) = &self.checksummed
                && step & (checksummed.unit_bytes - 1) == 0
                && let Some(piece) = src.contiguous(step)
            {
                // SAFETY: `step` bytes are left of the target, and `piece` is as much readable memory; `available`
                // lists only what this CPU can run.
                crc = unsafe { (checksummed.store)(dst.wrapping_add(done), piece, step, crc) };
                done += step;
                continue;
            }
            let bytes = bounce.read(src, step);
            crc = crc32c::crc32c_append(crc, bytes);
            // SAFETY: `step` bytes are left of the target, and it is a multiple of a line, since both
            // `len_bytes` and the size of the bounce buffer are.
            unsafe { self.store(dst.wrapping_add(done), bytes.as_ptr(), step) };
            done += step;
        }
        crc
    }
}

impl LineBuf {
    /// Copies `len_bytes` bytes from `src` to `at`.
    ///
    /// # Safety
    /// `src` is valid for reads of that many bytes.
    unsafe fn fill(&mut self, at: usize, src: *const u8, len_bytes: usize) {
        let dst = &mut self.0[at..at + len_bytes];
        // SAFETY: `src` by the contract; `dst` is a local of that many bytes.
        unsafe { ptr::copy_nonoverlapping(src, dst.as_mut_ptr(), len_bytes) }
    }
}

impl Bounce {
    /// The next `len_bytes` bytes of the caller's memory: read here, once, whatever becomes of them there.
    fn read(&mut self, src: &mut IovCursor, len_bytes: usize) -> &[u8] {
        assert!(
            len_bytes <= BOUNCE_SIZE_BYTES,
            "the bounce buffer is large enough"
        );
        let buf = self.0.as_mut_ptr().cast::<u8>();
        // SAFETY: `buf` is a local of at least `len_bytes` bytes.
        unsafe { src.read_into_ptr(buf, len_bytes) };
        // SAFETY: no instruction at all. It hides from the compiler that the buffer equals the caller's
        // memory: without it, LLVM may drop the copy and let the checksum and the store read the source once
        // each, and a guest that changes it in between would make a checksum error of a good write.
        unsafe { std::arch::asm!("/* {0} */", in(reg) buf, options(nostack, preserves_flags)) };
        // SAFETY: `read_into_ptr` has initialised the first `len_bytes` bytes.
        unsafe { std::slice::from_raw_parts(buf, len_bytes) }
    }
}

/// Waits until the lines that this CPU has streamed are in the persistence domain.
pub(super) fn fence() {
    arch::fence();
}

/// Hints that the line at `ptr` will be read. Never faults.
pub(super) fn prefetch(ptr: *const u8) {
    arch::prefetch(ptr);
}

#[cfg(target_arch = "x86_64")]
#[path = "copy/x86_64.rs"]
mod arch;
#[cfg(target_arch = "x86_64")]
mod records;

#[cfg(target_arch = "aarch64")]
#[path = "copy/aarch64.rs"]
mod arch;

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("pcache knows how to persist a store on x86-64 and aarch64 only");

#[cfg(test)]
mod tests;
