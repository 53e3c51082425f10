//! Lent reads: a hit that lies in one piece is not copied; the caller is told its place in the mapping, and
//! may look there until it gives the loan back.
//!
//! Nothing is ever overwritten in place, so a lent place only has to be kept from being reclaimed: its
//! segment is pinned ([`super::segments::Segment::pin`]).

use super::cache::Cache;
use super::channel::{COMPLETIONS_PER_POLL, Core};
use super::config::CacheMode;
use super::io::{LoanId, Outbox, Status};
use super::read_path::Blocked;
use crate::canary::{self, Canary};
use crate::index::BlockMap;
use crate::media::Place;
use crate::pmem::{MemSlice, Pmem};
use crate::units::{Lba, SegId};

/// Loans of a channel at once; reads beyond that are answered with [`Status::NotLent`].
pub const LOAN_COUNT_MAX: usize = 1024;

/// A piece of the mapping that somebody looks at.
#[derive(Debug)]
pub(super) struct Loan {
    segment: SegId,
    slice: MemSlice,
}

impl Core {
    pub(super) fn poll_lends<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        for _ in 0..self.lends.len() {
            if out.completions.len() >= COMPLETIONS_PER_POLL {
                return;
            }
            let Some(id) = self.lends.pop_front() else {
                return;
            };
            let Some(request) = self.requests.get(id) else {
                continue;
            };
            let (lba, len_blocks) = (request.io.lba, request.io.len_blocks);
            if cache.settings.cache_mode() == CacheMode::Passthrough {
                // The base is to be asked.
                self.complete(cache, id, Status::NotLent, out);
                continue;
            }
            let status = match find_piece(cache, lba, len_blocks) {
                Err(_) => {
                    self.lends.push_back(id);
                    continue;
                }
                Ok(None) => Status::NotLent,
                Ok(Some(place)) => self.lend(cache, lba, place, len_blocks),
            };
            self.complete(cache, id, status, out);
        }
    }

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
        cache.segments.get(segment).pin();
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
        let Some(crcs) = cache.verifying() else {
            return true;
        };
        let mut done_blocks = 0;
        while done_blocks < len_blocks && !canary::is(Canary::LoanNotVerified) {
            let (lba, place) = (Lba(lba.0 + done_blocks), Place(place.0 + done_blocks));
            let (id, key) = cache.key_at(crcs, lba, place);
            if self.check_hit(cache, id, &key).is_err() {
                return false;
            }
            done_blocks += key.end().0 - lba.0;
        }
        true
    }

    pub(super) fn loan(&self, id: LoanId) -> Option<MemSlice> {
        self.loans.get(id.0).map(|loan| loan.slice)
    }

    pub(super) fn give_back<P>(&mut self, cache: &Cache<P>, id: LoanId) {
        if let Some(loan) = self.loans.remove(id.0) {
            cache.segments.get(loan.segment).unpin();
        }
    }

    /// The channel goes: so do its loans.
    pub(super) fn give_back_all<P>(&mut self, cache: &Cache<P>) {
        for id in self.loans.ids() {
            self.give_back(cache, LoanId(id));
        }
    }
}

/// Where all of the extent lies in one readable piece; `None`: nowhere.
fn find_piece<P: Pmem>(
    cache: &Cache<P>,
    lba: Lba,
    len_blocks: u64,
) -> Result<Option<Place>, Blocked> {
    let in_page = u64::from(cache.geometry.blocks_per_page()) - 1;
    let end = lba.0 + len_blocks;
    let mut first = None;
    let mut at = lba.0;
    while at < end {
        let page = cache.geometry.page_of(Lba(at));
        let found = cache.index.lookup(cache.index.locate(page));
        let found = found.ok_or(Blocked::Busy)?;
        let page_end = ((at | in_page) + 1).min(end);
        for block in at..page_end {
            // A page has 8 blocks at most.
            let BlockMap::Mapped(place) = found.map.block((block & in_page) as u32) else {
                return Ok(None);
            };
            let Place(start) = *first.get_or_insert(place);
            if place.0 != start + (block - lba.0) {
                return Ok(None);
            }
        }
        at = page_end;
    }
    // The end of one segment and the start of the next are neighbours; what lies there is not: every
    // segment starts with its info. So the piece is in one segment.
    Ok(first.filter(|place| is_readable(cache, *place, len_blocks)))
}

/// Whether the kernel has not taken any page of the piece away. An error that nobody has met yet is not found.
fn is_readable<P: Pmem>(cache: &Cache<P>, place: Place, len_blocks: u64) -> bool {
    let (off, len_bytes) = (
        cache.geometry.place_off(place),
        cache.geometry.bytes(len_blocks),
    );
    cache.pmem.probe(off, len_bytes).is_ok() && !cache.damage.covers(place, len_blocks)
}
