//! From a definition and an open base to a cache in use: map the cache device on a thread of its own, open
//! the cache in slices (reading a few blocks of the base on the way), register its bdev.

mod ending;

use std::cell::{Cell, RefCell};
use std::ffi::{c_int, c_void};
use std::mem;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use spdk_sys as sys;

use super::background::Driver;
use super::base::{Base, BaseFacts, BaseFlush, os_text};
use super::json::{Json, Request};
use super::mapping::{self, Job, Mapped, Origin};
use super::memory::{Access, BOUNCE_SIZE_BYTES, Mover};
use super::node::{Node, NodeApp};
use super::recovery::{Helpers, Watch};
use super::registry::{self, EntryId};
use super::remove::{self, After, Removal};
use super::thread::{AppCell, Polled, Poller, now};
use super::trampoline::guard;
use super::watch::StateWatch;
use super::witness_reads::WitnessReads;
use super::zcopy::Zcopy;
use crate::engine::{BaseError, Cache, OpenOptions, StallWatch};
use crate::pmem::{Durability, MappedPmem};
use crate::recovery::{OpenStep, Opening, RecoveryProgress};
use crate::rpc::{Definition, RpcError};
use crate::units::{NS_PER_S, Now};

/// How many cores may append at once, at most.
const STREAM_COUNT_MAX: u32 = 64;

/// A cache on its way into use. App thread only.
#[derive(Debug)]
pub(super) struct Creation {
    pub(super) id: EntryId,
    definition: Definition,
    base: RefCell<Option<Arc<Base>>>,
    stage: RefCell<Stage>,
    /// Who asked, if it was not the base turning up.
    request: RefCell<Option<Request>>,
    hold: Cell<Hold>,
    /// Why it is given up: what came first.
    cancelled: RefCell<Option<RpcError>>,
    /// Who has deleted the cache.
    deleters: RefCell<Vec<Request>>,
    /// For the thread that maps the cache device: it need not go on.
    unwanted: Arc<AtomicBool>,
    /// Of the cache device, once it is mapped.
    origin: Cell<Origin>,
    progress: Cell<(u64, u64)>,
    recovery: Cell<Option<RecoveryProgress>>,
    /// When it began, or recovery did, or ended.
    since: Cell<Now>,
    poller: RefCell<Option<Poller>>,
}

#[derive(Debug)]
enum Stage {
    Mapping(Job<Result<Mapped, RpcError>>),
    Opening(Box<OpeningStage>),
    /// Nothing comes of it.
    Unmapping(Job<()>),
    /// Being worked on, or over.
    Taken,
}

/// What there is between mapping and use.
#[derive(Debug)]
struct OpeningStage {
    /// Before `opening`, which has the mapping: what is unmapped must not be registered.
    access: Access,
    opening: Opening<MappedPmem>,
    helpers: Helpers,
    watch: Option<Watch>,
    reads: WitnessReads,
    silence: StallWatch,
    told: Told,
    durability: Durability,
}

/// What was said of a base that does not answer, once.
#[derive(Debug, Default)]
struct Told {
    silence: bool,
    reset: bool,
}

/// A cache that nothing uses, and before it how its memory was to be reached: what is unmapped must not be registered.
type UnusedMapping = (Option<Access>, Arc<Cache<MappedPmem>>);

/// Whether SPDK waits with the end of the base's examination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    None,
    Examination,
}

impl Creation {
    /// Begins. On an error the request comes back.
    pub(super) fn start(
        id: EntryId,
        definition: Definition,
        base: Base,
        request: Option<Request>,
    ) -> Result<Rc<Self>, (RpcError, Option<Request>)> {
        let unwanted = Arc::new(AtomicBool::new(false));
        let (for_thread, options) = (definition.clone(), options(&definition, &base.facts));
        let (is_unwanted, mover) = (Arc::clone(&unwanted), Mover::of(&base.facts));
        let map = move || mapping::map(&for_thread, options, mover, &is_unwanted);
        let Some(job) = Job::start("pcache-map", map) else {
            return Err((
                RpcError::errno(libc::EAGAIN, "the system has no thread to give"),
                request,
            ));
        };
        let creation = Rc::new(Self {
            id,
            definition,
            base: RefCell::new(Some(Arc::new(base))),
            stage: RefCell::new(Stage::Mapping(job)),
            request: RefCell::new(request),
            hold: Cell::new(Hold::None),
            cancelled: RefCell::new(None),
            deleters: RefCell::new(Vec::new()),
            unwanted,
            origin: Cell::new(Origin::Existed),
            progress: Cell::new((0, 1)),
            recovery: Cell::new(None),
            since: Cell::new(now()),
            poller: RefCell::new(None),
        });
        let arg = Rc::as_ptr(&creation).cast_mut().cast();
        // SAFETY: the registry keeps the creation until `end`, which drops the poller first.
        let poller = unsafe { Poller::register(poll, arg, 0, c"pcache_create") };
        if poller.is_none() {
            creation.unwanted.store(true, Ordering::Relaxed);
            let request = creation.request.borrow_mut().take();
            return Err((no_memory("a poller"), request));
        }
        *creation.poller.borrow_mut() = poller;
        Ok(creation)
    }

    /// Gives up, and answers the delete when that is done.
    pub(super) fn delete(&self, request: Request) {
        self.cancel(registry::deleted_meanwhile(&self.definition.name));
        self.deleters.borrow_mut().push(request);
    }

    /// Whether this creation now holds the examination of `bdev`: it does if that is its base. SPDK is told
    /// at the end.
    pub(super) fn hold_examination(&self, bdev: *const sys::spdk_bdev) -> bool {
        let is_base = self
            .base
            .borrow()
            .as_ref()
            .is_some_and(|base| base.is(bdev));
        is_base && self.hold.replace(Hold::Examination) == Hold::None
    }

    /// How far it is, from 0 to 100.
    pub(super) fn percent(&self) -> u64 {
        let (done, total) = self.progress.get();
        (done.saturating_mul(100) / total.max(1)).min(100)
    }

    fn poll(self: &Rc<Self>) -> Polled {
        let stage = mem::replace(&mut *self.stage.borrow_mut(), Stage::Taken);
        match stage {
            Stage::Mapping(job) if !job.is_done() => {
                *self.stage.borrow_mut() = Stage::Mapping(job);
                Polled::Idle
            }
            Stage::Mapping(job) => {
                match job.finish() {
                    Some(Ok(mapped)) => self.mapped(mapped),
                    Some(Err(error)) => self.refuse(error),
                    None => self.refuse(RpcError::errno(
                        libc::EIO,
                        "mapping the cache device failed",
                    )),
                }
                Polled::Busy
            }
            Stage::Opening(stage) => self.open(stage),
            Stage::Unmapping(job) if !job.is_done() => {
                *self.stage.borrow_mut() = Stage::Unmapping(job);
                Polled::Idle
            }
            Stage::Unmapping(job) => {
                job.finish();
                self.give_up();
                Polled::Busy
            }
            Stage::Taken => Polled::Idle,
        }
    }

    /// The cache device is there, and the engine is to go on with it.
    fn mapped(self: &Rc<Self>, mapped: Mapped) {
        self.origin.set(mapped.origin);
        let base = self.base.borrow().clone();
        let Some(base) = base.filter(|_| self.cancelled.borrow().is_none()) else {
            return self.give_back(mapped);
        };
        let Mapped {
            registration,
            mut opening,
            durability,
            ..
        } = mapped;
        let Some(access) = Access::choose(Mover::of(&base.facts), registration) else {
            drop(base);
            let kib = BOUNCE_SIZE_BYTES >> 10;
            self.cancel(no_memory(&format!(
                "a bounce buffer: {kib} KiB of hugepages"
            )));
            return self.give_back(opening);
        };
        let reads = match WitnessReads::new(base) {
            Ok(reads) => reads,
            Err(error) => {
                self.cancel(error);
                return self.give_back((access, opening));
            }
        };
        // A new cache holds nothing to be recovered.
        let helpers = match opening.recovery() {
            Some(_) => Helpers::start(&mut opening),
            None => Helpers::default(),
        };
        let watch = opening
            .recovery()
            .map(|progress| Watch::begin(&self.definition.name, progress, helpers.worker_count()));
        *self.stage.borrow_mut() = Stage::Opening(Box::new(OpeningStage {
            access,
            opening,
            helpers,
            watch,
            reads,
            silence: StallWatch::default(),
            told: Told::default(),
            durability,
        }));
    }

    /// One slice of the opening.
    fn open(self: &Rc<Self>, mut stage: Box<OpeningStage>) -> Polled {
        self.listen(&mut stage);
        let OpeningStage {
            opening,
            helpers,
            watch,
            reads,
            ..
        } = &mut *stage;
        if self.cancelled.borrow().is_some() {
            return self.abandon(stage, None);
        }
        if !reads.has_room() {
            *self.stage.borrow_mut() = Stage::Opening(stage);
            return Polled::Idle;
        }
        if helpers.have_failed() {
            let message = "internal error in recovery; see the log";
            return self.abandon(stage, Some(RpcError::errno(libc::EIO, message)));
        }
        let step = opening.poll();
        self.note_recovery(opening, watch);
        let polled = match step {
            Ok(OpenStep::Working { done, total }) => {
                self.progress.set((done, total));
                Polled::Busy
            }
            Ok(OpenStep::ReadBase {
                slot,
                lba,
                len_blocks,
            }) => {
                if !reads.start(slot, lba, len_blocks) {
                    opening.on_base_block(slot, Err(BaseError::Io));
                }
                Polled::Busy
            }
            Ok(OpenStep::AwaitingBase) => Polled::Idle,
            Ok(OpenStep::Ready) => {
                self.ready(*stage);
                return Polled::Busy;
            }
            Err(error) => {
                let error = mapping::explain_opening(&self.definition, &error);
                return self.abandon(stage, Some(error));
            }
        };
        *self.stage.borrow_mut() = Stage::Opening(stage);
        polled
    }

    /// Takes what the base has answered. One that does not answer is told of, and SPDK waits no longer for the cache then.
    fn listen(&self, stage: &mut OpeningStage) {
        let OpeningStage {
            opening,
            reads,
            silence,
            told,
            ..
        } = stage;
        reads.advance(|slot, result| {
            silence.heard();
            opening.on_base_block(slot, result);
        });
        let Some(silent_s) = silence.silent_s(now(), reads.in_flight()) else {
            return;
        };
        if !mem::replace(&mut told.silence, true) {
            let (name, base) = (&self.definition.name, &self.definition.base_bdev_name);
            log::warn!(
                "{name}: the base bdev {base} has answered no read for {silent_s} s, which the opening waits for"
            );
        }
        self.release_examination();
    }

    /// Tells the log, and whoever asks, how far it is.
    fn note_recovery(&self, opening: &Opening<MappedPmem>, watch: &mut Option<Watch>) {
        let Some(progress) = opening.recovery() else {
            return;
        };
        if opening.is_recovering() {
            if self.recovery.replace(Some(progress)).is_none() {
                self.since.set(now());
            }
            if let Some(watch) = watch {
                watch.tell(&self.definition.name, progress);
            }
        } else if let Some(watch) = watch.take() {
            self.recovery.set(None);
            self.since.set(now());
            watch.end(&self.definition.name, progress);
        }
    }

    /// For how many seconds it has been opening the cache, or recovering.
    pub(super) fn state_age_s(&self) -> u64 {
        now().since_ns(self.since.get()) / NS_PER_S
    }

    /// What it waits for, if it is not at work itself.
    pub(super) fn waits_for(&self) -> Option<String> {
        let waits_for = match &*self.stage.borrow() {
            Stage::Mapping(_) => "the cache device is being mapped".to_owned(),
            Stage::Unmapping(_) => "the cache device is being unmapped".to_owned(),
            Stage::Opening(stage) => {
                let silent_s = stage.silence.silent_ns(now()) / NS_PER_S;
                match stage.reads.in_flight() {
                    0 => return self.given_up(),
                    count => format!(
                        "{count} reads of the base bdev {} are under way, the last answer came {silent_s} s ago",
                        self.definition.base_bdev_name
                    ),
                }
            }
            Stage::Taken => return None,
        };
        Some(match self.given_up() {
            Some(why) => format!("{why}; {waits_for}"),
            None => waits_for,
        })
    }

    fn given_up(&self) -> Option<String> {
        let cancelled = self.cancelled.borrow();
        cancelled
            .as_ref()
            .map(|why| format!("given up: {}", why.message))
    }

    /// How far recovery is, while there is one.
    pub(super) fn recovery(&self) -> Option<RecoveryProgress> {
        self.recovery.get()
    }

    /// The cache is there: it gets its bdev.
    fn ready(self: &Rc<Self>, stage: OpeningStage) {
        let Some(base) = self.base.borrow().clone() else {
            return;
        };
        match self.put_into_use(stage, base) {
            Ok(node) => match self.register(&node) {
                Ok(()) => self.succeed(&node),
                Err(errno) => self.take_back(&node, errno),
            },
            Err((error, mapping)) => {
                self.cancel(error);
                self.give_back(mapping);
            }
        }
    }

    fn succeed(&self, node: &Node) {
        let base_name = &node.base.facts.identity.name;
        match node.base.facts.flush {
            BaseFlush::Sent => {}
            BaseFlush::Dropped => log::warn!(
                "{}: {base_name} has a volatile write cache, and SPDK passes no FLUSH on to it: a power cut may lose \
                 what write-back has put there; bdev_nvme_set_options with enable_flush, before controllers are \
                 attached, mends that",
                node.name
            ),
            BaseFlush::Unsupported => log::warn!(
                "{}: the base bdev {base_name} has no FLUSH: it is taken for one without a volatile cache",
                node.name
            ),
        }
        log::info!(
            "{}: in front of {base_name}, {}",
            node.name,
            node.access_text
        );
        registry::registered(self.id, node);
        // It may have become larger meanwhile.
        registry::on_base_resized(self.id);
        let request = self.request.borrow_mut().take();
        self.end();
        if let Some(request) = request {
            request.answer(Ok(Json::of(&node.name)));
        }
    }

    /// On an error the cache comes back, which nothing uses any more.
    fn put_into_use(
        self: &Rc<Self>,
        stage: OpeningStage,
        base: Arc<Base>,
    ) -> Result<Arc<Node>, (RpcError, UnusedMapping)> {
        let OpeningStage {
            opening,
            reads,
            mut access,
            durability,
            ..
        } = stage;
        drop(reads);
        let access_text = access.to_string();
        let copies = access.copies_at_start(&base.facts);
        let bounce = match &mut access {
            Access::Bounce(buffers) => mem::take(buffers),
            _ => Vec::new(),
        };
        let cache = opening.finish();
        let zcopy = Zcopy::of(&cache, &access);
        let Some(driver) = Driver::new(&cache, Arc::clone(&base), bounce, copies) else {
            let mapping = (Some(access), cache);
            return Err((no_channel(), mapping));
        };
        let app = NodeApp::new(driver, access, cache.block_count());
        let node = Arc::new(Node {
            id: self.id,
            name: self.definition.name.clone(),
            cache,
            base,
            cache_path: self.definition.cache_path.clone(),
            cache_offset_mib: self.definition.cache_offset_mib,
            durability,
            access_text,
            zcopy,
            write_cache: self.definition.write_cache,
            sends_away: AtomicBool::new(false),
            app: AppCell::new(app),
        });
        if node.publish().is_none() {
            let access = node.app.get().access.borrow_mut().take();
            let mapping = (access, Arc::clone(&node.cache));
            drop(node);
            return Err((no_memory("a bdev"), mapping));
        }
        // From here on the way back is that of a cache in use.
        *self.base.borrow_mut() = None;
        registry::created(self.id, &node);
        if node.start_background().is_none() {
            node.cache.poison("there is no poller for the background");
        }
        Ok(node)
    }

    /// Lets SPDK have the bdev. Else the number of the error.
    fn register(&self, node: &Node) -> Result<(), c_int> {
        let bdev = node.app.get().bdev.get();
        // SAFETY: made by `publish` for this and complete; on the app thread.
        match -unsafe { sys::spdk_bdev_register(bdev) } {
            0 => Ok(()),
            errno => Err(errno),
        }
    }

    /// There is no bdev: what was in use for a moment is closed, and whoever waits is told afterwards.
    fn take_back(&self, node: &Arc<Node>, errno: c_int) {
        let message = format!(
            "bdev {} cannot be registered: {}",
            node.name,
            os_text(errno)
        );
        let refusal = After::Refuse(
            RpcError::errno(errno, message),
            self.request.borrow_mut().take(),
        );
        self.discard();
        self.end();
        remove::on_register_failed(node, refusal);
    }
}

fn options(definition: &Definition, base: &BaseFacts) -> OpenOptions {
    let mut new_uuid = [0; 16];
    // SAFETY: the buffer has the 16 bytes that are written.
    unsafe { sys::pcache_uuid_random(new_uuid.as_mut_ptr()) };
    OpenOptions {
        base: base.identity.clone(),
        base_caps: base.caps,
        base_growth: definition.base_growth,
        format: definition.format,
        new_uuid,
        data_crc: definition.data_crc,
        segment_size_bytes: definition.segment_size_kib.map(|kib| kib << 10),
        settings: definition.settings,
        stream_count_max: STREAM_COUNT_MAX,
    }
}

impl NodeApp {
    fn new(driver: Driver, access: Access, block_count: u64) -> Self {
        Self {
            watch: StateWatch::new(block_count),
            driver: RefCell::new(Some(driver)),
            access: RefCell::new(Some(access)),
            bdev: Cell::new(std::ptr::null_mut()),
            removal: RefCell::new(Removal::none()),
            poller: RefCell::new(None),
        }
    }
}

pub(super) fn no_memory(what: &str) -> RpcError {
    RpcError::errno(libc::ENOMEM, format!("there is no memory for {what}"))
}

/// The base's module tells nobody why. It may pass.
pub(super) fn no_channel() -> RpcError {
    let message = "the base bdev gives no channel; the reason may be in the log";
    RpcError::errno(libc::ENOMEM, message)
}

unsafe extern "C" fn poll(arg: *mut c_void) -> c_int {
    let pointer = arg.cast_const().cast::<Creation>();
    // SAFETY: registered with the address of a creation that the registry keeps until its end, which drops
    // the poller. Counted here, since that end may come during this call.
    let creation = unsafe {
        Rc::increment_strong_count(pointer);
        Rc::from_raw(pointer)
    };
    let polled = guard(
        Polled::Idle,
        || creation.poll(),
        |_| {
            let message = "internal error while the cache was opened; see the log";
            creation.refuse(RpcError::errno(libc::EIO, message));
            Polled::Busy
        },
    );
    polled.code()
}
