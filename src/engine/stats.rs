//! Counters, always on. Each channel has a set of its own that it alone writes; readers add them up.

mod histogram;

use histogram::Histograms;
pub use histogram::{Distribution, Distributions};
use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with one writer: no locked instruction.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    #[inline]
    pub(crate) fn add(&self, amount: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(amount),
            Ordering::Relaxed,
        );
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// The counters of one channel, or of the background.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $($(#[doc = $doc])+ pub(crate) $name: Counter,)+
            pub(crate) histograms: Histograms,
            /// Pages of what was written, unmapped or cleared; for write-back.
            pub(crate) pages: Counter,
        }

        /// Statistics of a cache since its creation or the last reset. Counts of requests, bytes of data.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct Stats {
            $($(#[doc = $doc])+ pub $name: u64,)+
            /// Sizes of batches, lengths of phases.
            pub distributions: Distributions,
        }

        impl Stats {
            pub(crate) fn add(&mut self, counters: &Counters) {
                $(self.$name = self.$name.wrapping_add(counters.$name.get());)+
                self.distributions.add(&counters.histograms);
            }

            /// What has come since `earlier`.
            #[must_use]
            pub fn since(&self, earlier: &Stats) -> Stats {
                Stats {
                    $($name: self.$name.wrapping_sub(earlier.$name),)+
                    distributions: self.distributions.since(&earlier.distributions),
                }
            }
        }
    };
}

counters! {
    /// Read requests answered from the cache alone, with those that waited for that.
    read_hits,
    /// Read requests answered in part from the cache.
    read_partial_hits,
    /// Read requests answered from the base alone.
    read_misses,
    /// Read requests answered by lending the place of the data instead of copying them; also hits.
    lent_reads,
    /// Bytes read by the host.
    read_bytes,
    /// Those of them that were copied out of the cache device, or lent there.
    hit_bytes,
    /// Those of them that were compared with their checksums, with what had to be read to do so.
    verified_bytes,
    /// Pages of 4 KiB that read requests touched, each counted once for a request.
    read_pages,
    /// Those of them of which at least one block had to come from the base.
    read_missed_pages,
    /// Write requests.
    writes,
    /// Bytes written by the host.
    write_bytes,
    /// UNMAP requests.
    unmaps,
    /// WRITE_ZEROES requests.
    write_zeroes,
    /// FLUSH requests.
    flushes,
    /// Writes with FUA.
    fua_writes,
    /// Batches appended to the log.
    batches,
    /// Keys appended to the log.
    keys,
    /// Bytes appended to the log: payloads and keys.
    logged_bytes,
    /// Read fills put into the cache, in bytes.
    fill_bytes,
    /// Read fills given up: overtaken by a write, or no room.
    fills_dropped,
    /// Polls in which a request had to wait because another core was at the same page.
    conflicts,
    /// Polls in which a write had to wait for room in the cache.
    space_waits,
    /// Times in which writes stood still for want of room in the cache, counted when they begin.
    stalls,
    /// How long these were in all, in microseconds, up to now if one is under way.
    stall_us,
    /// Requests that failed.
    failed,
    /// Base reads for misses that failed.
    base_read_errors,
    /// Bytes read from the base for misses, with what came along to make whole pages of them.
    base_read_bytes,
    /// Bytes of misses that were served by the base read of another request.
    joined_read_bytes,
    /// Read requests that waited for what the base read of another one was to put into the cache.
    awaited_reads,
    /// Bytes written back to the base.
    writeback_bytes,
    /// Zeroes that the base got as data in write-back, since it does not take WRITE_ZEROES itself, in bytes.
    writeback_zeroes_bytes,
    /// Dirty bytes that were overwritten before they were written back.
    absorbed_bytes,
    /// Write-back batches finished.
    writeback_batches,
    /// Dirty bytes in them, overwritten ones included: with the number of batches, their mean size.
    writeback_dirty_bytes,
    /// Writes, unmaps and write-zeroes of write-back that the base failed. They are repeated.
    base_write_errors,
    /// Flushes that the base failed. Everything before them is written again.
    base_flush_errors,
    /// Segments reclaimed.
    segments_reclaimed,
    /// Segments of those that were overwritten for the most part; what was left was copied.
    segments_compacted,
    /// Bytes that reclaiming has copied because they were read again, or were left in a segment that was overwritten
    /// for the most part.
    gc_copied_bytes,
    /// Payloads whose checksum was wrong.
    crc_errors,
    /// Reads of the cache's memory that failed.
    poisoned_reads,
    /// Ksets of the log in use that could not be read, or were not valid any more.
    key_errors,
    /// Copies of superblock, tails or segment infos that were found unreadable.
    metadata_errors,
    /// Bytes that the scrub has looked at.
    scrubbed_bytes,
    /// Times that the scrub has been through the whole cache.
    scrub_passes,
    /// Records that the scrub has made whole again.
    scrub_repairs,
}
