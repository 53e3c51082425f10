//! The engine's cache without SPDK, for the benches: on a real mapping, in front of a base of zeroes.

use pcache::engine::{
    BaseCaps, BaseGrowth, BaseIdentity, Cache, DataCrc, FormatPolicy, OpenOptions, SettingChange,
};
use pcache::pmem::{Extent, MapRequest, MappedPmem};
use pcache::recovery::{OpenStep, Opening};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

/// Maps a new file with memory behind every page.
pub(crate) fn map(path: &Path, size_bytes: u64) -> MappedPmem {
    let request = MapRequest {
        path: path.to_owned(),
        extent: Extent::File { size_bytes },
        size_bytes_min: 1 << 20,
    };
    let mut pmem = MappedPmem::open(&request).expect("the file can be mapped");
    while pmem.populate_next().is_some() {}
    pmem
}

/// The base device of a cache.
#[derive(Clone, Copy)]
pub(crate) struct Base {
    pub(crate) block_size_bytes: u32,
    pub(crate) block_count: u64,
}

/// Another one in each run: what an earlier one has left in the file must not pass for keys of this one.
fn new_uuid() -> [u8; 16] {
    let run = u128::from(std::process::id()) << 64;
    let clock = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    (run ^ clock.as_nanos()).to_le_bytes()
}

pub(crate) fn options(format: FormatPolicy, data_crc: Option<DataCrc>, base: Base) -> OpenOptions {
    OpenOptions {
        base: BaseIdentity {
            uuid: [1; 16],
            name: "bench".to_owned(),
            block_size_bytes: base.block_size_bytes,
            block_count: base.block_count,
        },
        base_caps: BaseCaps {
            flush: true,
            unmap: true,
            write_zeroes: true,
        },
        format,
        new_uuid: new_uuid(),
        data_crc,
        segment_size_bytes: None,
        base_growth: BaseGrowth::Refuse,
        settings: SettingChange::default(),
        // As many as an application asks for: so many segments are kept free.
        stream_count_max: 64,
    }
}

/// A slice of an opening; whether the cache is ready. What is read of the base are zeroes.
pub(crate) fn poll(opening: &mut Opening<MappedPmem>, base: Base) -> bool {
    match opening.poll().expect("the cache opens") {
        OpenStep::ReadBase {
            slot, len_blocks, ..
        } => {
            let len_bytes = len_blocks * u64::from(base.block_size_bytes);
            opening.on_base_block(slot, Ok(&vec![0; len_bytes as usize]));
            false
        }
        OpenStep::Ready => true,
        OpenStep::Working { .. } | OpenStep::AwaitingBase => false,
    }
}

/// Formats a cache.
pub(crate) fn open(pmem: MappedPmem, data_crc: DataCrc, base: Base) -> Arc<Cache<MappedPmem>> {
    let options = options(FormatPolicy::Force, Some(data_crc), base);
    let mut opening = Opening::begin(pmem, options).expect("a new file is formatted");
    while !poll(&mut opening, base) {}
    opening.finish()
}
