//! Opens or creates what is going to be mapped: finds out what it is, locks it, and makes sure that every
//! byte of it has memory behind it, so that no later store can end in a SIGBUS for want of space.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::MapError;
use super::dax::{self, Backing, PersistenceDomain, Sysfs};
use super::range_lock::{self, Against};

/// Which cache device to map.
#[derive(Clone, Debug)]
pub struct MapRequest {
    /// A regular file or a device-DAX character device.
    pub path: PathBuf,
    /// How much of it.
    pub extent: Extent,
    /// Refuse anything smaller.
    pub size_bytes_min: u64,
}

/// How much of a cache device to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All of it; it must exist.
    Whole,
    /// All of a file of this size, rounded down to whole pages. It is created if it does not exist; if it does,
    /// it must have that size.
    File {
        /// The size.
        size_bytes: u64,
    },
    /// A part of it; it must exist, and is not made larger.
    Part(Part),
}

impl Extent {
    pub(crate) fn part(self) -> Option<Part> {
        match self {
            Self::Part(part) => Some(part),
            Self::Whole | Self::File { .. } => None,
        }
    }

    pub(crate) fn file_size_bytes(self) -> Option<u64> {
        match self {
            Self::File { size_bytes } => Some(size_bytes),
            Self::Whole | Self::Part(_) => None,
        }
    }
}

/// What offset and size of a part are multiples of: a huge page, so that neither the page tables nor the DMA
/// translation need small ones. A device may ask for more.
pub const PART_ALIGN_BYTES: u64 = 2 << 20;

/// A part of a cache device, for one of several caches on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where it begins.
    pub offset_bytes: u64,
    /// How long it is.
    pub size_bytes: u64,
}

impl Part {
    /// Where it ends.
    #[must_use]
    pub fn end_bytes(self) -> u64 {
        self.offset_bytes.saturating_add(self.size_bytes)
    }

    /// Whether any byte belongs to both.
    #[must_use]
    pub fn overlaps(self, other: Part) -> bool {
        self.offset_bytes < other.end_bytes() && other.offset_bytes < self.end_bytes()
    }
}

/// A cache device, locked, with memory behind every byte.
#[derive(Debug)]
pub(super) struct Opened {
    /// Holds the lock.
    pub(super) file: File,
    pub(super) backing: Backing,
    /// Where the mapping begins in the file.
    pub(super) offset_bytes: u64,
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
    let part = request.extent.part();
    range_lock::lock(&file, path, part, Against::Everybody)?;
    let meta = file
        .metadata()
        .map_err(io_error(path, "ask for the size of"))?;
    let mut opened = describe(file, path, &meta)?;
    opened.created = created;
    if let Some(asked) = request.extent.file_size_bytes() {
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
    if let Some(part) = part {
        opened.narrow(path, part)?;
    }
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
pub(super) fn open_to_read(
    path: &Path,
    part: Option<Part>,
    sharing: Sharing,
) -> Result<Opened, MapError> {
    let meta = fs::metadata(path).map_err(io_error(path, "look at"))?;
    check_type(path, &meta)?;
    let flags = libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(io_error(path, "open"))?;
    if sharing == Sharing::Readers {
        range_lock::lock(&file, path, part, Against::Writers)?;
    }
    let meta = file.metadata().map_err(io_error(path, "look at"))?;
    check_type(path, &meta)?;
    let mut opened = describe(file, path, &meta)?;
    opened.size_bytes = round_down(opened.size_bytes, opened.align_bytes);
    if let Some(part) = part {
        opened.narrow(path, part)?;
    }
    Ok(opened)
}

impl Opened {
    /// Where the mapping begins, as the system calls want it. A part lies within the device, so it fits.
    pub(super) fn file_offset(&self) -> libc::off_t {
        libc::off_t::try_from(self.offset_bytes).unwrap_or(libc::off_t::MAX)
    }

    /// Leaves only a part of it to be mapped.
    fn narrow(&mut self, path: &Path, part: Part) -> Result<(), MapError> {
        let align_bytes = self.align_bytes.max(PART_ALIGN_BYTES);
        let aligned = [part.offset_bytes, part.size_bytes]
            .iter()
            .all(|bytes| bytes.is_multiple_of(align_bytes));
        if !aligned {
            return Err(MapError::Misaligned {
                path: path.to_owned(),
                part,
                align_bytes,
            });
        }
        if part.end_bytes() > self.size_bytes {
            return Err(MapError::PartOutside {
                path: path.to_owned(),
                part,
                found_bytes: self.size_bytes,
            });
        }
        self.offset_bytes = part.offset_bytes;
        self.size_bytes = part.size_bytes;
        Ok(())
    }
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
        Err(_) if request.extent.file_size_bytes().is_none() => {
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
        offset_bytes: 0,
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
        offset_bytes: 0,
        size_bytes: meta.len(),
        align_bytes: fs.page_size_bytes,
        domain: Sysfs::new().domain_of_block(meta.dev()),
        created: None,
    })
}

/// Whether the file system tells of a hole in what is mapped of a file.
fn has_hole(opened: &Opened) -> bool {
    let (fd, start) = (opened.file.as_raw_fd(), opened.file_offset());
    // SAFETY: the descriptor is open as long as `file`, and nothing reads at its position; no memory is passed.
    let hole = unsafe { libc::lseek(fd, start, libc::SEEK_HOLE) };
    let end = opened.offset_bytes + opened.size_bytes;
    u64::try_from(hole).is_ok_and(|hole| hole < end)
}

/// Gives a file its size, and every hole in what is mapped of it memory or disk space. Its content stays.
fn allocate(opened: &Opened, path: &Path, meta: &fs::Metadata) -> Result<(), MapError> {
    if opened.created.is_some() {
        opened
            .file
            .set_len(opened.size_bytes)
            .map_err(io_error(path, "set the size of"))?;
    } else if meta.blocks().saturating_mul(512) >= meta.len() && !has_hole(opened) {
        // Spare a call that may take long. Both are asked: the number also counts what is no data of the file, and a file
        // system that knows of no holes tells of none. (One that compresses, or counts otherwise, errs on the other side
        // or has no mapping to speak of.)
        return Ok(());
    }
    loop {
        let len = i64::try_from(opened.size_bytes).unwrap_or(i64::MAX);
        // SAFETY: the descriptor is open as long as `file`; no memory is passed.
        match unsafe { libc::posix_fallocate(opened.file.as_raw_fd(), opened.file_offset(), len) } {
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
