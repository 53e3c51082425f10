//! Reclaiming of segments, ahead of need.
//!
//! The oldest segment that is wholly on the base and not lent is emptied: its pages leave the index, everybody
//! who might still read them leaves, and then, in this order and each step durable before the next,
//!
//! 1. the key tail passes the segment: after a cut, no older copy of any of its blocks counts as cached;
//! 2. its generation goes up: everything in it is dead;
//! 3. it is free.
//!
//! A segment of which the keys or the memory are damaged gets no further than 1, and is not used any more.

use crate::canary::{self, Canary};
use crate::engine::{Cache, Counters, Progress, SegmentState, Setting, Ticket};
use crate::media::{KEYS_START_BYTES, Key, KsetReader, SegmentInfo, Tails};
use crate::pmem::Pmem;
use crate::units::{Agent, Generation, Page, SegId, Seq};
use std::sync::atomic::Ordering;

/// Pages that one poll looks up, at most.
const PAGES_PER_POLL: u32 = 64;
/// So many keys ahead the index is asked for the pages that will be looked up.
const PREFETCH_KEYS: usize = 8;
/// Buckets of the index that one poll goes through, at most.
const BUCKETS_PER_POLL: usize = 64;

/// The segment that is being emptied.
#[derive(Clone, Copy, Debug)]
struct Victim {
    id: SegId,
    off: u32,
    kset_index: u32,
    /// The next key of those that were read, and the next page of it.
    key_at: usize,
    page_at: u64,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Idle,
    Emptying(Victim),
    /// Its keys cannot be read: the whole index is gone through for its places, from this bucket on.
    Sweeping(SegId, usize),
    /// Nobody finds its pages any more; some may still be reading them.
    Waiting(SegId, Ticket),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Gc {
    state: State,
    /// Out of the index, and still lent: to be freed when the last loan has come back. Nothing waits for them
    /// meanwhile.
    lent: Vec<SegId>,
    reader: KsetReader,
    keys: Vec<Key>,
    needs_writeback: bool,
}

impl Default for Gc {
    fn default() -> Self {
        Self {
            state: State::Idle,
            lent: Vec::new(),
            reader: KsetReader::default(),
            keys: Vec::with_capacity(crate::media::KSET_KEYS_MAX),
            needs_writeback: false,
        }
    }
}

impl Gc {
    /// Space is wanted, and nothing can be reclaimed before more is written back.
    pub(crate) fn needs_writeback(&self) -> bool {
        self.needs_writeback
    }

    pub(crate) fn poll<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        tails: &mut Tails,
        agent: Agent,
        counters: &Counters,
    ) -> Progress {
        let emptied = match self.state {
            State::Idle => self.take_returned(cache),
            State::Emptying(victim) => return self.empty(cache, victim, agent, counters),
            State::Sweeping(id, bucket) => return self.sweep(cache, id, bucket, agent),
            // INV-GRACE-1: whoever might still read what lies there has left.
            State::Waiting(id, ticket)
                if cache.grace.passed(ticket) || canary::is(Canary::ReclaimIgnoresReaders) =>
            {
                self.state = State::Idle;
                if cache.segments.get(id).is_pinned() {
                    self.lent.push(id);
                    return Progress::Busy;
                }
                Some(id)
            }
            State::Waiting(..) => return Progress::Idle,
        };
        let Some(id) = emptied else {
            return self.choose(cache);
        };
        free(cache, tails, agent, id);
        counters.segments_reclaimed.add(1);
        cache.space_wanted.store(false, Ordering::Release);
        Progress::Busy
    }

    /// An emptied segment that is not lent any more.
    fn take_returned<P: Pmem>(&mut self, cache: &Cache<P>) -> Option<SegId> {
        let mut lent = self.lent.iter();
        let at = lent.position(|id| !cache.segments.get(*id).is_pinned())?;
        Some(self.lent.swap_remove(at))
    }

    fn choose<P: Pmem>(&mut self, cache: &Cache<P>) -> Progress {
        let segments = &cache.segments;
        let short = segments.free_count() < cache.free_segments_wanted();
        let gc_percent = cache.settings.get(Setting::GcPercent) as usize;
        let above = cache.segments_used() * 100 > cache.segments_in_service() * gc_percent;
        let wanted = cache.space_wanted.load(Ordering::Acquire);
        self.needs_writeback = false;
        let needed = short || above || wanted;
        if !(needed || segments.has_suspects()) {
            return Progress::Idle;
        }
        let dirty_tail = cache.dirty_tail();
        let sealed = segments
            .ids()
            .filter(|id| segments.get(*id).state() == SegmentState::Sealed);
        let clean = sealed.filter(|id| {
            segments.get(*id).last_seq() <= dirty_tail || canary::is(Canary::DirtySegmentReclaimed)
        });
        // What is lent comes last: it may take long until it is free. But if requests wait for room it has to
        // do: once it is out of the index, nothing of it is lent anew. What is suspect comes first, needed or
        // not.
        let candidates = clean
            .map(|id| {
                let segment = segments.get(id);
                let is_sound = !segment.is_suspect();
                (segment.is_pinned(), is_sound, segment.last_seq(), id)
            })
            .filter(|(is_lent, is_sound, ..)| (wanted || !is_lent) && (needed || !is_sound));
        let Some((.., id)) = candidates.min() else {
            self.needs_writeback = needed;
            if needed && dirty_tail.0 + 1 >= cache.seq_settled().0 {
                // Everything is clean: a writer that waits for the index finds room now.
                cache.space_wanted.store(false, Ordering::Release);
            }
            return Progress::Idle;
        };
        segments.get(id).set_state(SegmentState::Reclaiming);
        self.keys.clear();
        self.state = State::Emptying(Victim {
            id,
            off: KEYS_START_BYTES,
            kset_index: 0,
            key_at: 0,
            page_at: 0,
        });
        Progress::Busy
    }

    /// Takes the pages of the victim out of the index, some in each poll.
    fn empty<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        mut victim: Victim,
        agent: Agent,
        counters: &Counters,
    ) -> Progress {
        let mut budget = PAGES_PER_POLL;
        while budget > 0 {
            if let Some(key) = self.keys.get(victim.key_at) {
                let key = *key;
                if let Some(ahead) = self.keys.get(victim.key_at + PREFETCH_KEYS) {
                    let page = cache.geometry.page_of(ahead.lba);
                    cache.index.prefetch(cache.index.locate(page));
                }
                if !evict_key(cache, &mut victim, &key, agent, &mut budget) {
                    break;
                }
                continue;
            }
            if victim.off >= cache.segments.get(victim.id).key_end() {
                self.state = State::Waiting(victim.id, cache.grace.ticket());
                return Progress::Busy;
            }
            if !self.read_kset(cache, &mut victim) {
                // Its keys are unreadable, so the index has to tell what lies in it. The base holds all of it.
                if cache.segments.suspect(victim.id) {
                    counters.key_errors.add(1);
                }
                self.state = State::Sweeping(victim.id, 0);
                return Progress::Busy;
            }
        }
        self.state = State::Emptying(victim);
        Progress::Busy
    }

    /// Takes whatever lies in a segment out of the index, some buckets in each poll.
    fn sweep<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        id: SegId,
        mut bucket: usize,
        agent: Agent,
    ) -> Progress {
        let is_inside = |place| cache.geometry.segment_of(place) == id;
        let end = cache.index.bucket_count();
        let stop = (bucket + BUCKETS_PER_POLL).min(end);
        while bucket < stop && cache.index.sweep_bucket(bucket, agent.0, is_inside) {
            bucket += 1;
        }
        self.state = if bucket == end {
            State::Waiting(id, cache.grace.ticket())
        } else {
            State::Sweeping(id, bucket)
        };
        Progress::Busy
    }

    fn read_kset<P: Pmem>(&mut self, cache: &Cache<P>, victim: &mut Victim) -> bool {
        let generation = cache.segments.get(victim.id).generation();
        let context = cache.kset_context(victim.id, generation);
        self.keys.clear();
        let kset = self.reader.read(
            &cache.pmem,
            &context,
            victim.off,
            victim.kset_index,
            &mut self.keys,
        );
        let Ok(kset) = kset else { return false };
        victim.off += kset.size_bytes;
        victim.kset_index += 1;
        victim.key_at = 0;
        victim.page_at = 0;
        true
    }
}

/// Takes the pages of one key out of the index, as far as they still lie in the victim. `false`: somebody is
/// at the page; again with the next poll.
fn evict_key<P: Pmem>(
    cache: &Cache<P>,
    victim: &mut Victim,
    key: &Key,
    agent: Agent,
    budget: &mut u32,
) -> bool {
    let per_page = u64::from(cache.geometry.blocks_per_page());
    let first = key.lba.0 / per_page;
    let end = (key.lba.0 + u64::from(key.len_blocks)).div_ceil(per_page);
    while first + victim.page_at < end {
        if *budget == 0 {
            return false;
        }
        *budget -= 1;
        let at = cache.index.locate(Page(first + victim.page_at));
        let in_victim = |place| cache.geometry.segment_of(place) == victim.id;
        let evicted = cache
            .index
            .with_claim(at, agent.0, || cache.index.evict(at, in_victim));
        if evicted.is_none() {
            return false;
        }
        victim.page_at += 1;
    }
    victim.key_at += 1;
    victim.page_at = 0;
    true
}

/// Frees an emptied segment.
fn free<P: Pmem>(cache: &Cache<P>, tails: &mut Tails, agent: Agent, id: SegId) {
    let segment = cache.segments.get(id);
    assert!(
        !segment.is_pinned(),
        "INV-PIN-1: a segment is freed when nobody looks at it"
    );
    if canary::is(Canary::GenerationBeforeKeyTail) {
        raise_generation(cache, agent, id);
    }
    // 1. The key tail. An older copy of one of its blocks, still intact in another segment, is dead from here
    //    on; without this a cut would bring it back.
    let last_seq: Seq = segment.last_seq();
    assert!(
        segment.state() == SegmentState::Reclaiming && last_seq <= cache.dirty_tail(),
        "INV-SEG-5: segment {id:?} up to {last_seq:?} is freed, but it is {:?}, and only {:?} is on the base",
        segment.state(),
        cache.dirty_tail()
    );
    tails.key_tail = tails.key_tail.max(last_seq);
    cache.persist_tails(tails, agent);
    cache.forget_damage_in(id);
    if segment.is_suspect() && !canary::is(Canary::SuspectSegmentReused) {
        // Its info stays as it is: nothing is stored where the memory may not take it, and the next recovery
        // finds what this one knows (INV-SEG-7).
        return cache.segments.quarantine(id);
    }
    // 2. The generation: nothing in it is valid any more (INV-SEG-6).
    if !canary::is(Canary::GenerationNotRaised) {
        raise_generation(cache, agent, id);
    }
    // 3. Free for a stream.
    cache.segments.put_free(id);
}

fn raise_generation<P: Pmem>(cache: &Cache<P>, agent: Agent, id: SegId) {
    let segment = cache.segments.get(id);
    let mut info = SegmentInfo {
        generation: Generation(segment.generation().0 + 1),
        sealed: None,
        update: segment.info_update(),
    };
    drop(info.persist(&cache.pmem, agent, &cache.geometry, &cache.checksums, id));
    segment.set_info(&info);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::invariant_tests::new_cache;

    #[test]
    #[should_panic(expected = "INV-SEG-5")]
    fn a_segment_with_dirty_data_is_not_freed() {
        let cache = new_cache();
        let id = cache.segments.open_next().expect("the cache is empty");
        cache.segments.get(id).note_seq(Seq(1));
        cache.segments.get(id).set_state(SegmentState::Reclaiming);
        free(&cache, &mut Tails::empty(), Agent(1), id);
    }
}
