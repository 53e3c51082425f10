//! Dirty payloads that are damaged: they are never written to the base (INV-WB-5).
//!
//! Nothing newer may be there either, as long as the damaged blocks are the newest of the batch: that would be no past
//! state. So a batch with damage goes on until all of it is overwritten by newer keys of the same batch. If the
//! log does not hold these yet, write-back waits for them. An operator who writes the blocks that are reported
//! heals the cache.

use crate::canary::{self, Canary};
use crate::engine::{
    ASKED_PER_POLL, Cache, Counters, DAMAGED_BLOCKS_MAX, DataCrc, Depth, Flaw, ranges_of,
};
use crate::index::PAGE_BLOCKS_MAX;
use crate::media::{KSET_KEYS_MAX, Key, KeyKind, Place};
use crate::pmem::Pmem;
use crate::units::{Lba, PAGE_SIZE_BYTES, PmemOff, SegId, Seq};
use std::sync::atomic::Ordering;

/// While a payload is looked at, the one so many keys behind it is asked for: as many lines as a core waits for at once.
const LOOK_AHEAD_KEYS: usize = 16;
/// Damaged ranges, or segments, that are named in the reason for a state.
pub(super) const RANGES_NAMED: usize = 8;
/// Blocks of a batch that are kept in mind: as many as can be named.
const LOST_BLOCKS_MAX: usize = DAMAGED_BLOCKS_MAX;
/// The same of a part behind the first: the keys that overwrite them are still to come. With more than so many before a kset
/// the part is narrowed. Above what one key of a part takes, or it could not be.
const LOST_IN_PART: usize = if cfg!(any(test, feature = "sim")) {
    256
} else {
    60 << 10
};
/// And what a kset brings at most: a payload has a page.
const LOST_IN_PART_MAX: usize = LOST_IN_PART + KSET_KEYS_MAX * PAGE_BLOCKS_MAX;

/// Blocks whose newest copy in the batch is damaged, and where that lies. Their number is bounded, and so is what a poll does
/// with them.
#[derive(Debug)]
pub(super) struct Lost {
    /// Those that nothing newer had overwritten when they were found, in order.
    blocks: Vec<(Lba, Place)>,
    /// One of those for which there was no room.
    beyond: Option<(Lba, Place)>,
    /// All others had been overwritten by something that is in the log below this: the batch goes that far.
    upto: Seq,
    /// Of `blocks`: the next one that is looked at.
    next: usize,
    /// Of a batch that goes as far as it does: what is overwritten behind its end does not count.
    has_end: bool,
}

/// What has become of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// All that are kept in mind have been overwritten.
    Overwritten,
    /// Some have; of others it is not known yet.
    Unclear,
    /// One that was looked at has not been.
    Lost,
}

impl Default for Lost {
    fn default() -> Self {
        Self {
            blocks: Vec::with_capacity(LOST_IN_PART_MAX),
            beyond: None,
            upto: Seq(0),
            next: 0,
            has_end: false,
        }
    }
}

impl Lost {
    pub(super) fn clear(&mut self) {
        self.blocks.clear();
        self.beyond = None;
        self.upto = Seq(0);
        self.next = 0;
        self.has_end = false;
    }

    /// For a part of a batch behind the first one, which has found where the batch ends. What the part finds damaged has to be
    /// overwritten before that, by keys that it meets.
    pub(super) fn begin_part(&mut self) {
        self.has_end = true;
    }

    /// Whether none was found, be it one that was overwritten.
    pub(super) fn is_none(&self) -> bool {
        self.is_empty() && self.upto == Seq(0)
    }

    /// Whether nothing is left that was not overwritten, if the batch holds everything below [`Lost::upto`].
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.beyond.is_none()
    }

    pub(super) fn upto(&self) -> Seq {
        self.upto
    }

    /// Whether it is of a part behind the first, which has nothing to do with what lies elsewhere.
    pub(super) fn is_of_part(&self) -> bool {
        self.has_end
    }

    /// Of a part behind the first: whether there may be no room for what the next kset brings. The part has to become narrower,
    /// since all that it meets is to be kept in mind until it is overwritten.
    pub(super) fn is_crowded(&self) -> bool {
        self.has_end && self.blocks.len() > LOST_IN_PART
    }

    /// The batch must not be written: there is always a block that says why.
    pub(super) fn end(&mut self) {
        if self.blocks.is_empty() {
            self.blocks.extend(self.beyond.take());
        }
    }

    /// In order.
    pub(super) fn blocks(&self) -> &[(Lba, Place)] {
        &self.blocks
    }

    /// Looks at some of those that are kept in mind, in turns, and forgets which of them were overwritten meanwhile.
    pub(super) fn look<P: Pmem>(&mut self, cache: &Cache<P>) -> Fate {
        let mut is_any_left = false;
        for _ in 0..ASKED_PER_POLL {
            let Some((lba, place)) = self.blocks.get(self.next).copied() else {
                break;
            };
            if cache.is_well(lba, place) {
                self.blocks.remove(self.next);
            } else {
                is_any_left = true;
                self.next += 1;
            }
        }
        if self.blocks.is_empty() {
            // If there were more, they are found anew.
            return Fate::Overwritten;
        }
        let is_end = self.next >= self.blocks.len();
        if is_end {
            self.next = 0;
        }
        if is_any_left || is_end {
            Fate::Lost
        } else {
            Fate::Unclear
        }
    }

    pub(super) fn add<P: Pmem>(&mut self, cache: &Cache<P>, lba: Lba, place: Place) {
        // A block has one newest copy.
        let at = self.blocks.partition_point(|(block, _)| *block < lba);
        let count_max = if self.has_end {
            LOST_IN_PART_MAX
        } else {
            LOST_BLOCKS_MAX
        };
        if !self.has_end && cache.is_overwritten(lba, place) {
            // Whoever has done so has drawn its number before.
            self.upto = Seq(cache.seq_next.load(Ordering::SeqCst));
        } else if let Some((_, older)) = self.blocks.get_mut(at).filter(|(block, _)| *block == lba)
        {
            *older = place;
        } else if self.blocks.len() < count_max {
            self.blocks.insert(at, (lba, place));
        } else {
            self.beyond = Some((lba, place));
        }
    }

    /// Leaves out what somebody else sees to.
    pub(super) fn keep_within(&mut self, is_within: impl Fn(Lba) -> bool) {
        self.blocks.retain(|(lba, _)| is_within(*lba));
        self.beyond = self.beyond.filter(|(lba, _)| is_within(*lba));
    }

    /// A newer key takes the place of some.
    pub(super) fn cover(&mut self, key: &Key) {
        let place_of = |lba: Lba| self.blocks.partition_point(|(block, _)| *block < lba);
        let covered = place_of(key.lba)..place_of(key.end());
        self.blocks.drain(covered);
    }

    /// What an operator has to know of them.
    pub(super) fn text(&self) -> String {
        let ranges = ranges_of(self.blocks.iter().map(|(lba, _)| *lba));
        let named: Vec<String> = ranges
            .iter()
            .take(RANGES_NAMED)
            .map(|range| format!("{}+{}", range.lba, range.len_blocks))
            .collect();
        let more = ranges.len().saturating_sub(RANGES_NAMED);
        let more = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        format!(
            "the only copy of blocks {}{more} is damaged; write-back stands still until they are overwritten",
            named.join(", ")
        )
    }
}

/// Asks for the payloads of a kset that is going to be checked soon, as far as that does not do so itself.
pub(super) fn ask_for_first<P: Pmem>(cache: &Cache<P>, id: SegId, keys: &[Key]) {
    let first = keys.iter().take(LOOK_AHEAD_KEYS);
    first.for_each(|key| ask_for(cache, id, key));
}

fn ask_for<P: Pmem>(cache: &Cache<P>, id: SegId, key: &Key) {
    cache.pmem.prefetch(cache.payload_off(id, key), 1);
}

/// Goes through the keys of the next kset of a batch. `buf` has room for a page.
pub(super) fn check_kset<P: Pmem>(
    cache: &Cache<P>,
    counters: &Counters,
    (id, seq, depth): (SegId, Seq, Depth),
    keys: &[Key],
    buf: &mut [u8],
    lost: &mut Lost,
) {
    let a_look_will_do = depth == Depth::Probe && cache.data_crc == DataCrc::Off;
    if a_look_will_do && lost.is_empty() && are_readable(cache, id, keys) {
        return;
    }
    for (number, key) in keys.iter().enumerate() {
        if let Some(coming) = keys.get(number + LOOK_AHEAD_KEYS) {
            ask_for(cache, id, coming);
        }
        if cache.is_key_clean(seq, key.kind) {
            continue;
        }
        if !lost.is_empty() {
            lost.cover(key);
        }
        if key.kind != KeyKind::Data {
            continue;
        }
        // With checksums off a look at each page has to do: the base meets the rest. What that has met is read as a whole.
        let Err(flaw) = cache.check_payload(id, key, buf, depth) else {
            continue;
        };
        if flaw == Flaw::Poisoned {
            // Nothing is stored there again: the memory may not take it (INV-SEG-7).
            cache.segments.suspect(id);
        }
        if !canary::is(Canary::DamagedPayloadWritten) {
            cache.note_damage(counters, (id, key), flaw, buf, |lba, place| {
                lost.add(cache, lba, place);
            });
        }
    }
}

/// Whether all payloads of a kset are there, as far as a look at each page tells. Most are, and none is looked at any closer.
fn are_readable<P: Pmem>(cache: &Cache<P>, id: SegId, keys: &[Key]) -> bool {
    keys.iter().enumerate().all(|(number, key)| {
        if let Some(coming) = keys.get(number + LOOK_AHEAD_KEYS) {
            ask_for(cache, id, coming);
        }
        let len_bytes = cache.geometry.bytes(u64::from(key.len_blocks));
        let payload = cache.payload_off(id, key);
        key.kind != KeyKind::Data || cache.pmem.probe(payload, len_bytes).is_ok()
    })
}

/// After an error of the base: whether it is not the base's, since the source of the write cannot be read.
pub(super) fn is_source_lost<P: Pmem>(cache: &Cache<P>, extents: &[(PmemOff, u64)]) -> bool {
    let mut buf = [0; PAGE_SIZE_BYTES as usize];
    extents.iter().any(|&(off, len_bytes)| {
        let mut at = 0;
        while at < len_bytes {
            // A page at most.
            let step = (len_bytes - at).min(u64::from(PAGE_SIZE_BYTES)) as usize;
            if cache.pmem.read(off.plus(at), &mut buf[..step]).is_err() {
                return true;
            }
            at += step as u64;
        }
        false
    })
}
