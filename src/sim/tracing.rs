//! Records what is done to a `Pmem`: to show that the real and the simulated one are driven, and behave, in
//! the same way.

#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::pmem::{Durable, IovCursor, MemSlice, Pmem, PmemRead, Poisoned};
use crate::sim::pmem::BYTES_CHECKSUMMED_PER_FENCE;
use crate::units::{Agent, PmemOff};

/// A store or a fence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PmemOp {
    /// A store, by whichever method.
    Store {
        /// Who stored.
        agent: Agent,
        /// Where.
        off: PmemOff,
        /// What.
        bytes: Vec<u8>,
    },
    /// A fence.
    Fence {
        /// Who fenced.
        agent: Agent,
    },
}

/// The record of a [`TracingPmem`], which a test keeps while the engine owns the device.
#[derive(Clone, Debug, Default)]
pub struct Trace(Arc<Mutex<Vec<PmemOp>>>);

impl Trace {
    /// All operations since the last call, in order.
    #[must_use]
    pub fn take(&self) -> Vec<PmemOp> {
        std::mem::take(&mut self.ops())
    }

    fn ops(&self) -> MutexGuard<'_, Vec<PmemOp>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Any device, with a record of its stores and fences. Allocates and locks: for tests.
#[derive(Debug)]
pub struct TracingPmem<P> {
    inner: P,
    trace: Trace,
}

impl<P: Pmem> TracingPmem<P> {
    /// Wraps `inner`.
    #[must_use]
    pub fn new(inner: P) -> Self {
        Self::with_trace(inner, &Trace::default())
    }

    /// As [`TracingPmem::new`], and goes on with a record that there is already.
    #[must_use]
    pub fn with_trace(inner: P, trace: &Trace) -> Self {
        let trace = trace.clone();
        Self { inner, trace }
    }

    /// The record.
    #[must_use]
    pub fn trace(&self) -> Trace {
        self.trace.clone()
    }

    /// The device itself.
    #[must_use]
    pub fn inner(&self) -> &P {
        &self.inner
    }

    /// Records a store from what has become of it: the caller's memory may have changed since.
    fn record_store(&self, agent: Agent, off: PmemOff, len_bytes: u64) {
        let mut bytes = vec![0; len_bytes as usize];
        self.inner
            .read(off, &mut bytes)
            .expect("a tracing test poisons no line that it stores to");
        self.trace.ops().push(PmemOp::Store { agent, off, bytes });
    }
}

impl<P: Pmem> PmemRead for TracingPmem<P> {
    fn len_bytes(&self) -> u64 {
        self.inner.len_bytes()
    }

    fn read(&self, off: PmemOff, buf: &mut [u8]) -> Result<(), Poisoned> {
        self.inner.read(off, buf)
    }
}

impl<P: Pmem> Pmem for TracingPmem<P> {
    fn read_to(&self, off: PmemOff, dst: &mut IovCursor, len_bytes: u64) -> Result<(), Poisoned> {
        self.inner.read_to(off, dst, len_bytes)
    }

    fn store(&self, agent: Agent, off: PmemOff, bytes: &[u8]) {
        self.inner.store(agent, off, bytes);
        self.record_store(agent, off, bytes.len() as u64);
    }

    fn store_from(&self, agent: Agent, off: PmemOff, src: &mut IovCursor, len_bytes: u64) {
        self.inner.store_from(agent, off, src, len_bytes);
        self.record_store(agent, off, len_bytes);
    }

    fn store_from_crc(
        &self,
        agent: Agent,
        off: PmemOff,
        src: &mut IovCursor,
        len_bytes: u64,
        seed: u32,
    ) -> u32 {
        let crc = self.inner.store_from_crc(agent, off, src, len_bytes, seed);
        self.record_store(agent, off, len_bytes);
        crc
    }

    /// As the simulated device, whichever this one is: so that the same is asked of both.
    fn bytes_checksummed_per_fence(&self) -> u64 {
        BYTES_CHECKSUMMED_PER_FENCE
    }

    fn assert_stores_taken(&self) {
        self.inner.assert_stores_taken();
    }

    fn fence(&self, agent: Agent) -> Durable {
        self.trace.ops().push(PmemOp::Fence { agent });
        self.inner.fence(agent)
    }

    fn slice(&self, off: PmemOff, len_bytes: u64) -> MemSlice {
        self.inner.slice(off, len_bytes)
    }

    fn prefetch(&self, off: PmemOff, len_bytes: u64) {
        self.inner.prefetch(off, len_bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::pmem::{Extent, IovBuf, MapRequest, MappedPmem};
    use crate::sim::pmem::{OverlapLint, SimPmem};

    const LEN_BYTES: u64 = 1 << 16;

    /// One step of a script: kind, first line, number of lines, a byte, cuts of the source.
    type Step = (u8, u64, u64, u8, Vec<usize>);

    fn run(pmem: &TracingPmem<impl Pmem>, script: &[Step]) -> Vec<u32> {
        let mut checksums = Vec::new();
        for (kind, line, lines, byte, cuts) in script {
            let (off, len) = (PmemOff(line * 64), lines * 64);
            let bytes: Vec<u8> = (0..len).map(|i| byte.wrapping_add(i as u8)).collect();
            let agent = Agent(u16::from(byte % 2));
            let buf = IovBuf::new(&bytes, cuts);
            let mut source = buf.cursor();
            match kind {
                0 => pmem.store(agent, off, &bytes),
                1 => pmem.store_from(agent, off, &mut source, len),
                2 => checksums.push(pmem.store_from_crc(agent, off, &mut source, len, 9)),
                _ => drop(pmem.fence(agent)),
            }
        }
        checksums
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn the_real_and_the_simulated_device_do_the_same(
            script in vec((0u8..5, 0u64..900, 0u64..100, any::<u8>(), vec(0usize..6400, 0..4)), 0..20)
        ) {
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let real = TracingPmem::new(MappedPmem::open(&MapRequest {
                path: dir.path().join("cache"),
                extent: Extent::File { size_bytes: LEN_BYTES },
                size_bytes_min: LEN_BYTES,
            }).unwrap());
            let sim = TracingPmem::new(SimPmem::new(LEN_BYTES));
            sim.inner().set_overlap_lint(OverlapLint::Count);
            sim.inner().start_log();
            prop_assert_eq!(run(&real, &script), run(&sim, &script));
            let ops = sim.trace().take();
            prop_assert_eq!(&real.trace().take(), &ops);
            prop_assert_eq!(sim.inner().take_log(), ops);
            let mut content = vec![0; LEN_BYTES as usize];
            real.read(PmemOff(0), &mut content).unwrap();
            prop_assert_eq!(&content, &sim.inner().live_image());
            let target = IovBuf::zeroed(LEN_BYTES as usize);
            sim.read_to(PmemOff(0), &mut target.cursor(), LEN_BYTES).unwrap();
            prop_assert_eq!(target.bytes(), content);
        }
    }
}
