//! Once a cache is open and its channels are there, nothing that serves requests asks the heap for anything, or gives
//! anything back: not a channel, nor the background, whatever they do (C10). So no request waits for an allocator, and none
//! fails for want of memory.
//!
//! Not counted is what people ask for (settings, statistics, drains, checkpoints), and the text that says why when the state
//! of a cache changes.

#![expect(unsafe_code, reason = "an allocator that counts")]
#![expect(clippy::unwrap_used, reason = "a test, its helpers included")]

mod counter;
#[path = "../../benches/random.rs"]
mod random;
mod rig;

use counter::counted;
use pcache::engine::{CacheMode, DataCrc, Health, Setting, SettingChange, Stats, WritebackOrder};
use pcache::units::{NS_PER_MS, Now};
use rig::{Answers, BASE_MIB, Kind, Load, Pattern, Rig};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Where most writes go: what is there fits into the cache.
const HOT_MIB: (u64, u64) = (0, 48);
/// Where nothing is at first, and what comes from there does not fit.
const COLD_MIB: (u64, u64) = (128, BASE_MIB - 128);

const WRITES: Load<'_> = Load {
    kinds: &[Kind::Write],
    depth: 32,
    len_bytes: 4 * KIB,
    pattern: Pattern::Random,
    area_mib: HOT_MIB,
    count: 4000,
};
const READS: Load<'_> = Load {
    kinds: &[Kind::Read],
    ..WRITES
};
const IDLE: Load<'_> = Load { count: 0, ..WRITES };

impl Rig {
    /// Runs a load, in which the heap must not be touched. Returns what has come of it.
    fn quietly(&mut self, what: &str, load: &Load<'_>) -> Stats {
        self.watch(what, |rig| rig.run(load))
    }

    fn watch(&mut self, what: &str, run: impl FnOnce(&mut Self)) -> Stats {
        let ((), heap) = counted(|| run(self));
        heap.assert_untouched(what);
        let news = self.news();
        assert_eq!(news.failed, 0, "{what}");
        news
    }

    /// Time in which nobody has requests.
    fn pass_ms(&mut self, times: u64) {
        for _ in 0..times {
            self.now.0 += NS_PER_MS;
            self.step(&IDLE);
        }
    }

    fn set(&self, setting: Setting, value: u32) {
        let change = SettingChange::of(setting, value);
        self.cache.change_settings(&change).unwrap();
    }
}

fn writes(rig: &mut Rig, block_size_bytes: u64) {
    for len_bytes in [block_size_bytes, 4 * KIB, 64 * KIB, MIB] {
        for depth in [1, 32] {
            let what = format!("writes of {len_bytes} bytes at depth {depth}");
            let load = Load {
                len_bytes,
                depth,
                count: (256 * MIB / len_bytes).min(WRITES.count),
                ..WRITES
            };
            let news = rig.quietly(&what, &load);
            assert_eq!(news.writes, 2 * load.count, "{what}");
        }
    }
    let few_pages = Load {
        len_bytes: block_size_bytes,
        area_mib: (0, 1),
        // Beyond the mark from which on it is written back, whatever other loads have left to be done.
        count: 8 * WRITES.count,
        ..WRITES
    };
    let news = rig.quietly("overwrites of a few pages by two cores", &few_pages);
    assert!(news.absorbed_bytes > 0, "{news:?}");
    let barriers = Load {
        kinds: &[Kind::Write, Kind::Fua, Kind::Write, Kind::Flush],
        ..WRITES
    };
    let news = rig.quietly("writes with FUA, and flushes", &barriers);
    assert!(news.fua_writes > 0 && news.flushes > 0, "{news:?}");
    for len_bytes in [block_size_bytes, 64 * KIB, 4 * MIB] {
        let what = format!("unmaps and write-zeroes of {len_bytes} bytes");
        let load = Load {
            kinds: &[Kind::Unmap, Kind::WriteZeroes],
            len_bytes,
            count: 1000,
            ..WRITES
        };
        let news = rig.quietly(&what, &load);
        assert!(news.unmaps > 0 && news.write_zeroes > 0, "{what}: {news:?}");
    }
}

fn reads(rig: &mut Rig, block_size_bytes: u64) {
    // All of it is there, and with small blocks in pages of several pieces.
    let area_mib = (0, 8);
    let whole = Load {
        area_mib,
        pattern: Pattern::InOrder(1),
        count: 8 * MIB / (4 * KIB),
        ..WRITES
    };
    rig.quietly("writes in order", &whole);
    let pieces = Load {
        area_mib,
        len_bytes: block_size_bytes,
        ..WRITES
    };
    rig.quietly("writes of single blocks", &pieces);
    for (kind, len_bytes) in [
        (Kind::Read, block_size_bytes),
        (Kind::Read, 4 * KIB),
        (Kind::Read, 64 * KIB),
        (Kind::Read, MIB),
        (Kind::Lend, block_size_bytes),
        (Kind::Lend, 4 * KIB),
    ] {
        let what = format!("{kind:?} of {len_bytes} bytes that are cached");
        let load = Load {
            kinds: &[kind],
            len_bytes,
            area_mib,
            count: READS.count.min(256 * MIB / len_bytes),
            ..READS
        };
        let news = rig.quietly(&what, &load);
        match kind {
            Kind::Lend => assert!(news.lent_reads > 0, "{what}: {news:?}"),
            _ => assert_eq!(news.read_hits, 2 * load.count, "{what}: {news:?}"),
        }
    }
    // Both cores ask for the same, several times at once: one base read serves them.
    for (len_bytes, count) in [(4 * KIB, 8000), (16 * KIB, 8000), (MIB, 400)] {
        let what = format!("misses of {len_bytes} bytes");
        let load = Load {
            len_bytes,
            area_mib: COLD_MIB,
            pattern: Pattern::InOrder(4),
            count,
            ..READS
        };
        let news = rig.quietly(&what, &load);
        assert!(news.read_misses > 0, "{what}: {news:?}");
        if len_bytes < MIB {
            assert!(news.fill_bytes > 0, "{what}: {news:?}");
            assert!(news.joined_read_bytes > 0, "{what}: {news:?}");
            assert!(news.awaited_reads > 0, "{what}: {news:?}");
        }
    }
    let load = Load {
        len_bytes: block_size_bytes,
        area_mib: COLD_MIB,
        ..READS
    };
    let news = rig.quietly("misses anywhere", &load);
    assert!(news.fill_bytes > 0, "{news:?}");
}

/// Everything at once, far more than the cache has room for.
fn reclaiming(rig: &mut Rig) {
    let kinds = [Kind::Write, Kind::Read, Kind::Write, Kind::Lend];
    // As long as somebody waits for room nothing is copied, which may come to all the time.
    let mut copied_bytes = 0;
    for order in [WritebackOrder::Strict, WritebackOrder::Relaxed] {
        rig.set(Setting::WritebackOrder, order as u32);
        let load = Load {
            kinds: &kinds,
            count: 150_000,
            ..WRITES
        };
        let what = format!("write-back and reclaiming, {order:?}");
        let news = rig.quietly(&what, &load);
        assert!(news.writeback_batches > 10, "{what}: {news:?}");
        assert!(news.segments_reclaimed > 20, "{what}: {news:?}");
        assert!(news.segments_compacted > 0, "{what}: {news:?}");
        copied_bytes += news.gc_copied_bytes;
    }
    assert!(copied_bytes > 0);
    let load = Load {
        len_bytes: 64 * KIB,
        area_mib: COLD_MIB,
        count: 8000,
        ..READS
    };
    let news = rig.quietly("a scan of more than the cache holds", &load);
    assert!(news.segments_reclaimed > 20, "{news:?}");
}

fn waiting(rig: &mut Rig) {
    let load = Load {
        len_bytes: 64 * KIB,
        area_mib: (0, BASE_MIB),
        count: 5000,
        ..WRITES
    };
    let news = rig.watch("writes that wait for room", |rig| {
        rig.behind.answers = Answers::No;
        rig.begin();
        for _ in 0..20_000 {
            rig.step(&load);
        }
        assert!(!rig.cores[0].has_done(&load), "the base takes nothing");
        rig.behind.answers = Answers::Yes;
        while !rig.cores.iter().all(|core| core.has_done(&load)) {
            rig.step(&load);
        }
    });
    assert!(news.space_waits > 0 && news.stalls > 0, "{news:?}");
    rig.set(Setting::CacheMode, CacheMode::Writearound as u32);
    let few = Load {
        count: 1000,
        ..WRITES
    };
    let news = rig.quietly("writes that wait for the base", &few);
    assert!(news.writeback_batches > 0, "{news:?}");
    rig.set(Setting::CacheMode, CacheMode::Writeback as u32);
    rig.begin();
    rig.watch("requests that are given up", |rig| {
        let load = Load {
            depth: 8,
            count: 16,
            ..READS
        };
        rig.cores[0].give_up(&load);
        while !rig.cores.iter().all(|core| core.has_done(&load)) {
            rig.step(&load);
        }
    });
    assert_eq!(rig.cores[0].aborted, 8);
}

/// What is wrong is told in a text, when it begins and with each try: not with each operation, nor with each poll.
fn trouble(rig: &mut Rig) {
    const TEXTS_MAX: u64 = 24;
    // A text is made in pieces.
    const TOUCHES_PER_TEXT: u64 = 8;
    rig.set(Setting::DirtyLowPercent, 1);
    rig.set(Setting::DirtyHighPercent, 2);
    let load = Load {
        count: 1500,
        ..WRITES
    };
    rig.pass_ms(5_000);
    for answers in [Answers::WithErrors, Answers::No] {
        rig.behind.answers = answers;
        let ((), heap) = counted(|| {
            rig.run(&load);
            // For more than half of it silence has been noticed.
            rig.pass_ms(40_000);
        });
        let what = format!("a base that answers: {answers:?}");
        assert!(heap.allocations > 0, "{what}: nothing was told");
        heap.assert_touched_at_most(TEXTS_MAX * TOUCHES_PER_TEXT, &what);
        let news = rig.news();
        if answers == Answers::WithErrors {
            // Many at once.
            assert!(news.base_write_errors > 4 * TEXTS_MAX, "{news:?}");
        }
        assert_ne!(rig.cache.health(), Health::Online, "{what}");
        rig.behind.answers = Answers::Yes;
        rig.run(&load);
        rig.pass_ms(10_000);
        assert_eq!(rig.cache.health(), Health::Online);
        rig.news();
    }
    rig.quietly("writes when all is well again", &load);
}

fn looking_for_damage(rig: &mut Rig) {
    rig.set(Setting::ScrubMibS, 4096);
    // In small steps: a poll looks at a small piece.
    let load = Load {
        depth: 4,
        count: 20_000,
        ..WRITES
    };
    let news = rig.quietly("scrubbing", &load);
    assert!(news.scrub_passes > 0, "{news:?}");
    assert_eq!(news.crc_errors + news.key_errors, 0, "{news:?}");
}

fn everything(block_size_bytes: u32, data_crc: DataCrc, settings: SettingChange) {
    let mut rig = Rig::new(block_size_bytes, data_crc, settings);
    let block_size_bytes = u64::from(block_size_bytes);
    writes(&mut rig, block_size_bytes);
    reads(&mut rig, block_size_bytes);
    reclaiming(&mut rig);
    waiting(&mut rig);
    trouble(&mut rig);
    looking_for_damage(&mut rig);
    rig.cache.drain_start();
    let news = rig.watch("a drain", |rig| {
        while rig.cache.may_be_dirty() {
            rig.step(&IDLE);
        }
    });
    assert!(news.writeback_batches > 0, "{news:?}");
}

#[test]
fn nothing_is_allocated_in_use_with_blocks_of_512_bytes() {
    everything(512, DataCrc::Off, SettingChange::default());
}

#[test]
fn nothing_is_allocated_in_use_with_checksums_that_reads_verify() {
    let settings = SettingChange::of(Setting::VerifyReads, 1);
    everything(512, DataCrc::On, settings);
    everything(4096, DataCrc::On, settings);
}

/// A core that is at its end, one way or another.
struct Goes<'a>(&'a AtomicUsize);

impl Drop for Goes<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Cores that run into each other, where one thread would never find anybody in its way.
#[test]
fn nothing_is_allocated_by_threads_that_meet() {
    let mut rig = Rig::new(512, DataCrc::On, SettingChange::default());
    let Rig {
        cache,
        cores,
        behind,
        ..
    } = &mut rig;
    let load = Load {
        kinds: &[Kind::Write, Kind::Read, Kind::Fua, Kind::Read, Kind::Unmap],
        len_bytes: 1536,
        area_mib: (0, 96),
        count: 300_000,
        ..WRITES
    };
    let before = cache.stats();
    let (turn, left) = (AtomicU64::new(0), AtomicUsize::new(cores.len()));
    let next = || Now(turn.fetch_add(1, Ordering::Relaxed) * 5_000);
    std::thread::scope(|scope| {
        for core in cores.iter_mut() {
            scope.spawn(|| {
                // Also if it panics: the background waits for it.
                let _goes = Goes(&left);
                let ((), heap) = counted(|| {
                    while !core.has_done(&load) {
                        core.step(next(), &load);
                    }
                });
                heap.assert_untouched("a core of several");
            });
        }
        let ((), heap) = counted(|| {
            while left.load(Ordering::Relaxed) > 0 {
                behind.step(next());
            }
        });
        heap.assert_untouched("the background beside two cores");
    });
    let news = cache.stats().since(&before);
    assert!(
        news.segments_reclaimed > 0 && news.conflicts > 0,
        "{news:?}"
    );
}

/// What these tests rely upon: the counter sees what there is, on this thread alone, and tells who it was.
#[test]
fn an_allocation_is_counted_and_told() {
    let ((), heap) = counted(|| ());
    heap.assert_untouched("nothing");
    let mut grown = Vec::with_capacity(1);
    let ((), heap) = counted(|| grown.extend([1u64, 2, 3]));
    assert_eq!((heap.allocations, heap.frees), (1, 0), "a growth");
    assert!(heap.allocated_bytes >= 24);
    let ((), heap) = counted(|| drop(std::hint::black_box(vec![0u8; 100])));
    assert_eq!(
        (heap.allocations, heap.allocated_bytes, heap.frees),
        (1, 100, 1)
    );
    let ((), heap) = counted(|| {
        std::thread::scope(|scope| {
            // The thread itself costs some.
            scope.spawn(|| drop(std::hint::black_box(vec![0u8; 1 << 20])));
        });
    });
    assert!(heap.allocated_bytes < 1 << 20, "another thread's: {heap:?}");
}

/// As would be seen if the engine did so in the midst of a load.
#[test]
#[should_panic(expected = "a load: 1 allocations of 8 bytes, and 1 were given back")]
fn an_allocation_amid_a_load_fails_the_test() {
    let mut rig = Rig::new(4096, DataCrc::Off, SettingChange::default());
    rig.watch("a load", |rig| {
        rig.run(&WRITES);
        drop(std::hint::black_box(Box::new(rig.now.0)));
    });
}
