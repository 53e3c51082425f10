//! A mistake for [`Canary::BatchSplitOverTwoKsets`].

use super::batch::Batch;
use crate::canary::{self, Canary};
use crate::engine::cache::Cache;
use crate::engine::stream::OpenSegment;
use crate::media::{KsetBuilder, kset_size_bytes};
use crate::pmem::Pmem;
use crate::units::{Epoch, Seq};
use std::sync::atomic::Ordering;

impl Batch {
    /// Commits the first half of the keys of a batch in a kset of their own, under its number. Returns the
    /// number for the kset with all of them.
    pub(super) fn commit_half<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        open: &mut OpenSegment,
        (seq, epoch): (Seq, Epoch),
    ) -> Seq {
        let half = self.kset.key_count() / 2;
        let needed = kset_size_bytes(half) + kset_size_bytes(self.kset.key_count());
        let room = open.room_bytes();
        let planted = canary::is(Canary::BatchSplitOverTwoKsets);
        if !planted || half == 0 || needed > room as usize {
            return seq;
        }
        let mut kset = KsetBuilder::default();
        let shift = cache.geometry.block_shift();
        let keys = self.kset.keys(shift).take(half);
        keys.for_each(|key| kset.push(&key, shift));
        let off = cache.geometry.segment_off(open.id);
        let bytes = kset.finish(open.kset_seed, open.kset_index, seq, epoch, self.proof);
        let agent = self.agent;
        cache
            .pmem
            .store(agent, off.plus(u64::from(open.key_off)), bytes);
        drop(cache.pmem.fence(agent));
        open.key_off += bytes.len() as u32;
        open.kset_index += 1;
        let next = Seq(cache.seq_next.fetch_add(1, Ordering::SeqCst));
        cache.segments.get(open.id).note_seq(next);
        next
    }
}
