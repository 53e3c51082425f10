//! Reads: hits are copied from the mapping, only what is missing is read from the base, straight into the
//! caller's memory, and may then be put into the cache.

mod ahead;
mod damaged;
mod run;
mod verified;
mod walk;

use super::cache::Cache;
use super::channel::{Core, READ_BYTES_PER_POLL, REQUESTS_PER_POLL, RequestId};
use super::config::{CacheMode, ReadAdmission};
use super::fetches::Patience;
use super::io::{Outbox, Status};
use super::misses::{Miss, Source};
use super::settings::Setting;
use crate::canary::{self, Canary};
use crate::index::BlockMap;
use crate::media::Place;
use crate::pmem::{Coming, IovCursor, Pmem};
use crate::units::{Lba, Page};
use ahead::WholePage;
use damaged::LOSSES_PER_POLL;
use run::Run;
use std::mem;

/// A miss of more pages is not put into the cache: it is likely part of a scan, and streams well by itself.
pub(super) const FILL_PAGES_MAX: usize = 64;
/// For how many pages the index is asked ahead.
pub(super) const PREFETCH_PAGES: u64 = 32;
/// What may lie between two reads of a sequence: what others of it have found in the cache.
const SEQUENCE_GAP_BYTES: u64 = 128 << 10;

/// How far a read is.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReadState {
    cursor: IovCursor,
    /// Blocks dealt with: copied, or asked from the base.
    done_blocks: u64,
    /// Base reads under way.
    pub(super) pending: u32,
    hit: bool,
    failed: bool,
    /// Pages of which a block comes from the base.
    missed_pages: u64,
    /// Those before it are counted.
    missed_upto: Page,
    /// Looked at with the first miss.
    admission: Option<Admission>,
    /// It has met lost memory, and asked for the key of that ([`crate::engine::key_search`]).
    pub(super) asks_for_key: bool,
    /// It has waited for the page before this one, which another miss was fetching, or is waiting for it; 0: for none.
    awaited_upto: Page,
}

/// What becomes of what a read brings from the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admission {
    /// It goes where writes go.
    Kept,
    /// It goes into segments that are reclaimed soon, unless it is read again.
    OnProbation,
    /// It goes to the reader alone.
    Refused,
}

impl ReadState {
    pub(super) fn new(cursor: IovCursor) -> Self {
        Self {
            cursor,
            done_blocks: 0,
            pending: 0,
            hit: false,
            failed: false,
            missed_pages: 0,
            missed_upto: Page(0),
            admission: None,
            asks_for_key: false,
            awaited_upto: Page(0),
        }
    }

    pub(super) fn has_begun(&self) -> bool {
        self.done_blocks > 0 || self.pending > 0
    }

    /// The first block that has not been dealt with, of a read from `first` on.
    pub(super) fn next_block(&self, first: Lba) -> Lba {
        Lba(first.0 + self.done_blocks)
    }

    /// The page that it waits for, or has waited for last.
    pub(super) fn awaited(&self) -> Option<Page> {
        self.awaited_upto.0.checked_sub(1).map(Page)
    }

    /// Some of these pages come from the base. A read is gone through upwards, so a page that was counted before can
    /// only be the first.
    fn note_missed(&mut self, first: Page, last: Page) {
        self.missed_pages += last.0 + 1 - first.max(self.missed_upto).0;
        self.missed_upto = Page(last.0 + 1);
    }
}

/// Nothing more can be done for this read now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blocked {
    /// The next poll tries again.
    Busy,
    /// It waits for a page that another miss is fetching.
    Awaiting,
    /// Part of it is lost, so all of it fails.
    Lost,
    /// The next poll tries again, and goes on with all reads behind it: this one has met enough lost memory.
    Spent,
}

/// A read while it is worked on: the state is written back at the end.
struct Reader<'a, P> {
    cache: &'a Cache<P>,
    id: RequestId,
    state: ReadState,
    /// Of the page at which some read was going to begin, be it this one (INV-READ-9).
    ahead: Option<WholePage>,
    /// Of the read behind this one.
    coming: Coming,
    run: Option<Run>,
    mode: CacheMode,
    /// How many of [`Core::run_versions`] are the run's; more, if there was no room for them.
    version_count: usize,
}

impl<P> Reader<'_, P> {
    /// Whether a miss that nobody of the channel brings waits for others.
    fn patience(&self, miss: &Miss, source: Source) -> Patience {
        let has_waited = self.cache.geometry.page_of(miss.lba) < self.state.awaited_upto;
        if has_waited || source == Source::Outdated {
            Patience::Gone
        } else {
            Patience::Left
        }
    }
}

impl Core {
    pub(super) fn poll_reads<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        let (mut next, mut bytes) = (None, 0);
        self.losses_left = LOSSES_PER_POLL;
        for _ in 0..self.reads.len().min(REQUESTS_PER_POLL) {
            if bytes >= READ_BYTES_PER_POLL {
                return;
            }
            let Some(id) = self.reads.pop_front() else {
                return;
            };
            if self.waits_for_key(cache, id) {
                self.reads.push_back(id);
                continue;
            }
            let len_blocks = self.requests.get(id).map_or(0, |read| read.io.len_blocks);
            bytes += cache.geometry.bytes(len_blocks);
            let ahead = next;
            next = self.look_ahead(cache);
            let coming = next.map_or(Coming::NOTHING, |next| next.coming);
            match self.run_read(cache, id, (ahead, coming), out) {
                Ok(()) => self.end_read_if_done(cache, id, out),
                Err(Blocked::Busy) => self.reads.push_back(id),
                Err(Blocked::Awaiting) => self.await_fetch(id),
                // What is left of it is not worth a look.
                Err(Blocked::Lost) => self.give_up_read(cache, id, out),
                Err(Blocked::Spent) => {
                    self.reads.push_back(id);
                    return;
                }
            }
        }
    }

    /// Goes through the blocks of a read that have not been dealt with.
    fn run_read<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        id: RequestId,
        (ahead, coming): (Option<WholePage>, Coming),
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let Some(request) = self.requests.get(id) else {
            return Ok(());
        };
        let Some(mut state) = request.read else {
            return Ok(());
        };
        state.asks_for_key = false;
        let (first, len) = (request.io.lba.0, request.io.len_blocks);
        let mut reader = Reader {
            cache,
            id,
            state,
            ahead,
            coming,
            run: None,
            mode: cache.settings.cache_mode(),
            version_count: 0,
        };
        let result = self.walk(&mut reader, first + state.done_blocks, first + len, out);
        if let Some(request) = self.requests.get_mut(id) {
            request.read = Some(reader.state);
        }
        result
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
            BlockMap::Mapped(place) => self.serve_hit(reader, &run, place, bytes, out),
            BlockMap::Zero(_) => {
                reader.state.cursor.zero(bytes as usize);
                reader.state.hit = true;
                reader.state.done_blocks += run.len_blocks;
                Ok(())
            }
            BlockMap::Absent => self.start_miss(reader, &run, out),
        }
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
        if reader.mode == CacheMode::Passthrough
            && (cache.is_clean(place) || canary::is(Canary::DirtyDataPassedBy))
        {
            // INV-MODE-3.
            return self.read_clean_from_base(reader, run, out);
        }
        if let Some(crcs) = cache.verifying() {
            return self.serve_verified(reader, crcs, (run, place), out);
        }
        let mut cursor = reader.state.cursor;
        let off = cache.geometry.place_off(place);
        if cache.damage.covers(place, run.len_blocks) {
            return self.do_without(reader, (run, place), out);
        }
        let coming = mem::replace(&mut reader.coming, Coming::NOTHING);
        let read = cache.pmem.read_to_and_ask(off, &mut cursor, bytes, coming);
        if read.is_err() {
            return self.serve_poisoned(reader, (run, place), out);
        }
        self.end_hit(reader, run, place, cursor);
        Ok(())
    }

    /// A run was copied to the reader, whose cursor is behind it.
    #[inline]
    fn end_hit<P: Pmem>(
        &self,
        reader: &mut Reader<'_, P>,
        run: &Run,
        place: Place,
        cursor: IovCursor,
    ) {
        let cache = reader.cache;
        cache.note_hit(place, run.len_blocks);
        let bytes = cache.geometry.bytes(run.len_blocks);
        self.counters(cache).hit_bytes.add(bytes);
        reader.state.cursor = cursor;
        reader.state.hit = true;
        reader.state.done_blocks += run.len_blocks;
    }

    /// Asks the base for a run of which it holds the same as the cache. Nothing of that is shared or kept.
    fn read_clean_from_base<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        run: &Run,
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        reader.version_count = usize::MAX;
        self.start_miss(reader, run, out)
    }

    /// Asks the base for a run, as far as nobody has done so for what is to be kept.
    fn start_miss<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        run: &Run,
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let geometry = &reader.cache.geometry;
        let admission = self.admission(reader);
        let first_page = geometry.page_of(run.lba).0;
        let (mut start, end) = (run.lba.0, run.lba.0 + run.len_blocks);
        while start < end {
            let skipped = (geometry.page_of(Lba(start)).0 - first_page) as usize;
            // Only of so many pages it is known what they were.
            let known = match reader.version_count {
                count if count <= FILL_PAGES_MAX => skipped..count,
                _ => 0..0,
            };
            let versions = &self.run_versions[known];
            let part = self.misses.first_part(geometry, (start, end), versions);
            let blocks = (Lba(start), part.end - start);
            let bytes = geometry.bytes(blocks.1);
            let mut miss = Miss::new(reader.id, blocks, reader.state.cursor, self.now);
            let part_end = if let Source::Joined(leader) = part.source {
                let follows = self.misses.follow(miss, bytes, leader);
                follows.ok_or(Blocked::Busy)?;
                part.end
            } else {
                miss.versions[..versions.len()].copy_from_slice(versions);
                // What is larger than a write may never fit into a segment.
                miss.admitted = !versions.is_empty()
                    && bytes <= reader.cache.write_size_max_bytes()
                    && reader.mode.keeps_reads()
                    && admission != Admission::Refused;
                miss.apart = admission == Admission::OnProbation;
                let patience = reader.patience(&miss, part.source);
                self.lead_miss(reader, miss, patience, out)?
            };
            let len_blocks = part_end - start;
            let bytes = geometry.bytes(len_blocks);
            reader.state.cursor.advance(bytes as usize);
            reader.state.done_blocks += len_blocks;
            reader.state.pending += 1;
            let last = geometry.page_of(Lba(part_end - 1));
            reader.state.note_missed(geometry.page_of(Lba(start)), last);
            start = part_end;
        }
        Ok(())
    }

    /// Asks the base for a miss, as far as nobody at all has done so. Returns where that ends.
    fn lead_miss<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        mut miss: Miss,
        patience: Patience,
        out: &mut Outbox,
    ) -> Result<u64, Blocked> {
        let cache = reader.cache;
        if self.misses.table.is_full() {
            // What is announced is asked for.
            return Err(Blocked::Busy);
        }
        let pad = self.misses.take_pad(&cache.geometry, &mut miss);
        let mut rest = cache.rest_of(&miss);
        // What is not going to be kept is nothing to wait for.
        if miss.admitted
            && cache.has_room_for_fills()
            && let Some(page) = miss.announce(cache, &mut rest, patience)
        {
            let is_first = reader.state.awaited_upto == Page(0);
            let counters = self.counters(cache);
            counters.awaited_reads.add(u64::from(is_first));
            reader.state.awaited_upto = Page(page.0 + 1);
            self.misses.put_back(pad);
            return Err(Blocked::Awaiting);
        }
        let end = miss.lba.0 + miss.len_blocks;
        self.misses.stage(&cache.geometry, &mut miss, pad, rest);
        let request = self.misses.lead(miss).ok_or(Blocked::Busy)?;
        self.ask_base(cache, request, out);
        Ok(end)
    }

    /// What becomes of what a read brings from the base: part of a long sequence of reads is less likely to be wanted
    /// again than what was asked for by itself.
    fn admission<P: Pmem>(&mut self, reader: &mut Reader<'_, P>) -> Admission {
        if let Some(admission) = reader.state.admission {
            return admission;
        }
        let (cache, settings) = (reader.cache, &reader.cache.settings);
        let io = self.requests.get(reader.id).map(|request| request.io);
        let len_blocks = io.map_or(0, |io| {
            let gap_blocks = SEQUENCE_GAP_BYTES >> cache.geometry.block_shift();
            self.sequences.note(io.lba, io.len_blocks, gap_blocks)
        });
        let len_kib = cache.geometry.bytes(len_blocks) >> 10;
        let cutoff_kib = u64::from(settings.get(Setting::SequentialCutoffKib));
        let is_long = len_kib >= u64::from(settings.get(Setting::SequentialKib))
            && !canary::is(Canary::ScanNotOnProbation);
        let admission = if cutoff_kib > 0 && len_kib >= cutoff_kib {
            Admission::Refused
        } else {
            match settings.read_admission() {
                ReadAdmission::Sequence if is_long => Admission::OnProbation,
                ReadAdmission::Sequence | ReadAdmission::Always => Admission::Kept,
                ReadAdmission::Probation => Admission::OnProbation,
            }
        };
        reader.state.admission = Some(admission);
        admission
    }

    /// Looks at the base reads that have ended. Those that may be put into the cache wait for the batch.
    pub(super) fn finish_misses<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        let mut bytes = 0;
        while let Some(op) = self.next_done(cache, &mut bytes) {
            self.serve_followers(cache, op, out);
            if self.ask_without_rest(cache, op, out) {
                continue;
            }
            let Some(miss) = self.misses.table.get_mut(op) else {
                continue;
            };
            if canary::is(Canary::FetchWithdrawnEarly) {
                miss.withdraw(cache);
            }
            let fill = miss.admitted && miss.result == Some(Ok(()));
            let (apart, asked_at) = (miss.apart, miss.asked_at);
            let histogram = &self.counters(cache).histograms.base_read_us;
            histogram.note_length(asked_at, self.now);
            if fill && apart {
                self.fills_apart.push_back(op);
            } else if fill {
                self.fills.push_back(op);
            } else {
                self.settle_miss(cache, op, out);
            }
        }
    }

    /// A miss is dealt with; so is its request, if it was the last.
    pub(super) fn settle_miss<P: Pmem>(&mut self, cache: &Cache<P>, op: u32, out: &mut Outbox) {
        let Some(mut miss) = self.misses.remove(&cache.geometry, op) else {
            return;
        };
        // INV-READ-5: its fill is published, or is not going to be.
        miss.withdraw(cache);
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
        if state.failed {
            // It has answered nothing: it counts as a request that failed, and as nothing else.
            self.complete(cache, id, Status::Failed, out);
            return;
        }
        let counters = self.counters(cache);
        match (state.hit, state.missed_pages > 0) {
            (true, true) => counters.read_partial_hits.add(1),
            (false, true) => counters.read_misses.add(1),
            _ => counters.read_hits.add(1),
        }
        counters.read_bytes.add(cache.geometry.bytes(len));
        let pages = cache.geometry.pages_touched(request.io.lba, len);
        counters.read_pages.add(pages);
        counters.read_missed_pages.add(state.missed_pages);
        self.complete(cache, id, Status::Success, out);
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
