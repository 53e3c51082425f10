//! A cache device after a power cut of which nothing is decided yet: a word that may have several values gets
//! one when it is read for the first time. Running a recovery over all choices visits every state that the
//! recovery can tell apart, and no other (level L5 of `docs/TESTING.md`).

use super::image::ImagePmem;
use super::pmem::{PendingWord, WORD_SIZE_BYTES};
use crate::pmem::{Durable, IovCursor, MemSlice, Pmem, PmemRead, Poisoned};
use crate::units::{Agent, PmemOff};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A choice that was made: which, of how many.
#[derive(Clone, Copy, Debug)]
struct Choice {
    taken: usize,
    count: usize,
}

#[derive(Debug)]
struct Undecided {
    words: BTreeMap<u64, PendingWord>,
    /// Words that matter no more in this run: decided, or overwritten.
    settled: BTreeSet<u64>,
    /// Those of them that were decided, in this order.
    decided: Vec<u64>,
    /// In the order in which they were made. A run repeats them, then takes the first of each further one.
    choices: Vec<Choice>,
    next: usize,
}

/// See the module. A clone is another handle to the same device.
#[derive(Clone, Debug)]
pub(super) struct LazyPmem {
    image: ImagePmem,
    undecided: Arc<Mutex<Undecided>>,
}

impl LazyPmem {
    /// `image` is what is durable for sure; it has been marked. It is as before after the last run.
    #[must_use]
    pub(super) fn new(image: ImagePmem, words: &[PendingWord]) -> Self {
        let words = words.iter().map(|word| (word.off.0, word.clone()));
        Self {
            image,
            undecided: Arc::new(Mutex::new(Undecided {
                words: words.collect(),
                settled: BTreeSet::new(),
                decided: Vec::new(),
                choices: Vec::new(),
                next: 0,
            })),
        }
    }

    /// Takes back what the run has written, and goes on to the next state. `false`: there is none left.
    #[must_use]
    pub(super) fn next_run(&self) -> bool {
        self.image.roll_back();
        let undecided = &mut *self.undecided();
        undecided.settled.clear();
        undecided.decided.clear();
        undecided.next = 0;
        while let Some(last) = undecided.choices.last_mut() {
            last.taken += 1;
            if last.taken < last.count {
                return true;
            }
            undecided.choices.pop();
        }
        false
    }

    /// The choices of this run, for a report.
    #[must_use]
    pub(super) fn describe(&self) -> String {
        let undecided = self.undecided();
        let choices = undecided.decided.iter().zip(&undecided.choices);
        let texts = choices.map(|(off, choice)| format!("{off:#x}:{}", choice.taken));
        texts.collect::<Vec<_>>().join(" ")
    }

    fn undecided(&self) -> MutexGuard<'_, Undecided> {
        self.undecided
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides the words that a read is about to see.
    fn decide(&self, off: PmemOff, len_bytes: u64) {
        let undecided = &mut *self.undecided();
        for (at, word) in undecided.words.range(words_of(off, len_bytes)) {
            if !undecided.settled.insert(*at) {
                continue;
            }
            undecided.decided.push(*at);
            if undecided.next == undecided.choices.len() {
                undecided.choices.push(Choice {
                    taken: 0,
                    count: word.choice_count(),
                });
            }
            let choice = undecided.choices[undecided.next].taken;
            undecided.next += 1;
            if choice > 0 {
                self.image.patch(word.off, &word.versions[choice - 1].bytes);
            }
        }
    }

    /// A line that is stored whole has one value from here on.
    fn overwrite(&self, off: PmemOff, len_bytes: u64) {
        let undecided = &mut *self.undecided();
        let words = undecided.words.range(words_of(off, len_bytes));
        undecided.settled.extend(words.map(|(at, _)| *at));
    }
}

/// Where the words begin that a range touches.
fn words_of(off: PmemOff, len_bytes: u64) -> std::ops::Range<u64> {
    let word_size = WORD_SIZE_BYTES as u64;
    off.0 / word_size * word_size..off.0 + len_bytes
}

impl PmemRead for LazyPmem {
    fn len_bytes(&self) -> u64 {
        self.image.len_bytes()
    }

    fn read(&self, off: PmemOff, buf: &mut [u8]) -> Result<(), Poisoned> {
        self.decide(off, buf.len() as u64);
        self.image.read(off, buf)
    }
}

impl Pmem for LazyPmem {
    fn read_to(&self, off: PmemOff, dst: &mut IovCursor, len_bytes: u64) -> Result<(), Poisoned> {
        self.decide(off, len_bytes);
        self.image.read_to(off, dst, len_bytes)
    }

    fn store(&self, agent: Agent, off: PmemOff, bytes: &[u8]) {
        self.overwrite(off, bytes.len() as u64);
        self.image.store(agent, off, bytes);
    }

    fn store_from(&self, agent: Agent, off: PmemOff, src: &mut IovCursor, len_bytes: u64) {
        self.overwrite(off, len_bytes);
        self.image.store_from(agent, off, src, len_bytes);
    }

    fn store_from_crc(
        &self,
        agent: Agent,
        off: PmemOff,
        src: &mut IovCursor,
        len_bytes: u64,
        seed: u32,
    ) -> u32 {
        self.overwrite(off, len_bytes);
        self.image.store_from_crc(agent, off, src, len_bytes, seed)
    }

    fn bytes_checksummed_per_fence(&self) -> u64 {
        self.image.bytes_checksummed_per_fence()
    }

    fn assert_stores_taken(&self) {
        self.image.assert_stores_taken();
    }

    fn fence(&self, agent: Agent) -> Durable {
        self.image.fence(agent)
    }

    fn slice(&self, off: PmemOff, len_bytes: u64) -> MemSlice {
        self.decide(off, len_bytes);
        self.image.slice(off, len_bytes)
    }

    fn prefetch(&self, off: PmemOff, len_bytes: u64) {
        self.image.prefetch(off, len_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::pmem::SimPmem;

    #[test]
    fn a_reader_sees_every_state_that_it_can_tell_apart_once() {
        let sim = SimPmem::new(4096);
        sim.store(Agent(1), PmemOff(0), &[1; 64]);
        sim.store(Agent(1), PmemOff(0), &[2; 64]);
        sim.store(Agent(1), PmemOff(128), &[3; 64]);
        let image = ImagePmem::new(sim.durable_image());
        image.mark();
        let lazy = LazyPmem::new(image.clone(), &sim.pending_words());
        let mut seen = BTreeSet::new();
        let mut runs = 0;
        loop {
            runs += 1;
            let mut first = [0; 16];
            lazy.read(PmemOff(0), &mut first).unwrap();
            let mut other = [0; 8];
            if first[0] == 2 {
                // Reads on only then: otherwise it does not care.
                lazy.read(PmemOff(132), &mut other[..4]).unwrap();
            }
            assert!(seen.insert((first, other)), "a state came twice");
            if !lazy.next_run() {
                break;
            }
        }
        // Two words of three values each; the third, of two, matters in a third of them.
        assert_eq!(runs, 9 + 3);
        assert_eq!(image.bytes(), sim.durable_image());
    }
}
