//! A stream: the open segment to which a core appends. Keys grow up, data grow down, until they meet.

use super::segments::{SegmentState, Segments, Special};
use crate::canary::{self, Canary};
use crate::media::{
    ChecksumSeed, Checksums, Geometry, KEYS_START_BYTES, Sealed, SegmentInfo, kset_size_bytes,
};
use crate::pmem::Pmem;
use crate::units::{Agent, SegId, Seq};
use std::ops::Range;

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
    /// [`Segments::losses`] when its memory was looked at, or was 0.
    losses: u64,
}

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
    /// With no segment open yet.
    pub(crate) fn new(special: Option<Special>) -> Self {
        Self {
            open: None,
            special,
        }
    }

    /// Seals the open segment, if there is one with anything in it, and opens a free one. `false`: none is
    /// free; the stream then has no open segment.
    pub(crate) fn advance<P: Pmem>(&mut self, context: &StreamContext<'_, P>) -> bool {
        self.seal(context);
        let size = context.geometry.segment_size_bytes();
        let losses = context.segments.losses();
        let id = loop {
            let Some(id) = context.segments.open_next(self.special) else {
                return false;
            };
            if losses > 0 {
                look_at(context, id, 0..size);
            }
            if !context.segments.get(id).is_suspect() {
                break id;
            }
            // At most once for each segment.
            retire(context, id);
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
            losses,
        };
        segment.set_room_bytes(open.room_bytes());
        self.open = Some(open);
        true
    }

    /// Whether nothing more is to be stored in the open segment, since memory was lost there (INV-SEG-7).
    #[inline]
    pub(crate) fn is_on_lost_memory<P: Pmem>(&mut self, context: &StreamContext<'_, P>) -> bool {
        let losses = context.segments.losses();
        match &mut self.open {
            Some(open) if open.losses != losses => {
                open.losses = losses;
                let room = u64::from(open.key_off)..u64::from(open.data_off);
                look_at(context, open.id, room);
                context.segments.get(open.id).is_suspect()
            }
            _ => false,
        }
    }

    /// Records in the info of the open segment how much it holds, so that damage in it is told from the end
    /// of the log. All its ksets are durable already. Where the memory of the info is lost nothing is stored, and the
    /// segment lies on the device as it would after a power cut (INV-PAIR-3).
    pub(crate) fn seal<P: Pmem>(&mut self, context: &StreamContext<'_, P>) {
        let Some(open) = self.open.take() else { return };
        let segment = context.segments.get(open.id);
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

/// Looks at each page of a part of a segment, which is suspect if one cannot be read. For a cache that has lost memory: it
/// takes some hundred microseconds for 16 MiB.
#[cold]
fn look_at<P: Pmem>(context: &StreamContext<'_, P>, id: SegId, part: Range<u64>) {
    let start = context.geometry.segment_off(id).plus(part.start);
    if part.start < part.end && context.pmem.probe(start, part.end - part.start).is_err() {
        context.segments.suspect(id);
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
