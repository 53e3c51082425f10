//! Finds SPDK (`spdk.sh find`), generates bindings to its headers and compiles the C shim against the
//! same headers. Nothing of SPDK is linked: the module finds SPDK's symbols in the process that loads it,
//! and a static library leaves them to the application that links it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the adapter calls of SPDK itself. Everything that needs a struct's layout goes through the shim.
const FUNCTIONS: &[&str] = &[
    "pcache_.*",
    "spdk_bdev_close",
    "spdk_bdev_desc_get_bdev",
    "spdk_bdev_destruct_done",
    "spdk_bdev_flush_blocks",
    "spdk_bdev_free_io",
    "spdk_bdev_get_block_size",
    "spdk_bdev_get_by_name",
    "spdk_bdev_get_io_channel",
    "spdk_bdev_get_md_size",
    "spdk_bdev_get_module_name",
    "spdk_bdev_get_name",
    "spdk_bdev_get_num_blocks",
    "spdk_bdev_get_physical_block_size",
    "spdk_bdev_get_write_unit_size",
    "spdk_bdev_has_write_cache",
    "spdk_bdev_io_complete",
    "spdk_bdev_io_type_supported",
    "spdk_bdev_is_md_interleaved",
    "spdk_bdev_is_zoned",
    "spdk_bdev_module_examine_done",
    "spdk_bdev_module_fini_start_done",
    "spdk_bdev_notify_blockcnt_change",
    "spdk_bdev_open_ext",
    "spdk_bdev_readv_blocks",
    "spdk_bdev_register",
    "spdk_bdev_reset",
    "spdk_bdev_unmap_blocks",
    "spdk_bdev_unregister",
    "spdk_bdev_wait_for_examine",
    "spdk_bdev_write_blocks",
    "spdk_bdev_write_zeroes_blocks",
    "spdk_bdev_writev_blocks",
    "spdk_cpuset_alloc",
    "spdk_cpuset_free",
    "spdk_cpuset_set_cpu",
    "spdk_dma_free",
    "spdk_dma_malloc",
    "spdk_env_get_current_core",
    "spdk_env_get_first_core",
    "spdk_env_get_next_core",
    "spdk_for_each_channel",
    "spdk_for_each_channel_continue",
    "spdk_get_thread",
    "spdk_get_ticks",
    "spdk_get_ticks_hz",
    "spdk_io_channel_iter_get_channel",
    "spdk_io_channel_iter_get_ctx",
    "spdk_io_device_unregister",
    "spdk_json_write_begin",
    "spdk_json_write_end",
    "spdk_json_write_name_raw",
    "spdk_json_write_val",
    "spdk_json_write_val_raw",
    "spdk_jsonrpc_begin_result",
    "spdk_jsonrpc_end_result",
    "spdk_jsonrpc_send_error_response",
    "spdk_mem_register",
    "spdk_mem_unregister",
    "spdk_notify_send",
    "spdk_notify_type_register",
    "spdk_poller_register_named",
    "spdk_poller_unregister",
    "spdk_put_io_channel",
    "spdk_thread_create",
    "spdk_thread_exit",
    "spdk_thread_get_app_thread",
    "spdk_thread_get_last_tsc",
    "spdk_thread_is_app_thread",
    "spdk_thread_send_msg",
    "spdk_unaffinitize_thread",
    "spdk_vtophys",
];

const TYPES: &[&str] = &[
    "pcache_.*",
    "spdk_bdev_event_cb_t",
    "spdk_bdev_event_type",
    "spdk_bdev_io_completion_cb",
    "spdk_bdev_io_status",
    "spdk_bdev_io_type",
    "spdk_bdev_io_wait_cb",
    "spdk_bdev_unregister_cb",
    "spdk_bdev_wait_for_examine_cb",
    "spdk_channel_for_each_cpl",
    "spdk_channel_msg",
    "spdk_io_device_unregister_cb",
    "spdk_json_write_cb",
    "spdk_log_level",
    "spdk_msg_fn",
    "spdk_notify_type",
    "spdk_poller_fn",
    "spdk_thread_poller_rc",
];

const VARS: &[&str] = &[
    "PCACHE_.*",
    "SPDK_JSONRPC_ERROR_.*",
    "SPDK_VERSION_(MAJOR|MINOR|PATCH)",
];

fn main() {
    for file in ["build.rs", "shim.c", "shim.h", "wrapper.h", "spdk.sh"] {
        println!("cargo:rerun-if-changed={file}");
    }
    for variable in ["SPDK_DIR", "PKG_CONFIG_PATH", "XDG_CACHE_HOME", "HOME"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let spdk = find_spdk();
    let include = include_dir(&spdk);
    println!("cargo:rustc-env=SPDK_BDEV_LIBRARY={}", bdev_library(&spdk));
    // Another SPDK put in the same place has other layouts.
    for header in ["version.h", "bdev_module.h", "config.h"] {
        println!(
            "cargo:rerun-if-changed={}",
            include.join("spdk").join(header).display()
        );
    }
    println!("cargo:include={}", include.display());
    compile_shim(&include);
    generate_bindings(&include);
}

/// The SPDK to build for, as `spdk.sh` tells.
struct Spdk {
    is_tree: bool,
    dir: PathBuf,
    prefix: PathBuf,
    libdir: PathBuf,
}

fn find_spdk() -> Spdk {
    let script =
        PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("spdk.sh");
    // The script prints assignments for a shell to evaluate.
    let output = Command::new("bash")
        .arg("-c")
        .arg(r#"found=$("$0" find) || exit 1; eval "$found"; printf '%s\n' "$KIND" "$SPDK_DIR" "$SPDK_PREFIX" "$SPDK_LIBDIR""#)
        .arg(&script)
        .output()
        .unwrap_or_else(|error| panic!("cannot run bash: {error}"));
    assert!(
        output.status.success(),
        "no SPDK to build for:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).expect("the script prints text");
    let mut lines = text.lines();
    let mut next = || lines.next().unwrap_or_default().to_owned();
    Spdk {
        is_tree: next() == "tree",
        dir: next().into(),
        prefix: next().into(),
        libdir: next().into(),
    }
}

/// The name of its bdev library with the numbers of its interface: what `libspdk_bdev.so` is a link to. Empty if it is static.
fn bdev_library(spdk: &Spdk) -> String {
    let link = spdk.libdir.join("libspdk_bdev.so");
    println!("cargo:rerun-if-changed={}", link.display());
    let file = link.canonicalize().ok();
    let name = file.as_deref().and_then(Path::file_name);
    name.map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Where its headers are.
fn include_dir(spdk: &Spdk) -> PathBuf {
    let candidates = if spdk.is_tree {
        // The generated config.h lies in one of the two, depending on the release.
        vec![spdk.dir.join("build/include"), spdk.dir.join("include")]
    } else {
        let mut found = vec![spdk.prefix.join("include")];
        found.extend(pkg_config_include());
        found
    };
    candidates
        .iter()
        .find(|path| {
            path.join("spdk/bdev_module.h").exists() && path.join("spdk/config.h").exists()
        })
        .unwrap_or_else(|| {
            panic!("no spdk/bdev_module.h and spdk/config.h in any of {candidates:?}")
        })
        .clone()
}

fn pkg_config_include() -> Option<PathBuf> {
    let output = Command::new("pkg-config")
        .args(["--cflags-only-I", "spdk_bdev"])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.split_whitespace()
        .find_map(|flag| flag.strip_prefix("-I").map(PathBuf::from))
}

fn compile_shim(include: &Path) {
    cc::Build::new()
        .file("shim.c")
        .include(include)
        .define("_GNU_SOURCE", None)
        .flag("-std=gnu11")
        .flag("-fno-strict-aliasing")
        .flag("-Wall")
        .flag_if_supported("-Wno-unused-parameter")
        .compile("spdk_pcache_shim");
}

fn generate_bindings(include: &Path) {
    let mut builder = bindgen::Builder::default()
        .header("wrapper.h")
        .clang_arg(format!("-I{}", include.display()))
        .clang_arg("-D_GNU_SOURCE")
        .use_core()
        .layout_tests(false)
        .generate_comments(false)
        .derive_copy(false)
        .derive_debug(false)
        .prepend_enum_name(false)
        // Only what is listed: the structs behind the pointers are declared, without any layout, in
        // lib.rs, since theirs differ from release to release.
        .allowlist_recursively(false)
        .rust_edition(bindgen::RustEdition::Edition2024)
        .rust_target(bindgen::RustTarget::stable(85, 0).unwrap_or_default())
        .raw_line("use libc::iovec;")
        // The adapter defines these.
        .blocklist_function("pcache_up_.*")
        .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()));
    for pattern in FUNCTIONS {
        builder = builder.allowlist_function(pattern);
    }
    for pattern in TYPES {
        builder = builder.allowlist_type(pattern);
    }
    for pattern in VARS {
        builder = builder.allowlist_var(pattern);
    }
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it")).join("bindings.rs");
    builder
        .generate()
        .unwrap_or_else(|error| panic!("bindgen failed on SPDK's headers: {error}"))
        .write_to_file(&out)
        .unwrap_or_else(|error| panic!("cannot write {}: {error}", out.display()));
}
