//! Range checks that all implementations of `Pmem` share. A range outside of the region is a bug of the
//! engine: nothing is touched, and the message names the range.

use super::LINE_SIZE_BYTES;
use crate::units::PmemOff;

/// `off` as an index into a region of `region_len_bytes` bytes, of which the `len_bytes` bytes from there
/// on are a part.
///
/// # Panics
/// They are not.
#[track_caller]
pub(crate) fn range_at(off: PmemOff, len_bytes: u64, region_len_bytes: u64) -> usize {
    let end = off.0.checked_add(len_bytes);
    if end.is_none_or(|end| end > region_len_bytes) {
        outside(off.0, len_bytes, region_len_bytes);
    }
    off.0 as usize
}

/// Apart, and with values: what a message refers to is stored before it is known whether it is needed.
#[cold]
#[inline(never)]
#[track_caller]
fn outside(off: u64, len_bytes: u64, region_len_bytes: u64) -> ! {
    panic!(
        "INV-PMEM-1: bytes {off:#x}+{len_bytes:#x} lie outside of the cache device of {region_len_bytes:#x} bytes"
    )
}

/// As [`range_at`], for a store: whole lines only.
///
/// # Panics
/// The range lies outside of the region or cuts a line.
#[track_caller]
pub(crate) fn lines_at(off: PmemOff, len_bytes: u64, region_len_bytes: u64) -> usize {
    assert!(
        off.0.is_multiple_of(LINE_SIZE_BYTES) && len_bytes.is_multiple_of(LINE_SIZE_BYTES),
        "INV-PMEM-1: store of bytes {:#x}+{len_bytes:#x} cuts a line of {LINE_SIZE_BYTES} bytes",
        off.0
    );
    range_at(off, len_bytes, region_len_bytes)
}

// `range_at` returns an offset that was compared as a u64.
const _: () = assert!(usize::BITS == 64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_up_to_the_end_is_inside() {
        assert_eq!(range_at(PmemOff(4000), 96, 4096), 4000);
        assert_eq!(range_at(PmemOff(4096), 0, 4096), 4096);
    }

    #[test]
    #[should_panic(expected = "INV-PMEM-1: bytes 0xfff+0x2 lie outside")]
    fn a_range_past_the_end_panics() {
        range_at(PmemOff(4095), 2, 4096);
    }

    #[test]
    #[should_panic(expected = "lie outside")]
    fn a_range_that_wraps_panics() {
        range_at(PmemOff(u64::MAX), 2, 4096);
    }

    #[test]
    #[should_panic(expected = "cuts a line")]
    fn a_store_that_cuts_a_line_panics() {
        lines_at(PmemOff(64), 65, 4096);
    }
}
