//! Reads the log from the dirty tail on: the ksets of all segments whose keys can be read, in the order of their sequence
//! numbers.

mod watched;

use super::clearing::{Clearing, Load};
use super::lost::{self, Lost};
use super::overlay::Overlay;
use crate::canary::{self, Canary};
use crate::engine::{Cache, Counters, Depth, KsetCursor, SegmentState, WritebackOrder};
use crate::media::{KSET_KEYS_MAX, Key, KeyKind, Kset, KsetReader};
use crate::memory::{self, NoMemory};
use crate::pmem::Pmem;
use crate::units::{Epoch, Generation, Lba, PAGE_SIZE_BYTES, SegId, Seq};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use watched::Watched;

/// Keys that one poll takes, at most; one kset may go beyond.
const KEYS_PER_POLL: usize = 64;
/// Segments, and keys, that one poll looks at in search of ksets that have come, at most; one kset may go beyond. In
/// simulations others get their turns in between.
const LOOKED_AT_PER_POLL: usize = if cfg!(feature = "sim") { 8 } else { 512 };
/// So many segments have the keys of their next kset at hand: those that are being taken, one for each stream.
const AT_HAND_MAX: usize = 64;

/// The log cannot be read on: a kset that was there in this segment is not any more.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeysLost(pub(super) SegId);

/// How far a batch may go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Only ksets below this.
    pub(super) settled: Seq,
    pub(super) order: WritebackOrder,
    /// Payload and zeroes; one kset may go beyond.
    pub(super) load: Load,
    /// What they count for.
    pub(super) clearing: Clearing,
    pub(super) key_count: usize,
    /// What has to go on beyond the limits takes another kset only while there are fewer keys: the overlay has room for no
    /// more (INV-WB-8).
    pub(super) room: usize,
    /// Part of what comes before this, and of it itself, may be on the base already: a batch goes that far,
    /// whatever else is said here. A salvage goes as far as it has to.
    pub(super) reach: Seq,
    /// The base has met memory that cannot be read in what lies up to here: payloads are read as a whole.
    pub(super) read_upto: Seq,
}

impl Limits {
    pub(super) const NONE: Limits = Limits {
        settled: Seq(0),
        order: WritebackOrder::Strict,
        load: Load::NOTHING,
        clearing: Clearing::AS_DATA,
        key_count: 0,
        room: 0,
        reach: Seq(0),
        read_upto: Seq(0),
    };

    /// How well to look at what has this number.
    pub(super) fn depth(&self, seq: Seq) -> Depth {
        if seq <= self.read_upto && !canary::is(Canary::LostSourceForgotten) {
            Depth::Read
        } else {
            Depth::Probe
        }
    }
}

/// What was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    /// `None`: nothing.
    pub(super) last_seq: Option<Seq>,
    pub(super) first_seq: Option<Seq>,
    pub(super) dirty_bytes: u64,
    /// With zeroes, and what is overwritten as well.
    load: Load,
    spread: Spread,
    /// A barrier lies between its dirty keys.
    spans: bool,
}

impl Taken {
    pub(super) const NOTHING: Taken = Taken {
        last_seq: None,
        first_seq: None,
        dirty_bytes: 0,
        load: Load::NOTHING,
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
        if self == Spread::More {
            return self;
        }
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
    /// There is more to take, and no room for it.
    Crowded,
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

/// A search for ksets that have come, under way.
#[derive(Clone, Copy, Debug)]
struct Look {
    /// Everything below this was in the log when it began.
    settled: Seq,
    /// The next of the watched segments.
    at: usize,
}

/// What was found in a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// A kset to take.
    Kset,
    Nothing,
    /// There is more to look at.
    InPart,
}

/// See the module.
#[derive(Debug)]
pub(super) struct LogReader {
    /// For each segment: the next kset to take.
    cursors: Vec<KsetCursor>,
    /// Segments with a kset to take, lowest sequence number first.
    ready: BinaryHeap<Reverse<(Seq, u32)>>,
    /// For each segment that is ready: that kset, if it follows one that was taken. Of others nothing is kept but the
    /// number, since most wait long for their turn; they are read again then.
    next: Vec<Option<Decoded>>,
    /// Memory for the keys of those that are at hand, and of one more that is taken.
    spare: Vec<Vec<Key>>,
    /// Of a kset that is looked at.
    looked_at: Vec<Key>,
    /// Segments that may get more.
    watched: Watched,
    look: Option<Look>,
    /// Since a restart: the next segment of which it has to be seen whether it has anything to take.
    restarts_at: Option<SegId>,
    /// What comes before this, or is this, is passed over, as what the dirty tail has passed.
    after: Seq,
    /// What the looks have told at the most: what was in the log stays there, although a core that is slow to draw its number
    /// may say that it draws an earlier one.
    settled: Seq,
    /// No look has ended since the reader began.
    begins: bool,
    reader: KsetReader,
    epoch: Epoch,
    payload: Vec<u8>,
}

impl LogReader {
    pub(super) fn new(segment_count: usize) -> Result<Self, NoMemory> {
        let what = "write-back";
        let start = || KsetCursor::start(Generation::NONE);
        Ok(Self {
            cursors: memory::filled(what, segment_count, start)?,
            ready: memory::with_room(what, segment_count)?.into(),
            next: memory::filled(what, segment_count, || None)?,
            spare: (0..=segment_count.min(AT_HAND_MAX))
                .map(|_| Vec::with_capacity(KSET_KEYS_MAX))
                .collect(),
            looked_at: Vec::with_capacity(KSET_KEYS_MAX),
            watched: Watched::new(segment_count)?,
            look: None,
            restarts_at: None,
            after: Seq(0),
            settled: Seq(0),
            begins: true,
            reader: KsetReader::default(),
            epoch: Epoch(0),
            payload: vec![0; PAGE_SIZE_BYTES as usize],
        })
    }

    /// Whether there is anything to write back below `seq`, which is not above the point that the last look has told;
    /// before the first there may be.
    pub(super) fn has_below(&self, seq: Seq) -> bool {
        let first = self.ready.peek();
        self.begins || first.is_some_and(|Reverse((next, _))| *next < seq)
    }

    /// Begins again at the dirty tail: what was taken and not written back is taken again. Segments whose keys are lost
    /// are left out from now on (`salvage.rs`). To be followed by a [`LogReader::look`].
    pub(super) fn restart(&mut self) {
        self.ready.clear();
        self.watched.clear();
        self.look = None;
        self.restarts_at = Some(SegId(0));
        self.after = Seq(0);
        self.begins = true;
        self.epoch = Epoch(0);
    }

    /// The same, behind a number above the dirty tail.
    pub(super) fn restart_after(&mut self, seq: Seq) {
        self.restart();
        self.after = seq;
    }

    /// Goes on with a restart. `true`: all segments have been seen. Nothing else is looked at before: their cursors are
    /// where they were.
    fn go_on_restarting<P: Pmem>(&mut self, cache: &Cache<P>, left: &mut usize) -> bool {
        while let Some(id) = self.restarts_at {
            if *left == 0 {
                return false;
            }
            *left -= 1;
            let taken = self.next[id.index()].take();
            self.spare.extend(taken.map(|decoded| decoded.keys));
            let segment = cache.segments.get(id);
            // An open one may get more, whatever it holds now.
            let has_more = match segment.state() {
                _ if segment.has_fills_alone() || segment.is_keyless() => false,
                SegmentState::Open => true,
                SegmentState::Sealed => segment.last_seq() > cache.dirty_tail().max(self.after),
                SegmentState::Free | SegmentState::Reclaiming | SegmentState::Quarantined => false,
            };
            if has_more {
                self.cursors[id.index()] = KsetCursor::start(segment.generation());
                self.watched.add(id);
            }
            let next = SegId(id.0 + 1);
            self.restarts_at = (next.0 < cache.geometry.segment_count()).then_some(next);
        }
        true
    }

    /// Goes on to look for ksets that have come. Some: all segments have been looked at; everything below this number was
    /// in the log before.
    pub(super) fn look<P: Pmem>(&mut self, cache: &Cache<P>) -> Result<Option<Seq>, KeysLost> {
        let mut left = LOOKED_AT_PER_POLL;
        if !self.go_on_restarting(cache, &mut left) {
            return Ok(None);
        }
        let begun = self.look.take();
        let mut look = begun.unwrap_or_else(|| Look {
            settled: cache.seq_settled(),
            at: 0,
        });
        self.watch_opened(cache, &mut left);
        loop {
            if left == 0 {
                // More may have been opened.
                self.look = Some(look);
                return Ok(None);
            }
            let Some(id) = self.watched.get(look.at) else {
                break;
            };
            left -= 1;
            let segment = cache.segments.get(id);
            // While a batch was under way it may have been sealed and reclaimed. If it is opened again it is among the
            // opened ones.
            if self.cursors[id.index()].generation != segment.generation() {
                self.watched.remove(look.at);
                continue;
            }
            // The state is read before the end: a segment that is sealed now gets no more.
            let open = segment.state() == SegmentState::Open;
            match self.look_at(cache, id, &mut left)? {
                Found::Nothing if open => look.at += 1,
                Found::Kset | Found::Nothing => self.watched.remove(look.at),
                Found::InPart => {
                    self.look = Some(look);
                    return Ok(None);
                }
            }
        }
        self.begins = false;
        self.settled = self.settled.max(look.settled);
        Ok(Some(self.settled))
    }

    /// Hears of segments that were opened.
    fn watch_opened<P: Pmem>(&mut self, cache: &Cache<P>, left: &mut usize) {
        while *left > 0
            && let Some(id) = cache.segments.next_opened()
        {
            *left -= 1;
            let segment = cache.segments.get(id);
            if segment.is_keyless() {
                continue;
            }
            // After a restart of the reader it may be known already: that has seen it open before this was told.
            let (cursor, generation) = (&mut self.cursors[id.index()], segment.generation());
            if cursor.generation != generation {
                *cursor = KsetCursor::start(generation);
                self.watched.add(id);
            }
        }
    }

    /// Puts a segment among the ready ones if it has a kset to take. Those that the tail has passed already
    /// are left behind. Nothing of the kset is kept but its number: most segments wait long for their turn.
    fn look_at<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        id: SegId,
        left: &mut usize,
    ) -> Result<Found, KeysLost> {
        let passed = cache.dirty_tail().max(self.after);
        let mut cursor = self.cursors[id.index()];
        while cursor.off < cache.segments.get(id).key_end() {
            if *left == 0 {
                return Ok(Found::InPart);
            }
            self.looked_at.clear();
            let read = cursor.read(cache, id, &mut self.reader, &mut self.looked_at);
            let kset = read.map_err(|_| KeysLost(id))?;
            *left = left.saturating_sub(self.looked_at.len());
            if kset.seq > passed {
                self.ready.push(Reverse((kset.seq, id.0)));
                return Ok(Found::Kset);
            }
            self.epoch = self.epoch.max(kset.epoch);
            self.cursors[id.index()] = cursor;
        }
        Ok(Found::Nothing)
    }

    /// Behind a kset that was taken: the same for the next one, whose turn is likely to come soon. `false`: there is none.
    fn look_behind<P: Pmem>(&mut self, cache: &Cache<P>, id: SegId) -> Result<bool, KeysLost> {
        if self.spare.len() < 2 {
            // The tail has not passed it: it is one kset.
            return Ok(self.look_at(cache, id, &mut 1)? == Found::Kset);
        }
        let is_there = self.cursors[id.index()].off < cache.segments.get(id).key_end();
        if is_there {
            let decoded = self.read(cache, id)?;
            self.ready.push(Reverse((decoded.kset.seq, id.0)));
            self.next[id.index()] = Some(decoded);
        }
        Ok(is_there)
    }

    /// The kset of a segment that has become ready with this number. What is not at hand is read again; if it is not what
    /// it was, its keys are lost (INV-WB-1).
    fn take_next<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        id: SegId,
        seq: Seq,
    ) -> Result<Decoded, KeysLost> {
        let decoded = match self.next[id.index()].take() {
            Some(decoded) => decoded,
            None => self.read(cache, id)?,
        };
        if decoded.kset.seq != seq {
            self.spare.push(decoded.keys);
            return Err(KeysLost(id));
        }
        Ok(decoded)
    }

    /// Reads the kset at a segment's cursor, which goes on.
    fn read<P: Pmem>(&mut self, cache: &Cache<P>, id: SegId) -> Result<Decoded, KeysLost> {
        // There is memory unless what was put back keeps it: then its turn comes next.
        let keys = self.spare.pop();
        let mut keys = keys.unwrap_or_else(|| Vec::with_capacity(KSET_KEYS_MAX));
        keys.clear();
        let cursor = &mut self.cursors[id.index()];
        match cursor.read(cache, id, &mut self.reader, &mut keys) {
            Ok(kset) => {
                lost::ask_for_first(cache, id, &keys);
                Ok(Decoded { kset, keys })
            }
            Err(_) => {
                self.spare.push(keys);
                Err(KeysLost(id))
            }
        }
    }

    /// Takes ksets in order, as many as make a batch or fit into a poll, and lays their keys on `overlay`. A
    /// batch with damaged data goes on, across barriers, to where all of them are overwritten, or as far as the
    /// log goes: what is then left in `lost` must not be written (INV-WB-5). If there is no room for that, the overlay is
    /// to be narrowed, and holds a part of the batch from then on.
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
        let mut left = KEYS_PER_POLL;
        while let Some(&Reverse((seq, segment))) = self.ready.peek() {
            let id = SegId(segment);
            let full = taken.load.reaches(limits.load)
                || overlay.key_count() >= limits.key_count
                || overlay.next_part().is_some();
            let must = seq <= limits.reach || !lost.is_empty() || seq < lost.upto();
            if seq >= limits.settled {
                break;
            }
            if full && !must {
                return Ok(Gathered::Full);
            }
            if left == 0 {
                return Ok(Gathered::InPart);
            }
            let is_crowded = overlay.key_count() >= limits.room || lost.is_crowded();
            if must && is_crowded {
                return Ok(Gathered::Crowded);
            }
            let mut decoded = self.take_next(cache, id, seq)?;
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
            left = left.saturating_sub(decoded.keys.len());
            if overlay.is_behind_first() {
                // The first part was gathered with all the others in view.
                decoded.keys.retain(|key| overlay.holds_some_of(key));
            }
            let was_whole = lost.is_none();
            let (buf, depth) = (&mut self.payload, limits.depth(seq));
            lost::check_kset(cache, counters, (id, seq, depth), &decoded.keys, buf, lost);
            if lost.is_of_part() && !lost.is_empty() {
                lost.keep_within(|lba| overlay.holds(lba));
            }
            if was_whole && !lost.is_none() && taken.spread != Spread::Nothing && !must {
                // What comes before the damage need not wait for it.
                lost.clear();
                self.next[id.index()] = Some(decoded);
                return Ok(Gathered::Full);
            }
            self.epoch = epoch;
            taken.spans |= border;
            taken.spread = spread;
            take_keys(cache, id, &decoded.keys, limits.clearing, taken, overlay);
            taken.last_seq = Some(seq);
            taken.first_seq.get_or_insert(seq);
            self.ready.pop();
            self.spare.push(decoded.keys);
            if !self.look_behind(cache, id)? {
                self.watched.add(id);
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
    clearing: Clearing,
    taken: &mut Taken,
    overlay: &mut Overlay,
) {
    let start = cache.geometry.segment_off(id);
    let mut data_blocks = 0;
    for key in keys.iter().filter(|key| key.kind.is_dirty()) {
        if key.kind == KeyKind::Unmap && canary::is(Canary::UnmapNotWrittenBack) {
            continue;
        }
        let payload = start.plus(u64::from(key.payload_off));
        overlay.push(key, payload, cache.geometry.block_shift());
        let len_blocks = u64::from(key.len_blocks);
        if key.kind == KeyKind::Data {
            data_blocks += len_blocks;
        } else {
            taken.load += clearing.load(key.kind, cache.geometry.bytes(len_blocks));
        }
    }
    let data_bytes = cache.geometry.bytes(data_blocks);
    taken.load += clearing.load(KeyKind::Data, data_bytes);
    taken.dirty_bytes += data_bytes;
}

#[cfg(test)]
mod tests;
