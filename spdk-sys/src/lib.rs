//! Raw bindings to the SPDK that pcache is built for, and to the C shim that stands between the two.
//!
//! SPDK's structs are opaque here: their layouts differ between releases and forks, so what needs one is
//! done by the shim (`shim.h`), which is compiled against the same headers. There is no safe interface in
//! this crate; pcache's adapter makes one.

#![no_std]
#![allow(
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    clippy::all,
    reason = "generated from C headers"
)]

macro_rules! opaque {
    ($($name:ident)*) => { $(
        /// Known by its address only.
        #[repr(C)]
        pub struct $name {
            _nothing: [u8; 0],
            _pinned_and_not_send: core::marker::PhantomData<(*mut u8, core::marker::PhantomPinned)>,
        }
    )* };
}

opaque! {
    spdk_bdev
    spdk_bdev_desc
    spdk_bdev_io
    spdk_bdev_io_wait_entry
    spdk_bdev_module
    spdk_cpuset
    spdk_io_channel
    spdk_io_channel_iter
    spdk_json_val
    spdk_json_write_ctx
    spdk_jsonrpc_request
    spdk_poller
    spdk_thread
}

/// The file name of the bdev library of the SPDK that this was built for: "libspdk_bdev.so.19.0". Empty if it is static.
pub const SPDK_BDEV_LIBRARY: &str = env!("SPDK_BDEV_LIBRARY");

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
