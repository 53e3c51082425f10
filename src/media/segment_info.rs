//! A segment's info: its generation, and once it is sealed, how much it holds.

use super::layout::Geometry;
use super::pair::{
    COUNTER_MAX, Copies, PairError, PairHeaderOnMedia, PairRecord, load_pair, persist_pair,
};
use crate::media::Checksums;
use crate::pmem::{Durable, Pmem, PmemRead};
use crate::units::{Agent, Generation, SegId, Seq};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

const STATE_UNSEALED: u32 = 1;
const STATE_SEALED: u32 = 2;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct SegmentInfoOnMedia {
    /// `word` is the state.
    header: PairHeaderOnMedia,
    generation: U64,
    last_seq: U64,
    kset_count: U32,
    rsv: [u8; 28],
}

const _: () = assert!(size_of::<SegmentInfoOnMedia>() == crate::pmem::LINE_SIZE_BYTES as usize);

impl PairRecord for SegmentInfoOnMedia {
    fn header(&self) -> &PairHeaderOnMedia {
        &self.header
    }
    fn header_mut(&mut self) -> &mut PairHeaderOnMedia {
        &mut self.header
    }
    fn is_plausible(&self) -> bool {
        matches!(self.header.word.get(), STATE_UNSEALED | STATE_SEALED)
            && (Generation::FIRST.0..COUNTER_MAX).contains(&self.generation.get())
    }
}

/// What a sealed segment holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// Exactly so many ksets.
    pub kset_count: u32,
    /// The last of them carries this.
    pub last_seq: Seq,
}

/// The decoded info of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentInfo {
    /// Ksets of another generation are dead.
    pub generation: Generation,
    /// `None`: open or free; its ksets are found by looking.
    pub sealed: Option<Sealed>,
    /// Number of the last update.
    pub update: u64,
}

impl SegmentInfo {
    /// Loads the info of a segment.
    ///
    /// # Errors
    /// Neither copy is valid.
    pub fn load<P: PmemRead>(
        pmem: &P,
        geometry: &Geometry,
        checksums: &Checksums,
        segment: SegId,
    ) -> Result<(Self, Copies), PairError> {
        let seed = checksums.segment_info(segment.0);
        let loaded = load_pair::<P, SegmentInfoOnMedia>(pmem, geometry.info_offs(segment), seed)?;
        let media = loaded.record;
        let sealed = (media.header.word.get() == STATE_SEALED).then(|| Sealed {
            kset_count: media.kset_count.get(),
            last_seq: Seq(media.last_seq.get()),
        });
        let info = Self {
            generation: Generation(media.generation.get()),
            sealed,
            update: media.header.update.get(),
        };
        Ok((info, loaded.copies))
    }

    /// Writes both copies. Durable when it returns.
    pub fn persist<P: Pmem>(
        &mut self,
        pmem: &P,
        agent: Agent,
        geometry: &Geometry,
        checksums: &Checksums,
        segment: SegId,
    ) -> Durable {
        self.update += 1;
        let mut media = SegmentInfoOnMedia::new_zeroed();
        media.generation.set(self.generation.0);
        media.header.word.set(STATE_UNSEALED);
        if let Some(sealed) = self.sealed {
            media.header.word.set(STATE_SEALED);
            media.kset_count.set(sealed.kset_count);
            media.last_seq.set(sealed.last_seq.0);
        }
        let seed = checksums.segment_info(segment.0);
        persist_pair(
            pmem,
            agent,
            geometry.info_offs(segment),
            seed,
            self.update,
            media,
        )
    }
}
