//! Neighbouring blocks of a read that come from the same source.

use crate::index::BlockMap;
use crate::media::Place;
use crate::units::Lba;

/// Neighbouring blocks that come from the same source.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) source: BlockMap,
    pub(super) lba: Lba,
    pub(super) len_blocks: u64,
}

impl Run {
    /// What lies in one piece from a place on.
    pub(super) fn mapped(lba: Lba, place: Place, len_blocks: u64) -> Self {
        Self {
            source: BlockMap::Mapped(place),
            lba,
            len_blocks,
        }
    }

    pub(super) fn continues(&self, source: BlockMap) -> bool {
        match (self.source, source) {
            (BlockMap::Mapped(first), BlockMap::Mapped(next)) => {
                first.0 + self.len_blocks == next.0
            }
            (BlockMap::Zero(_), BlockMap::Zero(_)) | (BlockMap::Absent, BlockMap::Absent) => true,
            _ => false,
        }
    }
}
