//! A machine: cores that share one cache over simulated devices, and the oracle beside them.
//!
//! It is driven step by step from one thread. Cores still run into each other: before every access to the
//! cache device, to the index, and to what else cores share, another core, the background or the base may get
//! its turn ([`Setup::yield_percent`]), in the middle of a batch or of a read. All that happens is decided by
//! seeds.

use super::base::{BaseDone, BaseImage, Client, SimBase};
use super::loans::Held;
use super::model::{BaseRule, Model, Time, Violation, WriteId, WriteKind};
use super::pmem::{CrashPointHook, SimPmem, SimState};
use super::prng::{Prng, mix};
use super::recover;
use super::stamp::{self, Stamp};
use crate::engine::{
    Background, BaseCaps, BaseIdentity, Cache, Channel, Completion, DataCrc, FormatPolicy, Fua,
    HostIo, IoToken, LoanId, Op, OpenOptions, OptionChange, Outbox, Status, WritebackOrder,
};
use crate::media::SEGMENTS_START_MIN_BYTES;
use crate::pmem::IovBuf;
use crate::sched;
use crate::units::{Lba, NS_PER_MS, Now};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// Polls that work which must end may take.
const POLLS_MAX: usize = 200_000;
/// How deep turns within turns go.
const YIELD_DEPTH_MAX: u32 = 3;
/// What the base holds before the first write: not zeroes, so that these are recognised.
pub const INITIAL: Stamp = Stamp(1);

/// What a machine is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// 512 or 4096.
    pub block_size_bytes: u32,
    /// Of the base.
    pub block_count: u64,
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
    /// What the base can do.
    pub base_caps: BaseCaps,
    /// Channels.
    pub core_count: usize,
    /// Streams, at most.
    pub stream_count_max: u32,
    /// How often somebody else gets a turn in the middle of something, in percent of the accesses.
    pub yield_percent: u8,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            block_size_bytes: 512,
            block_count: 96,
            segment_size_bytes: 16 << 10,
            segment_count: 8,
            data_crc: DataCrc::Off,
            order: WritebackOrder::Strict,
            gc_percent: 60,
            base_caps: BaseCaps {
                flush: true,
                unmap: true,
            },
            core_count: 2,
            stream_count_max: 2,
            yield_percent: 5,
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
            format,
            new_uuid: *b"simulated cache.",
            data_crc: Some(self.data_crc),
            segment_size_bytes: Some(self.segment_size_bytes),
            gc_percent: Some(self.gc_percent),
            writeback_order: Some(self.order),
            stream_count_max: self.stream_count_max,
        }
    }

    /// The largest write, in blocks.
    #[must_use]
    pub fn write_blocks_max(&self) -> u64 {
        (self.segment_size_bytes / 4).min(1 << 20) / u64::from(self.block_size_bytes)
    }
}

/// What the cache does not know.
#[derive(Clone, Debug)]
pub struct Outside {
    /// The oracle.
    pub model: Model,
    /// The base device.
    pub base: SimBase,
    /// A batch that spans barriers may be under way, or half of one may be on the base.
    pub relaxed: bool,
}

impl Outside {
    /// Compares everything that a power cut now could leave on the base with what may be there.
    ///
    /// # Errors
    /// A barrier of the application is broken.
    pub fn check_base_order(&self) -> Result<(), Violation> {
        if self.relaxed {
            return Ok(());
        }
        let stamps = self.base.stamps_after_cut();
        self.model
            .check_base_cuts(|lba| stamps[lba as usize].clone())
    }

    /// Between batches the base is an exact past state.
    fn check_cut(&self) -> Result<(), Violation> {
        let image = self.base.current_image();
        self.model.check_base(BaseRule::Cut, |lba| image.stamp(lba))
    }
}

/// Why an observer is shown the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// A fence is about to take effect.
    Fence,
    /// Writes were just acknowledged.
    Acknowledged,
}

/// Looks at a machine whenever a crash would be interesting.
pub trait Observer: Send {
    /// The moment; it must not use the machine.
    fn look(&mut self, moment: Moment, state: &SimState, outside: &Outside);
}

/// An observer that a test keeps a handle to.
pub type SharedObserver = Arc<Mutex<dyn Observer>>;

#[derive(Debug)]
enum Asked {
    Write(WriteId),
    Flush(Time),
    Read {
        begin: Time,
        lba: u64,
        /// Of the base, when it was submitted.
        failures: u64,
    },
    Lend {
        begin: Time,
        lba: u64,
        /// How long it is held.
        turns: u64,
    },
}

#[derive(Debug)]
struct Pending {
    token: IoToken,
    asked: Asked,
    /// Lives as long as the request.
    buf: Option<IovBuf>,
}

#[derive(Debug)]
struct Core {
    channel: Channel<SimPmem>,
    pending: Vec<Pending>,
    held: Vec<Held>,
    out: Outbox,
}

#[derive(Debug)]
struct Driver {
    background: Background<SimPmem>,
    out: Outbox,
}

struct Shared {
    setup: Setup,
    pmem: SimPmem,
    cache: Arc<Cache<SimPmem>>,
    cores: Vec<Mutex<Core>>,
    driver: Mutex<Driver>,
    outside: Arc<Mutex<Outside>>,
    observer: Option<SharedObserver>,
    /// Base operations that ended while their owner was busy.
    undelivered: Mutex<Vec<BaseDone>>,
    yields: Mutex<Prng>,
    yield_depth: AtomicU32,
    now: AtomicU64,
    next_token: AtomicU64,
    hash: AtomicU64,
    violation: Mutex<Option<Violation>>,
}

/// See the module.
pub struct Machine {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("setup", &self.shared.setup)
            .finish_non_exhaustive()
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(guard)) => Some(guard.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Shows the state at every fence to the observer.
fn fence_hook(observer: &SharedObserver, outside: &Arc<Mutex<Outside>>) -> CrashPointHook {
    let (observer, outside) = (Arc::clone(observer), Arc::clone(outside));
    Box::new(move |state, _| {
        // What the observer does on devices of its own is no business of this machine's cores.
        sched::with_hook(None, || {
            lock(&observer).look(Moment::Fence, state, &lock(&outside));
        });
    })
}

impl Machine {
    /// A base full of [`INITIAL`], and a blank cache device that is formatted.
    ///
    /// # Errors
    /// The cache cannot be made.
    pub fn new(
        setup: Setup,
        seed: u64,
        observer: Option<SharedObserver>,
    ) -> Result<Self, Violation> {
        let mut prng = Prng::new(seed);
        let (size, count) = (setup.block_size_bytes, setup.block_count);
        let mut base = SimBase::new(size, count, setup.base_caps, prng.fork());
        base.fill(INITIAL);
        let model = Model::new(count, INITIAL);
        let pmem = SimPmem::new(setup.device_size_bytes());
        let relaxed = setup.order == WritebackOrder::Relaxed;
        let outside = Outside {
            model,
            base,
            relaxed,
        };
        let outside = Arc::new(Mutex::new(outside));
        Self::start(setup, pmem, outside, observer, prng, 0)
    }

    /// A machine that starts with these media. The model says what they hold.
    ///
    /// # Errors
    /// The cache is refused.
    pub fn resume(
        setup: Setup,
        image: Vec<u8>,
        base: &BaseImage,
        model: Model,
        seed: u64,
    ) -> Result<Self, Violation> {
        let mut prng = Prng::new(seed);
        let (size, count) = (setup.block_size_bytes, setup.block_count);
        let mut device = SimBase::new(size, count, setup.base_caps, prng.fork());
        device.restart(base);
        let outside = Outside {
            model,
            base: device,
            relaxed: true,
        };
        let outside = Arc::new(Mutex::new(outside));
        Self::start(setup, SimPmem::from_image(image), outside, None, prng, 0)
    }

    fn start(
        setup: Setup,
        pmem: SimPmem,
        outside: Arc<Mutex<Outside>>,
        observer: Option<SharedObserver>,
        mut prng: Prng,
        hash: u64,
    ) -> Result<Self, Violation> {
        if let Some(observer) = &observer {
            pmem.on_crash_point(Some(fence_hook(observer, &outside)));
        }
        let image = lock(&outside).base.current_image();
        let options = setup.options(FormatPolicy::Auto);
        let cache = recover::open(pmem.clone(), options, |lba, len| image.blocks(lba, len))
            .map_err(|error| Violation(format!("the cache is refused: {error}")))?;
        let core = || Core {
            channel: cache.channel().expect("fewer cores than channels"),
            pending: Vec::new(),
            held: Vec::new(),
            out: Outbox::new(),
        };
        let cores = (0..setup.core_count).map(|_| Mutex::new(core())).collect();
        let background = cache.background().expect("the cache is new");
        let out = Outbox::new();
        Ok(Self {
            shared: Arc::new(Shared {
                cores,
                driver: Mutex::new(Driver { background, out }),
                pmem,
                cache,
                outside,
                observer,
                undelivered: Mutex::new(Vec::new()),
                yields: Mutex::new(prng.fork()),
                yield_depth: AtomicU32::new(0),
                now: AtomicU64::new(0),
                next_token: AtomicU64::new(1),
                hash: AtomicU64::new(hash),
                violation: Mutex::new(None),
                setup,
            }),
        })
    }

    /// What it is made of.
    #[must_use]
    pub fn setup(&self) -> &Setup {
        &self.shared.setup
    }

    /// The cache.
    #[must_use]
    pub fn cache(&self) -> &Arc<Cache<SimPmem>> {
        &self.shared.cache
    }

    /// The cache device.
    #[must_use]
    pub fn pmem(&self) -> &SimPmem {
        &self.shared.pmem
    }

    /// Lets `f` look at the oracle and the base, or change them.
    pub fn with_outside<R>(&self, f: impl FnOnce(&mut Outside) -> R) -> R {
        f(&mut lock(&self.shared.outside))
    }

    /// A number that tells one history from another.
    #[must_use]
    pub fn event_hash(&self) -> u64 {
        self.shared.hash.load(Ordering::Relaxed)
    }

    /// The first promise that was broken.
    ///
    /// # Errors
    /// There is one.
    pub fn verdict(&self) -> Result<(), Violation> {
        lock(&self.shared.violation).clone().map_or(Ok(()), Err)
    }

    /// Lets time pass.
    pub fn pass_ms(&self, ms: u64) {
        self.shared.now.fetch_add(ms * NS_PER_MS, Ordering::Relaxed);
    }

    /// Submits a write; its data are cut into the elements of a scatter list at `cuts`.
    pub fn write(&self, core: usize, lba: u64, len_blocks: u64, fua: Fua, cuts: &[usize]) {
        let kind = if fua == Fua::Yes {
            WriteKind::Fua
        } else {
            WriteKind::Data
        };
        let block_size = self.shared.setup.block_size_bytes as usize;
        let (id, stamp) = self.with_outside(|outside| {
            let stamp = outside.model.next_stamp();
            (outside.model.begin_write(kind, lba, len_blocks), stamp)
        });
        let mut bytes = vec![0; len_blocks as usize * block_size];
        for (lba, block) in (lba..).zip(bytes.chunks_exact_mut(block_size)) {
            stamp::fill(block, stamp, lba);
        }
        let buf = IovBuf::new(&bytes, cuts);
        let op = Op::Write(buf.cursor(), fua);
        self.submit(core, op, lba, len_blocks, Asked::Write(id), Some(buf));
    }

    /// Submits an unmap or write-zeroes.
    pub fn clear(&self, core: usize, op: Op, lba: u64, len_blocks: u64) {
        let id = self.with_outside(|outside| {
            outside
                .model
                .begin_write(WriteKind::Zeroes, lba, len_blocks)
        });
        self.submit(core, op, lba, len_blocks, Asked::Write(id), None);
    }

    /// Submits a read.
    pub fn read(&self, core: usize, lba: u64, len_blocks: u64, cuts: &[usize]) {
        let len_bytes = len_blocks as usize * self.shared.setup.block_size_bytes as usize;
        let buf = IovBuf::new(&vec![0xee; len_bytes], cuts);
        let (begin, failures) =
            self.with_outside(|outside| (outside.model.begin_read(), outside.base.failure_count()));
        let op = Op::Read(buf.cursor());
        let asked = Asked::Read {
            begin,
            lba,
            failures,
        };
        self.submit(core, op, lba, len_blocks, asked, Some(buf));
    }

    /// Submits a read of which the place is wanted; what is lent is held for so many turns of the core.
    pub fn lend(&self, core: usize, lba: u64, len_blocks: u64, turns: u64) {
        let begin = self.with_outside(|outside| outside.model.begin_read());
        let asked = Asked::Lend { begin, lba, turns };
        self.submit(core, Op::Lend, lba, len_blocks, asked, None);
    }

    /// Everything that is lent comes back.
    ///
    /// # Errors
    /// Lent data have changed, or a segment still counts as lent.
    pub fn give_back_all(&self) -> Result<(), Violation> {
        for core in &self.shared.cores {
            lock(core).give_back(|_| true)?;
        }
        if self.shared.cache.has_loans() {
            return Err(Violation("a loan is left over".to_owned()));
        }
        Ok(())
    }

    /// Submits a flush.
    pub fn flush(&self, core: usize) {
        let begin = self.with_outside(|outside| outside.model.begin_flush());
        self.submit(core, Op::Flush, 0, 0, Asked::Flush(begin), None);
    }

    fn submit(
        &self,
        core: usize,
        op: Op,
        lba: u64,
        len_blocks: u64,
        asked: Asked,
        buf: Option<IovBuf>,
    ) {
        let token = IoToken(self.shared.next_token.fetch_add(1, Ordering::Relaxed));
        let core = &mut *lock(&self.shared.cores[core]);
        core.pending.push(Pending { token, asked, buf });
        let io = HostIo {
            token,
            op,
            lba: Lba(lba),
            len_blocks,
        };
        let taken = core.channel.submit(io);
        assert!(taken.is_ok(), "a simulation has few requests");
    }

    /// Requests under way.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        let cores = self.shared.cores.iter();
        cores.map(|core| lock(core).pending.len()).sum()
    }

    /// Gives up one of the requests of a core, if it can still be given up.
    pub fn abort(&self, core: usize, dice: u64) {
        let core = &mut *lock(&self.shared.cores[core]);
        if let Some(at) = (dice as usize).checked_rem(core.pending.len()) {
            let token = core.pending[at].token;
            core.channel.abort(token);
        }
    }

    /// A turn for a core.
    pub fn poll_core(&self, core: usize) {
        self.shared.poll_core(core);
    }

    /// A turn for the background.
    pub fn poll_background(&self) {
        self.shared.poll_background();
    }

    /// Ends one operation of the base, if there is one.
    pub fn complete_base(&self) {
        self.shared.complete_base();
    }

    /// Changes options.
    pub fn change_options(&self, change: OptionChange) {
        if change.writeback_order == Some(WritebackOrder::Relaxed) {
            self.with_outside(|outside| outside.relaxed = true);
        }
        let changed = self.shared.cache.change_options(change);
        assert!(changed.is_ok(), "the option is in range");
    }

    /// Asks for a drain.
    pub fn drain_start(&self) {
        self.shared.cache.drain_start();
    }

    /// A turn for everybody.
    pub fn poll_all(&self) {
        self.pass_ms(1);
        for core in 0..self.shared.cores.len() {
            self.poll_core(core);
            self.complete_base();
        }
        self.poll_background();
        self.complete_base();
    }

    /// Until every request has completed.
    ///
    /// # Errors
    /// One does not, or a promise was broken.
    pub fn settle(&self) -> Result<(), Violation> {
        self.run_until("a request", || self.outstanding() == 0)
    }

    /// Everything that is dirty goes to the base.
    ///
    /// # Errors
    /// It does not, or a promise was broken.
    pub fn drain(&self) -> Result<(), Violation> {
        self.settle()?;
        // One that was asked for earlier does not cover what came since.
        self.run_until("an earlier drain", || self.is_drained())?;
        self.drain_start();
        self.run_until("a drain", || self.is_drained())
    }

    fn is_drained(&self) -> bool {
        let idle = lock(&self.shared.driver).background.in_flight() == 0;
        !self.shared.cache.drain_status().in_progress && idle
    }

    fn run_until(&self, what: &str, done: impl Fn() -> bool) -> Result<(), Violation> {
        for _ in 0..POLLS_MAX {
            self.verdict()?;
            if done() {
                return Ok(());
            }
            self.poll_all();
        }
        let (info, health) = (self.shared.cache.info(), self.shared.cache.health());
        Err(Violation(format!(
            "{what} does not end: {health:?}, {info:?}"
        )))
    }

    /// Reads every block.
    ///
    /// # Errors
    /// One is not what it must be.
    pub fn read_all(&self) -> Result<(), Violation> {
        let (count, step) = (self.shared.setup.block_count, 13);
        for lba in (0..count).step_by(step) {
            self.read(0, lba, (count - lba).min(step as u64), &[]);
        }
        self.settle()
    }

    /// Whether the base holds exactly what was written, after a drain.
    ///
    /// # Errors
    /// It does not.
    pub fn check_drained(&self) -> Result<(), Violation> {
        self.with_outside(|outside| {
            let image = outside.base.current_image();
            for lba in 0..self.shared.setup.block_count {
                let found = image.stamp(lba);
                let expected = outside.model.certain(lba);
                if expected.is_some() && found.ok() != expected {
                    return Err(Violation(format!(
                        "after a drain block {lba} of the base is {found:?}, not {expected:?}"
                    )));
                }
            }
            Ok(())
        })
    }

    /// An orderly stop and start, with another number of cores if wanted. Sometimes a bit has flipped
    /// meanwhile in one of the two copies of some metadata.
    ///
    /// # Errors
    /// A promise was broken.
    pub fn restart(self, dice: u64, change: impl FnOnce(&mut Setup)) -> Result<Self, Violation> {
        self.settle()?;
        lock(&self.shared.driver).background.stop();
        self.run_until("a stop", || {
            lock(&self.shared.driver).background.in_flight() == 0
        })?;
        let mut image = self.shared.pmem.live_image();
        let mut prng = Prng::new(dice);
        if prng.percent(50) {
            super::script::damage_a_copy(&self.shared.setup, &mut image, &mut prng);
        }
        if prng.percent(20) {
            self.offer_another_base(&image, &mut prng)?;
        }
        self.start_again(image, change, dice)
    }

    /// A start with a base of another size is refused, and changes nothing.
    fn offer_another_base(&self, image: &[u8], prng: &mut Prng) -> Result<(), Violation> {
        let count = self.shared.setup.block_count;
        let mut other = self.shared.setup.clone();
        other.block_count = prng.pick(&[count - 1, count + 1, count * 2, count / 2]);
        let copy = super::image::ImagePmem::new(image.to_vec());
        let zeroes = vec![0; 4096];
        let opened = recover::open(copy.clone(), other.options(FormatPolicy::Auto), |_, len| {
            &zeroes[..len as usize * other.block_size_bytes as usize]
        });
        let untouched = copy.bytes() == image;
        if opened.is_err() && untouched {
            return Ok(());
        }
        Err(Violation(format!(
            "a cache of {count} blocks starts over {} (refused: {}, untouched: {untouched})",
            other.block_count,
            opened.is_err()
        )))
    }

    /// A crash; `image` is what the cache device holds afterwards, `base` what the base does.
    ///
    /// # Errors
    /// A promise was broken.
    pub fn crash(
        self,
        mut image: Vec<u8>,
        base: &BaseImage,
        dice: u64,
        change: impl FnOnce(&mut Setup),
    ) -> Result<Self, Violation> {
        self.verdict()?;
        let mut prng = Prng::new(mix(dice, 1));
        if prng.percent(25) {
            super::script::damage_a_copy(&self.shared.setup, &mut image, &mut prng);
        }
        // What is going to be found is found out on a copy first, and is the truth from then on: a crash
        // in the middle of the recovery below must not change it.
        let stamps = self.with_outside(|outside| {
            let setup = &self.shared.setup;
            let copy = super::image::ImagePmem::new(image.clone());
            recover::judge(copy, setup, &outside.model, base).map(|(stamps, _)| stamps)
        })?;
        self.with_outside(|outside| {
            outside.model.restart(&stamps);
            outside.base.restart(base);
        });
        self.start_again(image, change, dice)
    }

    /// The death of the process: what it has stored is there, fenced or not.
    ///
    /// # Errors
    /// A promise was broken.
    pub fn kill(self, dice: u64, change: impl FnOnce(&mut Setup)) -> Result<Self, Violation> {
        let image = self.shared.pmem.live_image();
        let base = self.with_outside(|outside| outside.base.kill_image(&mut Prng::new(dice)));
        self.crash(image, &base, dice, change)
    }

    /// A power cut: of what is not fenced any part may be lost.
    ///
    /// # Errors
    /// A promise was broken.
    pub fn cut_power(self, dice: u64, change: impl FnOnce(&mut Setup)) -> Result<Self, Violation> {
        let mut prng = Prng::new(dice);
        let kept_percent = prng.pick(&[0, 10, 50, 90, 100]);
        let image = self.shared.pmem.crash_image(|_, choices| {
            if prng.percent(kept_percent) {
                1 + prng.index(choices - 1)
            } else {
                0
            }
        });
        let base = self.with_outside(|outside| outside.base.crash_image(&mut prng));
        self.crash(image, &base, dice, change)
    }

    fn start_again(
        self,
        image: Vec<u8>,
        change: impl FnOnce(&mut Setup),
        dice: u64,
    ) -> Result<Self, Violation> {
        self.verdict()?;
        let shared = &self.shared;
        // Nothing of the dead machine is used any more; its device is kept until here because base
        // operations name its memory.
        shared.pmem.on_crash_point(None);
        let base = self.with_outside(|outside| outside.base.current_image());
        self.with_outside(|outside| outside.base.restart(&base));
        let mut setup = shared.setup.clone();
        change(&mut setup);
        if setup.order == WritebackOrder::Relaxed {
            self.with_outside(|outside| outside.relaxed = true);
        }
        let hash = mix(self.event_hash(), dice);
        let prng = Prng::new(hash);
        let outside = Arc::clone(&shared.outside);
        let observer = shared.observer.clone();
        Self::start(
            setup,
            SimPmem::from_image(image),
            outside,
            observer,
            prng,
            hash,
        )
    }
}

impl Core {
    /// Gives back the loans that `due` names.
    fn give_back(&mut self, due: impl FnMut(&mut Held) -> bool) -> Result<(), Violation> {
        let back: Vec<Held> = self.held.extract_if(.., due).collect();
        let channel = &mut self.channel;
        let results: Vec<_> = back
            .into_iter()
            .map(|held| held.give_back(channel))
            .collect();
        results.into_iter().collect()
    }
}

impl Shared {
    fn now(&self) -> Now {
        Now(self.now.load(Ordering::Relaxed))
    }

    fn note(&self, a: u64, b: u64) {
        let hash = self.hash.load(Ordering::Relaxed);
        self.hash.store(mix(mix(hash, a), b), Ordering::Relaxed);
    }

    fn fail(&self, violation: Violation) {
        lock(&self.violation).get_or_insert(violation);
    }

    /// Runs the engine, in which others may get turns.
    fn with_turns<R>(self: &Arc<Self>, f: impl FnOnce() -> R) -> R {
        if self.setup.yield_percent == 0 {
            return f();
        }
        let shared = Arc::clone(self);
        sched::with_hook(Some(Rc::new(move || shared.yield_turn())), f)
    }

    /// Somebody else may have a turn, here and now.
    fn yield_turn(self: &Arc<Self>) {
        let choice = {
            let mut prng = lock(&self.yields);
            if !prng.percent(self.setup.yield_percent) {
                return;
            }
            prng.index(self.cores.len() + 2)
        };
        if self.yield_depth.fetch_add(1, Ordering::Relaxed) < YIELD_DEPTH_MAX {
            match choice.checked_sub(self.cores.len()) {
                None => self.poll_core(choice),
                Some(0) => self.poll_background(),
                Some(_) => self.complete_base(),
            }
        }
        self.yield_depth.fetch_sub(1, Ordering::Relaxed);
    }

    fn poll_core(self: &Arc<Self>, at: usize) {
        let Some(mut core) = try_lock(&self.cores[at]) else {
            return;
        };
        let core = &mut *core;
        if let Err(violation) = core.give_back(Held::pass_turn) {
            self.fail(violation);
        }
        core.out.clear();
        self.with_turns(|| core.channel.poll(self.now(), &mut core.out));
        if !core.out.completions.is_empty() {
            self.check_fenced(core);
        }
        let mut acknowledged = false;
        {
            let outside = &mut *lock(&self.outside);
            let mut completions = std::mem::take(&mut core.out.completions);
            for completion in completions.drain(..) {
                self.note(completion.token.0, code_of(completion.status));
                match complete(outside, core, completion, &self.setup) {
                    Ok(write) => acknowledged |= write,
                    Err(violation) => self.fail(violation),
                }
            }
            core.out.completions = completions;
            for request in core.out.base.drain(..) {
                self.note(request.lba.0, request.len_blocks);
                let client = Client::Channel(at);
                outside.base.submit(client, request, &core.out.sources);
            }
        }
        if acknowledged && let Some(observer) = &self.observer {
            let look = |state: &SimState| {
                lock(observer).look(Moment::Acknowledged, state, &lock(&self.outside));
            };
            sched::with_hook(None, || self.pmem.with_state(look));
        }
    }

    /// At an acknowledgement nothing that the core has stored may be pending.
    fn check_fenced(&self, core: &Core) {
        let agent = core.channel.agent();
        if let Some(at) = self.pmem.with_state(|state| state.first_unfenced(agent)) {
            self.fail(Violation(format!(
                "acknowledged too early: {at} holds a store of {agent:?} that is not fenced"
            )));
        }
    }

    fn poll_background(self: &Arc<Self>) {
        let Some(mut driver) = try_lock(&self.driver) else {
            return;
        };
        let driver = &mut *driver;
        driver.out.clear();
        self.as_background(driver, |driver| {
            driver.background.poll(self.now(), &mut driver.out);
        });
        let outside = &mut *lock(&self.outside);
        for request in driver.out.base.drain(..) {
            self.note(request.lba.0, request.len_blocks + 1);
            let client = Client::Background;
            outside.base.submit(client, request, &driver.out.sources);
        }
    }

    /// Does something of the background. If it moves the dirty tail, a batch has ended: the base is an exact
    /// past state then.
    fn as_background(self: &Arc<Self>, driver: &mut Driver, act: impl FnOnce(&mut Driver)) {
        let before = self.cache.dirty_tail();
        self.with_turns(|| act(driver));
        if self.cache.dirty_tail() != before
            && let Err(violation) = lock(&self.outside).check_cut()
        {
            self.fail(violation);
        }
    }

    fn complete_base(self: &Arc<Self>) {
        let mut undelivered = std::mem::take(&mut *lock(&self.undelivered));
        {
            let outside = &mut *lock(&self.outside);
            if let Some(done) = outside.base.complete_one() {
                self.note(u64::from(done.op.0), u64::from(done.result.is_ok()));
                if done.client == Client::Background
                    && let Err(violation) = outside.check_base_order()
                {
                    self.fail(violation);
                }
                undelivered.push(done);
            }
        }
        for done in undelivered {
            let delivered = match done.client {
                Client::Channel(at) => try_lock(&self.cores[at])
                    .map(|mut core| core.channel.on_base_done(done.op, done.result)),
                Client::Background => try_lock(&self.driver).map(|mut driver| {
                    self.as_background(&mut driver, |driver| {
                        driver.background.on_base_done(done.op, done.result);
                    });
                }),
            };
            if delivered.is_none() {
                lock(&self.undelivered).push(done);
            }
        }
    }
}

fn stamps_of(bytes: &[u8], lba: u64, setup: &Setup) -> Result<Vec<Stamp>, Violation> {
    let blocks = bytes.chunks_exact(setup.block_size_bytes as usize);
    (lba..)
        .zip(blocks)
        .map(|(lba, block)| {
            stamp::read(block, lba)
                .map_err(|g| Violation(format!("a read of block {lba} is garbage: {g}")))
        })
        .collect()
}

/// For the event hash.
fn code_of(status: Status) -> u64 {
    match status {
        Status::Success => 0,
        Status::Failed => 1,
        Status::Aborted => 2,
        Status::NotLent => 3,
        Status::Lent(LoanId(id)) => 4 + u64::from(id),
    }
}

/// Tells the oracle of a completion. `true`: a write was acknowledged.
fn complete(
    outside: &mut Outside,
    core: &mut Core,
    completion: Completion,
    setup: &Setup,
) -> Result<bool, Violation> {
    let at = core
        .pending
        .iter()
        .position(|p| p.token == completion.token);
    let Some(at) = at else {
        let token = completion.token;
        return Err(Violation(format!("{token:?} completes twice")));
    };
    let Pending { asked, buf, .. } = core.pending.swap_remove(at);
    let model = &mut outside.model;
    match (asked, completion.status) {
        (Asked::Write(id), Status::Success) => {
            model.end_write(id);
            return Ok(true);
        }
        (Asked::Write(id), Status::Aborted) => model.abort_write(id),
        (Asked::Write(_), Status::Failed) => {
            return Err(Violation("a write has failed".to_owned()));
        }
        (Asked::Flush(begin), Status::Success) => model.end_flush(begin),
        (Asked::Read { begin, lba, .. }, Status::Success) => {
            let bytes = buf.map(|buf| buf.bytes()).unwrap_or_default();
            model.end_read(begin, lba, Some(&stamps_of(&bytes, lba, setup)?))?;
        }
        (Asked::Lend { begin, lba, turns }, Status::Lent(id)) => {
            let held = Held::new(&core.channel, id, turns);
            let held = held.ok_or_else(|| Violation("a loan of nothing".to_owned()))?;
            model.end_read(begin, lba, Some(&stamps_of(held.bytes(), lba, setup)?))?;
            core.held.push(held);
        }
        (Asked::Lend { begin, .. }, Status::NotLent | Status::Aborted) => {
            model.end_read(begin, 0, None)?;
        }
        (asked, Status::Lent(_) | Status::NotLent) | (asked @ Asked::Lend { .. }, _) => {
            let status = completion.status;
            return Err(Violation(format!("{asked:?} ends as {status:?}")));
        }
        (Asked::Read { failures, .. }, Status::Failed)
            if failures == outside.base.failure_count() =>
        {
            return Err(Violation("a read has failed without a reason".to_owned()));
        }
        (Asked::Read { begin, lba, .. }, Status::Failed | Status::Aborted) => {
            model.end_read(begin, lba, None)?;
        }
        (Asked::Flush(_), Status::Failed | Status::Aborted) => {}
    }
    Ok(false)
}
