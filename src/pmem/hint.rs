//! Hints to the processor.

/// Asks for the cache line at `target` to be brought near. Never faults, changes nothing.
#[inline]
pub(crate) fn prefetch_line<T>(target: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHT0 is a hint that cannot fault; SSE is part of every x86-64.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(target).cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: PRFM is a hint that cannot fault.
    unsafe {
        core::arch::asm!("prfm pldl1keep, [{0}]", in(reg) std::ptr::from_ref(target),
            options(nostack, readonly, preserves_flags));
    }
}
