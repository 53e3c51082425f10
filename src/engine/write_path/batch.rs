//! A batch: what is appended to the log in one kset, and published at once.

use super::extent::{Extent, HasPayload, Need, need};
use super::{BATCH_BYTES_MAX, BATCH_PAGES_MAX};
use crate::canary::{self, Canary};
use crate::engine::DataCrc;
use crate::engine::cache::{BACKGROUND_AGENT, Cache};
use crate::engine::heal::Room;
use crate::engine::io::HostIo;
use crate::engine::stream::{Memory, OpenSegment, Stream};
use crate::index::{BlockMap, Change, GROUP_PAGES, LineStock, PageSlot, Target, Version};
use crate::media::{KSET_KEYS_MAX, Key, KeyKind, KsetBuilder, Proof};
use crate::pmem::{Durable, IovCursor, Pmem};
use crate::sched;
use crate::units::{Agent, Epoch, Lba, Seq};
use std::sync::atomic::{Ordering, fence};

/// Why an extent cannot be part of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The batch is full, or the segment for it: commit it, then try again.
    BatchFull,
    /// Another core is at one of the pages.
    Busy,
    /// Nothing is free, in the log or in the index.
    NoRoom,
    /// Memory was lost, and what is free has to be looked at first: that goes on with the next poll.
    NotLookedAt,
}

/// The batch under construction. Empty between polls; allocates once.
#[derive(Debug)]
pub(in crate::engine) struct Batch {
    /// Who stores.
    pub(super) agent: Agent,
    pub(in crate::engine) room: Room,
    pub(super) key_count: usize,
    pub(super) payload_bytes: u64,
    pub(super) dirty_bytes: u64,
    /// Buckets claimed for the batch.
    pub(super) claims: Vec<usize>,
    /// The slot of each page, in the order of the extents and of the pages of each.
    pub(super) slots: Vec<PageSlot>,
    /// For parts of pages whose other parts lie elsewhere.
    pub(super) lines: LineStock,
    /// What the batch says, in the order of its keys.
    pub(super) extents: Vec<Extent>,
    pub(super) kset: KsetBuilder,
    /// Drawn before the first payload is stored.
    pub(super) seq: Seq,
    epoch: Epoch,
    /// What recovery knows the payloads by. Those of writes may have checksums. Not what reclaiming has copied: it speaks
    /// against older keys of its blocks for as long as these are there, and must not be taken for torn when its payload rots.
    pub(super) proof: Proof,
}

impl Batch {
    /// Of whoever is called that in claims and fences.
    pub(in crate::engine) fn new(agent: Agent) -> Self {
        Self {
            agent,
            room: Room::Anybodys,
            key_count: 0,
            payload_bytes: 0,
            dirty_bytes: 0,
            claims: Vec::with_capacity(BATCH_PAGES_MAX),
            slots: Vec::with_capacity(BATCH_PAGES_MAX),
            lines: LineStock::new(BATCH_PAGES_MAX),
            extents: Vec::with_capacity(KSET_KEYS_MAX),
            kset: KsetBuilder::default(),
            seq: Seq(0),
            epoch: Epoch(0),
            proof: Proof::Fence,
        }
    }

    pub(super) fn clear(&mut self) {
        self.key_count = 0;
        self.payload_bytes = 0;
        self.dirty_bytes = 0;
        self.claims.clear();
        self.slots.clear();
        self.extents.clear();
        self.kset.clear();
        self.proof = Proof::Fence;
    }

    /// Nothing was admitted yet.
    pub(super) fn is_empty(&self) -> bool {
        self.key_count == 0
    }

    /// In claims.
    pub(super) fn owner(&self) -> u16 {
        self.agent.0
    }

    /// Whether nothing was written to the pages of a fill since they were found missing, nor anybody else has brought
    /// them. The pages are claimed, so it stays so until the commit (INV-FILL-1); the batch itself has nothing but fills
    /// before this one.
    pub(super) fn is_fresh<P: Pmem>(
        &self,
        cache: &Cache<P>,
        lba: Lba,
        len_blocks: u64,
        versions: &[Version],
    ) -> bool {
        let (index, geometry) = (&cache.index, &cache.geometry);
        let in_page = u64::from(geometry.blocks_per_page()) - 1;
        geometry
            .page_pieces(lba, len_blocks)
            .zip(versions)
            .all(|((lba, len_blocks), version)| {
                let at = index.locate(geometry.page_of(lba));
                let is_unwritten = index.version(at).is_unwritten_since(*version);
                // A page has 8 blocks at most.
                let first = (lba.0 & in_page) as u32;
                let is_absent = index.lookup(at).is_some_and(|found| {
                    (first..first + len_blocks)
                        .all(|block| found.map.block(block) == BlockMap::Absent)
                });
                (is_unwritten && is_absent) || canary::is(Canary::StaleFillInstalled)
            })
    }

    /// Claims, reserves and makes room for an extent, or leaves everything as it was.
    #[inline]
    pub(super) fn admit<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        stream: &mut Stream,
        lba: Lba,
        len_blocks: u64,
        payload: HasPayload,
    ) -> Result<(), Refusal> {
        let need = need(cache, lba, len_blocks, payload);
        self.make_log_room(cache, stream, &need)?;
        self.hold_pages(cache, lba, len_blocks)?;
        self.key_count += need.key_count;
        self.payload_bytes += need.payload_bytes;
        Ok(())
    }

    /// Whether so much more goes into the open segment.
    #[inline]
    pub(super) fn fits(&self, stream: &Stream, key_count: usize, payload_bytes: u64) -> bool {
        let key_count = self.key_count + key_count;
        let payload_bytes = self.payload_bytes + payload_bytes;
        let open = stream.open.as_ref();
        open.is_some_and(|open| open.has_room(key_count, payload_bytes))
    }

    #[inline(always)]
    fn make_log_room<P: Pmem>(
        &self,
        cache: &Cache<P>,
        stream: &mut Stream,
        need: &Need,
    ) -> Result<(), Refusal> {
        let key_count = self.key_count + need.key_count;
        let payload_bytes = self.payload_bytes + need.payload_bytes;
        let first = self.is_empty();
        let too_large = key_count > KSET_KEYS_MAX
            || self.slots.len() + need.page_count > BATCH_PAGES_MAX
            || payload_bytes > BATCH_BYTES_MAX;
        if too_large && !first {
            return Err(Refusal::BatchFull);
        }
        if self.room == Room::Anybodys && cache.is_for_healers(stream) {
            return Err(Refusal::NoRoom);
        }
        let fits = self.fits(stream, need.key_count, need.payload_bytes);
        if !first {
            return if fits {
                Ok(())
            } else {
                Err(Refusal::BatchFull)
            };
        }
        if fits {
            match stream.memory(&cache.stream_context(self.agent)) {
                Memory::Sound => return Ok(()),
                Memory::Unknown => return Err(Refusal::NotLookedAt),
                Memory::Lost => {}
            }
        }
        self.open_segment(cache, stream);
        if !self.fits(stream, need.key_count, need.payload_bytes) {
            return Err(Refusal::NoRoom);
        }
        match stream.memory(&cache.stream_context(self.agent)) {
            Memory::Sound => Ok(()),
            // One that is lost goes out of service with the next poll, and another one comes.
            Memory::Unknown | Memory::Lost => Err(Refusal::NotLookedAt),
        }
    }

    /// Opens a free segment, if there is one that nobody else waits for. The old segment is sealed in any case: then it
    /// can be reclaimed; but for what heals, of which a smaller one may have room there.
    #[inline(never)]
    fn open_segment<P: Pmem>(&self, cache: &Cache<P>, stream: &mut Stream) {
        let context = cache.stream_context(self.agent);
        if let Some(left_free) = cache.leaves_free(self.agent, self.room) {
            let is_open = stream.advance(&context, left_free);
            stream.is_for_healers = is_open && self.room == Room::Healers;
        } else if self.room == Room::Anybodys || stream.is_suspect(&context) {
            stream.seal(&context);
        }
    }

    /// Draws the number of the batch, for a stream that is held. Nothing behind this can fail.
    pub(super) fn draw<P: Pmem>(&mut self, cache: &Cache<P>, number: usize, open: &OpenSegment) {
        // The floor is set before the number is drawn, so that write-back never passes this batch by
        // (INV-LOG-7): whoever reads `seq_next` as it is behind the drawing, or later, sees the floor. Who sees this one in
        // place of the end of the batch before is to see what that did: it is released too.
        let floor = &cache.stream_floors[number];
        if !canary::is(Canary::FloorNotSet) {
            let seq_next = cache.seq_next.load(Ordering::SeqCst);
            sched::point();
            floor.store(seq_next, Ordering::Release);
        }
        sched::point();
        // The epoch is read before the number is drawn: whoever sees the next epoch has a higher number than
        // everything that completed before it began (INV-EPOCH-1).
        let epoch = Epoch(cache.epoch.load(Ordering::SeqCst));
        sched::point();
        let seq = Seq(cache.seq_next.fetch_add(1, Ordering::SeqCst));
        sched::point();
        // Before anything of the kset is published: what counts as clean is on the base (INV-READ-1).
        cache.segments.get(open.id).note_seq(seq);
        (self.seq, self.epoch) = (seq, epoch);
    }

    /// Whether the checksums of its payloads take less time than a fence.
    pub(super) fn is_quickly_checksummed<P: Pmem>(&self, cache: &Cache<P>) -> bool {
        (1..=cache.unfenced_bytes_max).contains(&self.payload_bytes)
    }

    /// Whether keys get the checksums of their payloads.
    fn data_crc<P: Pmem>(&self, cache: &Cache<P>) -> DataCrc {
        match self.proof {
            Proof::Checksums => DataCrc::On,
            Proof::Fence => cache.data_crc,
        }
    }

    /// Makes the batch durable and publishes it: its payloads are stored.
    pub(super) fn commit<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        number: usize,
        open: &mut OpenSegment,
    ) -> Durable {
        let (agent, seq, epoch) = (self.agent, self.seq, self.epoch);
        let segment = cache.segments.get(open.id);
        let floor = &cache.stream_floors[number];
        // While the payloads are on their way.
        let proof = self.proof;
        self.kset
            .finish(open.kset_seed, open.kset_index, seq, epoch, proof);
        // 1. Payloads are durable before the kset that names them is stored, or recovery knows them by their checksums
        //    (INV-LOG-4).
        match proof {
            // If the memory has not taken a payload, nothing is to name it: a fence looks, too.
            Proof::Checksums => cache.pmem.assert_stores_taken(),
            Proof::Fence if canary::is(Canary::PayloadsNotFenced) => {}
            Proof::Fence => drop(cache.pmem.fence(agent)),
        }
        if canary::is(Canary::PublishedBeforeDurable) {
            self.publish(cache, open);
        }
        #[cfg(feature = "canary")]
        {
            let seq = self.commit_half(cache, open, (seq, epoch));
            self.kset
                .finish(open.kset_seed, open.kset_index, seq, epoch, proof);
        }

        // 2. The kset. From the fence on, recovery finds the whole batch; before it, nothing of it.
        let off = cache
            .geometry
            .segment_off(open.id)
            .plus(u64::from(open.key_off));
        let bytes = self.kset.bytes();
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
        // Beside a write fills count as one, too: that drops other fills, at worst.
        let change = if self.extents.iter().any(|extent| extent.kind.is_dirty()) {
            Change::Written
        } else {
            Change::Moved
        };
        for bucket in &self.claims {
            cache.index.release(*bucket, self.owner(), change);
        }
        self.claims.clear();
        cache.index.clear_stock(&mut self.lines);
        cache
            .dirty_bytes
            .fetch_add(self.dirty_bytes, Ordering::Release);
        sched::point();
        segment.set_key_end(open.key_off);
        segment.set_room_bytes(open.room_bytes());
        sched::point();
        // What the batch did is visible before its floor is gone. Nobody is misled who sees the floor longer.
        floor.store(u64::MAX, Ordering::Release);
        let counters = &cache.counters[usize::from(self.agent.0 - 1)];
        if change == Change::Written {
            // Whoever counts them finds the number that they have drawn (`writeback::index_share`).
            fence(Ordering::Release);
            counters.pages.add(self.slots.len() as u64);
        }
        counters.batches.add(1);
        counters.keys.add(self.kset.key_count() as u64);
        counters.logged_bytes.add(self.payload_bytes + kset_bytes);
        durable
    }

    /// Stores the payload of one extent in one piece, and makes a key for each page of it.
    pub(super) fn store_payload<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        open: &mut OpenSegment,
        (lba, len_blocks, kind): (Lba, u64, KeyKind),
        mut cursor: IovCursor,
    ) {
        let geometry = &cache.geometry;
        let shift = geometry.block_shift();
        // Room was made for it: the payload is smaller than the segment.
        open.data_off -= geometry.bytes(len_blocks) as u32;
        let mut key = Key {
            lba,
            // Less than a segment.
            len_blocks: len_blocks as u32,
            kind,
            payload_off: open.data_off,
            crc: 0,
        };
        self.extents.push(Extent::from(&key));
        if geometry.pages_touched(lba, len_blocks) == 1 {
            key.crc = self.store_part(cache, open, &key, &mut cursor);
            return self.kset.push(&key, shift);
        }
        // A few pages at a time: their keys are made while their stores are on their way. Each has a checksum of its own.
        let pages_at_once = match self.data_crc(cache) {
            DataCrc::Off => GROUP_PAGES,
            DataCrc::On => 1,
        };
        for (lba, len_blocks) in geometry.group_pieces(lba, len_blocks, pages_at_once) {
            (key.lba, key.len_blocks) = (lba, len_blocks as u32);
            key.crc = self.store_part(cache, open, &key, &mut cursor);
            self.kset.push_pages(&key, geometry);
            key.payload_off += key.len_blocks << shift;
        }
    }

    /// Stores the payload that a key names. Returns its checksum, 0 without checksums.
    #[inline(always)]
    fn store_part<P: Pmem>(
        &self,
        cache: &Cache<P>,
        open: &OpenSegment,
        key: &Key,
        cursor: &mut IovCursor,
    ) -> u32 {
        let (geometry, agent) = (&cache.geometry, self.agent);
        let bytes = geometry.bytes(u64::from(key.len_blocks));
        let off = geometry.payload_off(open.id, key);
        match self.data_crc(cache) {
            DataCrc::Off => {
                cache.pmem.store_from(agent, off, cursor, bytes);
                0
            }
            DataCrc::On => {
                let seed = open.payload_seed.0;
                (cache.pmem).store_from_crc(agent, off, cursor, bytes, seed)
            }
        }
    }

    /// Stores the payload of a part of a page, and its key.
    pub(super) fn store_piece<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        open: &mut OpenSegment,
        (lba, kind): (Lba, KeyKind),
        payload: &[u8],
    ) {
        let shift = cache.geometry.block_shift();
        // A page at the most.
        let len_bytes = payload.len() as u32;
        open.data_off -= len_bytes;
        let off = cache.geometry.segment_off(open.id);
        let off = off.plus(u64::from(open.data_off));
        cache.pmem.store(self.agent, off, payload);
        let crc = match self.data_crc(cache) {
            DataCrc::Off => 0,
            DataCrc::On => open.payload_seed.checksum(payload),
        };
        let key = Key {
            lba,
            len_blocks: len_bytes >> shift,
            kind,
            payload_off: open.data_off,
            crc,
        };
        self.add(&key, shift);
    }

    pub(super) fn push_key<P: Pmem>(&mut self, cache: &Cache<P>, io: &HostIo, kind: KeyKind) {
        // Limited to a few MiB.
        let len_blocks = io.len_blocks as u32;
        let key = Key {
            lba: io.lba,
            len_blocks,
            kind,
            payload_off: 0,
            crc: 0,
        };
        self.add(&key, cache.geometry.block_shift());
    }

    /// An extent of one key.
    fn add(&mut self, key: &Key, block_shift: u32) {
        self.kset.push(key, block_shift);
        self.extents.push(Extent::from(key));
    }

    fn publish<P: Pmem>(&mut self, cache: &Cache<P>, open: &OpenSegment) {
        #[cfg(any(test, feature = "sim"))]
        self.check_keys(cache);
        // Whoever finds the place finds its checksum (INV-CRC-2).
        if !canary::is(Canary::CrcNotedLate) {
            self.note_crcs(cache, open);
        }
        let Batch {
            slots,
            lines,
            extents,
            ..
        } = self;
        let (index, geometry) = (&cache.index, &cache.geometry);
        let in_page = u64::from(geometry.blocks_per_page()) - 1;
        let mut slots = slots.iter();
        let mut next = || match slots.next() {
            Some(slot) => *slot,
            None => {
                unreachable!("INV-INDEX-1: a page is published without a slot reserved for it")
            }
        };
        for extent in &*extents {
            let mut place = geometry.place(open.id, extent.payload_off);
            let has_payload = extent.kind.has_payload();
            if has_payload && (extent.lba.0 | extent.len_blocks) & in_page == 0 {
                let end = place.0 + extent.len_blocks;
                while place.0 < end {
                    index.publish_page(next(), Target::Mapped(place), lines);
                    place.0 += in_page + 1;
                }
                continue;
            }
            for (lba, len_blocks) in geometry.page_pieces(extent.lba, extent.len_blocks) {
                let first = (lba.0 & in_page) as u32;
                if has_payload {
                    index.publish(next(), first, len_blocks, Target::Mapped(place), lines);
                    place.0 += u64::from(len_blocks);
                } else {
                    // Zeroes lie where their key does.
                    index.publish(next(), first, len_blocks, Target::Zero(place), lines);
                }
            }
        }
        if canary::is(Canary::CrcNotedLate) {
            self.note_crcs(cache, open);
        }
    }

    /// That the log says of each page what the index is going to say.
    #[cfg(any(test, feature = "sim"))]
    fn check_keys<P: Pmem>(&self, cache: &Cache<P>) {
        let geometry = &cache.geometry;
        let mut keys = self.kset.keys(geometry.block_shift());
        for extent in &self.extents {
            let (mut rest, mut payload_off) = (extent.len_blocks, extent.payload_off);
            while rest > 0 {
                let Some(key) = keys.next() else {
                    panic!("INV-LOG-10: a page of {extent:?} has no key");
                };
                let is_of_one_page = geometry.pages_touched(key.lba, key.len_blocks.into()) == 1;
                let first = extent.lba.0 + (extent.len_blocks - rest);
                assert_eq!(
                    (
                        key.lba,
                        key.kind,
                        key.payload_off,
                        is_of_one_page || !key.kind.has_payload()
                    ),
                    (Lba(first), extent.kind, payload_off, true),
                    "INV-LOG-10: {key:?} is none of {extent:?}"
                );
                rest -= u64::from(key.len_blocks);
                if key.kind.has_payload() {
                    payload_off += key.len_blocks << geometry.block_shift();
                }
            }
        }
        assert_eq!(keys.next(), None, "INV-LOG-10: a key without an extent");
    }

    /// Says of the places of all payloads which checksums they have.
    fn note_crcs<P: Pmem>(&self, cache: &Cache<P>, open: &OpenSegment) {
        let Some(crcs) = &cache.place_crcs else {
            return;
        };
        let geometry = &cache.geometry;
        for key in self.kset.keys(geometry.block_shift()) {
            if key.kind.has_payload() {
                crcs.note(geometry.place(open.id, key.payload_off), &key);
            }
        }
    }
}
