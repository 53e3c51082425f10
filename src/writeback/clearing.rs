//! How what clears blocks, UNMAP and WRITE_ZEROES, reaches the base, and what operations count for.
//!
//! A base that does not take WRITE_ZEROES itself gets zeroes as data, from SPDK or the adapter. They cost it what data
//! cost, so they count wherever data do: for the rate, for what is under way, for the size of a batch.
//!
//! What the base clears itself is not written to it. What that costs is not known: nothing as a rule; as much as data if
//! the base passes it on to something that writes zeroes. So it does not count for the rate, but one operation, all that
//! are under way, and a batch clear so little that even then something ends often.

use super::pace::BaseRate;
use crate::canary::{self, Canary};
use crate::engine::{BaseCaps, BaseError, ZeroesWent};
use crate::media::KeyKind;
use crate::units::{NS_PER_S, Now};
use std::ops::{AddAssign, SubAssign};

/// One operation clears so much, at most.
pub(crate) const BASE_CLEAR_BYTES_MAX: u64 = 32 << 20;
/// A batch clears so much, at most, whatever the base lately took: while it is written, that may change.
const BATCH_CLEARED_MAX: u64 = 4 << 30;
/// For so long after the base has failed an unmap they all go to it as zeroes: one that fails each of them is not asked
/// for thousands, and one that was sick gets them again.
const UNMAPS_AS_ZEROES_NS: u64 = 60 * NS_PER_S;

/// How something reaches the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goes {
    /// It is written.
    AsData,
    /// The base clears it itself.
    Cleared,
}

/// What operations count for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Load {
    /// Bytes that are written to the base, with zeroes that it gets as data.
    pub(super) data_bytes: u64,
    /// Bytes that the base clears itself.
    pub(super) cleared_bytes: u64,
}

impl Load {
    pub(super) const NOTHING: Load = Load {
        data_bytes: 0,
        cleared_bytes: 0,
    };

    /// Of so many bytes.
    pub(super) fn new(goes: Goes, bytes: u64) -> Self {
        match goes {
            Goes::AsData => Load {
                data_bytes: bytes,
                cleared_bytes: 0,
            },
            Goes::Cleared => Load {
                data_bytes: 0,
                cleared_bytes: bytes,
            },
        }
    }

    /// Whether there is room for no more below `max`.
    pub(super) fn reaches(self, max: Load) -> bool {
        self.data_bytes >= max.data_bytes || self.cleared_bytes >= max.cleared_bytes
    }

    /// Whether there is room below `max` for more that goes so.
    pub(super) fn has_room_for(self, goes: Goes, max: Load) -> bool {
        match goes {
            Goes::AsData => self.data_bytes < max.data_bytes,
            Goes::Cleared => self.cleared_bytes < max.cleared_bytes,
        }
    }

    /// So much of what goes so.
    pub(super) fn of(self, goes: Goes) -> u64 {
        match goes {
            Goes::AsData => self.data_bytes,
            Goes::Cleared => self.cleared_bytes,
        }
    }

    pub(super) fn at_most(self, max: Load) -> Load {
        Load {
            data_bytes: self.data_bytes.min(max.data_bytes),
            cleared_bytes: self.cleared_bytes.min(max.cleared_bytes),
        }
    }
}

impl AddAssign for Load {
    fn add_assign(&mut self, more: Load) {
        self.data_bytes += more.data_bytes;
        self.cleared_bytes += more.cleared_bytes;
    }
}

impl SubAssign for Load {
    fn sub_assign(&mut self, less: Load) {
        self.data_bytes -= less.data_bytes;
        self.cleared_bytes -= less.cleared_bytes;
    }
}

/// What the base lately took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BaseRates {
    data: BaseRate,
    cleared: BaseRate,
}

impl BaseRates {
    /// Learns from a batch: what was written, not what overwrites have absorbed. What it cleared counts as nothing for
    /// what data take, and the other way round: so the next batches are too short at worst.
    pub(super) fn learn(&mut self, written: Load, took_ns: u64) {
        self.data.learn(written.data_bytes, took_ns);
        self.cleared.learn(written.cleared_bytes, took_ns);
    }

    /// What it takes in so many milliseconds, but not less than `least`.
    pub(super) fn load_in(&self, ms: u64, least: Load) -> Load {
        let cleared_bytes = self.cleared.bytes_in(ms).min(BATCH_CLEARED_MAX);
        Load {
            data_bytes: self.data.bytes_in(ms).max(least.data_bytes),
            cleared_bytes: cleared_bytes.max(least.cleared_bytes),
        }
    }
}

/// As what a base gets what clears blocks now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Clearing {
    unmap_kind: KeyKind,
    zeroes_are_data: bool,
}

impl Clearing {
    /// For a batch that has no limits.
    pub(super) const AS_DATA: Clearing = Clearing {
        unmap_kind: KeyKind::Zeroes,
        zeroes_are_data: true,
    };

    /// As what the base gets a key of this kind.
    pub(super) fn base_kind(self, kind: KeyKind) -> KeyKind {
        match kind {
            KeyKind::Unmap => self.unmap_kind,
            kind => kind,
        }
    }

    /// How a key of this kind reaches it.
    #[inline]
    pub(super) fn goes(self, kind: KeyKind) -> Goes {
        match self.base_kind(kind) {
            KeyKind::Zeroes if !self.zeroes_are_data => Goes::Cleared,
            KeyKind::Data | KeyKind::Fill | KeyKind::Zeroes => Goes::AsData,
            KeyKind::Unmap => Goes::Cleared,
        }
    }

    /// What so many bytes of a kind count for.
    pub(super) fn load(self, kind: KeyKind, bytes: u64) -> Load {
        Load::new(self.goes(kind), bytes)
    }
}

/// What is known of the base in this respect.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ClearingBase {
    /// Until then unmaps go to it as zeroes.
    unmaps_from: Now,
    pub(super) zeroes_went: ZeroesWent,
    /// It has taken WRITE_ZEROES. Before, one that claims it may yet get zeroes as data.
    has_taken_zeroes: bool,
}

impl ClearingBase {
    pub(super) fn clearing(self, caps: BaseCaps, now: Now) -> Clearing {
        let unmap_kind = if caps.unmap && now >= self.unmaps_from {
            KeyKind::Unmap
        } else {
            KeyKind::Zeroes
        };
        let went_as_asked = self.has_taken_zeroes && self.zeroes_went == ZeroesWent::AsAsked;
        let is_sure = caps.write_zeroes && went_as_asked;
        Clearing {
            unmap_kind,
            zeroes_are_data: !is_sure && !canary::is(Canary::ZeroesWithoutWeight),
        }
    }

    /// An operation on it has ended. `true`: it failed, and has to be asked for in another way.
    ///
    /// A base may claim unmaps and fail each of them: SPDK's aio bdev does, on what knows no discard. What follows tells
    /// whether it is the unmap that it fails, or everything (INV-WB-7).
    pub(super) fn note_end(
        &mut self,
        kind: KeyKind,
        result: Result<(), BaseError>,
        now: Now,
    ) -> bool {
        match (kind, result) {
            (KeyKind::Zeroes, Ok(())) => self.has_taken_zeroes = true,
            (KeyKind::Unmap, Err(BaseError::Unsupported | BaseError::Io))
                if !canary::is(Canary::FailedUnmapRepeated) =>
            {
                self.unmaps_from = Now(now.0 + UNMAPS_AS_ZEROES_NS);
                return true;
            }
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests;
