//! Why a cache device cannot be had.

use std::io;
use std::path::PathBuf;

use super::backing::Part;
use super::range_lock::LockRange;

/// Why a cache device cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// A system call failed.
    #[error("cannot {what} {}: {error}", .path.display())]
    Io {
        /// The cache device.
        path: PathBuf,
        /// What was tried, as a verb with its preposition.
        what: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// No such file, and no size to create one with.
    #[error(
        "{} does not exist: name an existing file or device-DAX device, or give a size to create a file",
        .path.display()
    )]
    NotFound {
        /// The path that was asked for.
        path: PathBuf,
    },
    /// Something would have been created among the devices.
    #[error("{} is not there, and no file is created in /dev: check the device's name", .path.display())]
    NotCreatedInDev {
        /// The path that was asked for.
        path: PathBuf,
    },
    /// It is neither a regular file nor device-DAX.
    #[error("{} is {found}, which cannot be a cache device: {instead}", .path.display())]
    WrongType {
        /// The path that was asked for.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What would be right.
        instead: &'static str,
    },
    /// It exists with another size than that given.
    #[error(
        "{} has {found_bytes} bytes, but a size of {asked_bytes} bytes was given: leave the size out, or \
         give that of the file",
        .path.display()
    )]
    SizeDiffers {
        /// The cache device.
        path: PathBuf,
        /// Its size.
        found_bytes: u64,
        /// The size asked for, in whole pages.
        asked_bytes: u64,
    },
    /// It is too small.
    #[error("{} has {found_bytes} usable bytes, but a cache needs at least {min_bytes}", .path.display())]
    TooSmall {
        /// The cache device.
        path: PathBuf,
        /// Its size in whole pages.
        found_bytes: u64,
        /// What was asked for at the least.
        min_bytes: u64,
    },
    /// The file system has no room for all of the file.
    #[error(
        "there is no room for the {size_bytes} bytes of {}: {free_bytes} bytes are free there",
        .path.display()
    )]
    NoSpace {
        /// The cache device.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
        /// What the file system says is free.
        free_bytes: u64,
    },
    /// A part of it does not begin or end where one may.
    #[error(
        "the part of {} at {} with {} bytes was asked for: offset and size of a part must be multiples of \
         {align_bytes} bytes",
        .path.display(),
        .part.offset_bytes,
        .part.size_bytes
    )]
    Misaligned {
        /// The cache device.
        path: PathBuf,
        /// What was asked for.
        part: Part,
        /// What the device needs.
        align_bytes: u64,
    },
    /// A part of it ends behind its end.
    #[error(
        "{} has {found_bytes} usable bytes, but the part that was asked for goes from byte {} to {}: a \
         smaller part is needed, or a larger device (truncate -s makes a file larger)",
        .path.display(),
        .part.offset_bytes,
        .part.end_bytes()
    )]
    PartOutside {
        /// The cache device.
        path: PathBuf,
        /// What was asked for.
        part: Part,
        /// Its size in whole pages.
        found_bytes: u64,
    },
    /// Somebody else has it, or a part of what is wanted of it.
    #[error(
        "{} is in use by another cache{}: {wanted} is wanted, {} is taken",
        .path.display(),
        Holders(.pids),
        Taken(.found)
    )]
    InUse {
        /// The cache device.
        path: PathBuf,
        /// What was to be locked.
        wanted: LockRange,
        /// What is locked already of it, as far as the kernel tells.
        found: Option<LockRange>,
        /// Who holds the lock, as far as the kernel tells.
        pids: Vec<u32>,
    },
}

/// " (process 12, 34)", or nothing.
struct Holders<'a>(&'a [u32]);

impl std::fmt::Display for Holders<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, pid) in self.0.iter().enumerate() {
            write!(f, "{}{pid}", if index == 0 { " (process " } else { ", " })?;
        }
        f.write_str(if self.0.is_empty() { "" } else { ")" })
    }
}

/// What is locked, if that is known.
struct Taken<'a>(&'a Option<LockRange>);

impl std::fmt::Display for Taken<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(range) => range.fmt(f),
            None => f.write_str("some or all of it"),
        }
    }
}

impl MapError {
    /// The errno value, positive, that says about the same.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Io { error, .. } => error.raw_os_error().unwrap_or(libc::EIO),
            Self::NotFound { .. } | Self::NotCreatedInDev { .. } => libc::ENOENT,
            Self::WrongType { .. }
            | Self::SizeDiffers { .. }
            | Self::TooSmall { .. }
            | Self::Misaligned { .. }
            | Self::PartOutside { .. } => libc::EINVAL,
            Self::NoSpace { .. } => libc::ENOSPC,
            Self::InUse { .. } => libc::EBUSY,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_are_listed_in_the_message() {
        let error = |pids| MapError::InUse {
            path: "/x".into(),
            wanted: LockRange::of(None),
            found: None,
            pids,
        };
        assert_eq!(
            error(vec![]).to_string(),
            "/x is in use by another cache: all of it is wanted, some or all of it is taken"
        );
        assert_eq!(
            error(vec![1, 2]).to_string(),
            "/x is in use by another cache (process 1, 2): all of it is wanted, some or all of it is taken"
        );
    }
}
