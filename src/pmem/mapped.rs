//! The real mapping.
//!
//! What an agent stores it must fence on the same CPU: `sfence` waits for the stores of its own CPU only.
//! Store and fence within one poller call, and it holds: a migration of the thread by the kernel in between
//! does no harm, since a context switch drains the store buffers too.
//!
//! A poisoned line, or a file that somebody truncates, ends in a SIGBUS. A read then returns an error. A store has
//! nothing to return, and comes after the point where a request could still fail; so the fence behind it panics, and
//! the cache fails before anything of it is acknowledged (INV-PMEM-4).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

use super::backing::{self, Opened};
use super::copy::{self, Asked, Kernel, Unreadable};
use super::dax::{Backing, Durability, PersistenceDomain};
use super::load;
use super::regions::LiveRegion;
use super::{
    Coming, Durable, IovCursor, LINE_SIZE_BYTES, MapError, MapRequest, MemSlice, Pmem, PmemRead,
    Poisoned, bounds, guard,
};
use crate::units::{Agent, PmemOff};

/// Alignment of the mapping's address: a huge page, without which neither the page tables nor the DMA
/// translation can use huge pages.
const MAP_ALIGN_BYTES: usize = 2 << 20;

/// How much [`MappedPmem::populate_next`] does at once: some 20 ms of page faults.
const POPULATE_STEP_BYTES: usize = 64 << 20;

/// How far the population of the mapping has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PopulateProgress {
    /// Bytes whose pages are there.
    pub done_bytes: u64,
    /// Size of the mapping.
    pub total_bytes: u64,
}

/// A cache device, mapped and locked. Unmapped and unlocked when dropped.
#[derive(Debug)]
pub struct MappedPmem {
    /// Before `_file`: unmapped first, then unlocked.
    map: Mapping,
    kernel: Kernel,
    backing: Backing,
    durability: Durability,
    reason: &'static str,
    populated_bytes: usize,
    is_new: bool,
    _file: File,
}

impl MappedPmem {
    /// Opens or creates a cache device, locks it against every other opener, and maps it. Blocks for as long
    /// as the file system takes to allocate the space.
    ///
    /// # Errors
    /// See [`MapError`]. A file that was created is removed again.
    pub fn open(request: &MapRequest) -> Result<Self, MapError> {
        let mut opened = backing::open(request)?;
        let map_sync = MapSync::probe(&opened);
        let map = Mapping::new(&opened, PROT, map_sync.flags())
            .map_err(backing::io_error(&request.path, "map"))?;
        map.advise(opened.backing);
        let created = opened.created.take();
        let is_new = created.map(backing::Created::keep).is_some();
        let (durability, reason) = durability_of(&opened, map_sync);
        Ok(Self {
            map,
            kernel: kernel_for(durability, opened.domain),
            backing: opened.backing,
            durability,
            reason,
            populated_bytes: 0,
            is_new,
            _file: opened.file,
        })
    }

    /// Whether the file was created for this.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// What a completed write survives.
    #[must_use]
    pub fn durability(&self) -> Durability {
        self.durability
    }

    /// Why, as a clause for the log.
    #[must_use]
    pub fn durability_reason(&self) -> &'static str {
        self.reason
    }

    /// What is mapped. Decides whether it may be given to devices for DMA.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The instructions that store, for the log.
    #[must_use]
    pub fn store_kernel_name(&self) -> String {
        self.kernel.name()
    }

    /// The instructions that this CPU can store lines with, the best first.
    #[cfg(any(test, feature = "sim"))]
    #[doc(hidden)]
    #[must_use]
    pub fn store_kernel_names() -> Vec<String> {
        let kernels = Kernel::available();
        kernels.iter().map(Kernel::name).collect()
    }

    /// Stores lines with another instruction than the best.
    ///
    /// # Panics
    /// This CPU does not have it.
    #[cfg(any(test, feature = "sim"))]
    #[doc(hidden)]
    #[must_use]
    pub fn with_store_kernel(mut self, name: &str) -> Self {
        let mut kernels = Kernel::available().into_iter();
        let kernel = kernels.find(|kernel| kernel.name() == name);
        self.kernel = kernel.expect("a kernel that this CPU has");
        self
    }

    /// Makes the page tables (and, on a file system, the pages) of the next 64 MiB, so that I/O does not
    /// have to. Returns `None` when there is nothing left to do. Optional, and of no effect on kernels
    /// before 5.14. Blocks for some tens of milliseconds, so it belongs before the start of I/O.
    pub fn populate_next(&mut self) -> Option<PopulateProgress> {
        let left = self.map.len_bytes - self.populated_bytes;
        if left == 0 {
            return None;
        }
        let step = left.min(POPULATE_STEP_BYTES);
        // Populating for writes would make all pages of an ordinary file dirty, and the kernel write them.
        let advice = match (self.backing, self.durability) {
            (Backing::File, Durability::Process) => libc::MADV_POPULATE_READ,
            _ => libc::MADV_POPULATE_WRITE,
        };
        let from = self.map.base().wrapping_add(self.populated_bytes);
        // SAFETY: `step` bytes from there on lie inside the mapping. Populating changes no content, and does
        // not fault on a page that cannot be had: it fails.
        let failed = unsafe { libc::madvise(from.cast(), step, advice) } != 0;
        // Any failure but a poisoned page would be met by the next slice again, and the first touch of a
        // page makes it all the same: give up.
        self.populated_bytes = if failed {
            self.map.len_bytes
        } else {
            self.populated_bytes + step
        };
        Some(PopulateProgress {
            done_bytes: self.populated_bytes as u64,
            total_bytes: self.len_bytes(),
        })
    }

    fn lines_at(&self, off: PmemOff, len_bytes: u64) -> *mut u8 {
        self.map
            .base()
            .wrapping_add(bounds::lines_at(off, len_bytes, self.len_bytes()))
    }
}

impl PmemRead for MappedPmem {
    fn len_bytes(&self) -> u64 {
        self.map.len_bytes as u64
    }

    fn read(&self, off: PmemOff, buf: &mut [u8]) -> Result<(), Poisoned> {
        self.map.copy_to(off, buf)
    }

    #[inline]
    fn look_at(&self, off: PmemOff) -> Result<(), Poisoned> {
        self.map.look_at(off)
    }
}

impl Pmem for MappedPmem {
    fn read_to(&self, off: PmemOff, dst: &mut IovCursor, len_bytes: u64) -> Result<(), Poisoned> {
        self.read_to_and_ask(off, dst, len_bytes, Coming::NOTHING)
    }

    fn read_to_and_ask(
        &self,
        off: PmemOff,
        dst: &mut IovCursor,
        len_bytes: u64,
        coming: Coming,
    ) -> Result<(), Poisoned> {
        let src = self.map.at(off, len_bytes);
        let asked = Asked::new(
            self.map.at(coming.off, coming.len_bytes),
            coming.len_bytes as usize,
        );
        // SAFETY: as in `Mapping::copy_to`; that the caller's memory does not overlap is the contract of
        // `IovCursor::new`.
        let loaded = unsafe { self.kernel.load_to(dst, src, len_bytes as usize, asked) };
        loaded.map_err(|at| self.map.poisoned(at))
    }

    fn store(&self, _agent: Agent, off: PmemOff, bytes: &[u8]) {
        let dst = self.lines_at(off, bytes.len() as u64);
        // SAFETY: `lines_at` has checked that the target lies inside the mapping, which lives as long as
        // `self`, and that both of its ends are multiples of a line; the mapping starts on a page. `bytes`
        // is a reference, of which none reaches into the mapping.
        unsafe { self.kernel.store_record(dst, bytes.as_ptr(), bytes.len()) }
    }

    fn store_from(&self, _agent: Agent, off: PmemOff, src: &mut IovCursor, len_bytes: u64) {
        let dst = self.lines_at(off, len_bytes);
        // SAFETY: as in `store`.
        unsafe { self.kernel.store_from(dst, src, len_bytes as usize) }
    }

    fn store_from_crc(
        &self,
        _agent: Agent,
        off: PmemOff,
        src: &mut IovCursor,
        len_bytes: u64,
        seed: u32,
    ) -> u32 {
        let dst = self.lines_at(off, len_bytes);
        // SAFETY: as in `store`.
        unsafe {
            self.kernel
                .store_from_crc(dst, src, len_bytes as usize, seed)
        }
    }

    fn bytes_checksummed_per_fence(&self) -> u64 {
        self.kernel.bytes_checksummed_per_fence()
    }

    fn assert_stores_taken(&self) {
        if let Some(at) = self.map.guard.lost_at() {
            let at = self.map.off_of(at).0;
            panic!("INV-PMEM-4: the cache device has not taken a store at offset {at:#x}");
        }
    }

    fn fence(&self, _agent: Agent) -> Durable {
        copy::fence();
        self.assert_stores_taken();
        Durable { _only_by_fence: () }
    }

    fn slice(&self, off: PmemOff, len_bytes: u64) -> MemSlice {
        MemSlice::new(self.map.at(off, len_bytes), len_bytes as usize)
    }

    fn prefetch(&self, off: PmemOff, len_bytes: u64) {
        let start = self.map.at(off, len_bytes);
        for at in (0..len_bytes as usize).step_by(LINE_SIZE_BYTES as usize) {
            copy::prefetch(start.wrapping_add(at));
        }
    }
}

/// Whether stores reach the medium without a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MapSync {
    /// The mapping is made with MAP_SYNC: the file system has nothing left to persist for a page once it can
    /// be stored to.
    Yes,
    /// An ordinary shared mapping.
    No,
}

impl MapSync {
    /// Tries a small mapping, since a failed one at a fixed address could leave a hole behind.
    fn probe(opened: &Opened) -> Self {
        let fd = opened.file.as_raw_fd();
        let len = opened.align_bytes as usize;
        let flags = libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC;
        // SAFETY: a new mapping, wherever the kernel finds room, touches no memory in use.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, PROT, flags, fd, opened.file_offset()) };
        if at == libc::MAP_FAILED {
            return Self::No;
        }
        // SAFETY: the mapping was made just above with this length, and nobody has its address.
        unsafe { libc::munmap(at, len) };
        Self::Yes
    }

    fn flags(self) -> i32 {
        match self {
            Self::Yes => libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC,
            Self::No => libc::MAP_SHARED,
        }
    }
}

const PROT: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn durability_of(opened: &Opened, map_sync: MapSync) -> (Durability, &'static str) {
    match (opened.backing, map_sync) {
        (Backing::Tmpfs | Backing::Hugetlbfs, _) => (Durability::Process, "it is ordinary memory"),
        (Backing::File, MapSync::No) => (
            Durability::Process,
            "the file cannot be mapped with MAP_SYNC: it is not on DAX",
        ),
        (Backing::DevDax, _) | (Backing::File, MapSync::Yes) => {
            if opened.domain.covers_write_queue() {
                (
                    Durability::Power,
                    "it is persistent memory and the platform declares its domain",
                )
            } else {
                let reason = "the platform does not declare a persistence domain for this memory";
                (Durability::Process, reason)
            }
        }
    }
}

/// Flushes are left out only where nobody may miss them: not where a platform that saves its caches has the memory of
/// somebody else mapped.
fn kernel_for(durability: Durability, domain: PersistenceDomain) -> Kernel {
    match (durability, domain) {
        (Durability::Power, PersistenceDomain::CpuCache) => Kernel::best_with_saved_caches(),
        _ => Kernel::best(),
    }
}

/// The address range.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len_bytes: usize,
    /// `None` only inside of `drop`.
    live: Option<LiveRegion>,
    guard: &'static guard::Region,
}

// SAFETY: a mapping is memory shared by all threads. Nothing refers to it: it is only copied from and to.
// Which lines are stored and read at the same time, and by whom, is the engine's affair; the worst that can
// come of it is a mixture of old and new bytes.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the device, or the part of it, at an address that allows huge pages.
    pub(super) fn new(opened: &Opened, prot: i32, map_flags: i32) -> io::Result<Self> {
        let too_large = || io::Error::from_raw_os_error(libc::ENOMEM);
        let len_bytes = usize::try_from(opened.size_bytes).map_err(|_| too_large())?;
        let align = MAP_ALIGN_BYTES.max(opened.align_bytes as usize);
        let reserved_bytes = len_bytes.checked_add(align).ok_or_else(too_large)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, wherever the kernel finds room, touches no memory in use.
        let reserved = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reserved_bytes,
                libc::PROT_NONE,
                flags,
                -1,
                0,
            )
        };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let head_bytes = reserved.addr().next_multiple_of(align) - reserved.addr();
        let start = reserved.wrapping_byte_add(head_bytes);
        let flags = map_flags | libc::MAP_FIXED;
        let (fd, offset) = (opened.file.as_raw_fd(), opened.file_offset());
        // SAFETY: replaces part of the reservation, which nobody else knows of: `head_bytes` is below
        // `align`, so `len_bytes` are left behind it.
        let mapped = unsafe { libc::mmap(start, len_bytes, prot, flags, fd, offset) };
        let error = io::Error::last_os_error();
        Self::unmap(reserved, head_bytes);
        Self::unmap(start.wrapping_byte_add(len_bytes), align - head_bytes);
        if mapped == libc::MAP_FAILED {
            // The middle stays reserved: the kernel may or may not have unmapped it, and if so, somebody
            // else may have it by now. It costs addresses only.
            return Err(error);
        }
        let base = NonNull::new(start.cast()).ok_or_else(too_large)?;
        let live = Some(LiveRegion::new(base.as_ptr(), len_bytes));
        Ok(Self {
            base,
            len_bytes,
            live,
            guard: guard::Region::enter(base.as_ptr(), len_bytes),
        })
    }

    /// Gives back a part of the reservation.
    fn unmap(start: *mut libc::c_void, len_bytes: usize) {
        if len_bytes > 0 {
            // SAFETY: called by `new` with the parts of its reservation before and behind the mapping.
            unsafe { libc::munmap(start, len_bytes) };
        }
    }

    /// Hints, all of which may fail.
    fn advise(&self, backing: Backing) {
        let advise = |advice| {
            // SAFETY: the range is this mapping; none of the advices below changes its content.
            unsafe { libc::madvise(self.base().cast(), self.len_bytes, advice) };
        };
        // A core file of a crashed target should not hold the whole cache.
        advise(libc::MADV_DONTDUMP);
        // A forked child is a second owner: it had better crash than store.
        advise(libc::MADV_DONTFORK);
        if backing == Backing::Tmpfs {
            advise(libc::MADV_HUGEPAGE);
        }
    }

    fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    fn at(&self, off: PmemOff, len_bytes: u64) -> *mut u8 {
        let at = bounds::range_at(off, len_bytes, self.len_bytes as u64);
        self.base().wrapping_add(at)
    }

    /// Copies `buf.len()` bytes at `off` into `buf`.
    pub(super) fn copy_to(&self, off: PmemOff, buf: &mut [u8]) -> Result<(), Poisoned> {
        let src = self.at(off, buf.len() as u64);
        // SAFETY: `at` has checked that the bytes at `src` lie inside the mapping, which lives as long as
        // `self` and is guarded; `buf` is a reference, of which none reaches into the mapping.
        let loaded = unsafe { Kernel::best().load(buf.as_mut_ptr(), src, buf.len()) };
        loaded.map_err(|at| self.poisoned(at))
    }

    /// Reads the byte at `off`; what it is does not count.
    #[inline]
    fn look_at(&self, off: PmemOff) -> Result<(), Poisoned> {
        // SAFETY: `at` checks that the byte lies inside the mapping, which lives as long as `self` and is guarded.
        match unsafe { load::arch::probe(self.at(off, 1)) } {
            0 => Ok(()),
            fault => Err(self.poisoned(Unreadable(fault))),
        }
    }

    fn poisoned(&self, Unreadable(addr): Unreadable) -> Poisoned {
        let at = self.off_of(addr).0;
        Poisoned {
            at: PmemOff(at - at % LINE_SIZE_BYTES),
        }
    }

    fn off_of(&self, addr: usize) -> PmemOff {
        PmemOff(addr.wrapping_sub(self.base().addr()) as u64)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Waits for readers of slices; later ones are refused.
        drop(self.live.take());
        self.guard.unmap();
        // SAFETY: the range was mapped by `new`, once, and `self` goes now; no references to it exist.
        unsafe { libc::munmap(self.base().cast(), self.len_bytes) };
    }
}

#[cfg(test)]
mod tests;
