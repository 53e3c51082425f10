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
/// Of the segments in service, so many percent may hold read fills on probation.
const PROBATION_PERCENT: usize = 3;
/// They may have so many segments in any case: one that is open, one that is sealed.
const PROBATION_SEGMENTS_MIN: usize = 2;

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

#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: SegId,
    class: Class,
    born: u64,
    is_lent: bool,
    is_suspect: bool,
    count: Option<Count>,
}

/// What one look at all segments finds.
#[derive(Debug, Default)]
pub(super) struct Found {
    suspect: Option<Candidate>,
    /// The one of which the least is in use.
    sparsest: Option<(u64, Candidate)>,
    log: Option<Candidate>,
    probation: Option<Candidate>,
    kept: Option<Candidate>,
    fills: Option<Candidate>,
    /// What is lent may take long until it is free.
    lent: Option<Candidate>,
    on_probation: usize,
}

fn by_policy<P: Pmem>(cache: &Cache<P>, found: &Found, wish: Wish) -> Option<(SegId, Plan)> {
    let can_copy = !wish.is_urgent && cache.special_stream(Special::Kept).is_some();
    let keep_hot = if can_copy { Plan::KeepHot } else { Plan::Evict };
    if let Some((live_blocks, sparse)) = found.sparsest {
        if can_copy && is_sparse(cache, live_blocks) {
            // Of nothing at all there is nothing to copy.
            return Some((sparse.id, Plan::Compact));
        }
        if live_blocks == 0 {
            return Some((sparse.id, Plan::Evict));
        }
    }
    let most = cache.segments_in_service() * PROBATION_PERCENT / 100;
    let much_on_probation = found.on_probation >= most.max(PROBATION_SEGMENTS_MIN);
    let surplus = found.probation.filter(|_| much_on_probation);
    let victim = surplus
        .or_else(|| found.coldest(cache.segments.clock()))
        .or(found.probation);
    victim.map(|victim| (victim.id, keep_hot))
}

/// What was read again of it for each segment that was opened since it began.
fn warmth(candidate: &Candidate, clock: u64) -> u64 {
    let age = clock.saturating_sub(candidate.born) + 1;
    let heat = candidate.count.map_or(0, |count| count.heat);
    (heat << 16) / age
}

/// Looks at all segments.
pub(super) fn look<P: Pmem>(cache: &Cache<P>, census: &Census) -> Found {
    let mut found = Found::default();
    let dirty_tail = cache.dirty_tail();
    for id in cache.segments.ids() {
        let segment = cache.segments.get(id);
        // The state comes first: nobody but the background takes a segment out of this one, and what is read behind
        // it stays as it is.
        let state = segment.state();
        let class = segment.class();
        let in_use = matches!(state, SegmentState::Open | SegmentState::Sealed);
        found.on_probation += usize::from(in_use && class == Class::Probation);
        if state != SegmentState::Sealed {
            continue;
        }
        // What is suspect is to be behind the tail also for the next recovery.
        let is_suspect = segment.is_suspect();
        let is_clean = if is_suspect {
            segment.last_seq() <= dirty_tail
        } else {
            segment.is_on_base(dirty_tail)
        };
        if !is_clean && !canary::is(Canary::DirtySegmentReclaimed) {
            continue;
        }
        found.add(Candidate {
            id,
            class,
            born: segment.born(),
            is_lent: segment.is_pinned(),
            is_suspect,
            count: census.get(cache, id),
        });
    }
    found
}

impl Found {
    /// The next victim; `None`: nothing can be reclaimed now.
    pub(super) fn choose<P: Pmem>(&self, cache: &Cache<P>, wish: Wish) -> Option<(SegId, Plan)> {
        // What is lent comes last. But if requests wait for room it has to do: once it is out of the index, nothing of it
        // is lent anew. What is suspect comes first, needed or not.
        if let Some(suspect) = self.suspect
            && (wish.is_urgent || !suspect.is_lent)
        {
            return Some((suspect.id, Plan::Evict));
        }
        if !wish.is_needed {
            return None;
        }
        if let Some(chosen) = by_policy(cache, self, wish) {
            return Some(chosen);
        }
        let lent = self.lent.filter(|_| wish.is_urgent)?;
        Some((lent.id, Plan::Evict))
    }

    /// Whether a loan keeps anything from being a victim.
    pub(super) fn has_lent(&self) -> bool {
        self.lent.is_some() || self.suspect.is_some_and(|suspect| suspect.is_lent)
    }

    /// Of the oldest of each class, but for probation, the one in which least was read again; or the oldest of several.
    fn coldest(&self, clock: u64) -> Option<Candidate> {
        let oldest = [self.log, self.fills, self.kept].into_iter().flatten();
        oldest.min_by_key(|each| (warmth(each, clock), each.born))
    }

    fn add(&mut self, candidate: Candidate) {
        if candidate.is_suspect {
            return keep_older(&mut self.suspect, candidate);
        }
        if candidate.is_lent {
            return keep_older(&mut self.lent, candidate);
        }
        if let Some(Count { live_blocks, .. }) = candidate.count
            && self
                .sparsest
                .is_none_or(|(least_blocks, _)| live_blocks < least_blocks)
        {
            self.sparsest = Some((live_blocks, candidate));
        }
        let oldest = match candidate.class {
            Class::Log => &mut self.log,
            Class::Probation => &mut self.probation,
            Class::Kept => &mut self.kept,
            Class::Fills => &mut self.fills,
        };
        keep_older(oldest, candidate);
    }
}

fn keep_older(oldest: &mut Option<Candidate>, candidate: Candidate) {
    let age = |each: &Candidate| (each.is_lent, each.born, each.id);
    if oldest
        .as_ref()
        .is_none_or(|oldest| age(&candidate) < age(oldest))
    {
        *oldest = Some(candidate);
    }
}

fn is_sparse<P: Pmem>(cache: &Cache<P>, live_blocks: u64) -> bool {
    cache.geometry.bytes(live_blocks) * 100 < cache.geometry.segment_room_bytes() * SPARSE_PERCENT
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
