//! Stores of x86-64: non-temporal, which go past the cache.

use std::arch::asm;
use std::arch::x86_64::{
    __m128i, __m256i, __m512i, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm_sfence,
    _mm256_loadu_si256, _mm512_loadu_si512,
};

use super::super::guard::guard;
use super::super::load::arch::{
    load_avx2, load_avx2_and_ask, load_avx512, load_avx512_and_ask, load_sse2, load_sse2_and_ask,
};
use super::super::{folded, fused};
use super::records::Sooner;
use super::{Kernel, LINE, Records, records};

const _: () = assert!(fused::BLOCK_SIZE_BYTES == super::BOUNCE_SIZE_BYTES);
const _: () = assert!(super::BOUNCE_SIZE_BYTES.is_multiple_of(folded::STRIDE));
const _: () = assert!(folded::STRIDE.is_power_of_two());

/// All ways to stream with the best way to store records, and the best one with the others.
pub(super) fn kernels() -> Vec<Kernel> {
    kernels_of(records::sooner())
}

/// The same for CPUs on which these records are sooner durable.
pub(super) fn kernels_of(sooner: Sooner) -> Vec<Kernel> {
    let flushed = records::flushed();
    let best_flushed = flushed.first().copied();
    let mut kernels = streams(best_flushed.filter(|_| sooner == Sooner::Flushed));
    let best = kernels[0];
    let used = usize::from(best.records.is_some());
    let others = flushed.into_iter().skip(used).chain([records::unflushed()]);
    kernels.extend(others.map(|records| Kernel {
        records: Some(records),
        ..best
    }));
    kernels
}

pub(super) fn unflushed_records() -> Option<Records> {
    Some(records::unflushed())
}

fn streams(records: Option<Records>) -> Vec<Kernel> {
    let mut kernels = Vec::new();
    if is_x86_feature_detected!("avx512f") {
        let stream = stream_avx512;
        kernels.push(Kernel {
            name: "avx512",
            stream,
            checksummed: folded::available().or_else(fused::available),
            load: load_avx512,
            load_and_ask: load_avx512_and_ask,
            records,
        });
    }
    if is_x86_feature_detected!("avx2") {
        let stream = stream_avx2;
        kernels.push(Kernel {
            name: "avx2",
            stream,
            checksummed: fused::available(),
            load: load_avx2,
            load_and_ask: load_avx2_and_ask,
            records,
        });
    }
    kernels.push(Kernel {
        name: "sse2",
        stream: stream_sse2,
        checksummed: None,
        load: load_sse2,
        load_and_ask: load_sse2_and_ask,
        records,
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
