//! The module's own life: start, examination of new bdevs, saved configuration, end.

use std::ffi::{CStr, c_int, c_void};
use std::ptr::NonNull;

use spdk_sys as sys;

use super::json::Writer;
use super::trampoline::guard;
use super::{log as spdk_log, registry, watch};
use crate::abi;

/// Called by SPDK when the bdev layer starts.
#[unsafe(no_mangle)]
extern "C" fn pcache_up_module_init() -> c_int {
    guard(
        -libc::EFAULT,
        || {
            spdk_log::install();
            if let Err(message) = abi::check(sys::SPDK_BDEV_LIBRARY, &bdev_library()) {
                log::error!("{message}");
                return -libc::ENOEXEC;
            }
            registry::start();
            watch::register_notifications();
            log::info!(
                "pcache {}, built for SPDK {}.{:02}",
                env!("CARGO_PKG_VERSION"),
                sys::SPDK_VERSION_MAJOR,
                sys::SPDK_VERSION_MINOR
            );
            0
        },
        |_| -libc::EFAULT,
    )
}

/// The file that the application has SPDK's bdev layer from: a library, or the application itself.
fn bdev_library() -> String {
    let register = sys::spdk_bdev_register as *const c_void;
    // SAFETY: all zeroes is a value of it: numbers and pointers.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: the address is only looked up, and `info` is for the call to fill.
    let found = unsafe { libc::dladdr(register, &raw mut info) };
    if found == 0 || info.dli_fname.is_null() {
        return String::new();
    }
    // SAFETY: the loader's name of the file, which ends with a NUL and stays as long as the file is loaded: SPDK never unloads.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    name.to_string_lossy().into_owned()
}

/// Called by SPDK when the application begins to end, if it is one of SPDK's framework: before the targets end, which use the
/// bdevs.
#[unsafe(no_mangle)]
extern "C" fn pcache_up_end_begins() {
    guard((), registry::stop_opening, |_| ());
}

/// Called by SPDK when the targets have ended, with all bdevs still there. It waits for
/// `spdk_bdev_module_fini_start_done`.
#[unsafe(no_mangle)]
extern "C" fn pcache_up_fini_start() {
    guard((), registry::shut_down, |_| {
        // SAFETY: SPDK waits for this word; without it the application would not end.
        unsafe { sys::spdk_bdev_module_fini_start_done() }
    });
}

/// Called by SPDK when no bdev is left.
#[unsafe(no_mangle)]
extern "C" fn pcache_up_module_fini() {
    guard((), registry::clear, |_| ());
}

/// Caches without a bdev, which SPDK would not ask for their configuration one by one.
///
/// # Safety
/// `writer` is valid during this call, and waits for values.
#[unsafe(no_mangle)]
unsafe extern "C" fn pcache_up_config_json(writer: *mut sys::spdk_json_write_ctx) {
    let Some(writer) = NonNull::new(writer) else {
        return;
    };
    guard(
        (),
        || {
            // SAFETY: by the contract of this function.
            let mut writer = unsafe { Writer::from_raw(writer) };
            for config in registry::configs_without_bdev() {
                writer.value(&config);
            }
        },
        |_| (),
    );
}

/// A new bdev. Whatever happens here, the shim tells SPDK that the examination is done.
///
/// # Safety
/// `bdev` exists during this call.
#[unsafe(no_mangle)]
unsafe extern "C" fn pcache_up_examine_config(bdev: *mut sys::spdk_bdev) {
    guard((), || registry::on_examine(bdev), |_| ());
}

/// A new bdev, once more; `true`: SPDK will be told later that its examination is done.
///
/// # Safety
/// `bdev` exists during this call.
#[unsafe(no_mangle)]
unsafe extern "C" fn pcache_up_examine_disk(bdev: *mut sys::spdk_bdev) -> bool {
    guard(false, || registry::holds_examination(bdev), |_| false)
}
