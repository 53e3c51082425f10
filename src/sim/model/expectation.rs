//! What may be found after a crash at one moment: made once, compared with many images.

use super::{Model, Time, Violation, WriteId};
use crate::sim::stamp::{Garbage, Stamp};

#[derive(Clone, Copy, Debug)]
struct Option1 {
    id: WriteId,
    stamp: Stamp,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Expectation {
    /// By block: the only allowed content, or an index into `open`.
    blocks: Vec<Allowed>,
    open: Vec<Vec<Option1>>,
    model: Model,
}

#[derive(Clone, Copy, Debug)]
enum Allowed {
    One(Stamp),
    Open(u32),
}

impl Expectation {
    /// For a crash now.
    #[must_use]
    pub fn of(model: &Model) -> Self {
        let mut open = Vec::new();
        let blocks = model.blocks.iter().map(|block| {
            let alive = block
                .candidates
                .iter()
                .filter(|c| c.dead_since == Time::NEVER);
            let options: Vec<Option1> = alive
                .map(|c| Option1 {
                    id: c.id,
                    stamp: model.write(c.id).stamp,
                })
                .collect();
            if let [only] = options[..] {
                return Allowed::One(only.stamp);
            }
            open.push(options);
            Allowed::Open(open.len() as u32 - 1)
        });
        let blocks = blocks.collect();
        Self {
            blocks,
            open,
            model: model.clone(),
        }
    }

    /// Number of blocks.
    #[must_use]
    pub fn block_count(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Compares what was found, block by block, with what may be.
    ///
    /// # Errors
    /// Acknowledged data are lost, a write is there in part, or something was never written.
    pub fn check(
        &self,
        mut found: impl FnMut(u64) -> Result<Stamp, Garbage>,
    ) -> Result<Vec<Stamp>, Violation> {
        let mut stamps = Vec::with_capacity(self.blocks.len());
        let mut chosen = Vec::new();
        for (lba, allowed) in (0..).zip(&self.blocks) {
            let stamp = found(lba).map_err(|garbage| {
                Violation(format!("recovery found garbage in block {lba}: {garbage}"))
            })?;
            stamps.push(stamp);
            let wrong = || self.model.wrong_content("recovery", lba, stamp);
            match allowed {
                Allowed::One(only) if *only == stamp => {}
                Allowed::One(_) => return Err(wrong()),
                Allowed::Open(at) => {
                    let options = &self.open[*at as usize];
                    let mut fitting = options.iter().filter(|option| option.stamp == stamp);
                    let first = fitting.next().ok_or_else(wrong)?;
                    // Zeroes of several writes do not tell which.
                    let known = fitting.next().is_none();
                    chosen.push((lba, *at, known.then_some(first.id)));
                }
            }
        }
        self.check_atomicity(&chosen)?;
        Ok(stamps)
    }

    /// Every write is there as a whole or not at all, and there is an order of the writes that explains what
    /// was found.
    fn check_atomicity(&self, chosen: &[(u64, u32, Option<WriteId>)]) -> Result<(), Violation> {
        let present: Vec<WriteId> = chosen.iter().filter_map(|(_, _, id)| *id).collect();
        let mut edges: Vec<(WriteId, WriteId)> = Vec::new();
        for (lba, at, id) in chosen {
            let Some(top) = *id else { continue };
            for option in &self.open[*at as usize] {
                let write = self.model.write(option.id);
                let applied = write.end != Time::NEVER || present.contains(&option.id);
                if option.id == top || !applied {
                    continue;
                }
                if self.model.write(top).end < write.begin {
                    return Err(Violation(format!(
                        "recovery found a write in part: {} is there, but block {lba} still has {}",
                        self.model.describe(option.id),
                        self.model.describe(top)
                    )));
                }
                edges.push((option.id, top));
            }
        }
        edges.sort_unstable();
        edges.dedup();
        match find_cycle(&edges) {
            None => Ok(()),
            Some(id) => Err(Violation(format!(
                "recovery found writes mixed that cannot have come in any order: {} is before and after another",
                self.model.describe(id)
            ))),
        }
    }
}

/// A node that can be reached from itself.
fn find_cycle(edges: &[(WriteId, WriteId)]) -> Option<WriteId> {
    let mut edges = edges.to_vec();
    // Whoever has no successor is on no cycle, and neither is an edge to it.
    loop {
        let before = edges.len();
        let sources: Vec<WriteId> = edges.iter().map(|(from, _)| *from).collect();
        edges.retain(|(_, to)| sources.binary_search(to).is_ok());
        if edges.is_empty() {
            return None;
        }
        if edges.len() == before {
            return Some(edges[0].0);
        }
    }
}

impl Model {
    /// After a crash and a recovery that found `stamps`: they are the truth from now on.
    pub fn restart(&mut self, stamps: &[Stamp]) {
        let now = self.tick();
        self.reads.clear();
        let mut seen: Vec<Vec<WriteId>> = (0..)
            .zip(stamps)
            .map(|(lba, stamp)| self.matching(lba, *stamp))
            .collect();
        let mut open: Vec<WriteId> = (0..self.writes.len() as u32).map(WriteId).collect();
        open.retain(|id| self.write(*id).end == Time::NEVER && !self.write(*id).gone);
        // One that turns out not to have happened cannot have hidden another: again until nothing changes.
        while let Some(at) = open
            .iter()
            .position(|id| !self.may_have_happened(*id, &seen))
        {
            let id = open.swap_remove(at);
            self.forget(id);
            seen.iter_mut()
                .for_each(|ids| ids.retain(|other| *other != id));
        }
        for id in open {
            let write = &mut self.writes[id.0 as usize];
            write.acked = now;
            write.end = now;
        }
        for (block, seen) in self.blocks.iter_mut().zip(&seen) {
            block
                .candidates
                .retain(|candidate| seen.contains(&candidate.id));
        }
    }

    fn matching(&self, lba: u64, stamp: Stamp) -> Vec<WriteId> {
        let alive = |c: &&super::Candidate| c.dead_since == Time::NEVER;
        let candidates = self.blocks[lba as usize].candidates.iter().filter(alive);
        candidates
            .map(|c| c.id)
            .filter(|id| self.write(*id).stamp == stamp)
            .collect()
    }

    /// Whether a write that was under way may have been done: it is seen, or hidden wherever it may be.
    fn may_have_happened(&self, id: WriteId, seen: &[Vec<WriteId>]) -> bool {
        let write = self.write(id);
        (write.lba..write.lba + write.len_blocks).all(|lba| {
            let here = &seen[lba as usize];
            here.contains(&id)
                || here
                    .iter()
                    .any(|other| self.write(*other).end >= write.begin)
        })
    }
}
