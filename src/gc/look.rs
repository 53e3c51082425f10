//! Looking for a victim. A look goes through all segments, some in each poll. It begins only when there can be another answer
//! than at the last one: where there is no victim it would be repeated all the time, just when writers wait.
//!
//! Where a look takes more than one poll, what it finds serves for several victims. They are those that looks of their own
//! would find, but for what has come since: segments that can be reclaimed only now, loans that have come back, and read
//! fills on probation, which may take some few segments more than their share meanwhile. Of more than a thousand
//! segments some few go before such a one.

use super::census::Census;
use super::victim::{Found, Plan, Wish};
use crate::canary::{self, Canary};
use crate::engine::Cache;
use crate::pmem::Pmem;
use crate::units::{SegId, Seq};

/// Segments that one poll looks at, at most: some 15 us. In simulations others get their turns in between, in larger caches.
const SEGMENTS_PER_POLL: u32 = if cfg!(feature = "sim") { 16 } else { 1024 };

/// A loan comes back without a word: while one is in the way, so many polls go by from look to look.
const LOAN_POLLS: u32 = 16;

/// Whatever decides what a look finds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ground {
    dirty_tail: Seq,
    /// [`crate::engine::Segments::changes`].
    changes: u64,
    /// [`crate::engine::Segments::losses`].
    losses: u64,
    /// When it was counted what is in use.
    counted_at: u64,
}

impl Ground {
    fn now<P: Pmem>(cache: &Cache<P>, census: &Census) -> Self {
        let dirty_tail = if canary::is(Canary::TailNotWatched) {
            Seq(0)
        } else {
            cache.dirty_tail()
        };
        Self {
            dirty_tail,
            changes: cache.segments.changes(),
            losses: cache.segments.losses(),
            counted_at: census.counted_at(),
        }
    }

    /// Whether what was found on this ground, and is left, still comes before whatever has come since: nothing was counted
    /// anew, and nothing has become suspect.
    fn holds(&self, now: &Self) -> bool {
        (self.losses, self.counted_at) == (now.losses, now.counted_at)
    }
}

/// How a poll has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Looked {
    /// There is more to look at.
    InPart,
    /// Nothing can be reclaimed now.
    Nothing,
    Victim(SegId, Plan),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Look {
    found: Found,
    /// The next segment to be looked at; `None`: no look is under way.
    next: Option<u32>,
    /// As it was when the last look began: what changes meanwhile is a reason for another one.
    ground: Ground,
    /// So many polls are left to the next look for loans.
    loan_polls: Option<u32>,
    #[cfg(test)]
    pub(super) begun_count: usize,
}

impl Look {
    /// Whether a look has begun and not got to its end. What is in use is not to be counted anew meanwhile.
    pub(super) fn is_under_way(&self) -> bool {
        self.next.is_some()
    }

    /// Nothing is looked for any more: a look that was under way would be out of date when it goes on.
    pub(super) fn give_up(&mut self) {
        if self.next.take().is_some() {
            self.found.forget();
        }
    }

    /// Chooses from what was found, or goes on to look.
    pub(super) fn poll<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        census: &Census,
        wish: Wish,
    ) -> Looked {
        let ground = Ground::now(cache, census);
        if self.next.is_none() {
            if self.ground.holds(&ground)
                && let Some(victim) = self.found.choose(cache, census, wish)
            {
                return self.take(cache, victim);
            }
            if !self.is_due(ground) {
                return self.take_lent(cache, census, wish);
            }
            self.begin(ground);
        }
        self.go_on(cache, census);
        if self.next.is_some() {
            return Looked::InPart;
        }
        if let Some(victim) = self.found.choose(cache, census, wish) {
            return self.take(cache, victim);
        }
        if self.found.is_used_up() {
            // All that was found has changed meanwhile.
            return Looked::InPart;
        }
        if self.ground != ground {
            // There may be something that is not lent by now: the next poll looks.
            return Looked::Nothing;
        }
        self.take_lent(cache, census, wish)
    }

    fn take<P: Pmem>(&mut self, cache: &Cache<P>, (id, plan): (SegId, Plan)) -> Looked {
        if cache.geometry.segment_count() <= SEGMENTS_PER_POLL {
            // The next victim is found as fast by a look of its own.
            self.found.forget();
        }
        Looked::Victim(id, plan)
    }

    /// Of what was found nothing is left but what was lent.
    fn take_lent<P: Pmem>(&mut self, cache: &Cache<P>, census: &Census, wish: Wish) -> Looked {
        if let Some(victim) = self.found.choose_lent(cache, census, wish) {
            return self.take(cache, victim);
        }
        if self.found.has_reclaimed_lent(cache, census) {
            // There may be more than were kept in mind.
            self.found.forget();
            return Looked::InPart;
        }
        Looked::Nothing
    }

    /// Whether a look may find what the last one has not.
    fn is_due(&mut self, ground: Ground) -> bool {
        self.ground != ground || self.found.is_used_up() || self.is_loan_due()
    }

    fn is_loan_due(&mut self) -> bool {
        if !self.found.has_lent() {
            return false;
        }
        let left = self.loan_polls.get_or_insert(LOAN_POLLS);
        *left -= 1;
        *left == 0
    }

    fn begin(&mut self, ground: Ground) {
        self.ground = ground;
        self.loan_polls = None;
        self.next = Some(0);
        self.found.begin();
        #[cfg(test)]
        {
            self.begun_count += 1;
        }
    }

    fn go_on<P: Pmem>(&mut self, cache: &Cache<P>, census: &Census) {
        let (first, count) = (self.next.unwrap_or(0), cache.geometry.segment_count());
        let end = count.min(first + SEGMENTS_PER_POLL);
        (first..end).for_each(|number| self.found.look_at(cache, census, SegId(number)));
        self.next = (end < count).then_some(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::invariant_tests::{new_cache, new_cache_of};
    use crate::engine::{SegmentState, Special};
    use crate::sim::machine::Setup;
    use crate::sim::pmem::SimPmem;
    use crate::sim::prng::Prng;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    const WISH: Wish = Wish {
        is_needed: true,
        is_urgent: false,
    };
    const URGENT: Wish = Wish {
        is_needed: true,
        is_urgent: true,
    };
    /// So many polls does a look take where it takes several.
    const POLLS: u32 = 4;

    /// A cache whose segments are not all looked at in one poll.
    fn large_cache() -> Arc<Cache<SimPmem>> {
        new_cache_of(&Setup {
            segment_count: u64::from(SEGMENTS_PER_POLL * POLLS - 1),
            ..Setup::default()
        })
    }

    /// Fills the next segment, which is clean.
    fn fill(cache: &Cache<SimPmem>, special: Option<Special>) -> SegId {
        let id = cache.segments.open_next(special).expect("some are free");
        let seq = Seq(cache.seq_next.fetch_add(1, Ordering::SeqCst));
        cache.segments.get(id).note_seq(seq);
        cache.segments.set_sealed(id);
        cache.dirty_tail.store(seq.0, Ordering::Release);
        id
    }

    fn census(cache: &Cache<SimPmem>) -> Census {
        Census::new(&cache.geometry).unwrap()
    }

    /// What is found in the end, and in how many polls.
    fn poll_on(
        look: &mut Look,
        cache: &Cache<SimPmem>,
        census: &Census,
        wish: Wish,
    ) -> (Looked, u32) {
        for count in 1..=10 * POLLS {
            let looked = look.poll(cache, census, wish);
            if looked != Looked::InPart {
                return (looked, count);
            }
        }
        panic!("a look does not end");
    }

    fn victim(looked: Looked) -> SegId {
        match looked {
            Looked::Victim(id, _) => id,
            Looked::InPart | Looked::Nothing => panic!("{looked:?}"),
        }
    }

    /// The next victim has to be this one; it is reclaimed.
    fn reclaim_next(look: &mut Look, cache: &Cache<SimPmem>, census: &Census, expected: SegId) {
        let (looked, _) = poll_on(look, cache, census, WISH);
        assert_eq!(victim(looked), expected);
        let segment = cache.segments.get(expected);
        segment.set_state(SegmentState::Reclaiming);
    }

    #[test]
    fn it_is_looked_again_only_when_something_has_changed() {
        let cache = new_cache();
        let (mut look, mut census) = (Look::default(), census(&cache));
        // Whether it is looked once, and not a second time.
        let mut begins_once = |census: &Census| {
            let before = look.begun_count;
            for _ in 0..100 {
                assert_eq!(
                    poll_on(&mut look, &cache, census, WISH),
                    (Looked::Nothing, 1)
                );
            }
            let begun_count = look.begun_count - before;
            assert!(begun_count <= 1, "{begun_count} looks");
            begun_count == 1
        };
        assert!(begins_once(&census));
        let id = cache.segments.open_next(None).expect("all are free");
        assert!(!begins_once(&census));
        cache.segments.get(id).note_seq(Seq(9));
        cache.segments.set_sealed(id);
        assert!(begins_once(&census), "one more may be reclaimed");
        cache.dirty_tail.store(7, Ordering::Release);
        assert!(begins_once(&census), "more is on the base");
        cache.segments.suspect(id);
        assert!(begins_once(&census), "one is to be reclaimed");
        cache.segments.suspect(id);
        assert!(!begins_once(&census), "it is known already");
        while census.poll(&cache) {}
        assert!(begins_once(&census), "it was counted what is in use");
    }

    #[test]
    fn it_is_looked_now_and_then_while_a_loan_is_in_the_way() {
        let cache = new_cache();
        let (mut look, census) = (Look::default(), census(&cache));
        let ids = [(); 2].map(|()| fill(&cache, None));
        ids.iter().for_each(|id| cache.segments.get(*id).pin());
        for looks in 1..4 {
            for _ in 0..LOAN_POLLS {
                assert_eq!(look.poll(&cache, &census, WISH), Looked::Nothing);
                assert_eq!(look.begun_count, looks);
            }
        }
        // The first of them has not come back.
        cache.segments.get(ids[1]).unpin();
        let mut looked = (0..=LOAN_POLLS).map(|_| look.poll(&cache, &census, WISH));
        let found = looked.find(|looked| *looked != Looked::Nothing);
        assert_eq!(found.map(victim), Some(ids[1]));
    }

    /// What was found is chosen from anew.
    #[test]
    fn who_asks_for_something_else_needs_no_other_look() {
        let cache = new_cache();
        let (mut look, census) = (Look::default(), census(&cache));
        let id = fill(&cache, None);
        let unneeded = Wish {
            is_needed: false,
            ..WISH
        };
        assert_eq!(look.poll(&cache, &census, unneeded), Looked::Nothing);
        cache.segments.get(id).pin();
        assert_eq!(look.poll(&cache, &census, WISH), Looked::Nothing);
        assert_eq!(victim(look.poll(&cache, &census, URGENT)), id);
        assert_eq!(look.begun_count, 1);
    }

    #[test]
    fn a_victim_is_found_in_one_poll_if_that_gets_to_all_segments() {
        let cache = new_cache_of(&Setup {
            segment_count: u64::from(SEGMENTS_PER_POLL),
            ..Setup::default()
        });
        let (mut look, census) = (Look::default(), census(&cache));
        for number in 1..=4 {
            let id = fill(&cache, None);
            assert_eq!(victim(look.poll(&cache, &census, WISH)), id);
            assert_eq!(look.begun_count, number);
            cache.segments.get(id).set_state(SegmentState::Reclaiming);
        }
    }

    #[test]
    fn a_look_at_many_segments_goes_on_over_several_polls() {
        let cache = large_cache();
        let (mut look, census) = (Look::default(), census(&cache));
        for number in 1..POLLS {
            assert_eq!(look.poll(&cache, &census, WISH), Looked::InPart);
            assert_eq!(look.next, Some(number * SEGMENTS_PER_POLL));
        }
        assert_eq!(look.poll(&cache, &census, WISH), Looked::Nothing);
        assert!(!look.is_under_way());
    }

    /// Of several clean segments the oldest is taken, unless `change` has something against it after it was looked at. What
    /// is then taken instead, as its number by age.
    fn chosen_after(wish: Wish, change: impl FnOnce(&Cache<SimPmem>, &[SegId])) -> Option<usize> {
        let cache = large_cache();
        let (mut look, census) = (Look::default(), census(&cache));
        let ids: Vec<SegId> = (0..4).map(|_| fill(&cache, None)).collect();
        assert_eq!(look.poll(&cache, &census, wish), Looked::InPart);
        change(&cache, &ids);
        let (looked, _) = poll_on(&mut look, &cache, &census, wish);
        let found = victim(looked);
        ids.iter().position(|id| *id == found)
    }

    #[test]
    fn what_changes_amid_a_look_is_not_taken_for_what_it_was() {
        assert_eq!(chosen_after(WISH, |_, _| ()), Some(0));
        let lend = |cache: &Cache<SimPmem>, ids: &[SegId]| cache.segments.get(ids[0]).pin();
        assert_eq!(chosen_after(WISH, lend), Some(1));
        assert_eq!(
            chosen_after(URGENT, lend),
            Some(1),
            "what is lent comes last"
        );
        let lend_all = |cache: &Cache<SimPmem>, ids: &[SegId]| {
            ids.iter().for_each(|id| cache.segments.get(*id).pin());
        };
        let lend_two = |cache: &Cache<SimPmem>, ids: &[SegId]| lend_all(cache, &ids[..2]);
        assert_eq!(chosen_after(WISH, lend_two), Some(2));
        let give_back = |cache: &Cache<SimPmem>, ids: &[SegId]| {
            cache
                .segments
                .get(ids[0])
                .set_state(SegmentState::Reclaiming);
            cache.segments.put_free(ids[0]);
        };
        assert_eq!(chosen_after(WISH, give_back), Some(1), "it is free");
        let use_again = |cache: &Cache<SimPmem>, ids: &[SegId]| {
            give_back(cache, ids);
            while cache.segments.next_opened().is_some() {}
            while cache.segments.open_next(None) != Some(ids[0]) {}
        };
        assert_eq!(chosen_after(WISH, use_again), Some(1), "it is open");
        let fill_again = |cache: &Cache<SimPmem>, ids: &[SegId]| {
            use_again(cache, ids);
            cache.segments.set_sealed(ids[0]);
        };
        assert_eq!(
            chosen_after(WISH, fill_again),
            Some(1),
            "it is the youngest"
        );
        let dirty_again = |cache: &Cache<SimPmem>, ids: &[SegId]| {
            use_again(cache, ids);
            cache.segments.get(ids[0]).note_seq(Seq(100));
            cache.segments.set_sealed(ids[0]);
        };
        assert_eq!(chosen_after(WISH, dirty_again), Some(1), "it is dirty");
        let suspect = |cache: &Cache<SimPmem>, ids: &[SegId]| {
            cache.segments.suspect(ids[0]);
        };
        assert_eq!(chosen_after(WISH, suspect), Some(0), "it comes first");
    }

    /// Read fills are clean whatever the dirty tail says. But if their memory is suspect they have to be behind it.
    #[test]
    fn fills_that_become_suspect_amid_a_look_wait_for_the_tail() {
        let cache = large_cache();
        let (mut look, census) = (Look::default(), census(&cache));
        let id = fill(&cache, Some(Special::Fills));
        cache.dirty_tail.store(0, Ordering::Release);
        assert_eq!(look.poll(&cache, &census, WISH), Looked::InPart);
        cache.segments.suspect(id);
        let (looked, _) = poll_on(&mut look, &cache, &census, WISH);
        assert_eq!(looked, Looked::Nothing);
        cache.dirty_tail.store(1, Ordering::Release);
        let (looked, _) = poll_on(&mut look, &cache, &census, WISH);
        assert_eq!(victim(looked), id);
    }

    /// One that becomes suspect when the others are found already.
    #[test]
    fn what_becomes_suspect_comes_before_all_that_was_found() {
        let cache = large_cache();
        let (mut look, census) = (Look::default(), census(&cache));
        let ids: Vec<SegId> = (0..6).map(|_| fill(&cache, None)).collect();
        reclaim_next(&mut look, &cache, &census, ids[0]);
        cache.segments.suspect(ids[5]);
        let (looked, _) = poll_on(&mut look, &cache, &census, WISH);
        assert_eq!(victim(looked), ids[5]);
    }

    /// More of them than are kept in mind, and all have come back when the look gets to its end.
    #[test]
    fn loans_that_come_back_amid_a_look_hide_nothing() {
        let cache = large_cache();
        let (mut look, census) = (Look::default(), census(&cache));
        let ids: Vec<SegId> = (0..8).map(|_| fill(&cache, None)).collect();
        ids[..7].iter().for_each(|id| cache.segments.get(*id).pin());
        assert_eq!(look.poll(&cache, &census, WISH), Looked::InPart);
        ids[..7]
            .iter()
            .for_each(|id| cache.segments.get(*id).unpin());
        let mut left: Vec<SegId> = ids.clone();
        for number in 0..ids.len() {
            let (looked, _) = poll_on(&mut look, &cache, &census, WISH);
            let id = victim(looked);
            assert!(number > 0 || id == ids[7], "it was never lent");
            assert!(left.contains(&id), "{id:?} is taken twice");
            left.retain(|other| *other != id);
            cache.segments.get(id).set_state(SegmentState::Reclaiming);
            cache.segments.put_free(id);
        }
        assert!(left.is_empty());
    }

    #[test]
    fn what_is_lent_comes_last_also_behind_what_has_come_since_the_look() {
        let cache = large_cache();
        let (mut look, census) = (Look::default(), census(&cache));
        let lent = fill(&cache, None);
        cache.segments.get(lent).pin();
        let (looked, _) = poll_on(&mut look, &cache, &census, WISH);
        assert_eq!(looked, Looked::Nothing);
        let id = fill(&cache, None);
        let (looked, _) = poll_on(&mut look, &cache, &census, URGENT);
        assert_eq!(victim(looked), id);
        cache.segments.get(id).set_state(SegmentState::Reclaiming);
        let (looked, _) = poll_on(&mut look, &cache, &census, URGENT);
        assert_eq!(victim(looked), lent);
    }

    #[test]
    fn a_loan_that_comes_back_after_a_victim_was_found_is_noticed() {
        let cache = large_cache();
        let (mut look, census) = (Look::default(), census(&cache));
        let ids: Vec<SegId> = (0..3).map(|_| fill(&cache, None)).collect();
        ids[1..].iter().for_each(|id| cache.segments.get(*id).pin());
        reclaim_next(&mut look, &cache, &census, ids[0]);
        assert_eq!(poll_on(&mut look, &cache, &census, WISH).0, Looked::Nothing);
        cache.segments.get(ids[2]).unpin();
        let mut looked = (0..LOAN_POLLS + POLLS).map(|_| look.poll(&cache, &census, WISH));
        let found = looked.find(|looked| matches!(looked, Looked::Victim(..)));
        // As any other that is not lent: what was read again of it is kept.
        assert_eq!(found, Some(Looked::Victim(ids[2], Plan::KeepHot)));
    }

    /// A look that was left alone knows nothing of what has come since.
    #[test]
    fn a_look_that_nobody_needs_any_more_begins_anew() {
        let cache = large_cache();
        let (mut look, census) = (Look::default(), census(&cache));
        assert_eq!(look.poll(&cache, &census, WISH), Looked::InPart);
        look.give_up();
        let id = fill(&cache, None);
        let (looked, count) = poll_on(&mut look, &cache, &census, WISH);
        assert_eq!((victim(looked), count), (id, POLLS));
    }

    /// What one look finds serves for several victims, and these are what looks of their own find.
    #[test]
    fn victims_of_one_look_are_those_that_new_looks_would_find() {
        for seed in 0..20 {
            let cache = large_cache();
            let mut census = census(&cache);
            let mut prng = Prng::new(seed);
            let filled = SEGMENTS_PER_POLL * POLLS - 5;
            for _ in 0..filled {
                let specials = [
                    None,
                    Some(Special::Probation),
                    Some(Special::Fills),
                    Some(Special::Kept),
                ];
                let id = fill(&cache, specials[prng.below(4) as usize]);
                let born = cache.segments.clock() + prng.below(40);
                cache.segments.get(id).inherit_age(born);
                if prng.below(8) == 0 {
                    cache.segments.get(id).pin();
                }
            }
            if seed % 2 == 0 {
                // Nothing is in use.
                while census.poll(&cache) {}
            }
            let mut kept = Look::default();
            let mut count = 0;
            loop {
                let mut new = Look::default();
                let (expected, _) = poll_on(&mut new, &cache, &census, URGENT);
                let (found, _) = poll_on(&mut kept, &cache, &census, URGENT);
                assert_eq!(found, expected, "victim {count} of seed {seed}");
                let Looked::Victim(id, _) = found else { break };
                cache.segments.get(id).set_state(SegmentState::Reclaiming);
                count += 1;
            }
            assert_eq!(count, filled);
            let looks = kept.begun_count as u32;
            assert!(looks <= filled * 2 / 3, "{looks} looks");
        }
    }
}
