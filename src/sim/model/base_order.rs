//! What may be on the base device: the state of an ordinary disk with a volatile cache after a power cut.

use super::{Model, Time, Violation, WriteId};
use crate::sim::stamp::{Garbage, Stamp};

/// Which states are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseRule {
    /// The barriers of the application hold: if a write is there, so is everything that was acknowledged
    /// before the submission of a flush that completed before that write was submitted, and every FUA write
    /// that was acknowledged before that.
    Barriers,
    /// An exact past state: if a write is there, so is everything that was acknowledged before it was
    /// submitted, and it is there as a whole.
    Cut,
}

/// What the writes that are there say must be there too.
struct Demand {
    /// Everything acknowledged before this.
    acked_before: Time,
    /// Every FUA write acknowledged before this.
    fua_before: Time,
}

impl Model {
    /// Compares the content of the base with what may be there. Something newer of the same block is as good.
    ///
    /// # Errors
    /// It may not be.
    pub fn check_base(
        &self,
        rule: BaseRule,
        mut found: impl FnMut(u64) -> Result<Stamp, Garbage>,
    ) -> Result<(), Violation> {
        let mut visible = Vec::with_capacity(self.blocks.len());
        let mut present = vec![false; self.writes.len()];
        let mut demand = Demand {
            acked_before: Time(0),
            fua_before: Time(0),
        };
        for lba in 0..self.blocks.len() as u64 {
            let stamp = found(lba).map_err(|garbage| {
                Violation(format!("the base holds garbage in block {lba}: {garbage}"))
            })?;
            let ids = self.with_stamp(lba, stamp);
            // Zeroes of several writes: the oldest demands least.
            let Some(oldest) = ids.first() else {
                return Err(self.wrong_content("on the base, a look", lba, stamp));
            };
            let write = self.write(*oldest);
            demand.fua_before = demand.fua_before.max(write.begin);
            let acked = if rule == BaseRule::Cut {
                write.begin
            } else {
                write.flushed_before
            };
            demand.acked_before = demand.acked_before.max(acked);
            if let [only] = ids[..] {
                present[only.0 as usize] = true;
            }
            visible.push(ids);
        }
        (0..)
            .zip(&visible)
            .try_for_each(|(lba, ids)| self.check_block(rule, lba, ids, &demand, &present))
    }

    fn with_stamp(&self, lba: u64, stamp: Stamp) -> Vec<WriteId> {
        let history = self.blocks[lba as usize].history.iter().copied();
        history
            .filter(|id| self.write(*id).stamp == stamp)
            .collect()
    }

    fn check_block(
        &self,
        rule: BaseRule,
        lba: u64,
        ids: &[WriteId],
        demand: &Demand,
        present: &[bool],
    ) -> Result<(), Violation> {
        let Some(newest) = ids.last() else {
            return Ok(());
        };
        // A write that ended before a demanded one began is too old.
        let end = ids
            .iter()
            .map(|id| self.write(*id).acked)
            .max()
            .unwrap_or(Time::NEVER);
        let missing = self.blocks[lba as usize].history.iter().rev().find(|id| {
            let write = self.write(**id);
            let demanded = write.acked < demand.acked_before
                || (write.kind == super::WriteKind::Fua && write.acked < demand.fua_before)
                || (rule == BaseRule::Cut && present[id.0 as usize]);
            demanded && end < write.begin
        });
        match missing {
            None => Ok(()),
            Some(id) => Err(Violation(format!(
                "the base breaks {rule:?}: block {lba} has {}, but must have {} (the base holds writes that demand \
                 what was acknowledged before {}, FUA writes before {})",
                self.describe(*newest),
                self.describe(*id),
                demand.acked_before.0,
                demand.fua_before.0,
            ))),
        }
    }
}
