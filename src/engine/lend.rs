//! Lent reads: a hit that lies in one piece is not copied; the caller is told its place in the mapping, and
//! may look there until it gives the loan back.
//!
//! Nothing is ever overwritten in place, so a lent place only has to be kept from being reclaimed: its
//! segment is pinned (`pins.rs`).

use super::cache::Cache;
use super::channel::{Core, READ_BYTES_PER_POLL, REQUESTS_PER_POLL, Request, RequestId};
use super::config::CacheMode;
use super::io::{HostIo, LoanId, Outbox, Status};
use super::segments::Segment;
use crate::canary::{self, Canary};
use crate::index::{BlockMap, GROUP_PAGES, SlotRef};
use crate::media::Place;
use crate::pmem::{MemSlice, Pmem};
use crate::units::{Lba, SegId};

/// Loans of a channel at once; reads beyond that are answered with [`Status::NotLent`]. See also `pins.rs`.
pub const LOAN_COUNT_MAX: usize = 1024;

/// So many are looked up before the first of their places is looked at: as many lines as a core waits for at once.
const LENDS_AT_ONCE: usize = 16;

/// Where a read lies that need not be copied.
#[derive(Clone, Copy, Debug, Default)]
enum Found {
    /// All of it from here on, in one segment.
    Piece(Place),
    #[default]
    Nowhere,
    /// Somebody is at a page of it.
    Busy,
}

/// A read that need not be copied, on its way.
#[derive(Clone, Copy, Debug, Default)]
struct Lend {
    id: RequestId,
    lba: Lba,
    len_blocks: u64,
    found: Found,
}

/// A piece of the mapping that somebody looks at.
#[derive(Debug)]
pub(super) struct Loan {
    segment: SegId,
    slice: MemSlice,
}

impl Core {
    /// Answers reads that need not be copied, [`LENDS_AT_ONCE`] in a turn: all are looked up, and their segments pinned; then
    /// all places are looked at, so that these wait for memory together; then all are answered. A pin is a locked
    /// instruction, which would wait for the looks if it came behind them.
    pub(super) fn poll_lends<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        if self.lends.is_empty() {
            return;
        }
        let share = cache.segments_to_lend(self.id);
        let mut left = self.lends.len().min(REQUESTS_PER_POLL);
        let mut bytes = 0;
        while left > 0 && bytes < READ_BYTES_PER_POLL {
            let mut lends = [Lend::default(); LENDS_AT_ONCE];
            let mut filled = 0;
            while left > 0
                && filled < LENDS_AT_ONCE
                && bytes < READ_BYTES_PER_POLL
                && let Some(id) = self.lends.pop_front()
            {
                left -= 1;
                if let Some(Request { io, .. }) = self.requests.get(id) {
                    let mut lend = Lend::look_up(cache, id, io);
                    let is_in_share = self.loans.used_count() + filled < share;
                    if !is_in_share && !self.may_keep(cache, &lend, &lends[..filled], share) {
                        lend.found = Found::Nowhere;
                    }
                    lends[filled] = lend;
                    filled += 1;
                    bytes += cache.geometry.bytes(io.len_blocks);
                }
            }
            let lends = &mut lends[..filled];
            lends.iter().for_each(|lend| lend.pin(cache));
            lends.iter_mut().for_each(|lend| lend.look_at(cache));
            lends.iter().for_each(|lend| self.answer(cache, lend, out));
        }
        cache.loan_counts.note(self.id, self.loans.used_count());
    }

    /// Whether a read is in a segment that other loans of the channel keep, be it those that come with it, or these keep
    /// fewer segments than its share. Segments are told apart by a few bits of their numbers: there may be some more of them.
    #[cold]
    fn may_keep<P: Pmem>(
        &self,
        cache: &Cache<P>,
        lend: &Lend,
        others: &[Lend],
        share: usize,
    ) -> bool {
        let mut kept = [0_u64; 64];
        let bit = |SegId(id): SegId| ((id / 64 % 64) as usize, 1 << (id % 64));
        let loans = self.loans.ids().filter_map(|loan| self.loans.get(loan));
        let others = others.iter().filter_map(|other| other.segment_id(cache));
        for id in loans.map(|loan| loan.segment).chain(others) {
            let (word, bit) = bit(id);
            kept[word] |= bit;
        }
        lend.segment_id(cache).is_none_or(|id| {
            let (word, bit) = bit(id);
            let count: u32 = kept.iter().map(|word| word.count_ones()).sum();
            kept[word] & bit != 0 || (count as usize) < share
        })
    }

    fn answer<P: Pmem>(&mut self, cache: &Cache<P>, lend: &Lend, out: &mut Outbox) {
        let status = match lend.found {
            Found::Busy => return self.lends.push_back(lend.id),
            Found::Piece(place) => {
                let status = self.lend(cache, lend.lba, place, lend.len_blocks);
                if status == Status::NotLent {
                    lend.unpin(cache);
                }
                status
            }
            Found::Nowhere => Status::NotLent,
        };
        self.complete(cache, lend.id, status, out);
    }

    /// Lends a piece of a segment that is pinned.
    fn lend<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        lba: Lba,
        place: Place,
        len_blocks: u64,
    ) -> Status {
        let len_bytes = cache.geometry.bytes(len_blocks);
        let off = cache.geometry.place_off(place);
        let segment = cache.geometry.segment_of(place);
        if !self.is_verified(cache, lba, place, len_blocks) {
            // Who reads it instead counts that.
            return Status::NotLent;
        }
        let slice = cache.pmem.slice(off, len_bytes);
        let Some(loan) = self.loans.insert(Loan { segment, slice }) else {
            return Status::NotLent;
        };
        cache.note_hit(place, len_bytes >> cache.geometry.block_shift());
        let counters = self.counters(cache);
        counters.lent_reads.add(1);
        counters.read_hits.add(1);
        counters.read_bytes.add(len_bytes);
        counters.hit_bytes.add(len_bytes);
        counters
            .read_pages
            .add(cache.geometry.pages_touched(lba, len_blocks));
        Status::Lent(LoanId(loan))
    }

    /// Whether all of a piece is what it should be, if reads are to be verified (INV-READ-6).
    fn is_verified<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        lba: Lba,
        place: Place,
        len_blocks: u64,
    ) -> bool {
        cache.verifying().is_none_or(|crcs| {
            let mut payloads = cache.payloads(crcs, lba, place, len_blocks);
            payloads.all(|(id, key)| self.check_hit(cache, id, &key).is_ok())
                || canary::is(Canary::LoanNotVerified)
        })
    }

    pub(super) fn loan(&self, id: LoanId) -> Option<MemSlice> {
        self.loans.get(id.0).map(|loan| loan.slice)
    }

    pub(super) fn give_back<P>(&mut self, cache: &Cache<P>, id: LoanId) {
        if let Some(loan) = self.loans.remove(id.0) {
            cache.segments.get(loan.segment).unpin();
            cache.loan_counts.note(self.id, self.loans.used_count());
        }
    }

    /// The channel goes: so do its loans.
    pub(super) fn give_back_all<P>(&mut self, cache: &Cache<P>) {
        for id in self.loans.ids() {
            self.give_back(cache, LoanId(id));
        }
    }
}

impl Lend {
    /// Where the extent of a request lies.
    fn look_up<P: Pmem>(cache: &Cache<P>, id: RequestId, io: &HostIo) -> Self {
        let found = if cache.settings.cache_mode() == CacheMode::Passthrough {
            // The base is to be asked.
            Found::Nowhere
        } else {
            find_piece(cache, io.lba, io.len_blocks)
        };
        Self {
            id,
            lba: io.lba,
            len_blocks: io.len_blocks,
            found,
        }
    }

    /// Keeps what was found from being reclaimed, before the grace period ends in which it was found.
    fn pin<P: Pmem>(&self, cache: &Cache<P>) {
        if let Some(segment) = self.segment(cache) {
            segment.pin();
        }
    }

    fn unpin<P: Pmem>(&self, cache: &Cache<P>) {
        if let Some(segment) = self.segment(cache) {
            segment.unpin();
        }
    }

    /// In which it was found.
    fn segment_id<P: Pmem>(&self, cache: &Cache<P>) -> Option<SegId> {
        match self.found {
            Found::Piece(place) => Some(cache.geometry.segment_of(place)),
            Found::Nowhere | Found::Busy => None,
        }
    }

    fn segment<'a, P: Pmem>(&self, cache: &'a Cache<P>) -> Option<&'a Segment> {
        self.segment_id(cache).map(|id| cache.segments.get(id))
    }

    /// Whether the kernel has not taken any page of the piece away. An error that nobody has met yet is not found; but where
    /// somebody has met one nothing is lent, since it ends the process if who has the loan does.
    #[inline]
    fn look_at<P: Pmem>(&mut self, cache: &Cache<P>) {
        let Found::Piece(place) = self.found else {
            return;
        };
        let off = cache.geometry.place_off(place);
        let len_bytes = cache.geometry.bytes(self.len_blocks);
        if self.segment(cache).is_some_and(Segment::is_suspect)
            || cache.pmem.probe(off, len_bytes).is_err()
            || cache.damage.covers(place, self.len_blocks)
        {
            self.unpin(cache);
            self.found = Found::Nowhere;
        }
    }
}

/// Where all of the extent lies in one piece.
fn find_piece<P: Pmem>(cache: &Cache<P>, lba: Lba, len_blocks: u64) -> Found {
    let (index, geometry) = (&cache.index, &cache.geometry);
    let page_blocks = u64::from(geometry.blocks_per_page());
    let group_blocks = page_blocks * GROUP_PAGES;
    let end = lba.0 + len_blocks;
    let mut first = None;
    let mut at = lba.0;
    while at < end {
        let slot = index.locate(geometry.page_of(Lba(at)));
        if at & (group_blocks - 1) == 0
            && end - at >= group_blocks
            && let Some(place) = group_in_a_row(cache, slot)
        {
            let Place(start) = *first.get_or_insert(place);
            if place.0 != start + (at - lba.0) {
                return Found::Nowhere;
            }
            at += group_blocks;
            continue;
        }
        // Not moved: what a split page says is large.
        let found = index.lookup(slot);
        let Some(found) = &found else {
            return Found::Busy;
        };
        let page_end = ((at | (page_blocks - 1)) + 1).min(end);
        for block in at..page_end {
            // A page has 8 blocks at most.
            let BlockMap::Mapped(place) = found.map.block((block & (page_blocks - 1)) as u32)
            else {
                return Found::Nowhere;
            };
            let Place(start) = *first.get_or_insert(place);
            if place.0 != start + (block - lba.0) {
                return Found::Nowhere;
            }
        }
        at = page_end;
    }
    // The end of one segment and the start of the next are neighbours; what lies there is not: every
    // segment starts with its info. So the piece is in one segment.
    let Some(place) = first else {
        return Found::Nowhere;
    };
    cache.heat.prefetch(place);
    Found::Piece(place)
}

/// Where the pages of a group lie, of which this is the first, if they lie in one piece, as far as one look tells.
#[inline(never)]
fn group_in_a_row<P: Pmem>(cache: &Cache<P>, first: SlotRef) -> Option<Place> {
    let group = cache.index.lookup_group(first);
    let Some(BlockMap::Mapped(start)) = group[0] else {
        return None;
    };
    let places = (start.0..).step_by(cache.geometry.blocks_per_page() as usize);
    let expected = places.map(|place| Some(BlockMap::Mapped(Place(place))));
    let is_in_a_row = group.into_iter().eq(expected.take(group.len()));
    is_in_a_row.then_some(start)
}
