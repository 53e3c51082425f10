//! Loops over lines, one for each way to store them.

#![expect(unsafe_code, reason = "stores that the product does not make")]

use crate::random::Rng;
use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

const LINE: usize = 64;
const ROUNDS: usize = 9;
const SPAN: Duration = Duration::from_millis(40);
/// Sources that the CPU's caches hold.
const SOURCE_BYTES: usize = 1 << 20;

/// Destination, source, length.
type Store = unsafe fn(*mut u8, *const u8, usize);

/// One way to store lines.
struct Way {
    name: &'static str,
    store: Store,
}

/// A loop over lines around `$code`, in which `zmm0` is a line of the source, if `$load` loads it.
macro_rules! way {
    ($name:ident, $($code:literal),+) => {
        /// # Safety
        /// Both are valid for so many bytes, a multiple of a line; `dst` is aligned to one; the CPU has the instructions.
        unsafe fn $name(dst: *mut u8, src: *const u8, len_bytes: usize) {
            // SAFETY: by the contract.
            unsafe {
                asm!(
                    "2:",
                    $($code,)+
                    "add {src}, 64",
                    "add {dst}, 64",
                    "sub {len}, 64",
                    "jnz 2b",
                    src = inout(reg) src => _, dst = inout(reg) dst => _, len = inout(reg) len_bytes => _,
                    out("zmm0") _, options(nostack),
                );
            }
        }
    };
}
way!(
    stream_avx512,
    "vmovdqu64 zmm0, [{src}]",
    "vmovntdq [{dst}], zmm0"
);
way!(
    stream_avx2,
    "vmovdqu ymm0, [{src}]",
    "vmovntdq [{dst}], ymm0",
    "vmovdqu ymm0, [{src} + 32]",
    "vmovntdq [{dst} + 32], ymm0"
);
way!(direct, "movdir64b {dst}, [{src}]");
way!(cached, "vmovdqu64 zmm0, [{src}]", "vmovdqa64 [{dst}], zmm0");
way!(
    cached_clwb,
    "vmovdqu64 zmm0, [{src}]",
    "vmovdqa64 [{dst}], zmm0",
    "clwb [{dst}]"
);
way!(
    cached_clflushopt,
    "vmovdqu64 zmm0, [{src}]",
    "vmovdqa64 [{dst}], zmm0",
    "clflushopt [{dst}]"
);
way!(
    cached_clflush,
    "vmovdqu64 zmm0, [{src}]",
    "vmovdqa64 [{dst}], zmm0",
    "clflush [{dst}]"
);

/// Whether leaf 7 of CPUID has this bit: of `ebx`, or of `ecx` from 32 on.
fn has(bit: u32) -> bool {
    let leaf = __cpuid_count(7, 0);
    (u64::from(leaf.ebx) | u64::from(leaf.ecx) << 32) >> bit & 1 == 1
}

/// Those that this CPU has.
fn ways() -> Vec<Way> {
    assert!(
        is_x86_feature_detected!("avx512f"),
        "the loops need AVX-512"
    );
    let all: [(&str, bool, Store); 7] = [
        ("movnt, avx512", true, stream_avx512),
        ("movnt, avx2", true, stream_avx2),
        ("movdir64b", has(32 + 28), direct),
        ("mov, no flush", true, cached),
        ("mov, clwb", has(24), cached_clwb),
        ("mov, clflushopt", has(23), cached_clflushopt),
        ("mov, clflush", true, cached_clflush),
    ];
    all.into_iter()
        .filter(|(_, has, _)| *has)
        .map(|(name, _, store)| Way { name, store })
        .collect()
}

fn fence() {
    // SAFETY: a barrier.
    unsafe { asm!("sfence", options(nostack, preserves_flags)) };
}

#[expect(clippy::disallowed_methods, reason = "a bench measures time")]
fn now() -> Instant {
    Instant::now()
}

/// Nanoseconds for each turn of `turn`, which is given its number.
fn time(mut turn: impl FnMut(u64)) -> f64 {
    let (start, mut turns) = (now(), 0);
    while start.elapsed() < SPAN {
        for _ in 0..64 {
            turn(turns);
            turns += 1;
        }
    }
    start.elapsed().as_nanos() as f64 / turns as f64
}

struct Memory {
    dst: *mut u8,
    len_bytes: usize,
    source: Vec<u8>,
}

impl Memory {
    /// # Safety
    /// The CPU has the instructions of `way`.
    unsafe fn columns(&self, way: &Way, rng: &mut Rng) -> Vec<f64> {
        let put = |number: u64, len: usize, at: usize| {
            let from = number as usize * len % (SOURCE_BYTES - len + 1) / LINE * LINE;
            // SAFETY: both ranges lie inside, as `at` is below the last place of this length.
            unsafe { (way.store)(self.dst.add(at), self.source.as_ptr().add(from), len) };
        };
        let places = |len: usize| (self.len_bytes / len) as u64;
        let mut found = Vec::new();
        for (len, batch) in [
            (64, 1),
            (128, 1),
            (256, 1),
            (832, 1),
            (4096, 1),
            (4096, 32),
            (128 << 10, 1),
        ] {
            found.push(time(|turn| {
                put(turn, len, (turn % places(len)) as usize * len);
                if turn % batch == batch - 1 {
                    fence();
                }
            }));
        }
        found.push(time(|turn| {
            put(turn, 4096, (rng.next() % places(4096)) as usize * 4096);
            if turn % 32 == 31 {
                fence();
            }
        }));
        found
    }
}

/// Data by the first way and a record by the second, each with a fence.
///
/// # Safety
/// The CPU has the instructions of both.
unsafe fn depth_1(memory: &Memory, data: &Way, record: &Way) -> f64 {
    let half = memory.len_bytes / 2;
    time(|turn| {
        let from = (turn as usize * 4096) % SOURCE_BYTES;
        let (at, record_at) = (
            (turn as usize * 4096) % half,
            half + (turn as usize * 64) % half,
        );
        // SAFETY: both lie inside.
        unsafe {
            (data.store)(memory.dst.add(at), memory.source.as_ptr().add(from), 4096);
            fence();
            (record.store)(memory.dst.add(record_at), memory.source.as_ptr(), 64);
        }
        fence();
    })
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

fn map(path: &str, len_bytes: usize) -> *mut u8 {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .expect("the file opens");
    file.set_len(len_bytes as u64).expect("there is room");
    let flags = libc::MAP_SHARED;
    // SAFETY: a new mapping, wherever the kernel finds room.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len_bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            file.as_raw_fd(),
            0,
        )
    };
    assert!(at != libc::MAP_FAILED, "the file can be mapped");
    // SAFETY: the mapping just made; both change no content.
    unsafe {
        libc::madvise(at, len_bytes, libc::MADV_HUGEPAGE);
        libc::madvise(at, len_bytes, libc::MADV_POPULATE_WRITE);
    }
    at.cast()
}

pub(crate) fn compare() {
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| arg != "--bench")
        .collect();
    let path = args
        .first()
        .map_or("/dev/shm/pcache-stores", String::as_str);
    let len_bytes = args
        .get(1)
        .map_or(4096, |mib| mib.parse::<usize>().expect("a number"))
        << 20;
    let memory = Memory {
        dst: map(path, len_bytes),
        len_bytes,
        source: vec![7; SOURCE_BYTES + 4096],
    };
    let ways = ways();
    let mut rng = Rng::new(5);
    let mut samples = vec![vec![Vec::new(); 10]; ways.len()];
    for _ in 0..ROUNDS {
        for (way, samples) in ways.iter().zip(&mut samples) {
            // SAFETY: those that the CPU does not have are left out.
            let mut found = unsafe { memory.columns(way, &mut rng) };
            // SAFETY: as above.
            found.push(unsafe { depth_1(&memory, way, way) });
            // SAFETY: as above.
            found.push(unsafe { depth_1(&memory, &ways[0], way) });
            samples
                .iter_mut()
                .zip(found)
                .for_each(|(of, found)| of.push(found));
        }
    }
    println!(
        "| ns | 64 B | 128 B | 256 B | 832 B | 4 KiB | 4 KiB, 32 to a fence | 128 KiB | random 4 KiB, 32 | 4 KiB and 64 B | movnt 4 KiB and 64 B |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for (way, samples) in ways.iter().zip(samples) {
        let cells: Vec<String> = samples
            .into_iter()
            .map(|of| format!("{:.0}", median(of)))
            .collect();
        println!("| {} | {} |", way.name, cells.join(" | "));
    }
    let _ = std::fs::remove_file(path);
}
