//! The module's own life: start, examination of new bdevs, saved configuration, end.

use std::ffi::c_int;
use std::ptr::NonNull;

use spdk_sys as sys;

use super::json::Writer;
use super::trampoline::guard;
use super::{log as spdk_log, registry, watch};

/// Called by SPDK when the bdev layer starts.
#[unsafe(no_mangle)]
extern "C" fn pcache_up_module_init() -> c_int {
    guard(
        -libc::EFAULT,
        || {
            spdk_log::install();
            registry::start();
            watch::register_notifications();
            log::debug!(
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
