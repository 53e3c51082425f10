//! Checkpoints of a machine, and what the base must be while one holds it.

use super::super::base::BaseImage;
use super::super::model::{Time, Violation};
use super::turns::Shared;
use super::{Machine, Outside};
use crate::engine::{CheckpointError, CheckpointState};

/// A checkpoint that was asked for.
#[derive(Clone, Debug)]
pub struct Watch {
    /// When it was asked for.
    begun: Time,
    /// The base, from when it is held.
    held: Option<BaseImage>,
}

impl Outside {
    /// While a checkpoint holds the base: an exact past state of a moment not before it was asked for, durable,
    /// and always the same.
    fn check_hold(&mut self) -> Result<(), Violation> {
        let Some(watch) = &mut self.checkpoint else {
            return Ok(());
        };
        let image = self.base.current_image();
        if !self.base.is_still() || watch.held.as_ref().is_some_and(|held| *held != image) {
            let text = "a checkpoint holds the base, but it is written to";
            return Err(Violation(text.to_owned()));
        }
        if watch.held.is_none() {
            self.model
                .check_cut_since(watch.begun, |lba| image.stamp(lba))?;
            watch.held = Some(image);
        }
        Ok(())
    }

    /// Whether a cut leaves the base at what a checkpoint holds it at.
    pub(in crate::sim) fn check_held_after_cut(&self, base: &BaseImage) -> Result<(), Violation> {
        let held = self
            .checkpoint
            .as_ref()
            .and_then(|watch| watch.held.as_ref());
        if held.is_some_and(|held| held != base) {
            let text = "a cut while a checkpoint holds the base leaves something else there";
            return Err(Violation(text.to_owned()));
        }
        Ok(())
    }
}

impl Shared {
    /// Looks at the base if a checkpoint holds it.
    pub(super) fn look_at_checkpoint(&self, outside: &mut Outside) {
        if outside.checkpoint.is_none() {
            return;
        }
        match self.cache.checkpoint_status(self.now()).state {
            CheckpointState::WritingBack => {}
            CheckpointState::Holding => {
                if let Err(violation) = outside.check_hold() {
                    self.fail(violation);
                }
            }
            CheckpointState::Idle | CheckpointState::Expired | CheckpointState::Failed => {
                outside.checkpoint = None;
            }
        }
    }
}

impl Machine {
    /// Asks for a checkpoint, unless there is one.
    pub fn checkpoint_begin(&self, timeout_s: u32) {
        let now = self.shared.now();
        self.with_outside(|outside| {
            let begun = outside.model.begin_flush();
            if self.shared.cache.checkpoint_begin(timeout_s, now).is_ok() {
                outside.checkpoint = Some(Watch { begun, held: None });
            }
        });
    }

    /// Ends the checkpoint, if there is one.
    pub fn checkpoint_end(&self) {
        let now = self.shared.now();
        self.with_outside(|outside| {
            let ended = self.shared.cache.checkpoint_end(None, now);
            let watch = outside.checkpoint.take();
            let held = watch.is_some_and(|watch| watch.held.is_some());
            let told_so = match ended {
                Ok(_) => held,
                Err(CheckpointError::NotReached(_)) => !held,
                Err(_) => true,
            };
            if !told_so {
                let text = format!("a checkpoint (held: {held}) ends with {ended:?}");
                self.shared.fail(Violation(text));
            }
        });
    }
}
