//! Which segment is reclaimed next, and what becomes of what is left in it.
//!
//! Reclaiming is by age, because the log is in the order in which data came, with three exceptions that make the hit
//! ratio that of a good policy instead of a queue's (docs/adr/0011-eviction.md has the figures):
//!
//! - a segment that was overwritten for the most part is compacted: nothing is forgotten for the room that it gives;
//! - read fills on probation may have a thirtieth of the segments, and are reclaimed above that, oldest first;
//! - of what was read again in its segment's time copies are kept. Their segments, those of other read fills and those of
//!   the log compete: the oldest of each is looked at, and the one is reclaimed in which least was read again since it
//!   began, or the oldest if nothing was. So who gets how much of the cache is nobody's setting.

use super::census::{Census, Count};
use crate::canary::{self, Canary};
use crate::engine::{Cache, Class, SegmentState, Special};
use crate::pmem::Pmem;
use crate::units::SegId;

/// A segment of which less than this part is in use, in percent, is compacted. Each copied byte then gives three sevenths
/// of a byte of room, at the least. On a trace of a virtual machine 60 and 80 gave lower hit ratios
/// (docs/adr/0011-eviction.md).
const SPARSE_PERCENT: u64 = 70;
/// The same where [`Census::has_use_for_copies`] says no: each then gives as much room as it takes.
const SPARSE_UNREAD_PERCENT: u64 = 50;
/// Of the segments in service, so many percent may hold read fills on probation.
const PROBATION_PERCENT: usize = 3;
/// They may have so many segments in any case: one that is open, one that is sealed.
const PROBATION_SEGMENTS_MIN: usize = 2;
/// So many candidates of each kind a look keeps.
const KEPT: usize = if cfg!(feature = "sim") { 3 } else { 16 };

/// What becomes of what is left in a victim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// All is forgotten.
    Evict,
    /// What was read again is copied, the rest is forgotten.
    KeepHot,
    /// All is copied.
    Compact,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    /// There are too few free segments, or too many that are used. If not, only suspect segments are taken.
    pub(super) is_needed: bool,
    /// Requests wait for room.
    pub(super) is_urgent: bool,
}

/// A sealed segment of which the base holds everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Candidate {
    id: SegId,
    class: Class,
    born: u64,
    is_lent: bool,
    is_suspect: bool,
    count: Option<Count>,
}

impl Candidate {
    /// The segment as it is now; `None`: it is none.
    fn of<P: Pmem>(cache: &Cache<P>, census: &Census, id: SegId) -> Option<Self> {
        let segment = cache.segments.get(id);
        // The state comes first: nobody but the background takes a segment out of this one, and what is read behind
        // it stays as it is, but for loans and what is found of its memory.
        if segment.state() != SegmentState::Sealed {
            return None;
        }
        // What is suspect is to be behind the tail also for the next recovery.
        let (is_suspect, dirty_tail) = (segment.is_suspect(), cache.dirty_tail());
        let is_clean = if is_suspect {
            segment.last_seq() <= dirty_tail
        } else {
            segment.is_on_base(dirty_tail)
        };
        let is_candidate = is_clean || canary::is(Canary::DirtySegmentReclaimed);
        is_candidate.then(|| Self {
            id,
            class: segment.class(),
            born: segment.born(),
            is_lent: segment.is_pinned(),
            is_suspect,
            count: census.get(cache, id),
        })
    }
}

/// Of what there are candidates.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Suspect,
    /// Those of which the least is in use.
    Sparse,
    /// The oldest of each class.
    Log,
    Probation,
    Kept,
    Fills,
    /// What is lent may take long until it is free.
    Lent,
}

const KINDS: usize = Kind::Lent as usize + 1;

/// The first candidates of a kind, in the order in which they are reclaimed.
#[derive(Debug)]
struct Few(Vec<(Rank, Candidate)>);

/// The lowest comes first, and of equals the segment with the lowest number. What is lent comes behind the rest.
type Rank = (bool, u64);

impl Few {
    fn first(&self) -> Option<Candidate> {
        self.0.first().map(|(_, candidate)| *candidate)
    }

    fn add(&mut self, rank: Rank, candidate: Candidate) {
        let order = |(rank, each): &(Rank, Candidate)| (*rank, each.id);
        let new = (rank, candidate);
        let is_full = self.0.len() == KEPT;
        if is_full && self.0.last().is_some_and(|last| order(last) < order(&new)) {
            return;
        }
        // One that was put here anew for what has changed may be here already.
        if let Err(at) = self.0.binary_search_by_key(&order(&new), order) {
            self.0.truncate(KEPT - 1);
            self.0.insert(at, new);
        }
    }
}

/// What a look at all segments finds.
#[derive(Debug)]
pub(super) struct Found {
    few: [Few; KINDS],
    on_probation: usize,
    /// So many candidates may still be taken from the lists or turn out to be none: up to then the first of each list is
    /// the first of all. At 0 nothing is known any more.
    left: usize,
}

impl Default for Found {
    /// Nothing was looked at.
    fn default() -> Self {
        Self {
            few: std::array::from_fn(|_| Few(Vec::with_capacity(KEPT))),
            on_probation: 0,
            left: 0,
        }
    }
}

impl Found {
    /// A look begins.
    pub(super) fn begin(&mut self) {
        self.forget();
        self.left = KEPT;
    }

    /// There is nothing to be chosen from before the next look.
    pub(super) fn forget(&mut self) {
        self.few.iter_mut().for_each(|few| few.0.clear());
        self.on_probation = 0;
        self.left = 0;
    }

    /// Whether there may be others before those that are left.
    pub(super) fn is_used_up(&self) -> bool {
        self.left == 0
    }

    /// The look comes to a segment.
    pub(super) fn look_at<P: Pmem>(&mut self, cache: &Cache<P>, census: &Census, id: SegId) {
        let segment = cache.segments.get(id);
        let in_use = matches!(segment.state(), SegmentState::Open | SegmentState::Sealed);
        self.on_probation += usize::from(in_use && segment.class() == Class::Probation);
        if let Some(candidate) = Candidate::of(cache, census, id) {
            self.add(candidate);
        }
    }

    /// The next victim that is not lent; `None`: there is none, or [`Found::is_used_up`]. What was looked at some time ago is
    /// looked at again: it may have been lent since, or reclaimed, or its memory may be lost.
    pub(super) fn choose<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        census: &Census,
        wish: Wish,
    ) -> Option<(SegId, Plan)> {
        // Loans come and go while a look is under way: they use up nothing.
        for kind in 0..Kind::Lent as usize {
            while let Some(first) = self.few[kind].first()
                && self.left > 0
            {
                let now = Candidate::of(cache, census, first.id);
                if now == Some(first) {
                    break;
                }
                self.left -= 1;
                self.few[kind].0.remove(0);
                if let Some(now) = now {
                    self.add(now);
                }
            }
        }
        if self.is_used_up() {
            return None;
        }
        let (victim, plan) = self.by_policy(cache, census, wish)?;
        self.on_probation -= usize::from(victim.class == Class::Probation).min(self.on_probation);
        Some((victim.id, plan))
    }

    fn by_policy<P: Pmem>(
        &self,
        cache: &Cache<P>,
        census: &Census,
        wish: Wish,
    ) -> Option<(Candidate, Plan)> {
        // What is suspect comes first, needed or not.
        if let Some(suspect) = self.first(Kind::Suspect)
            && (wish.is_urgent || !suspect.is_lent)
        {
            return Some((suspect, Plan::Evict));
        }
        if !wish.is_needed {
            return None;
        }
        let can_copy = can_copy(cache, wish);
        if let Some(sparse) = self.first(Kind::Sparse)
            && let Some(count) = sparse.count
        {
            let live_blocks = census.live_blocks_max(cache, count);
            if can_copy && is_sparse(cache, census, live_blocks) {
                // Of nothing at all there is nothing to copy.
                return Some((sparse, Plan::Compact));
            }
            if live_blocks == 0 {
                return Some((sparse, Plan::Evict));
            }
        }
        let most = cache.segments_in_service() * PROBATION_PERCENT / 100;
        let much_on_probation = self.on_probation >= most.max(PROBATION_SEGMENTS_MIN);
        let on_probation = self.first(Kind::Probation);
        let victim = (on_probation.filter(|_| much_on_probation))
            .or_else(|| self.coldest(cache.segments.clock()))
            .or(on_probation)?;
        Some((victim, oldest_plan(cache, wish)))
    }

    /// The next victim of those that were lent, where there is no other: one that has come back, or any if requests wait for
    /// room. Once it is out of the index, nothing of it is lent anew.
    pub(super) fn choose_lent<P: Pmem>(
        &self,
        cache: &Cache<P>,
        census: &Census,
        wish: Wish,
    ) -> Option<(SegId, Plan)> {
        let now = |(_, then): &(Rank, Candidate)| Candidate::of(cache, census, then.id);
        let lent = self.few[Kind::Lent as usize].0.iter().filter_map(now);
        let victim = lent
            .filter(|now| wish.is_needed && (wish.is_urgent || !now.is_lent))
            .min_by_key(|now| now.is_lent)?;
        Some((victim.id, oldest_plan(cache, wish)))
    }

    /// Whether any of those that were lent has been reclaimed since.
    pub(super) fn has_reclaimed_lent<P: Pmem>(&self, cache: &Cache<P>, census: &Census) -> bool {
        let mut lent = self.few[Kind::Lent as usize].0.iter();
        lent.any(|(_, then)| Candidate::of(cache, census, then.id).is_none())
    }

    /// Whether a loan keeps anything from being a victim.
    pub(super) fn has_lent(&self) -> bool {
        let suspect = self.first(Kind::Suspect);
        self.first(Kind::Lent).is_some() || suspect.is_some_and(|suspect| suspect.is_lent)
    }

    /// Of the oldest of each class, but for probation, the one in which least was read again; or the oldest of several.
    fn coldest(&self, clock: u64) -> Option<Candidate> {
        let oldest = [Kind::Log, Kind::Fills, Kind::Kept].map(|kind| self.first(kind));
        let oldest = oldest.into_iter().flatten();
        oldest.min_by_key(|each| (warmth(each, clock), each.born))
    }

    fn first(&self, kind: Kind) -> Option<Candidate> {
        self.few[kind as usize].first()
    }

    fn add(&mut self, candidate: Candidate) {
        let age = (candidate.is_lent, candidate.born);
        let kind = match candidate.class {
            _ if candidate.is_suspect => Kind::Suspect,
            _ if candidate.is_lent => Kind::Lent,
            Class::Log => Kind::Log,
            Class::Probation => Kind::Probation,
            Class::Kept => Kind::Kept,
            Class::Fills => Kind::Fills,
        };
        self.few[kind as usize].add(age, candidate);
        if let Some(Count { live_blocks, .. }) = candidate.count
            && !(candidate.is_suspect || candidate.is_lent)
        {
            self.few[Kind::Sparse as usize].add((false, live_blocks), candidate);
        }
    }
}

/// Whether anything of a victim may be copied: whoever waits for room does not wait for that.
fn can_copy<P: Pmem>(cache: &Cache<P>, wish: Wish) -> bool {
    !wish.is_urgent && cache.special_stream(Special::Kept).is_some()
}

/// What becomes of one that is reclaimed for its age.
fn oldest_plan<P: Pmem>(cache: &Cache<P>, wish: Wish) -> Plan {
    if can_copy(cache, wish) {
        Plan::KeepHot
    } else {
        Plan::Evict
    }
}

/// What was read again of it for each segment that was opened since it began.
fn warmth(candidate: &Candidate, clock: u64) -> u64 {
    let age = clock.saturating_sub(candidate.born) + 1;
    let heat = candidate.count.map_or(0, |count| count.heat);
    (heat << 16) / age
}

fn is_sparse<P: Pmem>(cache: &Cache<P>, census: &Census, live_blocks: u64) -> bool {
    let percent = if census.has_use_for_copies(cache) {
        SPARSE_PERCENT
    } else {
        SPARSE_UNREAD_PERCENT
    };
    cache.geometry.bytes(live_blocks) * 100 < cache.geometry.segment_room_bytes() * percent
}

/// What of a victim may be copied because it was read again, in bytes: so much less than all that there is room for
/// more when the victim is free.
pub(super) fn hot_bytes_max<P: Pmem>(cache: &Cache<P>) -> u64 {
    cache.geometry.segment_room_bytes() * SPARSE_PERCENT / 100
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(class: Class, born: u64, heat: u64) -> Candidate {
        Candidate {
            id: SegId(born as u32),
            class,
            born,
            is_lent: false,
            is_suspect: false,
            count: Some(Count {
                live_blocks: 100,
                heat,
            }),
        }
    }

    /// Which class loses, of the oldest segments of log, fills and kept data, at a clock of 100.
    fn coldest(oldest: [(u64, u64); 3]) -> Class {
        let mut found = Found::default();
        for (class, (born, heat)) in [Class::Log, Class::Fills, Class::Kept]
            .into_iter()
            .zip(oldest)
        {
            found.add(candidate(class, born, heat));
            // The younger ones do not matter.
            found.add(candidate(class, 90, 0));
        }
        found.coldest(100).expect("there are three").class
    }

    #[test]
    fn the_class_loses_of_which_the_oldest_was_read_again_least_in_its_time() {
        assert_eq!(coldest([(1, 10), (51, 10), (81, 10)]), Class::Log);
        assert_eq!(coldest([(1, 60), (51, 20), (81, 10)]), Class::Fills);
        assert_eq!(coldest([(1, 60), (51, 40), (81, 1)]), Class::Kept);
        assert_eq!(coldest([(51, 0), (1, 1), (61, 1)]), Class::Log);
    }

    #[test]
    fn where_nothing_was_read_again_the_oldest_loses() {
        assert_eq!(coldest([(30, 0), (20, 0), (10, 0)]), Class::Kept);
        assert_eq!(coldest([(30, 0), (10, 0), (20, 0)]), Class::Fills);
        assert_eq!(coldest([(10, 0), (20, 0), (30, 0)]), Class::Log);
    }
}
