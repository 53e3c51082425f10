//! A channel: where the requests of one core go in and come out.

use super::cache::Cache;
use super::fetches::Awaiting;
use super::held::Held;
use super::io::{
    BaseError, BaseOpId, Completion, HostIo, IoToken, LoanId, Op, Outbox, Progress, Status,
};
use super::key_search::KeySearch;
use super::lend::{LOAN_COUNT_MAX, Loan};
use super::misses::Misses;
use super::read_path::{FILL_PAGES_MAX, PREFETCH_PAGES, ReadState};
use super::sequences::Sequences;
use super::stats::Counters;
use super::write_path::{Batch, Gathered, pages};
use crate::canary::{self, Canary};
use crate::index::Version;
use crate::pmem::{MemSlice, PadMemory, Pads, Pmem};
use crate::units::{Agent, Now, PAGE_SIZE_BYTES, Page};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Requests that a channel takes at once.
pub(super) const REQUEST_COUNT_MAX: usize = 4096;
/// Base reads that a channel has under way at once, with the misses that wait for those of others.
pub(super) const MISS_COUNT_MAX: usize = 256;
/// Requests of one kind that one poll takes up, at most; the rest comes with the next. Each kind has its own share, so that
/// a deep queue of one keeps no other from its turn.
pub(super) const REQUESTS_PER_POLL: usize = 512;
/// Of reads that one poll takes up, at most, and of lends as many; the last of them may go beyond.
pub(super) const READ_BYTES_PER_POLL: u64 = 4 << 20;

/// Never dropped: see [`Channel::abandon_pads`].
static ABANDONED_PADS: Mutex<Vec<Pads>> = Mutex::new(Vec::new());

/// Number of a request in the channel's table.
pub(super) type RequestId = u32;

/// A request under way.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) io: HostIo,
    /// For a read: how far it is.
    pub(super) read: Option<ReadState>,
}

/// A fixed table with a free list.
#[derive(Debug)]
pub(super) struct Slab<T> {
    items: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(super) fn new(capacity: usize) -> Self {
        let numbers = 0..u32::try_from(capacity).unwrap_or(u32::MAX);
        Self {
            items: numbers.clone().map(|_| None).collect(),
            free: numbers.rev().collect(),
        }
    }

    pub(super) fn insert(&mut self, item: T) -> Option<u32> {
        let id = self.free.pop()?;
        self.items[id as usize] = Some(item);
        Some(id)
    }

    pub(super) fn get(&self, id: u32) -> Option<&T> {
        self.items.get(id as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        self.items.get_mut(id as usize)?.as_mut()
    }

    pub(super) fn remove(&mut self, id: u32) -> Option<T> {
        let item = self.items.get_mut(id as usize)?.take()?;
        self.free.push(id);
        Some(item)
    }

    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    pub(super) fn used_count(&self) -> usize {
        self.items.len() - self.free.len()
    }

    /// All that there can be, in use or not.
    pub(super) fn ids(&self) -> Range<u32> {
        0..u32::try_from(self.items.len()).unwrap_or(u32::MAX)
    }
}

/// One core's way into the cache. Used by one thread at a time.
#[derive(Debug)]
pub struct Channel<P: Pmem> {
    cache: Arc<Cache<P>>,
    core: Core,
}

/// The state of a channel, apart from the cache that it shares, so that methods can have both at once.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) id: u16,
    /// The stream that this core appends to unless another core is using it.
    pub(super) home_stream: usize,
    /// Of the poll under way.
    pub(super) now: Now,
    pub(super) requests: Slab<Request>,
    /// Reads that still have blocks to look up.
    pub(super) reads: VecDeque<RequestId>,
    /// Reads that wait for a page which another miss is fetching.
    pub(super) awaiting: VecDeque<Awaiting>,
    /// Reads that need not be copied.
    pub(super) lends: VecDeque<RequestId>,
    /// What was lent and has not come back.
    pub(super) loans: Slab<Loan>,
    /// Writes, unmaps and write-zeroes that are not in the log yet, first come first served, but for those that heal.
    pub(super) writes: VecDeque<RequestId>,
    /// Of these, such that heal; empty between polls (`heal.rs`).
    pub(super) healers: VecDeque<RequestId>,
    /// With which of them the search for such goes on.
    pub(super) healers_at: usize,
    /// How many of those that waited for room when the channel entered the queue for it are left; 0: it is not in there.
    pub(super) turn: usize,
    /// Writes that are in the log, and wait for the base.
    pub(super) held: Held,
    flushes: VecDeque<RequestId>,
    /// Of which nothing is going to be done, and how they end.
    pub(super) refused: VecDeque<(RequestId, Status)>,
    pub(super) misses: Misses,
    /// Of the bucket of each page of the run that a read is gathering.
    pub(super) run_versions: [Version; FILL_PAGES_MAX],
    /// For reads that meet damage.
    pub(super) key_search: KeySearch,
    /// What the poll under way may still find out about lost memory.
    pub(super) losses_left: u32,
    /// For a payload that is verified.
    pub(super) payload_buf: Box<[u8]>,
    /// Base reads that have ended since the last poll.
    pub(super) misses_done: VecDeque<u32>,
    /// Read fills for the next batch; empty between polls.
    pub(super) fills: VecDeque<u32>,
    /// Those of them that are on probation.
    pub(super) fills_apart: VecDeque<u32>,
    /// How long the reads are that go on where others ended.
    pub(super) sequences: Sequences,
    pub(super) batch: Batch,
    pub(super) gathered: Gathered,
}

impl<P: Pmem> Channel<P> {
    pub(super) fn new(cache: Arc<Cache<P>>, id: u16, pads: Option<PadMemory>) -> Self {
        let home_stream = usize::from(id) % cache.core_stream_count;
        Self {
            cache,
            core: Core::new(id, home_stream, pads),
        }
    }

    /// Takes a request; the next poll works on it. A request outside of the device or above the limits of
    /// the [`Cache`] completes as failed.
    ///
    /// # Errors
    /// The table of requests is full; the request is handed back.
    pub fn submit(&mut self, io: HostIo) -> Result<(), HostIo> {
        let read = match io.op {
            Op::Read(cursor) => Some(ReadState::new(cursor)),
            _ => None,
        };
        let Some(id) = self.core.requests.insert(Request { io, read }) else {
            return Err(io);
        };
        self.core.sort(&self.cache, id, &io);
        Ok(())
    }

    /// Who stores, as far as persistence goes.
    #[cfg(any(test, feature = "sim"))]
    #[must_use]
    pub fn agent(&self) -> Agent {
        Agent(self.core.owner())
    }

    /// Requests that were submitted and have not completed.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.core.requests.used_count()
    }

    /// Runs everything that can run: flushes, finished base reads, reads, writes in batches. Bounded; what is
    /// left over comes with the next poll.
    /// `now` serves statistics and a limit of a second, and may be some microseconds old.
    pub fn poll(&mut self, now: Now, out: &mut Outbox) -> Progress {
        if self.core.requests.used_count() == 0 {
            return Progress::Idle;
        }
        self.core.now = now;
        let before = (out.completions.len(), out.base.len());
        let (core, cache) = (&mut self.core, &*self.cache);
        core.end_refused(cache, out);
        if cache.has_failed() {
            core.fail_all(cache, out);
        } else {
            core.poll_flushes(cache, out);
            core.finish_misses(cache, out);
            core.poll_held(cache, out);
            core.poll_awaiting(cache);
            core.poll_readers(cache, out);
            core.poll_writes(cache, out);
        }
        if (out.completions.len(), out.base.len()) == before {
            Progress::Idle
        } else {
            Progress::Busy
        }
    }

    /// A base operation has ended; the next poll goes on with it.
    pub fn on_base_done(&mut self, op: BaseOpId, result: Result<(), BaseError>) {
        if self.core.misses.set_result(op.0, result) {
            self.cache.count_base_read_off();
            let errors = &self.core.counters(&self.cache).base_read_errors;
            errors.add(u64::from(result.is_err()));
            self.core.misses_done.push_back(op.0);
        }
    }

    /// What [`Status::Lent`] stands for; it stays as it is until it is given back, or the channel goes.
    #[must_use]
    pub fn loan(&self, id: LoanId) -> Option<MemSlice> {
        self.core.loan(id)
    }

    /// The end of a loan; one that has ended already, or was never made, is no matter.
    pub fn give_back(&mut self, id: LoanId) {
        self.core.give_back(&self.cache, id);
    }

    /// Gives up a request of which nothing has been done yet. `true`: it completes as aborted with the next
    /// poll. `false`: it is unknown, or too far on, and completes by itself.
    pub fn abort(&mut self, token: IoToken) -> bool {
        self.core.refuse(|request| request.io.token == token) > 0
    }

    /// As [`Channel::abort`], for all requests. Writes that wait for nothing but the base fail.
    pub fn abort_waiting(&mut self) {
        self.core.refuse(|_| true);
        self.core.held.give_up();
    }

    /// The end of base reads that are under way will never be told: the memory that they may still write to is lost
    /// for good, so that it becomes nobody else's.
    pub fn abandon_pads(&mut self) {
        super::cache::lock(&ABANDONED_PADS).extend(self.core.misses.pads.take());
    }
}

impl<P: Pmem> Drop for Channel<P> {
    fn drop(&mut self) {
        self.core.give_back_all(&self.cache);
        self.core.leave_room_queue(&self.cache);
        self.core.misses.withdraw_all(&self.cache);
        self.cache.put_channel_id(self.core.id);
    }
}

impl Core {
    fn new(id: u16, home_stream: usize, pads: Option<PadMemory>) -> Self {
        let queue = || VecDeque::with_capacity(REQUEST_COUNT_MAX);
        Self {
            id,
            home_stream,
            now: Now(0),
            requests: Slab::new(REQUEST_COUNT_MAX),
            reads: queue(),
            awaiting: VecDeque::with_capacity(REQUEST_COUNT_MAX),
            lends: queue(),
            loans: Slab::new(LOAN_COUNT_MAX),
            writes: queue(),
            healers: queue(),
            healers_at: 0,
            turn: 0,
            held: Held::new(),
            flushes: queue(),
            refused: VecDeque::with_capacity(REQUEST_COUNT_MAX),
            misses: Misses::new(pads),
            run_versions: [Version::UNSTABLE; FILL_PAGES_MAX],
            key_search: KeySearch::default(),
            losses_left: 0,
            payload_buf: vec![0; PAGE_SIZE_BYTES as usize].into(),
            misses_done: VecDeque::with_capacity(MISS_COUNT_MAX),
            fills: VecDeque::with_capacity(MISS_COUNT_MAX),
            fills_apart: VecDeque::with_capacity(MISS_COUNT_MAX),
            sequences: Sequences::default(),
            batch: Batch::new(Agent(id + 1)),
            gathered: Gathered::new(),
        }
    }

    /// In claims; never 0.
    pub(super) fn owner(&self) -> u16 {
        self.id + 1
    }

    pub(super) fn counters<'a, P>(&self, cache: &'a Cache<P>) -> &'a Counters {
        &cache.counters[usize::from(self.id)]
    }

    /// Puts a new request where the next poll finds it, and asks for the memory that it will need.
    #[inline]
    fn sort<P: Pmem>(&mut self, cache: &Cache<P>, id: RequestId, io: &HostIo) {
        if !is_in_range(cache, io) {
            self.refused.push_back((id, Status::Failed));
            return;
        }
        let queue = match io.op {
            Op::Flush => return self.flushes.push_back(id),
            Op::Read(_) => &mut self.reads,
            Op::Lend => &mut self.lends,
            Op::Write(..) | Op::WriteZeroes | Op::Unmap => &mut self.writes,
        };
        queue.push_back(id);
        let index = &cache.index;
        let groups = pages(cache, io.lba, io.len_blocks)
            .first(PREFETCH_PAGES)
            .groups();
        // The others of its group are there, too.
        let ats = groups.map(|group| index.locate(Page(group.start)));
        match io.op {
            Op::Read(_) | Op::Lend | Op::Flush => ats.for_each(|at| index.prefetch(at)),
            Op::Write(..) | Op::WriteZeroes | Op::Unmap => {
                ats.for_each(|at| index.prefetch_to_claim(at))
            }
        }
    }

    /// Takes those requests out of the queues which `wanted` names and of which nothing has been done yet, and
    /// lets them end as aborted. Returns how many they are.
    fn refuse(&mut self, wanted: impl Fn(&Request) -> bool) -> usize {
        let (requests, refused) = (&self.requests, &mut self.refused);
        let before = refused.len();
        let queues = [&mut self.reads, &mut self.lends, &mut self.flushes];
        let mut is_kept = |id: RequestId| {
            let request = requests.get(id);
            let refuse = request.is_some_and(|request| {
                let begun = request.read.is_some_and(|read| read.has_begun());
                !begun && wanted(request)
            });
            if refuse {
                refused.push_back((id, Status::Aborted));
            }
            !refuse
        };
        for queue in queues {
            queue.retain(|id| is_kept(*id));
        }
        self.awaiting.retain(|read| is_kept(read.id));
        let (mut at, mut of_turn) = (0, 0);
        self.writes.retain(|id| {
            let is_kept = is_kept(*id);
            of_turn += usize::from(at < self.turn && !is_kept);
            at += 1;
            is_kept
        });
        if self.turn > 0 {
            // It leaves the queue with the next poll, at the earliest.
            self.turn = (self.turn - of_turn).max(1);
        }
        refused.len() - before
    }

    fn end_refused<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        for _ in 0..REQUESTS_PER_POLL {
            let Some((id, status)) = self.refused.pop_front() else {
                return;
            };
            self.complete(cache, id, status, out);
        }
    }

    /// Whatever looks at places that the index names: nobody frees their segments meanwhile. Writes look at
    /// no places but those that they have made, and misses at none.
    fn poll_readers<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        if self.reads.is_empty() && self.lends.is_empty() {
            return;
        }
        let who = usize::from(self.id);
        cache.grace.enter(who);
        self.poll_reads(cache, out);
        self.poll_lends(cache, out);
        cache.grace.leave(who);
    }

    /// A flush has nothing to make durable: whatever completed is. It closes the epoch, so that write-back
    /// keeps the barrier (INV-EPOCH-2). It waits for none of the requests that are under way, which may come on
    /// either side of it.
    fn poll_flushes<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        if self.flushes.is_empty() {
            return;
        }
        if !canary::is(Canary::FlushClosesNoEpoch) {
            cache.close_epoch();
        }
        for _ in 0..REQUESTS_PER_POLL {
            let Some(id) = self.flushes.pop_front() else {
                return;
            };
            self.counters(cache).flushes.add(1);
            self.complete(cache, id, Status::Success, out);
        }
    }

    /// Ends a request. It leaves the table, so it cannot end twice (INV-IO-1).
    #[inline]
    pub(super) fn complete<P>(
        &mut self,
        cache: &Cache<P>,
        id: RequestId,
        status: Status,
        out: &mut Outbox,
    ) -> Option<HostIo> {
        let io = self.requests.remove(id)?.io;
        if status == Status::Failed {
            self.counters(cache).failed.add(1);
        }
        out.completions.push(Completion {
            token: io.token,
            status,
        });
        Some(io)
    }

    /// After an internal error: nothing is attempted any more. Reads with base reads under way end when these
    /// do.
    #[cold]
    fn fail_all<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        while let Some(id) = self.writes.pop_front() {
            self.complete(cache, id, Status::Failed, out);
        }
        self.leave_room_queue(cache);
        self.fail_held(cache, out);
        while let Some(id) = self.flushes.pop_front() {
            self.complete(cache, id, Status::Failed, out);
        }
        while let Some(id) = self.lends.pop_front() {
            self.complete(cache, id, Status::Failed, out);
        }
        let awaiting = self.awaiting.drain(..).map(|read| read.id);
        self.reads.extend(awaiting);
        while let Some(id) = self.reads.pop_front() {
            self.give_up_read(cache, id, out);
        }
        while let Some(op) = self.misses_done.pop_front() {
            self.serve_followers(cache, op, out);
            self.settle_miss(cache, op, out);
        }
    }
}

fn is_in_range<P: Pmem>(cache: &Cache<P>, io: &HostIo) -> bool {
    let bytes_max = match io.op {
        Op::Flush => return true,
        Op::Read(_) | Op::Lend => u64::MAX,
        Op::Write(..) => cache.write_size_max_bytes(),
        Op::WriteZeroes | Op::Unmap => cache.unmap_size_max_bytes(),
    };
    let end = io.lba.0.checked_add(io.len_blocks);
    io.len_blocks > 0
        && end.is_some_and(|end| end <= cache.block_count())
        && cache.geometry.bytes(io.len_blocks) <= bytes_max
}
