//! What blocks is done on a thread of its own: allocating, mapping and unmapping a cache device may take
//! the kernel seconds, during which a reactor must not stand still.

use std::path::Path;
use std::thread::JoinHandle;

use spdk_sys as sys;

use crate::engine::FormatPolicy;
use crate::pmem::{Extent, MapError, MapRequest, MappedPmem};
use crate::rpc::{CACHE_SIZE_MIB_MIN, Definition, RpcError};

/// Work on a thread of its own. Dropping it lets the thread go on alone.
#[derive(Debug)]
pub(super) struct Job<T>(JoinHandle<T>);

impl<T: Send + 'static> Job<T> {
    /// `None`: the system has no thread to give.
    pub(super) fn start(name: &str, work: impl FnOnce() -> T + Send + 'static) -> Option<Self> {
        let body = move || {
            // A new thread is bound to the core of the reactor that made it.
            // SAFETY: no arguments; changes the affinity of this very thread.
            unsafe { sys::spdk_unaffinitize_thread() };
            work()
        };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(body)
            .ok()?;
        Some(Self(thread))
    }

    /// Whether [`Job::finish`] would not wait.
    pub(super) fn is_done(&self) -> bool {
        self.0.is_finished()
    }

    /// What it made; `None` if it panicked.
    pub(super) fn finish(self) -> Option<T> {
        self.0.join().ok()
    }
}

/// A cache device, mapped, and whether it was made just now.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) pmem: MappedPmem,
    pub(super) origin: Origin,
}

/// Where a cache device comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// It was there.
    Existed,
    /// It is a file that was created for this cache, to be removed if nothing comes of it.
    Created,
}

/// Maps the cache device of `definition`, and makes its page tables. Blocks.
pub(super) fn map(definition: &Definition) -> Result<Mapped, MapError> {
    let path = &definition.cache_path;
    let (extent, origin) = match definition.extent() {
        Extent::File { .. } if path.exists() => (definition.extent(), Origin::Existed),
        // What must not be formatted must not be created either.
        Extent::File { .. } if definition.format == FormatPolicy::Never => {
            (Extent::Whole, Origin::Existed)
        }
        Extent::File { .. } => (definition.extent(), Origin::Created),
        // Nothing else is ever created, or removed: others may have parts of it.
        extent => (extent, Origin::Existed),
    };
    let mut pmem = MappedPmem::open(&MapRequest {
        path: path.clone(),
        extent,
        size_bytes_min: CACHE_SIZE_MIB_MIN << 20,
    })?;
    while pmem.populate_next().is_some() {}
    Ok(Mapped { pmem, origin })
}

/// Why there is no mapping, in the words of the parameters that would mend it.
pub(super) fn explain(definition: &Definition, error: &MapError) -> RpcError {
    let message = match error {
        MapError::NotFound { path } => {
            let path = path.display();
            let instead = match (definition.cache_offset_mib, definition.format) {
                (Some(_), _) => {
                    "cache_offset_mib takes a part of one and creates none (truncate -s does)"
                }
                (None, FormatPolicy::Never) => "format=never forbids to create one",
                (None, _) => "cache_size_mib would create one",
            };
            format!("there is no cache device {path}: name an existing one; {instead}")
        }
        other => other.to_string(),
    };
    RpcError::errno(error.errno(), message)
}

/// Removes a file that was created for a cache of which nothing came.
pub(super) fn discard(path: &Path, origin: Origin) {
    if origin == Origin::Created
        && let Err(error) = std::fs::remove_file(path)
    {
        log::warn!(
            "{} was created in vain and cannot be removed: {error}",
            path.display()
        );
    }
}
