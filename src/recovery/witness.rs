//! The witness at open: a few blocks of the base are read and compared with what the cache knows of them.

use super::error::OpenError;
use super::opening::OpenStep;
use crate::engine::BaseError;
use crate::media::{Key, Superblock, WITNESS_COUNT, Witness};
use crate::units::Lba;

/// How far the reading is.
pub(super) enum WitnessStep {
    Step(OpenStep),
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// The checksums are taken down.
    Sample,
    /// They are compared.
    Compare,
}

/// Reads the blocks of a witness, one after the other.
pub(super) struct WitnessCheck {
    purpose: Purpose,
    witness: [Witness; WITNESS_COUNT],
    next: usize,
    awaiting: bool,
    error: Option<OpenError>,
}

impl WitnessCheck {
    /// For a new cache: blocks spread over the base.
    pub(super) fn sample(superblock: &Superblock) -> Self {
        let per_page = superblock.geometry.blocks_per_page();
        let pages = superblock.base.block_count / u64::from(per_page);
        let witness = std::array::from_fn(|number| {
            let page = (pages.saturating_sub(1) / WITNESS_COUNT as u64) * number as u64;
            let fresh = page > 0 || number == 0;
            let len_blocks = if pages > 0 && fresh { per_page } else { 0 };
            Witness {
                lba: Lba(page * u64::from(per_page)),
                len_blocks,
                crc: 0,
            }
        });
        Self {
            purpose: Purpose::Sample,
            witness,
            next: 0,
            awaiting: false,
            error: None,
        }
    }

    /// For an existing one. Entries under dirty data were left out, all others are in range.
    pub(super) fn compare(witness: [Witness; WITNESS_COUNT]) -> Self {
        Self {
            purpose: Purpose::Compare,
            witness,
            next: 0,
            awaiting: false,
            error: None,
        }
    }

    pub(super) fn into_witness(self) -> [Witness; WITNESS_COUNT] {
        self.witness
    }

    pub(super) fn poll(&mut self) -> Result<WitnessStep, OpenError> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        if self.awaiting {
            return Ok(WitnessStep::Step(OpenStep::AwaitingBase));
        }
        while self.next < WITNESS_COUNT {
            let entry = self.witness[self.next];
            if entry.len_blocks > 0 {
                self.awaiting = true;
                return Ok(WitnessStep::Step(OpenStep::ReadBase {
                    slot: self.next as u32,
                    lba: entry.lba,
                    len_blocks: u64::from(entry.len_blocks),
                }));
            }
            self.next += 1;
        }
        Ok(WitnessStep::Done)
    }

    pub(super) fn on_base_block(&mut self, slot: u32, result: Result<&[u8], BaseError>) {
        if !self.awaiting || slot as usize != self.next {
            return;
        }
        let entry = &mut self.witness[self.next];
        self.awaiting = false;
        self.next += 1;
        match (result.map(crc32c::crc32c), self.purpose) {
            (Ok(crc), Purpose::Sample) => entry.crc = crc,
            (Ok(crc), Purpose::Compare) => self.error = entry.difference(crc),
            (Err(error), _) => {
                self.error = Some(OpenError::BaseRead {
                    lba: entry.lba,
                    error,
                })
            }
        }
    }
}

impl Witness {
    /// What is wrong if the blocks that it names have the checksum `found` on the base.
    pub(crate) fn difference(&self, found: u32) -> Option<OpenError> {
        let (lba, expected) = (self.lba, self.crc);
        let error = OpenError::Witness {
            lba,
            expected,
            found,
        };
        (found != expected).then_some(error)
    }
}

/// Whether a dirty key is about to overwrite the blocks of an entry on the base, or has already.
pub(crate) fn is_overwritten(entry: &Witness, key: &Key) -> bool {
    let (start, end) = (key.lba.0, key.end().0);
    start < entry.lba.0 + u64::from(entry.len_blocks) && entry.lba.0 < end
}
