//! Store and checksum in one pass, of multiples of 256 bytes, for x86-64 with AVX-512 and VPCLMULQDQ.
//!
//! As in [`super::fused`], each line is loaded once, streamed, and checksummed while the next ones are on their way;
//! but by carry-less multiplication, a line at a time: folding as in Gopal et al., Fast CRC Computation for Generic
//! Polynomials Using PCLMULQDQ Instruction (Intel, 2009), with registers of 64 bytes. The last 16 bytes are left to
//! the `crc32` instruction.
//!
//! Bits are reversed: bit i of a register of n bits stands for x^(n - 1 - i), so that the first bit is that of the
//! highest power.

use std::arch::asm;
use std::arch::x86_64::{
    __m512i, _mm_crc32_u64, _mm_cvtsi32_si128, _mm_cvtsi128_si64, _mm_unpackhi_epi64,
    _mm_xor_si128, _mm512_castsi512_si128, _mm512_clmulepi64_epi128, _mm512_extracti32x4_epi32,
    _mm512_loadu_si512, _mm512_set_epi64, _mm512_ternarylogic_epi64, _mm512_xor_si512,
    _mm512_zextsi128_si512,
};

use super::LINE_SIZE_BYTES;
use super::copy::Checksummed;
use super::fused::power;
use super::guard::guard;
use crate::units::PAGE_SIZE_BYTES;

const LINE: usize = LINE_SIZE_BYTES as usize;
const LINE_BITS: u32 = 8 * LINE as u32;
/// Registers that are folded side by side, since a multiplication takes some eight cycles, and two are begun in two.
const SUM_COUNT: usize = 4;
pub(super) const STRIDE: usize = SUM_COUNT * LINE;

/// [`store_strides`], where the CPU has what it takes.
pub(super) fn available() -> Option<Checksummed> {
    let has_all = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("vpclmulqdq")
        && is_x86_feature_detected!("sse4.2");
    has_all.then_some(Checksummed {
        store: store_strides,
        unit_bytes: STRIDE,
        bytes_per_fence: 4 * u64::from(PAGE_SIZE_BYTES),
    })
}

/// What moves 16 bytes ahead by so many bits: a factor for their first 8 and one for their last, each short of a
/// factor x, which the reversed product has by itself. Nothing that is not to be moved is multiplied: 0.
const fn ahead(bits: u32) -> [i64; 2] {
    const fn factor(exponent: u32) -> i64 {
        ((power(exponent) as u64) << 32) as i64
    }
    if bits == 0 {
        return [0, 0];
    }
    [factor(bits + 63), factor(bits - 1)]
}

/// To where the next line of the same sum lies, to the next line, and from each part of a line to its last one.
const TO_NEXT_STRIDE: [[i64; 2]; 4] = [ahead(SUM_COUNT as u32 * LINE_BITS); 4];
const TO_NEXT_LINE: [[i64; 2]; 4] = [ahead(LINE_BITS); 4];
const PART_BITS: u32 = LINE_BITS / 4;
const TO_LAST_PART: [[i64; 2]; 4] = [
    ahead(3 * PART_BITS),
    ahead(2 * PART_BITS),
    ahead(PART_BITS),
    ahead(0),
];

/// The factors for the four parts of a line.
#[inline]
#[target_feature(enable = "avx512f")]
fn factors(parts: [[i64; 2]; 4]) -> __m512i {
    let [a, b, c, d] = parts;
    _mm512_set_epi64(d[1], d[0], c[1], c[0], b[1], b[0], a[1], a[0])
}

/// Moves each part of `sum` ahead by its factors, and adds `line`.
#[inline]
#[target_feature(enable = "avx512f,vpclmulqdq")]
fn fold(sum: __m512i, factors: __m512i, line: __m512i) -> __m512i {
    const XOR: i32 = 0x96;
    let first = _mm512_clmulepi64_epi128::<0x00>(sum, factors);
    let last = _mm512_clmulepi64_epi128::<0x11>(sum, factors);
    _mm512_ternarylogic_epi64::<XOR>(first, last, line)
}

/// Stores `len_bytes` bytes, a multiple of [`STRIDE`] that is not 0, from `src` to `dst` past the cache, and returns
/// `crc32c(crc, bytes)`. Each source byte is read once.
///
/// # Safety
/// `dst` is aligned to a line and valid for writes, `src` valid for reads of that many bytes, they do not overlap;
/// and the CPU has AVX-512F, VPCLMULQDQ and SSE 4.2.
#[target_feature(enable = "avx512f,vpclmulqdq,sse4.2")]
unsafe fn store_strides(dst: *mut u8, src: *const u8, len_bytes: usize, crc: u32) -> u32 {
    let line = |at: usize| {
        // SAFETY: `at` is that of one of the lines, and the target's lines are aligned as its start is.
        unsafe { store_line(dst.wrapping_add(at), src.wrapping_add(at)) }
    };
    let start = _mm512_zextsi128_si512(_mm_cvtsi32_si128(!crc as i32));
    let mut sums = [
        _mm512_xor_si512(line(0), start),
        line(LINE),
        line(2 * LINE),
        line(3 * LINE),
    ];
    let stride = factors(TO_NEXT_STRIDE);
    for at in (STRIDE..len_bytes).step_by(STRIDE) {
        for (number, sum) in sums.iter_mut().enumerate() {
            *sum = fold(*sum, stride, line(at + number * LINE));
        }
    }
    let next_line = factors(TO_NEXT_LINE);
    let [first, rest @ ..] = sums;
    let sum = rest
        .into_iter()
        .fold(first, |sum, line| fold(sum, next_line, line));
    finish(sum)
}

/// The checksum that a line alone would have.
#[inline]
#[target_feature(enable = "avx512f,vpclmulqdq,sse4.2")]
fn finish(sum: __m512i) -> u32 {
    let last = _mm512_extracti32x4_epi32::<3>(sum);
    let moved = fold(sum, factors(TO_LAST_PART), _mm512_zextsi128_si512(last));
    let [a, b, c, d] = [
        _mm512_castsi512_si128(moved),
        _mm512_extracti32x4_epi32::<1>(moved),
        _mm512_extracti32x4_epi32::<2>(moved),
        _mm512_extracti32x4_epi32::<3>(moved),
    ];
    let whole = _mm_xor_si128(_mm_xor_si128(a, b), _mm_xor_si128(c, d));
    let first = _mm_cvtsi128_si64(whole) as u64;
    let second = _mm_cvtsi128_si64(_mm_unpackhi_epi64(whole, whole)) as u64;
    !(_mm_crc32_u64(_mm_crc32_u64(0, first), second) as u32)
}

/// Stores a line from `src` to `dst` past the cache, and returns it.
///
/// # Safety
/// `dst` is aligned to a line and valid for writes of one, `src` valid for reads of one.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_line(dst: *mut u8, src: *const u8) -> __m512i {
    // SAFETY: a line of the source, by the contract; any alignment will do.
    let mut line = unsafe { _mm512_loadu_si512(src.cast::<__m512i>()) };
    // An output too, so that the compiler cannot take the checksum from a second load of the source.
    // SAFETY: a line of the target, which is aligned to one.
    unsafe {
        asm!("2:", "vmovntdq zmmword ptr [{dst}], {line}", "3:", guard!("1"),
             dst = in(reg) dst, line = inout(zmm_reg) line, options(nostack, preserves_flags));
    }
    line
}
