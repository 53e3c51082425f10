//! Dirty payloads that are damaged: they are never written to the base (INV-WB-5).
//!
//! Nothing newer may be there either, as long as the damaged blocks are the newest of the batch: that would be no past
//! state. So a batch with damage goes on until all of it is overwritten by newer keys of the same batch. If the
//! log does not hold these yet, write-back waits for them. An operator who writes the blocks that are reported
//! heals the cache.

use crate::canary::{self, Canary};
use crate::engine::{Cache, Counters, Depth, Flaw};
use crate::media::{Key, KeyKind};
use crate::pmem::Pmem;
use crate::units::{Lba, PAGE_SIZE_BYTES, PmemOff, SegId, Seq};

/// While a payload is looked at, the one so many keys behind it is asked for: as many lines as a core waits for at once.
const LOOK_AHEAD_KEYS: usize = 16;
/// Damaged ranges, or segments, that are named in the reason for a state.
pub(super) const RANGES_NAMED: usize = 8;
/// Blocks of a batch that are kept in mind.
const LOST_BLOCKS_MAX: usize = 1024;

/// Blocks whose newest copy in the batch is damaged.
#[derive(Debug)]
pub(super) struct Lost {
    blocks: Vec<Lba>,
    /// There are more of them.
    is_cut_short: bool,
}

impl Default for Lost {
    fn default() -> Self {
        Self {
            blocks: Vec::with_capacity(LOST_BLOCKS_MAX),
            is_cut_short: false,
        }
    }
}

impl Lost {
    pub(super) fn clear(&mut self) {
        self.blocks.clear();
        self.is_cut_short = false;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty() && !self.is_cut_short
    }

    /// Whether all that are kept in mind were overwritten meanwhile.
    pub(super) fn is_overwritten<P: Pmem>(&self, cache: &Cache<P>) -> bool {
        !self.blocks.iter().any(|lba| cache.damage.contains(*lba))
    }

    pub(super) fn add(&mut self, lba: Lba) {
        if self.blocks.len() == LOST_BLOCKS_MAX {
            self.is_cut_short = true;
        } else if !self.blocks.contains(&lba) {
            self.blocks.push(lba);
        }
    }

    /// Leaves out what somebody else sees to.
    pub(super) fn keep_within(&mut self, is_within: impl Fn(Lba) -> bool) {
        self.blocks.retain(|lba| is_within(*lba));
    }

    /// A newer key takes the place of some.
    pub(super) fn cover(&mut self, key: &Key) {
        let end = key.end().0;
        self.blocks.retain(|lba| !(key.lba.0..end).contains(&lba.0));
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
    (id, seq): (SegId, Seq),
    keys: &[Key],
    buf: &mut [u8],
    lost: &mut Lost,
) {
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
        // With checksums off a look at each page has to do: the base meets the rest.
        let Err(flaw) = cache.check_payload(id, key, buf, Depth::Probe) else {
            continue;
        };
        if flaw == Flaw::Poisoned {
            // Nothing is stored there again: the memory may not take it (INV-SEG-7).
            cache.segments.suspect(id);
        }
        if !canary::is(Canary::DamagedPayloadWritten) {
            cache.note_damage(counters, id, key, flaw, buf);
            cache.for_each_flawed_block(id, key, flaw, buf, |lba, _| lost.add(lba));
        }
    }
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

/// What an operator has to know of damage in dirty data.
pub(super) fn damage_text<P: Pmem>(cache: &Cache<P>) -> String {
    let ranges = cache.damage.ranges();
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
