//! Reads the log from the dirty tail on: the ksets of all segments whose keys can be read, in the order of their sequence
//! numbers.

use super::lost::{self, Lost};
use super::overlay::Overlay;
use crate::canary::{self, Canary};
use crate::engine::{Cache, Counters, KsetCursor, SegmentState, WritebackOrder};
use crate::media::{Key, KeyKind, Kset, KsetReader};
use crate::pmem::Pmem;
use crate::units::{Epoch, Generation, Lba, PAGE_SIZE_BYTES, SegId, Seq};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Keys that one poll takes, at most; one kset may go beyond.
const KEYS_PER_POLL: usize = 64;

/// The log cannot be read on: a kset that was there in this segment is not any more.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeysLost(pub(super) SegId);

/// How far a batch may go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Only ksets below this.
    pub(super) settled: Seq,
    pub(super) order: WritebackOrder,
    /// Payload; one kset may go beyond.
    pub(super) bytes: u64,
    pub(super) key_count: usize,
    /// Part of what comes before this, and of it itself, may be on the base already: a batch goes that far,
    /// whatever else is said here. A salvage goes as far as it has to.
    pub(super) reach: Seq,
}

impl Limits {
    pub(super) const NONE: Limits = Limits {
        settled: Seq(0),
        order: WritebackOrder::Strict,
        bytes: 0,
        key_count: 0,
        reach: Seq(0),
    };
}

/// What was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    /// `None`: nothing.
    pub(super) last_seq: Option<Seq>,
    pub(super) first_seq: Option<Seq>,
    pub(super) dirty_bytes: u64,
    spread: Spread,
    /// A barrier lies between its dirty keys.
    spans: bool,
}

impl Taken {
    pub(super) const NOTHING: Taken = Taken {
        last_seq: None,
        first_seq: None,
        dirty_bytes: 0,
        spread: Spread::Nothing,
        spans: false,
    };
}

/// What a batch changes on the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spread {
    Nothing,
    /// One block, which the base writes as a whole.
    One(Lba),
    More,
}

impl Spread {
    /// With more keys.
    fn and(self, keys: &[Key]) -> Self {
        let dirty = keys.iter().filter(|key| key.kind.is_dirty());
        dirty.fold(self, |spread, key| {
            let is_block = key.kind == KeyKind::Data && key.len_blocks == 1;
            match spread {
                Spread::Nothing if is_block => Spread::One(key.lba),
                Spread::One(lba) if is_block && lba == key.lba => spread,
                _ => Spread::More,
            }
        })
    }
}

/// The batch that keys are taken for.
pub(super) struct Gathering<'a> {
    pub(super) limits: &'a Limits,
    pub(super) taken: &'a mut Taken,
    pub(super) overlay: &'a mut Overlay,
    pub(super) lost: &'a mut Lost,
}

/// How far a batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gathered {
    /// There is more to take.
    InPart,
    /// There is nothing more to take yet.
    Dry,
    /// Nothing more may be taken: it has reached a limit or, in strict order, a barrier.
    Full,
}

/// A kset that was read, and is valid.
#[derive(Debug)]
struct Decoded {
    kset: Kset,
    keys: Vec<Key>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct LogReader {
    /// For each segment: the next kset to take.
    cursors: Vec<KsetCursor>,
    /// Segments with a kset to take, lowest sequence number first.
    ready: BinaryHeap<Reverse<(Seq, u32)>>,
    /// For each segment that is ready: that kset. It is read once, to learn its number; what it says then
    /// is what is taken.
    next: Vec<Option<Decoded>>,
    /// Memory for keys, to be used again.
    spare: Vec<Vec<Key>>,
    /// Segments that may get more.
    watched: Vec<SegId>,
    reader: KsetReader,
    epoch: Epoch,
    payload: Vec<u8>,
}

impl LogReader {
    pub(super) fn new(segment_count: usize) -> Self {
        Self {
            cursors: vec![KsetCursor::start(Generation(0)); segment_count],
            ready: BinaryHeap::with_capacity(segment_count),
            next: (0..segment_count).map(|_| None).collect(),
            spare: Vec::new(),
            watched: Vec::with_capacity(segment_count),
            reader: KsetReader::default(),
            epoch: Epoch(0),
            payload: vec![0; PAGE_SIZE_BYTES as usize],
        }
    }

    /// Whether there is anything to write back below `seq`.
    pub(super) fn has_below(&self, seq: Seq) -> bool {
        self.ready
            .peek()
            .is_some_and(|Reverse((next, _))| *next < seq)
    }

    /// Begins again at the dirty tail: what was taken and not written back is taken again. Segments whose keys are lost
    /// are left out from now on (`salvage.rs`). To be followed by [`LogReader::refresh`].
    pub(super) fn restart<P: Pmem>(&mut self, cache: &Cache<P>) {
        self.ready.clear();
        self.watched.clear();
        self.epoch = Epoch(0);
        let spare = &mut self.spare;
        let taken = self.next.iter_mut().filter_map(Option::take);
        spare.extend(taken.map(|decoded| decoded.keys));
        for id in cache.segments.ids() {
            let segment = cache.segments.get(id);
            // An open one may get more, whatever it holds now.
            let has_more = match segment.state() {
                _ if segment.has_fills_alone() || segment.is_keyless() => false,
                SegmentState::Open => true,
                SegmentState::Sealed => segment.last_seq() > cache.dirty_tail(),
                SegmentState::Free | SegmentState::Reclaiming | SegmentState::Quarantined => false,
            };
            if has_more {
                self.cursors[id.index()] = KsetCursor::start(segment.generation());
                self.watched.push(id);
            }
        }
    }

    /// Looks for ksets that have come since.
    pub(super) fn refresh<P: Pmem>(&mut self, cache: &Cache<P>) -> Result<(), KeysLost> {
        // Since the last look, while a batch was under way, a segment may have been sealed, reclaimed and
        // opened again: then it is among the opened ones, and what is known of it is of no use.
        let generation_of = |id: SegId| cache.segments.get(id).generation();
        let cursors = &mut self.cursors;
        self.watched
            .retain(|id| cursors[id.index()].generation == generation_of(*id));
        while let Some(id) = cache.segments.next_opened() {
            // After a restart of the reader it may be known already, with nothing taken from it.
            if !self.watched.contains(&id) && !cache.segments.get(id).is_keyless() {
                cursors[id.index()] = KsetCursor::start(generation_of(id));
                self.watched.push(id);
            }
        }
        let mut at = 0;
        while at < self.watched.len() {
            let id = self.watched[at];
            // The state is read before the end: a segment that is sealed now gets no more.
            let open = cache.segments.get(id).state() == SegmentState::Open;
            if self.peek(cache, id)? || !open {
                self.watched.swap_remove(at);
            } else {
                at += 1;
            }
        }
        Ok(())
    }

    /// Puts a segment among the ready ones if it has a kset to take. Those that the tail has passed already
    /// are left behind.
    fn peek<P: Pmem>(&mut self, cache: &Cache<P>, id: SegId) -> Result<bool, KeysLost> {
        let dirty_tail = cache.dirty_tail();
        while self.cursors[id.index()].off < cache.segments.get(id).key_end() {
            let decoded = self.read(cache, id)?;
            let kset = decoded.kset;
            if kset.seq > dirty_tail {
                self.ready.push(Reverse((kset.seq, id.0)));
                self.next[id.index()] = Some(decoded);
                return Ok(true);
            }
            self.epoch = self.epoch.max(kset.epoch);
            self.spare.push(decoded.keys);
        }
        Ok(false)
    }

    /// Reads the kset at a segment's cursor, which goes on.
    fn read<P: Pmem>(&mut self, cache: &Cache<P>, id: SegId) -> Result<Decoded, KeysLost> {
        let mut keys = self.spare.pop().unwrap_or_default();
        keys.clear();
        let cursor = &mut self.cursors[id.index()];
        let read = cursor.read(cache, id, &mut self.reader, &mut keys);
        let kset = read.map_err(|_| KeysLost(id))?;
        Ok(Decoded { kset, keys })
    }

    /// Takes ksets in order, as many as make a batch or fit into a poll, and lays their keys on `overlay`. A
    /// batch with damaged data goes on, across barriers, to where all of them are overwritten, or as far as the
    /// log goes: what is then left in `lost` must not be written (INV-WB-5).
    pub(super) fn gather<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        counters: &Counters,
        batch: Gathering<'_>,
    ) -> Result<Gathered, KeysLost> {
        let Gathering {
            limits,
            taken,
            overlay,
            lost,
        } = batch;
        let keys_end = overlay.key_count() + KEYS_PER_POLL;
        while let Some(&Reverse((seq, segment))) = self.ready.peek() {
            let id = SegId(segment);
            let full = taken.dirty_bytes >= limits.bytes || overlay.key_count() >= limits.key_count;
            let must = seq <= limits.reach || !lost.is_empty();
            if seq >= limits.settled {
                break;
            }
            if full && !must {
                return Ok(Gathered::Full);
            }
            if overlay.key_count() >= keys_end {
                return Ok(Gathered::InPart);
            }
            let Some(decoded) = self.next[id.index()].take() else {
                unreachable!("INV-WB-1: a ready segment has its next kset at hand");
            };
            // Numbers and epochs are drawn apart: a kset with an older epoch behind a newer one was under
            // way while the barrier came, and belongs on either side of it (INV-WB-3).
            let epoch = self.epoch.max(decoded.kset.epoch);
            let border = epoch > self.epoch && taken.spread != Spread::Nothing;
            let spread = taken.spread.and(&decoded.keys);
            // Nobody can see barriers between versions of one block of which the base gets the last alone.
            let spans = border || (taken.spans && !canary::is(Canary::SpanningBatchTakesMore));
            let breaks =
                spans && spread == Spread::More && !canary::is(Canary::StrictBatchSpansBarrier);
            if limits.order == WritebackOrder::Strict && breaks && !must {
                self.next[id.index()] = Some(decoded);
                return Ok(Gathered::Full);
            }
            assert!(
                taken.last_seq.is_none_or(|last| last < seq),
                "INV-LOG-7: {seq:?} turns up behind {:?}",
                taken.last_seq
            );
            let was_whole = lost.is_empty();
            let buf = &mut self.payload;
            lost::check_kset(cache, counters, (id, seq), &decoded.keys, buf, lost);
            if was_whole && !lost.is_empty() && taken.spread != Spread::Nothing && !must {
                // What comes before the damage need not wait for it.
                lost.clear();
                self.next[id.index()] = Some(decoded);
                return Ok(Gathered::Full);
            }
            self.epoch = epoch;
            taken.spans |= border;
            taken.spread = spread;
            take_keys(cache, id, &decoded.keys, taken, overlay);
            taken.last_seq = Some(seq);
            taken.first_seq.get_or_insert(seq);
            self.ready.pop();
            self.spare.push(decoded.keys);
            if !self.peek(cache, id)? {
                self.watched.push(id);
            }
        }
        Ok(Gathered::Dry)
    }
}

/// Lays the dirty keys of a kset on top of the others.
fn take_keys<P: Pmem>(
    cache: &Cache<P>,
    id: SegId,
    keys: &[Key],
    taken: &mut Taken,
    overlay: &mut Overlay,
) {
    let start = cache.geometry.segment_off(id);
    for key in keys.iter().filter(|key| key.kind.is_dirty()) {
        if key.kind == KeyKind::Unmap && canary::is(Canary::UnmapNotWrittenBack) {
            continue;
        }
        let payload = start.plus(u64::from(key.payload_off));
        overlay.push(key, payload, cache.geometry.block_shift());
        if key.kind == KeyKind::Data {
            taken.dirty_bytes += cache.geometry.bytes(u64::from(key.len_blocks));
        }
    }
}
