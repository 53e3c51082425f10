//! A cache device that is only ever recovered from: bytes, without the model of what is pending. Much
//! cheaper than `SimPmem`, for the many images of a crash enumeration.

use super::prng::mix;
use crate::pmem::{Durable, IovCursor, MemSlice, Pmem, Poisoned, bounds, simulated_fence};
use crate::units::{Agent, PmemOff};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// See the module. A clone is another handle to the same bytes.
#[derive(Clone, Debug)]
pub struct ImagePmem {
    len_bytes: u64,
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl ImagePmem {
    /// A device that holds `bytes`.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            len_bytes: bytes.len() as u64,
            bytes: Arc::new(Mutex::new(bytes)),
        }
    }

    /// Lets `f` look at the bytes, or change them.
    pub fn with_bytes<R>(&self, f: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        f(&mut self.bytes())
    }

    /// A number that tells one content from another.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let words = self.bytes();
        let words = words.as_chunks::<8>().0.iter();
        words.fold(0, |hash, word| mix(hash, u64::from_le_bytes(*word)))
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pmem for ImagePmem {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read(&self, off: PmemOff, buf: &mut [u8]) -> Result<(), Poisoned> {
        let at = bounds::range_at(off, buf.len() as u64, self.len_bytes);
        buf.copy_from_slice(&self.bytes()[at..at + buf.len()]);
        Ok(())
    }

    fn read_to(&self, off: PmemOff, dst: &mut IovCursor, len_bytes: u64) -> Result<(), Poisoned> {
        let at = bounds::range_at(off, len_bytes, self.len_bytes);
        dst.write_from(&self.bytes()[at..at + len_bytes as usize]);
        Ok(())
    }

    fn store(&self, _agent: Agent, off: PmemOff, bytes: &[u8]) {
        let at = bounds::lines_at(off, bytes.len() as u64, self.len_bytes);
        self.bytes()[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn store_from(&self, _agent: Agent, off: PmemOff, src: &mut IovCursor, len_bytes: u64) {
        let at = bounds::lines_at(off, len_bytes, self.len_bytes);
        src.read_into(&mut self.bytes()[at..at + len_bytes as usize]);
    }

    fn store_from_crc(
        &self,
        agent: Agent,
        off: PmemOff,
        src: &mut IovCursor,
        len_bytes: u64,
        seed: u32,
    ) -> u32 {
        self.store_from(agent, off, src, len_bytes);
        let at = off.0 as usize;
        crc32c::crc32c_append(seed, &self.bytes()[at..at + len_bytes as usize])
    }

    fn fence(&self, _agent: Agent) -> Durable {
        simulated_fence()
    }

    fn slice(&self, _off: PmemOff, _len_bytes: u64) -> MemSlice {
        unreachable!("nothing is written back from an image")
    }

    fn prefetch(&self, _off: PmemOff) {}
}
