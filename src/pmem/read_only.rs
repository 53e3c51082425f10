//! A cache device that is only read: nothing in here can change a byte of it.
//!
//! A file is read by system calls, so that memory which cannot be read is an error instead of a signal, and
//! so that looking at a hole in a file does not fill it. Device-DAX knows no reads and is mapped.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::backing::{self, Part, Sharing};
use super::dax::Backing;
use super::mapped::Mapping;
use super::{MapError, PmemRead, Poisoned, bounds};
use crate::units::PmemOff;

/// See the module.
#[derive(Debug)]
pub struct ReadOnlyPmem {
    len_bytes: u64,
    source: Source,
    /// Holds the lock.
    file: File,
}

#[derive(Debug)]
enum Source {
    File {
        /// Where what is read begins in it.
        offset_bytes: u64,
    },
    Mapping(Mapping),
}

impl ReadOnlyPmem {
    /// Opens an existing cache device, or a part of it.
    ///
    /// # Errors
    /// See [`MapError`].
    pub fn open(path: &Path, part: Option<Part>, sharing: Sharing) -> Result<Self, MapError> {
        let opened = backing::open_to_read(path, part, sharing)?;
        let source = match opened.backing {
            Backing::DevDax => {
                let map = Mapping::new(&opened, libc::PROT_READ, libc::MAP_SHARED);
                Source::Mapping(map.map_err(backing::io_error(path, "map"))?)
            }
            Backing::Hugetlbfs | Backing::Tmpfs | Backing::File => Source::File {
                offset_bytes: opened.offset_bytes,
            },
        };
        Ok(Self {
            len_bytes: opened.size_bytes,
            source,
            file: opened.file,
        })
    }
}

impl PmemRead for ReadOnlyPmem {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read(&self, off: PmemOff, buf: &mut [u8]) -> Result<(), Poisoned> {
        bounds::range_at(off, buf.len() as u64, self.len_bytes);
        match &self.source {
            Source::Mapping(map) => map.copy_to(off, buf),
            // Whatever the reason, the bytes cannot be had.
            Source::File { offset_bytes } => self
                .file
                .read_exact_at(buf, offset_bytes + off.0)
                .map_err(|_| Poisoned { at: off }),
        }
    }
}
