//! A machine: cores that share one cache over simulated devices, and the oracle beside them.
//!
//! It is driven step by step from one thread. Cores still run into each other: before every access to the
//! cache device, to the index, and to what else cores share, another core, the background or the base may get
//! its turn ([`Setup::yield_percent`]), in the middle of a batch or of a read. All that happens is decided by
//! seeds.

mod checkpoint;
mod ends;
mod losses;
mod setup;
mod turns;

pub use checkpoint::Watch;
pub use setup::{Readers, Setup};

use super::base::{BaseImage, SimBase};
use super::model::{BaseRule, Model, Violation, WriteId, WriteKind};
use super::pmem::{CrashPointHook, SimPmem, SimState};
use super::prng::Prng;
use super::recover;
use super::stamp::{self, Stamp};
use crate::engine::{
    BACKGROUND_AGENT, Cache, Channel, Completion, FormatPolicy, Fua, HostIo, IoToken, Op, Outbox,
    Setting, SettingChange, WritebackOrder,
};
use crate::media::persist_unfinished_mark;
use crate::pmem::{IovBuf, PadMemory};
use crate::sched;
use crate::units::{Lba, NS_PER_MS, Now};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use turns::{Asked, Core, Driver, Pending, Shared, lock};

/// Polls that work which must end may take.
const POLLS_MAX: usize = 200_000;
/// What the base holds before the first write: not zeroes, so that these are recognised.
pub const INITIAL: Stamp = Stamp(1);

/// What the cache does not know.
#[derive(Clone, Debug)]
pub struct Outside {
    /// The oracle.
    pub model: Model,
    /// The base device.
    pub base: SimBase,
    /// A batch that spans barriers may be under way, or half of one may be on the base.
    pub relaxed: bool,
    /// The checkpoint that was asked for and is not known to have ended.
    pub checkpoint: Option<Watch>,
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

    /// Where writes are acknowledged when the base has them.
    fn check_on_base(&self, write: WriteId) -> Result<(), Violation> {
        self.model
            .check_on_base(write, |lba| self.base.durable_stamp(lba))
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

/// A channel with as many pads as wanted.
fn channel_of(cache: &Arc<Cache<SimPmem>>, setup: &Setup) -> Channel<SimPmem> {
    let pads = (setup.pad_pages > 0).then(|| PadMemory::from_heap(setup.pad_pages));
    let channel = cache.channel_with(pads);
    channel.expect("fewer cores than channels")
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
        base.fails_unmaps = setup.base_fails_unmaps;
        base.fill(INITIAL);
        let model = Model::new(count, INITIAL);
        let pmem = if setup.used_before {
            SimPmem::from_image(Self::remains(&setup, seed)?)
        } else {
            SimPmem::new(setup.device_size_bytes())
        };
        let relaxed = setup.order == WritebackOrder::Relaxed;
        let outside = Outside {
            model,
            base,
            relaxed,
            checkpoint: None,
        };
        let outside = Arc::new(Mutex::new(outside));
        let block_count = setup.block_count_first.unwrap_or(setup.block_count);
        Self::start(setup, block_count, pmem, outside, observer, prng, 0)
    }

    /// A device that another cache has filled, and that is about to be formatted anew.
    fn remains(setup: &Setup, seed: u64) -> Result<Vec<u8>, Violation> {
        let setup = Setup {
            uuid: *b"an earlier cache",
            used_before: false,
            yield_percent: 0,
            gc_percent: 90,
            ..setup.clone()
        };
        let (count, blocks) = (setup.segment_count, setup.block_count);
        let machine = Self::new(setup, seed, None)?;
        for number in 0..4 * count {
            machine.write(0, number % blocks, 1, Fua::No, &[]);
            machine.settle()?;
        }
        let marked = persist_unfinished_mark(machine.pmem(), BACKGROUND_AGENT);
        drop(marked.map_err(|error| Violation(format!("no format can begin: {error}")))?);
        Ok(machine.pmem().durable_image())
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
        device.fails_unmaps = setup.base_fails_unmaps;
        device.restart(base);
        let outside = Outside {
            model,
            base: device,
            relaxed: true,
            checkpoint: None,
        };
        let outside = Arc::new(Mutex::new(outside));
        let pmem = SimPmem::from_image(image);
        Self::start(setup, count, pmem, outside, None, prng, 0)
    }

    /// `block_count`: of the base now.
    fn start(
        setup: Setup,
        block_count: u64,
        pmem: SimPmem,
        outside: Arc<Mutex<Outside>>,
        observer: Option<SharedObserver>,
        mut prng: Prng,
        hash: u64,
    ) -> Result<Self, Violation> {
        if let Some(observer) = &observer {
            pmem.on_crash_point(Some(fence_hook(observer, &outside)));
        }
        pmem.set_bytes_checksummed_per_fence(setup.bytes_checksummed_per_fence);
        let image = lock(&outside).base.current_image();
        let mut options = setup.options(FormatPolicy::Auto);
        options.base.block_count = block_count;
        let blocks = |lba, len| image.blocks(lba, len);
        let cache = recover::open_by(setup.recovered_by, pmem.clone(), options, blocks)
            .map_err(|error| Violation(format!("the cache is refused: {error}")))?;
        let core = || Core {
            channel: channel_of(&cache, &setup),
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
                completed: Mutex::new(Vec::new()),
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

    /// The requests that have completed since the last call, in this order. Their tokens count from 1, in the
    /// order of submission.
    #[must_use]
    pub fn take_completed(&self) -> Vec<Completion> {
        std::mem::take(&mut *lock(&self.shared.completed))
    }

    /// What its clock says.
    #[must_use]
    pub fn now(&self) -> Now {
        self.shared.now()
    }

    /// Lets time pass.
    pub fn pass_ms(&self, ms: u64) {
        self.shared.now.fetch_add(ms * NS_PER_MS, Ordering::Relaxed);
    }

    /// Submits a write; its data are cut into the elements of a scatter list at `cuts`.
    pub fn write(&self, core: usize, lba: u64, len_blocks: u64, fua: Fua, cuts: &[usize]) {
        if !self.has(lba, len_blocks) {
            return;
        }
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
        if !self.has(lba, len_blocks) {
            return;
        }
        let id = self.with_outside(|outside| {
            outside
                .model
                .begin_write(WriteKind::Zeroes, lba, len_blocks)
        });
        self.submit(core, op, lba, len_blocks, Asked::Write(id), None);
    }

    /// Submits a read.
    pub fn read(&self, core: usize, lba: u64, len_blocks: u64, cuts: &[usize]) {
        if !self.has(lba, len_blocks) {
            return;
        }
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
        if !self.has(lba, len_blocks) {
            return;
        }
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
    pub fn change_settings(&self, change: SettingChange) {
        if change.get(Setting::WritebackOrder) == Some(WritebackOrder::Relaxed as u32) {
            self.with_outside(|outside| outside.relaxed = true);
        }
        let changed = self.shared.cache.change_settings(&change);
        assert!(changed.is_ok(), "the option is in range");
    }

    /// The base gets its full size.
    pub fn grow(&self) {
        let grown = self.shared.cache.grow(self.shared.setup.block_count);
        assert!(grown.is_ok(), "a simulated base is small: {grown:?}");
    }

    /// Whether the cache has these blocks by now; what it has not is not asked for.
    fn has(&self, lba: u64, len_blocks: u64) -> bool {
        lba + len_blocks <= self.shared.cache.block_count()
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
        // With and without whole groups of pages of the index, at their borders and elsewhere.
        let (count, step) = (self.shared.setup.block_count, 50);
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
}
