//! Simulated persistent memory: a heap region that knows which of its words a power cut could still take
//! back.
//!
//! The rules (x86-64 with non-temporal stores; the strictest reading of the manuals):
//!
//! - A store changes what readers see at once. It is *pending* until **the same agent** fences; a fence of
//!   another agent does nothing for it.
//! - At a power cut each pending word (8 bytes, aligned) keeps, independently of all others, the durable
//!   value or any value that a pending store gave to it.
//! - Within a word, stores arrive in program order: when a store is fenced, all before it are overwritten.
//!
//! An enumerator of crash states sets [`SimPmem::on_crash_point`] and, each time it is called, builds images
//! with [`SimState::crash_image_into`] and recovers from [`SimPmem::from_image`] of each. The points are
//! before each fence; a state in between is a subset of one of those, except that the set of acknowledged
//! writes differs, so an enumerator also looks (with [`SimPmem::with_state`]) at each acknowledgement.

#![forbid(unsafe_code)]

mod kill;
mod state;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::pmem::{
    Durable, IovCursor, LINE_SIZE_BYTES, MemSlice, Pmem, PmemRead, Poisoned, bounds,
    simulated_fence,
};
use crate::sched;
use crate::sim::tracing::PmemOp;
use crate::units::{Agent, PmemOff};

pub use state::{
    LineStore, NotDurable, OverlapLint, PendingLine, PendingWord, PersistenceModel, PmemCounters,
    PoisonedStore, SimState, WORD_SIZE_BYTES, WordVersion,
};

/// [`Pmem::bytes_checksummed_per_fence`] of whatever is simulated, or compared with that, unless it is set: of what the simulator does
/// some is less, and some more.
pub const BYTES_CHECKSUMMED_PER_FENCE: u64 = 4096;

/// What is about to happen when an enumerator should look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashPoint {
    /// A fence of this agent, which has not taken effect.
    Fence(Agent),
    /// A store, which has not taken effect. Under [`PersistenceModel::Eadr`] only, where no fence changes
    /// anything.
    Store(Agent),
}

/// Called with the state at a crash point. It must not use the same [`SimPmem`].
pub type CrashPointHook = Box<dyn FnMut(&SimState, CrashPoint) + Send>;

struct Inner {
    len_bytes: u64,
    state: Mutex<SimState>,
    hook: Mutex<Option<CrashPointHook>>,
}

/// A simulated cache device. A clone is another handle to the same device, so that a test can keep one.
///
/// Any thread may use it; each operation takes a lock.
#[derive(Clone)]
pub struct SimPmem(Arc<Inner>);

impl fmt::Debug for SimPmem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimPmem")
            .field("len_bytes", &self.0.len_bytes)
            .finish_non_exhaustive()
    }
}

impl SimPmem {
    /// A device of `len_bytes` durable zeroes.
    ///
    /// # Panics
    /// The length is not a multiple of a line.
    #[must_use]
    pub fn new(len_bytes: u64) -> Self {
        Self::from_image(vec![0; len_bytes as usize])
    }

    /// A device that holds `image`, durable: what a machine finds after its start.
    ///
    /// # Panics
    /// The length is not a multiple of a line.
    #[must_use]
    pub fn from_image(image: Vec<u8>) -> Self {
        let len_bytes = image.len() as u64;
        assert!(
            len_bytes.is_multiple_of(LINE_SIZE_BYTES),
            "a device consists of whole lines"
        );
        let state = Mutex::new(SimState::new(image));
        Self(Arc::new(Inner {
            len_bytes,
            state,
            hook: Mutex::new(None),
        }))
    }

    /// Calls `f` with the state as it is now. `f` must not use this device.
    pub fn with_state<R>(&self, f: impl FnOnce(&SimState) -> R) -> R {
        f(&self.state())
    }

    /// Calls `hook` at every crash point from now on; `None` ends that.
    pub fn on_crash_point(&self, hook: Option<CrashPointHook>) {
        *self.hook() = hook;
    }

    /// Sets how far stores get by themselves. Before the first store.
    pub fn set_model(&self, model: PersistenceModel) {
        self.state().model = model;
    }

    /// Sets what a store to another agent's pending line does.
    pub fn set_overlap_lint(&self, lint: OverlapLint) {
        self.state().overlap_lint = lint;
    }

    /// Sets what becomes of a store to poisoned memory.
    pub fn set_poisoned_store(&self, what: PoisonedStore) {
        self.state().poisoned_store = what;
    }

    /// Sets how fast checksums are. Before it is opened.
    pub fn set_bytes_checksummed_per_fence(&self, bytes: u64) {
        self.state().bytes_checksummed_per_fence = bytes;
    }

    /// A copy of [`SimState::durable`].
    #[must_use]
    pub fn durable_image(&self) -> Vec<u8> {
        self.state().durable().to_vec()
    }

    /// See [`SimState::live_image`].
    #[must_use]
    pub fn live_image(&self) -> Vec<u8> {
        self.state().live_image()
    }

    /// See [`SimState::pending_words`].
    #[must_use]
    pub fn pending_words(&self) -> Vec<PendingWord> {
        self.state().pending_words()
    }

    /// See [`SimState::pending_lines`].
    #[must_use]
    pub fn pending_lines(&self) -> Vec<PendingLine> {
        self.state().pending_lines()
    }

    /// See [`SimState::crash_image`].
    #[must_use]
    pub fn crash_image(&self, choose: impl FnMut(usize, usize) -> usize) -> Vec<u8> {
        self.state().crash_image(choose)
    }

    /// See [`SimState::check_durable`].
    ///
    /// # Errors
    /// A word of the range is pending.
    pub fn check_durable(&self, off: PmemOff, len_bytes: u64) -> Result<(), NotDurable> {
        self.state().check_durable(off, len_bytes)
    }

    /// For the moment of an acknowledgement.
    ///
    /// # Panics
    /// A word of the range is pending.
    #[track_caller]
    pub fn assert_durable(&self, off: PmemOff, len_bytes: u64) {
        if let Err(error) = self.check_durable(off, len_bytes) {
            panic!("acknowledged too early: {error}");
        }
    }

    /// Makes the line around `off` unreadable, until it is healed. Stores to it do not heal it.
    pub fn poison(&self, off: PmemOff) {
        bounds::range_at(off, 1, self.0.len_bytes);
        self.state().poison(off);
    }

    /// Makes the line around `off` readable again.
    pub fn heal(&self, off: PmemOff) {
        self.state().heal(off);
    }

    /// Flips bit `bit` (0 to 7) of the byte at `off`, whichever of its versions survives.
    ///
    /// # Panics
    /// `off` lies outside of the region, or `bit` is no bit of a byte.
    pub fn flip_bit(&self, off: PmemOff, bit: u32) {
        bounds::range_at(off, 1, self.0.len_bytes);
        assert!(bit < u8::BITS, "a byte has no bit {bit}");
        self.state().flip_bit(off, bit);
    }

    /// See [`SimState::counters`].
    #[must_use]
    pub fn counters(&self) -> PmemCounters {
        self.state().counters()
    }

    /// Records stores and fences from now on.
    pub fn start_log(&self) {
        self.state().log = Some(Vec::new());
    }

    /// What was recorded since [`SimPmem::start_log`]; ends the recording.
    #[must_use]
    pub fn take_log(&self) -> Vec<PmemOp> {
        self.state().log.take().unwrap_or_default()
    }

    // A test that panics in a hook may still look at the device while it unwinds.
    fn state(&self) -> MutexGuard<'_, SimState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hook(&self) -> MutexGuard<'_, Option<CrashPointHook>> {
        self.0.hook.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the state to the enumerator, then changes it, with nothing in between.
    fn after_crash_point(&self, point: Option<CrashPoint>, change: impl FnOnce(&mut SimState)) {
        let mut hook = self.hook();
        let mut state = self.state();
        if let (Some(hook), Some(point)) = (hook.as_mut(), point) {
            hook(&state, point);
        }
        change(&mut state);
    }

    fn readable(&self, off: PmemOff, len_bytes: u64) -> Result<usize, Poisoned> {
        let at = bounds::range_at(off, len_bytes, self.0.len_bytes);
        let mut state = self.state();
        match state.first_poisoned(off, len_bytes) {
            None => Ok(at),
            Some(at) => {
                state.counters.failed_loads += 1;
                Err(Poisoned { at })
            }
        }
    }
}

impl PmemRead for SimPmem {
    fn len_bytes(&self) -> u64 {
        self.0.len_bytes
    }

    fn read(&self, off: PmemOff, buf: &mut [u8]) -> Result<(), Poisoned> {
        sched::point();
        let at = self.readable(off, buf.len() as u64)?;
        self.state().live().read(at, buf);
        Ok(())
    }

    /// A mapping looks at one line of each page, too, and misses what is wrong beside it.
    fn look_at(&self, off: PmemOff) -> Result<(), Poisoned> {
        self.readable(off, 1).map(|_| ())
    }
}

impl Pmem for SimPmem {
    fn read_to(&self, off: PmemOff, dst: &mut IovCursor, len_bytes: u64) -> Result<(), Poisoned> {
        sched::point();
        let at = self.readable(off, len_bytes)?;
        self.state().live().read_to(at, dst, len_bytes as usize);
        Ok(())
    }

    fn store(&self, agent: Agent, off: PmemOff, bytes: &[u8]) {
        sched::point();
        let at = bounds::lines_at(off, bytes.len() as u64, self.0.len_bytes);
        let in_order = self.state().model == PersistenceModel::Eadr;
        let point = in_order.then_some(CrashPoint::Store(agent));
        self.after_crash_point(point, |state| state.store(agent, at, bytes));
    }

    fn store_from(&self, agent: Agent, off: PmemOff, src: &mut IovCursor, len_bytes: u64) {
        bounds::lines_at(off, len_bytes, self.0.len_bytes);
        let mut bytes = vec![0; len_bytes as usize];
        src.read_into(&mut bytes);
        self.store(agent, off, &bytes);
    }

    fn store_from_crc(
        &self,
        agent: Agent,
        off: PmemOff,
        src: &mut IovCursor,
        len_bytes: u64,
        seed: u32,
    ) -> u32 {
        bounds::lines_at(off, len_bytes, self.0.len_bytes);
        let mut bytes = vec![0; len_bytes as usize];
        src.read_into(&mut bytes);
        self.store(agent, off, &bytes);
        crc32c::crc32c_append(seed, &bytes)
    }

    fn bytes_checksummed_per_fence(&self) -> u64 {
        self.state().bytes_checksummed_per_fence
    }

    fn assert_stores_taken(&self) {
        self.state().assert_stores_taken();
    }

    fn fence(&self, agent: Agent) -> Durable {
        sched::point();
        self.after_crash_point(Some(CrashPoint::Fence(agent)), |state| state.fence(agent));
        simulated_fence()
    }

    fn slice(&self, off: PmemOff, len_bytes: u64) -> MemSlice {
        let at = bounds::range_at(off, len_bytes, self.0.len_bytes);
        self.state().live().slice(at, len_bytes as usize)
    }

    fn prefetch(&self, off: PmemOff, len_bytes: u64) {
        bounds::range_at(off, len_bytes, self.0.len_bytes);
    }
}

#[cfg(test)]
mod tests;
