//! A batch with more keys than there is room for is written in parts.
//!
//! Most batches end before. One that goes to where damaged blocks are overwritten, or to where a batch was that a crash cut
//! in half, or a salvage, must not end anywhere else, and may come to take the whole log. Room for its keys is the same, so
//! they are cut into parts by address (`overlay/narrow.rs`):
//!
//! 1. the first part goes through the log as any batch does, checks all that it meets, and finds the end of the batch; what
//!    it keeps of the keys are those of the lowest addresses;
//! 2. while a part is written, the log is read again from the dirty tail to that end, and the next part is made of what is
//!    behind the one before. It checks the payloads that it is going to write once more;
//! 3. behind the last part the base is flushed once, and then the tail moves. Before that the batch is half done, with its
//!    end on the media (INV-WB-2), and a crash has all of it taken again.
//!
//! If a part finds damage, or keys lost, that the first one has not met, or the flush fails, the batch is given up and taken
//! again from the beginning, as far as its end at least.
//!
//! Each part of a salvage has to go through the index for itself, and so ends later than the one before, at E1 to En: what
//! it does not find in the index any more it finds in the log (`salvage.rs`). Behind the last part, the base holds of each
//! block the newest version below one of these ends. What is missing there for a state as of En is in the log between E1 and
//! En, and nowhere else: all that lies in X is older. So the batch *catches up* with itself: what the log has from E1 to En is
//! laid over all blocks, in parts again if need be. Where a part ended later, it writes the same once more.

use super::log::Limits;
use super::next::Next;
use super::salvage::Stage;
use super::{Context, Writeback};
use crate::canary::{self, Canary};
use crate::engine::Progress;
use crate::pmem::Pmem;
use crate::units::{Lba, Now, Seq};

/// What a batch has to write behind the part that is being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Behind {
    Nothing,
    /// Another part, from this block on.
    Part(Lba),
    /// What the log has behind the end of the first part of a salvage.
    CatchUp,
}

/// Of a part behind the first one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    /// Where the batch ends. A salvage says where each part does.
    last_seq: Option<Seq>,
    /// It catches up with what the parts of a salvage have taken, be it anything or not.
    pub(super) catches_up: bool,
}

impl Part {
    /// How far the log may be read that has settled so far.
    pub(super) fn at_most(self, settled: Seq) -> Seq {
        self.last_seq
            .map_or(settled, |last_seq| settled.min(Seq(last_seq.0 + 1)))
    }
}

impl Next {
    /// Begins with a part of the batch that was gathered. What limits it is where the batch ends.
    fn begin_part(&mut self, part: Part, from: Lba, first_stage: Stage, now: Now) {
        let limits = Limits {
            settled: Seq(0),
            reach: Seq(u64::MAX),
            ..self.limits
        };
        if part.last_seq.is_some() {
            self.begin(limits, now);
            self.wait_for_look();
        } else {
            self.begin_salvage(limits, first_stage, now);
        }
        self.part = Some(part);
        self.lost.begin_part();
        self.overlay.begin_at(from);
    }

    /// The log has no more for a part that catches up: it goes to its end, whatever was there.
    pub(super) fn end_catching_up(&mut self) {
        if let Some(part) = self.part.filter(|part| part.catches_up) {
            self.taken.last_seq = part.last_seq;
        }
    }

    /// Whether there is damage in what is going to be written. A part behind the first has nothing to do with the rest.
    pub(super) fn is_damaged_inside(&mut self) -> bool {
        if self.part.is_some() {
            self.lost.keep_within(|lba| self.overlay.holds(lba));
        }
        !self.lost.is_empty() || self.limits.settled < self.lost.upto()
    }
}

impl Writeback {
    /// A part of the batch that is being written is the next one that is.
    pub(super) fn take_over_part(&mut self, last_seq: Seq) {
        let batch = &mut self.batch;
        batch.has_parts = true;
        batch.reach = batch.reach.max(last_seq);
        if batch.behind == Behind::CatchUp {
            batch.dirty_bytes += self.next.taken.dirty_bytes;
            batch.last_seq = last_seq;
        }
        batch.begin_part();
    }

    /// What was gathered is being written: the next part of it is gathered meanwhile, or, if there is none, the next batch.
    pub(super) fn gather_behind(&mut self, now: Now) {
        let batch = &mut self.batch;
        let catches_up = self.next.part.is_some_and(|part| part.catches_up);
        let ends_early = batch.last_seq < batch.reach;
        if canary::is(Canary::SalvageEndsWithLastPart) {
            batch.last_seq = batch.reach;
        }
        batch.behind = match batch.overlay.next_part() {
            Some(_) if canary::is(Canary::PartLeftOut) => Behind::Nothing,
            Some(from) => Behind::Part(from),
            None if ends_early && !canary::is(Canary::SalvageEndsWithLastPart) => Behind::CatchUp,
            None => Behind::Nothing,
        };
        let (from, part) = match batch.behind {
            Behind::Nothing => {
                self.next.clear();
                return;
            }
            Behind::Part(from) => {
                let is_salvage = self.next.stage != Stage::Ordinary;
                let last_seq = (!is_salvage).then_some(batch.last_seq);
                let part = Part {
                    last_seq,
                    catches_up,
                };
                (from, part)
            }
            Behind::CatchUp => {
                batch.after = batch.last_seq;
                let part = Part {
                    last_seq: Some(batch.reach),
                    catches_up: true,
                };
                (Lba(0), part)
            }
        };
        self.next
            .begin_part(part, from, self.salvage.first_stage, now);
        self.log.restart_after(self.batch.after);
    }

    /// A part is on the base, and there is another one.
    pub(super) fn go_on_with_parts<P: Pmem>(
        &mut self,
        context: &mut Context<'_, P>,
        now: Now,
    ) -> Progress {
        let is_whole = || self.next.taken.last_seq >= Some(self.batch.last_seq);
        if self.next.part.is_none() || self.next.is_damaged() {
            self.start_over();
        } else if !self.next.is_ready() {
            return Progress::Idle;
        } else if is_whole() {
            self.begin(context, now);
        } else {
            // Keys that the first part had are lost.
            self.start_over();
        }
        Progress::Busy
    }
}

#[cfg(test)]
mod tests;
