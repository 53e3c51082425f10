//! The tails: how far the log has been written back and reclaimed, and the witness of the base device.

use super::layout::TAILS_OFFS;
use super::pair::{Copies, PairError, PairHeaderOnMedia, PairRecord, load_pair, persist_pair};
use crate::media::Checksums;
use crate::pmem::{Durable, Pmem, PmemRead};
use crate::units::{Agent, Lba, Seq};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// How many blocks of the base the witness covers.
pub const WITNESS_COUNT: usize = 8;

/// The checksum of a few blocks of the base, taken when they were last known to be there and flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Witness {
    /// First block.
    pub lba: Lba,
    /// Blocks covered, up to 4 KiB; 0 for an unused entry.
    pub len_blocks: u32,
    /// Plain CRC-32C of their content.
    pub crc: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct WitnessOnMedia {
    lba: U64,
    len_blocks: U32,
    crc: U32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct TailsOnMedia {
    header: PairHeaderOnMedia,
    dirty_tail: U64,
    key_tail: U64,
    seq_next_min: U64,
    epoch_min: U64,
    witness: [WitnessOnMedia; WITNESS_COUNT],
    batch_end: U64,
    rsv: [u8; 8],
}

const _: () = {
    assert!(size_of::<TailsOnMedia>() == 192);
    assert!(size_of::<TailsOnMedia>().is_multiple_of(crate::pmem::LINE_SIZE_BYTES as usize));
};

impl PairRecord for TailsOnMedia {
    fn header(&self) -> &PairHeaderOnMedia {
        &self.header
    }
    fn header_mut(&mut self) -> &mut PairHeaderOnMedia {
        &mut self.header
    }
}

/// The decoded tails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tails {
    /// Everything up to here is on the base device, flushed.
    pub dirty_tail: Seq,
    /// Clean keys up to here are dead: something newer of the same blocks may have been reclaimed.
    pub key_tail: Seq,
    /// No kset at or above this was ever committed when the tails were written, unless it is in the log.
    pub seq_next_min: Seq,
    /// As `seq_next_min`, for epochs.
    pub epoch_min: u64,
    /// The witness.
    pub witness: [Witness; WITNESS_COUNT],
    /// A batch from the dirty tail up to here may be on the base in part. At or below the dirty tail: none.
    pub batch_end: Seq,
    /// Number of the last update.
    pub update: u64,
}

impl Tails {
    /// The tails of an empty log.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            dirty_tail: Seq(0),
            key_tail: Seq(0),
            seq_next_min: Seq(1),
            epoch_min: 0,
            witness: [Witness {
                lba: Lba(0),
                len_blocks: 0,
                crc: 0,
            }; WITNESS_COUNT],
            batch_end: Seq(0),
            update: 0,
        }
    }

    /// Loads them.
    ///
    /// # Errors
    /// Neither copy is valid.
    pub fn load<P: PmemRead>(pmem: &P, checksums: &Checksums) -> Result<(Self, Copies), PairError> {
        let loaded = load_pair::<P, TailsOnMedia>(pmem, TAILS_OFFS, checksums.tails())?;
        let media = loaded.record;
        let tails = Self {
            dirty_tail: Seq(media.dirty_tail.get()),
            key_tail: Seq(media.key_tail.get()),
            seq_next_min: Seq(media.seq_next_min.get()),
            epoch_min: media.epoch_min.get(),
            witness: media.witness.map(|w| Witness {
                lba: Lba(w.lba.get()),
                len_blocks: w.len_blocks.get(),
                crc: w.crc.get(),
            }),
            batch_end: Seq(media.batch_end.get()),
            update: media.header.update.get(),
        };
        Ok((tails, loaded.copies))
    }

    /// Writes both copies. Durable when it returns.
    pub fn persist<P: Pmem>(&mut self, pmem: &P, agent: Agent, checksums: &Checksums) -> Durable {
        self.update += 1;
        let mut media = TailsOnMedia::new_zeroed();
        media.dirty_tail.set(self.dirty_tail.0);
        media.key_tail.set(self.key_tail.0);
        media.seq_next_min.set(self.seq_next_min.0);
        media.epoch_min.set(self.epoch_min);
        media.batch_end.set(self.batch_end.0);
        for (to, from) in media.witness.iter_mut().zip(&self.witness) {
            to.lba.set(from.lba.0);
            to.len_blocks.set(from.len_blocks);
            to.crc.set(from.crc);
        }
        persist_pair(
            pmem,
            agent,
            TAILS_OFFS,
            checksums.tails(),
            self.update,
            media,
        )
    }
}
