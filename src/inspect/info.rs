//! What a cache is, and how much it holds.

use super::header::{self, Header};
use super::notes::{Damage, note_damage, note_refusal};
use super::{Findings, InspectError, ProgressLine};
use crate::engine::{DataCrc, SettingValues};
use crate::media::{Key, KeyKind, Kset, Superblock, Tails};
use crate::pmem::PmemRead;
use crate::recovery::walk::{SegmentWalk, WalkBuf, load_info};
use crate::units::SegId;
use serde::Serialize;
use std::fmt;

/// A cache, described.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Info {
    /// Of the cache, made at format: 32 hexadecimal digits.
    pub uuid: String,
    /// Number of the last update of the superblock.
    pub update: u64,
    /// The device in front of which it stands.
    pub base: BaseInfo,
    /// Where things lie.
    pub geometry: GeometryInfo,
    /// Its options.
    pub options: OptionInfo,
    /// How far it is written back and reclaimed.
    pub tails: TailsInfo,
    /// What is known of the base's content. Unused entries are left out.
    pub witness: Vec<WitnessInfo>,
    /// What its segments are used for.
    pub segments: SegmentStates,
    /// What the log holds.
    pub log: LogInfo,
}

/// By what a cache knows its base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BaseInfo {
    /// 32 hexadecimal digits.
    pub uuid: String,
    /// The bdev's name.
    pub name: String,
    /// In bytes.
    pub block_size: u32,
    /// Size in blocks.
    pub block_count: u64,
}

/// Where things lie. All in bytes but the count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct GeometryInfo {
    /// When it was formatted.
    pub device_size: u64,
    /// Where the first segment starts.
    pub segments_start: u64,
    /// Size of a segment.
    pub segment_size: u64,
    /// How many there are.
    pub segment_count: u32,
}

/// Its options.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct OptionInfo {
    /// Whether payloads carry checksums.
    pub data_crc: bool,
    /// What can be changed while the cache is in use.
    #[serde(flatten)]
    pub settings: SettingValues,
}

/// The tails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TailsInfo {
    /// The log up to here is on the base.
    pub dirty_tail: u64,
    /// Keys up to here count for nothing.
    pub key_tail: u64,
    /// The next seq is at least this.
    pub seq_next_min: u64,
    /// The next epoch is at least this.
    pub epoch_min: u64,
    /// A batch up to here may be on the base in part; at or below `dirty_tail`: none.
    pub batch_end: u64,
    /// Number of their last update.
    pub update: u64,
}

/// An entry of the witness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct WitnessInfo {
    /// First block.
    pub lba: u64,
    /// Number of blocks.
    pub len_blocks: u32,
    /// CRC-32C of what the base holds there.
    pub crc: u32,
}

/// How many segments are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SegmentStates {
    /// Hold nothing.
    pub free: u32,
    /// Hold ksets, and were being appended to.
    pub open: u32,
    /// Full.
    pub sealed: u32,
    /// Hold nothing that counts any more; the next opening frees them.
    pub dead: u32,
    /// Their info or keys are damaged.
    pub damaged: u32,
    /// Of all these, how many hold ksets that are not written back.
    pub dirty: u32,
}

/// What the log holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LogInfo {
    /// Ksets that count.
    pub ksets: u64,
    /// Their keys.
    pub keys: u64,
    /// Ksets that are not written back.
    pub dirty_ksets: u64,
    /// Payload that is not written back, in bytes; overwritten data count too.
    pub dirty_bytes: u64,
    /// Blocks to be zeroed or unmapped on the base; overlapping ones count more than once.
    pub dirty_zero_blocks: u64,
    /// The highest seq.
    pub seq_max: u64,
    /// The lowest epoch that is not written back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_epoch_min: Option<u64>,
    /// The highest epoch.
    pub epoch_max: u64,
}

/// Looks at the header area and at all keys. Findings are those that it meets on its way; `verify` has all.
///
/// # Errors
/// There is no cache on the device, or nothing is known of it.
pub fn info<P: PmemRead>(
    pmem: &P,
    findings: &mut Findings<'_>,
    progress: &mut ProgressLine,
) -> Result<Info, InspectError> {
    let Header { superblock, tails } = header::load(pmem, findings)?;
    let count = superblock.geometry.segment_count();
    let (mut states, mut log) = (SegmentStates::default(), LogInfo::default());
    let mut buf = WalkBuf::default();
    for id in (0..count).map(SegId) {
        let info = match load_info(pmem, &superblock, id) {
            Ok((info, _)) => info,
            Err(error) => {
                states.damaged += 1;
                note_refusal(findings, "segment info", &error, Some(id.0))?;
                continue;
            }
        };
        let mut walk = SegmentWalk::new(&superblock, tails.dirty_tail, id, info);
        while let Some(kset) = walk.next(pmem, &mut buf) {
            log.note(&superblock, &tails, &kset, &buf.keys);
        }
        let damage = note_damage(pmem, &walk, &mut buf, &tails, findings)?;
        states.note(&walk, damage, info.sealed.is_some(), &tails);
        progress.show("looking at segments", u64::from(id.0), u64::from(count));
    }
    Ok(describe(&superblock, &tails, states, log))
}

impl SegmentStates {
    fn note(&mut self, walk: &SegmentWalk, damage: Damage, is_sealed: bool, tails: &Tails) {
        let holds_ksets = walk.kset_count() > 0;
        let state = match damage {
            Damage::GivenUp | Damage::Refused => &mut self.damaged,
            Damage::None if !holds_ksets && !is_sealed => &mut self.free,
            Damage::None if walk.last_seq() <= tails.key_tail => &mut self.dead,
            Damage::None if is_sealed => &mut self.sealed,
            Damage::None => &mut self.open,
        };
        *state += 1;
        self.dirty += u32::from(holds_ksets && walk.last_seq() > tails.dirty_tail);
    }
}

impl LogInfo {
    fn note(&mut self, superblock: &Superblock, tails: &Tails, kset: &Kset, keys: &[Key]) {
        self.seq_max = self.seq_max.max(kset.seq.0);
        self.epoch_max = self.epoch_max.max(kset.epoch.0);
        if kset.seq <= tails.key_tail {
            return;
        }
        self.ksets += 1;
        self.keys += keys.len() as u64;
        if kset.seq <= tails.dirty_tail {
            return;
        }
        self.dirty_ksets += 1;
        let epoch_min = self.dirty_epoch_min.unwrap_or(u64::MAX);
        self.dirty_epoch_min = Some(epoch_min.min(kset.epoch.0));
        for key in keys {
            let len_blocks = u64::from(key.len_blocks);
            match key.kind {
                KeyKind::Data => self.dirty_bytes += superblock.geometry.bytes(len_blocks),
                KeyKind::Zeroes | KeyKind::Unmap => self.dirty_zero_blocks += len_blocks,
                KeyKind::Fill => {}
            }
        }
    }
}

fn hex(uuid: &[u8; 16]) -> String {
    uuid.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn describe(superblock: &Superblock, tails: &Tails, segments: SegmentStates, log: LogInfo) -> Info {
    let geometry = &superblock.geometry;
    let used = tails.witness.iter().filter(|entry| entry.len_blocks > 0);
    Info {
        uuid: hex(&superblock.uuid),
        update: superblock.update,
        base: BaseInfo {
            uuid: hex(&superblock.base.uuid),
            name: superblock.base.name.clone(),
            block_size: superblock.base.block_size_bytes,
            block_count: superblock.base.block_count,
        },
        geometry: GeometryInfo {
            device_size: superblock.device_size_bytes,
            segments_start: geometry.segments_start_bytes(),
            segment_size: geometry.segment_size_bytes(),
            segment_count: geometry.segment_count(),
        },
        options: OptionInfo {
            data_crc: superblock.data_crc == DataCrc::On,
            settings: superblock.settings,
        },
        tails: TailsInfo {
            dirty_tail: tails.dirty_tail.0,
            key_tail: tails.key_tail.0,
            seq_next_min: tails.seq_next_min.0,
            epoch_min: tails.epoch_min,
            batch_end: tails.batch_end.0,
            update: tails.update,
        },
        witness: used
            .map(|entry| WitnessInfo {
                lba: entry.lba.0,
                len_blocks: entry.len_blocks,
                crc: entry.crc,
            })
            .collect(),
        segments,
        log,
    }
}

impl Info {
    /// As JSON, over several lines.
    ///
    /// # Errors
    /// None in practice: it has nothing that JSON cannot say.
    pub fn to_json(&self) -> std::io::Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }
}

impl fmt::Display for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (base, geometry) = (&self.base, &self.geometry);
        writeln!(f, "cache       {} (update {})", self.uuid, self.update)?;
        let name = base.name.escape_debug();
        writeln!(f, "base        {name} ({})", base.uuid)?;
        let (count, size) = (base.block_count, base.block_size);
        writeln!(f, "base size   {count} blocks of {size} bytes")?;
        writeln!(f, "device size {} bytes", geometry.device_size)?;
        let (count, size) = (geometry.segment_count, geometry.segment_size);
        let start = geometry.segments_start;
        writeln!(
            f,
            "geometry    {count} segments of {size} bytes from byte {start:#x} on"
        )?;
        writeln!(f, "options     {}", self.options)?;
        writeln!(f, "tails       {}", self.tails)?;
        for entry in &self.witness {
            let (lba, end) = (entry.lba, entry.lba + u64::from(entry.len_blocks));
            writeln!(f, "witness     blocks {lba}..{end}: {:#010x}", entry.crc)?;
        }
        writeln!(f, "segments    {}", self.segments)?;
        write!(f, "{}", self.log)
    }
}

impl fmt::Display for OptionInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { data_crc, settings } = self;
        write!(f, "data_crc {data_crc}, {settings}")
    }
}

impl fmt::Display for TailsInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            dirty_tail,
            key_tail,
            seq_next_min,
            epoch_min,
            batch_end,
            update,
        } = self;
        write!(
            f,
            "dirty_tail {dirty_tail}, key_tail {key_tail}, batch_end {batch_end}, "
        )?;
        write!(
            f,
            "seq_next_min {seq_next_min}, epoch_min {epoch_min} (update {update})"
        )
    }
}

impl fmt::Display for SegmentStates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            free,
            open,
            sealed,
            dead,
            damaged,
            dirty,
        } = self;
        write!(
            f,
            "{free} free, {open} open, {sealed} sealed, {dead} dead, {damaged} damaged; "
        )?;
        write!(f, "{dirty} with dirty ksets")
    }
}

impl fmt::Display for LogInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ksets, keys, seq, epoch) = (self.ksets, self.keys, self.seq_max, self.epoch_max);
        writeln!(
            f,
            "log         {ksets} ksets with {keys} keys, seq up to {seq}, epoch up to {epoch}"
        )?;
        let (bytes, zeroes, ksets) = (self.dirty_bytes, self.dirty_zero_blocks, self.dirty_ksets);
        write!(
            f,
            "dirty       {bytes} bytes and {zeroes} blocks of zeroes in {ksets} ksets"
        )?;
        match self.dirty_epoch_min {
            Some(epoch) => writeln!(f, " from epoch {epoch} on"),
            None => writeln!(f),
        }
    }
}
