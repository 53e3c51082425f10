//! Going through all pages, for what lies in segments whose keys cannot tell.

use super::{FOLD_SHIFTS, GROUP_BITS, GROUP_PAGES, Index, SlotRef};
use crate::canary::{self, Canary};
use crate::index::bucket::{BUCKET_SLOTS, BUCKET_WORDS, Meta};
use crate::index::map::PageMap;
use crate::media::Place;
use crate::sched;
use crate::units::Page;
use std::sync::atomic::Ordering;

impl Index {
    /// Calls `found` with the pages of a bucket of which anything may lie where `wanted` says, and with what is known
    /// of each of their blocks at some moment of the call; not of all at the same one. `false`: one of them changes too
    /// fast to tell, and nothing was said of any; again later.
    ///
    /// It takes no claims, so a page may be about to be published to: what is new to it then has a number that is drawn
    /// already.
    #[must_use]
    pub(crate) fn visit_bucket(
        &self,
        bucket: usize,
        wanted: impl Fn(Place) -> bool,
        mut found: impl FnMut(Page, PageMap),
    ) -> bool {
        let mut pages = [None; BUCKET_SLOTS];
        for (slot, page) in (1..BUCKET_WORDS).zip(&mut pages) {
            sched::point();
            let value = self.buckets.line(bucket)[slot].load(Ordering::Acquire);
            if !self.may_name(value, &wanted) {
                continue;
            }
            let at = SlotRef {
                bucket: self.home_of(bucket, self.layout.distance(value)),
                tag: self.layout.tag(value),
            };
            let is_claimed = || Meta(self.meta(at.bucket).load(Ordering::Acquire)).owner() != 0;
            if canary::is(Canary::ClaimedPagesNotSalvaged) && is_claimed() {
                continue;
            }
            // An entry stays where it is as long as the page has one.
            let Some(lookup) = self.lookup(at) else {
                return false;
            };
            *page = Some((self.page_at(at), lookup.map));
        }
        for (page, map) in pages.into_iter().flatten() {
            found(page, map);
        }
        true
    }

    /// The page of an entry: what [`Index::locate`] was given.
    pub(crate) fn page_at(&self, at: SlotRef) -> Page {
        let hash_shift = self.multiplier.trailing_zeros();
        // Of all hashes, which are multiples of a power of two, one alone comes to this bucket with this tag
        // (INV-INDEX-7); so that is the least that does not come to less.
        let (group_tag, member) = (at.tag >> GROUP_BITS, at.tag & (GROUP_PAGES - 1));
        let low = group_tag.wrapping_shl(self.tag_shift) << 1;
        let wide = (at.bucket as u128) << 64 | u128::from(low);
        let hash = wide.div_ceil(u128::from(self.bucket_count));
        let hash = hash.div_ceil(1 << hash_shift);
        // Undone by the inverse of an odd number: each step doubles the bits that are right, of which there are three.
        let odd = self.multiplier >> hash_shift;
        let inverse = (0..5).fold(odd, |inverse, _| {
            inverse.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(inverse)))
        });
        let mask = u64::MAX >> hash_shift;
        let mixed = (hash as u64).wrapping_mul(inverse) & mask;
        // The uppermost bits were not changed; each step makes as many more right as the lesser shift.
        let [near, far] = FOLD_SHIFTS;
        let group = (0..u64::BITS.div_ceil(near))
            .fold(mixed, |group, _| mixed ^ group >> near ^ group >> far);
        Page(group << GROUP_BITS | member)
    }
}
