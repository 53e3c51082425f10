//! A simulated base device: a disk with a volatile cache, which completes operations late and out of order,
//! fails some of them, and loses what was not flushed when the power goes.

use super::prng::Prng;
use super::stamp::{self, Garbage, Stamp};
use crate::engine::{BaseCaps, BaseError, BaseKind, BaseOpId, BaseRequest};
use crate::pmem::MemSlice;
use std::collections::BTreeMap;

/// Who asked for an operation: a channel by number, or the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// A channel.
    Channel(usize),
    /// The background.
    Background,
}

/// What goes wrong. All off by default.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Writes, unmaps and write-zeroes that fail, in percent. What of them arrived is random.
    pub write_percent: u8,
    /// Flushes that fail, in percent. What was to be flushed may be lost.
    pub flush_percent: u8,
    /// Reads that fail, in percent.
    pub read_percent: u8,
    /// The device answers everything with [`BaseError::Gone`].
    pub gone: bool,
    /// The device answers nothing.
    pub stuck: bool,
    /// The device answers no flush.
    pub flush_stuck: bool,
    /// The device answers no read.
    pub read_stuck: bool,
    /// A block that cannot be read.
    pub bad_block: Option<u64>,
    /// Unmaps are answered with [`BaseError::Unsupported`].
    pub unmap_unsupported: bool,
}

/// The end of an operation.
#[derive(Clone, Copy, Debug)]
pub struct BaseDone {
    /// Who asked.
    pub client: Client,
    /// For what.
    pub op: BaseOpId,
    /// How it ended.
    pub result: Result<(), BaseError>,
}

#[derive(Clone, Debug)]
struct InFlight {
    client: Client,
    request: BaseRequest,
    sources: Vec<MemSlice>,
    /// When it was asked for: of a write what is to be written, of a read what it would have returned.
    data: Vec<u8>,
    /// Of a flush: it covers what was written before it was asked for, no more.
    covers: u64,
}

/// A block in the volatile cache.
#[derive(Clone, Debug)]
struct Written {
    number: u64,
    content: Vec<u8>,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct SimBase {
    block_size: usize,
    block_count: u64,
    caps: BaseCaps,
    /// What a read returns.
    current: Vec<u8>,
    /// What survives a power cut for sure.
    durable: Vec<u8>,
    /// By block: what was written since the last flush, oldest first.
    volatile: BTreeMap<u64, Vec<Written>>,
    /// Number of the last block that was written.
    written: u64,
    in_flight: Vec<InFlight>,
    /// What goes wrong from now on.
    pub faults: Faults,
    /// It claims unmaps and fails each, whatever else is well: what such an unmap has done is random.
    pub fails_unmaps: bool,
    prng: Prng,
    flush_count: u64,
    failure_count: u64,
    unmap_count: u64,
    unmap_failure_count: u64,
}

impl SimBase {
    /// A device full of zeroes.
    #[must_use]
    pub fn new(block_size_bytes: u32, block_count: u64, caps: BaseCaps, prng: Prng) -> Self {
        let len_bytes = block_size_bytes as usize * block_count as usize;
        Self {
            block_size: block_size_bytes as usize,
            block_count,
            caps,
            current: vec![0; len_bytes],
            durable: vec![0; len_bytes],
            volatile: BTreeMap::new(),
            written: 0,
            in_flight: Vec::new(),
            faults: Faults::default(),
            fails_unmaps: false,
            prng,
            flush_count: 0,
            failure_count: 0,
            unmap_count: 0,
            unmap_failure_count: 0,
        }
    }

    /// Lets every block be of the write `stamp`, durably.
    pub fn fill(&mut self, stamp: Stamp) {
        for lba in 0..self.block_count {
            let range = self.range(lba, 1);
            stamp::fill(&mut self.current[range], stamp, lba);
        }
        self.durable.copy_from_slice(&self.current);
    }

    /// Size in blocks.
    #[must_use]
    pub fn block_count(&self) -> u64 {
        self.block_count
    }

    /// Operations that have not ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// First block and length of each read that has not ended, in the order in which they were asked for.
    #[must_use]
    pub fn reads_in_flight(&self) -> Vec<(u64, u64)> {
        let is_read = |op: &&InFlight| matches!(op.request.kind, BaseKind::Read(_));
        let reads = self.in_flight.iter().filter(is_read);
        reads
            .map(|op| (op.request.lba.0, op.request.len_blocks))
            .collect()
    }

    /// Whether everything that was written is durable.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.volatile.is_empty() && self.in_flight.is_empty()
    }

    /// Whether everything that was written is durable, and nothing is being written.
    #[must_use]
    pub fn is_still(&self) -> bool {
        let is_read = |op: &InFlight| matches!(op.request.kind, BaseKind::Read(_));
        self.volatile.is_empty() && self.in_flight.iter().all(is_read)
    }

    /// Flushes that succeeded.
    #[must_use]
    pub fn flush_count(&self) -> u64 {
        self.flush_count
    }

    /// Unmaps that succeeded.
    #[must_use]
    pub fn unmap_count(&self) -> u64 {
        self.unmap_count
    }

    /// Unmaps that failed because all of them do.
    #[must_use]
    pub fn unmap_failure_count(&self) -> u64 {
        self.unmap_failure_count
    }

    /// Operations that failed, but for unmaps that always do: no read fails because of these.
    #[must_use]
    pub fn failure_count(&self) -> u64 {
        self.failure_count
    }

    fn range(&self, lba: u64, len_blocks: u64) -> std::ops::Range<usize> {
        let start = lba as usize * self.block_size;
        start..start + len_blocks as usize * self.block_size
    }

    /// What a read of these blocks returns now.
    #[must_use]
    pub fn current(&self, lba: u64, len_blocks: u64) -> &[u8] {
        &self.current[self.range(lba, len_blocks)]
    }

    /// Takes an operation.
    ///
    /// # Panics
    /// It is outside of the device, not supported, or its memory is not as long as it says.
    pub fn submit(&mut self, client: Client, request: BaseRequest, sources: &[MemSlice]) {
        let end = request.lba.0 + request.len_blocks;
        assert!(
            end <= self.block_count,
            "a base operation past the end: {request:?}"
        );
        let mut sources_of = Vec::new();
        match request.kind {
            BaseKind::Write {
                first_source,
                source_count,
            } => {
                let first = first_source as usize;
                sources_of.extend_from_slice(&sources[first..first + source_count as usize]);
            }
            BaseKind::Flush => assert!(self.caps.flush, "the base has no flush"),
            BaseKind::Unmap => assert!(self.caps.unmap, "the base has no unmap"),
            BaseKind::Read(_) | BaseKind::WriteZeroes => {}
        }
        let range = self.range(request.lba.0, request.len_blocks);
        let data = match request.kind {
            BaseKind::Read(_) => self.current[range].to_vec(),
            _ => copy_of(&sources_of),
        };
        if matches!(request.kind, BaseKind::Write { .. }) {
            assert_eq!(
                data.len(),
                self.range(request.lba.0, request.len_blocks).len()
            );
        }
        let covers = self.written;
        self.in_flight.push(InFlight {
            client,
            request,
            sources: sources_of,
            data,
            covers,
        });
    }

    /// Ends one operation, any of those under way.
    pub fn complete_one(&mut self) -> Option<BaseDone> {
        let faults = self.faults;
        let answered = |op: &InFlight| {
            let stuck = match op.request.kind {
                BaseKind::Flush => faults.flush_stuck,
                BaseKind::Read(_) => faults.read_stuck,
                _ => false,
            };
            !(faults.stuck || stuck)
        };
        let ops = (0..).zip(&self.in_flight);
        let ready: Vec<usize> = ops
            .filter(|(_, op)| answered(op))
            .map(|(at, _)| at)
            .collect();
        if ready.is_empty() {
            return None;
        }
        let at = ready[self.prng.index(ready.len())];
        let op = self.in_flight.swap_remove(at);
        let result = self.run(&op);
        let is_unmap = matches!(op.request.kind, BaseKind::Unmap);
        if is_unmap && self.fails_unmaps {
            self.unmap_failure_count += 1;
        } else {
            self.failure_count += u64::from(result.is_err());
            self.unmap_count += u64::from(is_unmap && result.is_ok());
        }
        Some(BaseDone {
            client: op.client,
            op: op.request.op,
            result,
        })
    }

    fn run(&mut self, op: &InFlight) -> Result<(), BaseError> {
        if matches!(op.request.kind, BaseKind::Write { .. }) {
            assert_eq!(
                op.data,
                copy_of(&op.sources),
                "the source of a base write has changed under it"
            );
        }
        if self.faults.gone {
            return Err(BaseError::Gone);
        }
        let failed = |prng: &mut Prng, percent| {
            if prng.percent(percent) {
                Err(BaseError::Io)
            } else {
                Ok(())
            }
        };
        let (lba, len) = (op.request.lba.0, op.request.len_blocks);
        match op.request.kind {
            BaseKind::Read(mut cursor) => {
                let bad = self.faults.bad_block;
                let result = match bad.is_some_and(|bad| (lba..lba + len).contains(&bad)) {
                    true => Err(BaseError::Io),
                    false => failed(&mut self.prng, self.faults.read_percent),
                };
                for block in 0..if result.is_ok() { len } else { 0 } {
                    // Each block is read at some moment while the operation is under way.
                    if self.prng.percent(50) {
                        cursor.write_from(&op.data[self.range(block, 1)]);
                    } else {
                        cursor.write_from(&self.current[self.range(lba + block, 1)]);
                    }
                }
                result
            }
            BaseKind::Flush => {
                let result = failed(&mut self.prng, self.faults.flush_percent);
                self.settle(op.covers, result.is_ok());
                result
            }
            BaseKind::Unmap if self.faults.unmap_unsupported => Err(BaseError::Unsupported),
            BaseKind::Write { .. } | BaseKind::Unmap | BaseKind::WriteZeroes => {
                let always = self.fails_unmaps && matches!(op.request.kind, BaseKind::Unmap);
                let percent = if always {
                    100
                } else {
                    self.faults.write_percent
                };
                let result = failed(&mut self.prng, percent);
                for block in 0..len {
                    if result.is_ok() || self.prng.percent(50) {
                        let content = self.content_of(op, block);
                        self.write_block(lba + block, content);
                    }
                }
                result
            }
        }
    }

    fn content_of(&self, op: &InFlight, block: u64) -> Vec<u8> {
        match op.request.kind {
            BaseKind::Write { .. } => op.data[self.range(block, 1)].to_vec(),
            _ => vec![0; self.block_size],
        }
    }

    fn write_block(&mut self, lba: u64, content: Vec<u8>) {
        let range = self.range(lba, 1);
        self.current[range.clone()].copy_from_slice(&content);
        if self.caps.flush {
            self.written += 1;
            let number = self.written;
            self.volatile
                .entry(lba)
                .or_default()
                .push(Written { number, content });
        } else {
            self.durable[range].copy_from_slice(&content);
        }
    }

    /// After a flush: what it covers is durable, or, if it failed, any of what was written may be lost for
    /// good.
    fn settle(&mut self, covers: u64, flushed: bool) {
        self.flush_count += u64::from(flushed);
        for (lba, mut versions) in std::mem::take(&mut self.volatile) {
            let range = self.range(lba, 1);
            let kept = if flushed {
                versions
                    .iter()
                    .filter(|version| version.number <= covers)
                    .count()
            } else {
                self.prng.index(versions.len() + 1)
            };
            if kept > 0 {
                self.durable[range.clone()].copy_from_slice(&versions[kept - 1].content);
            }
            versions.drain(..kept);
            if flushed && !versions.is_empty() {
                self.volatile.insert(lba, versions);
            } else {
                self.current[range.clone()].copy_from_slice(&self.durable[range]);
            }
        }
    }

    /// What a power cut now could leave: by block, the contents it may have besides the durable one.
    #[must_use]
    pub fn uncertain(&self) -> BTreeMap<u64, Vec<Vec<u8>>> {
        let contents =
            |versions: &Vec<Written>| versions.iter().map(|v| v.content.clone()).collect();
        let volatile = self.volatile.iter();
        let mut uncertain: BTreeMap<u64, Vec<Vec<u8>>> = volatile
            .map(|(lba, versions)| (*lba, contents(versions)))
            .collect();
        for op in &self.in_flight {
            if matches!(op.request.kind, BaseKind::Read(_) | BaseKind::Flush) {
                continue;
            }
            for block in 0..op.request.len_blocks {
                let versions = uncertain.entry(op.request.lba.0 + block).or_default();
                versions.push(self.content_of(op, block));
            }
        }
        uncertain
    }

    /// Which write a block is of after a power cut that takes everything it may.
    ///
    /// # Errors
    /// It is of none.
    pub fn durable_stamp(&self, lba: u64) -> Result<Stamp, Garbage> {
        stamp::read(&self.durable[self.range(lba, 1)], lba)
    }

    /// What every block may be after a power cut now: the durable content first.
    #[must_use]
    pub fn stamps_after_cut(&self) -> Vec<Vec<Result<Stamp, Garbage>>> {
        let mut stamps: Vec<Vec<_>> = (0..self.block_count)
            .map(|lba| vec![self.durable_stamp(lba)])
            .collect();
        for (lba, contents) in self.uncertain() {
            let versions = contents.iter().map(|content| stamp::read(content, lba));
            stamps[lba as usize].extend(versions);
        }
        stamps
    }

    /// One of the states that a power cut now could leave.
    #[must_use]
    pub fn crash_image(&self, prng: &mut Prng) -> BaseImage {
        let mut bytes = self.durable.clone();
        // Often all or nothing: a mere mixture would rarely be one of these.
        let style = prng.below(4);
        for (lba, versions) in self.uncertain() {
            let choice = match style {
                0 => 0,
                1 => versions.len(),
                _ => prng.index(versions.len() + 1),
            };
            if choice > 0 {
                bytes[self.range(lba, 1)].copy_from_slice(&versions[choice - 1]);
            }
        }
        BaseImage {
            block_size: self.block_size,
            bytes,
        }
    }

    /// One of the states that the device may be in after the death of the process that uses it: it keeps
    /// its power, and does or drops what was under way.
    #[must_use]
    pub fn kill_image(&self, prng: &mut Prng) -> BaseImage {
        let mut bytes = self.current.clone();
        for op in &self.in_flight {
            if matches!(op.request.kind, BaseKind::Read(_) | BaseKind::Flush) || prng.percent(50) {
                continue;
            }
            for block in 0..op.request.len_blocks {
                let content = self.content_of(op, block);
                bytes[self.range(op.request.lba.0 + block, 1)].copy_from_slice(&content);
            }
        }
        BaseImage {
            block_size: self.block_size,
            bytes,
        }
    }

    /// What a read of the whole device returns now.
    #[must_use]
    pub fn current_image(&self) -> BaseImage {
        BaseImage {
            block_size: self.block_size,
            bytes: self.current.clone(),
        }
    }

    /// The machine starts again: this is what the device holds now. Nothing is under way, nothing fails.
    pub fn restart(&mut self, image: &BaseImage) {
        self.current.copy_from_slice(&image.bytes);
        self.durable.copy_from_slice(&image.bytes);
        self.volatile.clear();
        self.in_flight.clear();
        self.faults = Faults::default();
    }
}

fn copy_of(sources: &[MemSlice]) -> Vec<u8> {
    let mut data = vec![0; sources.iter().map(MemSlice::len_bytes).sum()];
    let mut at = 0;
    for source in sources {
        let end = at + source.len_bytes();
        source
            .copy_to(&mut data[at..end])
            .expect("memory from the heap");
        at = end;
    }
    data
}

/// The content of a base device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseImage {
    block_size: usize,
    bytes: Vec<u8>,
}

impl BaseImage {
    /// Some blocks.
    #[must_use]
    pub fn blocks(&self, lba: u64, len_blocks: u64) -> &[u8] {
        let start = lba as usize * self.block_size;
        &self.bytes[start..start + len_blocks as usize * self.block_size]
    }

    /// Which write a block is of.
    ///
    /// # Errors
    /// It is of none.
    pub fn stamp(&self, lba: u64) -> Result<Stamp, Garbage> {
        stamp::read(self.blocks(lba, 1), lba)
    }
}
