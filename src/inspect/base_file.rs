//! The base device without SPDK: a file or a block device.

use super::InspectError;
use crate::engine::{BaseKind, BaseRequest, ZeroesWent};
use crate::pmem::MemSlice;
use crate::units::Lba;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Zeroes are written in pieces of this size where a hole cannot be made.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// What is to be done with a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseAccess {
    /// Nothing of it is changed, and others may use it.
    Read,
    /// Nobody else may use it.
    Write,
}

/// See the module.
#[derive(Debug)]
pub struct BaseFile {
    file: File,
    path: PathBuf,
    block_size_bytes: u32,
    block_count: u64,
    buf: Vec<u8>,
    zeroes_went: ZeroesWent,
}

impl BaseFile {
    /// Opens a base. To be written it must be free: a block device neither mounted nor opened exclusively, a
    /// file not locked (flock). It stays so until this is dropped.
    ///
    /// # Errors
    /// It is none, or in use, or cannot be opened.
    pub fn open(
        path: &Path,
        access: BaseAccess,
        block_size_bytes: u32,
    ) -> Result<Self, InspectError> {
        let failed = |what| io_error(path, what);
        let write = access == BaseAccess::Write;
        let kind = fs::metadata(path).map_err(failed("look at"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let (path, found) = (path.to_owned(), describe(kind));
            return Err(InspectError::BaseType { path, found });
        }
        // Of a block device, O_EXCL without O_CREAT asks the kernel for sole use.
        let exclusive = write && kind.is_block_device();
        let opened = OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(if exclusive { libc::O_EXCL } else { 0 })
            .open(path);
        let in_use = || InspectError::BaseInUse {
            path: path.to_owned(),
        };
        let mut file = match opened {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => return Err(in_use()),
            opened => opened.map_err(failed("open"))?,
        };
        if write && kind.is_file() {
            file.try_lock().map_err(|error| match error {
                fs::TryLockError::WouldBlock => in_use(),
                fs::TryLockError::Error(error) => failed("lock")(error),
            })?;
        }
        let size_bytes = file
            .seek(SeekFrom::End(0))
            .map_err(failed("ask for the size of"))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            block_size_bytes,
            // As SPDK's aio bdev counts: what is left behind the last whole block is not used.
            block_count: size_bytes / u64::from(block_size_bytes),
            buf: Vec::new(),
            zeroes_went: ZeroesWent::default(),
        })
    }

    /// Size in blocks.
    #[must_use]
    pub fn block_count(&self) -> u64 {
        self.block_count
    }

    fn off(&self, lba: Lba) -> u64 {
        lba.0 * u64::from(self.block_size_bytes)
    }

    /// Fills `buf` from a block on.
    ///
    /// # Errors
    /// The base cannot be read.
    pub fn read(&self, lba: Lba, buf: &mut [u8]) -> Result<(), InspectError> {
        let read = self.file.read_exact_at(buf, self.off(lba));
        read.map_err(io_error(&self.path, "read"))
    }

    /// How zeroes went there: written, for want of holes, or not.
    #[must_use]
    pub fn zeroes_went(&self) -> ZeroesWent {
        self.zeroes_went
    }

    /// Carries out what write-back asks for. `sources` is the memory that its writes refer to.
    ///
    /// # Errors
    /// The base has not done it.
    pub fn run(&mut self, request: &BaseRequest, sources: &[MemSlice]) -> Result<(), InspectError> {
        let off = self.off(request.lba);
        let len_bytes = request.len_blocks * u64::from(self.block_size_bytes);
        let (what, done) = match request.kind {
            BaseKind::Write {
                first_source,
                source_count,
            } => {
                let (first, count) = (first_source as usize, source_count as usize);
                ("write to", self.write(off, &sources[first..first + count]))
            }
            BaseKind::Unmap | BaseKind::WriteZeroes => ("zero", self.zero(off, len_bytes)),
            BaseKind::Flush => ("flush", self.file.sync_data()),
            BaseKind::Read(_) => unreachable!("write-back does not read the base"),
        };
        done.map_err(io_error(&self.path, what))
    }

    fn write(&mut self, off: u64, sources: &[MemSlice]) -> io::Result<()> {
        self.buf.clear();
        for source in sources {
            let start = self.buf.len();
            self.buf.resize(start + source.len_bytes(), 0);
            source
                .copy_to(&mut self.buf[start..])
                .map_err(io::Error::other)?;
        }
        self.file.write_all_at(&self.buf, off)
    }

    /// Lets a range read as zeroes: a hole where that can be, since what an application unmapped may be most
    /// of the base.
    fn zero(&mut self, off: u64, len_bytes: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match rustix::fs::fallocate(&self.file, flags, off, len_bytes) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                // Not known here, or not for a range that is cut so.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => break,
                Err(error) => return Err(error.into()),
            }
        }
        self.zeroes_went = ZeroesWent::AsData;
        let (mut at, end) = (off, off + len_bytes);
        while at < end {
            let len = (end - at).min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..len as usize], at)?;
            at += len;
        }
        Ok(())
    }
}

fn io_error(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> InspectError + use<> {
    let path = path.to_owned();
    move |error| InspectError::BaseIo { path, what, error }
}

fn describe(kind: fs::FileType) -> &'static str {
    if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else {
        "neither a file nor a block device"
    }
}
