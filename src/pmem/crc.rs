//! CRC-32C of a few dozen bytes: what the checksum of a small kset costs.
//!
//! The crate that does the long ones sets up three lanes first, which takes longer than so few bytes do.

use crc32c::crc32c_append;

/// Longer inputs are the crate's.
#[cfg(any(test, target_arch = "x86_64"))]
const SHORT_SIZE_BYTES_MAX: usize = 256;

/// As [`crc32c_append`]: the checksum of what `crc` is the checksum of and `bytes` behind it.
#[inline]
pub(crate) fn crc32c_append_short(crc: u32, bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if bytes.len() <= SHORT_SIZE_BYTES_MAX && is_x86_feature_detected!("sse4.2") {
        // SAFETY: the CPU has SSE 4.2.
        return unsafe { append_sse42(crc, bytes) };
    }
    crc32c_append(crc, bytes)
}

/// # Safety
/// The CPU has SSE 4.2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
fn append_sse42(crc: u32, bytes: &[u8]) -> u32 {
    use std::arch::x86_64::{_mm_crc32_u8, _mm_crc32_u32, _mm_crc32_u64};

    let (words, rest) = bytes.as_chunks::<8>();
    let crc = words.iter().fold(u64::from(!crc), |crc, word| {
        _mm_crc32_u64(crc, u64::from_le_bytes(*word))
    });
    // The upper half is 0.
    let mut crc = crc as u32;
    let rest = match rest.split_first_chunk::<4>() {
        Some((word, rest)) => {
            crc = _mm_crc32_u32(crc, u32::from_le_bytes(*word));
            rest
        }
        None => rest,
    };
    !rest.iter().fold(crc, |crc, byte| _mm_crc32_u8(crc, *byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_inputs_have_the_checksum_of_the_crate_from_any_seed() {
        let bytes: Vec<u8> = (0..SHORT_SIZE_BYTES_MAX + 40)
            .map(|i| (i * 37 + i / 7) as u8)
            .collect();
        for seed in [0, 1, 0x8000_0000, 0xdead_beef, u32::MAX] {
            for start in 0..8 {
                for end in start..bytes.len() {
                    let part = &bytes[start..end];
                    assert_eq!(
                        crc32c_append_short(seed, part),
                        crc32c_append(seed, part),
                        "of {} bytes",
                        part.len()
                    );
                }
            }
        }
    }
}
