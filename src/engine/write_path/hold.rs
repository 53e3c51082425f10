//! What a batch holds of the index: claims of buckets, slots of pages, and lines for pages that it may split.

use super::batch::{Batch, Refusal};
use super::extent::{PageRange, pages};
use crate::canary::{self, Canary};
use crate::engine::cache::Cache;
use crate::index::{Change, Claim, EarlierParts, GROUP_PAGES, IndexFull, SlotRef};
use crate::pmem::Pmem;
use crate::units::{Lba, Page};

/// How much a batch held before an extent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    pub(super) claims: usize,
    slots: usize,
    lines: usize,
    key_count: usize,
    payload_bytes: u64,
}

impl Batch {
    pub(super) fn mark(&self) -> Mark {
        Mark {
            claims: self.claims.len(),
            slots: self.slots.len(),
            lines: self.lines.spare_count(),
            key_count: self.key_count,
            payload_bytes: self.payload_bytes,
        }
    }

    /// Takes what an extent needs of the index, or nothing.
    #[inline(always)]
    pub(super) fn hold_pages<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        lba: Lba,
        len_blocks: u64,
    ) -> Result<(), Refusal> {
        let mark = self.mark();
        let pages = pages(cache, lba, len_blocks);
        let held = match pages.only() {
            Some(page) => self.hold_page(cache, page),
            None => self.hold_groups(cache, pages),
        };
        if let Err(refusal) = held {
            self.roll_back(cache, mark);
            return Err(refusal);
        }
        let in_page = u64::from(cache.geometry.blocks_per_page()) - 1;
        if (lba.0 | len_blocks) & in_page != 0 {
            return self.hold_lines(cache, mark, lba, len_blocks);
        }
        Ok(())
    }

    #[inline(always)]
    fn hold_page<P: Pmem>(&mut self, cache: &Cache<P>, page: Page) -> Result<(), Refusal> {
        let at = cache.index.locate(page);
        self.claim(cache, at)?;
        self.hold_slot(cache, at)
    }

    /// Pages of a group are claimed by one of them, and their slots found in one look.
    #[inline(never)]
    fn hold_groups<P: Pmem>(&mut self, cache: &Cache<P>, pages: PageRange) -> Result<(), Refusal> {
        for group in pages.groups() {
            let first = cache.index.locate(Page(group.start & !(GROUP_PAGES - 1)));
            self.claim(cache, first)?;
            let slots = cache.index.slots_of_group(first);
            if let [Some(a), Some(b), Some(c), Some(d)] = slots
                && group.end - group.start == GROUP_PAGES
            {
                // Whether there is room is asked once.
                self.slots.extend_from_slice(&[a, b, c, d]);
                continue;
            }
            for page in group {
                let member = page & (GROUP_PAGES - 1);
                match slots[member as usize] {
                    Some(slot) => self.slots.push(slot),
                    None => self.hold_slot(cache, first.later(member))?,
                }
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn claim<P: Pmem>(&mut self, cache: &Cache<P>, at: SlotRef) -> Result<(), Refusal> {
        match cache.index.claim(at, self.owner()) {
            Claim::Taken => self.claims.push(at.bucket()),
            Claim::Held => {}
            Claim::Busy if canary::is(Canary::ClaimsIgnored) => {}
            Claim::Busy => return Err(Refusal::Busy),
        }
        Ok(())
    }

    /// A slot for a page that is claimed.
    #[inline(always)]
    fn hold_slot<P: Pmem>(&mut self, cache: &Cache<P>, at: SlotRef) -> Result<(), Refusal> {
        let (index, owner) = (&cache.index, self.owner());
        let reserved = index.reserve(at).or_else(|_| {
            let is_clean = |place| cache.is_clean(place);
            let is_hot = |place| cache.is_hot(place);
            index.make_room(at, owner, is_clean, is_hot, |place| {
                cache.forget_if_clean(place)
            });
            index.reserve(at)
        });
        let slot = reserved.map_err(|IndexFull| Refusal::NoRoom)?;
        self.slots.push(slot);
        Ok(())
    }

    /// Lines for the pages of which the extent is a part.
    #[inline(never)]
    fn hold_lines<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        mark: Mark,
        lba: Lba,
        len_blocks: u64,
    ) -> Result<(), Refusal> {
        let (index, geometry) = (&cache.index, &cache.geometry);
        let per_page = geometry.blocks_per_page();
        let pieces = geometry.page_pieces(lba, len_blocks);
        for ((lba, len_blocks), slot) in pieces.zip(&self.slots[mark.slots..]) {
            if len_blocks == per_page {
                continue;
            }
            let page = geometry.page_of(lba);
            // A bucket that was claimed before may be that of a part of this page.
            let earlier = if self.claims[mark.claims..].contains(&index.locate(page).bucket()) {
                EarlierParts::No
            } else {
                EarlierParts::Maybe
            };
            let first = (lba.0 - geometry.page_start(page).0) as u32;
            let needed = index.needs_line(*slot, first, len_blocks, earlier);
            if needed && !index.stock_line(&mut self.lines) {
                // There are as many as slots: other batches have what they may not need.
                self.roll_back(cache, mark);
                return Err(Refusal::Busy);
            }
        }
        Ok(())
    }

    /// Gives back what was taken since.
    pub(super) fn roll_back<P: Pmem>(&mut self, cache: &Cache<P>, mark: Mark) {
        let owner = self.owner();
        (self.key_count, self.payload_bytes) = (mark.key_count, mark.payload_bytes);
        cache.index.cut_stock(&mut self.lines, mark.lines);
        for slot in self.slots.drain(mark.slots..) {
            cache.index.unreserve(slot);
        }
        for bucket in self.claims.drain(mark.claims..) {
            cache.index.release(bucket, owner, Change::Moved);
        }
    }
}
