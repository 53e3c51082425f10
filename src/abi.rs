//! Whether the SPDK of a process is one that the module was built for.
//!
//! The shim has the layouts of SPDK's structs compiled in. SPDK raises the major number of a shared library when one of its
//! layouts changes, and the loader does not compare it: the module names no library of SPDK's, since it takes what the process
//! has.

/// Compares the names of SPDK's bdev library: of the one that the module was built for, and of the one that is loaded, with or
/// without a folder. One without a number is linked in statically, and was built together with the application.
///
/// # Errors
/// They do not go together; the text says so.
pub(crate) fn check(built_for: &str, loaded: &str) -> Result<(), String> {
    match (major(built_for), major(loaded)) {
        (Some(ours), Some(theirs)) if ours != theirs => Err(format!(
            "this module was built for {built_for}, and the application has {loaded}: build the module anew for the \
             SPDK of the application (SPDK_DIR names it: make module)"
        )),
        _ => Ok(()),
    }
}

/// 19 of "/lib/libspdk_bdev.so.19.0".
fn major(library: &str) -> Option<&str> {
    let name = library.rsplit('/').next()?;
    let (_, versions) = name.rsplit_once(".so.")?;
    versions.split('.').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_major_number_of_the_library_is_refused() {
        for (built_for, loaded, fits) in [
            (
                "libspdk_bdev.so.19.0",
                "/spdk/build/lib/libspdk_bdev.so.19.0",
                true,
            ),
            (
                "libspdk_bdev.so.19.0",
                "/usr/lib/libspdk_bdev.so.19.2",
                true,
            ),
            (
                "libspdk_bdev.so.19.0",
                "/usr/lib/libspdk_bdev.so.20.0",
                false,
            ),
            (
                "libspdk_bdev.so.19.0",
                "/old.so.19/libspdk_bdev.so.18.0",
                false,
            ),
            ("libspdk_bdev.so.19.0", "/spdk/build/bin/spdk_tgt", true),
            ("libspdk_bdev.so.19.0", "/opt/spdk.so.18/bin/spdk_tgt", true),
            ("", "/usr/lib/libspdk_bdev.so.20.0", true),
        ] {
            let checked = check(built_for, loaded);
            assert_eq!(checked.is_ok(), fits, "{built_for}, {loaded}");
            if let Err(text) = checked {
                assert!(text.contains(built_for) && text.contains(loaded), "{text}");
            }
        }
    }
}
