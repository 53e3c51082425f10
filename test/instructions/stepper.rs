//! Follows parts of a child process instruction by instruction, and notes what they do to one mapped file: the
//! stores, the flushes, the fences, as the processor is about to execute them.
//!
//! A step takes some 20 microseconds on a virtual machine, so only what goes through [`watch`] is followed.
//! Not seen: what the kernel stores on behalf of a system call.

use iced_x86::{
    Decoder, DecoderOptions, InstructionInfoFactory, Mnemonic, OpAccess, Register, UsedMemory,
};
use libc::{c_int, c_long, pid_t, user_regs_struct};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// No instruction of x86 is longer than 15 bytes.
const INSTRUCTION_SIZE_BYTES_MAX: usize = 15;

/// Offsets are bytes from the start of the mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A non-temporal store into the mapping.
    Stream { off: u64, len_bytes: u64 },
    /// A non-temporal store to somewhere else.
    StreamElsewhere,
    /// A store of any other kind into the mapping.
    CachedStore { off: u64, len_bytes: u64 },
    /// A flush (`clwb`, `clflushopt`, `clflush`) of a line of the mapping.
    Flush { off: u64 },
    /// `sfence`.
    Fence,
}

/// What a child did, and how many instructions that took.
#[derive(Debug)]
pub(crate) struct Walk {
    pub(crate) events: Vec<Event>,
    pub(crate) steps: u64,
}

/// Calls `f`, and has the parent follow it. Only in a child of [`Alone::follow`].
pub(crate) fn watch<R>(f: impl FnOnce() -> R) -> R {
    mark();
    let result = f();
    mark();
    result
}

/// Stops, for the parent to begin or to end.
fn mark() {
    // SAFETY: the trap goes to the tracer; it changes nothing here. No load or store is moved across it.
    unsafe { std::arch::asm!("int3", options(nostack)) };
}

/// The right to fork: no other test of this process runs meanwhile, which might hold a lock that the child
/// would find locked for ever. A test gets it before anything else.
pub(crate) struct Alone {
    _guard: MutexGuard<'static, ()>,
}

impl Alone {
    /// Waits until the tests before have ended.
    pub(crate) fn wait() -> Self {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        Self { _guard }
    }

    /// Forks. The child calls `prepare`, which maps the file `device`, and then `run`; of that, what goes
    /// through [`watch`] is followed. Neither may start threads, and what `run` returns is not dropped.
    pub(crate) fn follow<T, R>(
        &self,
        device: &Path,
        prepare: impl FnOnce() -> T,
        run: impl FnOnce(T) -> R,
    ) -> Walk {
        let _pinned = Pinned::here();
        // SAFETY: the tests of other threads wait in `Alone::wait`, or have given back their right and only
        // end; the main thread waits for them. None holds a lock that the child needs, but for those of the
        // allocator, which fork takes care of. The child goes into `be_followed` and never returns.
        match unsafe { libc::fork() } {
            0 => be_followed(prepare, run),
            pid if pid > 0 => Tracee::new(pid).walk(device),
            _ => panic!("fork: {}", io::Error::last_os_error()),
        }
    }
}

/// Keeps this thread, and the children that it makes, on one processor: they take turns, and a wake-up of
/// another processor at every turn would take most of the time.
struct Pinned {
    before: libc::cpu_set_t,
}

impl Pinned {
    fn here() -> Self {
        // SAFETY: a set is an array of integers, for which zeroes are a value: the empty set.
        let (mut before, mut here): (libc::cpu_set_t, libc::cpu_set_t) =
            unsafe { std::mem::zeroed() };
        // SAFETY: `before` is a set of that size.
        let failed = unsafe { libc::sched_getaffinity(0, size_of_val(&before), &raw mut before) };
        assert_eq!(
            failed,
            0,
            "sched_getaffinity: {}",
            io::Error::last_os_error()
        );
        // SAFETY: takes no memory.
        let cpu = unsafe { libc::sched_getcpu() };
        // SAFETY: checks the number against the size of the set.
        unsafe { libc::CPU_SET(cpu as usize, &mut here) };
        set_affinity(&here);
        Self { before }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        set_affinity(&self.before);
    }
}

/// A failure costs time only.
fn set_affinity(set: &libc::cpu_set_t) {
    // SAFETY: `set` is a set of that size.
    unsafe { libc::sched_setaffinity(0, size_of_val(set), set) };
}

fn be_followed<T, R>(prepare: impl FnOnce() -> T, run: impl FnOnce(T) -> R) -> ! {
    let panic = catch_unwind(AssertUnwindSafe(|| {
        let prepared = prepare();
        // SAFETY: takes no memory; asks the parent to be the tracer.
        let refused = unsafe { libc::ptrace(libc::PTRACE_TRACEME) } != 0;
        assert!(!refused, "PTRACE_TRACEME: {}", io::Error::last_os_error());
        // SAFETY: takes no memory; the parent waits for this stop.
        unsafe { libc::raise(libc::SIGSTOP) };
        let _kept = run(prepared);
        // SAFETY: takes no memory; ends the process here, so that nothing is dropped.
        unsafe { libc::_exit(0) }
    }));
    let Err(panic) = panic;
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    // Not by a macro: the output of those is kept for the end of a test that this process never sees.
    let _ = writeln!(io::stderr(), "the child: {}", text.unwrap_or("a panic"));
    // SAFETY: takes no memory.
    unsafe { libc::_exit(101) }
}

/// What matters of an instruction. Decoded once per address.
struct Decoded {
    mnemonic: Mnemonic,
    /// Only those that are stored to or flushed.
    memory: Vec<UsedMemory>,
}

/// A child that is killed and reaped when this is dropped.
struct Tracee {
    pid: pid_t,
    /// It was waited for: the number may be somebody else's by now.
    reaped: Cell<bool>,
}

impl Drop for Tracee {
    fn drop(&mut self) {
        if self.reaped.get() {
            return;
        }
        // SAFETY: takes no memory; the child was not waited for, so the number is still its own.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        // SAFETY: no status is asked for.
        unsafe { libc::waitpid(self.pid, ptr::null_mut(), 0) };
    }
}

impl Tracee {
    fn new(pid: pid_t) -> Self {
        let reaped = Cell::new(false);
        Self { pid, reaped }
    }

    fn walk(self, device: &Path) -> Walk {
        let status = self.wait();
        assert!(
            libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGSTOP,
            "the child has ended before it began: status {status:#x}"
        );
        let mapping = self.mapping_of(device);
        let memory = File::open(format!("/proc/{}/mem", self.pid)).unwrap();
        let mut code = BTreeMap::new();
        let mut walk = Walk {
            events: Vec::new(),
            steps: 0,
        };
        while self.goes_on(libc::PTRACE_CONT) {
            loop {
                let regs = self.registers();
                let decode = || decode(&memory, regs.rip);
                let decoded = code.entry(regs.rip).or_insert_with(decode);
                note(decoded, &regs, &mapping, &mut walk.events);
                assert!(self.goes_on(libc::PTRACE_SINGLESTEP), "the mark is missing");
                if decoded.mnemonic == Mnemonic::Int3 {
                    break;
                }
                walk.steps += 1;
            }
        }
        walk
    }

    /// Lets the child go on to the next trap. `false`: it has ended, and well.
    fn goes_on(&self, request: libc::c_uint) -> bool {
        self.request(request);
        let status = self.wait();
        if libc::WIFEXITED(status) {
            assert_eq!(libc::WEXITSTATUS(status), 0, "the child has failed");
            return false;
        }
        assert!(
            libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGTRAP,
            "the child was stopped: status {status:#x}"
        );
        true
    }

    fn wait(&self) -> c_int {
        let mut status = 0;
        // SAFETY: `status` is a local that outlives the call.
        while unsafe { libc::waitpid(self.pid, &raw mut status, 0) } != self.pid {
            let error = io::Error::last_os_error();
            assert_eq!(error.kind(), io::ErrorKind::Interrupted, "waitpid: {error}");
        }
        self.reaped.set(!libc::WIFSTOPPED(status));
        status
    }

    fn request(&self, request: libc::c_uint) {
        let none = ptr::null_mut::<libc::c_void>();
        // SAFETY: the child is stopped, and this thread is its tracer; the request takes no memory.
        let result: c_long = unsafe { libc::ptrace(request, self.pid, none, none) };
        assert_eq!(result, 0, "ptrace: {}", io::Error::last_os_error());
    }

    fn registers(&self) -> user_regs_struct {
        let mut regs = std::mem::MaybeUninit::<user_regs_struct>::uninit();
        let none = ptr::null_mut::<libc::c_void>();
        // SAFETY: the child is stopped, and this thread is its tracer; `regs` is what the request fills.
        let result: c_long =
            unsafe { libc::ptrace(libc::PTRACE_GETREGS, self.pid, none, regs.as_mut_ptr()) };
        assert_eq!(result, 0, "ptrace: {}", io::Error::last_os_error());
        // SAFETY: the request has succeeded.
        unsafe { regs.assume_init() }
    }

    /// Where the child has mapped the file, as the kernel sees it.
    fn mapping_of(&self, device: &Path) -> Range<u64> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid)).unwrap();
        let device = device.to_str().unwrap();
        let ranges = maps
            .lines()
            .filter(|line| line.ends_with(device))
            .map(|line| {
                let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
                let hex = |text| u64::from_str_radix(text, 16).unwrap();
                hex(start)..hex(end)
            });
        let whole = ranges.reduce(|all, range| {
            assert_eq!(
                all.end, range.start,
                "the file is mapped once, in one piece"
            );
            all.start..range.end
        });
        whole.expect("`prepare` has mapped the file")
    }
}

fn decode(memory: &File, rip: u64) -> Decoded {
    let mut bytes = [0; INSTRUCTION_SIZE_BYTES_MAX];
    let len = memory.read_at(&mut bytes, rip).unwrap();
    let instruction = Decoder::with_ip(64, &bytes[..len], rip, DecoderOptions::NONE).decode();
    assert!(!instruction.is_invalid(), "no instruction at {rip:#x}");
    let mnemonic = instruction.mnemonic();
    let mut factory = InstructionInfoFactory::new();
    let used = factory.info(&instruction).used_memory();
    let matters = |used: &&UsedMemory| is_flush(mnemonic) || is_stored_to(used.access());
    Decoded {
        mnemonic,
        memory: used.iter().filter(matters).copied().collect(),
    }
}

fn is_flush(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Clwb | Mnemonic::Clflush | Mnemonic::Clflushopt
    )
}

fn is_stream(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Movntdq
            | Mnemonic::Vmovntdq
            | Mnemonic::Movnti
            | Mnemonic::Movntq
            | Mnemonic::Movntps
            | Mnemonic::Vmovntps
            | Mnemonic::Movntpd
            | Mnemonic::Vmovntpd
            | Mnemonic::Movdiri
            | Mnemonic::Movdir64b
    )
}

fn is_stored_to(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

/// Notes what the instruction is about to do.
fn note(decoded: &Decoded, regs: &user_regs_struct, mapping: &Range<u64>, events: &mut Vec<Event>) {
    if decoded.mnemonic == Mnemonic::Sfence {
        events.push(Event::Fence);
    }
    for used in &decoded.memory {
        let address = used
            .virtual_address(0, |register, _, _| value_of(register, regs))
            .unwrap_or_else(|| panic!("{:?} at {:#x}: where?", decoded.mnemonic, regs.rip));
        // Some have a size that depends on the processor: one byte shows that they are there.
        let len_bytes = (used.memory_size().size() as u64).max(1);
        let inside = address < mapping.end && address.saturating_add(len_bytes) > mapping.start;
        let off = address.wrapping_sub(mapping.start);
        if is_flush(decoded.mnemonic) {
            if inside {
                events.push(Event::Flush { off });
            }
        } else if is_stream(decoded.mnemonic) {
            events.push(if inside {
                Event::Stream { off, len_bytes }
            } else {
                Event::StreamElsewhere
            });
        } else if inside {
            events.push(Event::CachedStore { off, len_bytes });
        }
    }
}

/// Of a register that an address is made of.
fn value_of(register: Register, regs: &user_regs_struct) -> Option<u64> {
    Some(match register {
        Register::RAX => regs.rax,
        Register::RBX => regs.rbx,
        Register::RCX => regs.rcx,
        Register::RDX => regs.rdx,
        Register::RSI => regs.rsi,
        Register::RDI => regs.rdi,
        Register::RBP => regs.rbp,
        Register::RSP => regs.rsp,
        Register::R8 => regs.r8,
        Register::R9 => regs.r9,
        Register::R10 => regs.r10,
        Register::R11 => regs.r11,
        Register::R12 => regs.r12,
        Register::R13 => regs.r13,
        Register::R14 => regs.r14,
        Register::R15 => regs.r15,
        Register::FS => regs.fs_base,
        Register::GS => regs.gs_base,
        Register::CS | Register::DS | Register::ES | Register::SS => 0,
        _ => return None,
    })
}
