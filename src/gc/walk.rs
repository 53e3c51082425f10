//! Going through the keys of a victim: each page that still lies in it is copied or forgotten.

use super::victim::{self, Plan};
use crate::canary::{self, Canary};
use crate::engine::{
    Cache, Class, Copier, CopyEnd, Depth, Flaw, KsetCursor, Segment, Special, count_flaw,
};
use crate::index::BlockMap;
use crate::media::{KSET_KEYS_MAX, Key, KsetReader, Place};
use crate::pmem::Pmem;
use crate::units::{Agent, Generation, Lba, Page, SegId};
use std::sync::atomic::Ordering;

/// Pages that one poll looks up, at most.
const PAGES_PER_POLL: u32 = 64;

/// How often the walk of a victim goes back, at most, because somebody was at a page that is to be copied.
const RETURNS_MAX: u32 = 64;

/// Where the walk is.
#[derive(Clone, Copy, Debug)]
struct At {
    /// The kset whose keys were read last; before the first it is that one.
    kset: KsetCursor,
    /// The one behind it.
    next: KsetCursor,
    /// The next key of those that were read, and the next page of it.
    key_at: usize,
    page_at: u64,
}

/// How a poll of the walk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There is more.
    More,
    /// Nothing of the victim is in the index any more.
    Finished,
    /// Its keys cannot be read.
    Unreadable,
}

/// What becomes of a part of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It does not lie in the victim any more.
    Gone,
    /// It is going to be copied.
    Copied,
    Forget,
    /// Its page changes too fast to tell.
    Unclear,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Walk {
    victim: SegId,
    plan: Plan,
    /// Something of the victim was forgotten before, or may have been.
    had_forgotten: bool,
    /// What may still be copied because it was read again, in bytes.
    hot_bytes_left: u64,
    /// How often the walk may still go back because somebody was at a page.
    returns_left: u32,
    at: At,
    reader: KsetReader,
    keys: Vec<Key>,
    copier: Copier,
}

impl Default for Walk {
    fn default() -> Self {
        Self {
            victim: SegId(0),
            plan: Plan::Evict,
            had_forgotten: false,
            hot_bytes_left: 0,
            returns_left: 0,
            at: At::start(Generation::NONE),
            reader: KsetReader::default(),
            keys: Vec::with_capacity(KSET_KEYS_MAX),
            copier: Copier::default(),
        }
    }
}

impl At {
    fn start(generation: Generation) -> Self {
        let first = KsetCursor::start(generation);
        Self {
            kset: first,
            next: first,
            key_at: 0,
            page_at: 0,
        }
    }
}

impl Walk {
    pub(super) fn begin<P: Pmem>(&mut self, cache: &Cache<P>, victim: SegId, plan: Plan) {
        // Of what was never read again nothing is to be kept.
        let is_cold = plan == Plan::KeepHot && !cache.heat.is_warm(victim);
        let plan = if is_cold { Plan::Evict } else { plan };
        (self.victim, self.plan) = (victim, plan);
        self.had_forgotten = cache.segments.get(victim).has_forgotten();
        self.at = At::start(cache.segments.get(victim).generation());
        self.hot_bytes_left = victim::hot_bytes_max(cache);
        self.returns_left = RETURNS_MAX;
        self.keys.clear();
    }

    /// Whether what was in use of the victim was forgotten because there was no room for it.
    pub(super) fn has_forgotten<P: Pmem>(&self, cache: &Cache<P>) -> bool {
        let victim = cache.segments.get(self.victim);
        // Of what is compacted little is forgotten. Probation is short for whatever comes.
        let may_tell = self.plan != Plan::Compact && victim.class() != Class::Probation;
        may_tell && !self.had_forgotten && victim.has_forgotten()
    }

    /// Deals with some pages of the victim.
    pub(super) fn poll<P: Pmem>(&mut self, cache: &Cache<P>, agent: Agent) -> Step {
        if cache.space_wanted.load(Ordering::Acquire) {
            // Whoever waits for room does not wait for copies.
            self.plan = Plan::Evict;
        }
        let (from, hot_bytes_left) = (self.at, self.hot_bytes_left);
        let step = self.go_on(cache, agent);
        if self.copier.is_empty() {
            return step;
        }
        let victim = cache.segments.get(self.victim);
        let to = match (self.plan, victim.class()) {
            (Plan::Compact, Class::Log | Class::Probation | Class::Fills) => Special::Compacted,
            _ => Special::Kept,
        };
        match self.copier.commit(cache, to, victim.born()) {
            CopyEnd::Done => return step,
            CopyEnd::Busy if self.returns_left > 0 => self.returns_left -= 1,
            // A segment has an end, and the same pages come again.
            CopyEnd::NotLookedAt => self.hot_bytes_left = hot_bytes_left,
            // Whoever writes there all the time keeps nobody from reclaiming.
            CopyEnd::Busy | CopyEnd::NoRoom => self.plan = Plan::Evict,
        }
        if canary::is(Canary::ReclaimedWithoutCopies) {
            return step;
        }
        // What was copied does not lie in the victim any more: it is passed over.
        self.return_to(cache, from)
    }

    fn return_to<P: Pmem>(&mut self, cache: &Cache<P>, at: At) -> Step {
        if at.next.kset_index == 0 {
            // Before the first kset.
            self.at = at;
            self.keys.clear();
            return Step::More;
        }
        self.at.next = at.kset;
        if !self.read_kset(cache) {
            return Step::Unreadable;
        }
        self.at = at;
        Step::More
    }

    fn go_on<P: Pmem>(&mut self, cache: &Cache<P>, agent: Agent) -> Step {
        let mut budget = PAGES_PER_POLL;
        while budget > 0 && !self.copier.is_full() {
            if self.at.key_at < self.keys.len() {
                let has_left = if self.plan == Plan::Evict {
                    self.forget_keys(cache, agent, &mut budget)
                } else {
                    self.leave_key(cache, agent, &mut budget)
                };
                if !has_left {
                    return Step::More;
                }
                continue;
            }
            if self.at.next.off >= cache.segments.get(self.victim).key_end() {
                return Step::Finished;
            }
            if !self.read_kset(cache) {
                return Step::Unreadable;
            }
            budget -= 1;
        }
        Step::More
    }

    /// Reads the next kset.
    fn read_kset<P: Pmem>(&mut self, cache: &Cache<P>) -> bool {
        let kset = self.at.next;
        let mut next = kset;
        self.keys.clear();
        let read = next.read(cache, self.victim, &mut self.reader, &mut self.keys);
        if read.is_err() {
            return false;
        }
        self.at = At {
            kset,
            next,
            key_at: 0,
            page_at: 0,
        };
        // All at once: what lies between two of them would have to wait for the translation of the first.
        self.keys.iter().for_each(|key| ask_for(cache, key));
        true
    }

    /// Forgets the pages of all keys that were read, as far as they still lie in the victim. `false`: somebody is at a
    /// page, or the budget is used up; again with the next poll.
    fn forget_keys<P: Pmem>(&mut self, cache: &Cache<P>, agent: Agent, budget: &mut u32) -> bool {
        let in_victim = in_victim(cache, self.victim);
        while let Some(key) = self.keys.get(self.at.key_at) {
            let Page(first) = cache.geometry.page_of(key.lba);
            for page in first + self.at.page_at..=last_page(cache, key) {
                if *budget == 0 || !forget_page(cache, Page(page), agent, &in_victim) {
                    self.at.page_at = page - first;
                    return false;
                }
                *budget -= 1;
            }
            self.at.key_at += 1;
            self.at.page_at = 0;
        }
        true
    }

    /// Copies or forgets the pages of one key, as far as they still lie in the victim. `false`: somebody is at the
    /// page, or the budget is used up; again with the next poll.
    fn leave_key<P: Pmem>(&mut self, cache: &Cache<P>, agent: Agent, budget: &mut u32) -> bool {
        let key = self.keys[self.at.key_at];
        let Page(first) = cache.geometry.page_of(key.lba);
        while first + self.at.page_at <= last_page(cache, &key) {
            if *budget == 0 || self.copier.is_full() {
                return false;
            }
            *budget -= 1;
            let page = Page(first + self.at.page_at);
            let done = if key.kind.has_payload() {
                match self.decide(cache, &key, page) {
                    Fate::Gone | Fate::Copied => true,
                    Fate::Forget => self.forget_part(cache, &key, page, agent),
                    Fate::Unclear => false,
                }
            } else {
                forget_page(cache, page, agent, &in_victim(cache, self.victim))
            };
            if !done {
                return false;
            }
            self.at.page_at += 1;
        }
        self.at.key_at += 1;
        self.at.page_at = 0;
        true
    }

    /// Takes what lies where the key has it out of the index; other parts of the page may be copied. `false`: somebody is
    /// at the page.
    fn forget_part<P: Pmem>(&self, cache: &Cache<P>, key: &Key, page: Page, agent: Agent) -> bool {
        let at = cache.index.locate(page);
        let first = cache.geometry.place(self.victim, key.payload_off).0;
        let places = first..first + u64::from(key.len_blocks);
        let evict = || {
            note_forgotten(cache.segments.get(self.victim));
            cache.index.evict_places(at, &places)
        };
        cache.index.with_claim(at, agent.0, evict) == Some(true)
    }

    /// What becomes of what the key has; prepares the copy of it.
    fn decide<P: Pmem>(&mut self, cache: &Cache<P>, key: &Key, page: Page) -> Fate {
        let Some(found) = cache.index.lookup(cache.index.locate(page)) else {
            return Fate::Unclear;
        };
        let first_place = cache.geometry.place(self.victim, key.payload_off).0;
        let first_block = key.lba.0 - cache.geometry.page_start(page).0;
        let is_here = |block: &u64| {
            let map = found.map.block((first_block + block) as u32);
            map == BlockMap::Mapped(Place(first_place + block))
        };
        let len = u64::from(key.len_blocks);
        let Some(start) = (0..len).find(is_here) else {
            return Fate::Gone;
        };
        let left = (start..len).filter(is_here).count() as u64;
        let heat = cache.heat.get(self.victim, Place(first_place + start));
        // What was overwritten in the middle is left in two parts. That is rare, and not worth two copies.
        let in_one_piece = (start..start + left).all(|block| is_here(&block));
        let is_wanted = heat > 0 || self.plan == Plan::Compact;
        if !is_wanted || !in_one_piece || cache.damage.covers(Place(first_place), len) {
            return Fate::Forget;
        }
        let left_bytes = cache.geometry.bytes(left);
        if self.plan == Plan::KeepHot && left_bytes > self.hot_bytes_left {
            return Fate::Forget;
        }
        let payload = self.copier.next_payload();
        if let Err(flaw) = cache.check_payload(self.victim, key, payload, Depth::Read) {
            // The base has it.
            count_flaw(cache.background_counters(), flaw, 1);
            if flaw == Flaw::Poisoned {
                cache.segments.suspect(self.victim);
            }
            return Fate::Forget;
        }
        self.hot_bytes_left = self.hot_bytes_left.saturating_sub(left_bytes);
        let skipped = cache.geometry.bytes(start) as usize;
        let left_end = skipped + left_bytes as usize;
        payload.copy_within(skipped..left_end, 0);
        // What has been kept once is to be read again before it is kept another time.
        let heat = if self.plan == Plan::Compact {
            heat
        } else {
            heat - 1
        };
        // A page has 8 blocks at most.
        let (lba, len_blocks) = (Lba(key.lba.0 + start), left as u32);
        self.copier.add(lba, len_blocks, found.version, heat);
        Fate::Copied
    }
}

/// The last page of a key.
fn last_page<P: Pmem>(cache: &Cache<P>, key: &Key) -> u64 {
    // It has a block at least.
    cache.geometry.page_of(Lba(key.end().0 - 1)).0
}

/// Takes what lies in the victim out of the index. `false`: somebody is at the page.
#[inline]
fn forget_page<P: Pmem>(
    cache: &Cache<P>,
    page: Page,
    agent: Agent,
    in_victim: &impl Fn(Place) -> bool,
) -> bool {
    cache
        .index
        .evict(cache.index.locate(page), agent.0, in_victim)
}

/// Whether a place lies in the victim, and is about to be forgotten.
fn in_victim<P: Pmem>(cache: &Cache<P>, victim: SegId) -> impl Fn(Place) -> bool {
    let (segment, places) = (
        cache.segments.get(victim),
        cache.geometry.segment_places(victim),
    );
    move |place| {
        let is_inside = places.contains(&place.0);
        if is_inside {
            note_forgotten(segment);
        }
        is_inside
    }
}

/// INV-SEG-8.
fn note_forgotten(victim: &Segment) {
    if !canary::is(Canary::ForgottenUnnoted) {
        victim.note_forgotten();
    }
}

/// Asks for what the index has of the first page of a key.
fn ask_for<P: Pmem>(cache: &Cache<P>, key: &Key) {
    let page = cache.geometry.page_of(key.lba);
    cache.index.prefetch(cache.index.locate(page));
}
