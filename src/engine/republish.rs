//! What a write costs in the index, for the benches.

use super::Cache;
use crate::index::{BlockMap, Change, Claim, LineStock, OWNER_MAX, PageMap, Target};
use crate::pmem::Pmem;
use crate::units::Page;

/// Pages of a batch, at most.
const BATCH_MAX: usize = 32;
/// What pages are claimed with: no channel has it.
const OWNER: u16 = OWNER_MAX;

impl<P: Pmem> Cache<P> {
    /// Does to the index what a batch of writes to these pages does: at most 32, which must be cached and are
    /// published where they lie already. While nothing else runs.
    pub fn republish(&self, pages: &[Page]) {
        let located: [_; BATCH_MAX] = std::array::from_fn(|number| {
            let at = self.index.locate(pages.get(number).copied()?);
            self.index.prefetch(at);
            Some(at)
        });
        let claimed = located.map(|at| {
            let at = at?;
            let map = self.index.lookup(at)?.map;
            let PageMap::Whole(BlockMap::Mapped(place)) = map else {
                return None;
            };
            let is_new = self.index.claim(at, OWNER) == Claim::Taken;
            let slot = self.index.reserve(at).ok()?;
            Some((at, slot, place, is_new))
        });
        // Whole pages take no lines, and none of these had one.
        let mut stock = LineStock::new(0);
        for (_, slot, place, _) in claimed.iter().flatten() {
            let blocks = self.geometry.blocks_per_page();
            let target = Target::Mapped(*place);
            self.index.publish(*slot, 0, blocks, target, &mut stock);
        }
        for (at, _, _, is_new) in claimed.iter().flatten() {
            if *is_new {
                self.index.release(at.bucket(), OWNER, Change::Written);
            }
        }
    }
}
