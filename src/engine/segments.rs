//! What is known of each segment while the cache is in use.

use super::cache::lock;
use super::open_ids::OpenIds;
use crate::media::{Geometry, SegmentInfo};
use crate::memory::{self, NoMemory};
use crate::sched;
use crate::units::{Generation, SegId, Seq};
use crossbeam_queue::ArrayQueue;
use crossbeam_utils::CachePadded;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// What a segment is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SegmentState {
    /// Holds nothing; its generation is fresh.
    Free,
    /// A stream appends to it.
    Open,
    /// Full; its info says how full.
    Sealed,
    /// Being emptied.
    Reclaiming,
    /// Out of service: its memory is not to be relied upon.
    Quarantined,
}

impl SegmentState {
    fn from_code(code: u8) -> Self {
        match code {
            0 => SegmentState::Free,
            1 => SegmentState::Open,
            2 => SegmentState::Sealed,
            3 => SegmentState::Reclaiming,
            _ => SegmentState::Quarantined,
        }
    }
}

/// What a segment holds, for whoever chooses what to reclaim. It is not on the media: after a restart everything is
/// [`Class::Log`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Writes, and read fills for which there was no segment apart.
    Log,
    /// Read fills that are not likely to be read again.
    Probation,
    /// What was read again when its segment was reclaimed.
    Kept,
    /// Other read fills.
    Fills,
}

/// Streams that no core has as its own, in the order of their numbers behind those of the cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Special {
    /// For [`Class::Probation`].
    Probation,
    /// For [`Class::Kept`].
    Kept,
    /// For what is left of segments that were overwritten for the most part. They are as old as what is in them.
    Compacted,
    /// For [`Class::Fills`].
    Fills,
}

impl Special {
    /// How many there are.
    pub(crate) const COUNT: usize = 4;

    pub(crate) fn class(self) -> Class {
        match self {
            Special::Probation => Class::Probation,
            Special::Kept => Class::Kept,
            Special::Compacted => Class::Log,
            Special::Fills => Class::Fills,
        }
    }

    pub(crate) const ALL: [Special; Self::COUNT] = [
        Special::Probation,
        Special::Kept,
        Special::Compacted,
        Special::Fills,
    ];
}

/// One segment. Written by whoever owns it (its stream, the background), read by all.
#[derive(Debug)]
pub(crate) struct Segment {
    state: AtomicU8,
    generation: AtomicU64,
    info_update: AtomicU64,
    /// Byte offset behind the last durable kset.
    key_end: AtomicU32,
    /// Of an open one: bytes between its keys and its data.
    room_bytes: AtomicU32,
    /// Set before anything of the kset is published: a place in a segment whose `last_seq` is not above the
    /// dirty tail is clean for sure.
    last_seq: AtomicU64,
    /// Loans of places in it.
    pub(super) pins: AtomicU32,
    /// Damage was found that is not that of one payload alone.
    is_suspect: AtomicBool,
    /// Some of its keys cannot be read.
    is_keyless: AtomicBool,
    /// It holds what was there before the start: nobody has stored to it since.
    is_inherited: AtomicBool,
    /// A [`Class`].
    class: AtomicU8,
    /// Age of its content: the clock of [`Segments`] when it was opened, or of the segments it was copied from.
    born: AtomicU64,
    /// The clock when it was sealed.
    sealed_at: AtomicU64,
    /// It has read fills and copies, and nothing else: the base holds all of it from the start (INV-SEG-9).
    has_fills_alone: AtomicBool,
    /// Something was taken out of the index that lay here and was the newest (INV-SEG-8).
    has_forgotten: AtomicBool,
}

/// How a segment was found, or starts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SegmentStart {
    pub(crate) state: SegmentState,
    pub(crate) info: SegmentInfo,
    pub(crate) key_end: u32,
    pub(crate) last_seq: Seq,
}

impl Segment {
    fn new(start: &SegmentStart) -> Self {
        Self {
            state: AtomicU8::new(start.state as u8),
            generation: AtomicU64::new(start.info.generation.0),
            info_update: AtomicU64::new(start.info.update),
            key_end: AtomicU32::new(start.key_end),
            room_bytes: AtomicU32::new(0),
            last_seq: AtomicU64::new(start.last_seq.0),
            pins: AtomicU32::new(0),
            is_suspect: AtomicBool::new(false),
            is_keyless: AtomicBool::new(false),
            is_inherited: AtomicBool::new(start.state == SegmentState::Sealed),
            class: AtomicU8::new(Class::Log as u8),
            born: AtomicU64::new(0),
            sealed_at: AtomicU64::new(0),
            has_fills_alone: AtomicBool::new(false),
            // What became of all that lies in it before the start, nobody knows.
            has_forgotten: AtomicBool::new(true),
        }
    }

    pub(crate) fn class(&self) -> Class {
        match self.class.load(Ordering::Acquire) {
            1 => Class::Probation,
            2 => Class::Kept,
            3 => Class::Fills,
            _ => Class::Log,
        }
    }

    /// The higher, the younger is what it holds.
    pub(crate) fn born(&self) -> u64 {
        self.born.load(Ordering::Relaxed)
    }

    /// The clock of [`Segments`] when it was sealed; 0: before the start.
    pub(crate) fn sealed_at(&self) -> u64 {
        self.sealed_at.load(Ordering::Acquire)
    }

    /// It holds what was copied from a segment of that age. It is as old as the youngest of these.
    pub(crate) fn inherit_age(&self, born: u64) {
        self.born.fetch_max(born, Ordering::Relaxed);
    }

    /// Begins anew, for a core or for a special purpose.
    fn begin(&self, special: Option<Special>, born: u64) {
        let class = special.map_or(Class::Log, Special::class);
        self.class.store(class as u8, Ordering::Release);
        self.born.store(born, Ordering::Relaxed);
        self.has_fills_alone
            .store(special.is_some(), Ordering::Release);
        self.has_forgotten.store(false, Ordering::Relaxed);
        self.is_inherited.store(false, Ordering::Relaxed);
    }

    /// Whether it holds what was there before the start.
    pub(crate) fn is_inherited(&self) -> bool {
        self.is_inherited.load(Ordering::Relaxed)
    }

    /// Whether the base holds all of it whatever the dirty tail says.
    pub(crate) fn has_fills_alone(&self) -> bool {
        self.has_fills_alone.load(Ordering::Acquire)
    }

    /// Whether the base holds all of it (INV-READ-1).
    pub(crate) fn is_on_base(&self, dirty_tail: Seq) -> bool {
        self.has_fills_alone() || self.last_seq() <= dirty_tail
    }

    /// Something that lies here, the newest of its page, is about to leave the index without being copied or
    /// overwritten. To be called before it does, so that whoever finds it gone finds this noted.
    pub(crate) fn note_forgotten(&self) {
        self.has_forgotten.store(true, Ordering::Release);
    }

    pub(crate) fn has_forgotten(&self) -> bool {
        self.has_forgotten.load(Ordering::Acquire)
    }

    pub(crate) fn state(&self) -> SegmentState {
        SegmentState::from_code(self.state.load(Ordering::Acquire))
    }

    pub(crate) fn set_state(&self, state: SegmentState) {
        self.state.store(state as u8, Ordering::Release);
    }

    pub(crate) fn generation(&self) -> Generation {
        Generation(self.generation.load(Ordering::Acquire))
    }

    pub(crate) fn info_update(&self) -> u64 {
        self.info_update.load(Ordering::Relaxed)
    }

    pub(crate) fn set_info(&self, info: &SegmentInfo) {
        assert!(
            info.generation >= self.generation(),
            "INV-SEG-4: generation {:?} after {:?}",
            info.generation,
            self.generation()
        );
        self.generation.store(info.generation.0, Ordering::Release);
        self.info_update.store(info.update, Ordering::Relaxed);
    }

    pub(crate) fn key_end(&self) -> u32 {
        self.key_end.load(Ordering::Acquire)
    }

    pub(crate) fn set_key_end(&self, key_end: u32) {
        self.key_end.store(key_end, Ordering::Release);
    }

    pub(crate) fn room_bytes(&self) -> u32 {
        self.room_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn set_room_bytes(&self, room_bytes: u32) {
        self.room_bytes.store(room_bytes, Ordering::Relaxed);
    }

    pub(crate) fn last_seq(&self) -> Seq {
        Seq(self.last_seq.load(Ordering::Acquire))
    }

    /// Notes that a kset of this number goes into the segment.
    pub(crate) fn note_seq(&self, seq: Seq) {
        debug_assert!(
            seq > self.last_seq(),
            "INV-LOG-3: {seq:?} goes behind {:?}",
            self.last_seq()
        );
        self.last_seq.store(seq.0, Ordering::Release);
    }

    /// Whether its memory is not to be used again.
    pub(crate) fn is_suspect(&self) -> bool {
        self.is_suspect.load(Ordering::Acquire)
    }

    /// Whether some of its keys cannot be read.
    pub(crate) fn is_keyless(&self) -> bool {
        self.is_keyless.load(Ordering::Acquire)
    }

    /// Whether its keys cannot tell what is in it that the base may not hold.
    pub(crate) fn awaits_salvage(&self, dirty_tail: Seq) -> bool {
        self.is_keyless() && !self.is_on_base(dirty_tail)
    }
}

/// All segments, and which of them are free or newly opened.
#[derive(Debug)]
pub(crate) struct Segments {
    /// Readers of one do not meet those who append to its neighbour.
    table: Vec<CachePadded<Segment>>,
    free: ArrayQueue<SegId>,
    opened: ArrayQueue<SegId>,
    /// How often a segment was sealed or became suspect.
    changes: AtomicU64,
    /// Suspect ones that are still in use.
    suspects: AtomicUsize,
    /// How often a segment became suspect.
    losses: AtomicU64,
    quarantined: AtomicUsize,
    /// Those of which keys were found that cannot be read any more, and how many that are.
    keyless: Mutex<Vec<SegId>>,
    key_losses: AtomicUsize,
    /// Counts the segments that were opened.
    clock: AtomicU64,
    pub(crate) open_ids: OpenIds,
}

/// Of a segment, in both queues.
const QUEUES_BYTES: usize = 2 * 2 * size_of::<usize>();

/// Gives those that hold something their ages, by their last numbers.
fn date(table: &[CachePadded<Segment>], mut in_order: Vec<usize>) {
    in_order.extend(0..table.len());
    in_order.sort_unstable_by_key(|number| table[*number].last_seq());
    for (born, number) in (1..).zip(in_order) {
        table[number].born.store(born, Ordering::Relaxed);
    }
}

/// The memory of [`Segments`], before it is known how they are.
#[derive(Debug)]
pub(crate) struct SegmentsMemory {
    table: Vec<CachePadded<Segment>>,
    in_order: Vec<usize>,
    keyless: Vec<SegId>,
    free: ArrayQueue<SegId>,
    opened: ArrayQueue<SegId>,
}

impl SegmentsMemory {
    pub(crate) fn new(geometry: &Geometry) -> Result<Self, NoMemory> {
        let what = "the table of segments";
        let count = geometry.segment_count() as usize;
        let (table, in_order) = (
            memory::with_room(what, count)?,
            memory::with_room(what, count)?,
        );
        let keyless = memory::with_room(what, count)?;
        let queues = || (ArrayQueue::new(count), ArrayQueue::new(count));
        let (free, opened) = memory::rehearsed(what, count * QUEUES_BYTES, queues)?;
        Ok(Self {
            table,
            in_order,
            keyless,
            free,
            opened,
        })
    }
}

impl Segments {
    /// From how they were found, one for each segment. Those with ksets behind the dirty tail count as newly
    /// opened.
    pub(crate) fn new(
        memory: SegmentsMemory,
        starts: impl ExactSizeIterator<Item = SegmentStart>,
        dirty_tail: Seq,
    ) -> Self {
        let SegmentsMemory {
            mut table,
            in_order,
            keyless,
            free,
            opened,
        } = memory;
        debug_assert!(starts.len() <= table.capacity(), "there is room for each");
        table.extend(starts.map(|start| CachePadded::new(Segment::new(&start))));
        date(&table, in_order);
        let segments = Self {
            clock: AtomicU64::new(table.len() as u64),
            table,
            free,
            opened,
            changes: AtomicU64::new(0),
            suspects: AtomicUsize::new(0),
            losses: AtomicU64::new(0),
            quarantined: AtomicUsize::new(0),
            keyless: Mutex::new(keyless),
            key_losses: AtomicUsize::new(0),
            open_ids: OpenIds::default(),
        };
        for id in segments.ids() {
            let segment = segments.get(id);
            match segment.state() {
                SegmentState::Free => segments.put_free(id),
                SegmentState::Quarantined => {
                    segments.quarantined.fetch_add(1, Ordering::Relaxed);
                }
                _ if segment.last_seq() > dirty_tail => segments.tell_opened(id),
                _ => {}
            }
        }
        segments
    }

    /// How many segments were opened so far; since a restart, with those that were there.
    pub(crate) fn clock(&self) -> u64 {
        self.clock.load(Ordering::Relaxed)
    }

    pub(crate) fn get(&self, id: SegId) -> &Segment {
        &self.table[id.index()]
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = SegId> + use<> {
        (0..u32::try_from(self.table.len()).unwrap_or(u32::MAX)).map(SegId)
    }

    pub(crate) fn count(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn free_count(&self) -> usize {
        self.free.len()
    }

    /// What can still be appended to open segments, in bytes.
    pub(crate) fn open_room_bytes(&self) -> u64 {
        let rooms = self.open_ids.iter().map(|id| self.get(id).room_bytes());
        rooms.map(u64::from).sum()
    }

    /// Segments out of service.
    pub(crate) fn quarantined_count(&self) -> usize {
        self.quarantined.load(Ordering::Relaxed)
    }

    /// A segment is full, or no longer appended to.
    pub(crate) fn set_sealed(&self, id: SegId) {
        let segment = self.get(id);
        segment.sealed_at.store(self.clock(), Ordering::Release);
        segment.set_state(SegmentState::Sealed);
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Differs from an earlier value if a segment was sealed since, or became suspect. Who sees that sees the segment so.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// In how many segments memory was found to be lost since the start. Whoever stores to one looks at it when there is more:
    /// what is lost in one place may be in others.
    #[inline]
    pub(crate) fn losses(&self) -> u64 {
        self.losses.load(Ordering::Acquire)
    }

    /// Whether a segment in use is to be taken out of service.
    pub(crate) fn has_suspects(&self) -> bool {
        self.suspects.load(Ordering::Relaxed) > 0
    }

    /// Notes that the memory of a segment is not to be used again. `true`: it is news.
    pub(crate) fn suspect(&self, id: SegId) -> bool {
        let is_new = !self.get(id).is_suspect.swap(true, Ordering::AcqRel);
        if is_new {
            self.suspects.fetch_add(1, Ordering::Relaxed);
            // Who sees the number finds the segment suspect.
            self.losses.fetch_add(1, Ordering::Release);
            self.changes.fetch_add(1, Ordering::Release);
        }
        is_new
    }

    /// Notes that keys of a segment cannot be read. It is suspect from then on. `true`: it is news.
    pub(crate) fn lose_keys(&self, id: SegId) -> bool {
        self.suspect(id);
        let is_new = !self.get(id).is_keyless.swap(true, Ordering::AcqRel);
        if is_new {
            lock(&self.keyless).push(id);
            // Who sees the number finds the segment.
            self.key_losses.fetch_add(1, Ordering::Relaxed);
        }
        is_new
    }

    /// Those of which keys were lost since the start.
    pub(crate) fn keyless(&self) -> impl Iterator<Item = SegId> {
        (0..).map_while(|number: usize| lock(&self.keyless).get(number).copied())
    }

    /// In how many segments keys were lost so far.
    pub(crate) fn key_losses(&self) -> usize {
        self.key_losses.load(Ordering::Relaxed)
    }

    /// Takes a suspect segment out of service, for as long as the cache is in use (INV-SEG-7). It is its owner
    /// who does so, and nothing in it is in use any more.
    pub(crate) fn quarantine(&self, id: SegId) {
        let segment = self.get(id);
        let state = segment.state();
        assert!(
            matches!(state, SegmentState::Reclaiming | SegmentState::Open) && segment.is_suspect(),
            "INV-SEG-3: segment {id:?} is taken out of service, but it is {state:?}"
        );
        segment.set_state(SegmentState::Quarantined);
        self.suspects.fetch_sub(1, Ordering::Relaxed);
        self.quarantined.fetch_add(1, Ordering::Relaxed);
    }

    /// Hands a segment back whose generation is fresh.
    pub(crate) fn put_free(&self, id: SegId) {
        let segment = self.get(id);
        let state = segment.state();
        assert!(
            matches!(state, SegmentState::Reclaiming | SegmentState::Free),
            "INV-SEG-3: segment {id:?} is freed, but it is {state:?}"
        );
        segment.set_key_end(crate::media::KEYS_START_BYTES);
        segment.set_state(SegmentState::Free);
        sched::point();
        let pushed = self.free.push(id);
        assert!(pushed.is_ok(), "INV-SEG-1: a segment is freed once");
    }

    /// Takes a segment that is to go out of service from the free ones, if it is among the next `count_max` of them; what is
    /// before it goes behind the others. A writer that finds none free meanwhile asks again.
    pub(crate) fn take_free(&self, wanted: SegId, count_max: usize) -> bool {
        for _ in 0..count_max {
            let Some(id) = self.free.pop() else { break };
            sched::point();
            if id == wanted {
                self.get(id).set_state(SegmentState::Reclaiming);
                return true;
            }
            let pushed = self.free.push(id);
            assert!(pushed.is_ok(), "INV-SEG-1: a segment is freed once");
        }
        false
    }

    /// Takes a free segment for a stream, and tells the background of it.
    #[cfg(test)]
    pub(crate) fn open_next(&self, special: Option<Special>) -> Option<SegId> {
        self.open_next_of(special, 0)
    }

    /// The same, if so many others are free. Of several who ask for the last ones at once it may be that none gets one.
    pub(crate) fn open_next_of(&self, special: Option<Special>, left_free: usize) -> Option<SegId> {
        sched::point();
        let id = self.free.pop()?;
        sched::point();
        if self.free.len() < left_free {
            let pushed = self.free.push(id);
            assert!(
                pushed.is_ok(),
                "INV-SEG-1: there was room for it a moment ago"
            );
            return None;
        }
        let state = self.get(id).state();
        assert!(
            state == SegmentState::Free,
            "INV-SEG-3: segment {id:?} is opened, but it is {state:?}"
        );
        let born = self.clock.fetch_add(1, Ordering::Relaxed) + 1;
        // What is compacted is as old as what it comes from, and says so with the first copy.
        let born = if special == Some(Special::Compacted) {
            0
        } else {
            born
        };
        self.get(id).begin(special, born);
        self.get(id).set_state(SegmentState::Open);
        if special.is_none() {
            // Write-back has nothing to do with the others.
            self.tell_opened(id);
        }
        Some(id)
    }

    /// Lets write-back know that a stream appends to a segment.
    pub(crate) fn tell_opened(&self, id: SegId) {
        let pushed = self.opened.push(id);
        assert!(
            pushed.is_ok(),
            "INV-SEG-1: a segment is opened once before it is freed"
        );
    }

    /// The next segment that was opened since the last call.
    pub(crate) fn next_opened(&self) -> Option<SegId> {
        self.opened.pop()
    }
}
