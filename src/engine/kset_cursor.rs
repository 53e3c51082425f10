//! Going through the ksets of a segment, while the cache is in use.

use super::cache::Cache;
use crate::media::{KEYS_START_BYTES, Key, Kset, KsetContext, KsetError, KsetReader};
use crate::pmem::Pmem;
use crate::units::{Generation, SegId};

/// Of what follows a kset so much is asked for when it is read: the ksets of two batches of 32 writes. More would push
/// out of the CPU's cache what is at work there.
const AHEAD_BYTES: u64 = 2048;

/// The kset that is to be read next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KsetCursor {
    pub(crate) off: u32,
    pub(crate) kset_index: u32,
    /// Of the segment when its first kset was looked for: what comes after it is not in this one's way.
    pub(crate) generation: Generation,
}

impl KsetCursor {
    /// The first kset of a segment.
    pub(crate) fn start(generation: Generation) -> Self {
        Self {
            off: KEYS_START_BYTES,
            kset_index: 0,
            generation,
        }
    }

    /// Reads the kset, pushes its keys on `keys`, and goes on to the next one. That one is asked for: until it is read,
    /// the keys of this one are gone through.
    ///
    /// # Errors
    /// There is no such kset; the cursor and `keys` are as they were.
    pub(crate) fn read<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        segment: SegId,
        reader: &mut KsetReader,
        keys: &mut Vec<Key>,
    ) -> Result<Kset, KsetError> {
        let (geometry, block_count) = (&cache.geometry, cache.block_count());
        let checksums = &cache.checksums;
        let context = KsetContext::new(geometry, block_count, checksums, segment, self.generation);
        let kset = reader.read(&cache.pmem, &context, self.off, self.kset_index, keys)?;
        self.off += kset.size_bytes;
        self.kset_index += 1;
        let left_bytes = cache
            .segments
            .get(segment)
            .key_end()
            .saturating_sub(self.off);
        let next = geometry.segment_off(segment).plus(u64::from(self.off));
        cache
            .pmem
            .prefetch(next, AHEAD_BYTES.min(u64::from(left_bytes)));
        Ok(kset)
    }
}
