//! Metadata that is overwritten in place: two copies, each with a checksum and an update number.
//!
//! An update writes the first copy, fences, writes the second, fences. A cut in between leaves one valid
//! copy, old or new. Once an update is finished both copies are the same, so that losing either later loses
//! nothing: an older copy alone would bring back a tail or a generation that the log has moved past.

use crate::media::checksum::ChecksumSeed;
use crate::pmem::{Durable, Pmem, PmemRead, Poisoned};
use crate::units::{Agent, PmemOff};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Numbers that count up by one never get here: such a one is damage, or was made to be.
pub const COUNTER_MAX: u64 = 1 << 62;

/// The first 16 bytes of every such record.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct PairHeaderOnMedia {
    /// CRC-32C of everything behind it.
    pub(super) crc: U32,
    /// Kind specific; see the record.
    pub(super) word: U32,
    /// Counts updates; the higher one is the newer.
    pub(super) update: U64,
}

/// A record that is kept in two copies.
pub(super) trait PairRecord:
    FromBytes + FromZeros + IntoBytes + Immutable + KnownLayout + Copy
{
    fn header(&self) -> &PairHeaderOnMedia;
    fn header_mut(&mut self) -> &mut PairHeaderOnMedia;
    /// Whether its own numbers can be. A copy with a good checksum and impossible numbers is a damaged one.
    fn is_plausible(&self) -> bool {
        true
    }
}

/// What was found of one copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyState {
    /// Valid, with this update number.
    Valid(u64),
    /// The checksum does not fit.
    Damaged,
    /// It cannot be read.
    Poisoned,
}

/// Neither copy is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("neither copy is valid: {first:?} at {at0}, {second:?} at {at1}", first = .copies[0], second = .copies[1], at0 = .offs[0], at1 = .offs[1])]
pub struct PairError {
    /// What was found.
    pub copies: [CopyState; 2],
    /// Where.
    pub offs: [PmemOff; 2],
}

/// The two copies of a record, of which at least one is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copies {
    /// What was found.
    pub states: [CopyState; 2],
    /// Where.
    pub offs: [PmemOff; 2],
    same: bool,
}

impl Copies {
    /// They differ: one is damaged, or an update was cut short.
    #[must_use]
    pub fn needs_repair(&self) -> bool {
        !self.same
    }
}

/// The newest valid copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loaded<R> {
    pub(super) record: R,
    pub(super) copies: Copies,
}

/// Loads the newest valid copy.
pub(super) fn load_pair<P: PmemRead, R: PairRecord>(
    pmem: &P,
    offs: [PmemOff; 2],
    seed: ChecksumSeed,
) -> Result<Loaded<R>, PairError> {
    let read = offs.map(|off| load_copy::<P, R>(pmem, off, seed));
    let newest = match (&read[0], &read[1]) {
        (Ok(a), Ok(b)) if a.header().update.get() >= b.header().update.get() => a,
        (_, Ok(b)) => b,
        (Ok(a), Err(_)) => a,
        (Err(a), Err(b)) => {
            return Err(PairError {
                copies: [*a, *b],
                offs,
            });
        }
    };
    let is_newest = |copy: &Result<R, CopyState>| {
        copy.as_ref()
            .is_ok_and(|copy| copy.as_bytes() == newest.as_bytes())
    };
    let state = |copy: &Result<R, CopyState>| match copy {
        Ok(copy) => CopyState::Valid(copy.header().update.get()),
        Err(state) => *state,
    };
    Ok(Loaded {
        record: *newest,
        copies: Copies {
            states: [state(&read[0]), state(&read[1])],
            offs,
            same: read.iter().all(is_newest),
        },
    })
}

fn load_copy<P: PmemRead, R: PairRecord>(
    pmem: &P,
    off: PmemOff,
    seed: ChecksumSeed,
) -> Result<R, CopyState> {
    let mut record = R::new_zeroed();
    pmem.read(off, record.as_mut_bytes())
        .map_err(|Poisoned { .. }| CopyState::Poisoned)?;
    let crc = seed.checksum(&record.as_bytes()[4..]);
    let header = record.header();
    if crc == header.crc.get() && header.update.get() < COUNTER_MAX && record.is_plausible() {
        Ok(record)
    } else {
        Err(CopyState::Damaged)
    }
}

/// Writes both copies, one after the other, under the next update number. Durable when it returns.
pub(super) fn persist_pair<P: Pmem, R: PairRecord>(
    pmem: &P,
    agent: Agent,
    offs: [PmemOff; 2],
    seed: ChecksumSeed,
    update: u64,
    mut record: R,
) -> Durable {
    record.header_mut().update.set(update);
    let crc = seed.checksum(&record.as_bytes()[4..]);
    record.header_mut().crc.set(crc);
    // 1. The first copy, durable before the second is touched: at any moment one of them is valid.
    pmem.store(agent, offs[0], record.as_bytes());
    let first = pmem.fence(agent);
    drop(first);
    // 2. The second copy, so that the loss of either is harmless from here on.
    pmem.store(agent, offs[1], record.as_bytes());
    pmem.fence(agent)
}
