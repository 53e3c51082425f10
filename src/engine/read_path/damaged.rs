//! Hits on damage: what the base holds as well is read from there, what it does not is lost, and fails.
//!
//! A segment of which the base holds all says that of everything in it. In any other the key tells, and has to be looked
//! for ([`crate::engine::key_search`]). Where it cannot be read any more, what it named counts as dirty: better an error
//! than something older (INV-READ-7).

use super::{Blocked, Reader, Run};
use crate::canary::{self, Canary};
use crate::engine::channel::Core;
use crate::engine::damage::{Flaw, count_flaw};
use crate::engine::io::Outbox;
use crate::engine::key_search::Owner;
use crate::media::{Key, Place};
use crate::pmem::Pmem;
use crate::units::{Lba, SegId};

/// What one poll finds out about lost memory, at most: blocks that are looked at one by one, and loads that fail, each of which
/// is an exception and counts for so many blocks.
pub(super) const LOSSES_PER_POLL: u32 = 512;
const FAILED_LOAD_COST: u32 = 8;

/// What becomes of damaged data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// The base holds the same.
    OnBase,
    /// The cache held the only copy.
    Lost,
    /// It may have: no key that can be read says so.
    Unknown,
}

impl Core {
    /// Part of a run is known to be damaged, and counted as dirty when that was found: if the base holds all of the
    /// segment by now it comes from there, else it is lost.
    pub(super) fn do_without<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        (run, place): (&Run, Place),
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let is_clean = reader.cache.is_clean(place) || canary::is(Canary::DirtyDamageReadFromBase);
        let fate = if is_clean { Fate::OnBase } else { Fate::Lost };
        self.serve_judged(reader, run, fate, out)
    }

    /// Not all of the memory of a run can be read. If the segment is clean all of the run comes from the base; else what
    /// can be read is served, block by block, up to the first block that is lost: that fails the read as a whole, and is kept
    /// in mind, so that nobody looks at it again.
    #[cold]
    pub(super) fn serve_poisoned<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        (run, place): (&Run, Place),
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let cache = reader.cache;
        // Nothing is stored there again: the memory may not take it (INV-SEG-7).
        cache.segments.suspect(cache.geometry.segment_of(place));
        self.spend(FAILED_LOAD_COST)?;
        let block_bytes = cache.geometry.bytes(1);
        let mut rest = *run;
        while rest.len_blocks > 0 {
            let place = Place(place.0 + (rest.lba.0 - run.lba.0));
            if cache.is_clean(place) {
                let part = Run::mapped(rest.lba, place, rest.len_blocks);
                self.read_clean_from_base(reader, &part, out)?;
                count_flaw(self.counters(cache), Flaw::Poisoned, 1);
                return Ok(());
            }
            self.spend(1)?;
            let mut cursor = reader.state.cursor;
            let off = cache.geometry.place_off(place);
            let part = if cache.pmem.read_to(off, &mut cursor, block_bytes).is_ok() {
                let part = Run::mapped(rest.lba, place, 1);
                self.end_hit(reader, &part, place, cursor);
                part
            } else {
                self.losses_left = self.losses_left.saturating_sub(FAILED_LOAD_COST);
                let (fate, len_blocks) = self.judge(reader, &rest, place)?;
                if fate == Fate::Lost && !cache.is_overwritten(rest.lba, place) {
                    cache.damage.add(rest.lba, place);
                }
                let part = Run::mapped(rest.lba, place, len_blocks);
                let served = self.serve_judged(reader, &part, fate, out);
                if !matches!(served, Err(Blocked::Busy | Blocked::Awaiting)) {
                    count_flaw(self.counters(cache), Flaw::Poisoned, 1);
                }
                served?;
                part
            };
            rest.lba = Lba(rest.lba.0 + part.len_blocks);
            rest.len_blocks -= part.len_blocks;
        }
        Ok(())
    }

    /// Takes something off what the poll may find out about lost memory.
    fn spend(&mut self, cost: u32) -> Result<(), Blocked> {
        self.losses_left = self.losses_left.checked_sub(cost).ok_or(Blocked::Spent)?;
        Ok(())
    }

    /// Something is wrong with a payload, of which a part is asked for. If it is lost the damage is kept in mind; where no
    /// key says that it is, only if a checksum tells of it.
    #[cold]
    pub(super) fn serve_flawed<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        (id, key, flaw): (SegId, &Key, Flaw),
        (part, place): (&Run, Place),
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let cache = reader.cache;
        if flaw == Flaw::Poisoned {
            cache.segments.suspect(id);
        }
        self.spend(FAILED_LOAD_COST)?;
        let (fate, _) = self.judge(reader, part, place)?;
        let served = self.serve_judged(reader, part, fate, out);
        if matches!(served, Err(Blocked::Busy | Blocked::Awaiting)) {
            return served;
        }
        let counters = &cache.counters[usize::from(self.owner() - 1)];
        if fate == Fate::Lost || (flaw == Flaw::Checksum && fate == Fate::Unknown) {
            cache.note_damage(counters, (id, key), flaw, &mut self.payload_buf, |_, _| {});
        } else {
            count_flaw(counters, flaw, 1);
        }
        served
    }

    /// What becomes of the first block of a damaged run, and of how many more of the same key, if that can be told by now.
    fn judge<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        run: &Run,
        place: Place,
    ) -> Result<(Fate, u64), Blocked> {
        let cache = reader.cache;
        if cache.is_clean(place) {
            return Ok((Fate::OnBase, run.len_blocks));
        }
        let owner = self.find_owner(cache, reader.id, run.lba, place);
        reader.state.asks_for_key = owner.is_none();
        match owner {
            None => Err(Blocked::Busy),
            Some(Owner::Unknown) => Ok((Fate::Unknown, 1)),
            Some(Owner::Key(seq, key)) => {
                let is_clean = cache.is_key_clean(seq, key.kind)
                    || canary::is(Canary::DirtyDamageReadFromBase);
                let fate = if is_clean { Fate::OnBase } else { Fate::Lost };
                let len_blocks = key.end().0.saturating_sub(run.lba.0);
                Ok((fate, len_blocks.clamp(1, run.len_blocks)))
            }
        }
    }

    fn serve_judged<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        run: &Run,
        fate: Fate,
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        if fate == Fate::OnBase {
            return self.read_clean_from_base(reader, run, out);
        }
        Err(Blocked::Lost)
    }
}
