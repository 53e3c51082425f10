//! Settings: the options of a cache that can be changed while it is in use, and that it remembers.
//!
//! One table says all of them: the management interface takes its rows as parameters, the superblock keeps
//! their values, and whoever works with one reads it without a lock. Tests hold `rpc/schema.json`, `docs/rpc.md` and
//! `docs/FORMAT.md` against it.

use super::config::{CacheMode, DataCrc, ReadAdmission, WritebackOrder};
use serde::ser::{Serialize, SerializeMap, Serializer};
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

/// Settings that the superblock has room for.
pub const SETTING_SLOT_COUNT: usize = 30;

/// What a setting can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SettingValueKind {
    /// A whole number within these bounds, both included.
    Number {
        /// The least.
        min: u32,
        /// The greatest.
        max: u32,
    },
    /// One of these words; its place in the list is the value.
    Words(&'static [&'static str]),
    /// No (0) or yes (1).
    Flag,
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SettingInfo {
    /// Which one.
    pub setting: Setting,
    /// Its place in the superblock, below [`SETTING_SLOT_COUNT`]. Never used again for another one.
    pub slot: usize,
    /// Its name in the management interface; a number's unit comes last in it.
    pub name: &'static str,
    /// What holds if nothing is said.
    pub default: u32,
    /// What it can be.
    pub kind: SettingValueKind,
}

macro_rules! settings {
    ($($(#[doc = $doc:literal])+ $id:ident = $slot:literal, $name:literal, $default:expr, $kind:expr;)+) => {
        /// A setting; its documentation says why its default is what it is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Setting {
            $($(#[doc = $doc])+ $id,)+
        }

        /// All settings, in the order of [`Setting`].
        pub static SETTINGS: &[SettingInfo] = &[
            $(SettingInfo {
                setting: Setting::$id,
                slot: $slot,
                name: $name,
                default: $default,
                kind: $kind,
            },)+
        ];
    };
}

use SettingValueKind::{Flag, Number, Words};

settings! {
    /// Share of used segments, in percent, above which clean ones are reclaimed. 70, as in the kernel's
    /// target: what is free takes a burst of writes without waiting, and most of the cache still holds data. If none
    /// is clean, dirty ones are written back first, but for what the marks below leave alone.
    GcPercent = 0, "gc_percent", 70, Number { min: 0, max: 90 };
    /// In which order dirty data reach the base. Strict: the base can be mounted at any moment.
    WritebackOrder = 1, "writeback_order", 0, Words(&["strict", "relaxed"]);
    /// What the cache does with reads and writes. Writeback: that is what it is for.
    CacheMode = 2, "cache_mode", 0,
        Words(&["writeback", "writethrough", "writearound", "writeonly", "passthrough"]);
    /// The most that write-back writes to the base in a second, in MiB, whatever the reason; 0: as much as it
    /// can. 0, because whatever stays dirty for want of a rate is missing when a burst comes.
    WritebackRateMibS = 3, "writeback_rate_mib_s", 0, Number { min: 0, max: 1_000_000 };
    /// Write-back that began for want of room ends when so much of the cache, in percent, is dirty. 20: what
    /// was written last is the likeliest to be overwritten, and is left alone.
    DirtyLowPercent = 4, "dirty_low_percent", 20, Number { min: 0, max: 94 };
    /// Above this share of the cache, in percent, dirty data are written back. 30: most of the cache stays free
    /// to take a burst meanwhile. Greater than `dirty_low_percent`.
    DirtyHighPercent = 5, "dirty_high_percent", 30, Number { min: 1, max: 95 };
    /// Dirty data older than this, in seconds, are written back even if there is room; 0: they are not. 5: the
    /// base is never much older than what a file system would have left in memory.
    DirtyAgeS = 6, "dirty_age_s", 5, Number { min: 0, max: 86_400 };
    /// When there have been no requests for so many milliseconds, dirty data are written back; 0: they are not.
    /// 0, because the age sees to it soon enough, and what waits longer is overwritten in the cache more often.
    IdleWritebackMs = 7, "idle_writeback_ms", 0, Number { min: 0, max: 3_600_000 };
    /// How fast the cache device is read to find damage in it, in MiB/s; 0: not at all. 8: a cache of 100 GiB
    /// in four hours, for a thousandth of what its memory and a core can do.
    ScrubMibS = 11, "scrub_mib_s", 8, Number { min: 0, max: 4096 };
    /// How what reads bring from the base comes into the cache. Sequence: what a scan reads is not likely to be read
    /// again, and must not drive out what is.
    ReadAdmission = 12, "read_admission", 0, Words(&["sequence", "probation", "always"]);
    /// From how many KiB on reads that go on where others ended are a sequence. 32: what reads less at a time has
    /// looked for something; on a trace of a virtual machine 32 did better than 64 to 1024 at all sizes of the cache.
    SequentialKib = 13, "sequential_kib", 32, Number { min: 4, max: 4_194_304 };
    /// From how many KiB on a sequence of reads is not put into the cache at all; 0: never. 0, because what is on
    /// probation takes little room, and parts of it are often read again at once.
    SequentialCutoffKib = 14, "sequential_cutoff_kib", 0, Number { min: 0, max: 4_194_304 };
    /// Whether what a read takes from the cache is compared with its checksum first. Takes `data_crc`. No, because a
    /// read hit then takes half as long again, and the scrub finds most of what it would find.
    VerifyReads = 15, "verify_reads", 0, Flag;
}

impl Setting {
    /// Its row.
    #[must_use]
    pub fn info(self) -> &'static SettingInfo {
        &SETTINGS[self as usize]
    }
}

impl SettingInfo {
    /// Whether it can be that.
    #[must_use]
    pub fn allows(&self, value: u32) -> bool {
        match self.kind {
            Number { min, max } => (min..=max).contains(&value),
            Words(words) => (value as usize) < words.len(),
            Flag => value <= 1,
        }
    }

    /// # Errors
    /// It cannot be that.
    pub fn check(&self, value: u32) -> Result<(), SettingError> {
        if self.allows(value) {
            return Ok(());
        }
        Err(SettingError::OutOfRange {
            name: self.name,
            value,
            right: self.kind.to_string(),
        })
    }
}

/// What would be right, in words.
impl fmt::Display for SettingValueKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Number { min, max } => write!(f, "a whole number from {min} to {max}"),
            Words(words) => {
                f.write_str("one of ")?;
                for (at, word) in words.iter().enumerate() {
                    let comma = if at > 0 { ", " } else { "" };
                    write!(f, "{comma}\"{word}\"")?;
                }
                Ok(())
            }
            Flag => f.write_str("true or false"),
        }
    }
}

/// Why a setting was not changed. The text names the value and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// Out of range.
    #[error("{name} is {value}: {right} is needed")]
    OutOfRange {
        /// Of the setting.
        name: &'static str,
        /// What was asked for.
        value: u32,
        /// What would do.
        right: String,
    },
    /// Two settings do not go together.
    #[error("{low} is {low_value} and {high} is {high_value}: {low} below {high} is needed")]
    NotBelow {
        /// The one that has to be lower.
        low: &'static str,
        /// Its value.
        low_value: u32,
        /// The other.
        high: &'static str,
        /// Its value.
        high_value: u32,
    },
    /// Something is to be compared with checksums that are not kept.
    #[error(
        "{name} is true and data_crc is false: the cache keeps no checksums to compare with; data_crc is fixed at format"
    )]
    NeedsDataCrc {
        /// Of the setting.
        name: &'static str,
    },
}

/// Why a cache in use does not change its settings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// A value is not right.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// Nothing is stored to its device any more, so that a change would be forgotten.
    #[error(
        "the cache has failed, and its device stays as it is: no option is changed before the application is started again"
    )]
    Failed,
}

/// The value of every setting, as the superblock keeps it. A slot holds the value and one more, or 0 where the
/// default holds: a setting that came later, or was never touched, follows its default. What a newer version
/// keeps in a slot that is unknown here is carried along.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SettingValues {
    slots: [u32; SETTING_SLOT_COUNT],
}

impl SettingValues {
    /// From the slots of a superblock.
    ///
    /// # Errors
    /// A known setting is out of range.
    pub fn from_slots(slots: [u32; SETTING_SLOT_COUNT]) -> Result<Self, SettingError> {
        let values = Self { slots };
        values.check()?;
        Ok(values)
    }

    /// For a superblock.
    #[must_use]
    pub fn slots(&self) -> &[u32; SETTING_SLOT_COUNT] {
        &self.slots
    }

    /// What holds.
    #[must_use]
    pub fn get(&self, setting: Setting) -> u32 {
        let info = setting.info();
        match self.slots[info.slot] {
            0 => info.default,
            kept => kept - 1,
        }
    }

    /// Order of write-back.
    #[must_use]
    pub fn writeback_order(&self) -> WritebackOrder {
        WritebackOrder::from_setting(self.get(Setting::WritebackOrder))
    }

    /// What is to become of reads and writes.
    #[must_use]
    pub fn cache_mode(&self) -> CacheMode {
        CacheMode::from_setting(self.get(Setting::CacheMode))
    }

    /// With what is to be changed.
    ///
    /// # Errors
    /// A value is out of range, or does not go with the others.
    pub fn with(mut self, change: &SettingChange) -> Result<Self, SettingError> {
        for info in SETTINGS {
            if let Some(value) = change.get(info.setting) {
                info.check(value)?;
                self.slots[info.slot] = value + 1;
            }
        }
        self.check()?;
        Ok(self)
    }

    /// Ranges, and what must hold between settings.
    fn check(&self) -> Result<(), SettingError> {
        for info in SETTINGS {
            info.check(self.get(info.setting))?;
        }
        self.check_below(Setting::DirtyLowPercent, Setting::DirtyHighPercent)
    }

    /// What must hold between settings and what formatting has fixed.
    ///
    /// # Errors
    /// They do not go together.
    pub fn check_with(&self, data_crc: DataCrc) -> Result<(), SettingError> {
        let setting = Setting::VerifyReads;
        if data_crc == DataCrc::Off && self.get(setting) != 0 {
            let name = setting.info().name;
            return Err(SettingError::NeedsDataCrc { name });
        }
        Ok(())
    }

    fn check_below(&self, low: Setting, high: Setting) -> Result<(), SettingError> {
        let (low_value, high_value) = (self.get(low), self.get(high));
        if low_value < high_value {
            return Ok(());
        }
        Err(SettingError::NotBelow {
            low: low.info().name,
            low_value,
            high: high.info().name,
            high_value,
        })
    }
}

/// An object of names and values: numbers, or words.
impl Serialize for SettingValues {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(SETTINGS.len()))?;
        for info in SETTINGS {
            let value = self.get(info.setting);
            match info.kind {
                Number { .. } => map.serialize_entry(info.name, &value)?,
                Words(words) => map.serialize_entry(info.name, words[value as usize])?,
                Flag => map.serialize_entry(info.name, &(value != 0))?,
            }
        }
        map.end()
    }
}

/// Names and values in a line.
impl fmt::Display for SettingValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, info) in SETTINGS.iter().enumerate() {
            let comma = if at > 0 { ", " } else { "" };
            let value = self.get(info.setting);
            write!(f, "{comma}{} ", info.name)?;
            match info.kind {
                Number { .. } => write!(f, "{value}")?,
                Words(words) => f.write_str(words[value as usize])?,
                Flag => write!(f, "{}", value != 0)?,
            }
        }
        Ok(())
    }
}

/// Some settings that are to get other values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SettingChange {
    values: [Option<u32>; SETTING_SLOT_COUNT],
}

impl SettingChange {
    /// One setting.
    #[must_use]
    pub fn of(setting: Setting, value: u32) -> Self {
        Self::default().and(setting, value)
    }

    /// One more.
    #[must_use]
    pub fn and(mut self, setting: Setting, value: u32) -> Self {
        self.values[setting.info().slot] = Some(value);
        self
    }

    /// What a setting is to be, if it is to change.
    #[must_use]
    pub fn get(&self, setting: Setting) -> Option<u32> {
        self.values[setting.info().slot]
    }

    /// Nothing is to change.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Everything as it is, to say it again.
    #[must_use]
    pub fn all_of(values: &SettingValues) -> Self {
        SETTINGS.iter().fold(Self::default(), |change, info| {
            change.and(info.setting, values.get(info.setting))
        })
    }
}

/// The settings of a cache in use. Any thread reads them, at the cost of a plain load; a change is seen some time
/// later, each setting by itself.
#[derive(Debug)]
pub(crate) struct Settings {
    values: Box<[AtomicU32]>,
}

impl Settings {
    pub(crate) fn new(values: &SettingValues) -> Self {
        let values = SETTINGS.iter().map(|info| values.get(info.setting));
        Self {
            values: values.map(AtomicU32::new).collect(),
        }
    }

    #[inline]
    pub(crate) fn get(&self, setting: Setting) -> u32 {
        self.values[setting as usize].load(Ordering::Relaxed)
    }

    pub(crate) fn publish(&self, values: &SettingValues) {
        for (live, info) in self.values.iter().zip(SETTINGS) {
            live.store(values.get(info.setting), Ordering::Relaxed);
        }
    }

    pub(crate) fn writeback_order(&self) -> WritebackOrder {
        WritebackOrder::from_setting(self.get(Setting::WritebackOrder))
    }

    pub(crate) fn read_admission(&self) -> ReadAdmission {
        ReadAdmission::from_setting(self.get(Setting::ReadAdmission))
    }

    #[inline]
    pub(crate) fn cache_mode(&self) -> CacheMode {
        CacheMode::from_setting(self.get(Setting::CacheMode))
    }

    #[inline]
    pub(crate) fn verifies_reads(&self) -> bool {
        self.get(Setting::VerifyReads) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn rows_have_their_own_slot_and_name_and_a_default_in_range() {
        let slots: BTreeSet<_> = SETTINGS.iter().map(|info| info.slot).collect();
        let names: BTreeSet<_> = SETTINGS.iter().map(|info| info.name).collect();
        assert_eq!((slots.len(), names.len()), (SETTINGS.len(), SETTINGS.len()));
        for (at, info) in SETTINGS.iter().enumerate() {
            assert_eq!(info.setting as usize, at);
            assert!(info.slot < SETTING_SLOT_COUNT);
            info.check(info.default).unwrap();
        }
        SettingValues::default().check().unwrap();
    }

    #[test]
    fn a_wrong_value_is_refused_with_the_range_and_changes_nothing() {
        let values = SettingValues::default();
        let error = values
            .with(&SettingChange::of(Setting::GcPercent, 91))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "gc_percent is 91: a whole number from 0 to 90 is needed"
        );
        let mut slots = [0; SETTING_SLOT_COUNT];
        slots[Setting::WritebackOrder.info().slot] = 3;
        let error = SettingValues::from_slots(slots).unwrap_err();
        assert_eq!(
            error.to_string(),
            "writeback_order is 2: one of \"strict\", \"relaxed\" is needed"
        );
    }

    #[test]
    fn marks_that_do_not_go_together_are_refused_and_both_are_named() {
        let values = SettingValues::default();
        let change = SettingChange::of(Setting::DirtyLowPercent, 30);
        let error = values.with(&change).unwrap_err();
        assert_eq!(
            error.to_string(),
            "dirty_low_percent is 30 and dirty_high_percent is 30: dirty_low_percent below dirty_high_percent is needed"
        );
        // Together they may pass each other.
        let changed = values
            .with(&change.and(Setting::DirtyHighPercent, 31))
            .unwrap();
        assert_eq!(changed.get(Setting::DirtyLowPercent), 30);
    }

    #[test]
    fn reads_are_not_verified_without_checksums() {
        let values = SettingValues::default();
        let verified = values
            .with(&SettingChange::of(Setting::VerifyReads, 1))
            .unwrap();
        assert_eq!(values.check_with(DataCrc::Off), Ok(()));
        assert_eq!(verified.check_with(DataCrc::On), Ok(()));
        assert_eq!(
            verified.check_with(DataCrc::Off).unwrap_err().to_string(),
            "verify_reads is true and data_crc is false: the cache keeps no checksums to compare with; \
             data_crc is fixed at format"
        );
    }

    #[test]
    fn what_is_not_known_is_kept() {
        let mut slots = [0; SETTING_SLOT_COUNT];
        slots[SETTING_SLOT_COUNT - 1] = 77;
        let values = SettingValues::from_slots(slots).unwrap();
        let changed = values
            .with(&SettingChange::of(Setting::GcPercent, 5))
            .unwrap();
        assert_eq!(changed.slots()[SETTING_SLOT_COUNT - 1], 77);
        assert_eq!(changed.get(Setting::GcPercent), 5);
        assert_eq!(changed.writeback_order(), WritebackOrder::Strict);
    }

    #[test]
    fn words_and_flags_are_told_as_such() {
        let values = SettingValues::default();
        let json = serde_json::to_value(values).unwrap();
        assert_eq!(json["gc_percent"], 70);
        assert_eq!(json["writeback_order"], "strict");
        assert_eq!(json["verify_reads"], false);
    }
}
