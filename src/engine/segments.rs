//! What is known of each segment while the cache is in use.

use crate::media::{Geometry, SegmentInfo};
use crate::sched;
use crate::units::{Generation, SegId, Seq};
use crossbeam_queue::ArrayQueue;
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
    pins: AtomicU32,
    /// Damage was found that is not that of one payload alone.
    is_suspect: AtomicBool,
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
        }
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

    /// Keeps the segment from being freed. To be called in the grace period in which the index named a place
    /// in it.
    ///
    /// Why a pin never comes too late (INV-PIN-1): whoever frees the segment first takes its places out of
    /// the index, then draws a ticket, and looks at the pins when the ticket has passed. Who has found a
    /// place in it either entered after the ticket was drawn, which cannot be, for then the index named no
    /// such place any more; or was inside, and the ticket does not pass before it has left. It pins before it
    /// leaves, and `Grace::leave` releases what `Grace::passed` acquires: so the pin is seen. Nobody finds a
    /// place in the segment from then on, and pins only go.
    pub(crate) fn pin(&self) {
        sched::point();
        self.pins.fetch_add(1, Ordering::Relaxed);
    }

    /// The end of a pin. All that was read under it was read before.
    pub(crate) fn unpin(&self) {
        sched::point();
        let before = self.pins.fetch_sub(1, Ordering::Release);
        debug_assert!(before > 0, "INV-PIN-2: a loan is given back once");
    }

    /// Whether its memory is not to be used again.
    pub(crate) fn is_suspect(&self) -> bool {
        self.is_suspect.load(Ordering::Acquire)
    }

    /// Whether somebody looks at it. `false` is final once a ticket has passed that was drawn after the last
    /// of its places had left the index.
    pub(crate) fn is_pinned(&self) -> bool {
        sched::point();
        self.pins.load(Ordering::Acquire) > 0
    }
}

/// All segments, and which of them are free or newly opened.
#[derive(Debug)]
pub(crate) struct Segments {
    table: Box<[Segment]>,
    free: ArrayQueue<SegId>,
    opened: ArrayQueue<SegId>,
    /// Suspect ones that are still in use.
    suspects: AtomicUsize,
    quarantined: AtomicUsize,
}

impl Segments {
    /// From how they were found, one for each segment. Those with ksets behind the dirty tail count as newly
    /// opened.
    pub(crate) fn new(geometry: &Geometry, starts: &[SegmentStart], dirty_tail: Seq) -> Self {
        let capacity = geometry.segment_count() as usize;
        let segments = Self {
            table: starts.iter().map(Segment::new).collect(),
            free: ArrayQueue::new(capacity),
            opened: ArrayQueue::new(capacity),
            suspects: AtomicUsize::new(0),
            quarantined: AtomicUsize::new(0),
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

    /// Segments out of service.
    pub(crate) fn quarantined_count(&self) -> usize {
        self.quarantined.load(Ordering::Relaxed)
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
        }
        is_new
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

    /// Takes a free segment for a stream, and tells the background of it.
    pub(crate) fn open_next(&self) -> Option<SegId> {
        sched::point();
        let id = self.free.pop()?;
        sched::point();
        let state = self.get(id).state();
        assert!(
            state == SegmentState::Free,
            "INV-SEG-3: segment {id:?} is opened, but it is {state:?}"
        );
        self.get(id).set_state(SegmentState::Open);
        self.tell_opened(id);
        Some(id)
    }

    fn tell_opened(&self, id: SegId) {
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
