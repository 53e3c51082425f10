//! What a machine is made of.

use crate::engine::{
    BaseCaps, BaseGrowth, BaseIdentity, DataCrc, FormatPolicy, OpenOptions, Setting, SettingChange,
    WritebackOrder,
};
use crate::media::SEGMENTS_START_MIN_BYTES;
use crate::sim::pmem::BYTES_CHECKSUMMED_PER_FENCE;
use crate::sim::recover::Crew;

/// What a machine is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// 512 or 4096.
    pub block_size_bytes: u32,
    /// Of the base.
    pub block_count: u64,
    /// Of the base when the cache is made, if it is to grow from there.
    pub block_count_first: Option<u64>,
    /// Of the cache device.
    pub segment_size_bytes: u64,
    /// Of the cache device.
    pub segment_count: u64,
    /// Checksums of payloads.
    pub data_crc: DataCrc,
    /// Order of write-back.
    pub order: WritebackOrder,
    /// See the engine.
    pub gc_percent: u8,
    /// Other settings than these two.
    pub settings: SettingChange,
    /// What the base can do.
    pub base_caps: BaseCaps,
    /// The base fails each unmap, although it claims them.
    pub base_fails_unmaps: bool,
    /// Channels.
    pub core_count: usize,
    /// Memory of a channel for base reads that are to be kept.
    pub pad_pages: usize,
    /// Whose memory changes while it is being read into.
    pub readers: Readers,
    /// Streams, at most.
    pub stream_count_max: u32,
    /// How often somebody else gets a turn in the middle of something, in percent of the accesses.
    pub yield_percent: u8,
    /// See [`crate::pmem::Pmem`].
    pub bytes_checksummed_per_fence: u64,
    /// Of the cache, made at format.
    pub uuid: [u8; 16],
    /// Who opens it.
    pub recovered_by: Crew,
    /// The device held another cache before, whose segments are full.
    pub used_before: bool,
}

/// What readers do with their memory meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readers {
    /// Nothing.
    Patient,
    /// Every other one writes to it all the time. What it gets is its own affair.
    Scribbling,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            block_size_bytes: 512,
            block_count: 96,
            block_count_first: None,
            segment_size_bytes: 16 << 10,
            segment_count: 8,
            data_crc: DataCrc::Off,
            order: WritebackOrder::Strict,
            gc_percent: 60,
            settings: SettingChange::default(),
            base_caps: BaseCaps {
                flush: true,
                unmap: true,
                write_zeroes: true,
            },
            base_fails_unmaps: false,
            core_count: 2,
            pad_pages: 64,
            readers: Readers::Patient,
            stream_count_max: 2,
            yield_percent: 5,
            bytes_checksummed_per_fence: BYTES_CHECKSUMMED_PER_FENCE,
            uuid: *b"simulated cache.",
            recovered_by: Crew {
                worker_count: 2,
                yield_percent: 10,
                seed: 1,
            },
            used_before: false,
        }
    }
}

impl Setup {
    /// Size of the cache device.
    #[must_use]
    pub fn device_size_bytes(&self) -> u64 {
        let header =
            SEGMENTS_START_MIN_BYTES.next_multiple_of(self.segment_size_bytes.min(2 << 20));
        header + self.segment_size_bytes * self.segment_count
    }

    /// As for the RPC that creates the cache.
    #[must_use]
    pub fn options(&self, format: FormatPolicy) -> OpenOptions {
        OpenOptions {
            base: BaseIdentity {
                uuid: *b"simulated base..",
                name: "Base0".to_owned(),
                block_size_bytes: self.block_size_bytes,
                block_count: self.block_count,
            },
            base_caps: self.base_caps,
            base_growth: match self.block_count_first {
                Some(_) => BaseGrowth::Accept,
                None => BaseGrowth::Refuse,
            },
            format,
            new_uuid: self.uuid,
            data_crc: Some(self.data_crc),
            segment_size_bytes: Some(self.segment_size_bytes),
            settings: self
                .settings
                .and(Setting::GcPercent, self.gc_percent.into())
                .and(Setting::WritebackOrder, self.order as u32),
            stream_count_max: self.stream_count_max,
        }
    }

    /// The largest write, in blocks.
    #[must_use]
    pub fn write_blocks_max(&self) -> u64 {
        (self.segment_size_bytes / 4).min(1 << 20) / u64::from(self.block_size_bytes)
    }
}
