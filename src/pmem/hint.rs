//! Hints to the processor and to the kernel.

/// As [`prefetch_line`], for a line that is going to be changed: no other core has it then, until that one asks for it. A CPU
/// that cannot do that does nothing.
#[inline]
pub(crate) fn prefetch_line_to_write<T>(target: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHW is a hint that cannot fault; where it is unknown its code does nothing (AMD APM, volume 3; Intel SDM,
    // volume 2: NOP).
    unsafe {
        core::arch::asm!("prefetchw [{0}]", in(reg) std::ptr::from_ref(target),
            options(nostack, readonly, preserves_flags));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: PRFM is a hint that cannot fault.
    unsafe {
        core::arch::asm!("prfm pstl1keep, [{0}]", in(reg) std::ptr::from_ref(target),
            options(nostack, readonly, preserves_flags));
    }
}

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

/// Size and alignment of the kernel's smallest pages.
const PAGE_SIZE_BYTES: usize = 4096;

/// Asks for huge pages under memory that was not touched yet and is going to be, all of it. Where there are none, nothing
/// changes.
pub(crate) fn advise_huge_pages<T>(memory: &[T]) {
    let range = memory.as_ptr_range();
    let start = range.start.addr().next_multiple_of(PAGE_SIZE_BYTES);
    let end = range.end.addr() / PAGE_SIZE_BYTES * PAGE_SIZE_BYTES;
    if start < end {
        let at = range.start.with_addr(start).cast_mut();
        // SAFETY: whole pages that lie inside of `memory`; the advice changes no content.
        unsafe { libc::madvise(at.cast(), end - start, libc::MADV_HUGEPAGE) };
    }
}
