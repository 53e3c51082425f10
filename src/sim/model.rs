//! The oracle: what reads may return, what may be found after a crash, what may be on the base.
//!
//! Time is the number of the event. A write begins when it is submitted and ends when it is acknowledged, or
//! when a read has returned its data: pcache publishes only what is durable. For each block the model keeps
//! the writes whose data it may hold. A write is *dead* in a block from the moment at which another one, begun
//! after its end, has ended; a read that was submitted later must not return it. Writes that were under way at
//! the same time may come in either order, until a read tells which.

mod base_order;
mod expectation;

pub use base_order::BaseRule;
pub use expectation::Expectation;

use super::stamp::Stamp;
use std::collections::BTreeSet;

/// The number of an event; later events have higher ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub u64);

impl Time {
    /// Not yet.
    pub const NEVER: Time = Time(u64::MAX);
}

/// Names a write of the history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriteId(pub u32);

/// The content before the first write.
const INITIAL: WriteId = WriteId(0);

/// A promise was broken; the text says which, where, and what was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Violation(pub String);

/// What a write does, for the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteKind {
    /// Data.
    Data,
    /// Data with FUA.
    Fua,
    /// Unmap or write-zeroes.
    Zeroes,
}

#[derive(Clone, Debug)]
struct Write {
    lba: u64,
    len_blocks: u64,
    stamp: Stamp,
    kind: WriteKind,
    begin: Time,
    acked: Time,
    /// The earlier of acknowledged and seen.
    end: Time,
    /// The latest submission of a flush that had completed when this began.
    flushed_before: Time,
    /// Nothing of it happened, and nothing may any more.
    gone: bool,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: WriteId,
    dead_since: Time,
}

#[derive(Clone, Debug, Default)]
struct Block {
    candidates: Vec<Candidate>,
    /// All writes to it, in order of submission.
    history: Vec<WriteId>,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Model {
    now: Time,
    writes: Vec<Write>,
    blocks: Vec<Block>,
    /// When the reads under way were submitted.
    reads: BTreeSet<Time>,
    flushed_before: Time,
}

impl Model {
    /// A device of `block_count` blocks that all hold `initial`.
    #[must_use]
    pub fn new(block_count: u64, initial: Stamp) -> Self {
        let first = Write {
            lba: 0,
            len_blocks: block_count,
            stamp: initial,
            kind: WriteKind::Data,
            begin: Time(0),
            acked: Time(0),
            end: Time(0),
            flushed_before: Time(0),
            gone: false,
        };
        let candidate = Candidate {
            id: INITIAL,
            dead_since: Time::NEVER,
        };
        let block = Block {
            candidates: vec![candidate],
            history: vec![INITIAL],
        };
        Self {
            now: Time(0),
            writes: vec![first],
            blocks: vec![block; block_count as usize],
            reads: BTreeSet::new(),
            flushed_before: Time(0),
        }
    }

    fn tick(&mut self) -> Time {
        self.now.0 += 1;
        self.now
    }

    fn write(&self, id: WriteId) -> &Write {
        &self.writes[id.0 as usize]
    }

    /// The stamp of the next write with data.
    #[must_use]
    pub fn next_stamp(&self) -> Stamp {
        // 0 are zeroes, 1 may be the initial content.
        Stamp(self.writes.len() as u32 + 1)
    }

    /// A write is submitted.
    pub fn begin_write(&mut self, kind: WriteKind, lba: u64, len_blocks: u64) -> WriteId {
        let stamp = if kind == WriteKind::Zeroes {
            Stamp::ZERO
        } else {
            self.next_stamp()
        };
        let begin = self.tick();
        let id = WriteId(self.writes.len() as u32);
        self.writes.push(Write {
            lba,
            len_blocks,
            stamp,
            kind,
            begin,
            acked: Time::NEVER,
            end: Time::NEVER,
            flushed_before: self.flushed_before,
            gone: false,
        });
        for lba in lba..lba + len_blocks {
            let block = &mut self.blocks[lba as usize];
            block.candidates.push(Candidate {
                id,
                dead_since: Time::NEVER,
            });
            block.history.push(id);
        }
        id
    }

    /// A write is acknowledged.
    pub fn end_write(&mut self, id: WriteId) {
        let now = self.tick();
        self.writes[id.0 as usize].acked = now;
        self.settle_end(id, now);
    }

    /// A write was given up before anything of it was done.
    pub fn abort_write(&mut self, id: WriteId) {
        self.tick();
        self.forget(id);
    }

    fn forget(&mut self, id: WriteId) {
        let write = &mut self.writes[id.0 as usize];
        write.gone = true;
        for lba in write.lba..write.lba + write.len_blocks {
            let block = &mut self.blocks[lba as usize];
            block.candidates.retain(|candidate| candidate.id != id);
            block.history.retain(|other| *other != id);
        }
    }

    /// A write has taken effect, by `now`: what had ended before it began is dead.
    fn settle_end(&mut self, id: WriteId, now: Time) {
        let write = self.write(id);
        if write.end <= now {
            return;
        }
        let (begin, lba, len) = (write.begin, write.lba, write.len_blocks);
        self.writes[id.0 as usize].end = now;
        let oldest_read = self.reads.first().copied().unwrap_or(Time::NEVER);
        for lba in lba..lba + len {
            let block = &mut self.blocks[lba as usize];
            for candidate in &mut block.candidates {
                if self.writes[candidate.id.0 as usize].end < begin {
                    candidate.dead_since = candidate.dead_since.min(now);
                }
            }
            block
                .candidates
                .retain(|candidate| candidate.dead_since >= oldest_read.min(now));
        }
    }

    /// A flush is submitted; the result goes to [`Model::end_flush`].
    pub fn begin_flush(&mut self) -> Time {
        self.tick()
    }

    /// A flush has completed.
    pub fn end_flush(&mut self, begin: Time) {
        self.tick();
        self.flushed_before = self.flushed_before.max(begin);
    }

    /// A read is submitted; the result goes to [`Model::end_read`].
    pub fn begin_read(&mut self) -> Time {
        let now = self.tick();
        self.reads.insert(now);
        now
    }

    /// A read that was submitted at `begin` has returned these blocks; `None` if it failed.
    ///
    /// # Errors
    /// A block is stale, or was never written.
    pub fn end_read(
        &mut self,
        begin: Time,
        lba: u64,
        stamps: Option<&[Stamp]>,
    ) -> Result<(), Violation> {
        let now = self.tick();
        for (lba, stamp) in (lba..).zip(stamps.unwrap_or_default()) {
            self.see(lba, *stamp, begin, now)?;
        }
        // Not before: what one block tells of a write must not take from the next what this read may return.
        self.reads.remove(&begin);
        Ok(())
    }

    fn see(&mut self, lba: u64, stamp: Stamp, begin: Time, now: Time) -> Result<(), Violation> {
        let block = &self.blocks[lba as usize];
        let possible = block
            .candidates
            .iter()
            .filter(|candidate| candidate.dead_since > begin);
        let mut found = possible.filter(|candidate| self.write(candidate.id).stamp == stamp);
        let Some(&Candidate { id, .. }) = found.next() else {
            return Err(self.wrong_content("a read", lba, stamp));
        };
        if found.next().is_some() {
            // Zeroes of several writes: nothing is learnt.
            return Ok(());
        }
        // Whatever had ended before the read began came before what it returned.
        let writes = &self.writes;
        for candidate in &mut self.blocks[lba as usize].candidates {
            if candidate.id != id && writes[candidate.id.0 as usize].end < begin {
                candidate.dead_since = candidate.dead_since.min(now);
            }
        }
        self.settle_end(id, now);
        Ok(())
    }

    /// Describes a block with the wrong content.
    fn wrong_content(&self, who: &str, lba: u64, stamp: Stamp) -> Violation {
        let block = &self.blocks[lba as usize];
        let mut text = format!("{who} found block {lba} with the data of ");
        let of_stamp = self.writes.iter().position(|write| write.stamp == stamp);
        match of_stamp {
            None => text.push_str(&format!("{stamp:?}, which was never written")),
            Some(at) => text.push_str(&self.describe(WriteId(at as u32))),
        }
        text.push_str("; allowed:");
        for candidate in &block.candidates {
            let dead = if candidate.dead_since == Time::NEVER {
                ""
            } else {
                " (dead now)"
            };
            text.push_str(&format!(" {}{dead};", self.describe(candidate.id)));
        }
        Violation(text)
    }

    fn describe(&self, id: WriteId) -> String {
        let write = self.write(id);
        let end = match (write.acked, write.end) {
            (Time::NEVER, Time::NEVER) => "under way".to_owned(),
            (Time::NEVER, Time(end)) => format!("seen at {end}"),
            (Time(end), _) => format!("acknowledged at {end}"),
        };
        let gone = if write.gone { ", given up" } else { "" };
        format!(
            "{:?} {:?} of blocks {}+{} (begun at {}, {end}{gone})",
            write.stamp, write.kind, write.lba, write.len_blocks, write.begin.0
        )
    }

    /// The only content that a block can have, if nothing is under way there.
    #[must_use]
    pub fn certain(&self, lba: u64) -> Option<Stamp> {
        let alive = |candidate: &&Candidate| candidate.dead_since == Time::NEVER;
        let mut alive = self.blocks[lba as usize].candidates.iter().filter(alive);
        let first = self.write(alive.next()?.id).stamp;
        alive
            .all(|candidate| self.write(candidate.id).stamp == first)
            .then_some(first)
    }
}

#[cfg(test)]
mod tests;
