//! Reclaiming of segments, ahead of need.
//!
//! A segment that is wholly on the base and not lent is chosen (`victim.rs`) and emptied (`walk.rs`): its pages are
//! copied to other segments or leave the index, everybody who might still read them leaves, and then, in this order and
//! each step durable before the next,
//!
//! 1. the key tail passes the segment, if something was forgotten that lay in it: after a cut, no older copy of any of
//!    its blocks counts as cached;
//! 2. its generation goes up: everything in it is dead;
//! 3. it is free.
//!
//! Before, its memory is looked at: where its info is, and all of it if it was filled before the start, since what was known
//! of it then is forgotten. A segment of which the keys or the memory are damaged gets no further than 1, and is not used
//! any more.

mod census;
mod index_wait;
mod look;
mod victim;
mod walk;

use crate::canary::{self, Canary};
use crate::engine::{
    Cache, Class, Counters, Progress, Segment, SegmentState, Setting, Special, Ticket,
};
use crate::media::{Geometry, KEYS_START_BYTES, SegmentInfo, Tails};
use crate::memory::{self, NoMemory};
use crate::pmem::Pmem;
use crate::units::{Agent, Generation, PAGE_SIZE_BYTES, SegId, Seq};
use census::Census;
use index_wait::IndexWait;
use look::{Look, Looked};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use victim::{Plan, Wish};
use walk::{Step, Walk};

/// Buckets of the index that one poll goes through, at most: some microseconds.
const BUCKETS_PER_POLL: usize = 64;
/// Segments that were lent, of which one poll looks whether they have come back, at most.
const LENT_PER_POLL: usize = 64;
/// What a poll of the background looks at of a segment's memory in one go: each page costs a line.
pub(crate) const PROBE_BYTES: u64 = 64 * PAGE_SIZE_BYTES as u64;

#[derive(Clone, Copy, Debug)]
enum State {
    Idle,
    /// Its pages leave.
    Emptying(SegId),
    /// Its keys cannot be read: the whole index is gone through for its places, from this bucket on.
    Sweeping(SegId, usize),
    /// Nobody finds its pages any more; some may still be reading them.
    Waiting(SegId, Ticket),
    /// Nobody reads there any more. What is known of its pages is forgotten, from this one on.
    Cooling(SegId, usize),
    /// Its memory is looked at, from this byte on.
    Probing(SegId, u64),
}

/// Why something is to be reclaimed, and nothing can be before more is written back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lack {
    /// That is not so.
    #[default]
    Nothing,
    /// More than `gc_percent` of the segments are in use. That is ahead of need, and not urgent.
    Ahead,
    /// Fewer segments are free than are kept ready.
    Free,
    /// Writers wait for room.
    Room,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Gc {
    state: State,
    walk: Walk,
    census: Census,
    look: Look,
    /// Out of the index, and still lent: to be freed when the last loan has come back. Nothing waits for them
    /// meanwhile.
    lent: VecDeque<SegId>,
    is_needed: bool,
    lack: Lack,
    /// The dirty tail when that was found.
    lack_tail: Seq,
    index_wait: Option<IndexWait>,
}

impl Gc {
    /// For a cache of this geometry.
    pub(crate) fn new(geometry: &Geometry) -> Result<Self, NoMemory> {
        Ok(Self {
            state: State::Idle,
            walk: Walk::default(),
            census: Census::new(geometry)?,
            look: Look::default(),
            lent: memory::with_room("reclaiming", geometry.segment_count() as usize)?.into(),
            is_needed: false,
            lack: Lack::Nothing,
            lack_tail: Seq(0),
            index_wait: None,
        })
    }

    /// What only write-back can help against.
    pub(crate) fn lack(&self) -> Lack {
        self.lack
    }

    pub(crate) fn poll<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        tails: &mut Tails,
        agent: Agent,
        counters: &Counters,
    ) -> Progress {
        if self.lack_tail != cache.dirty_tail() {
            // What has become clean since may be enough.
            self.lack = Lack::Nothing;
        }
        // A victim is chosen by what is in use now, unless somebody waits for it.
        let is_urgent = cache.space_wanted.load(Ordering::Acquire);
        if matches!(self.state, State::Idle)
            && self.is_needed
            && !is_urgent
            && !self.look.is_under_way()
            && self.census.poll(cache)
        {
            return Progress::Busy;
        }
        match self.state {
            State::Idle => {
                let Some(id) = self.take_returned(cache) else {
                    return self.choose(cache, agent, counters);
                };
                self.state = State::Cooling(id, 0);
            }
            State::Emptying(id) => return self.empty(cache, id, agent, counters),
            State::Sweeping(id, bucket) => return self.sweep(cache, id, bucket, agent),
            // INV-GRACE-1: whoever might still read what lies there has left.
            State::Waiting(id, ticket)
                if cache.grace.passed(ticket) || canary::is(Canary::ReclaimIgnoresReaders) =>
            {
                if cache.segments.get(id).is_pinned() {
                    self.lent.push_back(id);
                    self.state = State::Idle;
                    return Progress::Busy;
                }
                self.state = State::Cooling(id, 0);
            }
            State::Waiting(..) => return Progress::Idle,
            State::Cooling(..) | State::Probing(..) => {}
        }
        if let State::Cooling(id, from) = self.state {
            self.state = match cache.heat.cool(id, from) {
                Some(next) => State::Cooling(id, next),
                None => State::Probing(id, 0),
            };
        }
        if let Some(id) = self.probe(cache) {
            free(cache, tails, agent, id);
            counters.segments_reclaimed.add(1);
            cache.space_wanted.store(false, Ordering::Release);
        }
        Progress::Busy
    }

    /// Looks at some of the memory of an emptied segment, which is suspect if that cannot be read. Some: there is no more
    /// to look at. One of fills that is suspect only now may be above the dirty tail, and so above the key tail: the next
    /// start takes it for one in use, and it is looked at again before it is freed.
    fn probe<P: Pmem>(&mut self, cache: &Cache<P>) -> Option<SegId> {
        let State::Probing(id, off) = self.state else {
            return None;
        };
        let (segment, geometry) = (cache.segments.get(id), &cache.geometry);
        let end = if segment.is_suspect() {
            off
        } else if segment.is_inherited() {
            geometry.segment_size_bytes()
        } else {
            u64::from(KEYS_START_BYTES)
        };
        let len_bytes = (end - off).min(PROBE_BYTES);
        let start = geometry.segment_off(id).plus(off);
        if len_bytes > 0 && cache.pmem.probe(start, len_bytes).is_err() {
            cache.segments.suspect(id);
        } else if off + len_bytes < end {
            self.state = State::Probing(id, off + len_bytes);
            return None;
        }
        self.state = State::Idle;
        Some(id)
    }

    /// An emptied segment that is not lent any more. Some are looked at; the others have their turns with the next polls.
    fn take_returned<P: Pmem>(&mut self, cache: &Cache<P>) -> Option<SegId> {
        for _ in 0..self.lent.len().min(LENT_PER_POLL) {
            let id = self.lent.pop_front()?;
            if !cache.segments.get(id).is_pinned() {
                return Some(id);
            }
            self.lent.push_back(id);
        }
        None
    }

    fn choose<P: Pmem>(&mut self, cache: &Cache<P>, agent: Agent, counters: &Counters) -> Progress {
        let segments = &cache.segments;
        let lack = need(cache);
        let wanted = lack == Lack::Room;
        if !wanted {
            self.index_wait = None;
        } else if waits_for_index(cache) && !segments.has_suspects() {
            let wait = self.index_wait.get_or_insert_with(|| IndexWait::new(cache));
            if wait.poll(cache) {
                return self.leave_to_writeback(cache.dirty_tail());
            }
        }
        self.is_needed = lack != Lack::Nothing;
        if !(self.is_needed || segments.has_suspects()) {
            self.lack = Lack::Nothing;
            self.look.give_up();
            return Progress::Idle;
        }
        let can_look = self.census.is_ready() || self.look.is_under_way();
        if !(can_look || wanted || segments.has_suspects()) {
            // What is in use is known in a moment.
            self.lack = Lack::Nothing;
            return Progress::Busy;
        }
        let wish = Wish {
            is_needed: self.is_needed,
            is_urgent: wanted,
        };
        let dirty_tail = cache.dirty_tail();
        let looked = self.look.poll(cache, &self.census, wish);
        self.lack = match looked {
            // As far as is known.
            Looked::InPart if self.lack != Lack::Nothing => lack,
            Looked::InPart | Looked::Victim(..) => Lack::Nothing,
            Looked::Nothing => lack,
        };
        let (id, plan) = match looked {
            Looked::Victim(id, plan) => (id, plan),
            Looked::InPart => return Progress::Busy,
            Looked::Nothing => {
                self.lack_tail = dirty_tail;
                if wanted {
                    seal_special_streams(cache, agent);
                }
                // An unmap has no bytes, and is dirty.
                let is_clean = dirty_tail.0 + 1 >= cache.seq_settled().0;
                if self.is_needed && is_clean {
                    // Everything is clean: a writer that waits for the index finds room now.
                    cache.space_wanted.store(false, Ordering::Release);
                }
                return Progress::Idle;
            }
        };
        let victim = segments.get(id);
        assert!(
            victim.is_on_base(dirty_tail) || canary::is(Canary::DirtySegmentReclaimed),
            "INV-SEG-5: segment {id:?} is to be reclaimed, and only {dirty_tail:?} is on the base"
        );
        victim.set_state(SegmentState::Reclaiming);
        self.walk.begin(cache, id, plan);
        counters
            .segments_compacted
            .add(u64::from(plan == Plan::Compact));
        self.census.note_victim(cache, id, plan);
        self.state = State::Emptying(id);
        Progress::Busy
    }

    /// Somebody waits, and not for a segment: what becomes clean makes room.
    fn leave_to_writeback(&mut self, dirty_tail: Seq) -> Progress {
        self.look.give_up();
        self.is_needed = false;
        (self.lack, self.lack_tail) = (Lack::Room, dirty_tail);
        Progress::Idle
    }

    /// Lets the pages of the victim leave it, some in each poll.
    fn empty<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        id: SegId,
        agent: Agent,
        counters: &Counters,
    ) -> Progress {
        self.state = match self.walk.poll(cache, agent) {
            Step::More => State::Emptying(id),
            Step::Finished => {
                if self.walk.has_forgotten(cache) {
                    self.census.note_forgotten(cache);
                }
                State::Waiting(id, cache.grace.ticket())
            }
            Step::Unreadable => {
                // So the index has to tell what lies in it. The base holds all of it.
                if cache.segments.lose_keys(id) {
                    counters.key_errors.add(1);
                }
                State::Sweeping(id, 0)
            }
        };
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
        // INV-SEG-8.
        cache.segments.get(id).note_forgotten();
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
}

/// What speaks for reclaiming.
fn need<P: Pmem>(cache: &Cache<P>) -> Lack {
    let gc_percent = cache.settings.get(Setting::GcPercent) as usize;
    if cache.space_wanted.load(Ordering::Acquire) {
        Lack::Room
    } else if cache.segments.free_count() < cache.free_segments_wanted() {
        Lack::Free
    } else if cache.segments_used() * 100 > cache.segments_in_service() * gc_percent {
        Lack::Ahead
    } else {
        Lack::Nothing
    }
}

/// Whether those who wait for room could all have a segment: then they wait for the index, which forgets what is clean when
/// they come again, and no segment is to be emptied for them.
fn waits_for_index<P: Pmem>(cache: &Cache<P>) -> bool {
    let free_count = cache.segments.free_count();
    let taken = cache.channels_that_wait() + cache.segments_kept_free();
    free_count >= cache.free_segments_wanted() && free_count >= taken
}

/// Ends the segments that are open for special purposes and hold anything, so that they can be reclaimed: requests
/// wait, and nothing else can be.
fn seal_special_streams<P: Pmem>(cache: &Cache<P>, agent: Agent) {
    for number in Special::ALL
        .into_iter()
        .filter_map(|special| cache.special_stream_at(special))
    {
        cache.try_seal(number, agent, |open| open.kset_index > 0);
    }
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
    // 1. The key tail, if something was forgotten. An older copy of one of its blocks, still intact in another
    //    segment, is dead from here on; without this a cut would bring it back.
    let last_seq: Seq = segment.last_seq();
    assert!(
        segment.state() == SegmentState::Reclaiming && segment.is_on_base(cache.dirty_tail()),
        "INV-SEG-5: segment {id:?} up to {last_seq:?} is freed, but it is {:?}, and only {:?} is on the base",
        segment.state(),
        cache.dirty_tail()
    );
    // What copies speak against was on the base when they were made: every older write of their pages was.
    let passed = last_seq.min(tails.dirty_tail);
    if must_be_passed(segment) && tails.key_tail < passed {
        tails.key_tail = passed;
        cache.persist_tails(tails, agent);
    }
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

/// Whether the key tail has to pass a segment before it is freed (INV-SEG-8).
///
/// It has to if the newest copy of a block goes with it, because an older one may lie in another segment. It has not if
/// everything that was in it is newer elsewhere: then that is durable, and tells of itself.
///
/// Nor for read fills alone. When such a one was put there, its page was not in the index. Its last write had then been
/// freed, and the key tail has passed it and everything older; or it was forgotten and is still there, as new as the
/// fill, and the key tail passes it when it is freed. What is written later is newer than the fill.
fn must_be_passed(segment: &Segment) -> bool {
    let fills_alone = matches!(segment.class(), Class::Probation | Class::Fills);
    segment.is_suspect() || (segment.has_forgotten() && !fills_alone)
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
mod tests;
