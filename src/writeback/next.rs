//! The batch that comes next. It is taken from the log and sorted while the one before it is written.

use super::log::{Gathered, Gathering, KeysLost, Limits, LogReader, Taken};
use super::lost::Lost;
use super::overlay::{Overlay, Sorter};
use super::parts::Part;
use super::salvage::Stage;
use crate::engine::{Cache, Counters, Progress};
use crate::memory::NoMemory;
use crate::pmem::Pmem;
use crate::units::{Now, Seq};

/// Keys that one poll sorts, at most: some microseconds.
const SORTED_PER_POLL: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There is none.
    Nothing,
    /// Its keys are being taken from the log.
    Gathering,
    /// The log had no more when it was looked at last.
    Dry,
    /// What lies in segments whose keys are lost is looked for in the index.
    Visiting,
    /// There is no room for what is still to come, and room is being made: so many pieces are kept at most.
    Narrowing(usize),
    /// It is complete, and being sorted.
    Sorting,
    /// It can be written.
    Ready,
    /// It holds the only copy of something that is damaged: it must not be written.
    Damaged,
}

/// Whether the batch is to be written as soon as possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hurry {
    /// The base has nothing left to do.
    Yes,
    /// The batch before still has: this one takes what comes meanwhile, and absorbs more.
    No,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Next {
    step: Step,
    pub(super) overlay: Overlay,
    sorter: Sorter,
    pub(super) taken: Taken,
    pub(super) lost: Lost,
    pub(super) limits: Limits,
    pub(super) stage: Stage,
    /// It is a part of the batch that is being written, behind the first one.
    pub(super) part: Option<Part>,
    /// Of a salvage: what it makes clean.
    pub(super) dirty_bytes: u64,
    /// When its first key was looked for.
    pub(super) begun: Now,
}

impl Next {
    pub(super) fn new(key_count: usize) -> Result<Self, NoMemory> {
        Ok(Self {
            step: Step::Nothing,
            overlay: Overlay::new(key_count)?,
            sorter: Sorter::new(key_count)?,
            taken: Taken::NOTHING,
            lost: Lost::default(),
            limits: Limits::NONE,
            stage: Stage::Ordinary,
            part: None,
            dirty_bytes: 0,
            begun: Now(0),
        })
    }

    pub(super) fn is_nothing(&self) -> bool {
        self.step == Step::Nothing
    }

    pub(super) fn is_ready(&self) -> bool {
        self.step == Step::Ready
    }

    pub(super) fn is_damaged(&self) -> bool {
        self.step == Step::Damaged
    }

    /// Whether the end of the log has to be looked for anew.
    pub(super) fn is_dry(&self) -> bool {
        matches!(self.step, Step::Nothing | Step::Dry)
    }

    pub(super) fn clear(&mut self) {
        self.step = Step::Nothing;
        self.overlay.clear();
        self.taken = Taken::NOTHING;
        self.lost.clear();
        self.stage = Stage::Ordinary;
        self.part = None;
        self.dirty_bytes = 0;
    }

    pub(super) fn begin(&mut self, limits: Limits, now: Now) {
        self.clear();
        self.begun = now;
        self.limits = limits;
        self.step = Step::Gathering;
    }

    /// A salvage: its limits are none.
    pub(super) fn begin_salvage(&mut self, limits: Limits, stage: Stage, now: Now) {
        self.begin(limits, now);
        self.stage = stage;
        self.step = match stage {
            Stage::Visiting(_) => Step::Visiting,
            Stage::Ordinary | Stage::Below(_) | Stage::Above(_) => Step::Dry,
        };
    }

    /// Everything below this is in the log, and the log has been looked at since.
    pub(super) fn extend(&mut self, settled: Seq) {
        self.limits.settled = self.part.map_or(settled, |part| part.at_most(settled));
        self.step = Step::Gathering;
    }

    /// The log is to be read from the dirty tail on for a part, and has not been looked at.
    pub(super) fn wait_for_look(&mut self) {
        self.step = Step::Dry;
    }

    /// The step that makes room. What it keeps is half of what there is room for, or of what there is, if it is the damage
    /// there that takes the room.
    pub(super) fn narrowing(&self) -> Step {
        let key_count = self.overlay.key_count().min(self.limits.room);
        Step::Narrowing((key_count / 2).max(1))
    }

    /// Takes some keys, or sorts some.
    ///
    /// # Errors
    /// The log cannot be read on.
    pub(super) fn go_on<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        counters: &Counters,
        log: &mut LogReader,
        hurry: Hurry,
    ) -> Result<Progress, KeysLost> {
        if let Step::Narrowing(kept_max) = self.step {
            let sorter = &mut self.sorter;
            if self.overlay.narrow(sorter, SORTED_PER_POLL, kept_max) {
                if self.part.is_some() {
                    self.lost.keep_within(|lba| self.overlay.holds(lba));
                }
                self.step = match self.stage {
                    Stage::Visiting(_) => Step::Visiting,
                    Stage::Ordinary | Stage::Below(_) | Stage::Above(_) => Step::Gathering,
                };
            }
            return Ok(Progress::Busy);
        }
        if self.step == Step::Gathering {
            let batch = Gathering {
                limits: &self.limits,
                taken: &mut self.taken,
                overlay: &mut self.overlay,
                lost: &mut self.lost,
            };
            self.step = match log.gather(cache, counters, batch)? {
                Gathered::InPart => return Ok(Progress::Busy),
                Gathered::Crowded => {
                    self.step = self.narrowing();
                    return Ok(Progress::Busy);
                }
                Gathered::Full => Step::Sorting,
                Gathered::Dry => Step::Dry,
            };
        }
        if self.stage != Stage::Ordinary && matches!(self.step, Step::Dry | Step::Visiting) {
            self.step = self.salvage(cache, counters);
            return Ok(match self.step {
                Step::Dry => Progress::Idle,
                _ => Progress::Busy,
            });
        }
        if self.step == Step::Dry {
            self.end_catching_up();
            if self.taken.last_seq.is_none() {
                self.step = Step::Nothing;
                return Ok(Progress::Idle);
            }
            let may_wait = hurry == Hurry::No && self.part.is_none();
            if may_wait || self.limits.settled < self.lost.upto() {
                return Ok(Progress::Idle);
            }
            self.step = Step::Sorting;
        }
        if self.step == Step::Sorting && self.is_damaged_inside() {
            self.lost.end();
            self.step = Step::Damaged;
        }
        if self.step != Step::Sorting {
            return Ok(Progress::Idle);
        }
        if self.overlay.sort(&mut self.sorter, SORTED_PER_POLL) {
            self.step = Step::Ready;
        }
        Ok(Progress::Busy)
    }
}
