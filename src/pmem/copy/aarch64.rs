//! Stores of aarch64. Written after the manuals and run in an emulator only: no such machine with persistent memory was at hand.
//!
//! Armv8 has no store that is sure to go past the cache, so lines are stored and then cleaned, to the point
//! of persistence where the CPU knows one (FEAT_DPB), else to the point of coherency.

use std::arch::asm;

use super::super::guard::guard;
use super::super::load::arch::{load, load_and_ask};
use super::{Kernel, LINE, Records};

pub(super) fn unflushed_records() -> Option<Records> {
    // Stores need no cleaning there either, but nobody could measure it.
    None
}

pub(super) fn kernels() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    if std::arch::is_aarch64_feature_detected!("dpb") {
        kernels.push(Kernel {
            name: "dc cvap",
            stream: store_cvap,
            checksummed: None,
            load,
            load_and_ask,
            records: None,
        });
    }
    kernels.push(Kernel {
        name: "dc cvac",
        stream: store_cvac,
        checksummed: None,
        load,
        load_and_ask,
        records: None,
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
