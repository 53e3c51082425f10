//! A SIGBUS of the mapping becomes an error of whoever copies.
//!
//! The kernel answers an access to poisoned memory, or to a file that was truncated behind our back, with
//! SIGBUS. All copies from and to the mapping are stretches of assembly that leave their place in a table of the
//! executable (section `pcache_guards`, put together by the linker). The handler finds the instruction that
//! has failed in that table, tells the stretch or the region what has happened, and lets the thread go on behind
//! the stretch. So no frame is left, no destructor skipped, and a copy that does not fail pays nothing.
//!
//! Everything else is not ours: a signal for other memory goes to whoever handled it before (SPDK does, for the
//! registers of devices that were pulled out).

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// The entry of the table for the assembly between the labels `2:` and `3:` of the same `asm!`, which goes on at
/// `3:` after a fault. With `"0"`, a load, the register `rax` (`x0`) then holds the address that failed, so
/// `asm!` has it as `inout` and 0 before; with `"1"`, a store, the region of the target notes it
/// ([`Region::lost_at`]).
macro_rules! guard {
    ($kind:literal) => {
        concat!(
            // Kept by the linker though nobody names it.
            ".pushsection pcache_guards, \"aR\", @progbits\n",
            ".balign 4\n",
            ".long 2b - .\n",
            ".long 3b - .\n",
            ".long ",
            $kind,
            "\n.popsection"
        )
    };
}
pub(super) use guard;

const KIND_LOAD: u32 = 0;

/// As [`guard`] writes it: distances from the fields themselves.
#[repr(C)]
struct Entry {
    start: i32,
    end: i32,
    kind: u32,
}

impl Entry {
    fn start(&self) -> usize {
        (&raw const self.start)
            .addr()
            .wrapping_add_signed(self.start as isize)
    }

    /// Behind the last guarded instruction, and where to go on.
    fn end(&self) -> usize {
        (&raw const self.end)
            .addr()
            .wrapping_add_signed(self.end as isize)
    }
}

unsafe extern "C" {
    #[link_name = "__start_pcache_guards"]
    static TABLE_START: [Entry; 0];
    #[link_name = "__stop_pcache_guards"]
    static TABLE_END: [Entry; 0];
}

/// All entries. Many, but looked at after a fault only.
fn table() -> &'static [Entry] {
    let (start, end) = (
        (&raw const TABLE_START).cast::<Entry>(),
        (&raw const TABLE_END).addr(),
    );
    let count = (end - start.addr()) / size_of::<Entry>();
    // SAFETY: the linker puts both symbols around the section, which consists of entries as `guard` writes
    // them, aligned to 4 bytes, in memory that nobody changes; each was given for a real stretch of assembly.
    unsafe { std::slice::from_raw_parts(start, count) }
}

/// A mapped region of which faults are ours. Never freed, as the handler may look at it at any time: some 40
/// bytes for each device that is opened.
#[derive(Debug)]
pub(super) struct Region {
    base: usize,
    len_bytes: usize,
    is_mapped: AtomicBool,
    /// The first address that could not be stored to; 0: none.
    lost_at: AtomicUsize,
    next: *const Region,
}

// SAFETY: `next` is set before the region is shared, and names another one that is never freed.
unsafe impl Sync for Region {}
// SAFETY: as above.
unsafe impl Send for Region {}

static REGIONS: AtomicPtr<Region> = AtomicPtr::new(ptr::null_mut());
/// Held while the list grows, or the handler is changed.
static CHANGE: Mutex<()> = Mutex::new(());

impl Region {
    /// Guards the `len_bytes` bytes at `base`, until [`Region::unmap`].
    pub(super) fn enter(base: *const u8, len_bytes: usize) -> &'static Self {
        let _change = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
        install();
        let region = Box::leak(Box::new(Self {
            base: base.addr(),
            len_bytes,
            is_mapped: AtomicBool::new(true),
            lost_at: AtomicUsize::new(0),
            next: REGIONS.load(Ordering::Relaxed),
        }));
        REGIONS.store(region, Ordering::Release);
        region
    }

    /// The addresses may belong to somebody else from now on.
    pub(super) fn unmap(&self) {
        self.is_mapped.store(false, Ordering::Release);
    }

    /// The first address that a store has failed at: what was stored there, and around it, is lost.
    pub(super) fn lost_at(&self) -> Option<usize> {
        // Relaxed: the handler ran on the thread that stored, and that is the one that asks.
        Some(self.lost_at.load(Ordering::Relaxed)).filter(|at| *at != 0)
    }

    fn of(addr: usize) -> Option<&'static Self> {
        let mut at = REGIONS.load(Ordering::Acquire).cast_const();
        // SAFETY: regions are never freed, and complete before they are in the list.
        while let Some(region) = unsafe { at.as_ref() } {
            let is_inside = addr.wrapping_sub(region.base) < region.len_bytes;
            if is_inside && region.is_mapped.load(Ordering::Acquire) {
                return Some(region);
            }
            at = region.next;
        }
        None
    }
}

/// Who handled SIGBUS before; null: nobody. Never freed, like the regions.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

/// Makes ours the handler, if somebody has taken that over since. [`CHANGE`] is held.
fn install() {
    let mut current = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: only asks; `current` has room for the answer.
    let failed = unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), current.as_mut_ptr()) };
    // SAFETY: all bytes zero are a valid `sigaction`.
    let mut ours: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    ours.sa_sigaction = on_sigbus as *const () as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    if failed != 0 {
        return;
    }
    // SAFETY: the call above has filled it in.
    let current = unsafe { current.assume_init() };
    if current.sa_sigaction == ours.sa_sigaction {
        return;
    }
    BEFORE.store(Box::into_raw(Box::new(current)), Ordering::Release);
    // SAFETY: `on_sigbus` does nothing but what a handler may: it reads memory that is never freed, stores to
    // atomics, and calls `sigaction`.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, ptr::null_mut()) };
}

extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a handler that was installed with SA_SIGINFO both.
    let (addr, code) = unsafe { ((*info).si_addr().addr(), (*info).si_code) };
    let Some(region) = Region::of(addr) else {
        return forward(signal, info, context);
    };
    if code == libc::BUS_MCEERR_AO {
        // A warning: the kernel has taken a page away that nobody is looking at now.
        return;
    }
    // SAFETY: the third argument is the state of the thread, which nobody else touches meanwhile.
    let thread = Thread(unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext });
    let pc = thread.pc();
    let entry = table()
        .iter()
        .find(|entry| (entry.start()..entry.end()).contains(&pc));
    match entry {
        Some(entry) if entry.kind == KIND_LOAD => thread.go_on(entry.end(), Some(addr)),
        Some(entry) => {
            // Failing, an earlier one stays.
            let _ = region
                .lost_at
                .compare_exchange(0, addr, Ordering::Relaxed, Ordering::Relaxed);
            thread.go_on(entry.end(), None);
        }
        // Somebody else's instruction looks at our memory: a lent place, or a base that copies with the CPU.
        // Nobody can give it what is lost; a handler that returned would have it try for ever.
        None => end_process(signal),
    }
}

/// To whoever was there before.
fn forward(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: null, or what `install` has put there, which is never freed.
    let Some(before) = (unsafe { BEFORE.load(Ordering::Acquire).as_ref() }) else {
        return end_process(signal);
    };
    match before.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => end_process(signal),
        handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: whoever installed it with this flag gave a function of this type.
            let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: as above, without the flag.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}

/// The access is repeated when the handler returns, and the kernel does what it does without one.
fn end_process(signal: c_int) {
    // SAFETY: allowed in a handler, and changes only what becomes of the signal.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// The thread that was interrupted.
struct Thread<'a>(&'a mut libc::mcontext_t);

#[cfg(target_arch = "x86_64")]
impl Thread<'_> {
    fn pc(&self) -> usize {
        self.0.gregs[libc::REG_RIP as usize] as usize
    }

    fn go_on(self, pc: usize, fault_addr: Option<usize>) {
        if let Some(addr) = fault_addr {
            self.0.gregs[libc::REG_RAX as usize] = addr as i64;
        }
        self.0.gregs[libc::REG_RIP as usize] = pc as i64;
    }
}

#[cfg(target_arch = "aarch64")]
impl Thread<'_> {
    fn pc(&self) -> usize {
        self.0.pc as usize
    }

    fn go_on(self, pc: usize, fault_addr: Option<usize>) {
        if let Some(addr) = fault_addr {
            self.0.regs[0] = addr as u64;
        }
        self.0.pc = pc as u64;
    }
}
