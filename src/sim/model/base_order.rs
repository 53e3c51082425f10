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
#[derive(Clone, Copy, Debug)]
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
        found: impl FnMut(u64) -> Result<Stamp, Garbage>,
    ) -> Result<(), Violation> {
        self.check_base_since(rule, Time(0), found)
    }

    /// Whether the base is an exact past state of a moment at or after `since`: it holds everything that was
    /// acknowledged before.
    ///
    /// # Errors
    /// It is not.
    pub fn check_cut_since(
        &self,
        since: Time,
        found: impl FnMut(u64) -> Result<Stamp, Garbage>,
    ) -> Result<(), Violation> {
        self.check_base_since(BaseRule::Cut, since, found)
    }

    fn check_base_since(
        &self,
        rule: BaseRule,
        since: Time,
        mut found: impl FnMut(u64) -> Result<Stamp, Garbage>,
    ) -> Result<(), Violation> {
        let mut visible = Vec::with_capacity(self.blocks.len());
        let mut present = vec![false; self.writes.len()];
        let mut demand = Demand {
            acked_before: since,
            fua_before: Time(0),
        };
        for lba in 0..self.blocks.len() as u64 {
            let stamp = found(lba).map_err(|garbage| {
                Violation(format!("the base holds garbage in block {lba}: {garbage}"))
            })?;
            let ids = self.with_stamp(lba, stamp);
            if ids.is_empty() {
                return Err(self.wrong_content("on the base, a look", lba, stamp));
            }
            let write = self.oldest(&ids);
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

    /// Compares every state that a power cut could leave on the base with [`BaseRule::Barriers`]: each block has
    /// any of its `versions`, whatever the others have. A state is forbidden by two blocks of it at the most:
    /// one holds a write that demands what another one lacks. So all pairs stand for all states.
    ///
    /// # Errors
    /// One of the states may not be.
    pub fn check_base_cuts(
        &self,
        versions: impl Fn(u64) -> Vec<Result<Stamp, Garbage>>,
    ) -> Result<(), Violation> {
        let mut blocks: Vec<Vec<Vec<WriteId>>> = Vec::with_capacity(self.blocks.len());
        for lba in 0..self.blocks.len() as u64 {
            let mut ids_of = Vec::new();
            for stamp in versions(lba) {
                let stamp = stamp.map_err(|garbage| {
                    Violation(format!(
                        "a cut leaves garbage in block {lba} of the base: {garbage}"
                    ))
                })?;
                let ids = self.with_stamp(lba, stamp);
                if ids.is_empty() {
                    return Err(self.wrong_content("on the base, a look", lba, stamp));
                }
                ids_of.push(ids);
            }
            blocks.push(ids_of);
        }
        let acked = |ids: &[WriteId]| Demand {
            acked_before: self.oldest(ids).flushed_before,
            fua_before: Time(0),
        };
        let fua = |ids: &[WriteId]| Demand {
            acked_before: Time(0),
            fua_before: self.oldest(ids).begin,
        };
        self.check_pairs(&blocks, |demand| demand.acked_before, acked)?;
        self.check_pairs(&blocks, |demand| demand.fua_before, fua)
    }

    /// Holds each version of each block against the strongest demand of any other block, and its own.
    fn check_pairs(
        &self,
        blocks: &[Vec<Vec<WriteId>>],
        strength: impl Fn(&Demand) -> Time,
        demand_of: impl Fn(&[WriteId]) -> Demand,
    ) -> Result<(), Violation> {
        let strongest = |versions: &Vec<Vec<WriteId>>| {
            let demands = versions.iter().map(|ids| demand_of(ids));
            demands.max_by_key(&strength)
        };
        let mut demands: Vec<(usize, Demand)> = (0..)
            .zip(blocks)
            .filter_map(|(at, versions)| strongest(versions).map(|demand| (at, demand)))
            .collect();
        demands.sort_by_key(|(_, demand)| std::cmp::Reverse(strength(demand)));
        demands.truncate(2);
        for (at, versions) in blocks.iter().enumerate() {
            let other = demands.iter().find(|(of, _)| *of != at);
            for ids in versions {
                let own = demand_of(ids);
                for demand in std::iter::once(&own).chain(other.map(|(_, demand)| demand)) {
                    self.check_block(BaseRule::Barriers, at as u64, ids, demand, &[])?;
                }
            }
        }
        Ok(())
    }

    /// Zeroes of several writes: the oldest demands least.
    fn oldest(&self, ids: &[WriteId]) -> &super::Write {
        self.write(ids[0])
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
