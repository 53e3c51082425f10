use super::*;
use crate::engine::{
    Background, BaseKind, Budget, Channel, FormatPolicy, Fua, HostIo, IoToken, Op, Outbox,
    Progress, SettingChange, Status,
};
use crate::pmem::IovBuf;
use crate::sim::machine::Setup;
use crate::sim::pmem::SimPmem;
use crate::sim::recover;
use crate::units::Lba;
use crate::writeback::{Load, Writeback};
use std::sync::Arc;

const PAGE_BLOCKS: u64 = 8;

/// A cache, whose base answers when it is told to, and at which moment all that is.
struct Rig {
    cache: Arc<Cache<SimPmem>>,
    channel: Channel<SimPmem>,
    background: Background<SimPmem>,
    out: Outbox,
    now: Now,
    /// Base writes that were asked for.
    base_writes: u64,
}

impl Rig {
    fn new(settings: &[(Setting, u32)]) -> Self {
        Self::with_gc_percent(90, settings)
    }

    fn with_gc_percent(gc_percent: u8, settings: &[(Setting, u32)]) -> Self {
        static ZEROES: [u8; 4096] = [0; 4096];
        let change = settings
            .iter()
            .fold(SettingChange::default(), |change, (setting, value)| {
                change.and(*setting, *value)
            });
        let setup = Setup {
            segment_size_bytes: 64 << 10,
            segment_count: 32,
            block_count: 1 << 16,
            gc_percent,
            settings: change,
            ..Setup::default()
        };
        let pmem = SimPmem::new(setup.device_size_bytes());
        let cache = recover::open(pmem, setup.options(FormatPolicy::Auto), |_, len_blocks| {
            &ZEROES[..(len_blocks * 512) as usize]
        })
        .expect("the device is blank");
        let mut rig = Self {
            channel: cache.channel().expect("the first"),
            background: cache.background().expect("the first"),
            cache,
            out: Outbox::new(),
            now: Now(NS_PER_S),
            base_writes: 0,
        };
        rig.run();
        rig
    }

    fn write_pages(&mut self, pages: impl Iterator<Item = u64>) {
        let buf = IovBuf::new(&[7; 4096], &[]);
        pages.for_each(|page| self.change(Op::Write(buf.cursor(), Fua::No), page));
    }

    fn change(&mut self, op: Op, page: u64) {
        let io = HostIo {
            token: IoToken(1),
            op,
            lba: Lba(page * PAGE_BLOCKS),
            len_blocks: PAGE_BLOCKS,
        };
        self.channel.submit(io).expect("the table is empty");
        self.out.clear();
        self.channel.poll(self.now, &mut self.out);
        assert_eq!(self.out.completions[0].status, Status::Success);
    }

    /// One turn of the background; what it wants of the base.
    fn turn(&mut self) -> (Progress, Vec<crate::engine::BaseOpId>) {
        self.out.clear();
        let progress = self
            .background
            .poll(self.now, Budget::default(), &mut self.out);
        let base = &self.out.base;
        let writes = base
            .iter()
            .filter(|request| matches!(request.kind, BaseKind::Write { .. }));
        self.base_writes += writes.count() as u64;
        (progress, base.iter().map(|request| request.op).collect())
    }

    /// Turns of the background until it has nothing to do. The base answers at once.
    fn run(&mut self) {
        for _ in 0..10_000 {
            let (progress, ops) = self.turn();
            for op in &ops {
                self.background.on_base_done(*op, Ok(()), self.now);
            }
            if progress == Progress::Idle && ops.is_empty() {
                return;
            }
        }
        panic!("the background does not come to rest");
    }

    fn pass_ms(&mut self, ms: u64) {
        self.now = Now(self.now.0 + ms * NS_PER_MS);
        self.run();
    }

    fn dirty_percent(&self) -> u64 {
        dirty_percent(&self.cache, 0)
    }

    fn used_percent(&self) -> usize {
        self.cache.segments_used() * 100 / self.cache.segments_in_service()
    }
}

fn marks(low: u32, high: u32) -> [(Setting, u32); 3] {
    [
        (Setting::DirtyLowPercent, low),
        (Setting::DirtyHighPercent, high),
        NO_AGE,
    ]
}

const NO_AGE: (Setting, u32) = (Setting::DirtyAgeS, 0);

#[test]
fn write_back_begins_at_the_upper_mark_and_ends_at_the_lower() {
    let marks = [
        (Setting::DirtyLowPercent, 10),
        (Setting::DirtyHighPercent, 40),
        NO_AGE,
    ];
    let mut rig = Rig::new(&marks);
    rig.write_pages(0..150);
    rig.pass_ms(1_000_000);
    assert!((30..40).contains(&rig.dirty_percent()));
    assert_eq!(rig.base_writes, 0, "below the upper mark");
    rig.write_pages(150..200);
    rig.run();
    let percent = rig.dirty_percent();
    assert!((1..=10).contains(&percent), "{percent} percent are dirty");
    let written = rig.base_writes;
    assert!(written > 0);
    rig.write_pages(200..220);
    rig.pass_ms(1_000_000);
    assert_eq!(rig.base_writes, written, "between the marks again");
}

#[test]
fn reclaiming_ahead_of_need_leaves_alone_what_the_lower_mark_does() {
    let mut rig = Rig::with_gc_percent(70, &marks(60, 80));
    let mut page = 0;
    while rig.base_writes == 0 {
        rig.write_pages(page..page + 1);
        let used = rig.used_percent();
        rig.run();
        assert!(rig.base_writes == 0 || used > 70, "at {used} percent");
        page += 1;
    }
    // More than the cache holds. A batch ends with the page that is the first below the mark.
    let mut least = 100;
    for page in page..1000 {
        rig.write_pages(page..page + 1);
        rig.run();
        least = least.min(rig.dirty_percent());
    }
    rig.pass_ms(1_000_000);
    assert!(rig.base_writes > 0);
    assert!(rig.used_percent() <= 70, "{} percent", rig.used_percent());
    let now = rig.dirty_percent();
    assert!(
        (59..=70).contains(&now) && least >= 59,
        "{least}, then {now} percent"
    );
    assert_eq!(rig.cache.stats().stalls, 0);
}

#[test]
fn reclaiming_ahead_of_need_is_not_urgent() {
    let mut rig = Rig::with_gc_percent(50, &marks(10, 80));
    // Every other page: a base write for each. The base answers none.
    rig.cache.base_reads.store(1, Ordering::Relaxed);
    let mut pages = (0..).step_by(2);
    while rig.used_percent() <= 60 {
        rig.write_pages(pages.by_ref().take(1));
        (0..20).for_each(|_| drop(rig.turn()));
    }
    assert_eq!(rig.base_writes, 2, "reads of the base come first");
    // Fewer segments are free than are kept ready.
    while rig.cache.segments.free_count() >= rig.cache.free_segments_wanted() {
        rig.write_pages(pages.by_ref().take(1));
        (0..20).for_each(|_| drop(rig.turn()));
    }
    (0..20).for_each(|_| drop(rig.turn()));
    assert!(rig.base_writes > 20);
    assert!(rig.background.pressure().percent() >= 60);
}

#[test]
fn room_is_made_before_writers_wait_however_high_the_marks_are() {
    let mut rig = Rig::with_gc_percent(90, &marks(94, 95));
    let mut least = 100;
    for page in 0..2000 {
        // It would wait if there were no room.
        rig.write_pages(page..page + 1);
        rig.run();
        if rig.base_writes > 0 {
            least = least.min(rig.dirty_percent());
        }
    }
    assert_eq!(rig.cache.stats().stalls, 0);
    assert!(least >= 50, "only {least} percent were left dirty");
}

#[test]
fn what_takes_segments_and_has_few_bytes_is_written_back_above_the_upper_mark() {
    let mut rig = Rig::with_gc_percent(40, &marks(20, 60));
    let mut page = 0;
    let mut unmap_until = |rig: &mut Rig, percent| {
        while rig.used_percent() < percent && rig.cache.info().dirty_tail == 0 {
            let before = rig.used_percent();
            rig.change(Op::Unmap, page % 300);
            page += 1;
            if rig.used_percent() != before {
                rig.run();
            }
        }
    };
    unmap_until(&mut rig, 55);
    assert_eq!(rig.cache.info().dirty_tail, 0, "that can wait");
    let is_full = rig.cache.segments_in_service() * 60 / 100;
    while rig.cache.info().dirty_tail == 0 {
        assert!(rig.cache.segments_used() <= is_full + 1);
        let percent = rig.used_percent();
        unmap_until(&mut rig, percent + 1);
    }
    rig.run();
    assert!(rig.used_percent() <= 40, "{} percent", rig.used_percent());
}

#[test]
fn dirty_data_are_written_back_at_their_age_and_the_age_is_told() {
    let mut rig = Rig::new(&[(Setting::DirtyAgeS, 3)]);
    rig.write_pages(0..1);
    rig.pass_ms(2_900);
    assert_eq!(rig.base_writes, 0);
    assert_eq!(rig.cache.info().dirty_age_ms, 2_900);
    rig.pass_ms(200);
    assert_eq!(rig.base_writes, 1);
    assert_eq!(rig.cache.info().dirty_bytes, 0);
    assert_eq!(rig.cache.info().dirty_age_ms, 0);
    // What comes after a long time of rest is new.
    rig.pass_ms(100_000);
    rig.write_pages(0..1);
    rig.pass_ms(1_000);
    assert_eq!(rig.base_writes, 1);
}

#[test]
fn an_unmap_has_an_age_though_it_has_no_bytes() {
    let mut rig = Rig::new(&[(Setting::DirtyAgeS, 3)]);
    rig.change(Op::Unmap, 0);
    rig.pass_ms(2_900);
    assert_eq!(rig.cache.info().dirty_bytes, 0);
    assert_eq!(rig.cache.info().dirty_age_ms, 2_900);
    rig.pass_ms(200);
    rig.pass_ms(1);
    assert_eq!(rig.cache.info().dirty_age_ms, 0);
}

#[test]
fn an_idle_application_lets_dirty_data_be_written_back() {
    let mut rig = Rig::new(&[(Setting::IdleWritebackMs, 500), NO_AGE]);
    for _ in 0..20 {
        rig.write_pages(0..1);
        rig.pass_ms(300);
    }
    assert_eq!(rig.base_writes, 0);
    rig.pass_ms(500);
    assert_eq!(rig.base_writes, 1);
}

#[test]
fn write_back_yields_to_reads_of_the_base_unless_room_is_short() {
    let mut rig = Rig::new(&[(Setting::DirtyAgeS, 1)]);
    // Every other page: a base write for each.
    rig.write_pages((0..30).map(|number| number * 2));
    rig.cache.base_reads.store(1, Ordering::Relaxed);
    rig.now = Now(10 * NS_PER_S);
    let turns = |rig: &mut Rig| (0..100).for_each(|_| drop(rig.turn()));
    turns(&mut rig);
    assert_eq!(rig.base_writes, 2);
    rig.cache.base_reads.store(0, Ordering::Relaxed);
    turns(&mut rig);
    assert_eq!(rig.base_writes, 30);
}

#[test]
fn a_checkpoint_gets_to_its_cut_while_the_application_reads_from_the_base() {
    let mut rig = Rig::new(&[NO_AGE]);
    rig.write_pages((0..30).map(|number| number * 2));
    rig.cache.base_reads.store(1, Ordering::Relaxed);
    rig.cache.checkpoint_begin(60, rig.now).expect("the first");
    // The base answers none of them.
    (0..100).for_each(|_| drop(rig.turn()));
    assert_eq!(rig.base_writes, 30, "all at once");
}

#[test]
fn what_overwrites_have_absorbed_says_nothing_about_the_base() {
    let rig = Rig::new(&[]);
    let mut writeback = Writeback::new(&rig.cache.geometry).unwrap();
    let mut batch = |dirty_bytes: u64, written_bytes: u64, took_ns: u64| {
        writeback.batch.dirty_bytes = dirty_bytes;
        writeback.batch.written.data_bytes = written_bytes;
        writeback.learn_rate(Now(took_ns));
        writeback.base_rates.load_in(1, Load::NOTHING).data_bytes
    };
    // 8 MiB in 40 ms.
    let rate = batch(8 << 20, 8 << 20, 40 * NS_PER_MS);
    assert_eq!(rate, (8 << 20) / 40 / 2);
    // 16 MiB to one block: one base write.
    assert_eq!(batch(16 << 20, 4096, NS_PER_MS / 10), rate);
    // Many blocks, each several times; the base is as fast as before.
    let rate = batch(64 << 20, 2 << 20, 10 * NS_PER_MS);
    assert!(rate <= (8 << 20) / 40, "{rate} bytes in a millisecond");
    // Zeroes alone.
    assert_eq!(batch(16 << 20, 0, NS_PER_MS), rate);
}

#[test]
fn base_writes_keep_to_the_rate_and_reach_it() {
    const RATE_MIB_S: u64 = 8;
    let rig = Rig::new(&[(Setting::WritebackRateMibS, RATE_MIB_S as u32)]);
    let mut throttle = Throttle::default();
    let (mut total, seconds) = (0, 5);
    for turn in 0..seconds * 10_000 {
        let now = Now(NS_PER_S + turn * (NS_PER_S / 10_000));
        let allowed = throttle.allowance(&rig.cache, BASE_WRITE_BYTES_MAX, now);
        // Operations are as large as what there is, not as large as they may be.
        let taken = allowed.min(300_000);
        throttle.take(&rig.cache, taken);
        total += taken;
    }
    let wanted = (seconds * RATE_MIB_S) << 20;
    // What the bucket holds comes on top, once.
    let bucket = (RATE_MIB_S << 20)
        .div_ceil(BURST_PARTS)
        .max(BASE_WRITE_BYTES_MAX);
    assert!(
        total <= wanted + bucket,
        "{total} bytes instead of {wanted}"
    );
    assert!(
        total + bucket >= wanted,
        "{total} bytes instead of {wanted}"
    );
}

#[test]
fn the_age_of_what_is_dirty_is_known_within_a_mark_whatever_comes() {
    let mut ages = Ages::default();
    // A kset each millisecond, for an hour's worth of marks; the tail lies far behind, then follows.
    let ms = |number: u64| Now(NS_PER_S + number * NS_PER_MS);
    for number in 0..100_000u64 {
        ages.note(Seq(1000), Seq(number + 1), ms(number));
        assert!(ages.marks.len() <= MARK_COUNT);
    }
    let now = ms(100_000);
    for upto in [1_000u64, 30_000, 60_000, 99_000] {
        // The first kset behind it was drawn in this millisecond.
        let truth_ns = now.since_ns(ms(upto));
        let told_ns = ages.since_ns(Seq(upto), now);
        assert!(
            told_ns >= truth_ns && told_ns <= truth_ns + 2 * ages.every_ns,
            "behind {upto}: {told_ns} ns instead of {truth_ns}"
        );
    }
    ages.note(Seq(100_000), Seq(100_001), now);
    assert!(ages.since_ns(Seq(100_000), now) <= 2 * ages.every_ns);
}
