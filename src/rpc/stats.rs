//! The answer of `bdev_pcache_get_stats`: in groups, which have the names of OCF's where they mean the same, and every
//! figure in one place. `docs/rpc.md` says what each is.
//!
//! Plain whole numbers: amounts are bytes, lengths of time say their unit. OCF counts amounts in pages, and adds units
//! and shares as text, which whoever collects figures has to take off again.

use crate::engine::{Cache, CacheInfo, Distribution, Stats, Usage};
use crate::pmem::Pmem;
use serde::Serialize;

/// See the module.
#[derive(Debug, Serialize)]
pub(crate) struct Statistics {
    usage: Usage,
    requests: Requests,
    bytes: Bytes,
    errors: Errors,
    log: Log,
    misses: Misses,
    writeback: Writeback,
    gc: Gc,
    scrub: Scrub,
    verify: Verify,
    latency: Latency,
}

impl Statistics {
    pub(crate) fn of<P: Pmem>(cache: &Cache<P>) -> Self {
        let (stats, info) = (cache.stats(), cache.info());
        Self {
            usage: cache.usage(),
            requests: Requests::new(&stats),
            bytes: Bytes::new(&stats),
            errors: Errors::new(&stats),
            log: Log::new(&stats, &info),
            misses: Misses {
                joined_bytes: stats.joined_read_bytes,
                awaited_reads: stats.awaited_reads,
                fill_bytes: stats.fill_bytes,
                fills_dropped: stats.fills_dropped,
            },
            writeback: Writeback {
                dirty_bytes: info.dirty_bytes,
                dirty_age_ms: info.dirty_age_ms,
                batches: stats.writeback_batches,
                batch_bytes: stats.writeback_dirty_bytes,
                absorbed_bytes: stats.absorbed_bytes,
            },
            gc: Gc {
                segments_reclaimed: stats.segments_reclaimed,
                segments_compacted: stats.segments_compacted,
                copied_bytes: stats.gc_copied_bytes,
            },
            scrub: Scrub {
                bytes: stats.scrubbed_bytes,
                passes: stats.scrub_passes,
                repairs: stats.scrub_repairs,
            },
            verify: Verify {
                rd_bytes: stats.verified_bytes,
            },
            latency: Latency::new(&stats),
        }
    }
}

/// What the host asked for.
#[derive(Debug, Serialize)]
struct Requests {
    rd_hits: u64,
    rd_partial_misses: u64,
    rd_full_misses: u64,
    rd_total: u64,
    rd_lent: u64,
    rd_pages: u64,
    rd_missed_pages: u64,
    wr_total: u64,
    wr_fua: u64,
    unmaps: u64,
    write_zeroes: u64,
    flushes: u64,
    total: u64,
}

impl Requests {
    fn new(stats: &Stats) -> Self {
        let rd_total = stats.read_hits + stats.read_partial_hits + stats.read_misses;
        let others = stats.unmaps + stats.write_zeroes + stats.flushes;
        Self {
            rd_hits: stats.read_hits,
            rd_partial_misses: stats.read_partial_hits,
            rd_full_misses: stats.read_misses,
            rd_total,
            rd_lent: stats.lent_reads,
            rd_pages: stats.read_pages,
            rd_missed_pages: stats.read_missed_pages,
            wr_total: stats.writes,
            wr_fua: stats.fua_writes,
            unmaps: stats.unmaps,
            write_zeroes: stats.write_zeroes,
            flushes: stats.flushes,
            total: rd_total + stats.writes + others,
        }
    }
}

/// OCF's `blocks`: what went to and from the base, the cache device, the host.
#[derive(Debug, Serialize)]
struct Bytes {
    core_volume_rd: u64,
    core_volume_wr: u64,
    core_volume_total: u64,
    core_volume_zeroes: u64,
    cache_volume_rd: u64,
    cache_volume_wr: u64,
    cache_volume_total: u64,
    volume_rd: u64,
    volume_wr: u64,
    volume_total: u64,
}

impl Bytes {
    fn new(stats: &Stats) -> Self {
        let (core_rd, core_wr) = (stats.base_read_bytes, stats.writeback_bytes);
        // Whatever goes to the base is read here.
        let (cache_rd, cache_wr) = (stats.hit_bytes + core_wr, stats.logged_bytes);
        Self {
            core_volume_rd: core_rd,
            core_volume_wr: core_wr,
            core_volume_total: core_rd + core_wr,
            core_volume_zeroes: stats.writeback_zeroes_bytes,
            cache_volume_rd: cache_rd,
            cache_volume_wr: cache_wr,
            cache_volume_total: cache_rd + cache_wr,
            volume_rd: stats.read_bytes,
            volume_wr: stats.write_bytes,
            volume_total: stats.read_bytes + stats.write_bytes,
        }
    }
}

/// What went wrong, by who failed: the base, or the cache device.
#[derive(Debug, Serialize)]
struct Errors {
    core_volume_rd: u64,
    core_volume_wr: u64,
    core_volume_flush: u64,
    core_volume_total: u64,
    cache_volume_rd: u64,
    cache_volume_crc: u64,
    cache_volume_keys: u64,
    cache_volume_metadata: u64,
    cache_volume_total: u64,
    total: u64,
    requests: u64,
}

impl Errors {
    fn new(stats: &Stats) -> Self {
        let written = stats.base_write_errors + stats.base_flush_errors;
        let core_volume_total = stats.base_read_errors + written;
        let records = stats.key_errors + stats.metadata_errors;
        let cache_volume_total = stats.poisoned_reads + stats.crc_errors + records;
        Self {
            core_volume_rd: stats.base_read_errors,
            core_volume_wr: stats.base_write_errors,
            core_volume_flush: stats.base_flush_errors,
            core_volume_total,
            cache_volume_rd: stats.poisoned_reads,
            cache_volume_crc: stats.crc_errors,
            cache_volume_keys: stats.key_errors,
            cache_volume_metadata: stats.metadata_errors,
            cache_volume_total,
            total: core_volume_total + cache_volume_total,
            requests: stats.failed,
        }
    }
}

/// What was appended, and what kept writes from it.
#[derive(Debug, Serialize)]
struct Log {
    epoch: u64,
    keys: u64,
    batch_requests: Spread,
    conflicts: u64,
    space_waits: u64,
    stalls: u64,
    stall_us: u64,
}

impl Log {
    fn new(stats: &Stats, info: &CacheInfo) -> Self {
        Self {
            epoch: info.epoch,
            keys: stats.keys,
            batch_requests: (&stats.distributions.batch_requests).into(),
            conflicts: stats.conflicts,
            space_waits: stats.space_waits,
            stalls: stats.stalls,
            stall_us: stats.stall_us,
        }
    }
}

#[derive(Debug, Serialize)]
struct Misses {
    joined_bytes: u64,
    awaited_reads: u64,
    fill_bytes: u64,
    fills_dropped: u64,
}

#[derive(Debug, Serialize)]
struct Writeback {
    dirty_bytes: u64,
    dirty_age_ms: u64,
    batches: u64,
    batch_bytes: u64,
    absorbed_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Gc {
    segments_reclaimed: u64,
    segments_compacted: u64,
    copied_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Scrub {
    bytes: u64,
    passes: u64,
    repairs: u64,
}

/// What reads have compared with checksums.
#[derive(Debug, Serialize)]
struct Verify {
    rd_bytes: u64,
}

/// How long the phases take.
#[derive(Debug, Serialize)]
struct Latency {
    base_read_us: Spread,
    held_write_us: Spread,
    gather_us: Spread,
    base_write_us: Spread,
    base_flush_us: Spread,
}

impl Latency {
    fn new(stats: &Stats) -> Self {
        let seen = &stats.distributions;
        Self {
            base_read_us: (&seen.base_read_us).into(),
            held_write_us: (&seen.held_write_us).into(),
            gather_us: (&seen.gather_us).into(),
            base_write_us: (&seen.base_write_us).into(),
            base_flush_us: (&seen.base_flush_us).into(),
        }
    }
}

/// A [`Distribution`] with what is asked for first.
#[derive(Debug, Serialize)]
struct Spread {
    count: u64,
    #[serde(flatten)]
    distribution: Distribution,
}

impl From<&Distribution> for Spread {
    fn from(distribution: &Distribution) -> Self {
        Self {
            count: distribution.count(),
            distribution: *distribution,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::invariant_tests::new_cache;
    use serde_json::Value;
    use std::collections::BTreeSet;

    const DOC: &str = include_str!("../../docs/rpc.md");

    fn section() -> &'static str {
        let (_, rest) = DOC.split_once("{#rpc_bdev_pcache_get_stats}").unwrap();
        rest.split_once("\n### ").unwrap().0
    }

    /// `group.member` of every figure; they are whole numbers, or distributions of such.
    fn names(answer: &Value) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        for (group, members) in answer.as_object().unwrap() {
            for (member, value) in members.as_object().into_iter().flatten() {
                let buckets = value["buckets"].as_array();
                let is_distribution = buckets.is_some_and(|buckets| {
                    let numbers = buckets.iter().chain([&value["count"], &value["sum"]]);
                    numbers.into_iter().all(Value::is_u64)
                });
                assert!(value.is_u64() || is_distribution, "{group}.{member}");
                names.insert(format!("{group}.{member}"));
            }
        }
        names
    }

    #[test]
    fn the_documentation_has_every_figure_once_and_no_other() {
        let answer = serde_json::to_value(Statistics::of(&*new_cache())).unwrap();
        let names = names(&answer);
        let rows = section().lines().filter_map(|line| {
            let name = line.strip_prefix("| ")?.split(' ').next()?;
            name.contains('.').then_some(name)
        });
        let rows: Vec<String> = rows.map(str::to_owned).collect();
        assert_eq!(rows.iter().cloned().collect::<BTreeSet<_>>(), names);
        assert_eq!(rows.len(), names.len());
    }

    #[test]
    fn the_example_of_the_documentation_has_every_figure() {
        let example = section().split("~~~json\n").nth(2).unwrap();
        let example: Value = serde_json::from_str(example.split("~~~").next().unwrap()).unwrap();
        let answer = serde_json::to_value(Statistics::of(&*new_cache())).unwrap();
        let mut documented = example["result"][0].clone();
        documented.as_object_mut().unwrap().remove("name").unwrap();
        assert_eq!(names(&documented), names(&answer));
    }
}
