//! Which regions are mapped. A `MemSlice` carries no lifetime, since it travels through C; its safe reads
//! ask here whether the memory is still there, and hold off the unmapping until they are done.

use std::sync::{PoisonError, RwLock};

/// Address and length in bytes of every mapped region. A handful at the most, so a list does.
static LIVE: RwLock<Vec<(usize, usize)>> = RwLock::new(Vec::new());

/// The entry of one region; it goes, and waits for readers to go, when this is dropped. Drop it before the
/// region is unmapped.
#[derive(Debug)]
pub(super) struct LiveRegion {
    entry: (usize, usize),
}

impl LiveRegion {
    /// Enters the region of `len_bytes` bytes at `base`. The caller keeps it readable as long as the value
    /// exists.
    pub(super) fn new(base: *const u8, len_bytes: usize) -> Self {
        let entry = (base.addr(), len_bytes);
        LIVE.write()
            .unwrap_or_else(PoisonError::into_inner)
            .push(entry);
        Self { entry }
    }
}

impl Drop for LiveRegion {
    fn drop(&mut self) {
        let mut live = LIVE.write().unwrap_or_else(PoisonError::into_inner);
        // Another region may have been entered at the same address only after this one was unmapped, so
        // there is exactly one such entry.
        if let Some(at) = live.iter().position(|entry| *entry == self.entry) {
            live.swap_remove(at);
        }
    }
}

/// Calls `f` while the `len_bytes` bytes at `ptr` are sure to be mapped.
///
/// # Panics
/// They are not inside of a mapped region.
pub(super) fn while_live<R>(ptr: *const u8, len_bytes: usize, f: impl FnOnce() -> R) -> R {
    let live = LIVE.read().unwrap_or_else(PoisonError::into_inner);
    let inside = live.iter().any(|(base, region_len_bytes)| {
        ptr.addr()
            .checked_sub(*base)
            .and_then(|offset| offset.checked_add(len_bytes))
            .is_some_and(|end| end <= *region_len_bytes)
    });
    assert!(
        inside,
        "the cache device has been closed: {len_bytes} bytes at {ptr:p} are not mapped"
    );
    f()
}
