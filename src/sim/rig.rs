//! A cache over any cache device and a base that does everything at once, driven one request at a time: for
//! tests that ask what the engine does to the device, not in which order things may happen.

use super::recover;
use crate::engine::{
    Background, BaseError, BaseKind, BaseRequest, Cache, Channel, Fua, HostIo, IoToken, Op,
    OpenOptions, Outbox, Status,
};
use crate::pmem::{IovBuf, Pmem};
use crate::recovery::OpenError;
use crate::units::{Lba, NS_PER_MS, Now};
use std::sync::Arc;

/// Polls that one request, or a drain, may take.
const POLLS_MAX: usize = 100_000;

/// See the module.
#[derive(Debug)]
pub struct Rig<P: Pmem> {
    /// What the base holds.
    pub base: Vec<u8>,
    cache: Arc<Cache<P>>,
    channel: Channel<P>,
    background: Background<P>,
    out: Outbox,
    now: Now,
    block_size_bytes: usize,
    next_token: u64,
}

impl<P: Pmem> Rig<P> {
    /// Opens, or formats, as `options` say.
    ///
    /// # Errors
    /// The cache is refused.
    ///
    /// # Panics
    /// The cache has no channel to give, which a new one has.
    pub fn open(pmem: P, base: Vec<u8>, options: OpenOptions) -> Result<Self, OpenError> {
        let block_size_bytes = options.base.block_size_bytes as usize;
        let cache = recover::open(pmem, options, |lba, len_blocks| {
            &base[lba as usize * block_size_bytes..][..len_blocks as usize * block_size_bytes]
        })?;
        let channel = cache.channel().expect("a new cache has channels");
        let background = cache.background().expect("a new cache has its background");
        Ok(Self {
            base,
            cache,
            channel,
            background,
            out: Outbox::new(),
            now: Now(0),
            block_size_bytes,
            next_token: 0,
        })
    }

    /// Lets go of the cache device. Returns what the base holds.
    #[must_use]
    pub fn close(self) -> Vec<u8> {
        self.base
    }

    /// The cache.
    #[must_use]
    pub fn cache(&self) -> &Cache<P> {
        &self.cache
    }

    /// Polls everything until a request has completed.
    ///
    /// # Panics
    /// It does not complete.
    pub fn run(&mut self, op: Op, lba: u64, len_blocks: u64) -> Status {
        self.next_token += 1;
        let token = IoToken(self.next_token);
        let taken = self.channel.submit(HostIo {
            token,
            op,
            lba: Lba(lba),
            len_blocks,
        });
        assert!(taken.is_ok(), "one request has room");
        for _ in 0..POLLS_MAX {
            if let Some(status) = self.step() {
                return status;
            }
        }
        panic!(
            "request {token:?} does not complete: {:?}",
            self.cache.info()
        );
    }

    /// Writes `bytes`, given as a scatter list that is cut at `cuts`.
    ///
    /// # Panics
    /// The write fails.
    pub fn write(&mut self, lba: u64, bytes: &[u8], cuts: &[usize], fua: Fua) {
        let buf = IovBuf::new(bytes, cuts);
        let len_blocks = (bytes.len() / self.block_size_bytes) as u64;
        let status = self.run(Op::Write(buf.cursor(), fua), lba, len_blocks);
        assert_eq!(status, Status::Success);
    }

    /// Reads.
    ///
    /// # Panics
    /// The read fails.
    pub fn read(&mut self, lba: u64, len_blocks: u64) -> Vec<u8> {
        let buf = IovBuf::zeroed(len_blocks as usize * self.block_size_bytes);
        let status = self.run(Op::Read(buf.cursor()), lba, len_blocks);
        assert_eq!(status, Status::Success);
        buf.bytes()
    }

    /// Everything that is dirty goes to the base.
    ///
    /// # Panics
    /// It does not.
    pub fn drain(&mut self) {
        self.cache.drain_start();
        for _ in 0..POLLS_MAX {
            if !self.cache.drain_status().in_progress {
                return;
            }
            self.step();
        }
        panic!("the drain does not end: {:?}", self.cache.info());
    }

    /// A turn for everybody.
    fn step(&mut self) -> Option<Status> {
        self.now.0 += NS_PER_MS;
        self.out.clear();
        self.channel.poll(self.now, &mut self.out);
        let status = self
            .out
            .completions
            .first()
            .map(|completion| completion.status);
        for request in std::mem::take(&mut self.out.base) {
            let result = self.base_op(&request);
            self.channel.on_base_done(request.op, result);
        }
        self.out.clear();
        self.background.poll(self.now, &mut self.out);
        for request in std::mem::take(&mut self.out.base) {
            let result = self.base_op(&request);
            self.background.on_base_done(request.op, result);
        }
        status
    }

    fn base_op(&mut self, request: &BaseRequest) -> Result<(), BaseError> {
        let start = request.lba.0 as usize * self.block_size_bytes;
        let end = start + request.len_blocks as usize * self.block_size_bytes;
        match request.kind {
            BaseKind::Read(mut cursor) => cursor.write_from(&self.base[start..end]),
            BaseKind::Write {
                first_source,
                source_count,
            } => {
                let mut at = start;
                let first = first_source as usize;
                for slice in &self.out.sources[first..first + source_count as usize] {
                    slice.copy_to(&mut self.base[at..at + slice.len_bytes()]);
                    at += slice.len_bytes();
                }
                assert_eq!(at, end, "the pieces of a write are as long as the write");
            }
            BaseKind::Unmap | BaseKind::WriteZeroes => self.base[start..end].fill(0),
            BaseKind::Flush => {}
        }
        Ok(())
    }
}
