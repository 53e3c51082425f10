//! A cache of which every request succeeds, and which has one channel: for tests that ask what the engine does
//! to the device.

use super::plain::{BackgroundRuns, Plain};
use crate::engine::{Cache, Fua, Op, OpenOptions, Status};
use crate::pmem::{IovBuf, Pmem};
use crate::recovery::OpenError;

/// See the module.
#[derive(Debug)]
pub struct Rig<P: Pmem> {
    plain: Plain<P>,
    block_size_bytes: usize,
}

impl<P: Pmem> Rig<P> {
    /// Opens, or formats, as `options` say.
    ///
    /// # Errors
    /// The cache is refused.
    pub fn open(pmem: P, base: Vec<u8>, options: OpenOptions) -> Result<Self, OpenError> {
        let block_size_bytes = options.base.block_size_bytes as usize;
        Ok(Self {
            plain: Plain::new(pmem, base, options, BackgroundRuns::Always)?,
            block_size_bytes,
        })
    }

    /// Lets go of the cache device. Returns what the base holds.
    #[must_use]
    pub fn close(self) -> Vec<u8> {
        self.plain.base
    }

    /// The cache.
    #[must_use]
    pub fn cache(&self) -> &Cache<P> {
        &self.plain.cache
    }

    /// The cache device.
    #[must_use]
    pub fn pmem(&self) -> &P {
        self.plain.pmem()
    }

    /// What the base holds.
    #[must_use]
    pub fn base(&self) -> &[u8] {
        &self.plain.base
    }

    /// Runs a request to its end.
    ///
    /// # Panics
    /// It does not complete, or fails.
    pub fn run(&mut self, op: Op, lba: u64, len_blocks: u64) {
        let status = self.plain.run(0, op, lba, len_blocks);
        assert_eq!(status, Status::Success, "{op:?} at block {lba}");
    }

    /// Writes `bytes`, given as a scatter list that is cut at `cuts`.
    ///
    /// # Panics
    /// The write fails.
    pub fn write(&mut self, lba: u64, bytes: &[u8], cuts: &[usize], fua: Fua) {
        let buf = IovBuf::new(bytes, cuts);
        let len_blocks = (bytes.len() / self.block_size_bytes) as u64;
        self.run(Op::Write(buf.cursor(), fua), lba, len_blocks);
    }

    /// Reads.
    ///
    /// # Panics
    /// The read fails.
    pub fn read(&mut self, lba: u64, len_blocks: u64) -> Vec<u8> {
        let (status, bytes) = self.plain.read(0, lba, len_blocks);
        assert_eq!(status, Status::Success, "a read of block {lba}");
        bytes
    }

    /// Everything that is dirty goes to the base.
    ///
    /// # Panics
    /// It does not.
    pub fn drain(&mut self) {
        assert!(self.plain.drain(), "{:?}", self.plain.cache.info());
    }
}
