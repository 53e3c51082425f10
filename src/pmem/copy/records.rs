//! Records: what is short, and stored by itself with a fence behind it, as a kset of a few keys is. Through the cache
//! and flushed, up to four lines are durable up to a fifth sooner than past it, but on CPUs of AMD; 13 are not
//! (docs/adr/0015-stores.md has the figures).
//!
//! Where the platform saves the caches when the power fails (eADR), a store is durable without a flush, as soon as other
//! cores could see it, and the fence behind it sees to that.

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, CpuidResult};

use super::super::guard::guard;
use super::{LINE, Records};

/// Flushed line by line, so that more lines than these are sooner streamed.
const FLUSHED_LINES_MAX: usize = 4;
/// At 13 lines they take less than half of the time of non-temporal ones, at 64 more.
const UNFLUSHED_LINES_MAX: usize = 16;

const FEATURE_LEAF: u32 = 7;
/// Bits of `ebx` in that leaf: Intel SDM, volume 2, CPUID.
const CLFLUSHOPT: u32 = 1 << 23;
const CLWB: u32 = 1 << 24;
/// The vendor of leaf 0: AMD APM, volume 3, CPUID.
const AMD: &[u8; 12] = b"AuthenticAMD";

/// With a flush of each line, by all instructions that this CPU has for it; the best first.
pub(super) fn flushed() -> Vec<Records> {
    let features = features();
    let mut found = Vec::new();
    if features & CLWB != 0 {
        found.push(Records {
            name: "clwb",
            store: store_clwb,
            size_bytes_max: FLUSHED_LINES_MAX * LINE,
        });
    }
    if features & CLFLUSHOPT != 0 {
        found.push(Records {
            name: "clflushopt",
            store: store_clflushopt,
            size_bytes_max: FLUSHED_LINES_MAX * LINE,
        });
    }
    // Each waits for the one before.
    found.push(Records {
        name: "clflush",
        store: store_clflush,
        size_bytes_max: LINE,
    });
    found
}

/// Which records are sooner durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sooner {
    /// Those that are stored through the cache, and flushed.
    Flushed,
    /// Those that go past it.
    Streamed,
}

/// On this CPU, as far as it is known: on one of AMD a flush takes longer (measured on Zen 5), on one of Intel it does not.
pub(super) fn sooner() -> Sooner {
    let vendor = cpuid(0);
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    if name.as_flattened() == AMD {
        Sooner::Streamed
    } else {
        Sooner::Flushed
    }
}

/// For platforms that save the caches.
pub(super) fn unflushed() -> Records {
    Records {
        name: "no flush",
        store: store_unflushed,
        size_bytes_max: UNFLUSHED_LINES_MAX * LINE,
    }
}

/// What the CPU says of its flushes.
fn features() -> u32 {
    if cpuid(0).eax < FEATURE_LEAF {
        return 0;
    }
    cpuid(FEATURE_LEAF).ebx
}

/// All zero of a leaf that this CPU does not have, or what another leaf says.
#[allow(unused_unsafe, reason = "it is unsafe in older versions of Rust")]
fn cpuid(leaf: u32) -> CpuidResult {
    // SAFETY: every x86-64 has CPUID.
    unsafe { __cpuid_count(leaf, 0) }
}

/// A store of at least one line, with `$flush` behind each.
macro_rules! store {
    ($name:ident, $flush:literal) => {
        /// # Safety
        /// As [`super::Kernel::store`], and `len_bytes` is not 0; and the CPU has the instruction.
        unsafe fn $name(dst: *mut u8, src: *const u8, len_bytes: usize) {
            // SAFETY: line by line, what the contract allows; the stores are aligned to their sizes. Registers and
            // flags that change are named.
            unsafe {
                asm!(
                    "2:",
                    "movdqu {a}, xmmword ptr [{src}]",
                    "movdqu {b}, xmmword ptr [{src} + 16]",
                    "movdqu {c}, xmmword ptr [{src} + 32]",
                    "movdqu {d}, xmmword ptr [{src} + 48]",
                    "movdqa xmmword ptr [{dst}], {a}",
                    "movdqa xmmword ptr [{dst} + 16], {b}",
                    "movdqa xmmword ptr [{dst} + 32], {c}",
                    "movdqa xmmword ptr [{dst} + 48], {d}",
                    $flush,
                    "add {src}, 64",
                    "add {dst}, 64",
                    "sub {len}, 64",
                    "jnz 2b",
                    "3:",
                    guard!("1"),
                    src = inout(reg) src => _, dst = inout(reg) dst => _,
                    len = inout(reg) len_bytes => _,
                    a = out(xmm_reg) _, b = out(xmm_reg) _, c = out(xmm_reg) _, d = out(xmm_reg) _,
                    options(nostack),
                );
            }
        }
    };
}

store!(store_clwb, "clwb [{dst}]");
store!(store_clflushopt, "clflushopt [{dst}]");
store!(store_clflush, "clflush [{dst}]");
store!(store_unflushed, "");
