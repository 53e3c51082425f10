//! What the death of a process leaves, where a power cut would leave less.

use super::{SimPmem, SimState};
use crate::pmem::{LINE_SIZE_BYTES, Pmem};
use crate::units::Agent;
use std::sync::{Arc, Mutex};

/// Who has stored what a process had not fenced when it died.
pub(super) const DEAD: Agent = Agent(u16::MAX);

impl SimState {
    /// What a kill leaves at a fence that has not taken effect: what was stored is there to be read, but not all of it is
    /// durable. Nobody will ever fence it.
    #[must_use]
    pub fn killed(&self) -> SimPmem {
        let pmem = SimPmem::from_image(self.durable().to_vec());
        let live = self.live_image();
        for line in self.pending_lines() {
            let at = line.off.0 as usize;
            pmem.store(DEAD, line.off, &live[at..at + LINE_SIZE_BYTES as usize]);
        }
        pmem
    }
}

impl SimPmem {
    /// What `run` comes to, and what `look` sees at each of its fences.
    ///
    /// # Panics
    /// `look` does.
    pub fn at_fences<R, T: Send + 'static>(
        &self,
        look: impl Fn(&SimState) -> T + Send + 'static,
        run: impl FnOnce() -> R,
    ) -> (R, Vec<T>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        self.on_crash_point(Some(Box::new(move |state, _| {
            let looked = look(state);
            if let Ok(mut seen) = sink.lock() {
                seen.push(looked);
            }
        })));
        let result = run();
        self.on_crash_point(None);
        let seen = seen.lock().map(|mut seen| std::mem::take(&mut *seen));
        (result, seen.unwrap_or_default())
    }
}
