//! The copies between a caller's memory and the cache device: non-temporal stores, which go past the cache
//! and so need no flush, only the fence. All instructions that touch the device are guarded, see
//! [`super::guard`]: a store that the memory does not take is noted by its region, and skipped.
//!
//! Which instruction is used is decided once, at run time, by what the CPU has. Left out on purpose:
//! `movdir64b` (never measured to win here) and everything temporal with `clwb`, which runs at less than a
//! third of the speed.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;

use super::LINE_SIZE_BYTES;
use super::iov::IovCursor;
use super::load::Load;

const LINE: usize = LINE_SIZE_BYTES as usize;

/// Size of the stack buffer through which a payload goes when it is checksummed: fits in the L1 cache.
const BOUNCE_SIZE_BYTES: usize = 4096;

/// One way to store lines past the cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    name: &'static str,
    /// `(dst, src, len_bytes)`: as [`Kernel::store`].
    stream: unsafe fn(*mut u8, *const u8, usize),
    /// `(dst, src, crc)`: stores [`BOUNCE_SIZE_BYTES`] bytes and returns their checksum, in one pass.
    store_block: Option<unsafe fn(*mut u8, *const u8, u32) -> u32>,
    load: Load,
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

    /// For the log and for benches.
    pub(super) fn name(&self) -> &'static str {
        self.name
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

    /// As [`Kernel::load`], to the caller's memory at `dst`, which advances in any case.
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
    ) -> Result<(), Unreadable> {
        let (mut src, mut result) = (src, Ok(()));
        dst.chunks(len_bytes, |dst, len| {
            if result.is_ok() {
                // SAFETY: `chunks` names `len` writable bytes (contract of `IovCursor::new`), and never more in
                // sum than the `len_bytes` of the source.
                result = unsafe { self.load(dst, src, len) };
            }
            src = src.wrapping_add(len);
        });
        result
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
            if let Some(store_block) = self.store_block
                && step == BOUNCE_SIZE_BYTES
                && let Some(block) = src.contiguous(step)
            {
                // SAFETY: a block is left of the target, and `block` is one of readable memory; `available`
                // lists only what this CPU can run.
                crc = unsafe { store_block(dst.wrapping_add(done), block, crc) };
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
mod arch {
    use std::arch::asm;
    use std::arch::x86_64::{
        __m128i, __m256i, __m512i, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm_sfence,
        _mm256_loadu_si256, _mm512_loadu_si512,
    };

    use super::super::fused;
    use super::super::guard::guard;
    use super::super::load::arch::{load_avx2, load_avx512, load_sse2};
    use super::{Kernel, LINE};

    const _: () = assert!(fused::BLOCK_SIZE_BYTES == super::BOUNCE_SIZE_BYTES);

    pub(super) fn kernels() -> Vec<Kernel> {
        let mut kernels = Vec::new();
        if is_x86_feature_detected!("avx512f") {
            let stream = stream_avx512;
            kernels.push(Kernel {
                name: "avx512",
                stream,
                store_block: fused::available(),
                load: load_avx512,
            });
        }
        if is_x86_feature_detected!("avx2") {
            let stream = stream_avx2;
            kernels.push(Kernel {
                name: "avx2",
                stream,
                store_block: fused::available(),
                load: load_avx2,
            });
        }
        kernels.push(Kernel {
            name: "sse2",
            stream: stream_sse2,
            store_block: None,
            load: load_sse2,
        });
        kernels
    }

    /// Lines that a turn of a copy loop stores: as many as make its own instructions negligible.
    const GROUP: usize = 8 * LINE;

    /// The loop around `$line`, of which `$line::<AT>(dst, src)` stores the line at byte `AT`. A macro, since
    /// a function could not be inlined into all three with what each may use of the CPU.
    macro_rules! store_lines {
        ($line:ident, $dst:expr, $src:expr, $len_bytes:expr) => {
            let (mut dst, mut src, mut left): (*mut u8, *const u8, usize) =
                ($dst, $src, $len_bytes);
            while left >= GROUP {
                // SAFETY: a group of lines is left of both, by the contract, and `dst` stays aligned to a line.
                unsafe {
                    $line::<0>(dst, src);
                    $line::<LINE>(dst, src);
                    $line::<{ 2 * LINE }>(dst, src);
                    $line::<{ 3 * LINE }>(dst, src);
                    $line::<{ 4 * LINE }>(dst, src);
                    $line::<{ 5 * LINE }>(dst, src);
                    $line::<{ 6 * LINE }>(dst, src);
                    $line::<{ 7 * LINE }>(dst, src);
                }
                dst = dst.wrapping_add(GROUP);
                src = src.wrapping_add(GROUP);
                left -= GROUP;
            }
            while left > 0 {
                // SAFETY: as above, for a line: what is left is a multiple of it.
                unsafe { $line::<0>(dst, src) };
                dst = dst.wrapping_add(LINE);
                src = src.wrapping_add(LINE);
                left -= LINE;
            }
        };
    }

    /// # Safety
    /// As [`Kernel::store`].
    unsafe fn stream_sse2(dst: *mut u8, src: *const u8, len_bytes: usize) {
        store_lines!(line_sse2, dst, src, len_bytes);
    }

    /// # Safety
    /// As [`Kernel::store`]; and the CPU has AVX2.
    #[target_feature(enable = "avx2")]
    unsafe fn stream_avx2(dst: *mut u8, src: *const u8, len_bytes: usize) {
        store_lines!(line_avx2, dst, src, len_bytes);
    }

    /// # Safety
    /// As [`Kernel::store`]; and the CPU has AVX-512F.
    #[target_feature(enable = "avx512f")]
    unsafe fn stream_avx512(dst: *mut u8, src: *const u8, len_bytes: usize) {
        store_lines!(line_avx512, dst, src, len_bytes);
    }

    // The stores are spelt out, because the intrinsics know no displacement: each would cost the computation of
    // an address.

    /// # Safety
    /// A line at byte `AT` of `src` can be read and one of `dst` be written, which is aligned to a line.
    #[inline]
    unsafe fn line_sse2<const AT: usize>(dst: *mut u8, src: *const u8) {
        const STEP: usize = size_of::<__m128i>();
        let from = |part: usize| src.wrapping_add(AT + part * STEP).cast::<__m128i>();
        // SAFETY: the parts of a line of the source, by the contract; any alignment will do.
        let (a, b, c, d) = unsafe {
            (
                _mm_loadu_si128(from(0)),
                _mm_loadu_si128(from(1)),
                _mm_loadu_si128(from(2)),
                _mm_loadu_si128(from(3)),
            )
        };
        // SAFETY: four stores that fill a line of the target, by the contract; each is aligned to its size.
        unsafe {
            asm!(
                "2:",
                "movntdq xmmword ptr [{dst} + {at}], {a}",
                "movntdq xmmword ptr [{dst} + {at} + 16], {b}",
                "movntdq xmmword ptr [{dst} + {at} + 32], {c}",
                "movntdq xmmword ptr [{dst} + {at} + 48], {d}",
                "3:",
                guard!("1"),
                dst = in(reg) dst, at = const AT,
                a = in(xmm_reg) a, b = in(xmm_reg) b, c = in(xmm_reg) c, d = in(xmm_reg) d,
                options(nostack, preserves_flags),
            );
        }
    }

    /// # Safety
    /// As [`line_sse2`]; and the CPU has AVX2.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn line_avx2<const AT: usize>(dst: *mut u8, src: *const u8) {
        const STEP: usize = size_of::<__m256i>();
        let from = src.wrapping_add(AT).cast::<__m256i>();
        // SAFETY: the first half of a line of the source, by the contract; any alignment will do.
        let low = unsafe { _mm256_loadu_si256(from) };
        // SAFETY: as above, the second half.
        let high = unsafe { _mm256_loadu_si256(from.wrapping_byte_add(STEP)) };
        // SAFETY: two stores that fill a line of the target, by the contract; each is aligned to its size.
        unsafe {
            asm!(
                "2:",
                "vmovntdq ymmword ptr [{dst} + {at}], {low}",
                "vmovntdq ymmword ptr [{dst} + {at} + 32], {high}",
                "3:",
                guard!("1"),
                dst = in(reg) dst, at = const AT, low = in(ymm_reg) low, high = in(ymm_reg) high,
                options(nostack, preserves_flags),
            );
        }
    }

    /// # Safety
    /// As [`line_sse2`]; and the CPU has AVX-512F.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn line_avx512<const AT: usize>(dst: *mut u8, src: *const u8) {
        // SAFETY: a line of the source, by the contract; any alignment will do.
        let line = unsafe { _mm512_loadu_si512(src.wrapping_add(AT).cast::<__m512i>()) };
        // SAFETY: a store that fills a line of the target, by the contract; it is aligned to its size.
        unsafe {
            asm!(
                "2:",
                "vmovntdq zmmword ptr [{dst} + {at}], {line}",
                "3:",
                guard!("1"),
                dst = in(reg) dst, at = const AT, line = in(zmm_reg) line,
                options(nostack, preserves_flags),
            );
        }
    }

    #[inline]
    pub(super) fn fence() {
        // SAFETY: a barrier; every x86-64 has SSE.
        unsafe { _mm_sfence() };
    }

    #[inline]
    pub(super) fn prefetch(ptr: *const u8) {
        // SAFETY: a prefetch has no effect on memory and ignores addresses that are not mapped.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr.cast()) };
    }
}

/// Written after the manuals and compiled only: no such machine with persistent memory was at hand.
///
/// Armv8 has no store that is sure to go past the cache, so lines are stored and then cleaned, to the point
/// of persistence where the CPU knows one (FEAT_DPB), else to the point of coherency.
#[cfg(target_arch = "aarch64")]
mod arch {
    use std::arch::asm;

    use super::super::guard::guard;
    use super::super::load::arch::load;
    use super::{Kernel, LINE};

    pub(super) fn kernels() -> Vec<Kernel> {
        let mut kernels = Vec::new();
        if std::arch::is_aarch64_feature_detected!("dpb") {
            kernels.push(Kernel {
                name: "dc cvap",
                stream: store_cvap,
                store_block: None,
                load,
            });
        }
        kernels.push(Kernel {
            name: "dc cvac",
            stream: store_cvac,
            store_block: None,
            load,
        });
        kernels
    }

    /// Stores line by line, and cleans each. Server cores have lines of 64 bytes or longer.
    macro_rules! store_lines {
        ($clean:literal, $dst:expr, $src:expr, $len_bytes:expr) => {
            for at in (0..$len_bytes).step_by(LINE) {
                // SAFETY: a line of the source and one of the target, by the contract; then the latter is
                // cleaned, which Linux allows in user space.
                unsafe {
                    asm!(
                        "ldp {a:q}, {b:q}, [{src}]",
                        "ldp {c:q}, {d:q}, [{src}, #32]",
                        "2:",
                        "stp {a:q}, {b:q}, [{dst}]",
                        "stp {c:q}, {d:q}, [{dst}, #32]",
                        $clean,
                        "3:",
                        guard!("1"),
                        src = in(reg) $src.wrapping_add(at), dst = in(reg) $dst.wrapping_add(at),
                        a = out(vreg) _, b = out(vreg) _, c = out(vreg) _, d = out(vreg) _,
                        options(nostack, preserves_flags),
                    );
                }
            }
        };
    }

    /// # Safety
    /// As [`Kernel::store`]; and the CPU has FEAT_DPB.
    unsafe fn store_cvap(dst: *mut u8, src: *const u8, len_bytes: usize) {
        // `dc cvap`, spelt out for old assemblers.
        store_lines!("sys #3, c7, c12, #1, {dst}", dst, src, len_bytes);
    }

    /// # Safety
    /// As [`Kernel::store`].
    unsafe fn store_cvac(dst: *mut u8, src: *const u8, len_bytes: usize) {
        store_lines!("dc cvac, {dst}", dst, src, len_bytes);
    }

    #[inline]
    pub(super) fn fence() {
        // The widest barrier: the cleaned lines have left the inner shareable domain when it completes.
        // SAFETY: a barrier.
        unsafe { asm!("dsb sy", options(nostack, preserves_flags)) };
    }

    #[inline]
    pub(super) fn prefetch(ptr: *const u8) {
        // SAFETY: a prefetch has no effect on memory and ignores addresses that are not mapped.
        unsafe { asm!("prfm pldl1keep, [{0}]", in(reg) ptr, options(nostack, preserves_flags)) };
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("pcache knows how to persist a store on x86-64 and aarch64 only");

#[cfg(test)]
mod tests;
