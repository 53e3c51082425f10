//! Store and checksum of a 4 KiB block in one pass, for x86-64 with AVX2; [`super::folded`] is for newer ones.
//!
//! A checksum behind the copy costs more than the copy: the `crc32` instruction takes 8 bytes per cycle at
//! the best, and while it runs the memory idles. Here each line is loaded once, streamed, and checksummed
//! from a stack buffer while the next ones are on their way. Three parts of the block are checksummed side
//! by side, since `crc32` has a latency of three cycles; at the end two of the checksums are shifted to
//! their places by a carry-less multiplication.

use std::arch::asm;
use std::arch::x86_64::{
    __m256i, _mm_clmulepi64_si128, _mm_crc32_u64, _mm_cvtsi32_si128, _mm_cvtsi128_si64,
    _mm256_loadu_si256, _mm256_store_si256,
};
use std::mem::MaybeUninit;

use super::LINE_SIZE_BYTES;
use super::copy::Checksummed;
use super::guard::guard;

const LINE: usize = LINE_SIZE_BYTES as usize;
const WORDS_PER_LINE: usize = LINE / 8;

/// The only length that is done here.
pub(super) const BLOCK_SIZE_BYTES: usize = 4096;
/// Three lanes and one line over.
const LANE_SIZE_BYTES: usize = 21 * LINE;
const _: () = assert!(3 * LANE_SIZE_BYTES + LINE == BLOCK_SIZE_BYTES);

/// [`store_block`], where the CPU has what it takes.
pub(super) fn available() -> Option<Checksummed> {
    let has_all = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("sse4.2")
        && is_x86_feature_detected!("pclmulqdq");
    has_all.then_some(Checksummed {
        store: store_block,
        unit_bytes: BLOCK_SIZE_BYTES,
        bytes_per_fence: BLOCK_SIZE_BYTES as u64,
    })
}

/// The CRC-32C polynomial, bits reversed: bit 31 is x^0.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// x^exponent modulo the polynomial.
pub(super) const fn power(exponent: u32) -> u32 {
    let mut power: u32 = 1 << 31;
    let mut left = exponent;
    while left > 0 {
        power = if power & 1 == 1 {
            (power >> 1) ^ POLYNOMIAL
        } else {
            power >> 1
        };
        left -= 1;
    }
    power
}

/// Multiplied with a checksum (which leaves a factor x, for the product has 63 bits) and reduced by `crc32` (which
/// multiplies by x^32), it appends so many zero bytes.
const fn shift_by(len_bytes: usize) -> u32 {
    power(8 * len_bytes as u32 - 33)
}

const SHIFT_ONE_LANE: u32 = shift_by(LANE_SIZE_BYTES);
const SHIFT_TWO_LANES: u32 = shift_by(2 * LANE_SIZE_BYTES);

/// Filled by [`store_line`] alone.
#[repr(C, align(64))]
struct Line(MaybeUninit<[u64; WORDS_PER_LINE]>);

impl Line {
    const EMPTY: Self = Self(MaybeUninit::uninit());

    /// # Safety
    /// `store_line` has filled the line.
    #[inline]
    unsafe fn words(&self) -> &[u64; WORDS_PER_LINE] {
        // SAFETY: by the contract.
        unsafe { self.0.assume_init_ref() }
    }
}

/// Stores `len_bytes` bytes, [`BLOCK_SIZE_BYTES`], from `src` to `dst` past the cache, and returns `crc32c(crc, bytes)`.
/// Each source byte is read once.
///
/// # Safety
/// `dst` is aligned to a line and valid for writes, `src` valid for reads of the block, they do not overlap;
/// and the CPU has AVX2, SSE 4.2 and PCLMULQDQ.
#[target_feature(enable = "avx2,sse4.2,pclmulqdq")]
unsafe fn store_block(dst: *mut u8, src: *const u8, len_bytes: usize, crc: u32) -> u32 {
    debug_assert_eq!(len_bytes, BLOCK_SIZE_BYTES);
    let mut lanes = [u64::from(!crc), 0, 0];
    for at in (0..LANE_SIZE_BYTES).step_by(LINE) {
        let mut lines = [const { Line::EMPTY }; 3];
        for (lane, line) in lines.iter_mut().enumerate() {
            let at = lane * LANE_SIZE_BYTES + at;
            // SAFETY: a line at `at` lies inside of the block, for `at` is at most two lanes and 20 lines.
            unsafe { store_line(dst.wrapping_add(at), src.wrapping_add(at), line) };
        }
        // SAFETY: all three were filled just above.
        let lines = lines.each_ref().map(|line| unsafe { line.words() });
        for word in 0..WORDS_PER_LINE {
            for (crc, line) in lanes.iter_mut().zip(lines) {
                *crc = _mm_crc32_u64(*crc, line[word]);
            }
        }
    }
    let [first, second, third] = lanes;
    let mut crc =
        append_zeroes(first, SHIFT_TWO_LANES) ^ append_zeroes(second, SHIFT_ONE_LANE) ^ third;
    let mut line = Line::EMPTY;
    let at = 3 * LANE_SIZE_BYTES;
    // SAFETY: the last line of the block begins there.
    unsafe { store_line(dst.wrapping_add(at), src.wrapping_add(at), &mut line) };
    // SAFETY: filled just above.
    for word in unsafe { line.words() } {
        crc = _mm_crc32_u64(crc, *word);
    }
    !(crc as u32)
}

#[inline]
#[target_feature(enable = "sse4.2,pclmulqdq")]
fn append_zeroes(crc: u64, shift: u32) -> u64 {
    let product = _mm_clmulepi64_si128::<0>(
        _mm_cvtsi32_si128(crc as u32 as i32),
        _mm_cvtsi32_si128(shift as i32),
    );
    _mm_crc32_u64(0, _mm_cvtsi128_si64(product) as u64)
}

/// Stores a line from `src` to `dst` past the cache, and leaves a copy in `copy`.
///
/// # Safety
/// `dst` is aligned to a line and valid for writes of one, `src` valid for reads of one.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store_line(dst: *mut u8, src: *const u8, copy: &mut Line) {
    let copy = copy.0.as_mut_ptr().cast::<__m256i>();
    for half in 0..2 {
        // SAFETY: half a line of the source, by the contract; any alignment will do.
        let bytes = unsafe { _mm256_loadu_si256(src.cast::<__m256i>().wrapping_add(half)) };
        let to = dst.cast::<__m256i>().wrapping_add(half);
        // SAFETY: half a line of the target, which is aligned to a line.
        unsafe {
            asm!("2:", "vmovntdq ymmword ptr [{to}], {bytes}", "3:", guard!("1"),
                 to = in(reg) to, bytes = in(ymm_reg) bytes, options(nostack, preserves_flags));
        }
        // SAFETY: half of the copy, a local that is aligned to a line.
        unsafe { _mm256_store_si256(copy.wrapping_add(half), bytes) };
    }
    // SAFETY: no instruction at all. It hides from the compiler what the copy holds, so that the checksum
    // cannot be taken from a second load of the source.
    unsafe { asm!("/* {0} */", in(reg) copy, options(nostack, preserves_flags)) };
}
