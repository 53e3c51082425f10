//! Checkpoints: the base is brought to an exact cut of the cache and held there while I/O goes on, for as long
//! as a snapshot of the base needs.
//!
//! Between batches of write-back the base is an exact past state. So a checkpoint lets batches go on until all
//! that was acknowledged before it was asked for is on the base, and then lets none begin: nothing else writes
//! to the base (INV-CKPT-1). Nothing of it is persisted: after a restart none is held.

use super::cache::{Cache, lock};
use super::health::Health;
use crate::canary::{self, Canary};
use crate::pmem::Pmem;
use crate::units::{Epoch, NS_PER_MS, NS_PER_S, Now, Seq};
use serde::Serialize;
use std::ops::RangeInclusive;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

/// How long the base is held at most, in seconds, unless the caller says otherwise: long enough for a snapshot,
/// short enough that one who forgets about it does not fill the cache with dirty data for long.
pub const CHECKPOINT_TIMEOUT_S_DEFAULT: u32 = 60;
/// What the caller may say.
pub const CHECKPOINT_TIMEOUT_S_RANGE: RangeInclusive<u32> = 1..=3600;

/// Tells a checkpoint from others of the same cache.
pub type CheckpointId = u64;

/// Where a checkpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointState {
    /// There is none.
    Idle,
    /// The base is on its way to the cut.
    WritingBack,
    /// The base is at the cut and stays there.
    Holding,
    /// The time limit has passed: the base is written to again. Until somebody ends it, or begins another.
    Expired,
    /// The base does not get to the cut: the cache has failed. Until somebody ends it, or begins another.
    Failed,
}

/// How far a checkpoint is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckpointStatus {
    /// Where it is.
    pub state: CheckpointState,
    /// Which one; `None`: there is none.
    pub checkpoint_id: Option<CheckpointId>,
    /// How much of the way to the cut is done, from 0 to 100.
    pub percent: u8,
    /// The cut, once the base is there: the log up to and including this seq.
    pub seq: Option<u64>,
    /// All barriers of the application up to this one were complete when the checkpoint was asked for.
    pub epoch: Option<u64>,
    /// For how long the base was held, in milliseconds, and up to now if it still is.
    pub held_ms: Option<u64>,
    /// For how long it may be held, in seconds.
    pub timeout_s: Option<u32>,
    /// What is wrong, or why it is taking its time.
    pub reason: Option<String>,
}

/// A checkpoint that held to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CheckpointCut {
    /// Which one.
    pub checkpoint_id: CheckpointId,
    /// The base held the log up to and including this seq.
    pub seq: u64,
    /// As in [`CheckpointStatus`].
    pub epoch: u64,
    /// For how long, in milliseconds.
    pub held_ms: u64,
}

/// Why a checkpoint does not begin, or has not held.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    /// One at a time.
    #[error("checkpoint {0} has not ended")]
    Busy(CheckpointId),
    /// Nothing to end.
    #[error("there is no checkpoint: it was ended before, or the cache was opened since")]
    Missing,
    /// Another one is there.
    #[error("checkpoint {given} has ended; the one that is there is {found}")]
    Other {
        /// What was asked for.
        given: CheckpointId,
        /// What is there.
        found: CheckpointId,
    },
    /// Ended before the base was at the cut.
    #[error("checkpoint {0} was given up before the base was at the cut")]
    NotReached(CheckpointId),
    /// The base was written to before the end.
    #[error(
        "checkpoint {id} was lost: its time limit of {timeout_s} s has passed; what was copied of the base since is no snapshot"
    )]
    Expired {
        /// Which one.
        id: CheckpointId,
        /// The limit.
        timeout_s: u32,
    },
    /// The base never was at the cut.
    #[error("checkpoint {id} has failed: {reason}")]
    Failed {
        /// Which one.
        id: CheckpointId,
        /// Why.
        reason: String,
    },
}

/// What a checkpoint wants of write-back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CheckpointNeed {
    Nothing,
    /// Everything below this on the base.
    WriteBack(Seq),
    /// No batch begins.
    Hold,
}

#[derive(Clone, Debug)]
enum Stage {
    WritingBack,
    Holding { seq: Seq, since: Now },
    Expired { seq: Seq },
    Failed { reason: String },
}

/// One that was asked for.
#[derive(Clone, Debug)]
struct Asked {
    id: CheckpointId,
    timeout_s: u32,
    /// The cut covers everything below this.
    upto: Seq,
    epoch: Epoch,
    /// The dirty tail at the beginning.
    tail_start: Seq,
    stage: Stage,
}

impl Asked {
    fn timeout_ns(&self) -> u64 {
        u64::from(self.timeout_s) * NS_PER_S
    }

    /// Once the limit has passed the hold is lost, whoever looks first.
    fn expire(&mut self, now: Now) {
        if let Stage::Holding { seq, since } = self.stage
            && now.since_ns(since) >= self.timeout_ns()
        {
            self.stage = Stage::Expired { seq };
        }
    }

    fn is_active(&self) -> bool {
        matches!(self.stage, Stage::WritingBack | Stage::Holding { .. })
    }
}

#[derive(Debug, Default)]
struct Inner {
    asked: Option<Asked>,
    last_id: CheckpointId,
}

/// The checkpoint of a cache.
#[derive(Debug, Default)]
pub(crate) struct Checkpoint(Mutex<Inner>);

impl Checkpoint {
    /// The cache has failed. What is held already stays as it is.
    pub(crate) fn fail(&self, reason: &str) {
        if let Some(asked) = &mut lock(&self.0).asked
            && matches!(asked.stage, Stage::WritingBack)
        {
            asked.stage = Stage::Failed {
                reason: reason.to_owned(),
            };
        }
    }

    /// The one that holds the base.
    pub(crate) fn holder(&self) -> Option<CheckpointId> {
        let inner = lock(&self.0);
        let asked = inner.asked.as_ref()?;
        matches!(asked.stage, Stage::Holding { .. }).then_some(asked.id)
    }

    /// Whether the base is on its way to a cut.
    pub(crate) fn is_writing_back(&self) -> bool {
        let inner = lock(&self.0);
        let asked = inner.asked.as_ref();
        asked.is_some_and(|asked| matches!(asked.stage, Stage::WritingBack))
    }

    /// To be asked between batches, when no base operation of write-back is under way: only then is the base
    /// at a cut. `is_on_base` says whether everything below a number is on the base, `dirty_tail` which cut it
    /// is.
    pub(crate) fn need(
        &self,
        now: Now,
        dirty_tail: Seq,
        is_on_base: impl FnOnce(Seq) -> bool,
    ) -> CheckpointNeed {
        let mut inner = lock(&self.0);
        let Some(asked) = &mut inner.asked else {
            return CheckpointNeed::Nothing;
        };
        asked.expire(now);
        match asked.stage {
            Stage::WritingBack => {
                if !is_on_base(asked.upto) && !canary::is(Canary::CheckpointHeldTooEarly) {
                    return CheckpointNeed::WriteBack(asked.upto);
                }
                asked.stage = Stage::Holding {
                    seq: dirty_tail,
                    since: now,
                };
                CheckpointNeed::Hold
            }
            Stage::Holding { .. } if canary::is(Canary::BatchBegunDuringHold) => {
                CheckpointNeed::Nothing
            }
            Stage::Holding { .. } => CheckpointNeed::Hold,
            Stage::Expired { .. } | Stage::Failed { .. } => CheckpointNeed::Nothing,
        }
    }
}

impl<P: Pmem> Cache<P> {
    /// Asks for the base to be brought to a cut at a moment not before this call, and to be held there for
    /// `timeout_s` seconds at the most ([`CHECKPOINT_TIMEOUT_S_RANGE`]). Returns at once.
    ///
    /// # Errors
    /// Another one has not ended, or the cache does not write back any more.
    pub fn checkpoint_begin(
        &self,
        timeout_s: u32,
        now: Now,
    ) -> Result<CheckpointId, CheckpointError> {
        let mut inner = lock(&self.checkpoint.0);
        if let Some(asked) = &mut inner.asked {
            asked.expire(now);
            if asked.is_active() {
                return Err(CheckpointError::Busy(asked.id));
            }
        }
        // Not even the process before, on the same boot, had one of this number.
        let id = (inner.last_id + 1).max(now.0 / NS_PER_MS);
        if let Health::Degraded(reason) | Health::Failed(reason) = self.health() {
            return Err(CheckpointError::Failed { id, reason });
        }
        inner.last_id = id;
        // The epoch first: a barrier that it counts closed before any number from here on was drawn.
        let epoch = Epoch(self.epoch.load(Ordering::SeqCst));
        // Whatever was acknowledged has drawn its number before.
        let upto = Seq(self.seq_next.load(Ordering::SeqCst));
        inner.asked = Some(Asked {
            id,
            timeout_s,
            upto,
            epoch,
            tail_start: self.dirty_tail(),
            stage: Stage::WritingBack,
        });
        Ok(id)
    }

    /// Ends a checkpoint, whatever has become of it: the base is written to again. `id`: only if it is this
    /// one.
    ///
    /// # Errors
    /// The base was not held until now.
    pub fn checkpoint_end(
        &self,
        id: Option<CheckpointId>,
        now: Now,
    ) -> Result<CheckpointCut, CheckpointError> {
        let mut inner = lock(&self.checkpoint.0);
        let found = inner.asked.as_ref().map(|asked| asked.id);
        let found = found.ok_or(CheckpointError::Missing)?;
        if let Some(given) = id
            && given != found
        {
            return Err(CheckpointError::Other { given, found });
        }
        let Some(mut asked) = inner.asked.take() else {
            return Err(CheckpointError::Missing);
        };
        asked.expire(now);
        match asked.stage {
            Stage::Holding { seq, since } => Ok(CheckpointCut {
                checkpoint_id: found,
                seq: seq.0,
                epoch: asked.epoch.0,
                held_ms: now.since_ns(since) / NS_PER_MS,
            }),
            Stage::WritingBack => Err(CheckpointError::NotReached(found)),
            Stage::Expired { .. } => Err(CheckpointError::Expired {
                id: found,
                timeout_s: asked.timeout_s,
            }),
            Stage::Failed { reason } => Err(CheckpointError::Failed { id: found, reason }),
        }
    }

    /// How far the checkpoint is.
    pub fn checkpoint_status(&self, now: Now) -> CheckpointStatus {
        let mut inner = lock(&self.checkpoint.0);
        let Some(asked) = &mut inner.asked else {
            return CheckpointStatus {
                state: CheckpointState::Idle,
                checkpoint_id: None,
                percent: 0,
                seq: None,
                epoch: None,
                held_ms: None,
                timeout_s: None,
                reason: None,
            };
        };
        asked.expire(now);
        let (state, seq, held_ns, reason) = match &asked.stage {
            Stage::WritingBack => (CheckpointState::WritingBack, None, None, self.trouble()),
            Stage::Holding { seq, since } => {
                let held_ns = now.since_ns(*since);
                (CheckpointState::Holding, Some(seq), Some(held_ns), None)
            }
            Stage::Expired { seq } => {
                let text = "the time limit has passed; the base is written to again";
                let held_ns = Some(asked.timeout_ns());
                (
                    CheckpointState::Expired,
                    Some(seq),
                    held_ns,
                    Some(text.to_owned()),
                )
            }
            Stage::Failed { reason } => (CheckpointState::Failed, None, None, Some(reason.clone())),
        };
        CheckpointStatus {
            state,
            checkpoint_id: Some(asked.id),
            percent: if seq.is_some() {
                100
            } else {
                percent_done(asked, self.dirty_tail())
            },
            seq: seq.map(|seq| seq.0),
            epoch: Some(asked.epoch.0),
            held_ms: held_ns.map(|ns| ns / NS_PER_MS),
            timeout_s: Some(asked.timeout_s),
            reason,
        }
    }

    /// The checkpoint that was begun and has neither ended nor been lost.
    pub fn checkpoint_active(&self, now: Now) -> Option<CheckpointId> {
        let mut inner = lock(&self.checkpoint.0);
        let asked = inner.asked.as_mut()?;
        asked.expire(now);
        asked.is_active().then_some(asked.id)
    }
}

/// By numbers: those of writes that came meanwhile do not count.
fn percent_done(asked: &Asked, dirty_tail: Seq) -> u8 {
    let all = asked.upto.0.saturating_sub(asked.tail_start.0 + 1).max(1);
    let done = dirty_tail.0.saturating_sub(asked.tail_start.0);
    u8::try_from((u128::from(done) * 100 / u128::from(all)).min(99)).unwrap_or(99)
}
