//! All dirty data to the base, without SPDK: the way out when the host is gone.
//!
//! The engine does it, as it does for a host: it opens the cache, repairs what a crash left half done, and
//! writes back in the order that the cache is set to. Here is only what carries out its base operations. So a
//! kill at any moment does no more harm than one of the host, and the next drain goes on from there.

use super::header::load_superblock;
use super::progress::clock;
use super::{BaseAccess, BaseFile, InspectError, ProgressLine};
use crate::engine::{
    BaseCaps, BaseGrowth, BaseIdentity, Budget, Cache, FormatPolicy, Health, OpenOptions, Outbox,
    Progress, SettingChange,
};
use crate::media::Superblock;
use crate::pmem::{Extent, MapRequest, MappedPmem, Part, Pmem, ReadOnlyPmem, Sharing};
use crate::recovery::{OpenStep, Opening};
use crate::units::{Now, PAGE_SIZE_BYTES};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How long to wait where the background has nothing to do at the moment.
const IDLE: Duration = Duration::from_millis(1);

/// What a drain has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Payload that was dirty.
    pub dirty_bytes: u64,
    /// Payload that was written: less, if some of it was overwritten.
    pub written_bytes: u64,
    /// Batches, each of them flushed.
    pub batches: u64,
}

/// Writes all dirty data of the cache at `cache_path`, or in a part of it, to the base at `base_path`. The cache stays, with
/// everything in it clean.
///
/// # Errors
/// The cache or the base cannot be had, they do not belong together, or one of them is damaged. Nothing was
/// written if so, unless the error came in the middle: then what is written so far is right, and a drain can
/// be started again.
pub fn drain(
    cache_path: &Path,
    part: Option<Part>,
    base_path: &Path,
    progress: &mut ProgressLine,
) -> Result<Drained, InspectError> {
    // What holds no cache is not opened for writing: that would already fill the holes of a file.
    let (superblock, _) =
        load_superblock(&ReadOnlyPmem::open(cache_path, part, Sharing::Readers)?)?;
    let pmem = MappedPmem::open(&MapRequest {
        path: cache_path.to_owned(),
        extent: part.map_or(Extent::Whole, Extent::Part),
        size_bytes_min: 1,
    })?;
    let block_size_bytes = superblock.base.block_size_bytes;
    let mut base = BaseFile::open(base_path, BaseAccess::Write, block_size_bytes)?;
    let cache = open(pmem, options(&superblock, &base), &base, progress)?;
    write_back(&cache, &mut base, progress)
}

/// A file has neither a uuid nor a bdev's name; the cache's own are given in their place. Size and content
/// decide.
fn options(superblock: &Superblock, base: &BaseFile) -> OpenOptions {
    OpenOptions {
        base: BaseIdentity {
            block_count: base.block_count(),
            ..superblock.base.clone()
        },
        base_caps: BaseCaps {
            flush: true,
            // What is unmapped is zeroed instead, so that it reads the same from whatever is below.
            unmap: false,
            write_zeroes: true,
        },
        format: FormatPolicy::Never,
        new_uuid: superblock.uuid,
        data_crc: None,
        segment_size_bytes: None,
        base_growth: BaseGrowth::Refuse,
        settings: SettingChange::default(),
        stream_count_max: 1,
    }
}

fn open<P: Pmem>(
    pmem: P,
    options: OpenOptions,
    base: &BaseFile,
    progress: &mut ProgressLine,
) -> Result<Arc<Cache<P>>, InspectError> {
    let block_size_bytes = options.base.block_size_bytes as usize;
    let mut page = [0; PAGE_SIZE_BYTES as usize];
    let mut opening = Opening::begin(pmem, options)?;
    loop {
        match opening.poll()? {
            OpenStep::Working { done, total } => progress.show("opening", done, total),
            OpenStep::AwaitingBase => {}
            OpenStep::ReadBase {
                slot,
                lba,
                len_blocks,
            } => {
                // 4 KiB at most.
                let blocks = &mut page[..len_blocks as usize * block_size_bytes];
                base.read(lba, blocks)?;
                opening.on_base_block(slot, Ok(blocks));
            }
            OpenStep::Ready => return Ok(opening.finish()),
        }
    }
}

fn write_back<P: Pmem>(
    cache: &Arc<Cache<P>>,
    base: &mut BaseFile,
    progress: &mut ProgressLine,
) -> Result<Drained, InspectError> {
    let Some(mut background) = cache.background() else {
        unreachable!("nobody else has the background of a cache that was just opened")
    };
    let start = clock();
    let mut out = Outbox::new();
    cache.drain_start();
    loop {
        let status = cache.drain_status();
        let (all, left) = (status.dirty_bytes_start, status.dirty_bytes_left);
        if !status.in_progress {
            let stats = cache.stats();
            return Ok(Drained {
                dirty_bytes: all,
                written_bytes: stats.writeback_bytes,
                batches: stats.writeback_batches,
            });
        }
        if let Health::Degraded(reason) | Health::Failed(reason) = cache.health() {
            let dirty_bytes_left = left;
            return Err(InspectError::Damaged {
                reason,
                dirty_bytes_left,
            });
        }
        progress.show("writing back", all.saturating_sub(left), all);
        let now = Now(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
        out.clear();
        let worked = background.poll(now, Budget::default(), &mut out);
        for request in &out.base {
            base.run(request, &out.sources)?;
            background.note_zeroes(base.zeroes_went());
            background.on_base_done(request.op, Ok(()), now);
        }
        if worked == Progress::Idle && out.base.is_empty() {
            std::thread::sleep(IDLE);
        }
    }
}
