//! The base bdev: opened, checked, claimed.

use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde::Serialize;
use spdk_sys as sys;

use super::registry::{self, EntryId};
use super::trampoline::guard;
use crate::engine::{BaseCaps, BaseError, BaseIdentity};
use crate::rpc::RpcError;

/// A smaller base device is a mistake.
const BASE_SIZE_MIN_BYTES: u64 = 1 << 20;

/// Why a base device cannot be had.
#[derive(Debug)]
pub(super) enum OpenBaseError {
    /// There is no bdev of that name; there may be one later.
    Missing,
    /// It is there, and somebody else writes to it, or may.
    InUse(RpcError),
    /// It is there and cannot be used.
    Refused(RpcError),
}

/// A bdev as whoever does not open it tells it from another one of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    address: usize,
    uuid: [u8; 16],
}

impl Seen {
    /// The bdev that has this name now.
    pub(super) fn named(name: &CStr) -> Option<Self> {
        let mut uuid = [0; 16];
        // SAFETY: the name is only read; a bdev that is found stays at least until this function returns to SPDK, whose
        // thread this is; `uuid` has the 16 bytes that are written.
        let bdev = unsafe {
            let bdev = sys::spdk_bdev_get_by_name(name.as_ptr());
            if bdev.is_null() {
                return None;
            }
            sys::pcache_bdev_uuid(bdev, uuid.as_mut_ptr());
            bdev
        };
        Some(Self {
            address: bdev.addr(),
            uuid,
        })
    }
}

/// What becomes of a FLUSH that the base gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum BaseFlush {
    /// Its module takes it.
    Sent,
    /// It succeeds, and a device with a volatile write cache never hears of it: SPDK's NVMe bdevs do that unless they are
    /// told otherwise.
    Dropped,
    /// There is none.
    Unsupported,
}

/// What the base device is, as it was when it was opened.
#[derive(Clone, Debug)]
pub(super) struct BaseFacts {
    pub(super) identity: BaseIdentity,
    pub(super) caps: BaseCaps,
    pub(super) flush: BaseFlush,
    pub(super) phys_block_size_bytes: u32,
    /// Of the bdev module that serves it.
    pub(super) module_name: String,
}

/// The base bdev's descriptor, with the claim that makes us its only writer. Opened and closed on the app
/// thread; channels to it may be had on any.
#[derive(Debug)]
pub(super) struct Base {
    desc: NonNull<sys::spdk_bdev_desc>,
    pub(super) facts: BaseFacts,
    gone: AtomicBool,
    /// Resets of it that are under way.
    resets: AtomicU32,
}

// SAFETY: the descriptor is only closed by `drop`, which the owners leave to the app thread; everything
// else that is done with it (getting channels, submitting on one's own channel) SPDK allows on any thread.
unsafe impl Send for Base {}
// SAFETY: as above.
unsafe impl Sync for Base {}

impl Base {
    /// Opens the bdev `name`, checks whether a cache can stand in front of it, and claims it for `owner`.
    /// Its events go to the registry, for `id`.
    pub(super) fn open(name: &str, owner: &str, id: EntryId) -> Result<Self, OpenBaseError> {
        let c_name = c_string(name);
        let mut desc: *mut sys::spdk_bdev_desc = ptr::null_mut();
        // Not for writing: the claim will make it so, if nobody else writes.
        // SAFETY: the name is copied; `id` stands for the entry as a mere number; `desc` is written to
        // before the call returns.
        let rc = unsafe {
            sys::spdk_bdev_open_ext(
                c_name.as_ptr(),
                false,
                Some(on_event),
                id.as_ctx(),
                &raw mut desc,
            )
        };
        if rc == -libc::ENODEV {
            return Err(OpenBaseError::Missing);
        }
        let Some(desc) = NonNull::new(desc).filter(|_| rc == 0) else {
            return Err(refused(
                -rc,
                format!("the base bdev {name} cannot be opened: {}", os_text(-rc)),
            ));
        };
        // From here on `drop` closes it.
        let mut base = Self {
            desc,
            facts: BaseFacts::none(),
            gone: AtomicBool::new(false),
            resets: AtomicU32::new(0),
        };
        base.facts = BaseFacts::of(&base);
        base.check().map_err(OpenBaseError::Refused)?;
        base.claim(owner)?;
        Ok(base)
    }

    fn claim(&self, owner: &str) -> Result<(), OpenBaseError> {
        let owner = c_string(owner);
        // SAFETY: the descriptor is open; the name is copied.
        let rc = unsafe { sys::pcache_claim(self.desc.as_ptr(), owner.as_ptr()) };
        let name = &self.facts.identity.name;
        match -rc {
            0 => Ok(()),
            libc::EPERM | libc::EBUSY => Err(OpenBaseError::InUse(RpcError::errno(
                libc::EPERM,
                format!(
                    "the base bdev {name} is in use: another module has claimed it, or it is open for \
                     writing; a cache has to be its only writer"
                ),
            ))),
            errno => Err(refused(
                errno,
                format!("the base bdev {name} cannot be claimed: {}", os_text(errno)),
            )),
        }
    }

    /// Refuses what a cache cannot serve.
    fn check(&self) -> Result<(), RpcError> {
        let bdev = self.bdev();
        let identity = &self.facts.identity;
        let name = &identity.name;
        let no = |reason: String| Err(RpcError::errno(libc::ENOTSUP, reason));
        // SAFETY: the bdev exists while it is open; all of these only read.
        let (zoned, md_size, interleaved, dif, write_unit) = unsafe {
            (
                sys::spdk_bdev_is_zoned(bdev),
                sys::spdk_bdev_get_md_size(bdev),
                sys::spdk_bdev_is_md_interleaved(bdev),
                sys::pcache_bdev_has_dif(bdev),
                sys::spdk_bdev_get_write_unit_size(bdev),
            )
        };
        if zoned {
            return no(format!(
                "the base bdev {name} is zoned, which cannot be cached"
            ));
        }
        if md_size != 0 {
            let kind = if interleaved {
                "interleaved"
            } else {
                "separate"
            };
            let dif = if dif {
                " with protection information"
            } else {
                ""
            };
            return no(format!(
                "the base bdev {name} has {md_size} bytes of {kind} metadata{dif} per block, which cannot \
                 be cached: a bdev without metadata is needed"
            ));
        }
        if write_unit > 1 {
            return no(format!(
                "the base bdev {name} can only be written in units of {write_unit} blocks: a write unit \
                 of one block is needed"
            ));
        }
        let block_size = identity.block_size_bytes;
        if block_size != 512 && block_size != 4096 {
            return no(format!(
                "the base bdev {name} has blocks of {block_size} bytes: 512 or 4096 are supported"
            ));
        }
        for (kind, io_type) in [
            ("read", sys::SPDK_BDEV_IO_TYPE_READ),
            ("written", sys::SPDK_BDEV_IO_TYPE_WRITE),
        ] {
            if !supports(self.bdev(), io_type) {
                return no(format!("the base bdev {name} cannot be {kind}"));
            }
        }
        let size = identity.block_count.saturating_mul(u64::from(block_size));
        if size < BASE_SIZE_MIN_BYTES {
            return no(format!(
                "the base bdev {name} has {size} bytes: at least {BASE_SIZE_MIN_BYTES} are needed"
            ));
        }
        Ok(())
    }

    fn bdev(&self) -> *mut sys::spdk_bdev {
        // SAFETY: the descriptor is open until `drop`.
        unsafe { sys::spdk_bdev_desc_get_bdev(self.desc.as_ptr()) }
    }

    pub(super) fn desc(&self) -> *mut sys::spdk_bdev_desc {
        self.desc.as_ptr()
    }

    /// Whether this descriptor belongs to `bdev`.
    pub(super) fn is(&self, bdev: *const sys::spdk_bdev) -> bool {
        ptr::eq(self.bdev(), bdev)
    }

    /// The size now, in blocks.
    pub(super) fn block_count_now(&self) -> u64 {
        // SAFETY: the bdev exists while it is open.
        unsafe { sys::spdk_bdev_get_num_blocks(self.bdev()) }
    }

    /// The device is being removed: its users are to let go.
    pub(super) fn set_gone(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// Whether the device is being removed.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// A reset of the device begins: whatever fails from now on was aborted by that.
    pub(super) fn begin_reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether one is under way.
    pub(super) fn is_resetting(&self) -> bool {
        self.resets.load(Ordering::Relaxed) > 0
    }

    /// The reset has ended.
    pub(super) fn end_reset(&self) {
        self.resets.fetch_sub(1, Ordering::Relaxed);
    }

    /// The engine's word for a failed operation; `errno` is positive, 0 if the device reported the error.
    pub(super) fn error(&self, errno: c_int) -> BaseError {
        match errno {
            libc::ENOTSUP => BaseError::Unsupported,
            libc::ENODEV | libc::ENXIO => BaseError::Gone,
            _ if self.is_gone() => BaseError::Gone,
            _ if self.is_resetting() => BaseError::Reset,
            _ => BaseError::Io,
        }
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        // The claim ends with the descriptor.
        // SAFETY: open, and closed only here; channels and operations that used it are gone, since each
        // keeps the `Base` alive.
        unsafe { sys::spdk_bdev_close(self.desc.as_ptr()) }
    }
}

impl BaseFacts {
    fn none() -> Self {
        Self {
            identity: BaseIdentity {
                uuid: [0; 16],
                name: String::new(),
                block_size_bytes: 0,
                block_count: 0,
            },
            caps: BaseCaps {
                flush: false,
                unmap: false,
                write_zeroes: false,
            },
            flush: BaseFlush::Unsupported,
            phys_block_size_bytes: 0,
            module_name: String::new(),
        }
    }

    fn of(base: &Base) -> Self {
        let bdev = base.bdev();
        let mut uuid = [0; 16];
        // SAFETY: the bdev exists while it is open; `uuid` has the 16 bytes that are written.
        unsafe { sys::pcache_bdev_uuid(bdev, uuid.as_mut_ptr()) };
        // SAFETY: as above; the names are NUL-terminated, live as long as the bdev and are copied.
        let (name, module_name) = unsafe {
            (
                owned(sys::spdk_bdev_get_name(bdev)),
                owned(sys::spdk_bdev_get_module_name(bdev)),
            )
        };
        // SAFETY: as above.
        let (block_size_bytes, block_count, phys_block_size_bytes) = unsafe {
            (
                sys::spdk_bdev_get_block_size(bdev),
                sys::spdk_bdev_get_num_blocks(bdev),
                sys::spdk_bdev_get_physical_block_size(bdev),
            )
        };
        // SAFETY: as above; one takes no argument.
        let (write_zeroes, has_write_cache, nvme_flush) = unsafe {
            (
                sys::pcache_bdev_zeroes_itself(bdev),
                sys::spdk_bdev_has_write_cache(bdev),
                sys::pcache_nvme_flush(),
            )
        };
        let caps = BaseCaps {
            flush: supports(bdev, sys::SPDK_BDEV_IO_TYPE_FLUSH),
            unmap: supports(bdev, sys::SPDK_BDEV_IO_TYPE_UNMAP),
            write_zeroes,
        };
        let is_dropped = module_name == "nvme"
            && has_write_cache
            && nvme_flush == sys::PCACHE_NVME_FLUSH_DROPPED;
        let flush = match caps.flush {
            false => BaseFlush::Unsupported,
            true if is_dropped => BaseFlush::Dropped,
            true => BaseFlush::Sent,
        };
        Self {
            identity: BaseIdentity {
                uuid,
                name,
                block_size_bytes,
                block_count,
            },
            caps,
            flush,
            phys_block_size_bytes,
            module_name,
        }
    }
}

fn supports(bdev: *mut sys::spdk_bdev, io_type: sys::spdk_bdev_io_type) -> bool {
    // SAFETY: the callers' bdev is open.
    unsafe { sys::spdk_bdev_io_type_supported(bdev, io_type) }
}

fn refused(errno: i32, message: String) -> OpenBaseError {
    OpenBaseError::Refused(RpcError::errno(errno, message))
}

/// The system's words for an errno value.
pub(super) fn os_text(errno: i32) -> String {
    std::io::Error::from_raw_os_error(errno).to_string()
}

/// For names that were checked to have no NUL inside.
pub(super) fn c_string(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}

/// # Safety
/// `text` is NULL or a NUL-terminated string.
unsafe fn owned(text: *const std::ffi::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by the contract of this function.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}

/// SPDK tells of the base bdev, on the thread that opened it: the app thread.
unsafe extern "C" fn on_event(
    event: sys::spdk_bdev_event_type,
    _bdev: *mut sys::spdk_bdev,
    ctx: *mut c_void,
) {
    let id = EntryId::from_ctx(ctx);
    guard(
        (),
        || match event {
            sys::SPDK_BDEV_EVENT_REMOVE => registry::on_base_removed(id),
            sys::SPDK_BDEV_EVENT_RESIZE => registry::on_base_resized(id),
            _ => {}
        },
        |_| (),
    );
}
