//! The model behind the simulated persistent memory: what is durable, what is pending, and which images a
//! power cut can leave.

use std::collections::{BTreeMap, BTreeSet};

use crate::pmem::{HeapRegion, LINE_SIZE_BYTES};
use crate::sim::tracing::PmemOp;
use crate::units::{Agent, PmemOff};

use super::BYTES_CHECKSUMMED_PER_FENCE;
use super::kill::DEAD;

const LINE: usize = LINE_SIZE_BYTES as usize;
/// Size of a word: what the hardware stores or loses as a whole.
pub const WORD_SIZE_BYTES: usize = 8;

/// How far a store gets by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PersistenceModel {
    /// A store is pending until its agent fences. Any subset of pending words may survive a power cut.
    #[default]
    Adr,
    /// A store is durable at once and in program order (the caches survive a power cut too).
    Eadr,
}

/// What to do when an agent stores to a line in which another agent's store is pending: which of both will
/// survive is then undefined, so no correct design does it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OverlapLint {
    /// Panic.
    #[default]
    Panic,
    /// Count it in [`PmemCounters::foreign_overlaps`].
    Count,
}

/// What becomes of a store to poisoned memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PoisonedStore {
    /// It is as any other, and heals nothing.
    #[default]
    Kept,
    /// It faults, and the next fence panics, as that of a mapping does (INV-PMEM-4).
    Faults,
}

/// A store to one line that is not durable yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineStore {
    /// Who stored.
    pub agent: Agent,
    /// Number of the store in the order of all stores to the region. Lines of one store share it.
    pub order: u64,
    /// The whole line as stored.
    pub bytes: [u8; LINE],
}

/// A line with pending stores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingLine {
    /// Where the line begins.
    pub off: PmemOff,
    /// In program order.
    pub stores: Vec<LineStore>,
}

/// A value that a pending store gave to a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WordVersion {
    /// Who stored it.
    pub agent: Agent,
    /// The bytes as they lie in memory.
    pub bytes: [u8; WORD_SIZE_BYTES],
}

/// A word that may come out of a power cut with more than one value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingWord {
    /// Where the word begins.
    pub off: PmemOff,
    /// The values that it may have apart from the durable one, in program order: each once, and none equal
    /// to the durable one. Not empty.
    pub versions: Vec<WordVersion>,
}

impl PendingWord {
    /// The number of values that the word may have: choice 0 is the durable one, choice `n` the version
    /// `n - 1`.
    #[must_use]
    pub fn choice_count(&self) -> usize {
        self.versions.len() + 1
    }
}

/// How often what was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PmemCounters {
    /// Stores.
    pub stores: u64,
    /// Bytes stored.
    pub stored_bytes: u64,
    /// Fences.
    pub fences: u64,
    /// Fences of an agent that had nothing pending: time wasted.
    pub idle_fences: u64,
    /// See [`OverlapLint`].
    pub foreign_overlaps: u64,
    /// Loads of lost memory.
    pub failed_loads: u64,
}

/// A covered word is pending where it should be durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at} holds a store of {agent:?} that is not fenced")]
pub struct NotDurable {
    /// The first such word.
    pub at: PmemOff,
    /// Who stored it.
    pub agent: Agent,
}

/// The state of a simulated cache device at one moment.
#[derive(Debug)]
pub struct SimState {
    durable: Vec<u8>,
    live: HeapRegion,
    /// By line number. A line is there only if it has stores.
    pending: BTreeMap<u64, Vec<LineStore>>,
    /// The lines that each agent has stored to since its last fence; one may occur twice.
    unfenced: BTreeMap<Agent, Vec<u64>>,
    poisoned: BTreeSet<u64>,
    pub(super) poisoned_store: PoisonedStore,
    pub(super) bytes_checksummed_per_fence: u64,
    /// Where a store has faulted.
    lost_at: Option<PmemOff>,
    store_order: u64,
    pub(super) model: PersistenceModel,
    pub(super) overlap_lint: OverlapLint,
    pub(super) counters: PmemCounters,
    pub(super) log: Option<Vec<PmemOp>>,
}

impl SimState {
    pub(super) fn new(image: Vec<u8>) -> Self {
        let mut live = HeapRegion::new(image.len());
        live.write(0, &image);
        Self {
            durable: image,
            live,
            pending: BTreeMap::new(),
            unfenced: BTreeMap::new(),
            poisoned: BTreeSet::new(),
            poisoned_store: PoisonedStore::default(),
            bytes_checksummed_per_fence: BYTES_CHECKSUMMED_PER_FENCE,
            lost_at: None,
            store_order: 0,
            model: PersistenceModel::default(),
            overlap_lint: OverlapLint::default(),
            counters: PmemCounters::default(),
            log: None,
        }
    }

    /// What is sure to survive: the image after a power cut that loses everything pending.
    #[must_use]
    pub fn durable(&self) -> &[u8] {
        &self.durable
    }

    /// What a reader sees: the image after the death of the process without a power cut.
    #[must_use]
    pub fn live_image(&self) -> Vec<u8> {
        let mut image = vec![0; self.durable.len()];
        self.live.read(0, &mut image);
        image
    }

    pub(super) fn live(&self) -> &HeapRegion {
        &self.live
    }

    /// What has happened so far.
    #[must_use]
    pub fn counters(&self) -> PmemCounters {
        self.counters
    }

    /// The lines with pending stores, by offset, each with its stores in program order: for enumerating
    /// whole lines and prefixes of lines.
    #[must_use]
    pub fn pending_lines(&self) -> Vec<PendingLine> {
        let line = |(line, stores): (&u64, &Vec<LineStore>)| PendingLine {
            off: PmemOff(line * LINE_SIZE_BYTES),
            stores: stores.clone(),
        };
        self.pending.iter().map(line).collect()
    }

    /// The words that a power cut may leave with another value than the durable one, by offset. Any
    /// combination of their choices is a possible image.
    #[must_use]
    pub fn pending_words(&self) -> Vec<PendingWord> {
        let mut words = Vec::new();
        for (line, stores) in &self.pending {
            for at in (0..LINE).step_by(WORD_SIZE_BYTES) {
                let off = line * LINE_SIZE_BYTES + at as u64;
                let old = word_of(&self.durable, off as usize);
                let mut versions: Vec<WordVersion> = Vec::new();
                for store in stores {
                    let bytes = word_of(&store.bytes, at);
                    if bytes != old && versions.iter().all(|version| version.bytes != bytes) {
                        versions.push(WordVersion {
                            agent: store.agent,
                            bytes,
                        });
                    }
                }
                if !versions.is_empty() {
                    words.push(PendingWord {
                        off: PmemOff(off),
                        versions,
                    });
                }
            }
        }
        words
    }

    /// A possible image after a power cut now. `choose` is called with the index into
    /// [`SimState::pending_words`] and the number of choices of that word, and returns one.
    ///
    /// # Panics
    /// `choose` returns something else.
    #[must_use]
    pub fn crash_image(&self, mut choose: impl FnMut(usize, usize) -> usize) -> Vec<u8> {
        let mut image = Vec::new();
        self.crash_image_into(&self.pending_words(), &mut choose, &mut image);
        image
    }

    /// As [`SimState::crash_image`] for many images of one state: `words` is [`SimState::pending_words`],
    /// asked for once, and `image` is overwritten.
    ///
    /// # Panics
    /// `choose` returns no choice of its word.
    pub fn crash_image_into(
        &self,
        words: &[PendingWord],
        mut choose: impl FnMut(usize, usize) -> usize,
        image: &mut Vec<u8>,
    ) {
        image.clear();
        image.extend_from_slice(&self.durable);
        for (index, word) in words.iter().enumerate() {
            let choice = choose(index, word.choice_count());
            assert!(
                choice < word.choice_count(),
                "word {index} has no choice {choice}"
            );
            if choice > 0 {
                let at = word.off.0 as usize;
                let bytes = word.versions[choice - 1].bytes;
                image[at..at + WORD_SIZE_BYTES].copy_from_slice(&bytes);
            }
        }
    }

    /// Whether everything stored to a range is durable.
    ///
    /// # Errors
    /// It is not.
    pub fn check_durable(&self, off: PmemOff, len_bytes: u64) -> Result<(), NotDurable> {
        let end = off.0 + len_bytes;
        let lines = off.0 / LINE_SIZE_BYTES..end.div_ceil(LINE_SIZE_BYTES);
        for (line, stores) in self.pending.range(lines) {
            let word_size = WORD_SIZE_BYTES as u64;
            let start = line * LINE_SIZE_BYTES;
            let first = off.0.max(start) / word_size * word_size;
            for at in (first..end.min(start + LINE_SIZE_BYTES)).step_by(WORD_SIZE_BYTES) {
                let old = word_of(&self.durable, at as usize);
                let pending =
                    |store: &&LineStore| word_of(&store.bytes, (at - start) as usize) != old;
                if let Some(store) = stores.iter().find(pending) {
                    return Err(NotDurable {
                        at: PmemOff(at),
                        agent: store.agent,
                    });
                }
            }
        }
        Ok(())
    }

    /// The first line that `agent` has stored to since its last fence.
    #[must_use]
    pub fn first_unfenced(&self, agent: Agent) -> Option<PmemOff> {
        let line = self.unfenced.get(&agent)?.first()?;
        Some(PmemOff(line * LINE_SIZE_BYTES))
    }

    /// The first poisoned line that a range touches.
    #[must_use]
    pub fn first_poisoned(&self, off: PmemOff, len_bytes: u64) -> Option<PmemOff> {
        let end = (off.0 + len_bytes).div_ceil(LINE_SIZE_BYTES);
        let line = self.poisoned.range(off.0 / LINE_SIZE_BYTES..end).next()?;
        Some(PmemOff(line * LINE_SIZE_BYTES))
    }

    pub(super) fn poison(&mut self, off: PmemOff) {
        self.poisoned.insert(off.0 / LINE_SIZE_BYTES);
    }

    pub(super) fn heal(&mut self, off: PmemOff) {
        self.poisoned.remove(&(off.0 / LINE_SIZE_BYTES));
    }

    /// Flips a bit in every version of a byte, pending ones included.
    pub(super) fn flip_bit(&mut self, off: PmemOff, bit: u32) {
        let at = off.0 as usize;
        let mask = 1u8 << bit;
        self.durable[at] ^= mask;
        let mut byte = [0];
        self.live.read(at, &mut byte);
        self.live.write(at, &[byte[0] ^ mask]);
        for store in self
            .pending
            .get_mut(&(off.0 / LINE_SIZE_BYTES))
            .into_iter()
            .flatten()
        {
            store.bytes[at % LINE] ^= mask;
        }
    }

    /// `at` and the length have been checked to be whole lines of the region.
    pub(super) fn store(&mut self, agent: Agent, at: usize, bytes: &[u8]) {
        self.counters.stores += 1;
        self.counters.stored_bytes += bytes.len() as u64;
        if let Some(log) = &mut self.log {
            log.push(PmemOp::Store {
                agent,
                off: PmemOff(at as u64),
                bytes: bytes.to_vec(),
            });
        }
        let poisoned = self.first_poisoned(PmemOff(at as u64), bytes.len() as u64);
        if poisoned.is_some() && self.poisoned_store == PoisonedStore::Faults {
            self.lost_at = self.lost_at.or(poisoned);
            return;
        }
        self.live.write(at, bytes);
        if self.model == PersistenceModel::Eadr {
            self.durable[at..at + bytes.len()].copy_from_slice(bytes);
            return;
        }
        self.store_order += 1;
        let order = self.store_order;
        let first = (at / LINE) as u64;
        for (line, chunk) in (first..).zip(bytes.as_chunks::<LINE>().0) {
            let stores = self.pending.entry(line).or_default();
            if let Some(other) = stores
                .iter()
                .find(|store| ![agent, DEAD].contains(&store.agent))
            {
                self.counters.foreign_overlaps += 1;
                assert!(
                    self.overlap_lint == OverlapLint::Count,
                    "INV-PMEM-3: {agent:?} stores to {} while a store of {:?} to it is pending",
                    PmemOff(line * LINE_SIZE_BYTES),
                    other.agent
                );
            }
            stores.push(LineStore {
                agent,
                order,
                bytes: *chunk,
            });
            self.unfenced.entry(agent).or_default().push(line);
        }
    }

    /// # Panics
    /// A store has faulted.
    pub(super) fn assert_stores_taken(&self) {
        if let Some(at) = self.lost_at {
            panic!("INV-PMEM-4: the cache device has not taken a store at {at}");
        }
    }

    /// Makes durable what `agent` has stored, and of each line what it overwrote.
    ///
    /// # Panics
    /// A store has faulted.
    pub(super) fn fence(&mut self, agent: Agent) {
        self.assert_stores_taken();
        self.counters.fences += 1;
        if let Some(log) = &mut self.log {
            log.push(PmemOp::Fence { agent });
        }
        let lines = self.unfenced.remove(&agent).unwrap_or_default();
        self.counters.idle_fences += u64::from(lines.is_empty());
        for line in lines {
            let Some(stores) = self.pending.get_mut(&line) else {
                continue;
            };
            // The agent's last store has arrived, so whatever came before it in the line is overwritten,
            // whoever stored it; what came after it stays pending.
            let Some(last) = stores.iter().rposition(|store| store.agent == agent) else {
                continue;
            };
            let at = line as usize * LINE;
            self.durable[at..at + LINE].copy_from_slice(&stores[last].bytes);
            stores.drain(..=last);
            if stores.is_empty() {
                self.pending.remove(&line);
            }
        }
    }
}

fn word_of(bytes: &[u8], at: usize) -> [u8; WORD_SIZE_BYTES] {
    let mut word = [0; WORD_SIZE_BYTES];
    word.copy_from_slice(&bytes[at..at + WORD_SIZE_BYTES]);
    word
}
