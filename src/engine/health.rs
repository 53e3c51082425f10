//! Whether a cache works, and since when the base has been silent.

use super::cache::{Cache, lock};
use crate::units::{NS_PER_S, Now};
use serde::Serialize;
use std::sync::atomic::Ordering;

/// A base that has not ended any operation of write-back, or any read, for so long counts as stalled. Longer than what a disk
/// takes to recover from a bad sector, shorter than the time-outs of hosts (30 s).
const STALL_NS: u64 = 15 * NS_PER_S;

/// Whether a cache works.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "reason")]
pub enum Health {
    /// All is well.
    #[default]
    Online,
    /// Write-back meets errors and repeats, waits for the base, or saves that of which the keys cannot be read any more;
    /// nothing is lost.
    WritebackFailing(String),
    /// Dirty data are damaged; write-back stands still so that nothing newer overtakes them, until they are
    /// overwritten.
    Degraded(String),
    /// An internal error; every request fails, the media are as they were.
    Failed(String),
}

impl Health {
    /// What is wrong, if anything is.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Online => None,
            Self::WritebackFailing(reason) | Self::Degraded(reason) | Self::Failed(reason) => {
                Some(reason)
            }
        }
    }
}

impl<P> Cache<P> {
    /// A cache that is beyond repair at run time: every request fails from now on, nothing more is written.
    pub fn poison(&self, reason: &str) {
        self.failed.store(true, Ordering::Release);
        self.set_health(Health::Failed(reason.to_owned()));
        self.checkpoint.fail(reason);
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    pub(crate) fn set_health(&self, health: Health) {
        let mut current = lock(&self.health);
        if matches!(*current, Health::Failed(_)) && !matches!(health, Health::Failed(_)) {
            return;
        }
        if std::mem::discriminant(&*current) != std::mem::discriminant(&health) {
            self.health_changes.fetch_add(1, Ordering::Relaxed);
        }
        *current = health;
    }

    /// Whether it works.
    pub fn health(&self) -> Health {
        lock(&self.health).clone()
    }

    /// The same as a question, for those who ask again and again: a text that says why it does not is not copied.
    pub(crate) fn is_online(&self) -> bool {
        matches!(*lock(&self.health), Health::Online)
    }

    /// What is wrong, if anything is.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.health().reason().map(str::to_owned)
    }

    /// How many reads of the base are under way for requests, and how many have ended so far.
    pub fn base_reads(&self) -> (usize, u64) {
        let under_way = self.base_reads.load(Ordering::Relaxed) as usize;
        (under_way, self.base_reads_ended.load(Ordering::Relaxed))
    }

    /// A read of the base has ended.
    pub fn count_base_read_off(&self) {
        self.base_reads.fetch_sub(1, Ordering::Relaxed);
        self.base_reads_ended.fetch_add(1, Ordering::Relaxed);
    }

    /// How often it has changed from one kind of [`Health`] to another: for whoever watches it, at the cost of a
    /// load.
    pub fn health_changes(&self) -> u64 {
        self.health_changes.load(Ordering::Relaxed)
    }
}

/// Notices a base that answers nothing.
#[derive(Debug, Default)]
pub(crate) struct StallWatch {
    /// When the base was last heard of; `None`: nothing is asked of it.
    heard: Option<Now>,
}

impl StallWatch {
    /// The base has ended an operation.
    pub(crate) fn heard(&mut self) {
        self.heard = None;
    }

    /// To be asked with every poll. Some: the base has been silent for so many seconds, too long.
    pub(crate) fn silent_s(&mut self, now: Now, in_flight: usize) -> Option<u64> {
        if in_flight == 0 {
            self.heard = None;
            return None;
        }
        self.heard.get_or_insert(now);
        let silent_ns = self.silent_ns(now);
        (silent_ns >= STALL_NS).then_some(silent_ns / NS_PER_S)
    }

    /// How long the base has been silent, as far as [`StallWatch::silent_s`] knows.
    pub(crate) fn silent_ns(&self, now: Now) -> u64 {
        self.heard.map_or(0, |heard| now.since_ns(heard))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_base_that_is_asked_something_can_be_silent() {
        let mut watch = StallWatch::default();
        let at = |seconds: u64| Now(seconds * NS_PER_S);
        assert_eq!(watch.silent_s(at(0), 0), None);
        assert_eq!(watch.silent_s(at(100), 3), None, "asked just now");
        assert_eq!(watch.silent_s(at(114), 3), None);
        assert_eq!(watch.silent_s(at(115), 3), Some(15));
        watch.heard();
        assert_eq!(watch.silent_s(at(116), 2), None, "it has answered");
        assert_eq!(watch.silent_s(at(140), 2), Some(24));
        assert_eq!(
            watch.silent_s(at(141), 0),
            None,
            "nothing is left to answer"
        );
    }
}
