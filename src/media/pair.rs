//! Metadata that is overwritten in place: two copies, each with a checksum and an update number.
//!
//! An update writes the first copy, fences, writes the second, fences. A cut in between leaves one valid
//! copy, old or new. Once an update is finished both copies are the same, so that losing either later loses
//! nothing: an older copy alone would bring back a tail or a generation that the log has moved past.

use crate::media::checksum::ChecksumSeed;
use crate::pmem::{Durable, Pmem, Poisoned};
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

/// The newest valid copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loaded<R> {
    pub(super) record: R,
    /// The copies differ: one is damaged, or an update was cut short.
    pub(super) needs_repair: bool,
}

/// Loads the newest valid copy.
pub(super) fn load_pair<P: Pmem, R: PairRecord>(
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
    let same = |copy: &Result<R, CopyState>| {
        copy.as_ref()
            .is_ok_and(|copy| copy.as_bytes() == newest.as_bytes())
    };
    Ok(Loaded {
        record: *newest,
        needs_repair: !(same(&read[0]) && same(&read[1])),
    })
}

fn load_copy<P: Pmem, R: PairRecord>(
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
    // 1. The first copy, durable before the second is touched: at any moment one of them is valid
    //    (INV-PAIR-1).
    pmem.store(agent, offs[0], record.as_bytes());
    let first = pmem.fence(agent);
    drop(first);
    // 2. The second copy, so that the loss of either is harmless from here on (INV-PAIR-2).
    pmem.store(agent, offs[1], record.as_bytes());
    pmem.fence(agent)
}

#[cfg(test)]
mod tests {
    use crate::media::{Checksums, Tails};
    use crate::sim::pmem::SimPmem;
    use crate::units::{Agent, Seq};
    use std::sync::{Arc, Mutex};

    #[test]
    fn a_cut_at_any_word_of_an_update_leaves_the_old_record_or_the_new_one() {
        // INV-PAIR-1; and INV-PAIR-2 once it is finished.
        let (agent, checksums) = (Agent(1), Checksums::new([3; 16]));
        let pmem = SimPmem::new(64 << 10);
        let mut old = Tails::empty();
        drop(old.persist(&pmem, agent, &checksums));
        let images = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&images);
        pmem.on_crash_point(Some(Box::new(move |state, _| {
            let count = state.pending_words().len();
            let mut images = seen.lock().unwrap();
            for word in 0..=count {
                // All but one survive, one alone does, some from the start do.
                images.push(state.crash_image(|at, _| usize::from(at != word)));
                images.push(state.crash_image(|at, _| usize::from(at == word)));
                images.push(state.crash_image(|at, _| usize::from(at < word)));
            }
            images.push(state.crash_image(|at, _| at % 2));
        })));
        let mut new = old;
        (new.dirty_tail, new.key_tail, new.batch_end) = (Seq(9), Seq(8), Seq(7));
        (new.seq_next_min, new.epoch_min) = (Seq(11), 5);
        drop(new.persist(&pmem, agent, &checksums));
        pmem.on_crash_point(None);
        let images = std::mem::take(&mut *images.lock().unwrap());
        let mut found_new = 0;
        for image in &images {
            let image = SimPmem::from_image(image.clone());
            let (found, _) = Tails::load(&image, &checksums).unwrap();
            assert!(found == old || found == new, "{found:?}");
            found_new += usize::from(found == new);
        }
        assert!(found_new > 0 && found_new < images.len());
        assert_eq!(Tails::load(&pmem, &checksums), Ok((new, false)));
    }
}
