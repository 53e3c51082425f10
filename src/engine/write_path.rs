//! Writes: a batch goes through its phases, with two fences whatever its size.
//!
//! 1. claim the pages, reserve index slots and log room: nothing behind this can fail;
//! 2. draw a sequence number;
//! 3. copy all payloads; **fence**;
//! 4. one kset with all keys; **fence**;
//! 5. publish in the index, release the claims;
//! 6. complete.

mod extent;
mod hold;
#[cfg(feature = "canary")]
mod split;

use super::cache::{BACKGROUND_AGENT, Cache};
use super::channel::{COMPLETIONS_PER_POLL, Core, RequestId};
use super::io::{Fua, HostIo, Op, Outbox, Status};
use super::stream::{OpenSegment, Stream};
use crate::canary::{self, Canary};
use crate::engine::DataCrc;
use crate::index::{LineStock, PageSlot, Target};
use crate::media::{KSET_KEYS_MAX, Key, KeyKind, KsetBuilder};
use crate::pmem::{Durable, IovCursor, Pmem};
use crate::sched;
use crate::units::{Epoch, Lba, Seq};
pub(super) use extent::pages;
use extent::{HasPayload, Need, has_payload, need, page_pieces};
use hold::Mark;
use std::collections::VecDeque;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

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

/// The batch under construction. Empty between polls; allocates once.
#[derive(Debug)]
pub(super) struct Batch {
    items: Vec<Item>,
    key_count: usize,
    payload_bytes: u64,
    dirty_bytes: u64,
    /// Buckets claimed for the batch.
    claims: Vec<usize>,
    /// The slot of each page, in the order of the keys and of the pages of each.
    slots: Vec<PageSlot>,
    /// For parts of pages whose other parts lie elsewhere.
    lines: LineStock,
    keys: Vec<Key>,
    kset: KsetBuilder,
    /// Drawn by the commit.
    seq: Seq,
    fua: bool,
    /// Writes that met another core at one of their pages.
    conflicted: VecDeque<RequestId>,
}

impl Batch {
    pub(super) fn new() -> Self {
        Self {
            items: Vec::with_capacity(KSET_KEYS_MAX),
            key_count: 0,
            payload_bytes: 0,
            dirty_bytes: 0,
            claims: Vec::with_capacity(BATCH_PAGES_MAX),
            slots: Vec::with_capacity(BATCH_PAGES_MAX),
            lines: LineStock::new(BATCH_PAGES_MAX),
            keys: Vec::with_capacity(KSET_KEYS_MAX),
            kset: KsetBuilder::default(),
            seq: Seq(0),
            fua: false,
            conflicted: VecDeque::with_capacity(super::channel::REQUEST_COUNT_MAX),
        }
    }

    fn clear(&mut self) {
        self.items.clear();
        self.key_count = 0;
        self.payload_bytes = 0;
        self.dirty_bytes = 0;
        self.claims.clear();
        self.slots.clear();
        self.keys.clear();
        self.kset.clear();
        self.fua = false;
    }
}

/// Why an extent cannot be part of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// The batch is full, or the segment for it: commit it, then try again.
    BatchFull,
    /// Another core is at one of the pages.
    Busy,
    /// Nothing is free, in the log or in the index.
    NoRoom,
}

impl Core {
    pub(super) fn poll_writes<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        if self.writes.is_empty() && self.fills.is_empty() {
            return;
        }
        if let Some((number, mut stream)) = self.lock_stream(cache) {
            while self.run_batch(cache, number, &mut stream, out)
                && out.completions.len() < COMPLETIONS_PER_POLL
            {}
        }
        // Whatever could not be put into the cache is given up: the read has waited long enough.
        while let Some(op) = self.fills.pop_front() {
            self.counters(cache).fills_dropped.add(1);
            self.settle_miss(cache, op, out);
        }
        while let Some(id) = self.batch.conflicted.pop_back() {
            if canary::is(Canary::AcknowledgedUnlogged) {
                self.complete(cache, id, Status::Success, out);
                continue;
            }
            self.writes.push_front(id);
        }
    }

    /// The home stream, or another that is not in use: one core at a time appends to a segment (INV-PMEM-3).
    fn lock_stream<'a, P>(&self, cache: &'a Cache<P>) -> Option<(usize, MutexGuard<'a, Stream>)> {
        let count = cache.streams.len();
        let home = self.home_stream;
        (home..count).chain(0..home).find_map(|number| {
            let stream = cache.streams[number].try_lock().ok()?;
            Some((number, stream))
        })
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
        self.gather_fills(cache, stream, out);
        let more = self.gather_writes(cache, stream);
        if self.batch.items.is_empty() {
            return more;
        }
        let Some(open) = &mut stream.open else {
            unreachable!("INV-LOG-1: a batch with items has an open segment")
        };
        let durable = self.commit(cache, number, open);
        self.complete_batch(cache, &durable, out);
        more
    }

    fn gather_writes<P: Pmem>(&mut self, cache: &Cache<P>, stream: &mut Stream) -> bool {
        while let Some(id) = self.writes.pop_front() {
            let Some(request) = self.requests.get(id) else {
                continue;
            };
            let io = request.io;
            match self.admit(cache, stream, io.lba, io.len_blocks, has_payload(&io)) {
                Ok(()) => {
                    self.batch.items.push(Item::Write(id));
                    self.batch.fua |= matches!(io.op, Op::Write(_, Fua::Yes));
                }
                Err(Refusal::BatchFull) => {
                    self.writes.push_front(id);
                    return true;
                }
                Err(Refusal::Busy) => {
                    self.counters(cache).conflicts.add(1);
                    self.batch.conflicted.push_back(id);
                }
                Err(Refusal::NoRoom) => {
                    self.counters(cache).space_waits.add(1);
                    self.writes.push_front(id);
                    cache.space_wanted.store(true, Ordering::Release);
                    return false;
                }
            }
        }
        false
    }

    fn gather_fills<P: Pmem>(&mut self, cache: &Cache<P>, stream: &mut Stream, out: &mut Outbox) {
        for _ in 0..self.fills.len() {
            let Some(op) = self.fills.pop_front() else {
                return;
            };
            let Some(miss) = self.misses.get(op) else {
                continue;
            };
            let (lba, len_blocks, versions) = (miss.lba, miss.len_blocks, miss.versions);
            let mark = self.batch.mark();
            let room = cache.segments.free_count() >= FILL_FREE_SEGMENTS_MIN;
            if room
                && self
                    .admit(cache, stream, lba, len_blocks, HasPayload::Yes)
                    .is_ok()
            {
                if self.is_fresh(cache, lba, len_blocks, &versions, mark) {
                    self.batch.items.push(Item::Fill(op));
                    continue;
                }
                let need = need(cache, lba, len_blocks, HasPayload::Yes);
                self.batch.key_count -= need.key_count;
                self.batch.payload_bytes -= need.payload_bytes;
                let owner = self.owner();
                self.batch.roll_back(cache, owner, mark);
            }
            self.counters(cache).fills_dropped.add(1);
            self.settle_miss(cache, op, out);
        }
    }

    /// Whether nothing was published to the pages of a fill since they were found missing, and nothing of
    /// this batch is going to be. The pages are claimed, so it stays so until the commit (INV-FILL-1).
    fn is_fresh<P: Pmem>(
        &self,
        cache: &Cache<P>,
        lba: Lba,
        len_blocks: u64,
        versions: &[crate::index::Version],
        mark: Mark,
    ) -> bool {
        let claimed_now = &self.batch.claims[mark.claims..];
        pages(cache, lba, len_blocks)
            .zip(versions)
            .all(|(page, version)| {
                let at = cache.index.locate(page);
                // A bucket claimed earlier in this batch may be about to be published to.
                let unchanged =
                    cache.index.version(at) == *version || canary::is(Canary::StaleFillInstalled);
                unchanged && claimed_now.contains(&at.bucket())
            })
    }

    /// Claims, reserves and makes room for an extent, or leaves everything as it was.
    fn admit<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        stream: &mut Stream,
        lba: Lba,
        len_blocks: u64,
        payload: HasPayload,
    ) -> Result<(), Refusal> {
        let need = need(cache, lba, len_blocks, payload);
        self.make_log_room(cache, stream, &need)?;
        let owner = self.owner();
        self.batch.hold_pages(cache, owner, lba, len_blocks)?;
        self.batch.key_count += need.key_count;
        self.batch.payload_bytes += need.payload_bytes;
        Ok(())
    }

    fn make_log_room<P: Pmem>(
        &self,
        cache: &Cache<P>,
        stream: &mut Stream,
        need: &Need,
    ) -> Result<(), Refusal> {
        let batch = &self.batch;
        let key_count = batch.key_count + need.key_count;
        let payload_bytes = batch.payload_bytes + need.payload_bytes;
        let first = batch.items.is_empty();
        let too_large = key_count > KSET_KEYS_MAX
            || batch.slots.len() + need.page_count > BATCH_PAGES_MAX
            || payload_bytes > BATCH_BYTES_MAX;
        if too_large && !first {
            return Err(Refusal::BatchFull);
        }
        let fits = |stream: &Stream| {
            stream
                .open
                .as_ref()
                .is_some_and(|open| open.has_room(key_count, payload_bytes))
        };
        if fits(stream) {
            return Ok(());
        }
        if !first {
            return Err(Refusal::BatchFull);
        }
        // The old segment is sealed even if there is no new one: then it can be reclaimed.
        if stream.advance(&cache.stream_context(self.agent())) && fits(stream) {
            Ok(())
        } else {
            Err(Refusal::NoRoom)
        }
    }

    /// Makes the batch durable and publishes it. Nothing in here can fail.
    fn commit<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        number: usize,
        open: &mut OpenSegment,
    ) -> Durable {
        let agent = self.agent();
        let segment = cache.segments.get(open.id);
        // The floor is set before the number is drawn, so that write-back never passes this batch by
        // (INV-LOG-7): whoever reads `seq_next` as it is behind the drawing, or later, sees the floor.
        let floor = &cache.stream_floors[number];
        if !canary::is(Canary::FloorNotSet) {
            floor.store(cache.seq_next.load(Ordering::SeqCst), Ordering::Relaxed);
        }
        sched::point();
        // The epoch is read before the number is drawn: whoever sees the next epoch has a higher number than
        // everything that completed before it began (INV-EPOCH-1).
        let epoch = Epoch(cache.epoch.load(Ordering::SeqCst));
        sched::point();
        let seq = Seq(cache.seq_next.fetch_add(1, Ordering::SeqCst));
        sched::point();
        // Before anything of the kset is published: what counts as clean is on the base (INV-READ-1).
        segment.note_seq(seq);
        self.batch.seq = seq;

        // 1. Payloads. They are durable before the kset that names them is stored (INV-LOG-4).
        self.store_payloads(cache, open);
        if !canary::is(Canary::PayloadsNotFenced) {
            drop(cache.pmem.fence(agent));
        }
        if canary::is(Canary::PublishedBeforeDurable) {
            self.publish(cache, open);
        }
        #[cfg(feature = "canary")]
        let seq = self.commit_half(cache, open, (seq, epoch));

        // 2. The kset. From the fence on, recovery finds the whole batch; before it, nothing of it.
        let off = cache
            .geometry
            .segment_off(open.id)
            .plus(u64::from(open.key_off));
        let bytes = self
            .batch
            .kset
            .finish(open.kset_seed, open.kset_index, seq, epoch);
        let keys_end = u64::from(open.key_off) + bytes.len() as u64;
        assert!(
            keys_end <= u64::from(open.data_off),
            "INV-LOG-1: a kset up to {keys_end} meets the payload at {}",
            open.data_off
        );
        cache.pmem.store(agent, off, bytes);
        let fencing = if canary::is(Canary::KsetFencedByAnotherCore) {
            BACKGROUND_AGENT
        } else {
            agent
        };
        let durable = cache.pmem.fence(fencing);
        // A kset is some kilobytes long.
        open.key_off += bytes.len() as u32;
        let kset_bytes = bytes.len() as u64;
        open.kset_index += 1;

        // 3. Publish: a read never returns what a power cut could take back (INV-LOG-5).
        self.publish(cache, open);
        let owner = self.owner();
        for bucket in &self.batch.claims {
            cache.index.release(*bucket, owner);
        }
        self.batch.claims.clear();
        cache.index.clear_stock(&mut self.batch.lines);
        cache
            .dirty_bytes
            .fetch_add(self.batch.dirty_bytes, Ordering::Relaxed);
        sched::point();
        segment.set_key_end(open.key_off);
        segment.set_room_bytes(open.room_bytes());
        sched::point();
        // What the batch did is visible before its floor is gone. Nobody is misled who sees the floor longer.
        floor.store(u64::MAX, Ordering::Release);
        let counters = self.counters(cache);
        counters.batches.add(1);
        counters.keys.add(self.batch.keys.len() as u64);
        counters
            .logged_bytes
            .add(self.batch.payload_bytes + kset_bytes);
        let histograms = &counters.histograms;
        histograms
            .batch_requests
            .note(self.batch.items.len() as u64);
        durable
    }

    fn store_payloads<P: Pmem>(&mut self, cache: &Cache<P>, open: &mut OpenSegment) {
        for at in 0..self.batch.items.len() {
            match self.batch.items[at] {
                Item::Write(id) => {
                    let Some(request) = self.requests.get(id) else {
                        unreachable!("INV-IO-1: a request of the batch has ended before it")
                    };
                    let io = request.io;
                    match io.op {
                        Op::Write(cursor, _) => {
                            self.batch.dirty_bytes += cache.geometry.bytes(io.len_blocks);
                            let extent = (io.lba, io.len_blocks, KeyKind::Data);
                            self.store_payload(cache, open, extent, cursor);
                        }
                        Op::WriteZeroes => self.push_key(cache, &io, KeyKind::Zeroes),
                        Op::Unmap => self.push_key(cache, &io, KeyKind::Unmap),
                        Op::Read(_) | Op::Lend | Op::Flush => {}
                    }
                }
                Item::Fill(op) => {
                    let Some(miss) = self.misses.get(op) else {
                        unreachable!("INV-IO-1: a read fill of the batch has ended before it")
                    };
                    let extent = (miss.lba, miss.len_blocks, KeyKind::Fill);
                    let cursor = miss.cursor;
                    self.store_payload(cache, open, extent, cursor);
                }
            }
        }
    }

    /// Stores the payload of one extent in one piece, and a key for each page of it.
    fn store_payload<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        open: &mut OpenSegment,
        (lba, len_blocks, kind): (Lba, u64, KeyKind),
        mut cursor: IovCursor,
    ) {
        let geometry = &cache.geometry;
        let (agent, shift) = (self.agent(), geometry.block_shift());
        // Room was made for it: the payload is smaller than the segment.
        open.data_off -= geometry.bytes(len_blocks) as u32;
        let start = geometry.segment_off(open.id);
        let mut payload_off = open.data_off;
        if cache.data_crc == DataCrc::Off {
            let bytes = geometry.bytes(len_blocks);
            cache.pmem.store_from(
                agent,
                start.plus(u64::from(payload_off)),
                &mut cursor,
                bytes,
            );
        }
        for (page_lba, page_blocks) in page_pieces(cache, lba, len_blocks) {
            let bytes = page_blocks << shift;
            let crc = match cache.data_crc {
                DataCrc::Off => 0,
                DataCrc::On => cache.pmem.store_from_crc(
                    agent,
                    start.plus(u64::from(payload_off)),
                    &mut cursor,
                    u64::from(bytes),
                    open.payload_seed.0,
                ),
            };
            let key = Key {
                lba: page_lba,
                len_blocks: page_blocks,
                kind,
                payload_off,
                crc,
            };
            self.batch.kset.push(&key, shift);
            self.batch.keys.push(key);
            payload_off += bytes;
        }
    }

    fn push_key<P: Pmem>(&mut self, cache: &Cache<P>, io: &HostIo, kind: KeyKind) {
        // Limited to a few MiB.
        let len_blocks = io.len_blocks as u32;
        let key = Key {
            lba: io.lba,
            len_blocks,
            kind,
            payload_off: 0,
            crc: 0,
        };
        self.batch.kset.push(&key, cache.geometry.block_shift());
        self.batch.keys.push(key);
    }

    fn publish<P: Pmem>(&mut self, cache: &Cache<P>, open: &OpenSegment) {
        let index = &cache.index;
        let in_page = u64::from(cache.geometry.blocks_per_page()) - 1;
        let Batch {
            slots, lines, keys, ..
        } = &mut self.batch;
        let mut slots = slots.iter();
        let mut publish = |lba: Lba, len_blocks: u32, target| {
            let Some(slot) = slots.next() else {
                unreachable!("INV-INDEX-1: a page is published without a slot reserved for it")
            };
            let first = (lba.0 & in_page) as u32;
            index.publish(*slot, first, len_blocks, target, lines);
        };
        for key in &*keys {
            let place = cache.geometry.place(open.id, key.payload_off);
            if key.kind.has_payload() {
                // Such a key lies within a page.
                publish(key.lba, key.len_blocks, Target::Mapped(place));
                continue;
            }
            for (lba, len_blocks) in page_pieces(cache, key.lba, u64::from(key.len_blocks)) {
                publish(lba, len_blocks, Target::Zero(place));
            }
        }
    }

    /// Completes what the batch was made of. Asks for the proof that it is durable (INV-LOG-5).
    fn complete_batch<P: Pmem>(&mut self, cache: &Cache<P>, _durable: &Durable, out: &mut Outbox) {
        if self.batch.fua && !canary::is(Canary::FuaClosesNoEpoch) {
            // Nothing that is submitted after a FUA write has completed may reach the base before it
            // (INV-EPOCH-2).
            cache.close_epoch();
        }
        let holds = cache.settings.cache_mode().holds_writes() && !canary::is(Canary::WriteNotHeld);
        for at in 0..self.batch.items.len() {
            match self.batch.items[at] {
                Item::Write(id) => {
                    let io = if holds {
                        self.hold(cache, self.batch.seq, id)
                    } else {
                        self.complete(cache, id, Status::Success, out)
                    };
                    if let Some(io) = io {
                        self.count_write(cache, &io);
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
        self.batch.items.clear();
    }

    fn count_write<P: Pmem>(&self, cache: &Cache<P>, io: &HostIo) {
        let counters = self.counters(cache);
        match io.op {
            Op::Write(_, fua) => {
                counters.writes.add(1);
                counters
                    .write_bytes
                    .add(cache.geometry.bytes(io.len_blocks));
                counters.fua_writes.add(u64::from(fua == Fua::Yes));
            }
            Op::WriteZeroes => counters.write_zeroes.add(1),
            Op::Unmap => counters.unmaps.add(1),
            Op::Read(_) | Op::Lend | Op::Flush => {}
        }
    }
}
