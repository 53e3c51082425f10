//! A line on the terminal that says how far it is.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// The time: of the tool, which the engine is given.
#[expect(
    clippy::disallowed_methods,
    reason = "the tool is a host, and hosts have a clock"
)]
pub(super) fn clock() -> Instant {
    Instant::now()
}

/// How often the line changes, at most.
const INTERVAL: Duration = Duration::from_millis(200);

/// Writes to stderr, and only to a terminal.
#[derive(Debug)]
pub struct ProgressLine {
    shown: Option<Instant>,
    terminal: bool,
}

impl Default for ProgressLine {
    fn default() -> Self {
        Self {
            shown: None,
            terminal: io::stderr().is_terminal(),
        }
    }
}

impl ProgressLine {
    /// `done` of `total`, whatever they count.
    pub fn show(&mut self, what: &str, done: u64, total: u64) {
        let now = clock();
        let due = self.shown.is_none_or(|shown| now - shown >= INTERVAL);
        if self.terminal && due {
            self.shown = Some(now);
            let percent = u128::from(done) * 100 / u128::from(total.max(1));
            // The cursor goes back, so that a finding takes the place of this. There is nobody to tell that the
            // terminal is gone.
            let _ = write!(io::stderr(), "\x1b[K{what}: {percent} %\r");
        }
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if self.shown.is_some() {
            let _ = write!(io::stderr(), "\x1b[K");
        }
    }
}
