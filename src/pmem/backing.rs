//! Opens or creates what is going to be mapped: finds out what it is, locks it, and makes sure that every
//! byte of it has memory behind it, so that no later store can end in a SIGBUS for want of space.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::MapError;
use super::dax::{self, Backing, PersistenceDomain, Sysfs};

/// Which cache device to map.
#[derive(Clone, Debug)]
pub struct MapRequest {
    /// A regular file or a device-DAX character device.
    pub path: PathBuf,
    /// Create the file with this size, rounded down to whole pages, if it does not exist; if it does, it
    /// must have that size. `None`: it must exist.
    pub create_size_bytes: Option<u64>,
    /// Refuse anything smaller.
    pub size_bytes_min: u64,
}

/// A cache device, locked, with memory behind every byte.
#[derive(Debug)]
pub(super) struct Opened {
    /// Holds the lock.
    pub(super) file: File,
    pub(super) backing: Backing,
    pub(super) size_bytes: u64,
    /// Address and length of a mapping are multiples of this.
    pub(super) align_bytes: u64,
    pub(super) domain: PersistenceDomain,
    /// Removes a file that was created here, unless kept.
    pub(super) created: Option<Created>,
}

/// A file that was created and is not yet in use. Removed when this is dropped.
#[derive(Debug)]
pub(super) struct Created {
    path: Option<PathBuf>,
}

impl Created {
    pub(super) fn keep(mut self) {
        self.path = None;
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            // It may be gone already; there is nobody to tell anyway.
            let _ = fs::remove_file(path);
        }
    }
}

/// Opens, locks and, if need be, creates and fills the device.
pub(super) fn open(request: &MapRequest) -> Result<Opened, MapError> {
    let path = &request.path;
    let (file, created) = open_or_create(request)?;
    lock(&file, path, File::try_lock)?;
    let meta = file
        .metadata()
        .map_err(io_error(path, "ask for the size of"))?;
    let mut opened = describe(file, path, &meta)?;
    opened.created = created;
    if let Some(asked) = request.create_size_bytes {
        let asked_bytes = round_down(asked, opened.align_bytes);
        if opened.created.is_some() {
            opened.size_bytes = asked_bytes;
        } else if round_down(opened.size_bytes, opened.align_bytes) != asked_bytes {
            let (path, found_bytes) = (path.clone(), opened.size_bytes);
            return Err(MapError::SizeDiffers {
                path,
                found_bytes,
                asked_bytes,
            });
        }
    }
    opened.size_bytes = round_down(opened.size_bytes, opened.align_bytes);
    let min_bytes = request.size_bytes_min.max(1);
    if opened.size_bytes < min_bytes {
        let (path, found_bytes) = (path.clone(), opened.size_bytes);
        return Err(MapError::TooSmall {
            path,
            found_bytes,
            min_bytes,
        });
    }
    if opened.backing != Backing::DevDax {
        allocate(&opened, path, &meta)?;
    }
    Ok(opened)
}

/// Who else may have a cache device open that is only read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Others that only read. No cache is opened on it meanwhile.
    Readers,
    /// Anybody: what is read may change at any time.
    Anybody,
}

/// Opens an existing device for reading. Changes nothing of it, not even which parts of a file have space.
pub(super) fn open_to_read(path: &Path, sharing: Sharing) -> Result<Opened, MapError> {
    let meta = fs::metadata(path).map_err(io_error(path, "look at"))?;
    check_type(path, &meta)?;
    let flags = libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(io_error(path, "open"))?;
    if sharing == Sharing::Readers {
        lock(&file, path, File::try_lock_shared)?;
    }
    let meta = file.metadata().map_err(io_error(path, "look at"))?;
    check_type(path, &meta)?;
    let mut opened = describe(file, path, &meta)?;
    opened.size_bytes = round_down(opened.size_bytes, opened.align_bytes);
    Ok(opened)
}

fn round_down(size_bytes: u64, unit_bytes: u64) -> u64 {
    size_bytes / unit_bytes * unit_bytes
}

pub(super) fn io_error(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> MapError {
    let path = path.to_owned();
    move |error| MapError::Io { path, what, error }
}

fn open_or_create(request: &MapRequest) -> Result<(File, Option<Created>), MapError> {
    let path = &request.path;
    match fs::metadata(path) {
        Ok(meta) => check_type(path, &meta)?,
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(io_error(path, "look at")(error));
        }
        Err(_) if request.create_size_bytes.is_none() => {
            return Err(MapError::NotFound { path: path.clone() });
        }
        Err(_) => return create(path).map(|(file, created)| (file, Some(created))),
    }
    // Not blocking, should it have become a FIFO since.
    let flags = libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
        .map_err(io_error(path, "open"))?;
    let meta = file.metadata().map_err(io_error(path, "look at"))?;
    check_type(path, &meta)?;
    Ok((file, None))
}

/// Creates the file; whoever comes second fails.
fn create(path: &Path) -> Result<(File, Created), MapError> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let parent = fs::canonicalize(parent.unwrap_or(Path::new(".")))
        .map_err(io_error(path, "find the directory of"))?;
    // A mistyped /dev/dax0.0 would otherwise become a file in memory.
    if parent == Path::new("/dev") {
        return Err(MapError::NotCreatedInDev {
            path: path.to_owned(),
        });
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(io_error(path, "create"))?;
    Ok((
        file,
        Created {
            path: Some(path.to_owned()),
        },
    ))
}

fn check_type(path: &Path, meta: &fs::Metadata) -> Result<(), MapError> {
    const FILE_OR_DAX: &str = "name a regular file or a device-DAX device";
    let kind = meta.file_type();
    let (found, instead) = if kind.is_file() || kind.is_char_device() {
        return Ok(());
    } else if kind.is_block_device() {
        let instead = "its mapping would go through the page cache; turn the namespace into device-DAX \
                       (ndctl create-namespace -m devdax), or make a file system with DAX on it and name a \
                       file there";
        ("a block device", instead)
    } else if kind.is_dir() {
        ("a directory", FILE_OR_DAX)
    } else if kind.is_fifo() {
        ("a FIFO", FILE_OR_DAX)
    } else if kind.is_socket() {
        ("a socket", FILE_OR_DAX)
    } else {
        ("a special file", FILE_OR_DAX)
    };
    Err(MapError::WrongType {
        path: path.to_owned(),
        found,
        instead,
    })
}

/// Takes the lock that keeps every other opener out, or all but readers, in this process too. It goes when the
/// file is closed, however the process ends.
fn lock(
    file: &File,
    path: &Path,
    try_lock: impl Fn(&File) -> Result<(), fs::TryLockError>,
) -> Result<(), MapError> {
    match try_lock(file) {
        Ok(()) => Ok(()),
        Err(fs::TryLockError::WouldBlock) => {
            let pids = file
                .metadata()
                .map(|meta| lock_holders(&meta))
                .unwrap_or_default();
            Err(MapError::InUse {
                path: path.to_owned(),
                pids,
            })
        }
        Err(fs::TryLockError::Error(error)) => Err(io_error(path, "lock")(error)),
    }
}

/// The processes that /proc/locks names for a file. Empty if it is in another pid namespace, or the file
/// system shows other device numbers there.
fn lock_holders(meta: &fs::Metadata) -> Vec<u32> {
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let dev = meta.dev();
    let id = format!(
        "{:02x}:{:02x}:{}",
        libc::major(dev),
        libc::minor(dev),
        meta.ino()
    );
    parse_lock_holders(&locks, &id)
}

/// Lines are "1: FLOCK  ADVISORY  WRITE 4711 00:19:1234 0 EOF"; waiters have "->" in the second place.
fn parse_lock_holders(locks: &str, id: &str) -> Vec<u32> {
    let holder = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields[..] {
            [_, "FLOCK", _, _, pid, at, ..] if at == id => pid.parse().ok(),
            _ => None,
        }
    };
    locks
        .lines()
        .filter_map(holder)
        .filter(|pid| *pid != 0)
        .collect()
}

fn describe(file: File, path: &Path, meta: &fs::Metadata) -> Result<Opened, MapError> {
    if meta.file_type().is_char_device() {
        describe_dax(file, path, meta.rdev())
    } else {
        describe_file(file, path, meta)
    }
}

fn describe_dax(file: File, path: &Path, rdev: libc::dev_t) -> Result<Opened, MapError> {
    let sysfs = Sysfs::new();
    let Some(device) = sysfs.dax_device(rdev) else {
        return Err(MapError::WrongType {
            path: path.to_owned(),
            found: "a character device without a size in sysfs",
            instead: "of character devices, device-DAX alone can be mapped (/dev/daxX.Y)",
        });
    };
    Ok(Opened {
        file,
        backing: Backing::DevDax,
        size_bytes: device.size_bytes,
        align_bytes: device.align_bytes,
        domain: sysfs.domain_of_char(rdev),
        created: None,
    })
}

fn describe_file(file: File, path: &Path, meta: &fs::Metadata) -> Result<Opened, MapError> {
    let fs = dax::file_system_of(&file).map_err(io_error(path, "ask for the file system of"))?;
    Ok(Opened {
        file,
        backing: fs.backing,
        size_bytes: meta.len(),
        align_bytes: fs.page_size_bytes,
        domain: Sysfs::new().domain_of_block(meta.dev()),
        created: None,
    })
}

/// Gives a file its size, and every hole in it memory or disk space. Its content stays.
fn allocate(opened: &Opened, path: &Path, meta: &fs::Metadata) -> Result<(), MapError> {
    if opened.created.is_some() {
        opened
            .file
            .set_len(opened.size_bytes)
            .map_err(io_error(path, "set the size of"))?;
    } else if meta.blocks().saturating_mul(512) >= opened.size_bytes {
        // No holes, so spare a walk over all of its pages. (A file system that compresses, or counts
        // otherwise, errs on the other side or has no mapping to speak of.)
        return Ok(());
    }
    loop {
        let len = i64::try_from(opened.size_bytes).unwrap_or(i64::MAX);
        // SAFETY: the descriptor is open as long as `file`; no memory is passed.
        match unsafe { libc::posix_fallocate(opened.file.as_raw_fd(), 0, len) } {
            0 => return Ok(()),
            libc::EINTR => {}
            libc::ENOSPC | libc::ENOMEM | libc::EFBIG => {
                let fs = dax::file_system_of(&opened.file);
                return Err(MapError::NoSpace {
                    path: path.to_owned(),
                    size_bytes: opened.size_bytes,
                    free_bytes: fs.map_or(0, |fs| fs.free_bytes),
                });
            }
            errno => {
                let error = io::Error::from_raw_os_error(errno);
                return Err(io_error(path, "allocate the space of")(error));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_holders_are_found_by_device_and_inode() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 00:1a:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 4711 00:1a:77 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 4712 00:1a:77 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 4713 00:1a:78 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE 0 00:1a:77 0 EOF\n\
                     rubbish\n";
        assert_eq!(parse_lock_holders(locks, "00:1a:77"), [4711]);
    }
}
