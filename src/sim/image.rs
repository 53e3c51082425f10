//! A cache device that is only ever recovered from: bytes, without the model of what is pending. Much
//! cheaper than `SimPmem`, for the many images of a crash enumeration.

use crate::pmem::{
    Durable, IovCursor, MemSlice, Pmem, PmemRead, Poisoned, bounds, simulated_fence,
};
use crate::sim::pmem::BYTES_CHECKSUMMED_PER_FENCE;
use crate::units::{Agent, PmemOff};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// See the module. A clone is another handle to the same bytes.
#[derive(Clone, Debug)]
pub struct ImagePmem {
    len_bytes: u64,
    content: Arc<Mutex<Content>>,
}

#[derive(Debug)]
struct Content {
    bytes: Vec<u8>,
    /// What was overwritten since [`ImagePmem::mark`]: where, how much; and the bytes, one behind the other.
    overwritten: Vec<(usize, usize)>,
    old_bytes: Vec<u8>,
    marked: bool,
}

impl Content {
    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.keep(at, bytes.len());
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn keep(&mut self, at: usize, len: usize) {
        if self.marked {
            self.overwritten.push((at, len));
            self.old_bytes.extend_from_slice(&self.bytes[at..at + len]);
        }
    }
}

impl ImagePmem {
    /// A device that holds `bytes`.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            len_bytes: bytes.len() as u64,
            content: Arc::new(Mutex::new(Content {
                bytes,
                overwritten: Vec::new(),
                old_bytes: Vec::new(),
                marked: false,
            })),
        }
    }

    /// A copy of the bytes.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.content().bytes.clone()
    }

    /// Holds `bytes` from now on, and forgets its mark.
    ///
    /// # Panics
    /// They are more or fewer than the device has.
    pub fn load(&self, bytes: &[u8]) {
        let mut content = self.content();
        content.bytes.copy_from_slice(bytes);
        content.marked = false;
        content.overwritten.clear();
        content.old_bytes.clear();
    }

    /// Writes, as nobody's store.
    pub fn patch(&self, off: PmemOff, bytes: &[u8]) {
        let at = bounds::range_at(off, bytes.len() as u64, self.len_bytes);
        self.content().write(at, bytes);
    }

    /// What is written from now on can be taken back.
    pub fn mark(&self) {
        let mut content = self.content();
        content.marked = true;
        content.overwritten.clear();
        content.old_bytes.clear();
    }

    /// Writes since the mark.
    #[must_use]
    pub fn writes_since_mark(&self) -> usize {
        self.content().overwritten.len()
    }

    /// Takes back everything that was written since the mark.
    pub fn roll_back(&self) {
        let content = &mut *self.content();
        let mut end = content.old_bytes.len();
        while let Some((at, len)) = content.overwritten.pop() {
            content.bytes[at..at + len].copy_from_slice(&content.old_bytes[end - len..end]);
            end -= len;
        }
        content.old_bytes.clear();
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PmemRead for ImagePmem {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read(&self, off: PmemOff, buf: &mut [u8]) -> Result<(), Poisoned> {
        let at = bounds::range_at(off, buf.len() as u64, self.len_bytes);
        buf.copy_from_slice(&self.content().bytes[at..at + buf.len()]);
        Ok(())
    }
}

impl Pmem for ImagePmem {
    fn read_to(&self, off: PmemOff, dst: &mut IovCursor, len_bytes: u64) -> Result<(), Poisoned> {
        let at = bounds::range_at(off, len_bytes, self.len_bytes);
        dst.write_from(&self.content().bytes[at..at + len_bytes as usize]);
        Ok(())
    }

    fn store(&self, _agent: Agent, off: PmemOff, bytes: &[u8]) {
        let at = bounds::lines_at(off, bytes.len() as u64, self.len_bytes);
        self.content().write(at, bytes);
    }

    fn store_from(&self, _agent: Agent, off: PmemOff, src: &mut IovCursor, len_bytes: u64) {
        let at = bounds::lines_at(off, len_bytes, self.len_bytes);
        let mut content = self.content();
        content.keep(at, len_bytes as usize);
        src.read_into(&mut content.bytes[at..at + len_bytes as usize]);
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
        crc32c::crc32c_append(seed, &self.content().bytes[at..at + len_bytes as usize])
    }

    fn bytes_checksummed_per_fence(&self) -> u64 {
        BYTES_CHECKSUMMED_PER_FENCE
    }

    fn assert_stores_taken(&self) {}

    fn fence(&self, _agent: Agent) -> Durable {
        simulated_fence()
    }

    fn slice(&self, _off: PmemOff, _len_bytes: u64) -> MemSlice {
        unreachable!("nothing is written back from an image")
    }

    fn prefetch(&self, _off: PmemOff, _len_bytes: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_since_the_mark_can_be_taken_back() {
        let image = ImagePmem::new((0..=255).cycle().take(1 << 12).collect());
        let before = image.bytes();
        image.patch(PmemOff(100), &[1, 2, 3]);
        let patched = image.bytes();
        image.mark();
        for number in 0..4 {
            image.store(Agent(0), PmemOff(64 * number), &[number as u8; 128]);
        }
        image.patch(PmemOff(3), &[9]);
        assert_eq!(image.writes_since_mark(), 5);
        image.roll_back();
        assert_eq!(image.bytes(), patched);
        image.load(&before);
        assert_eq!(image.bytes(), before);
    }
}
