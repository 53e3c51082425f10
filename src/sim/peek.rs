//! Looks into a cache without a channel: what a read of a block would return, and from where.

use crate::engine::{Cache, Depth, Flaw, KsetCursor};
use crate::index::BlockMap;
use crate::media::{Key, KsetReader, Place};
use crate::pmem::{Pmem, Poisoned};
use crate::units::{Lba, PAGE_SIZE_BYTES, Page, SegId, Seq};

/// Where a block's content comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peek {
    /// From the cache; it is in the buffer. The base holds the same.
    Clean,
    /// From the cache; it is in the buffer. The base may hold something older.
    Dirty,
    /// From the base.
    Base,
}

impl<P: Pmem> Cache<P> {
    /// What a read of one block would return now. While nothing else runs.
    ///
    /// # Errors
    /// The cache's memory is poisoned.
    ///
    /// # Panics
    /// Somebody is changing the index.
    pub fn peek(&self, lba: Lba, block: &mut [u8]) -> Result<Peek, Poisoned> {
        let per_page = u64::from(self.geometry.blocks_per_page());
        let found = self.index.lookup(self.index.locate(Page(lba.0 / per_page)));
        let map = found.expect("nobody changes the index").map;
        match map.block((lba.0 % per_page) as u32) {
            BlockMap::Absent => Ok(Peek::Base),
            BlockMap::Zero(place) => {
                block.fill(0);
                Ok(self.cached(place))
            }
            BlockMap::Mapped(place)
                if self.is_flawed(lba, place) && self.is_clean_by_key(lba, place) =>
            {
                Ok(Peek::Base)
            }
            BlockMap::Mapped(place) => {
                self.pmem.read(self.geometry.place_off(place), block)?;
                Ok(self.cached(place))
            }
        }
    }

    /// Whether a read that is verified finds a wrong checksum.
    fn is_flawed(&self, lba: Lba, place: Place) -> bool {
        self.verifying().is_some_and(|crcs| {
            let (id, key) = self.key_at(crcs, lba, place);
            let mut payload = [0; PAGE_SIZE_BYTES as usize];
            self.check_payload(id, &key, &mut payload, Depth::Read) == Err(Flaw::Checksum)
        })
    }

    /// All keys of a segment, with the numbers of their ksets. `None`: not all of them can be read.
    pub(super) fn keys_of(&self, id: SegId) -> Option<Vec<(Seq, Key)>> {
        let segment = self.segments.get(id);
        let (mut reader, mut keys) = (KsetReader::default(), Vec::new());
        let mut next = KsetCursor::start(segment.generation());
        let mut found = Vec::new();
        while next.off < segment.key_end() {
            let kset = next.read(self, id, &mut reader, &mut keys).ok()?;
            found.extend(keys.drain(..).map(|key| (kset.seq, key)));
        }
        Some(found)
    }

    /// Whether the base holds what lies at a place that the index names for a block, by what all keys of the segment say.
    pub(super) fn is_clean_by_key(&self, lba: Lba, place: Place) -> bool {
        let id = self.geometry.segment_of(place);
        let names = |key: &Key| {
            let first = self.geometry.place(id, key.payload_off).0;
            let is_block = (key.lba.0..key.end().0).contains(&lba.0);
            key.kind.has_payload() && is_block && first + lba.0 - key.lba.0 == place.0
        };
        let keys = self.keys_of(id).unwrap_or_default();
        let key = keys.iter().find(|(_, key)| names(key));
        key.is_some_and(|(seq, key)| !key.kind.is_dirty() || *seq <= self.dirty_tail())
    }

    fn cached(&self, place: Place) -> Peek {
        if self.is_clean(place) {
            Peek::Clean
        } else {
            Peek::Dirty
        }
    }
}
