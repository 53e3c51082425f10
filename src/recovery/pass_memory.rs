//! What a pass over all segments needs that grows with the cache, and then the cache: there before anything is stored to the
//! device (INV-OPEN-7).

use super::error::OpenError;
use super::opening::base_page_count;
use super::pass::FoundSegment;
use super::seqs::SeqSet;
use super::waiting::WaitingParts;
use crate::engine::{CacheMemory, DataCrc, PlaceCrcs};
use crate::index::{Index, Newest};
use crate::media::Superblock;
use crate::memory::{self, NoMemory};
use std::sync::{Mutex, OnceLock};

/// What has become of each segment; of one that nobody has gone through, nothing.
pub(super) type FoundTable = Vec<OnceLock<Result<FoundSegment, OpenError>>>;

/// See the module.
#[derive(Debug)]
pub(super) struct PassMemory {
    pub(super) index: Index,
    /// The index is so many times as large as the cache device has room for.
    pub(super) index_factor: u64,
    pub(super) newest: Newest,
    /// Of the keys that are found, if they have checksums.
    pub(super) place_crcs: Option<PlaceCrcs>,
    pub(super) seqs: SeqSet,
    pub(super) found: FoundTable,
    /// For what was found, once that is everything.
    pub(super) segments: Vec<FoundSegment>,
    /// For the first worker; others have to ask for it.
    pub(super) waiting: Mutex<Option<WaitingParts>>,
    pub(super) cache: CacheMemory,
}

impl PassMemory {
    /// For the first pass.
    pub(super) fn new(superblock: &Superblock) -> Result<Self, NoMemory> {
        Self::again(superblock, 1, CacheMemory::new(&superblock.geometry)?)
    }

    /// For another one; what the cache needs is there.
    pub(super) fn again(
        superblock: &Superblock,
        index_factor: u64,
        cache: CacheMemory,
    ) -> Result<Self, NoMemory> {
        let geometry = &superblock.geometry;
        let index = Index::new(*geometry, base_page_count(superblock), index_factor)?;
        let newest = Newest::new(&index)?;
        let place_crcs = (superblock.data_crc == DataCrc::On).then(|| PlaceCrcs::new(geometry));
        let what = "what recovery finds in the segments";
        let segment_count = geometry.segment_count() as usize;
        Ok(Self {
            index,
            index_factor,
            place_crcs: place_crcs.transpose()?,
            seqs: SeqSet::new(geometry)?,
            found: memory::filled(what, segment_count, OnceLock::new)?,
            segments: memory::with_room(what, segment_count)?,
            waiting: Mutex::new(Some(WaitingParts::new(&newest)?)),
            newest,
            cache,
        })
    }

    /// Gives the rest up.
    pub(super) fn into_cache(self) -> CacheMemory {
        self.cache
    }
}
