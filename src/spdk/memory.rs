//! How the base device reaches the cache device's memory: directly, or through bounce buffers.
//!
//! A base bdev may hand the addresses it is given to a device. That works only for memory that SPDK can
//! translate for devices and that stays where it is: device-DAX and hugetlbfs mappings that were registered.
//! Bdevs that copy with the CPU or by system calls take any address. All others get their data from bounce
//! buffers.

use std::ffi::c_void;
use std::fmt;
use std::ptr::{self, NonNull};

use spdk_sys as sys;

use super::base::BaseFacts;
use crate::pmem::{Backing, MemSlice, PAD_PAGE_SIZE_BYTES, PadMemory};

/// Size of a bounce buffer, and so of the largest base write through one.
pub(super) const BOUNCE_SIZE_BYTES: usize = 1 << 20;
/// How many there are, if there is memory for them; 32 MiB keep any base device busy.
const BOUNCE_COUNT: usize = 32;
/// Alignment of DMA memory: a page, for devices that need it.
const DMA_ALIGN_BYTES: usize = 4096;
/// SPDK's translation for devices goes by pieces of this size.
const TRANSLATION_UNIT_BYTES: usize = 2 << 20;
/// What `spdk_vtophys` returns for an address that devices cannot reach (a macro that bindgen cannot read).
const VTOPHYS_ERROR: u64 = u64::MAX;

/// Bdev modules that move data with the CPU or by system calls, whatever the address.
const CPU_ONLY_MODULES: &[&str] = &["aio", NULL_MODULE, "uring"];
const NULL_MODULE: &str = "null";
/// Copies by the accel framework, which may use a device.
const ACCEL_MODULE: &str = "malloc";

/// How the data of base writes get from the mapping to the base device.
#[derive(Debug)]
pub(super) enum Access {
    /// The base device never sees the addresses: it copies with the CPU.
    Cpu,
    /// Devices can read the mapping; it stays registered for as long as this lives. To drop it blocks.
    Registered {
        /// Unregisters when dropped.
        _registration: Registration,
    },
    /// Through buffers that devices can read.
    Bounce(Vec<DmaBuf>),
}

/// Who moves the data of a base read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mover {
    /// The CPU, whatever the address.
    Cpu,
    /// A device, perhaps.
    Device,
}

impl Mover {
    /// Of this base. On the app thread.
    pub(super) fn of(base: &BaseFacts) -> Self {
        let module = base.module_name.as_str();
        // SAFETY: no arguments; the accel framework is up before any bdev module.
        let accel_is_cpu = || unsafe { sys::pcache_accel_copies_by_cpu() };
        if CPU_ONLY_MODULES.contains(&module) || (module == ACCEL_MODULE && accel_is_cpu()) {
            Self::Cpu
        } else {
            Self::Device
        }
    }
}

impl Access {
    /// Decides for a base, and what became of the mapping's registration. `None`: bounce buffers are needed, and there is
    /// no memory for them. The mapping outlives what is returned.
    pub(super) fn choose(mover: Mover, registration: Option<Registration>) -> Option<Self> {
        if mover == Mover::Cpu {
            return Some(Self::Cpu);
        }
        if let Some(registration) = registration {
            return Some(Self::Registered {
                _registration: registration,
            });
        }
        let buffers: Vec<_> = (0..BOUNCE_COUNT)
            .map_while(|_| DmaBuf::new(BOUNCE_SIZE_BYTES))
            .collect();
        (!buffers.is_empty()).then_some(Self::Bounce(buffers))
    }

    /// Whether starting a base write may move its data at once, on this core. The null bdev moves nothing.
    pub(super) fn copies_at_start(&self, base: &BaseFacts) -> bool {
        match self {
            Self::Cpu => base.module_name != NULL_MODULE,
            Self::Registered { .. } => false,
            Self::Bounce(_) => true,
        }
    }

    /// Whether whoever may get a place in the mapping can read there. Whether it has a device do so is not
    /// known, but in SPDK only the accel framework stands between a consumer of ZCOPY (the NVMe-oF/TCP
    /// target, bdevperf) and a device: checksums of the payload, for example. RDMA and vfio-user targets do
    /// not use ZCOPY.
    pub(super) fn suits_all_readers(&self) -> bool {
        // SAFETY: no arguments; the accel framework is up before any bdev module.
        matches!(self, Self::Registered { .. }) || unsafe { sys::pcache_accel_is_software() }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("written by the CPU, from the cache device"),
            Self::Registered { .. } => f.write_str("written by DMA, from the cache device"),
            Self::Bounce(buffers) => write!(f, "written through {} bounce buffers", buffers.len()),
        }
    }
}

/// The mapping, known to SPDK as memory for devices.
///
/// Both to make and to drop one blocks: the kernel pins each page for a device, which takes a second and more for some hundred
/// GiB. So both are for a thread of their own, which need not be one of SPDK's: what SPDK calls for it (the translation for
/// devices, VFIO, RDMA, CUDA) takes mutexes and asks for no SPDK thread, and its vhost target does the same on a thread of
/// DPDK's. Reactors translate addresses without a lock meanwhile; whoever registers other memory waits.
#[derive(Debug)]
pub(super) struct Registration {
    start: NonNull<c_void>,
    len_bytes: usize,
}

// SAFETY: it is a range of addresses of the process, and nothing is read or written through it; SPDK registers and unregisters
// memory on any thread (above).
unsafe impl Send for Registration {}

impl Registration {
    /// Registers a mapping, all of which is `mapping`, if whoever moves data to the base may need it. `None`: it does not, or
    /// devices cannot reach all of it. Blocks. The mapping outlives what is returned.
    pub(super) fn of(mover: Mover, mapping: MemSlice, backing: Backing) -> Option<Self> {
        // Pages of a file can be moved or taken away by its file system while a device still reads them,
        // even where a translation is offered for them.
        let stays = matches!(backing, Backing::DevDax | Backing::Hugetlbfs);
        if mover == Mover::Device && stays {
            Self::new(mapping)
        } else {
            None
        }
    }

    fn new(mapping: MemSlice) -> Option<Self> {
        // Whole units only: what is left over at the end would not be translated.
        let start = NonNull::new(mapping.as_ptr().cast::<c_void>())?;
        let len_bytes = mapping.len_bytes();
        if !len_bytes.is_multiple_of(TRANSLATION_UNIT_BYTES) {
            return None;
        }
        // SAFETY: the range is mapped, and stays so for longer than this registration: its owner drops it
        // before the cache.
        let rc = unsafe { sys::spdk_mem_register(start.as_ptr(), len_bytes) };
        if rc != 0 {
            return None;
        }
        // Success says nothing about the translation. Dropping `this` undoes the registration.
        let this = Self { start, len_bytes };
        let reachable = (0..len_bytes)
            .step_by(TRANSLATION_UNIT_BYTES)
            .all(|offset| {
                let at = this.start.as_ptr().cast::<u8>().wrapping_add(offset);
                // SAFETY: looks the address up in a table; nothing is read through it.
                unsafe { sys::spdk_vtophys(at.cast(), ptr::null_mut()) != VTOPHYS_ERROR }
            });
        reachable.then_some(this)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: registered in `new`, with this address and length, and not unregistered since.
        let rc = unsafe { sys::spdk_mem_unregister(self.start.as_ptr(), self.len_bytes) };
        if rc != 0 {
            log::warn!("the cache device's memory cannot be unregistered: error {rc}");
        }
    }
}

/// Memory that devices can reach.
#[derive(Debug)]
pub(super) struct DmaBuf {
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: the memory is the process's and not a thread's, and SPDK takes it back on any thread.
unsafe impl Send for DmaBuf {}

const _: () = assert!(DMA_ALIGN_BYTES.is_multiple_of(PAD_PAGE_SIZE_BYTES));

impl DmaBuf {
    /// `None`: there is not enough.
    pub(super) fn new(len_bytes: usize) -> Option<Self> {
        // SAFETY: no pointer but NULL is passed.
        let start = unsafe { sys::spdk_dma_malloc(len_bytes, DMA_ALIGN_BYTES, ptr::null_mut()) };
        NonNull::new(start.cast()).map(|start| Self { start, len_bytes })
    }

    /// As [`DmaBuf::new`], filled with zeroes.
    pub(super) fn zeroed(len_bytes: usize) -> Option<Self> {
        let buf = Self::new(len_bytes)?;
        // SAFETY: so many bytes were just allocated there, and nobody else has the address.
        unsafe { ptr::write_bytes(buf.as_ptr(), 0, len_bytes) };
        Some(buf)
    }

    /// Memory for the pads of a channel. `None`: there is not enough.
    ///
    /// # Safety
    /// The channel is dropped when no base read that it has asked for is under way, or after
    /// [`crate::engine::Channel::abandon_pads`].
    pub(super) unsafe fn pads(len_bytes: usize) -> Option<PadMemory> {
        // Zeroed: a base that does not fill what it is given shows nobody what was here before.
        let buf = Self::zeroed(len_bytes)?;
        let start = buf.start;
        // SAFETY: so many bytes, initialised, aligned (asserted above) and reachable for devices, are the buffer's
        // alone until it is dropped. Base reads end before the channel (contract); the engine has no other use for
        // their cursors.
        Some(unsafe { PadMemory::new(start, len_bytes, Box::new(buf)) })
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(super) fn len_bytes(&self) -> usize {
        self.len_bytes
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        // SAFETY: from `spdk_dma_malloc`, freed once; its owners hold it for as long as an operation uses it.
        unsafe { sys::spdk_dma_free(self.start.as_ptr().cast()) }
    }
}
