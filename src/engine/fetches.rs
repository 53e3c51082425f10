//! Pages on their way from the base into the cache: a miss of one waits for it, on whatever channel, and asks the base
//! for nothing.
//!
//! A miss that is to be kept *announces* the pages of which it brings all blocks, a bit for each, and *withdraws* them
//! when it has ended, whatever has come of it. A read that misses a page announced by another one waits until that is
//! withdrawn, and is then looked up as if it had just come. A bit says nothing about data, so nothing stale can come
//! of it, and one too many costs a wait in vain. A read waits for a page once: if it is missing still, because the base
//! has failed or the fill was refused, the read asks the base, whoever else is doing so.
//!
//! Every wait ends. What is announced waits for a base read, and then for one of the next polls of its channel, which
//! publishes the fill or refuses it: a fill waits for no room, no claim, no stream and no other read (`drop_fills`). So no read
//! waits for one that waits: one that does may have base reads under way for what comes before, but these end without
//! it. A channel that goes withdraws everything, and when the cache fails nobody waits any more. And no wait for a page is
//! longer than [`AWAIT_NS_MAX`], in case one miss follows another with fills that are refused, or another core stands
//! still.

use super::cache::Cache;
use super::channel::{Core, RequestId};
use super::misses::{Miss, Misses};
use super::read_path::FILL_PAGES_MAX;
use super::rounding::Rest;
use crate::canary::{self, Canary};
use crate::index::GOLDEN;
use crate::media::Geometry;
use crate::pmem::Pmem;
use crate::sched;
use crate::units::{NS_PER_S, Now, Page};
use std::sync::atomic::{AtomicU64, Ordering};

/// So many pages in a row have their bits in one word: a miss meets two words at the most, and no two of its pages have one
/// bit.
const GROUP_PAGES: u64 = 64;
const _: () = assert!(FILL_PAGES_MAX as u64 <= GROUP_PAGES);
/// 4096 words, 32 KiB. With 1000 random reads of 4 KiB under way at once, which is much, a miss meets a bit of another
/// page in one of 260 cases, and waits in vain.
const WORD_BITS: u32 = 12;
/// After so long a read asks the base itself. That is far beyond what a base takes that is well.
const AWAIT_NS_MAX: u64 = NS_PER_S;
/// So many of the reads that wait are looked at in one poll.
const AWAITING_PER_POLL: usize = 64;

/// Some of [`GROUP_PAGES`] pages in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PageSet {
    first: u64,
    /// Bit 0 is the first.
    mask: u64,
}

impl PageSet {
    /// The pages of which all blocks lie from `start` to `end`; none behind so many as a set may have.
    fn whole(geometry: &Geometry, start: u64, end: u64) -> Self {
        let blocks_per_page = u64::from(geometry.blocks_per_page());
        let first = start.div_ceil(blocks_per_page);
        let count = (end / blocks_per_page).saturating_sub(first);
        let mask = match count {
            0 => 0,
            _ => u64::MAX >> GROUP_PAGES.saturating_sub(count),
        };
        Self { first, mask }
    }

    fn first(self) -> Option<Page> {
        let number = u64::from(self.mask.trailing_zeros());
        (self.mask != 0).then(|| Page(self.first + number))
    }

    fn with_mask(self, mask: u64) -> Self {
        Self { mask, ..self }
    }

    /// `other` begins no earlier.
    fn without(self, other: PageSet) -> Self {
        let taken = match other.first - self.first {
            ahead @ 0..GROUP_PAGES => other.mask << ahead,
            _ => 0,
        };
        self.with_mask(self.mask & !taken)
    }

    /// Those before a page, which is no earlier than the first.
    fn before(self, page: Page) -> Self {
        let mask = u64::MAX;
        let first = page.0;
        self.without(Self { first, mask })
    }

    /// The groups that it touches, and which pages of each it has.
    fn groups(self) -> [(u64, u64); 2] {
        let (group, ahead) = (self.first / GROUP_PAGES, self.first % GROUP_PAGES);
        let over = match ahead {
            0 => 0,
            _ => self.mask >> (GROUP_PAGES - ahead),
        };
        [(group, self.mask << ahead), (group + 1, over)]
    }

    /// What [`PageSet::groups`] has made two words of.
    fn of_groups(self, [low, high]: [u64; 2]) -> Self {
        let ahead = self.first % GROUP_PAGES;
        let over = match ahead {
            0 => 0,
            _ => high << (GROUP_PAGES - ahead),
        };
        self.with_mask(low >> ahead | over)
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Fetches {
    words: Box<[AtomicU64]>,
}

impl Fetches {
    pub(crate) fn new() -> Self {
        Self {
            words: (0..1 << WORD_BITS).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn word(&self, group: u64) -> &AtomicU64 {
        // Groups in a row have words of their own.
        let hash = group.wrapping_mul(GOLDEN) >> (u64::BITS - WORD_BITS);
        // Fewer bits than the table has.
        &self.words[hash as usize]
    }

    /// Returns those of the pages that were announced already: they are not the caller's.
    fn announce(&self, pages: PageSet) -> PageSet {
        let others = pages.groups().map(|(group, bits)| {
            if bits == 0 {
                return 0;
            }
            sched::point();
            self.word(group).fetch_or(bits, Ordering::Acquire) & bits
        });
        pages.of_groups(others)
    }

    /// What the caller has announced. Whoever finds it withdrawn sees what was published before.
    fn withdraw(&self, pages: PageSet) {
        if canary::is(Canary::FetchNotWithdrawn) {
            return;
        }
        for (group, bits) in pages.groups() {
            if bits != 0 {
                sched::point();
                let before = self.word(group).fetch_and(!bits, Ordering::Release);
                debug_assert_eq!(
                    before & bits,
                    bits,
                    "INV-READ-5: a page is withdrawn by the miss that has announced it"
                );
            }
        }
    }

    fn is_announced(&self, page: Page) -> bool {
        sched::point();
        let word = self.word(page.0 / GROUP_PAGES).load(Ordering::Acquire);
        word >> (page.0 % GROUP_PAGES) & 1 != 0
    }

    /// Checks that no page is announced. For tests; while no read is under way.
    ///
    /// # Panics
    /// One is.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn check_at_rest(&self) {
        for (number, word) in self.words.iter().enumerate() {
            let word = word.load(Ordering::Relaxed);
            assert!(
                word == 0,
                "INV-READ-5: pages {word:#x} of word {number} are announced, and nobody fetches them"
            );
        }
    }
}

/// A read that waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Awaiting {
    pub(super) id: RequestId,
    since: Now,
}

/// Whether a miss waits for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// It ends before the first page that another one fetches.
    Left,
    /// It goes on over such pages: it has waited, or would wait in vain.
    Gone,
}

impl Miss {
    /// Announces the pages of which the miss, with its rest, brings all blocks, and cuts it before the first that another
    /// one has announced. Some: it begins with that one.
    pub(super) fn announce<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        rest: &mut Rest,
        patience: Patience,
    ) -> Option<Page> {
        let (geometry, fetches) = (&cache.geometry, &cache.fetches);
        let (start, end) = rest.added_to(self);
        let pages = PageSet::whole(geometry, start, end);
        let others = fetches.announce(pages);
        self.announced = pages.without(others);
        let page = others.first().filter(|_| patience == Patience::Left)?;
        let kept = self.announced.before(page);
        fetches.withdraw(self.announced.without(kept));
        self.announced = kept;
        let page_start = geometry.page_start(page).0;
        if page_start <= self.lba.0 {
            return Some(page);
        }
        self.len_blocks = page_start - self.lba.0;
        *rest = rest.without_tail();
        None
    }

    /// INV-READ-5: nobody waits for it any more. What it brings is published, or is not going to be.
    pub(super) fn withdraw<P>(&mut self, cache: &Cache<P>) {
        cache.fetches.withdraw(std::mem::take(&mut self.announced));
    }
}

impl Misses {
    /// The channel goes; base reads that are under way are not heard of any more.
    pub(super) fn withdraw_all<P>(&mut self, cache: &Cache<P>) {
        for op in self.table.ids() {
            if let Some(miss) = self.table.get_mut(op) {
                miss.withdraw(cache);
            }
        }
    }
}

impl Core {
    /// Reads whose page has arrived, or is not going to, are looked up again.
    pub(super) fn poll_awaiting<P>(&mut self, cache: &Cache<P>) {
        for _ in 0..self.awaiting.len().min(AWAITING_PER_POLL) {
            let Some(read) = self.awaiting.pop_front() else {
                return;
            };
            let in_time = self.now.since_ns(read.since) < AWAIT_NS_MAX;
            let page = self.awaited_page(read.id).filter(|_| in_time);
            if page.is_some_and(|page| cache.fetches.is_announced(page)) {
                self.awaiting.push_back(read);
            } else {
                self.reads.push_back(read.id);
            }
        }
    }

    fn awaited_page(&self, id: RequestId) -> Option<Page> {
        self.requests.get(id)?.read.as_ref()?.awaited()
    }

    /// A read stands at a page that another miss is fetching.
    pub(super) fn await_fetch(&mut self, id: RequestId) {
        let since = self.now;
        self.awaiting.push_back(Awaiting { id, since });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(first: u64, count: u64) -> PageSet {
        let mask = u64::MAX >> (GROUP_PAGES - count);
        PageSet { first, mask }
    }

    #[test]
    fn every_page_of_a_miss_has_a_bit_of_its_own() {
        for first in 0..200 {
            for count in 1..=GROUP_PAGES {
                let pages = set(first, count);
                let [(low, low_bits), (high, high_bits)] = pages.groups();
                let bits = u64::from(low_bits.count_ones() + high_bits.count_ones());
                assert_eq!(bits, count);
                // Even if both groups have one word.
                assert_eq!(low_bits & high_bits, 0);
                let fetches = Fetches::new();
                assert_eq!(fetches.announce(pages).mask, 0);
                for page in 0..300 {
                    let inside = (first..first + count).contains(&page);
                    assert_eq!(fetches.is_announced(Page(page)), inside);
                    let (group, bit) = (page / GROUP_PAGES, 1 << (page % GROUP_PAGES));
                    let of_low = group == low && low_bits & bit != 0;
                    assert_eq!(of_low || (group == high && high_bits & bit != 0), inside);
                }
                assert_eq!(pages.of_groups([low_bits, high_bits]), pages);
                fetches.withdraw(pages);
                fetches.check_at_rest();
            }
        }
    }

    #[test]
    fn who_comes_second_learns_which_pages_are_not_free() {
        let fetches = Fetches::new();
        let first = set(60, 10);
        assert_eq!(fetches.announce(first).mask, 0);
        let second = set(50, 30);
        let others = fetches.announce(second);
        assert_eq!(others, second.with_mask(0x3ff << 10));
        assert_eq!(others.first(), Some(Page(60)));
        let own = second.without(others);
        assert_eq!(own.before(Page(60)), set(50, 10));
        fetches.withdraw(own);
        assert!((60..70).all(|page| fetches.is_announced(Page(page))));
        fetches.withdraw(first);
        fetches.check_at_rest();
    }

    #[test]
    fn no_two_threads_fetch_one_page() {
        const PAGES: u64 = 200;
        let fetches = Fetches::new();
        let fetched: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
        let work = |thread: u64| {
            for round in 0..5000 {
                let number = thread + 4 * round;
                let pages = set(number * 37 % (PAGES - 64), 1 + number * 11 % 64);
                let own = pages.without(fetches.announce(pages));
                let fetched_by = |page: u64| &fetched[(own.first + page) as usize];
                let pages = || (0..64).filter(|page| own.mask >> page & 1 != 0);
                for page in pages() {
                    assert_eq!(fetched_by(page).swap(thread, Ordering::Relaxed), 0);
                }
                for page in pages() {
                    assert_eq!(fetched_by(page).swap(0, Ordering::Relaxed), thread);
                }
                fetches.withdraw(own);
            }
        };
        let work = &work;
        std::thread::scope(|scope| {
            for thread in 1..=4 {
                scope.spawn(move || work(thread));
            }
        });
        fetches.check_at_rest();
    }

    #[test]
    #[should_panic(expected = "INV-READ-5")]
    fn a_page_is_withdrawn_once() {
        let fetches = Fetches::new();
        fetches.announce(set(7, 3));
        fetches.withdraw(set(7, 3));
        fetches.withdraw(set(8, 1));
    }

    #[test]
    #[should_panic(expected = "INV-READ-5")]
    fn a_page_that_is_left_announced_is_noticed() {
        let fetches = Fetches::new();
        fetches.announce(set(7, 1));
        fetches.check_at_rest();
    }

    #[test]
    fn groups_in_a_row_have_words_of_their_own() {
        let fetches = Fetches::new();
        let place = |group| std::ptr::from_ref(fetches.word(group));
        for group in 0..10_000 {
            assert!((1..64).all(|ahead| place(group) != place(group + ahead)));
        }
    }

    #[test]
    fn only_whole_pages_are_in_a_set() {
        let geometry = crate::engine::invariant_tests::new_cache().geometry;
        let whole = |start, end| PageSet::whole(&geometry, start, end);
        assert_eq!(whole(8, 24), set(1, 2));
        assert_eq!(whole(9, 31), set(2, 1));
        assert_eq!(whole(9, 23).mask, 0);
        assert_eq!(whole(9, 11).mask, 0);
        assert_eq!(whole(0, 64 * 8), set(0, 64));
    }
}
