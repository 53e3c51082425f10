//! Writes: a batch goes through its phases, with two fences, or with one if it is small.
//!
//! 1. claim the pages, reserve index slots and log room: nothing behind this can fail;
//! 2. draw a sequence number;
//! 3. copy all payloads; **fence**, unless it is quicker to give them checksums ([`Proof`]);
//! 4. one kset with all keys; **fence**;
//! 5. publish in the index, release the claims;
//! 6. complete.

mod batch;
mod copies;
mod extent;
mod hold;
#[cfg(feature = "canary")]
mod split;

use super::cache::Cache;
use super::channel::{Core, REQUEST_COUNT_MAX, RequestId};
use super::heal::Room;
use super::held::Logged;
use super::io::{Fua, HostIo, Op, Outbox, Status};
use super::segments::Special;
use super::stats::Counters;
use super::stream::{OpenSegment, Stream};
use crate::canary::{self, Canary};
use crate::media::{Geometry, KSET_KEYS_MAX, KeyKind, Proof};
use crate::pmem::{Durable, Pmem};
use crate::units::SegId;
pub(super) use batch::Batch;
use batch::Refusal;
pub(crate) use copies::{Copier, CopyEnd};
pub(super) use extent::{Extent, pages};
use extent::{HasPayload, has_payload};
use std::collections::VecDeque;
use std::sync::MutexGuard;

/// Pages that a batch claims, at most: one unmap of the largest size, or many writes.
pub(super) const BATCH_PAGES_MAX: usize = 2048;
/// Payload of a batch, at most, so that the first of it does not wait long for the last.
const BATCH_BYTES_MAX: u64 = 2 << 20;
/// Read fills leave so many free segments for writes.
const FILL_FREE_SEGMENTS_MIN: usize = 2;

/// What a key of the batch comes from.
#[derive(Clone, Copy, Debug)]
enum Item {
    Write(RequestId),
    Fill(u32),
}

/// What the batch under construction is made of. Empty between polls; allocates once.
#[derive(Debug)]
pub(super) struct Gathered {
    items: Vec<Item>,
    fua: bool,
    /// Writes that met another core at one of their pages.
    conflicted: VecDeque<RequestId>,
}

impl Gathered {
    pub(super) fn new() -> Self {
        Self {
            items: Vec::with_capacity(KSET_KEYS_MAX),
            fua: false,
            conflicted: VecDeque::with_capacity(REQUEST_COUNT_MAX),
        }
    }

    /// Writes that are put off to the next poll.
    pub(super) fn conflicted_count(&self) -> usize {
        self.conflicted.len()
    }
}

impl<P: Pmem> Cache<P> {
    /// Whether a read fill may take of the space that is left.
    pub(super) fn has_room_for_fills(&self) -> bool {
        let has_place = !self.tail_stands() || self.special_stream(Special::Fills).is_some();
        let left = FILL_FREE_SEGMENTS_MIN + self.segments_kept_free();
        has_place && self.segments.free_count() >= left
    }
}

impl Core {
    pub(super) fn poll_writes<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        self.run_fills(cache, out);
        let (mut queued, has_turn) = (self.writes.len(), self.turn > 0);
        if queued == 0 && self.fills.is_empty() {
            // What waited was given up.
            return self.leave_room_queue(cache);
        }
        if let Some((number, mut stream)) = self.lock_stream(cache) {
            self.run_batches(cache, number, &mut stream, out);
        }
        if self.turn > 0 {
            let of_turn_gone = if has_turn {
                queued - self.writes.len()
            } else {
                0
            };
            queued -= self.run_healers(cache, of_turn_gone, out);
        }
        self.drop_fills(cache, out);
        while let Some(id) = self.gathered.conflicted.pop_back() {
            if canary::is(Canary::AcknowledgedUnlogged) {
                self.complete(cache, id, Status::Success, out);
                continue;
            }
            self.writes.push_front(id);
        }
        if self.turn > 0 && (has_turn || self.writes.is_empty()) {
            self.count_turn(cache, queued);
        }
    }

    /// The home stream, or another that is not in use: one core at a time appends to a segment (INV-PMEM-3).
    fn lock_stream<'a, P>(&self, cache: &'a Cache<P>) -> Option<(usize, MutexGuard<'a, Stream>)> {
        let count = cache.core_stream_count;
        let home = self.home_stream;
        (home..count).chain(0..home).find_map(|number| {
            let stream = cache.streams[number].try_lock().ok()?;
            Some((number, stream))
        })
    }

    /// Read fills go into segments of their own, in which nothing is dirty (INV-SEG-9): they are reclaimed whatever the
    /// dirty tail does. Where there is no room for such segments they go where writes go, unless the tail stands still: what
    /// lies behind it would take the room of writes until it moves.
    fn run_fills<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        if !self.fills_apart.is_empty() {
            self.run_fills_on_probation(cache, out);
        }
        if self.fills.is_empty() {
            return;
        }
        if let Some(number) = cache.special_stream(Special::Fills)
            && !canary::is(Canary::FillsAmongWrites)
        {
            self.run_fills_in(cache, number, out);
        }
        // Left are those of a cache with too few segments, or another core is at the stream.
        if cache.tail_stands() && !canary::is(Canary::FillsAmongWrites) {
            self.drop_fills(cache, out);
        }
    }

    fn run_fills_on_probation<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        let Some(number) = cache.special_stream(Special::Probation) else {
            return self.fills.append(&mut self.fills_apart);
        };
        std::mem::swap(&mut self.fills, &mut self.fills_apart);
        self.run_fills_in(cache, number, out);
        // Another core is at the stream.
        self.drop_fills(cache, out);
        std::mem::swap(&mut self.fills, &mut self.fills_apart);
    }

    /// Deals with all fills, unless another core is at the stream.
    fn run_fills_in<P: Pmem>(&mut self, cache: &Cache<P>, number: usize, out: &mut Outbox) {
        let Ok(mut stream) = cache.streams[number].try_lock() else {
            return;
        };
        loop {
            self.batch.clear();
            let more = self.gather_fills(cache, &mut stream, out);
            self.end_batch(cache, number, &mut stream, out);
            if !more {
                return;
            }
        }
    }

    /// Whatever could not be put into the cache is given up: the read has waited long enough.
    fn drop_fills<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        while let Some(op) = self.fills.pop_front() {
            self.counters(cache).fills_dropped.add(1);
            self.settle_miss(cache, op, out);
        }
    }

    /// As many batches as come to what one may hold, so one or two as a rule, and in every mode: what completes is
    /// told when the poll has ended, and waits for all of it. Read fills are all put in: there are no more of them than
    /// one poll may copy.
    fn run_batches<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        number: usize,
        stream: &mut Stream,
        out: &mut Outbox,
    ) {
        let (mut keys, mut pages) = (0, 0);
        while self.run_batch(cache, number, stream, out) {
            keys += self.batch.key_count;
            pages += self.batch.slots.len();
            // A key has a page of payload at most: so the bytes are bounded too.
            let is_enough = keys >= KSET_KEYS_MAX || pages >= BATCH_PAGES_MAX;
            if is_enough && self.fills.is_empty() {
                return;
            }
        }
    }

    /// Builds and commits one batch. `true`: there may be more to do.
    fn run_batch<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        number: usize,
        stream: &mut Stream,
        out: &mut Outbox,
    ) -> bool {
        self.batch.clear();
        let more = self.gather_fills(cache, stream, out) || self.gather_writes(cache, stream);
        self.end_batch(cache, number, stream, out);
        more
    }

    /// Builds and commits one batch of writes alone, in room that others may not take.
    pub(super) fn run_batch_of<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        (number, stream): (usize, &mut Stream),
        room: Room,
        out: &mut Outbox,
    ) {
        self.batch.clear();
        self.batch.room = room;
        self.gather_writes(cache, stream);
        self.batch.room = Room::Anybodys;
        self.end_batch(cache, number, stream, out);
    }

    /// Commits what was gathered, if anything was.
    fn end_batch<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        number: usize,
        stream: &mut Stream,
        out: &mut Outbox,
    ) {
        if self.gathered.items.is_empty() {
            return;
        }
        let Some(open) = &mut stream.open else {
            unreachable!("INV-LOG-1: a batch with items has an open segment")
        };
        self.batch.draw(cache, number, open);
        let is_write = |item: &Item| matches!(item, Item::Write(_));
        if self.batch.is_quickly_checksummed(cache) && self.gathered.items.iter().all(is_write) {
            self.batch.proof = Proof::Checksums;
        }
        self.store_payloads(cache, open);
        let (segment, durable) = (open.id, self.batch.commit(cache, number, open));
        let histograms = &self.counters(cache).histograms;
        histograms
            .batch_requests
            .note(self.gathered.items.len() as u64);
        self.complete_batch(cache, segment, &durable, out);
    }

    fn gather_writes<P: Pmem>(&mut self, cache: &Cache<P>, stream: &mut Stream) -> bool {
        while let Some(id) = self.writes.pop_front() {
            let Some(request) = self.requests.get(id) else {
                continue;
            };
            let io = request.io;
            let batch = &mut self.batch;
            match batch.admit(cache, stream, io.lba, io.len_blocks, has_payload(&io)) {
                Ok(()) => {
                    self.gathered.items.push(Item::Write(id));
                    self.gathered.fua |= matches!(io.op, Op::Write(_, Fua::Yes));
                }
                Err(Refusal::BatchFull) => {
                    self.writes.push_front(id);
                    return true;
                }
                Err(Refusal::Busy) => {
                    self.counters(cache).conflicts.add(1);
                    self.gathered.conflicted.push_back(id);
                }
                Err(Refusal::NoRoom) if cache.segments_in_service() == 0 => {
                    // Nothing will make room.
                    self.refused.push_back((id, Status::Failed));
                }
                Err(Refusal::NotLookedAt) => {
                    // There is room, for all that is known: nothing is to be reclaimed for it.
                    self.writes.push_front(id);
                    return false;
                }
                Err(Refusal::NoRoom) if self.batch.room == Room::Healers => {
                    // There may be room for a smaller one.
                    self.gathered.conflicted.push_back(id);
                }
                Err(Refusal::NoRoom) => {
                    self.counters(cache).space_waits.add(1);
                    self.writes.push_front(id);
                    self.wait_for_room(cache);
                    return false;
                }
            }
        }
        false
    }

    /// `true`: some are left for another batch.
    fn gather_fills<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        stream: &mut Stream,
        out: &mut Outbox,
    ) -> bool {
        let mut is_looked_at = true;
        while let Some(op) = self.fills.pop_front() {
            let Some(miss) = self.misses.get(op) else {
                continue;
            };
            let (lba, len_blocks, versions) = (miss.lba, miss.len_blocks, miss.versions);
            let mark = self.batch.mark();
            let admitted = if is_looked_at && cache.has_room_for_fills() {
                let batch = &mut self.batch;
                batch.admit(cache, stream, lba, len_blocks, HasPayload::Yes)
            } else {
                Err(Refusal::NoRoom)
            };
            match admitted {
                Ok(()) if self.batch.is_fresh(cache, lba, len_blocks, &versions) => {
                    self.gathered.items.push(Item::Fill(op));
                    continue;
                }
                Ok(()) => self.batch.roll_back(cache, mark),
                Err(Refusal::BatchFull) => {
                    self.fills.push_front(op);
                    return true;
                }
                // One look for all of them.
                Err(Refusal::NotLookedAt) => is_looked_at = false,
                Err(Refusal::Busy | Refusal::NoRoom) => {}
            }
            self.counters(cache).fills_dropped.add(1);
            self.settle_miss(cache, op, out);
        }
        false
    }

    fn store_payloads<P: Pmem>(&mut self, cache: &Cache<P>, open: &mut OpenSegment) {
        for at in 0..self.gathered.items.len() {
            match self.gathered.items[at] {
                Item::Write(id) => {
                    let Some(request) = self.requests.get(id) else {
                        unreachable!("INV-IO-1: a request of the batch has ended before it")
                    };
                    let io = request.io;
                    match io.op {
                        Op::Write(cursor, _) => {
                            self.batch.dirty_bytes += cache.geometry.bytes(io.len_blocks);
                            let extent = (io.lba, io.len_blocks, KeyKind::Data);
                            self.batch.store_payload(cache, open, extent, cursor);
                        }
                        Op::WriteZeroes => self.batch.push_key(cache, &io, KeyKind::Zeroes),
                        Op::Unmap => self.batch.push_key(cache, &io, KeyKind::Unmap),
                        Op::Read(_) | Op::Lend | Op::Flush => {}
                    }
                }
                Item::Fill(op) => {
                    let Some(miss) = self.misses.get(op) else {
                        unreachable!("INV-IO-1: a read fill of the batch has ended before it")
                    };
                    let extent = (miss.lba, miss.len_blocks, KeyKind::Fill);
                    let cursor = miss.cursor;
                    self.batch.store_payload(cache, open, extent, cursor);
                }
            }
        }
    }

    /// Completes what the batch was made of. Asks for the proof that it is durable (INV-LOG-5).
    fn complete_batch<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        segment: SegId,
        _durable: &Durable,
        out: &mut Outbox,
    ) {
        if self.gathered.fua && !canary::is(Canary::FuaClosesNoEpoch) {
            // Nothing that is submitted after a FUA write has completed may reach the base before it
            // (INV-EPOCH-2).
            cache.close_epoch();
        }
        let holds = cache.settings.cache_mode().holds_writes() && !canary::is(Canary::WriteNotHeld);
        let mut counts = WriteCounts::default();
        for at in 0..self.gathered.items.len() {
            match self.gathered.items[at] {
                Item::Write(id) => {
                    let io = if holds {
                        self.hold_write(cache, segment, id, at)
                    } else {
                        self.complete(cache, id, Status::Success, out)
                    };
                    if let Some(io) = io {
                        counts.note(&io);
                    }
                }
                Item::Fill(op) => {
                    if let Some(miss) = self.misses.get(op) {
                        let bytes = cache.geometry.bytes(miss.len_blocks);
                        self.counters(cache).fill_bytes.add(bytes);
                    }
                    self.settle_miss(cache, op, out);
                }
            }
        }
        counts.add_to(self.counters(cache), &cache.geometry);
        self.gathered.items.clear();
        self.gathered.fua = false;
    }

    /// Lets a write of the batch wait for the base: item number `at`, of which each is an extent.
    #[inline(never)]
    fn hold_write<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        segment: SegId,
        id: RequestId,
        at: usize,
    ) -> Option<HostIo> {
        let Some(request) = self.requests.get(id) else {
            unreachable!("INV-IO-1: a request of the batch has ended before it")
        };
        let io = request.io;
        let logged = Logged::new(cache, segment, &self.batch.extents[at]);
        self.hold(cache, self.batch.seq, logged, id);
        Some(io)
    }
}

/// What a batch was made of, as far as it is counted.
#[derive(Debug, Default)]
struct WriteCounts {
    writes: u64,
    fua_writes: u64,
    len_blocks: u64,
    write_zeroes: u64,
    unmaps: u64,
}

impl WriteCounts {
    #[inline]
    fn note(&mut self, io: &HostIo) {
        match io.op {
            Op::Write(_, fua) => {
                self.writes += 1;
                self.fua_writes += u64::from(fua == Fua::Yes);
                self.len_blocks += io.len_blocks;
            }
            Op::WriteZeroes => self.write_zeroes += 1,
            Op::Unmap => self.unmaps += 1,
            Op::Read(_) | Op::Lend | Op::Flush => {}
        }
    }

    fn add_to(&self, counters: &Counters, geometry: &Geometry) {
        counters.writes.add(self.writes);
        counters.fua_writes.add(self.fua_writes);
        counters.write_bytes.add(geometry.bytes(self.len_blocks));
        counters.write_zeroes.add(self.write_zeroes);
        counters.unmaps.add(self.unmaps);
    }
}
