//! What blocks is done on a thread of its own: allocating, mapping and unmapping a cache device, and making it known to
//! devices, may take the kernel seconds, during which a reactor must not stand still.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use spdk_sys as sys;

use super::memory::{Mover, Registration};
use crate::engine::{FormatPolicy, OpenOptions};
use crate::pmem::{
    Durability, Extent, MapError, MapRequest, MappedPmem, Pmem, PmemRead, ReadOnlyPmem, Sharing,
};
use crate::recovery::{OpenError, Opening, check_header};
use crate::rpc::{CACHE_SIZE_MIB_MIN, Definition, RpcError};
use crate::units::PmemOff;

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

/// A cache device, mapped, and that the engine has had a first look at.
#[derive(Debug)]
pub(super) struct Mapped {
    /// Of all of it. Before `opening`, which has the mapping: what is unmapped must not be registered.
    pub(super) registration: Option<Registration>,
    pub(super) opening: Opening<MappedPmem>,
    pub(super) durability: Durability,
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

/// Maps the cache device of `definition`, makes its page tables, begins to open the cache, and registers the mapping if
/// `mover` needs it; gives up with that once it is `unwanted`. Blocks. If it fails the device is as it was.
pub(super) fn map(
    definition: &Definition,
    options: OpenOptions,
    mover: Mover,
    unwanted: &AtomicBool,
) -> Result<Mapped, RpcError> {
    let path = &definition.cache_path;
    check_untouched(definition, &options)?;
    let mut pmem = MappedPmem::open(&MapRequest {
        path: path.clone(),
        extent: extent_of(definition),
        size_bytes_min: CACHE_SIZE_MIB_MIN << 20,
    })
    .map_err(|error| explain(definition, &error))?;
    // Whoever has opened it knows that; it may have come between a look and that.
    let origin = if pmem.is_new() {
        Origin::Created
    } else {
        Origin::Existed
    };
    if let Err(error) = populate(path, &mut pmem, unwanted) {
        drop(pmem);
        discard(path, origin);
        return Err(error);
    }
    let durability = pmem.durability();
    log::info!(
        "{}: {} is {} ({}), stored to with {}",
        definition.name,
        path.display(),
        match durability {
            Durability::Power => "power-safe",
            Durability::Process => "kill-safe, not power-safe",
        },
        pmem.durability_reason(),
        pmem.store_kernel_name()
    );
    let (mapping, backing) = (pmem.slice(PmemOff(0), pmem.len_bytes()), pmem.backing());
    match Opening::begin(pmem, options) {
        Ok(opening) => Ok(Mapped {
            registration: match unwanted.load(Ordering::Relaxed) {
                false => Registration::of(mover, mapping, backing),
                true => None,
            },
            opening,
            durability,
            origin,
        }),
        Err(error) => {
            discard(path, origin);
            Err(explain_opening(definition, &error))
        }
    }
}

/// What of the cache device is to be mapped. A file of a given size is made if it is not there; nothing else is ever created, or
/// removed: others may have parts of it.
fn extent_of(definition: &Definition) -> Extent {
    match definition.extent() {
        // What must not be formatted must not be created either.
        Extent::File { .. }
            if definition.format == FormatPolicy::Never && !definition.cache_path.exists() =>
        {
            Extent::Whole
        }
        extent => extent,
    }
}

/// Refuses what the header of an existing device says is to be refused, before the device is opened for use: that gives memory
/// or disk space to every hole of a file, which may be somebody else's. What cannot be read like this, or has another size than
/// was asked for, is refused then, and before that.
fn check_untouched(definition: &Definition, options: &OpenOptions) -> Result<(), RpcError> {
    let extent = definition.extent();
    let opened = ReadOnlyPmem::open(&definition.cache_path, extent.part(), Sharing::Readers);
    let Ok(device) = opened else { return Ok(()) };
    let len_bytes = device.len_bytes();
    let is_as_asked = extent
        .file_size_bytes()
        .is_none_or(|asked| asked == len_bytes);
    if !is_as_asked || len_bytes < CACHE_SIZE_MIB_MIN << 20 {
        return Ok(());
    }
    check_header(&device, options).map_err(|error| explain_opening(definition, &error))
}

fn populate(path: &Path, pmem: &mut MappedPmem, unwanted: &AtomicBool) -> Result<(), RpcError> {
    let mut done_bytes = 0;
    while !unwanted.load(Ordering::Relaxed) {
        match pmem.populate_next() {
            Some(progress) => done_bytes = progress.done_bytes,
            None => return Ok(()),
        }
    }
    log::info!(
        "{}: given up with {} of {} MiB populated",
        path.display(),
        done_bytes >> 20,
        pmem.len_bytes() >> 20
    );
    Err(RpcError::errno(libc::ECANCELED, "given up"))
}

/// Why there is no mapping, in the words of the parameters that would mend it.
fn explain(definition: &Definition, error: &MapError) -> RpcError {
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

/// Why there is no cache. The engine knows neither the path of the cache device nor the name of the base.
pub(super) fn explain_opening(definition: &Definition, error: &OpenError) -> RpcError {
    let (cache, base) = (definition.cache_path.display(), &definition.base_bdev_name);
    RpcError::errno(
        error.errno(),
        format!("cache device {cache} in front of {base}: {error}"),
    )
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
