//! Copies from the mapping that end with an error where the memory cannot be read (see [`super::guard`]).
//!
//! `(dst, src, len_bytes)`: 0, or the first address that could not be read; what lies at `dst` is then
//! unspecified. Which one is used goes by what the CPU has, as for stores. A probe copies nothing.

/// One way to copy from the mapping.
///
/// # Safety
/// `dst` is valid for writes and `src` for reads of so many bytes, or lies in a guarded region; they do not overlap.
/// And the CPU has the instructions.
pub(super) type Load = unsafe fn(*mut u8, *const u8, usize) -> usize;

/// As [`Load`]. While it copies it asks for as many bytes at its last argument, of which nothing is required, line by line:
/// all at once they would have to wait for room in the CPU's queue of misses, and the copy behind them.
pub(super) type LoadAndAsk = unsafe fn(*mut u8, *const u8, usize, *const u8) -> usize;

#[cfg(target_arch = "x86_64")]
pub(super) mod arch {
    use super::super::guard::guard;
    use std::arch::asm;

    /// Eight registers in a turn of the loop, then one in a turn, then single bytes. `$ask`: what a turn of eight does
    /// besides.
    macro_rules! load {
        (
            $(#[$feature:meta])?
            $name:ident($($ahead:ident)?), $width:literal, $mov:literal, $reg:literal, $end:literal, [$($ask:literal),*]
        ) => {
            /// # Safety
            /// See [`super::Load`].
            $(#[$feature])?
            pub(in super::super) unsafe fn $name(
                dst: *mut u8,
                src: *const u8,
                len_bytes: usize
                $(, $ahead: *const u8)?
            ) -> usize {
                let fault;
                // SAFETY: copies what the contract allows, all of it or up to the first byte that cannot be
                // read. The handler changes `rax` alone.
                unsafe {
                    asm!(
                        "2:",
                        "sub rcx, 8 * {w}",
                        "jb 6f",
                        "5:",
                        concat!($mov, " ", $reg, "0, [rsi]"),
                        concat!($mov, " ", $reg, "1, [rsi + {w}]"),
                        concat!($mov, " ", $reg, "2, [rsi + 2 * {w}]"),
                        concat!($mov, " ", $reg, "3, [rsi + 3 * {w}]"),
                        concat!($mov, " ", $reg, "4, [rsi + 4 * {w}]"),
                        concat!($mov, " ", $reg, "5, [rsi + 5 * {w}]"),
                        concat!($mov, " ", $reg, "6, [rsi + 6 * {w}]"),
                        concat!($mov, " ", $reg, "7, [rsi + 7 * {w}]"),
                        $($ask,)*
                        concat!($mov, " [rdi], ", $reg, "0"),
                        concat!($mov, " [rdi + {w}], ", $reg, "1"),
                        concat!($mov, " [rdi + 2 * {w}], ", $reg, "2"),
                        concat!($mov, " [rdi + 3 * {w}], ", $reg, "3"),
                        concat!($mov, " [rdi + 4 * {w}], ", $reg, "4"),
                        concat!($mov, " [rdi + 5 * {w}], ", $reg, "5"),
                        concat!($mov, " [rdi + 6 * {w}], ", $reg, "6"),
                        concat!($mov, " [rdi + 7 * {w}], ", $reg, "7"),
                        "add rsi, 8 * {w}",
                        "add rdi, 8 * {w}",
                        "sub rcx, 8 * {w}",
                        "jae 5b",
                        "6:",
                        "add rcx, 8 * {w}",
                        "sub rcx, {w}",
                        "jb 8f",
                        "7:",
                        concat!($mov, " ", $reg, "0, [rsi]"),
                        concat!($mov, " [rdi], ", $reg, "0"),
                        "add rsi, {w}",
                        "add rdi, {w}",
                        "sub rcx, {w}",
                        "jae 7b",
                        "8:",
                        "add rcx, {w}",
                        "jz 3f",
                        "rep movsb",
                        "3:",
                        $end,
                        guard!("0"),
                        w = const $width,
                        inout("rdi") dst => _, inout("rsi") src => _, inout("rcx") len_bytes => _,
                        inout("rax") 0usize => fault,
                        $(inout("rdx") $ahead => _,)?
                        clobber_abi("sysv64"),
                        options(nostack),
                    );
                }
                fault
            }
        };
    }

    /// Reads a byte. Unlike a copy of one, it is not waited for: what is behind it goes on until the CPU has no room for
    /// more, so that several in a row overlap.
    ///
    /// # Safety
    /// `src` is valid for reads, or lies in a guarded region.
    #[inline]
    pub(in super::super) unsafe fn probe(src: *const u8) -> usize {
        let fault;
        // SAFETY: reads what the contract allows. The handler changes `rax` alone.
        unsafe {
            asm!(
                "2:",
                "movzx {byte:e}, byte ptr [{src}]",
                "3:",
                guard!("0"),
                src = in(reg) src,
                byte = out(reg) _,
                inout("rax") 0usize => fault,
                options(nostack, preserves_flags),
            );
        }
        fault
    }

    load!(load_sse2(), 16, "movdqu", "xmm", "", []);
    load!(
        load_sse2_and_ask(ahead),
        16,
        "movdqu",
        "xmm",
        "",
        [
            "prefetcht0 [rdx]",
            "prefetcht0 [rdx + 64]",
            "add rdx, 8 * {w}"
        ]
    );
    load!(
        #[target_feature(enable = "avx2")]
        load_avx2(),
        32,
        "vmovdqu",
        "ymm",
        "vzeroupper",
        []
    );
    load!(
        #[target_feature(enable = "avx2")]
        load_avx2_and_ask(ahead),
        32,
        "vmovdqu",
        "ymm",
        "vzeroupper",
        [
            "prefetcht0 [rdx]",
            "prefetcht0 [rdx + 64]",
            "prefetcht0 [rdx + 128]",
            "prefetcht0 [rdx + 192]",
            "add rdx, 8 * {w}"
        ]
    );
    load!(
        #[target_feature(enable = "avx512f")]
        load_avx512(),
        64,
        "vmovdqu64",
        "zmm",
        "vzeroupper",
        []
    );
    load!(
        #[target_feature(enable = "avx512f")]
        load_avx512_and_ask(ahead),
        64,
        "vmovdqu64",
        "zmm",
        "vzeroupper",
        [
            "prefetcht0 [rdx]",
            "prefetcht0 [rdx + 64]",
            "prefetcht0 [rdx + 128]",
            "prefetcht0 [rdx + 192]",
            "prefetcht0 [rdx + 256]",
            "prefetcht0 [rdx + 320]",
            "prefetcht0 [rdx + 384]",
            "prefetcht0 [rdx + 448]",
            "add rdx, 8 * {w}"
        ]
    );
}

#[cfg(target_arch = "aarch64")]
pub(super) mod arch {
    use super::super::guard::guard;
    use std::arch::asm;

    /// # Safety
    /// See [`super::Load`].
    pub(in super::super) unsafe fn load(dst: *mut u8, src: *const u8, len_bytes: usize) -> usize {
        // SAFETY: by the contract; to ask for what is copied is no harm.
        unsafe { load_and_ask(dst, src, len_bytes, src) }
    }

    /// # Safety
    /// See [`super::Load`].
    pub(in super::super) unsafe fn load_and_ask(
        dst: *mut u8,
        src: *const u8,
        len_bytes: usize,
        ahead: *const u8,
    ) -> usize {
        let fault;
        // SAFETY: copies what the contract allows, all of it or up to the first byte that cannot be read. The
        // handler changes `x0` alone.
        unsafe {
            asm!(
                "2:",
                "subs x3, x3, #64",
                "b.lo 6f",
                "5:",
                "prfm pldl1keep, [x5]",
                "add x5, x5, #64",
                "ldp q0, q1, [x2], #32",
                "ldp q2, q3, [x2], #32",
                "stp q0, q1, [x1], #32",
                "stp q2, q3, [x1], #32",
                "subs x3, x3, #64",
                "b.hs 5b",
                "6:",
                "adds x3, x3, #64",
                "b.eq 3f",
                "7:",
                "ldrb w4, [x2], #1",
                "strb w4, [x1], #1",
                "subs x3, x3, #1",
                "b.ne 7b",
                "3:",
                guard!("0"),
                inout("x0") 0usize => fault,
                inout("x1") dst => _, inout("x2") src => _, inout("x3") len_bytes => _, out("x4") _,
                inout("x5") ahead => _,
                clobber_abi("C"),
                options(nostack),
            );
        }
        fault
    }

    /// Reads a byte. See that of x86-64.
    ///
    /// # Safety
    /// `src` is valid for reads, or lies in a guarded region.
    #[inline]
    pub(in super::super) unsafe fn probe(src: *const u8) -> usize {
        let fault;
        // SAFETY: reads what the contract allows. The handler changes `x0` alone.
        unsafe {
            asm!(
                "2:",
                "ldrb {byte:w}, [{src}]",
                "3:",
                guard!("0"),
                src = in(reg) src,
                byte = out(reg) _,
                inout("x0") 0usize => fault,
                options(nostack, preserves_flags),
            );
        }
        fault
    }
}
