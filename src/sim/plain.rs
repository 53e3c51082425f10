//! A cache over a base that does everything at once and never fails, driven one request after the other:
//! for histories in which only the cache and its media matter.

use super::recover;
use crate::engine::{
    Background, BaseError, BaseKind, BaseRequest, Budget, Cache, Channel, HostIo, IoToken, Op,
    OpenOptions, Outbox, Status,
};
use crate::pmem::{IovBuf, Pmem};
use crate::recovery::OpenError;
use crate::units::{Lba, NS_PER_MS, Now};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Polls after which a request counts as stuck, and again after it was given up.
const POLLS_MAX: usize = 5_000;
const CHANNEL_COUNT: usize = 2;

/// When the background works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackgroundRuns {
    /// In drains only, so that what is dirty, and what is cached, depends on nothing but the requests.
    InDrains,
    /// Also while a request is under way.
    Always,
}

/// See the module.
#[derive(Debug)]
pub struct Plain<P: Pmem> {
    /// What the base holds.
    pub base: Vec<u8>,
    /// The cache.
    pub cache: Arc<Cache<P>>,
    /// Blocks that a request read from the base.
    pub missed: BTreeSet<u64>,
    block_size: usize,
    channels: Vec<Channel<P>>,
    background: Background<P>,
    background_runs: BackgroundRuns,
    out: Outbox,
    now: Now,
}

/// Opens, or formats, as `options` say, over a base that holds these bytes.
///
/// # Errors
/// The cache is refused.
pub fn open<P: Pmem>(
    pmem: P,
    base: &[u8],
    options: OpenOptions,
) -> Result<Arc<Cache<P>>, OpenError> {
    let block_size = options.base.block_size_bytes as usize;
    recover::open(pmem, options, |lba, len| {
        &base[lba as usize * block_size..][..len as usize * block_size]
    })
}

impl<P: Pmem> Plain<P> {
    /// Opens, or formats, as `options` say.
    ///
    /// # Errors
    /// The cache is refused.
    pub fn new(
        pmem: P,
        base: Vec<u8>,
        options: OpenOptions,
        background_runs: BackgroundRuns,
    ) -> Result<Self, OpenError> {
        let block_size = options.base.block_size_bytes as usize;
        let cache = open(pmem, &base, options)?;
        let channel = || cache.channel().expect("fewer than there can be");
        Ok(Self {
            channels: (0..CHANNEL_COUNT).map(|_| channel()).collect(),
            background: cache.background().expect("the cache is new"),
            background_runs,
            out: Outbox::new(),
            now: Now(0),
            missed: BTreeSet::new(),
            block_size,
            base,
            cache,
        })
    }

    /// The cache device.
    #[must_use]
    pub fn pmem(&self) -> &P {
        &self.cache.pmem
    }

    /// Runs a request to its end. One that gets nowhere is given up.
    ///
    /// # Panics
    /// It does not complete even so.
    pub fn run(&mut self, channel: usize, op: Op, lba: u64, len_blocks: u64) -> Status {
        let token = IoToken(1);
        let io = HostIo {
            token,
            op,
            lba: Lba(lba),
            len_blocks,
        };
        let channel = channel % CHANNEL_COUNT;
        assert!(self.channels[channel].submit(io).is_ok(), "it was idle");
        for poll in 0..2 * POLLS_MAX {
            if poll == POLLS_MAX {
                self.channels[channel].abort_waiting();
            }
            if let Some(status) = self.poll_channel(channel) {
                return status;
            }
            if self.background_runs == BackgroundRuns::Always {
                self.poll_background();
            }
        }
        let (health, info) = (self.cache.health(), self.cache.info());
        panic!("{io:?} does not complete: {health:?}, {info:?}");
    }

    /// One of its channels.
    #[must_use]
    pub fn channel(&self, number: usize) -> &Channel<P> {
        &self.channels[number]
    }

    /// One of its channels.
    pub fn channel_mut(&mut self, number: usize) -> &mut Channel<P> {
        &mut self.channels[number]
    }

    /// A turn for a channel. Returns how a request ended, if one did.
    pub fn poll_channel(&mut self, channel: usize) -> Option<Status> {
        self.now.0 += NS_PER_MS;
        self.out.clear();
        self.channels[channel].poll(self.now, &mut self.out);
        let status = self.out.completions.first().map(|done| done.status);
        for request in std::mem::take(&mut self.out.base) {
            let first = request.lba.0;
            self.missed.extend(first..first + request.len_blocks);
            let result = self.base_op(&request);
            self.channels[channel].on_base_done(request.op, result);
        }
        status
    }

    /// A turn for the background.
    pub fn poll_background(&mut self) {
        self.now.0 += NS_PER_MS;
        self.out.clear();
        self.background
            .poll(self.now, Budget::default(), &mut self.out);
        for request in std::mem::take(&mut self.out.base) {
            let result = self.base_op(&request);
            self.background.on_base_done(request.op, result, self.now);
        }
    }

    fn base_op(&mut self, request: &BaseRequest) -> Result<(), BaseError> {
        let start = request.lba.0 as usize * self.block_size;
        let end = start + request.len_blocks as usize * self.block_size;
        match request.kind {
            BaseKind::Read(mut cursor) => cursor.write_from(&self.base[start..end]),
            BaseKind::Write {
                first_source,
                source_count,
            } => {
                let mut at = start;
                let first = first_source as usize;
                for slice in &self.out.sources[first..first + source_count as usize] {
                    slice
                        .copy_to(&mut self.base[at..at + slice.len_bytes()])
                        .expect("memory from the heap");
                    at += slice.len_bytes();
                }
                assert_eq!(at, end);
            }
            BaseKind::Unmap | BaseKind::WriteZeroes => self.base[start..end].fill(0),
            BaseKind::Flush => {}
        }
        Ok(())
    }

    /// Reads some blocks.
    pub fn read(&mut self, channel: usize, lba: u64, len_blocks: u64) -> (Status, Vec<u8>) {
        let buf = IovBuf::zeroed(len_blocks as usize * self.block_size);
        let status = self.run(channel, Op::Read(buf.cursor()), lba, len_blocks);
        (status, buf.bytes())
    }

    /// Everything that is dirty goes to the base. `false`: it does not get there.
    #[must_use]
    pub fn drain(&mut self) -> bool {
        self.cache.drain_start();
        for _ in 0..POLLS_MAX {
            self.poll_background();
            if !self.cache.drain_status().in_progress {
                return true;
            }
        }
        false
    }
}
