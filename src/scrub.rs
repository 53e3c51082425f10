//! Scrubbing: a slow look at everything that the cache device holds, again and again, so that damage is found
//! while there is still a second copy, and before a reader meets it.
//!
//! In a pass come the superblock and the tails, then each segment: its info, its keys, their payloads (read, and
//! compared with their checksums if there are any), or, of a free one, each page. What is found:
//!
//! - one copy of a record is damaged: it is made the same as the other; both: written again from what is in use;
//! - a clean payload: its blocks leave the index, and the next read asks the base;
//! - a dirty payload: the blocks are named, and fail until they are overwritten (`src/engine/damage.rs`);
//! - keys, or memory that cannot be read: the segment is suspect, and taken out of service when the base holds
//!   all of it (`src/gc`), or at once if it is free; if keys of dirty data are lost, write-back sees to that at once.
//!
//! A copy that cannot be *read* is left alone: a store there would fault as well.

use crate::canary::{self, Canary};
use crate::engine::{
    Cache, Counters, Depth, Flaw, KsetCursor, Progress, SegmentState, Setting, count_flaw, lock,
    retire,
};
use crate::gc::PROBE_BYTES;
use crate::index::BlockMap;
use crate::media::{
    Copies, KSET_KEYS_MAX, Key, KsetReader, Sealed, SegmentInfo, Tails, persist_superblock,
    superblock_copies,
};
use crate::pmem::{LINE_SIZE_BYTES, Pmem};
use crate::token_bucket::TokenBucket;
use crate::units::{Agent, Now, PAGE_SIZE_BYTES, SegId, Seq};

/// What one poll looks at: some ten microseconds of reading.
const SLICE_BYTES: u64 = 64 << 10;
/// What may be caught up with after a pause, at most.
const ALLOWANCE_BYTES_MAX: u64 = 1 << 20;
/// What a record or an empty segment costs of the allowance, so that many of them do not make a slice long.
const LOOK_BYTES: u64 = PAGE_SIZE_BYTES as u64;
/// Free segments among which one is looked for in one go.
const FREE_SEGMENTS: usize = 64;

/// A segment that is looked at.
#[derive(Clone, Copy, Debug)]
struct Walk {
    id: SegId,
    /// The next kset.
    next: KsetCursor,
    /// Of the kset that was read last, and the next of its keys.
    seq: Seq,
    key_at: usize,
    /// Neither copy of its info is valid.
    info_lost: bool,
}

#[derive(Clone, Copy, Debug)]
enum At {
    Header,
    /// The next segment to begin with.
    Segment(u32),
    Keys(Walk),
    /// A free segment, from this byte on.
    Free(SegId, u64),
    /// A free segment of which a part cannot be read: it is taken out of service now, so that the next start knows, too.
    Retiring(SegId),
}

/// What the scrub works with.
pub(crate) struct Context<'a, P> {
    pub(crate) cache: &'a Cache<P>,
    pub(crate) tails: &'a mut Tails,
    pub(crate) agent: Agent,
    pub(crate) counters: &'a Counters,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Scrub {
    at: At,
    allowance: TokenBucket,
    reader: KsetReader,
    keys: Vec<Key>,
    buf: Vec<u8>,
}

impl Default for Scrub {
    fn default() -> Self {
        Self {
            at: At::Header,
            allowance: TokenBucket::default(),
            reader: KsetReader::default(),
            keys: Vec::with_capacity(KSET_KEYS_MAX),
            buf: vec![0; PAGE_SIZE_BYTES as usize],
        }
    }
}

impl Scrub {
    /// Looks at a slice if it is time for one.
    pub(crate) fn poll<P: Pmem>(&mut self, context: &mut Context<'_, P>, now: Now) -> Progress {
        let rate_mib_s = context.cache.settings.get(Setting::ScrubMibS);
        let allowed = self.allowance.fill(rate_mib_s, ALLOWANCE_BYTES_MAX, now);
        if rate_mib_s == 0 || allowed < SLICE_BYTES {
            return Progress::Idle;
        }
        let mut spent_bytes = 0;
        while spent_bytes < SLICE_BYTES {
            match self.step(context) {
                0 => break,
                bytes => spent_bytes += bytes,
            }
        }
        self.allowance.take(spent_bytes);
        context.counters.scrubbed_bytes.add(spent_bytes);
        Progress::Busy
    }

    /// The next step; returns what it has cost in bytes. 0: somebody is in the way, or the pass is over.
    fn step<P: Pmem>(&mut self, context: &mut Context<'_, P>) -> u64 {
        match self.at {
            At::Header => {
                look_at_header(context);
                self.at = At::Segment(0);
                LOOK_BYTES
            }
            At::Segment(number) if number == context.cache.geometry.segment_count() => {
                context.counters.scrub_passes.add(1);
                self.at = At::Header;
                0
            }
            At::Segment(number) => {
                self.begin_segment(context, SegId(number));
                LOOK_BYTES
            }
            At::Keys(walk) => self.go_on(context, walk),
            At::Free(id, off) => self.probe(context, id, off),
            At::Retiring(id) => self.retire(context, id),
        }
    }

    fn begin_segment<P: Pmem>(&mut self, context: &mut Context<'_, P>, id: SegId) {
        let segment = context.cache.segments.get(id);
        let state = segment.state();
        let mut walk = Walk {
            id,
            next: KsetCursor::start(segment.generation()),
            seq: Seq(0),
            key_at: 0,
            info_lost: false,
        };
        self.keys.clear();
        self.at = match state {
            SegmentState::Sealed => {
                walk.info_lost = look_at_info(context, id);
                At::Keys(walk)
            }
            SegmentState::Open => At::Keys(walk),
            SegmentState::Free => At::Free(id, 0),
            SegmentState::Reclaiming | SegmentState::Quarantined => At::Segment(id.0 + 1),
        };
    }

    /// The next kset of a segment, or the next key of it.
    fn go_on<P: Pmem>(&mut self, context: &mut Context<'_, P>, mut walk: Walk) -> u64 {
        let cache = context.cache;
        let segment = cache.segments.get(walk.id);
        let in_use = matches!(segment.state(), SegmentState::Open | SegmentState::Sealed);
        if !in_use || segment.generation() != walk.next.generation {
            // Reclaimed meanwhile.
            self.at = At::Segment(walk.id.0 + 1);
            return LOOK_BYTES;
        }
        if let Some(key) = self.keys.get(walk.key_at) {
            let key = *key;
            let Some(bytes) = look_at_payload(context, &walk, &key, &mut self.buf) else {
                return 0;
            };
            walk.key_at += 1;
            self.at = At::Keys(walk);
            return bytes;
        }
        if walk.next.off >= segment.key_end() {
            if walk.info_lost && segment.state() == SegmentState::Sealed {
                rewrite_info(context, &walk);
            }
            self.at = At::Segment(walk.id.0 + 1);
            return LOOK_BYTES;
        }
        self.keys.clear();
        walk.key_at = 0;
        let (reader, keys) = (&mut self.reader, &mut self.keys);
        let Ok(kset) = walk.next.read(cache, walk.id, reader, keys) else {
            // If there is anything dirty in it, write-back begins to save that at once.
            if cache.segments.lose_keys(walk.id) {
                context.counters.key_errors.add(1);
            }
            self.at = At::Segment(walk.id.0 + 1);
            return LOOK_BYTES;
        };
        walk.seq = kset.seq;
        self.at = At::Keys(walk);
        u64::from(kset.size_bytes)
    }

    /// Some pages of a free segment.
    fn probe<P: Pmem>(&mut self, context: &mut Context<'_, P>, id: SegId, off: u64) -> u64 {
        let cache = context.cache;
        let size_bytes = cache.geometry.segment_size_bytes();
        let len_bytes = PROBE_BYTES.min(size_bytes - off);
        let start = cache.geometry.segment_off(id).plus(off);
        let is_readable = cache.pmem.probe(start, len_bytes).is_ok();
        if !is_readable && cache.segments.suspect(id) {
            context.counters.poisoned_reads.add(1);
        }
        let end = off + len_bytes;
        self.at = if !is_readable {
            At::Retiring(id)
        } else if end < size_bytes {
            At::Free(id, end)
        } else {
            At::Segment(id.0 + 1)
        };
        LOOK_BYTES
    }

    /// Looks for a segment among the free ones, and takes it out of service. A stream that has opened it meanwhile does the same.
    fn retire<P: Pmem>(&mut self, context: &mut Context<'_, P>, id: SegId) -> u64 {
        let segments = &context.cache.segments;
        if segments.get(id).state() != SegmentState::Free {
            self.at = At::Segment(id.0 + 1);
        } else if segments.take_free(id, FREE_SEGMENTS) {
            retire(&context.cache.stream_context(context.agent), id);
            self.at = At::Segment(id.0 + 1);
        }
        LOOK_BYTES
    }
}

/// The payload of a key; returns its length. `None`: somebody is at its page, or has what is needed; again later.
fn look_at_payload<P: Pmem>(
    context: &mut Context<'_, P>,
    walk: &Walk,
    key: &Key,
    buf: &mut [u8],
) -> Option<u64> {
    let cache = context.cache;
    if !key.kind.has_payload() {
        return Some(LINE_SIZE_BYTES);
    }
    let len_bytes = cache.geometry.bytes(u64::from(key.len_blocks));
    let Err(flaw) = cache.check_payload(walk.id, key, buf, Depth::Read) else {
        return Some(len_bytes);
    };
    if flaw == Flaw::Poisoned {
        cache.segments.suspect(walk.id);
    }
    if !is_named(cache, walk.id, key)? {
        // Overwritten since: nobody reads it, and write-back looks for itself.
        return Some(len_bytes);
    }
    let is_clean =
        cache.is_key_clean(walk.seq, key.kind) || canary::is(Canary::ScrubDropsDirtyData);
    if !is_clean {
        cache.note_damage(context.counters, (walk.id, key), flaw, buf, |_, _| {});
        return Some(len_bytes);
    }
    let at = cache.index.locate(cache.geometry.page_of(key.lba));
    let first = cache.geometry.place(walk.id, key.payload_off).0;
    let places = first..first + u64::from(key.len_blocks);
    // INV-SEG-8.
    cache.segments.get(walk.id).note_forgotten();
    let evicted = cache.index.with_claim(at, context.agent.0, || {
        cache.index.evict_places(at, &places)
    });
    if evicted != Some(true) {
        return None;
    }
    count_flaw(context.counters, flaw, 1);
    Some(len_bytes)
}

/// Whether any block of a key is still read from where this key has it. `None`: its page changes too fast.
fn is_named<P: Pmem>(cache: &Cache<P>, id: SegId, key: &Key) -> Option<bool> {
    let found = cache
        .index
        .lookup(cache.index.locate(cache.geometry.page_of(key.lba)))?;
    let per_page = u64::from(cache.geometry.blocks_per_page());
    let first = cache.geometry.place(id, key.payload_off).0;
    Some((0..u64::from(key.len_blocks)).any(|block| {
        let map = found.map.block(((key.lba.0 + block) % per_page) as u32);
        matches!(map, BlockMap::Mapped(place) if place.0 == first + block)
    }))
}

/// The superblock and the tails.
fn look_at_header<P: Pmem>(context: &mut Context<'_, P>) {
    let cache = context.cache;
    match Tails::load(&cache.pmem, &cache.checksums) {
        Ok((_, copies)) => repair(context, copies),
        Err(error) if error.can_be_written() => {
            cache.persist_tails(context.tails, context.agent);
            context.counters.scrub_repairs.add(1);
        }
        Err(_) => context.counters.metadata_errors.add(1),
    }
    let mut superblock = lock(&cache.superblock);
    match superblock_copies(&cache.pmem) {
        Ok(copies) => repair(context, copies),
        Err(error) if error.can_be_written() => {
            drop(persist_superblock(
                &cache.pmem,
                context.agent,
                &mut superblock,
            ));
            context.counters.scrub_repairs.add(1);
        }
        Err(_) => context.counters.metadata_errors.add(1),
    }
}

/// The info of a sealed segment, which nobody but the background updates. `true`: both copies are damaged, and can be
/// written. A copy that cannot be read makes the segment suspect: its info is not to be stored any more.
fn look_at_info<P: Pmem>(context: &mut Context<'_, P>, id: SegId) -> bool {
    let cache = context.cache;
    let (is_lost, is_to_be_written) =
        match SegmentInfo::load(&cache.pmem, &cache.geometry, &cache.checksums, id) {
            Ok((_, copies)) => {
                repair(context, copies);
                (copies.unreadable().is_some(), false)
            }
            Err(error) if error.can_be_written() => (false, true),
            Err(_) => {
                context.counters.metadata_errors.add(1);
                (true, false)
            }
        };
    if is_lost {
        cache.segments.suspect(id);
    }
    is_to_be_written
}

/// A sealed segment of which the info is lost, and all ksets were just found.
fn rewrite_info<P: Pmem>(context: &mut Context<'_, P>, walk: &Walk) {
    let cache = context.cache;
    let segment = cache.segments.get(walk.id);
    let mut info = SegmentInfo {
        generation: segment.generation(),
        sealed: Some(Sealed {
            kset_count: walk.next.kset_index,
            last_seq: segment.last_seq(),
        }),
        update: segment.info_update(),
    };
    drop(info.persist(
        &cache.pmem,
        context.agent,
        &cache.geometry,
        &cache.checksums,
        walk.id,
    ));
    segment.set_info(&info);
    context.counters.scrub_repairs.add(1);
}

/// Makes a damaged copy the same as the other one, unless its memory is gone.
fn repair<P: Pmem>(context: &Context<'_, P>, mut copies: Copies) {
    if !copies.needs_repair() {
        return;
    }
    if copies.unreadable().is_some() || copies.repair(&context.cache.pmem, context.agent).is_err() {
        context.counters.metadata_errors.add(1);
    } else {
        context.counters.scrub_repairs.add(1);
    }
}
