//! The cache: what its channels and its background share.

use super::cache_memory::BackgroundMemory;
use super::channel_ids::ChannelIds;
use super::checkpoint::Checkpoint;
use super::config::{BaseCaps, CacheMode, DataCrc};
use super::damage::{Damage, DamagedRange};
use super::drain::Drain;
use super::fetches::Fetches;
use super::grace::Grace;
use super::health::Health;
use super::heat::Heat;
use super::mode::ModeState;
use super::open_ids::CORE_STREAM_COUNT_MAX;
use super::pins::LoanCounts;
use super::place_crcs::PlaceCrcs;
use super::room_queue::RoomQueue;
use super::sealing::Sealed;
#[cfg(any(test, feature = "sim"))]
use super::segments::SegmentState;
use super::segments::{Segments, Special};
use super::settings::{ChangeError, SettingChange, SettingValues, Settings};
#[cfg(any(test, feature = "heap"))]
use super::staging::PADS_SIZE_BYTES;
use super::stats::{Counter, Counters, Stats};
use super::stream::{OpenSegment, Stream, StreamContext};
use super::write_path::BATCH_PAGES_MAX;
use super::{Background, Channel};
use crate::canary::{self, Canary};
use crate::index::{Index, OWNER_MAX};
use crate::media::{
    CLEAR_SIZE_MAX_BYTES, Checksums, Geometry, KSET_KEYS_MAX, KeyKind, Place, Superblock, Tails,
};
#[cfg(any(test, feature = "heap"))]
use crate::pmem::PAD_PAGE_SIZE_BYTES;
use crate::pmem::{PadMemory, Pmem};
use crate::sched;
use crate::units::{Agent, Epoch, PAGE_SIZE_BYTES, Seq};
use crossbeam_utils::CachePadded;
use serde::Serialize;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The most channels that can be open at once.
pub const CHANNEL_COUNT_MAX: u16 = 256;
/// The largest write, in bytes, if the segments are large enough: it is atomic.
pub const WRITE_SIZE_MAX_BYTES: u64 = 1 << 20;
/// The largest unmap or write-zeroes request, in bytes: one key.
const UNMAP_SIZE_MAX_BYTES: u64 = CLEAR_SIZE_MAX_BYTES;
/// It takes at most this part of what the index has room for, or so many pages.
const UNMAP_INDEX_PARTS: u64 = 8;
const UNMAP_PAGES_MIN: u64 = 16;
/// A write takes at most this part of a segment, so that little is wasted where one ends.
const WRITE_SEGMENT_PARTS: u64 = 4;
/// So many segments are kept free besides one for each stream.
const FREE_SEGMENTS_EXTRA: usize = 2;
/// A cache of few segments has fewer streams, so that open segments do not hold all the space.
const SEGMENTS_PER_STREAM: u32 = 4;
/// With fewer there are no segments for special purposes: those that are open would hold too much of the space.
const SPECIAL_SEGMENTS_MIN: u32 = 13;

// INV-LOG-8: a request of the largest size, at any alignment, is one kset.
const _: () = {
    let page = PAGE_SIZE_BYTES as u64;
    assert!(WRITE_SIZE_MAX_BYTES / page < KSET_KEYS_MAX as u64);
    assert!(UNMAP_SIZE_MAX_BYTES / page < BATCH_PAGES_MAX as u64);
};

/// The background's name in claims and fences; channels count from 1.
pub(crate) const BACKGROUND_AGENT: Agent = Agent(CHANNEL_COUNT_MAX + 1);
const _: () = assert!(BACKGROUND_AGENT.0 <= OWNER_MAX);

/// A cache, described.
#[derive(Clone, Debug, Serialize)]
pub struct CacheInfo {
    /// Of the cache, made at format: 32 hexadecimal digits.
    pub uuid: String,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Size of the cached device in blocks.
    pub block_count: u64,
    /// Size of the cache device in KiB.
    pub cache_size_kib: u64,
    /// Size of a segment in KiB.
    pub segment_size_kib: u64,
    /// Number of segments.
    pub segment_count: u32,
    /// Segments that hold nothing.
    pub segments_free: u64,
    /// Segments that are not used any more, since their memory is damaged.
    pub segments_quarantined: u64,
    /// Whether payloads carry checksums.
    pub data_crc: bool,
    /// What can be changed, as it is now.
    #[serde(flatten)]
    pub settings: SettingValues,
    /// The mode that holds for everything in the cache: `cache_mode`, or an earlier one as long as dirty data of
    /// that are left.
    pub cache_mode_now: CacheMode,
    /// Blocks of which the only copy is known to be damaged: reads of them fail until they are overwritten.
    pub damaged: Vec<DamagedRange>,
    /// Bytes that the base does not hold yet.
    pub dirty_bytes: u64,
    /// How old the oldest of them are at the most, in milliseconds, but for time before the cache was opened.
    pub dirty_age_ms: u64,
    /// The longest time for which writes have stood still for want of room, in microseconds, with one under way.
    pub stall_us_max: u64,
    /// Whether requests wait for room in the cache.
    pub requests_wait: bool,
    /// The log up to here is on the base.
    pub dirty_tail: u64,
    /// The end of the log.
    pub seq_next: u64,
    /// Barriers of the application so far.
    pub epoch: u64,
    /// DRAM of the index in bytes: its table, and lines for split pages as far as they were ever used.
    pub index_bytes: u64,
}

/// What recovery hands over.
pub(crate) struct CacheParts<P> {
    pub(crate) pmem: P,
    pub(crate) superblock: Superblock,
    pub(crate) tails: Tails,
    pub(crate) base_caps: BaseCaps,
    pub(crate) index: Index,
    pub(crate) place_crcs: Option<PlaceCrcs>,
    pub(crate) segments: Segments,
    pub(crate) damage: Damage,
    pub(crate) heat: Heat,
    pub(crate) background: BackgroundMemory,
    pub(crate) seq_next: Seq,
    pub(crate) epoch: Epoch,
    pub(crate) dirty_bytes: u64,
    pub(crate) stream_count_max: u32,
}

/// A cache in use. Shared by its channels and its background; every method can be called from any thread.
#[derive(Debug)]
pub struct Cache<P> {
    pub(crate) pmem: P,
    pub(crate) geometry: Geometry,
    pub(crate) checksums: Checksums,
    pub(super) block_count: AtomicU64,
    pub(crate) base_caps: BaseCaps,
    pub(crate) data_crc: DataCrc,
    /// Payload that a batch may have without a fence before its kset.
    pub(super) unfenced_bytes_max: u64,
    pub(crate) index: Index,
    /// With `data_crc`.
    pub(crate) place_crcs: Option<PlaceCrcs>,
    pub(crate) segments: Segments,
    /// Those of the cores, then one for each [`Special`], if there is room for them.
    pub(crate) streams: Box<[CachePadded<Mutex<Stream>>]>,
    pub(crate) core_stream_count: usize,
    pub(crate) heat: Heat,
    /// For each stream: no kset below this number is still to come from the batch under way; `u64::MAX`
    /// while there is none.
    pub(crate) stream_floors: Box<[CachePadded<AtomicU64>]>,
    pub(crate) seq_next: CachePadded<AtomicU64>,
    pub(crate) epoch: CachePadded<AtomicU64>,
    /// Everything up to here is on the base, flushed, and the tails say so durably.
    pub(crate) dirty_tail: CachePadded<AtomicU64>,
    /// Every batch of every core adds to it.
    pub(crate) dirty_bytes: CachePadded<AtomicU64>,
    /// See [`CacheInfo`]; told by the background.
    pub(crate) dirty_age_ms: AtomicU64,
    /// Pages in the index of which something is dirty, in percent of what it is made for; 0 while that is not known, or does
    /// not matter. Told by write-back.
    pub(crate) index_dirty_percent: AtomicU64,
    pub(crate) stall_us_max: AtomicU64,
    /// Reads of the base for requests that wait for them.
    pub(crate) base_reads: CachePadded<AtomicU32>,
    /// How many of them have ended.
    pub(super) base_reads_ended: CachePadded<AtomicU64>,
    pub(crate) fetches: Fetches,
    pub(crate) damage: Damage,
    pub(crate) grace: Grace,
    /// A write waits for room that only the background can make.
    pub(crate) space_wanted: AtomicBool,
    pub(super) room_queue: RoomQueue,
    pub(crate) drain: Drain,
    pub(crate) mode: ModeState,
    /// Write-back stands still because of damage: what waits for the base waits in vain.
    pub(crate) writeback_stands: AtomicBool,
    /// See [`Cache::tail_stands`].
    pub(crate) tail_stands: AtomicBool,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) failed: AtomicBool,
    pub(crate) settings: Settings,
    /// As it is to be persisted, by the background.
    pub(crate) superblock: Mutex<Superblock>,
    pub(crate) superblock_changed: AtomicBool,
    background_parts: Mutex<Option<(Tails, BackgroundMemory)>>,
    pub(super) health: Mutex<Health>,
    pub(super) health_changes: AtomicU64,
    pub(super) changes_not_kept: AtomicU64,
    pub(super) channel_ids: ChannelIds,
    pub(super) loan_counts: LoanCounts,
    pub(crate) counters: Box<[CachePadded<Counters>]>,
    stats_start: Mutex<Stats>,
}

impl<P: Pmem> Cache<P> {
    pub(crate) fn new(parts: CacheParts<P>) -> Arc<Self> {
        let geometry = parts.superblock.geometry;
        let stream_count = (geometry.segment_count() / SEGMENTS_PER_STREAM)
            .min(parts.stream_count_max)
            .clamp(1, CORE_STREAM_COUNT_MAX);
        let mut purposes = vec![None; stream_count as usize];
        let core_stream_count = purposes.len();
        if geometry.segment_count() >= SPECIAL_SEGMENTS_MIN {
            purposes.extend(Special::ALL.map(Some));
        }
        let stream = |(number, special)| Mutex::new(Stream::new(number, special));
        let streams = purposes.into_iter().enumerate().map(stream);
        let streams: Vec<_> = streams.map(CachePadded::new).collect();
        let mode = parts.superblock.settings.cache_mode();
        let cache = Arc::new(Self {
            geometry,
            checksums: Checksums::new(parts.superblock.uuid),
            block_count: AtomicU64::new(parts.superblock.base.block_count),
            base_caps: parts.base_caps,
            data_crc: parts.superblock.data_crc,
            unfenced_bytes_max: match parts.superblock.has_unfenced_payloads() {
                true => parts.pmem.bytes_checksummed_per_fence(),
                false => 0,
            },
            index: parts.index,
            place_crcs: parts.place_crcs,
            segments: parts.segments,
            stream_floors: (streams.iter())
                .map(|_| CachePadded::new(AtomicU64::new(u64::MAX)))
                .collect(),
            streams: streams.into(),
            core_stream_count,
            heat: parts.heat,
            seq_next: CachePadded::new(AtomicU64::new(parts.seq_next.0)),
            epoch: CachePadded::new(AtomicU64::new(parts.epoch.0)),
            dirty_tail: CachePadded::new(AtomicU64::new(parts.tails.dirty_tail.0)),
            dirty_bytes: CachePadded::new(AtomicU64::new(parts.dirty_bytes)),
            dirty_age_ms: AtomicU64::new(0),
            index_dirty_percent: AtomicU64::new(0),
            stall_us_max: AtomicU64::new(0),
            base_reads: CachePadded::default(),
            base_reads_ended: CachePadded::default(),
            fetches: Fetches::new(),
            damage: parts.damage,
            grace: Grace::new(usize::from(CHANNEL_COUNT_MAX)),
            space_wanted: AtomicBool::new(false),
            room_queue: RoomQueue::new(usize::from(CHANNEL_COUNT_MAX)),
            drain: Drain::default(),
            mode: ModeState::default(),
            writeback_stands: AtomicBool::new(false),
            tail_stands: AtomicBool::new(false),
            checkpoint: Checkpoint::default(),
            failed: AtomicBool::new(false),
            settings: Settings::new(&parts.superblock.settings),
            superblock: Mutex::new(parts.superblock),
            superblock_changed: AtomicBool::new(false),
            background_parts: Mutex::new(Some((parts.tails, parts.background))),
            health: Mutex::default(),
            health_changes: AtomicU64::new(0),
            changes_not_kept: AtomicU64::new(0),
            channel_ids: ChannelIds::default(),
            loan_counts: LoanCounts::default(),
            counters: (0..=CHANNEL_COUNT_MAX)
                .map(|_| CachePadded::default())
                .collect(),
            stats_start: Mutex::default(),
            pmem: parts.pmem,
        });
        // What is dirty is of an earlier mode, or was cut off by a crash before the base had it.
        cache.mode_asked(CacheMode::Writeback, mode);
        cache
    }

    /// A channel for one thread; `None` if [`CHANNEL_COUNT_MAX`] are open. `pads`: [`PADS_SIZE_BYTES`], or less,
    /// and then less of what is read is kept.
    pub fn channel_with(self: &Arc<Self>, pads: Option<PadMemory>) -> Option<Channel<P>> {
        let id = self.channel_ids.take()?;
        Some(Channel::new(Arc::clone(self), id, pads))
    }

    /// As [`Cache::channel_with`], with memory from the heap.
    #[cfg(any(test, feature = "heap"))]
    pub fn channel(self: &Arc<Self>) -> Option<Channel<P>> {
        let pads = PadMemory::from_heap(PADS_SIZE_BYTES / PAD_PAGE_SIZE_BYTES);
        self.channel_with(Some(pads))
    }

    pub(crate) fn put_channel_id(&self, id: u16) {
        self.channel_ids.put(id);
    }

    /// The background work; `None` if it was taken before. It is given out once: with it goes what it knows of the log,
    /// and the segments that it has begun to reclaim.
    pub fn background(self: &Arc<Self>) -> Option<Background<P>> {
        let (tails, memory) = lock(&self.background_parts).take()?;
        Some(Background::new(Arc::clone(self), tails, memory))
    }

    pub(crate) fn stream_context(&self, agent: Agent) -> StreamContext<'_, P> {
        StreamContext {
            pmem: &self.pmem,
            geometry: &self.geometry,
            checksums: &self.checksums,
            segments: &self.segments,
            agent,
        }
    }

    /// The largest write that a channel takes, in bytes. It is atomic.
    pub fn write_size_max_bytes(&self) -> u64 {
        WRITE_SIZE_MAX_BYTES.min(self.geometry.segment_size_bytes() / WRITE_SEGMENT_PARTS)
    }

    /// To how many blocks the base may grow while the cache is in use: the index has room for their numbers. It
    /// keeps as many pages as before.
    #[must_use]
    pub fn base_block_count_max(&self) -> u64 {
        self.index.page_count_max() * u64::from(self.geometry.blocks_per_page())
    }

    /// The largest unmap or write-zeroes request that a channel takes, in bytes: a power of two. It is atomic, so it gets all
    /// of its slots in the index at once, or none; one that wanted a large part of them would wait for as long as others
    /// write.
    pub fn unmap_size_max_bytes(&self) -> u64 {
        let pages = (self.index.page_room() / UNMAP_INDEX_PARTS).max(UNMAP_PAGES_MIN);
        UNMAP_SIZE_MAX_BYTES.min((1 << pages.ilog2()) * u64::from(PAGE_SIZE_BYTES))
    }

    /// An orderly end: what was changed in the superblock becomes durable, and the open segments are sealed, so that
    /// damage in the last ksets of the log is told from its end (C7). After a kill the last kset of an open segment
    /// cannot be told from a torn one. When all channels are idle and the background is stopped; nothing may be
    /// submitted any more.
    pub fn seal_streams(&self) {
        if self.has_failed() {
            return;
        }
        // The background may have had no turn since.
        self.persist_changes();
        for stream in &self.streams {
            let mut stream = lock(stream);
            // What holds nothing stays free.
            if stream.open.is_some_and(|open| open.kset_index > 0) {
                stream.seal(&self.stream_context(BACKGROUND_AGENT));
            }
        }
    }

    /// Seals the open segment of a stream, if `is_wanted` says so and nobody is at the stream.
    pub(crate) fn try_seal(
        &self,
        stream_number: usize,
        agent: Agent,
        is_wanted: impl FnOnce(&OpenSegment) -> bool,
    ) -> Sealed {
        let Ok(mut stream) = self.streams[stream_number].try_lock() else {
            return Sealed::Busy;
        };
        if !stream.open.as_ref().is_some_and(is_wanted) {
            return Sealed::No;
        }
        stream.seal(&self.stream_context(agent));
        Sealed::Yes
    }

    /// What the base holds already: everything in a segment whose last kset was written back, or in which nothing is
    /// ever dirty (INV-READ-1).
    pub(crate) fn is_clean(&self, place: Place) -> bool {
        let segment = self.segments.get(self.geometry.segment_of(place));
        segment.is_on_base(self.dirty_tail())
    }

    /// The same of what a key names, of a kset with the number `seq`: read fills, and copies of what was clean, from the
    /// start; all else when it was written back (INV-READ-7).
    pub(crate) fn is_key_clean(&self, seq: Seq, kind: KeyKind) -> bool {
        kind == KeyKind::Fill || seq <= self.dirty_tail()
    }

    /// As [`Cache::is_clean`], before what lies there is taken out of the index: the segment then keeps in mind that
    /// something was (INV-SEG-8).
    pub(crate) fn forget_if_clean(&self, place: Place) -> bool {
        let is_clean = self.is_clean(place);
        if is_clean && !canary::is(Canary::ForgottenUnnoted) {
            let segment = self.geometry.segment_of(place);
            self.segments.get(segment).note_forgotten();
        }
        is_clean
    }

    /// The number of a special stream; `None`: there is none.
    pub(crate) fn special_stream_at(&self, special: Special) -> Option<usize> {
        let number = self.core_stream_count + special as usize;
        (number < self.streams.len()).then_some(number)
    }

    /// The number of a special stream that may be used; `None`: there is no room for it beside the segments that the
    /// channels need.
    pub(crate) fn special_stream(&self, special: Special) -> Option<usize> {
        let open = self.streams_in_use() + Special::COUNT;
        let is_roomy = 2 * open + FREE_SEGMENTS_EXTRA < self.segments_in_service();
        self.special_stream_at(special).filter(|_| is_roomy)
    }

    /// Streams that a channel may be using.
    fn streams_in_use(&self) -> usize {
        self.core_stream_count.min(self.channel_ids.count())
    }

    /// The next number to be drawn.
    pub(crate) fn seq_next(&self) -> Seq {
        Seq(self.seq_next.load(Ordering::Relaxed))
    }

    pub(crate) fn dirty_tail(&self) -> Seq {
        Seq(self.dirty_tail.load(Ordering::Acquire))
    }

    /// Whether the dirty tail stands still, for who knows how long: write-back fails, or stands because of damage, or a
    /// checkpoint holds the base.
    pub(crate) fn tail_stands(&self) -> bool {
        self.tail_stands.load(Ordering::Relaxed)
    }

    /// Everything below this is in the log, durable, or never will be (INV-LOG-7).
    pub(crate) fn seq_settled(&self) -> Seq {
        // The order matters: a batch that draws its number after this load draws one at or above it; one that
        // drew before has set its floor before, and is seen below.
        let next = self.seq_next.load(Ordering::SeqCst);
        sched::point();
        let floors = self
            .stream_floors
            .iter()
            .map(|floor| floor.load(Ordering::SeqCst));
        Seq(floors.min().unwrap_or(u64::MAX).min(next))
    }

    /// A barrier of the application: what is appended from now on belongs to the next epoch.
    pub(crate) fn close_epoch(&self) {
        sched::point();
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// What it is and how it is.
    pub fn info(&self) -> CacheInfo {
        let superblock = lock(&self.superblock).clone();
        CacheInfo {
            uuid: superblock
                .uuid
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
            block_size: self.geometry.block_size_bytes(),
            block_count: self.block_count(),
            cache_size_kib: superblock.device_size_bytes >> 10,
            segment_size_kib: self.geometry.segment_size_bytes() >> 10,
            segment_count: self.geometry.segment_count(),
            segments_free: self.segments.free_count() as u64,
            segments_quarantined: self.segments.quarantined_count() as u64,
            data_crc: self.data_crc == DataCrc::On,
            settings: superblock.settings,
            cache_mode_now: self.mode_now(),
            damaged: self.damage.ranges(),
            dirty_bytes: self.dirty_bytes.load(Ordering::Relaxed),
            dirty_age_ms: self.dirty_age_ms.load(Ordering::Relaxed),
            stall_us_max: self.stall_us_max.load(Ordering::Relaxed),
            requests_wait: self.space_wanted.load(Ordering::Relaxed),
            dirty_tail: self.dirty_tail().0,
            seq_next: self.seq_next.load(Ordering::Relaxed),
            epoch: self.epoch.load(Ordering::Relaxed),
            index_bytes: self.index.used_bytes(),
        }
    }

    /// Statistics since the creation or the last reset.
    pub fn stats(&self) -> Stats {
        self.stats_total().since(&lock(&self.stats_start))
    }

    /// Lets statistics start anew.
    pub fn reset_stats(&self) {
        *lock(&self.stats_start) = self.stats_total();
    }

    /// Reads and changes since the start: it grows as long as the application is at work.
    pub(crate) fn request_count(&self) -> u64 {
        let of_one = |counters: &CachePadded<Counters>| {
            let reads = [
                &counters.read_hits,
                &counters.read_partial_hits,
                &counters.read_misses,
            ];
            let changes = [&counters.writes, &counters.unmaps, &counters.write_zeroes];
            let all = reads.into_iter().chain(changes);
            all.map(Counter::get).fold(0, u64::wrapping_add)
        };
        let counts = self.counters.iter().map(of_one);
        counts.fold(0, u64::wrapping_add)
    }

    /// Pages that were written, unmapped or cleared since the start, each as often as it was.
    pub(crate) fn pages_written(&self) -> u64 {
        let counts = self.counters.iter().map(|counters| counters.pages.get());
        counts.fold(0, u64::wrapping_add)
    }

    fn stats_total(&self) -> Stats {
        let mut stats = Stats::default();
        self.counters
            .iter()
            .for_each(|counters| stats.add(counters));
        stats
    }

    /// Changes settings while in use. They take effect at once and are persisted by the background, or by an orderly end.
    ///
    /// # Errors
    /// A value is out of range, or does not go with the others, or the cache has failed; nothing is changed.
    pub fn change_settings(&self, change: &SettingChange) -> Result<(), ChangeError> {
        if self.has_failed() {
            return Err(ChangeError::Failed);
        }
        let mut superblock = lock(&self.superblock);
        let before = superblock.settings.cache_mode();
        superblock.settings = superblock.settings_with(change)?;
        self.settings.publish(&superblock.settings);
        self.mode_asked(before, superblock.settings.cache_mode());
        self.superblock_changed.store(true, Ordering::Release);
        Ok(())
    }

    /// So many segments are to be free at any time, so that writers need not wait for one: one for each stream that
    /// a channel may be using, and some.
    pub(crate) fn free_segments_wanted(&self) -> usize {
        let special = usize::from(self.special_stream(Special::Kept).is_some());
        self.streams_in_use() + special + FREE_SEGMENTS_EXTRA + self.segments_kept_free()
    }

    /// Segments that are not free.
    pub(crate) fn segments_used(&self) -> usize {
        self.segments_in_service() - self.segments.free_count()
    }

    /// Segments that can be used.
    pub(crate) fn segments_in_service(&self) -> usize {
        self.segments.count() - self.segments.quarantined_count()
    }

    /// Checks that every segment is used for one thing only, that the index names no dead segment, and that
    /// no batch has left anything behind in it. For tests; between polls.
    ///
    /// # Panics
    /// An invariant does not hold.
    #[cfg(any(test, feature = "sim"))]
    pub fn check_invariants(&self) {
        self.index.check_at_rest();
        self.index.for_each_place(|place| {
            let id = self.geometry.segment_of(place);
            let state = self.segments.get(id).state();
            assert!(
                matches!(
                    state,
                    SegmentState::Open | SegmentState::Sealed | SegmentState::Reclaiming
                ),
                "INV-INDEX-2: the index names {place:?} in segment {id:?}, which is {state:?}"
            );
        });
        let free = self
            .segments
            .ids()
            .filter(|id| self.segments.get(*id).state() == SegmentState::Free);
        assert_eq!(
            free.count(),
            self.segments.free_count(),
            "INV-SEG-2: free segments are in the queue"
        );
    }

    /// Whether anything is lent. For tests.
    #[cfg(any(test, feature = "sim"))]
    pub fn has_loans(&self) -> bool {
        self.segments
            .ids()
            .any(|id| self.segments.get(id).is_pinned())
    }
}

/// A mutex of plain data: a panic of another holder does not make the data worse.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
