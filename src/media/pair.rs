//! Metadata that is overwritten in place: two copies, each with a checksum and an update number.
//!
//! An update writes the first copy, fences, writes the second, fences. A cut in between leaves one valid
//! copy, old or new. Once an update is finished both copies are the same, so that losing either later loses
//! nothing: an older copy alone would bring back a tail or a generation that the log has moved past.

use crate::canary::{self, Canary};
use crate::media::checksum::ChecksumSeed;
use crate::pmem::{Durable, Pmem, PmemRead, Poisoned};
use crate::units::{Agent, PmemOff};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Numbers that count up by one never get here: such a one is damage, or was made to be.
pub const COUNTER_MAX: u64 = 1 << 62;
/// A cache whose counters are above this is not opened: while it is in use none may come to [`COUNTER_MAX`], since nobody
/// could read what was written then. What is left takes longer to count than any machine runs.
pub const COUNTER_START_MAX: u64 = COUNTER_MAX / 2;

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

impl PairError {
    /// Whether the memory of both takes a store: the record can be written again from what is in use.
    #[must_use]
    pub fn can_be_written(&self) -> bool {
        !self.copies.contains(&CopyState::Poisoned)
    }
}

/// The two copies of a record, of which at least one is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copies {
    /// What was found.
    pub states: [CopyState; 2],
    /// Where.
    pub offs: [PmemOff; 2],
    /// The one that is damaged, or older than the other: the loss of the other would lose the record.
    stale: Option<usize>,
    len_bytes: usize,
}

impl Copies {
    /// They differ: one is damaged, or an update was cut short.
    #[must_use]
    pub fn needs_repair(&self) -> bool {
        self.stale.is_some()
    }

    /// Where a copy lies that cannot be read. A store there may fail, and to the other one alone none may be made, since a
    /// cut could leave it torn: so the record stays as it is (INV-PAIR-3).
    #[must_use]
    pub fn unreadable(&self) -> Option<PmemOff> {
        let copies = self.states.iter().zip(self.offs);
        let mut lost = copies.filter(|(state, _)| **state == CopyState::Poisoned);
        lost.next().map(|(_, off)| off)
    }

    /// Makes both copies durable and the same: a cut in here leaves what was found (INV-PAIR-1). Only then may the record be
    /// updated. One of which a copy cannot be read is left alone. Durable when it returns.
    ///
    /// # Errors
    /// The valid copy cannot be read any more.
    pub fn repair<P: Pmem>(&mut self, pmem: &P, agent: Agent) -> Result<(), Poisoned> {
        if self.unreadable().is_some() && !canary::is(Canary::UnreadableCopyStored) {
            return Ok(());
        }
        let newest = self.stale.take().map_or(0, |stale| 1 - stale);
        let mut bytes = vec![0; self.len_bytes];
        pmem.read(self.offs[newest], &mut bytes)?;
        // INV-LOG-12: whoever stored a copy may have died before its fence. Then it may be in the CPU's caches alone. So the one
        // that counts is stored as it was found, which changes nothing where it is durable, before the other one, which may be
        // what a cut has left. If they are the same, one of them is durable.
        let trusts = canary::is(Canary::KilledCopyTrusted);
        for copy in [newest, 1 - newest].into_iter().skip(usize::from(trusts)) {
            pmem.store(agent, self.offs[copy], &bytes);
            drop(pmem.fence(agent));
        }
        Ok(())
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
            stale: read.iter().position(|copy| !is_newest(copy)),
            len_bytes: size_of::<R>(),
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
    let torn_counts = canary::is(Canary::PairChecksumIgnored) && header.update.get() > 0;
    let is_good = crc == header.crc.get() || torn_counts;
    if is_good && header.update.get() < COUNTER_MAX && record.is_plausible() {
        Ok(record)
    } else {
        Err(CopyState::Damaged)
    }
}

/// Writes both copies, one after the other, under the next update number. Both are valid and the same before:
/// what recovery found otherwise it has repaired (see [`Copies::repair`]), or it does not come to an update
/// (see [`Copies::unreadable`]). Durable when it returns.
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
    if !canary::is(Canary::BothCopiesBeforeOneFence) {
        let first = pmem.fence(agent);
        drop(first);
    }
    // 2. The second copy, so that the loss of either is harmless from here on (INV-PAIR-2).
    if !canary::is(Canary::SecondCopyNotWritten) {
        pmem.store(agent, offs[1], record.as_bytes());
    }
    pmem.fence(agent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::Checksums;
    use crate::media::tails::{Tails, TailsOnMedia};
    use crate::sim::pmem::{SimPmem, SimState};
    use crate::units::Seq;

    const OFFS: [PmemOff; 2] = [PmemOff(8 << 10), PmemOff(40 << 10)];
    const AGENT: Agent = Agent(1);

    /// What a cut could leave before each fence of `update`: all words but one, one alone, those up to one,
    /// every second.
    fn cuts(pmem: &SimPmem, update: impl FnOnce()) -> Vec<SimPmem> {
        let at_fence = |state: &SimState| {
            let mut images = Vec::new();
            for word in 0..=state.pending_words().len() {
                images.push(state.crash_image(|at, _| usize::from(at != word)));
                images.push(state.crash_image(|at, _| usize::from(at == word)));
                images.push(state.crash_image(|at, _| usize::from(at < word)));
            }
            images.push(state.crash_image(|at, _| at % 2));
            images
        };
        let ((), images) = pmem.at_fences(at_fence, update);
        images
            .into_iter()
            .flatten()
            .map(SimPmem::from_image)
            .collect()
    }

    #[test]
    fn a_cut_at_any_word_of_an_update_leaves_the_old_record_or_the_new_one() {
        // INV-PAIR-1; and INV-PAIR-2 once it is finished.
        let checksums = Checksums::new([3; 16]);
        let pmem = SimPmem::new(64 << 10);
        let mut old = Tails::empty();
        drop(old.persist(&pmem, AGENT, &checksums));
        let mut new = old;
        (new.dirty_tail, new.key_tail, new.batch_end) = (Seq(9), Seq(8), Seq(7));
        (new.seq_next_min, new.epoch_min) = (Seq(11), 5);
        let images = cuts(&pmem, || drop(new.persist(&pmem, AGENT, &checksums)));
        let mut found_new = 0;
        for image in &images {
            let (found, _) = Tails::load(image, &checksums).unwrap();
            assert!(found == old || found == new, "{found:?}");
            found_new += usize::from(found == new);
        }
        assert!(found_new > 0 && found_new < images.len());
        let (found, copies) = Tails::load(&pmem, &checksums).unwrap();
        assert!(found == new && !copies.needs_repair());
    }

    #[test]
    fn a_cut_while_a_copy_is_repaired_never_damages_the_other() {
        // INV-PAIR-1, for the repair and the update behind it, whichever copy is damaged.
        let checksums = Checksums::new([7; 16]);
        let load = |pmem: &SimPmem| load_pair::<_, TailsOnMedia>(pmem, OFFS, checksums.tails());
        for damaged in OFFS {
            let pmem = SimPmem::new(64 << 10);
            let mut tails = Tails::empty();
            tails.dirty_tail = Seq(5);
            drop(tails.persist(&pmem, AGENT, &checksums));
            pmem.flip_bit(damaged.plus(40), 3);
            let mut valid = load(&pmem).unwrap();
            let images = cuts(&pmem, || {
                valid.copies.repair(&pmem, AGENT).unwrap();
                tails.dirty_tail = Seq(6);
                drop(tails.persist(&pmem, AGENT, &checksums));
            });
            for image in images {
                let loaded = load(&image).expect("one copy is valid");
                assert!(loaded.record.header().update.get() >= valid.record.header().update.get());
            }
            assert!(!load(&pmem).unwrap().copies.needs_repair());
        }
    }

    /// INV-PAIR-1, where a process was killed before any fence of an update, and power fails before the next start has made
    /// another.
    #[test]
    fn a_cut_behind_a_kill_never_damages_both_copies() {
        let checksums = Checksums::new([5; 16]);
        let load = |pmem: &SimPmem| load_pair::<_, TailsOnMedia>(pmem, OFFS, checksums.tails());
        let pmem = SimPmem::new(64 << 10);
        let mut tails = Tails::empty();
        tails.dirty_tail = Seq(5);
        drop(tails.persist(&pmem, AGENT, &checksums));
        let ((), kills) = pmem.at_fences(SimState::killed, || {
            for dirty_tail in 6..8 {
                tails.dirty_tail = Seq(dirty_tail);
                drop(tails.persist(&pmem, AGENT, &checksums));
            }
        });
        assert_eq!(kills.len(), 4);
        for killed in kills {
            let found = load(&killed).unwrap();
            let mut copies = found.copies;
            let (mut tails, _) = Tails::load(&killed, &checksums).unwrap();
            let images = cuts(&killed, || {
                copies.repair(&killed, AGENT).unwrap();
                tails.batch_end = Seq(9);
                drop(tails.persist(&killed, AGENT, &checksums));
            });
            for image in images {
                load(&image).expect("one copy is valid");
            }
        }
    }
}
