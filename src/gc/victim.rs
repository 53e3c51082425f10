//! Which segment is reclaimed next, and what becomes of what is left in it.
//!
//! Reclaiming is by age, because the log is in the order in which data came, with three exceptions that make the hit
//! ratio that of a good policy instead of a queue's (docs/adr/0011-eviction.md has the figures):
//!
//! - a segment that was overwritten for the most part is compacted: nothing is forgotten for the room that it gives;
//! - read fills on probation may have a twentieth of the segments, and are reclaimed above that, oldest first;
//! - of what was read again in its segment's time copies are kept. Their segments and those of the log compete: the
//!   oldest of either is looked at, and the one is reclaimed in which less was read again since it began.

use super::census::{Census, Count};
use crate::canary::{self, Canary};
use crate::engine::{Cache, Class, SegmentState, Special};
use crate::media::KEYS_START_BYTES;
use crate::pmem::Pmem;
use crate::units::SegId;

/// A segment of which less than this part is in use, in percent, is compacted. Each copied byte then gives three sevenths
/// of a byte of room, at the least. On a trace of a virtual machine 60 and 80 gave lower hit ratios
/// (docs/adr/0011-eviction.md).
const SPARSE_PERCENT: u64 = 70;
/// Of the segments in service, so many percent may hold read fills on probation.
const PROBATION_PERCENT: usize = 5;
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
#[derive(Clone, Copy, Debug)]
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

/// The next victim; `None`: nothing can be reclaimed now.
pub(super) fn choose<P: Pmem>(
    cache: &Cache<P>,
    census: &Census,
    wish: Wish,
) -> Option<(SegId, Plan)> {
    // What is lent comes last: it may take long until it is free. But if requests wait for room it has to do: once
    // it is out of the index, nothing of it is lent anew. What is suspect comes first, needed or not.
    if let Some(suspect) = oldest(cache, census, |candidate| {
        candidate.is_suspect && (wish.is_urgent || !candidate.is_lent)
    }) {
        return Some((suspect.id, Plan::Evict));
    }
    if !wish.is_needed {
        return None;
    }
    if let Some(found) = by_policy(cache, census, wish) {
        return Some(found);
    }
    let lent = oldest(cache, census, |_| wish.is_urgent)?;
    Some((lent.id, Plan::Evict))
}

fn by_policy<P: Pmem>(cache: &Cache<P>, census: &Census, wish: Wish) -> Option<(SegId, Plan)> {
    let can_copy = !wish.is_urgent && cache.special_stream(Special::Kept).is_some();
    let keep_hot = if can_copy { Plan::KeepHot } else { Plan::Evict };
    let free = |candidate: &Candidate| !candidate.is_lent;
    if let Some((live_blocks, sparse)) = sparsest(cache, census) {
        if live_blocks == 0 {
            return Some((sparse.id, Plan::Evict));
        }
        if can_copy && is_sparse(cache, live_blocks) {
            return Some((sparse.id, Plan::Compact));
        }
    }
    let of = |class| oldest(cache, census, |each| free(each) && each.class == class);
    let probation = of(Class::Probation);
    if probation.is_some() && has_much_on_probation(cache) {
        return probation.map(|victim| (victim.id, keep_hot));
    }
    let victim = match (of(Class::Log), of(Class::Kept)) {
        (Some(log), Some(kept)) => {
            let clock = cache.segments.clock();
            if warmth(&kept, clock) <= warmth(&log, clock) {
                Some(kept)
            } else {
                Some(log)
            }
        }
        (log, kept) => log.or(probation).or(kept),
    };
    victim.map(|victim| (victim.id, keep_hot))
}

/// What was read again of it for each segment that was opened since it began.
fn warmth(candidate: &Candidate, clock: u64) -> u64 {
    let age = clock.saturating_sub(candidate.born) + 1;
    let heat = candidate.count.map_or(0, |count| count.heat);
    (heat << 16) / age
}

/// Segments that can be reclaimed.
fn candidates<P: Pmem>(cache: &Cache<P>, census: &Census) -> impl Iterator<Item = Candidate> {
    let (segments, dirty_tail) = (&cache.segments, cache.dirty_tail());
    segments.ids().filter_map(move |id| {
        let segment = segments.get(id);
        let is_clean = segment.is_on_base(dirty_tail) || canary::is(Canary::DirtySegmentReclaimed);
        (segment.state() == SegmentState::Sealed && is_clean).then(|| Candidate {
            id,
            class: segment.class(),
            born: segment.born(),
            is_lent: segment.is_pinned(),
            is_suspect: segment.is_suspect(),
            count: census.get(cache, id),
        })
    })
}

fn oldest<P: Pmem>(
    cache: &Cache<P>,
    census: &Census,
    wanted: impl Fn(&Candidate) -> bool,
) -> Option<Candidate> {
    candidates(cache, census)
        .filter(|candidate| wanted(candidate))
        .min_by_key(|candidate| (candidate.is_lent, candidate.born, candidate.id))
}

/// The one of which the least is in use, and how much.
fn sparsest<P: Pmem>(cache: &Cache<P>, census: &Census) -> Option<(u64, Candidate)> {
    candidates(cache, census)
        .filter(|candidate| !candidate.is_lent)
        .filter_map(|candidate| Some((candidate.count?.live_blocks, candidate)))
        .min_by_key(|(live_blocks, candidate)| (*live_blocks, candidate.id))
}

fn is_sparse<P: Pmem>(cache: &Cache<P>, live_blocks: u64) -> bool {
    let room_bytes = cache.geometry.segment_size_bytes() - u64::from(KEYS_START_BYTES);
    cache.geometry.bytes(live_blocks) * 100 < room_bytes * SPARSE_PERCENT
}

fn has_much_on_probation<P: Pmem>(cache: &Cache<P>) -> bool {
    let on_probation = |id: &SegId| {
        let segment = cache.segments.get(*id);
        segment.class() == Class::Probation
            && matches!(segment.state(), SegmentState::Open | SegmentState::Sealed)
    };
    let count = cache.segments.ids().filter(on_probation).count();
    let most = cache.segments_in_service() * PROBATION_PERCENT / 100;
    count >= most.max(PROBATION_SEGMENTS_MIN)
}
