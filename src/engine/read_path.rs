//! Reads: hits are copied from the mapping, only what is missing is read from the base, straight into the
//! caller's memory, and may then be put into the cache.

use super::cache::Cache;
use super::channel::{COMPLETIONS_PER_POLL, Core, RequestId};
use super::io::{BaseError, BaseKind, BaseOpId, BaseRequest, Outbox, Status};
use crate::index::{BlockMap, Version};
use crate::media::Place;
use crate::pmem::{IovCursor, Pmem};
use crate::units::{Lba, Page};
use std::sync::atomic::Ordering;

/// A miss of more pages is not put into the cache: it is likely part of a scan, and streams well by itself.
pub(super) const FILL_PAGES_MAX: usize = 64;
/// How many pages ahead the index is asked for.
const PREFETCH_PAGES: u64 = 8;

/// How far a read is.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReadState {
    cursor: IovCursor,
    /// Blocks dealt with: copied, or asked from the base.
    done_blocks: u64,
    /// Base reads under way.
    pub(super) pending: u32,
    hit: bool,
    missed: bool,
    failed: bool,
}

impl ReadState {
    pub(super) fn new(cursor: IovCursor) -> Self {
        Self {
            cursor,
            done_blocks: 0,
            pending: 0,
            hit: false,
            missed: false,
            failed: false,
        }
    }
}

/// A base read for blocks that are not cached.
#[derive(Clone, Copy, Debug)]
pub(super) struct Miss {
    pub(super) request: RequestId,
    pub(super) lba: Lba,
    pub(super) len_blocks: u64,
    /// Where in the caller's memory the blocks go.
    pub(super) cursor: IovCursor,
    /// Of the bucket of each page when it was found missing.
    pub(super) versions: [Version; FILL_PAGES_MAX],
    /// Whether it may be put into the cache.
    pub(super) admitted: bool,
    pub(super) result: Option<Result<(), BaseError>>,
}

/// Neighbouring blocks that come from the same source.
#[derive(Clone, Copy, Debug)]
struct Run {
    source: BlockMap,
    lba: Lba,
    len_blocks: u64,
}

impl Run {
    fn continues(&self, source: BlockMap) -> bool {
        match (self.source, source) {
            (BlockMap::Mapped(first), BlockMap::Mapped(next)) => {
                first.0 + self.len_blocks == next.0
            }
            (BlockMap::Zero(_), BlockMap::Zero(_)) | (BlockMap::Absent, BlockMap::Absent) => true,
            _ => false,
        }
    }
}

/// Nothing more can be done for this read now.
pub(super) struct Blocked;

/// A read while it is worked on: the state is written back at the end.
struct Reader<'a, P> {
    cache: &'a Cache<P>,
    id: RequestId,
    state: ReadState,
    run: Option<Run>,
    /// How many of [`Core::run_versions`] are the run's; more, if there was no room for them.
    version_count: usize,
}

impl Core {
    pub(super) fn poll_reads<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        for _ in 0..self.reads.len() {
            if out.completions.len() >= COMPLETIONS_PER_POLL {
                return;
            }
            let Some(id) = self.reads.pop_front() else {
                return;
            };
            match self.run_read(cache, id, out) {
                Ok(()) => self.end_read_if_done(cache, id, out),
                Err(Blocked) => self.reads.push_back(id),
            }
        }
    }

    /// Goes through the blocks of a read that have not been dealt with.
    fn run_read<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        id: RequestId,
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let Some(request) = self.requests.get(id) else {
            return Ok(());
        };
        let Some(state) = request.read else {
            return Ok(());
        };
        let (first, len) = (request.io.lba.0, request.io.len_blocks);
        let mut reader = Reader {
            cache,
            id,
            state,
            run: None,
            version_count: 0,
        };
        let result = self.walk(&mut reader, first + state.done_blocks, first + len, out);
        if let Some(request) = self.requests.get_mut(id) {
            request.read = Some(reader.state);
        }
        result
    }

    fn walk<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        start: u64,
        end: u64,
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let index = &reader.cache.index;
        let per_page = u64::from(index.geometry().blocks_per_page());
        let mut lba = start;
        while lba < end {
            let page = lba / per_page;
            if page + PREFETCH_PAGES <= (end - 1) / per_page {
                index.prefetch(index.locate(Page(page + PREFETCH_PAGES)));
            }
            let Some(found) = index.lookup(index.locate(Page(page))) else {
                self.end_run(reader, out)?;
                return Err(Blocked);
            };
            let page_end = ((page + 1) * per_page).min(end);
            while lba < page_end {
                // A page has 8 blocks at most.
                let source = found.map.block((lba % per_page) as u32);
                self.extend_run(reader, source, Lba(lba), found.version, out)?;
                lba += 1;
            }
        }
        self.end_run(reader, out)
    }

    /// Adds a block to the run, or ends the run and starts another with it.
    #[inline]
    fn extend_run<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        source: BlockMap,
        lba: Lba,
        version: Version,
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let per_page = u64::from(reader.cache.geometry.blocks_per_page());
        match &mut reader.run {
            Some(run) if run.continues(source) => run.len_blocks += 1,
            _ => {
                self.end_run(reader, out)?;
                reader.run = Some(Run {
                    source,
                    lba,
                    len_blocks: 1,
                });
                reader.version_count = 0;
            }
        }
        let first_of_page = lba.0.is_multiple_of(per_page) || reader.version_count == 0;
        if source == BlockMap::Absent && first_of_page {
            if let Some(slot) = self.run_versions.get_mut(reader.version_count) {
                *slot = version;
            }
            reader.version_count += 1;
        }
        Ok(())
    }

    /// Serves the run that was gathered.
    fn end_run<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let Some(run) = reader.run.take() else {
            return Ok(());
        };
        let bytes = reader.cache.geometry.bytes(run.len_blocks);
        match run.source {
            BlockMap::Mapped(place) => self.serve_hit(reader, &run, place, bytes, out)?,
            BlockMap::Zero(_) => {
                reader.state.cursor.zero(bytes as usize);
                reader.state.hit = true;
            }
            BlockMap::Absent => self.start_miss(reader, &run, bytes, out)?,
        }
        reader.state.done_blocks += run.len_blocks;
        Ok(())
    }

    fn serve_hit<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        run: &Run,
        place: Place,
        bytes: u64,
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let cache = reader.cache;
        let mut cursor = reader.state.cursor;
        if cache
            .pmem
            .read_to(cache.geometry.place_off(place), &mut cursor, bytes)
            .is_ok()
        {
            reader.state.cursor = cursor;
            reader.state.hit = true;
            return Ok(());
        }
        self.counters(cache).poisoned_reads.add(1);
        if cache.is_clean(place) {
            // The base holds the same.
            reader.version_count = usize::MAX;
            return self.start_miss(reader, run, bytes, out);
        }
        reader.state.cursor.advance(bytes as usize);
        reader.state.failed = true;
        Ok(())
    }

    /// Asks the base for a run.
    fn start_miss<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        run: &Run,
        bytes: u64,
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let miss = Miss {
            request: reader.id,
            lba: run.lba,
            len_blocks: run.len_blocks,
            cursor: reader.state.cursor,
            versions: self.run_versions,
            // What is larger than a write may never fit into a segment.
            admitted: reader.version_count <= FILL_PAGES_MAX
                && bytes <= reader.cache.write_size_max_bytes(),
            result: None,
        };
        let op = self.misses.insert(miss).ok_or(Blocked)?;
        self.counters(reader.cache).base_read_bytes.add(bytes);
        reader.cache.base_reads.fetch_add(1, Ordering::Relaxed);
        out.base.push(BaseRequest {
            op: BaseOpId(op),
            kind: BaseKind::Read(reader.state.cursor),
            lba: run.lba,
            len_blocks: run.len_blocks,
        });
        reader.state.cursor.advance(bytes as usize);
        reader.state.pending += 1;
        reader.state.missed = true;
        Ok(())
    }

    /// Looks at the base reads that have ended. Those that may be put into the cache wait for the batch.
    pub(super) fn finish_misses<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        while let Some(op) = self.misses_done.pop_front() {
            let fill = self
                .misses
                .get(op)
                .is_some_and(|miss| miss.admitted && miss.result == Some(Ok(())));
            if fill {
                self.fills.push_back(op);
            } else {
                self.settle_miss(cache, op, out);
            }
        }
    }

    /// A miss is dealt with; so is its request, if it was the last.
    pub(super) fn settle_miss<P: Pmem>(&mut self, cache: &Cache<P>, op: u32, out: &mut Outbox) {
        let Some(miss) = self.misses.remove(op) else {
            return;
        };
        let request = self.requests.get_mut(miss.request);
        if let Some(state) = request.and_then(|request| request.read.as_mut()) {
            state.pending -= 1;
            state.failed |= miss.result != Some(Ok(()));
        }
        self.end_read_if_done(cache, miss.request, out);
    }

    fn end_read_if_done<P: Pmem>(&mut self, cache: &Cache<P>, id: RequestId, out: &mut Outbox) {
        let Some(request) = self.requests.get(id) else {
            return;
        };
        let Some(state) = request.read else { return };
        let len = request.io.len_blocks;
        if state.pending > 0 || state.done_blocks < len {
            return;
        }
        let counters = self.counters(cache);
        match (state.hit, state.missed) {
            (true, true) => counters.read_partial_hits.add(1),
            (false, true) => counters.read_misses.add(1),
            _ => counters.read_hits.add(1),
        }
        counters.read_bytes.add(cache.geometry.bytes(len));
        let status = if state.failed {
            Status::Failed
        } else {
            Status::Success
        };
        self.complete(cache, id, status, out);
    }

    /// A read that is not to go on: it ends when its base reads have.
    pub(super) fn give_up_read<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        id: RequestId,
        out: &mut Outbox,
    ) {
        if let Some(request) = self.requests.get_mut(id) {
            let len = request.io.len_blocks;
            if let Some(state) = &mut request.read {
                state.failed = true;
                state.done_blocks = len;
            }
        }
        self.end_read_if_done(cache, id, out);
    }
}
