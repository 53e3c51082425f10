//! A stream: the open segment to which a core appends. Keys grow up, data grow down, until they meet.

use super::segments::{SegmentState, Segments, Special};
use crate::canary::{self, Canary};
use crate::media::{
    ChecksumSeed, Checksums, Geometry, KEYS_START_BYTES, Sealed, SegmentInfo, kset_size_bytes,
};
use crate::pmem::Pmem;
use crate::units::{Agent, SegId, Seq};

/// The open segment of a stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenSegment {
    pub(crate) id: SegId,
    pub(crate) kset_seed: ChecksumSeed,
    pub(crate) payload_seed: ChecksumSeed,
    /// Byte offset of the next kset.
    pub(crate) key_off: u32,
    /// Byte offset of the lowest payload.
    pub(crate) data_off: u32,
    /// Number of the next kset.
    pub(crate) kset_index: u32,
    /// [`Segments::losses`] when all of its memory had been looked at, or 0.
    losses: u64,
    look: Look,
}

/// How far a look at the memory of an open segment is.
#[derive(Clone, Copy, Debug, Default)]
struct Look {
    /// [`Segments::losses`] when it began.
    losses: u64,
    /// The byte of the segment with which it goes on.
    next_off: u32,
}

/// Whether more may be stored in the open segment (INV-SEG-7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// Yes, as far as anybody knows.
    Sound,
    /// Not yet: the next poll goes on with the look at it.
    Unknown,
    /// No.
    Lost,
}

/// So much of a segment is looked at in one poll, at the most: it takes some ten microseconds.
const LOOK_BYTES: u32 = 512 << 10;

impl OpenSegment {
    /// Bytes between keys and data.
    pub(crate) fn room_bytes(&self) -> u32 {
        self.data_off - self.key_off
    }

    /// Whether a kset of so many keys and so many bytes of payload still fit.
    pub(crate) fn has_room(&self, key_count: usize, payload_bytes: u64) -> bool {
        kset_size_bytes(key_count) as u64 + payload_bytes <= u64::from(self.room_bytes())
    }
}

/// Who appends where. Locked by one core for the time of a batch.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) open: Option<OpenSegment>,
    /// The open segment is one that was kept free (`heal.rs`).
    pub(super) is_for_healers: bool,
    number: usize,
    special: Option<Special>,
}

/// What a stream needs to know of the cache.
pub(crate) struct StreamContext<'a, P> {
    pub(crate) pmem: &'a P,
    pub(crate) geometry: &'a Geometry,
    pub(crate) checksums: &'a Checksums,
    pub(crate) segments: &'a Segments,
    pub(crate) agent: Agent,
}

impl Stream {
    /// The stream of this number, with no segment open yet.
    pub(crate) fn new(number: usize, special: Option<Special>) -> Self {
        Self {
            open: None,
            is_for_healers: false,
            number,
            special,
        }
    }

    /// Seals the open segment, if there is one, and opens a free one if `left_free` others are. `false`: not so many are; the
    /// stream then has no open segment. If memory was lost anywhere [`Stream::memory`] is to be asked before anything is stored.
    pub(crate) fn advance<P: Pmem>(
        &mut self,
        context: &StreamContext<'_, P>,
        left_free: usize,
    ) -> bool {
        self.seal(context);
        let size = context.geometry.segment_size_bytes();
        let Some(id) = context.segments.open_next_of(self.special, left_free) else {
            return false;
        };
        let segment = context.segments.get(id);
        let generation = segment.generation().0;
        let open = OpenSegment {
            id,
            kset_seed: context.checksums.kset(id.0, generation),
            payload_seed: context.checksums.payload(id.0, generation),
            key_off: KEYS_START_BYTES,
            data_off: u32::try_from(size).unwrap_or(u32::MAX),
            kset_index: 0,
            losses: 0,
            look: Look::default(),
        };
        segment.set_room_bytes(open.room_bytes());
        context.segments.open_ids.set(self.number, Some(id));
        self.open = Some(open);
        true
    }

    /// Whether part of the memory of the open segment is known to be lost.
    pub(crate) fn is_suspect<P: Pmem>(&self, context: &StreamContext<'_, P>) -> bool {
        let open = self.open.as_ref();
        open.is_some_and(|open| context.segments.get(open.id).is_suspect())
    }

    /// Whether anything is to be stored in the open segment. When memory was lost anywhere since the start it is looked at,
    /// a part of it with each call.
    #[inline]
    pub(crate) fn memory<P: Pmem>(&mut self, context: &StreamContext<'_, P>) -> Memory {
        let losses = context.segments.losses();
        match &mut self.open {
            Some(open) if open.losses != losses => open.look_on(context, losses),
            _ => Memory::Sound,
        }
    }

    /// Records in the info of the open segment how much it holds, so that damage in it is told from the end
    /// of the log. All its ksets are durable already. Where the memory of the info is lost nothing is stored, and the
    /// segment lies on the device as it would after a power cut (INV-PAIR-3).
    pub(crate) fn seal<P: Pmem>(&mut self, context: &StreamContext<'_, P>) {
        self.is_for_healers = false;
        let Some(open) = self.open.take() else { return };
        context.segments.open_ids.set(self.number, None);
        let segment = context.segments.get(open.id);
        if open.kset_index == 0 && segment.is_suspect() {
            return retire(context, open.id);
        }
        let last_seq: Seq = segment.last_seq();
        let state = segment.state();
        assert!(
            state == SegmentState::Open,
            "INV-SEG-3: segment {:?} is sealed, but it is {state:?}",
            open.id
        );
        assert!(
            segment.key_end() == open.key_off,
            "INV-LOG-2: segment {:?} is sealed with a kset that was not finished",
            open.id
        );
        let kset_count = open.kset_index - u32::from(canary::is(Canary::SealedOneShort));
        record_seal(context, open.id, kset_count, last_seq);
        context.segments.set_sealed(open.id);
    }
}

impl OpenSegment {
    /// Looks at the next part of what may be stored to, and at the info too if nothing was stored yet. `losses` are those
    /// that are known now.
    #[cold]
    fn look_on<P: Pmem>(&mut self, context: &StreamContext<'_, P>, losses: u64) -> Memory {
        if self.look.losses != losses {
            let next_off = if self.kset_index == 0 {
                0
            } else {
                self.key_off
            };
            self.look = Look { losses, next_off };
        }
        let (next, end) = (self.look.next_off, self.data_off);
        let part_end = end.min(next.saturating_add(LOOK_BYTES));
        let segment = context.segments.get(self.id);
        if !segment.is_suspect() && next < part_end {
            let start = context.geometry.segment_off(self.id).plus(u64::from(next));
            let len_bytes = u64::from(part_end - next);
            if context.pmem.probe(start, len_bytes).is_err() {
                context.segments.suspect(self.id);
            }
        }
        if segment.is_suspect() {
            return Memory::Lost;
        }
        self.look.next_off = part_end;
        if part_end < end {
            return Memory::Unknown;
        }
        self.losses = losses;
        Memory::Sound
    }
}

/// Records in the info of a segment that it gets no more. If the memory of the info is lost, the segment is suspect instead.
fn record_seal<P: Pmem>(context: &StreamContext<'_, P>, id: SegId, kset_count: u32, last_seq: Seq) {
    let start = context.geometry.segment_off(id);
    let info_bytes = u64::from(KEYS_START_BYTES);
    if context.pmem.probe(start, info_bytes).is_err() {
        context.segments.suspect(id);
        return;
    }
    let segment = context.segments.get(id);
    let mut info = SegmentInfo {
        generation: segment.generation(),
        sealed: Some(Sealed {
            kset_count,
            last_seq,
        }),
        update: segment.info_update(),
    };
    let (agent, geometry) = (context.agent, context.geometry);
    drop(info.persist(context.pmem, agent, geometry, context.checksums, id));
    segment.set_info(&info);
}

/// Takes an empty segment out of service, of which part of the memory cannot be read. Sealed with nothing in it, it
/// is not taken for the end of the log where its keys would be, and the next recovery looks at its memory again.
pub(crate) fn retire<P: Pmem>(context: &StreamContext<'_, P>, id: SegId) {
    record_seal(context, id, 0, Seq(0));
    context.segments.quarantine(id);
}
