//! The superblock: what the cache is, and whose.
//!
//! Formatting must be safe against a cut at any store, and must never take foreign data for its own. The
//! word at offset 0 of the first copy turns to [`UNFINISHED_MARK`] first; the second copy is the first to
//! become valid, and with it the cache exists.

use super::layout::{SEGMENTS_START_MIN_BYTES, SUPERBLOCK_OFFS};
use super::pair::{PairHeaderOnMedia, PairRecord, load_pair, persist_pair};
use super::{Checksums, Copies, Geometry, GeometryError, PairError};
use crate::engine::{
    BaseIdentity, DataCrc, SETTING_SLOT_COUNT, Setting, SettingChange, SettingError, SettingValues,
};
use crate::pmem::{Durable, Pmem, PmemRead, Poisoned};
use crate::units::{Agent, PmemOff};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

const MAGIC: [u8; 8] = *b"pcache\r\n";
/// Word 0 of a device that is being formatted.
const UNFINISHED_MARK: [u8; 8] = *b"unfinish";
/// The version of the format that this code writes and reads.
const FORMAT_VERSION: u32 = 1;
/// Compatible features of this version, set in every superblock that it writes.
pub const FEATURES_COMPAT: u64 = FEATURE_COMPAT_BATCH_END | FEATURE_COMPAT_SETTINGS;
/// `batch_end` in the tails is kept. Where it is not, it is 0.
const FEATURE_COMPAT_BATCH_END: u64 = 1;
/// The superblock has a table of settings. Where it has not, the table is zero: defaults.
const FEATURE_COMPAT_SETTINGS: u64 = 2;
/// Incompatible features of this version, set in every superblock that it can change.
pub const FEATURES_INCOMPAT: u64 = FEATURE_INCOMPAT_UNFENCED_PAYLOADS;
/// Ksets may have the flag of [`super::Proof::Checksums`], which a reader must not pass over.
const FEATURE_INCOMPAT_UNFENCED_PAYLOADS: u64 = 1;
const FEATURES_RO_COMPAT_KNOWN: u64 = 0;
const BASE_NAME_MAX_BYTES: usize = 255;

/// A device counts as blank only if so many bytes at its start and at its end are zero: that is where file
/// systems, partition tables, RAID and volume managers have what they are recognised by.
const BLANK_BYTES: u64 = 1 << 20;

const OPTION_DATA_CRC: u32 = 1;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct SuperblockOnMedia {
    /// `word` is the format version.
    header: PairHeaderOnMedia,
    magic: [u8; 8],
    features_compat: U64,
    features_ro_compat: U64,
    features_incompat: U64,
    uuid: [u8; 16],
    device_size: U64,
    segments_start: U64,
    segment_size: U64,
    segment_count: U32,
    block_size: U32,
    options: U32,
    gc_percent: u8,
    writeback_order: u8,
    rsv0: [u8; 2],
    base_uuid: [u8; 16],
    base_block_count: U64,
    base_name_len: U32,
    rsv1: [u8; 4],
    base_name: [u8; 256],
    settings: [U32; SETTING_SLOT_COUNT],
}

const _: () = {
    assert!(size_of::<SuperblockOnMedia>() == 512);
    assert!(core::mem::offset_of!(SuperblockOnMedia, magic) == 16);
    assert!(core::mem::offset_of!(SuperblockOnMedia, base_name) == 136);
};

impl PairRecord for SuperblockOnMedia {
    fn header(&self) -> &PairHeaderOnMedia {
        &self.header
    }
    fn header_mut(&mut self) -> &mut PairHeaderOnMedia {
        &mut self.header
    }
}

/// The decoded superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Random, made at format.
    pub uuid: [u8; 16],
    /// Size of the device when it was formatted, in bytes.
    pub device_size_bytes: u64,
    /// Where segments lie.
    pub geometry: Geometry,
    /// Checksums of payloads.
    pub data_crc: DataCrc,
    /// What can be changed while the cache is in use.
    pub settings: SettingValues,
    /// The base device.
    pub base: BaseIdentity,
    /// Features that code may ignore if it does not know them; kept as they are.
    pub features_compat: u64,
    /// Features that code refuses if it does not know them.
    pub features_incompat: u64,
    /// Number of the last update.
    pub update: u64,
}

impl Superblock {
    /// Whether ksets may be stored before the fence of their payloads.
    #[must_use]
    pub fn has_unfenced_payloads(&self) -> bool {
        self.features_incompat & FEATURE_INCOMPAT_UNFENCED_PAYLOADS != 0
    }

    /// The settings, with what is to be changed.
    ///
    /// # Errors
    /// A value is out of range, or does not go with the others, or with what is fixed.
    pub fn settings_with(&self, change: &SettingChange) -> Result<SettingValues, SettingError> {
        let settings = self.settings.with(change)?;
        settings.check_with(self.data_crc)?;
        Ok(settings)
    }
}

/// What the header area of a device holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeaderState {
    /// Zeroes, nothing else, and zeroes also where others keep what they are recognised by.
    Blank,
    /// A format that was cut short. Holds no cache.
    Unfinished,
    /// A cache, and the copies of its superblock.
    Cache(Box<Superblock>, Copies),
}

/// Why the header area cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// Something else lives here.
    #[error(
        "the cache device holds foreign data: its first {SEGMENTS_START_MIN_BYTES} bytes are neither blank nor a cache; only format=force would overwrite them"
    )]
    Foreign,
    /// The header area is blank, but the device is not.
    #[error(
        "the cache device holds foreign data: it is blank at its start, but not at {at}; only format=force would overwrite them"
    )]
    NotBlank {
        /// Where the first byte is that is not zero.
        at: PmemOff,
    },
    /// It was a cache.
    #[error("the superblock of the cache is damaged: {0}")]
    Damaged(PairError),
    /// The device cannot be read.
    #[error(transparent)]
    Poisoned(#[from] Poisoned),
    /// Another version.
    #[error("the cache has format version {found}; this version of pcache knows version {known}")]
    Version {
        /// On the media.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// Newer features.
    #[error(
        "the cache uses format features {unknown:#x} that this version of pcache does not know"
    )]
    Features {
        /// The unknown flags.
        unknown: u64,
    },
    /// Numbers that cannot be.
    #[error("the superblock names an impossible geometry: {0}")]
    Geometry(#[from] GeometryError),
    /// The device is smaller than the cache on it.
    #[error(
        "the cache was made on a device of {expected} bytes, but the device has {found}: it was truncated"
    )]
    Truncated {
        /// When it was formatted.
        expected: u64,
        /// Now.
        found: u64,
    },
    /// A setting has a value that it cannot have.
    #[error("the superblock holds a setting that cannot be: {0}")]
    Setting(#[from] SettingError),
    /// A field holds a value that is not defined.
    #[error("field {field} of the superblock holds {value}, which is not defined")]
    Field {
        /// Its name.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// How the copies of the superblock of a cache in use are.
///
/// # Errors
/// Neither is valid.
pub fn superblock_copies<P: PmemRead>(pmem: &P) -> Result<Copies, PairError> {
    let seed = Checksums::superblock();
    load_pair::<P, SuperblockOnMedia>(pmem, SUPERBLOCK_OFFS, seed).map(|loaded| loaded.copies)
}

/// Finds out what a device holds.
///
/// # Errors
/// Nothing that can be used as it is; the text says what.
pub fn load_header<P: PmemRead>(pmem: &P) -> Result<HeaderState, SuperblockError> {
    if pmem.len_bytes() < SEGMENTS_START_MIN_BYTES {
        let (device, segment) = (pmem.len_bytes(), 1 << 20);
        return Err(GeometryError::TooSmall {
            device,
            segment,
            needed: 5 << 20,
        }
        .into());
    }
    match load_pair::<P, SuperblockOnMedia>(pmem, SUPERBLOCK_OFFS, Checksums::superblock()) {
        Ok(loaded) => {
            let superblock = decode(&loaded.record, pmem.len_bytes())?;
            Ok(HeaderState::Cache(Box::new(superblock), loaded.copies))
        }
        Err(error) => without_superblock(pmem, error),
    }
}

/// Tells blank, unfinished, damaged and foreign apart.
fn without_superblock<P: PmemRead>(
    pmem: &P,
    error: PairError,
) -> Result<HeaderState, SuperblockError> {
    let mut header = vec![0; SEGMENTS_START_MIN_BYTES as usize];
    pmem.read(PmemOff(0), &mut header)?;
    let (mark, magic) = (&header[0..8], &header[16..24]);
    let marked = mark == UNFINISHED_MARK;
    let ours = magic == MAGIC;
    let rest_is_zero = header[8..16]
        .iter()
        .chain(&header[24..])
        .all(|&byte| byte == 0);
    let mark_is_zero = mark == [0; 8];
    let magic_is_zero = magic == [0; 8];
    if rest_is_zero && mark_is_zero && magic_is_zero {
        find_data(pmem)?.map_or(Ok(HeaderState::Blank), |at| {
            Err(SuperblockError::NotBlank { at })
        })
    } else if (marked && ours)
        || (rest_is_zero && (marked || mark_is_zero) && (ours || magic_is_zero))
    {
        Ok(HeaderState::Unfinished)
    } else if ours {
        Err(SuperblockError::Damaged(error))
    } else {
        Err(SuperblockError::Foreign)
    }
}

/// Looks for a byte that is not zero at the start and at the end of a device.
fn find_data<P: PmemRead>(pmem: &P) -> Result<Option<PmemOff>, Poisoned> {
    let size = pmem.len_bytes();
    let start_end = BLANK_BYTES.min(size);
    let end_start = size.saturating_sub(BLANK_BYTES).max(start_end);
    let mut bytes = vec![0; SEGMENTS_START_MIN_BYTES as usize];
    for (from, to) in [(0, start_end), (end_start, size)] {
        let mut at = from;
        while at < to {
            let len = (to - at).min(SEGMENTS_START_MIN_BYTES);
            // At most 64 KiB.
            let part = &mut bytes[..len as usize];
            pmem.read(PmemOff(at), part)?;
            if let Some(found) = part.iter().position(|&byte| byte != 0) {
                return Ok(Some(PmemOff(at + found as u64)));
            }
            at += len;
        }
    }
    Ok(None)
}

/// Marks the device as being formatted. Whatever cache it held is gone once this returns (INV-OPEN-2).
pub fn persist_unfinished_mark<P: Pmem>(pmem: &P, agent: Agent) -> Result<Durable, Poisoned> {
    // 1. The second copy first: while the first is valid, the old cache still exists.
    pmem.store(agent, SUPERBLOCK_OFFS[1], &[0; 512]);
    drop(pmem.fence(agent));
    // 2. One word decides. The others of the line keep their values or, on a blank device, get the magic.
    let mut line = [0; 64];
    pmem.read(SUPERBLOCK_OFFS[0], &mut line)?;
    line[0..8].copy_from_slice(&UNFINISHED_MARK);
    line[16..24].copy_from_slice(&MAGIC);
    pmem.store(agent, SUPERBLOCK_OFFS[0], &line);
    Ok(pmem.fence(agent))
}

/// Writes both copies, the second first: as long as the first carries the mark, it is the second that makes
/// the cache exist. Durable when it returns.
pub fn persist_superblock<P: Pmem>(pmem: &P, agent: Agent, superblock: &mut Superblock) -> Durable {
    superblock.update += 1;
    let offs = [SUPERBLOCK_OFFS[1], SUPERBLOCK_OFFS[0]];
    let media = encode(superblock);
    persist_pair(
        pmem,
        agent,
        offs,
        Checksums::superblock(),
        superblock.update,
        media,
    )
}

fn encode(superblock: &Superblock) -> SuperblockOnMedia {
    let geometry = &superblock.geometry;
    let mut media = SuperblockOnMedia::new_zeroed();
    media.header.word.set(FORMAT_VERSION);
    media.magic = MAGIC;
    media.features_compat.set(superblock.features_compat);
    media.features_incompat.set(superblock.features_incompat);
    media.uuid = superblock.uuid;
    media.device_size.set(superblock.device_size_bytes);
    media.segments_start.set(geometry.segments_start_bytes());
    media.segment_size.set(geometry.segment_size_bytes());
    media.segment_count.set(geometry.segment_count());
    media.block_size.set(geometry.block_size_bytes());
    media.options.set(match superblock.data_crc {
        DataCrc::On => OPTION_DATA_CRC,
        DataCrc::Off => 0,
    });
    encode_settings(&superblock.settings, &mut media);
    media.base_uuid = superblock.base.uuid;
    media.base_block_count.set(superblock.base.block_count);
    let name = superblock.base.name.as_bytes();
    let len = name.len().min(BASE_NAME_MAX_BYTES);
    media.base_name[..len].copy_from_slice(&name[..len]);
    media.base_name_len.set(u32::try_from(len).unwrap_or(0));
    media
}

/// Two settings are older than the table, and have fields of their own; their slots are 0.
const SLOTS_WITH_FIELDS: [Setting; 2] = [Setting::GcPercent, Setting::WritebackOrder];

fn encode_settings(settings: &SettingValues, media: &mut SuperblockOnMedia) {
    for (on_media, slot) in media.settings.iter_mut().zip(settings.slots()) {
        on_media.set(*slot);
    }
    let fields = [&mut media.gc_percent, &mut media.writeback_order];
    for (field, setting) in fields.into_iter().zip(SLOTS_WITH_FIELDS) {
        // Their ranges end far below 256.
        *field = settings.get(setting) as u8;
        media.settings[setting.info().slot].set(0);
    }
}

fn decode_settings(media: &SuperblockOnMedia) -> Result<SettingValues, SettingError> {
    let mut slots = media.settings.map(U32::get);
    let fields = [media.gc_percent, media.writeback_order];
    for (field, setting) in fields.into_iter().zip(SLOTS_WITH_FIELDS) {
        slots[setting.info().slot] = u32::from(field) + 1;
    }
    SettingValues::from_slots(slots)
}

fn decode(media: &SuperblockOnMedia, device: u64) -> Result<Superblock, SuperblockError> {
    let version = media.header.word.get();
    // INV-OPEN-5.
    if media.magic != MAGIC || version != FORMAT_VERSION {
        return Err(SuperblockError::Version {
            found: version,
            known: FORMAT_VERSION,
        });
    }
    let unknown = (media.features_incompat.get() & !FEATURES_INCOMPAT)
        | (media.features_ro_compat.get() & !FEATURES_RO_COMPAT_KNOWN);
    if unknown != 0 {
        return Err(SuperblockError::Features { unknown });
    }
    let expected = media.device_size.get();
    if device < expected {
        return Err(SuperblockError::Truncated {
            expected,
            found: device,
        });
    }
    let geometry = Geometry::from_media(
        expected,
        media.segments_start.get(),
        media.segment_size.get(),
        u64::from(media.segment_count.get()),
        media.block_size.get(),
    )?;
    let field = |field, value| SuperblockError::Field { field, value };
    let options = media.options.get();
    if options & !OPTION_DATA_CRC != 0 {
        return Err(field("options", u64::from(options)));
    }
    let len = media.base_name_len.get();
    let name = usize::try_from(len)
        .ok()
        .filter(|len| (1..=BASE_NAME_MAX_BYTES).contains(len))
        .and_then(|len| media.base_name.get(..len));
    let name = name.and_then(|name| std::str::from_utf8(name).ok());
    let name = name.ok_or_else(|| field("base_name_len", u64::from(len)))?;
    let data_crc = if options & OPTION_DATA_CRC != 0 {
        DataCrc::On
    } else {
        DataCrc::Off
    };
    let settings = decode_settings(media)?;
    settings.check_with(data_crc)?;
    Ok(Superblock {
        uuid: media.uuid,
        device_size_bytes: expected,
        geometry,
        data_crc,
        settings,
        base: BaseIdentity {
            uuid: media.base_uuid,
            name: name.to_owned(),
            block_size_bytes: media.block_size.get(),
            block_count: media.base_block_count.get(),
        },
        features_compat: media.features_compat.get(),
        features_incompat: media.features_incompat.get(),
        update: media.header.update.get(),
    })
}
