//! Nothing to do for the engine. With the feature `spdk`: how the loadable module is linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_SPDK").is_none() {
        return;
    }
    for arg in [
        // The name that an application which links the module records.
        "-Wl,-soname,libspdk_bdev_pcache.so",
        // SPDK keeps pointers into the module until the process ends.
        "-Wl,-z,nodelete",
        // SPDK's symbols are those of the process that loads the module, whatever build of it that is.
        "-Wl,--unresolved-symbols=ignore-all",
    ] {
        println!("cargo:rustc-link-arg={arg}");
    }
}
