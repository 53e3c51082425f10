//! Opening, step by step. Each poll does a bounded slice of work.

use super::error::OpenError;
use super::format::Formatting;
use super::pass::{Known, Pass, RecoveryProgress, Verdict};
use super::pass_memory::PassMemory;
use super::recovered::Recovered;
use super::tails::{check_copies, check_update, tails_out_of_range};
use super::witness::{WitnessCheck, WitnessStep};
use super::worker::{Lead, Worker};
use crate::canary::{self, Canary};
use crate::engine::{
    BACKGROUND_AGENT, BaseError, BaseGrowth, BaseIdentity, Cache, CacheParts, DataCrc,
    FormatPolicy, OpenOptions, SettingValues,
};
use crate::index::Index;
use crate::media::{
    Checksums, Copies, FEATURES_COMPAT, FEATURES_INCOMPAT, Geometry, HeaderState, Superblock,
    SuperblockError, Tails, load_header, persist_superblock,
};
use crate::pmem::{Pmem, PmemRead};
use crate::units::Lba;
use std::sync::Arc;

/// Of the worker that an opening has itself; the others count on from it. 0 is nobody.
const WORKER_NUMBER: u16 = 1;

/// What a poll of [`Opening`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenStep {
    /// Poll again.
    Working {
        /// Units of work that are done.
        done: u64,
        /// Of so many in this phase.
        total: u64,
    },
    /// Read these blocks from the base, then call [`Opening::on_base_block`].
    ReadBase {
        /// To be handed back.
        slot: u32,
        /// First block.
        lba: Lba,
        /// Number of blocks: 4 KiB at most.
        len_blocks: u64,
    },
    /// A base read is under way.
    AwaitingBase,
    /// [`Opening::finish`] can be called.
    Ready,
}

/// What an open or format has come to.
enum Phase<P> {
    /// Samples of the base become the first witness.
    Sampling(WitnessCheck),
    Formatting(Formatting),
    /// The workers have a pass.
    Scanning,
    /// It is over, but a worker may still have hold of it.
    Judging(Arc<Pass<P>>),
    /// The base is compared with the witness.
    Checking(WitnessCheck, Box<Recovered>),
    Repairing(Box<Recovered>),
    Ready(Box<Recovered>),
    /// An error was returned.
    Failed,
}

/// A cache device on its way to a cache.
pub struct Opening<P: Pmem> {
    /// Shared with the workers while there is a pass.
    pmem: Arc<P>,
    options: OpenOptions,
    superblock: Superblock,
    /// As they were found; `None`: of a new cache.
    superblock_copies: Option<Copies>,
    /// It is not what the media say any more.
    superblock_changed: bool,
    phase: Phase<P>,
    crew: Lead<P>,
    /// The one that works in every poll.
    worker: Worker<P>,
    worker_count: u16,
    progress: Option<RecoveryProgress>,
    /// For the first pass, if it was asked for already.
    memory: Option<PassMemory>,
}

impl<P: Pmem> std::fmt::Debug for Opening<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opening")
            .field("superblock", &self.superblock)
            .finish_non_exhaustive()
    }
}

impl<P: Pmem> Opening<P> {
    /// Looks at the header area and decides what to do. Writes nothing.
    ///
    /// # Errors
    /// The device, the base or an option does not fit.
    pub fn begin(pmem: P, options: OpenOptions) -> Result<Self, OpenError> {
        match accept(&pmem, &options)? {
            Accepted::New(superblock) => {
                let check = WitnessCheck::sample(&superblock);
                let mut opening = Self::new(pmem, options, *superblock, Phase::Sampling(check));
                if !canary::is(Canary::FormattedWithoutMemory) {
                    // INV-OPEN-7: whatever the device holds is still there if there is none.
                    opening.memory = Some(PassMemory::new(&opening.superblock)?);
                }
                Ok(opening)
            }
            Accepted::Cache(superblock, copies, growth) => {
                let checksums = Checksums::new(superblock.uuid);
                let (tails, tails_copies) =
                    Tails::load(&pmem, &checksums).map_err(OpenError::Tails)?;
                // They have to move.
                check_copies("tails", &tails_copies)?;
                let mut opening = Self::new(pmem, options, *superblock, Phase::Scanning);
                opening.superblock_copies = Some(copies);
                opening.superblock_changed = growth == Growth::Grown;
                opening.scan(tails, Some(tails_copies))?;
                Ok(opening)
            }
        }
    }

    fn new(pmem: P, options: OpenOptions, superblock: Superblock, phase: Phase<P>) -> Self {
        let crew = Lead::default();
        Self {
            pmem: Arc::new(pmem),
            options,
            superblock,
            superblock_copies: None,
            superblock_changed: false,
            phase,
            worker: crew.worker(WORKER_NUMBER),
            crew,
            worker_count: WORKER_NUMBER,
            progress: None,
            memory: None,
        }
    }

    /// Another worker, for another thread. Without any, all the work is done by [`Opening::poll`]. Once its work is
    /// over, or the opening is gone, it should be dropped soon: it may have hold of the device.
    pub fn worker(&mut self) -> Worker<P> {
        self.worker_count = self.worker_count.wrapping_add(1);
        self.crew.worker(self.worker_count)
    }

    /// How far recovery is, or was when it ended; `None` before it begins.
    #[must_use]
    pub fn recovery(&self) -> Option<RecoveryProgress> {
        self.progress
    }

    /// Whether segments are being scanned.
    #[must_use]
    pub fn is_recovering(&self) -> bool {
        matches!(self.phase, Phase::Scanning | Phase::Judging(_))
    }

    /// Lets the segments be scanned.
    fn scan(&mut self, tails: Tails, tails_copies: Option<Copies>) -> Result<(), OpenError> {
        if let Some(error) = tails_out_of_range(&self.superblock, &tails).next() {
            return Err(error);
        }
        let memory = match self.memory.take() {
            Some(memory) => memory,
            None => PassMemory::new(&self.superblock)?,
        };
        let known = Known {
            superblock: self.superblock.clone(),
            tails,
            tails_copies,
            tails_changed: false,
        };
        self.start(Pass::new(Arc::clone(&self.pmem), known, memory));
        Ok(())
    }

    fn start(&mut self, pass: Pass<P>) {
        self.progress = Some(pass.progress());
        self.crew.set_pass(pass);
    }

    /// Does a slice of the work.
    ///
    /// # Errors
    /// The cache cannot be opened. Nothing was written, unless a format had begun.
    pub fn poll(&mut self) -> Result<OpenStep, OpenError> {
        let phase = std::mem::replace(&mut self.phase, Phase::Failed);
        let (phase, step) = self.advance(phase)?;
        self.phase = phase;
        Ok(step)
    }

    fn advance(&mut self, phase: Phase<P>) -> Result<(Phase<P>, OpenStep), OpenError> {
        let again = OpenStep::Working { done: 0, total: 1 };
        Ok(match phase {
            Phase::Sampling(mut check) => match check.poll()? {
                WitnessStep::Done => {
                    let formatting = Formatting::new(check.into_witness());
                    (Phase::Formatting(formatting), again)
                }
                WitnessStep::Step(step) => (Phase::Sampling(check), step),
            },
            Phase::Formatting(mut formatting) => {
                match formatting.poll(&*self.pmem, &mut self.superblock)? {
                    Some(step) => (Phase::Formatting(formatting), step),
                    None => {
                        self.scan(formatting.into_tails(), None)?;
                        (Phase::Scanning, again)
                    }
                }
            }
            Phase::Scanning => {
                self.worker.work();
                let over = self.crew.take_pass_if(|pass| {
                    // In this order: what is told last is all of it.
                    let over = pass.is_over();
                    self.progress = Some(pass.progress());
                    over
                });
                match over {
                    Some(pass) => (Phase::Judging(pass), again),
                    None => (Phase::Scanning, self.scan_step()),
                }
            }
            Phase::Judging(pass) => match Arc::try_unwrap(pass) {
                Err(pass) => (Phase::Judging(pass), self.scan_step()),
                Ok(pass) => match pass.judge()? {
                    Verdict::Again(pass) => {
                        self.start(*pass);
                        (Phase::Scanning, again)
                    }
                    Verdict::Accepted(recovered) => {
                        self.crew.dismiss();
                        let check = WitnessCheck::compare(recovered.witness);
                        (Phase::Checking(check, recovered), again)
                    }
                },
            },
            Phase::Checking(mut check, recovered) => match check.poll()? {
                WitnessStep::Done => {
                    self.adopt_options()?;
                    if self.superblock_changed
                        && let Some(copies) = &self.superblock_copies
                    {
                        check_copies("superblock", copies)?;
                    }
                    (Phase::Repairing(recovered), again)
                }
                WitnessStep::Step(step) => (Phase::Checking(check, recovered), step),
            },
            // INV-OPEN-1: the first store to a device that holds a cache; everything has been accepted.
            Phase::Repairing(mut recovered) => {
                self.repair_superblock()?;
                match recovered.repair(&*self.pmem, &self.superblock)? {
                    Some(step) => (Phase::Repairing(recovered), step),
                    None => (Phase::Ready(recovered), OpenStep::Ready),
                }
            }
            Phase::Ready(recovered) => (Phase::Ready(recovered), OpenStep::Ready),
            Phase::Failed => unreachable!("an opening that failed is not polled again"),
        })
    }

    fn scan_step(&self) -> OpenStep {
        let progress = self.progress.unwrap_or_default();
        OpenStep::Working {
            done: u64::from(progress.segments_scanned),
            total: u64::from(progress.segments_total),
        }
    }

    /// Options and the base's identity, as far as they may change, go into the superblock. A cache whose superblock cannot be
    /// changed, as part of it cannot be read, does without incompatible features.
    fn adopt_options(&mut self) -> Result<(), OpenError> {
        let before = self.superblock.clone();
        let superblock = &mut self.superblock;
        superblock.features_compat |= FEATURES_COMPAT;
        let copies = self.superblock_copies.as_ref();
        if copies.is_none_or(|copies| copies.unreadable().is_none()) {
            superblock.features_incompat |= FEATURES_INCOMPAT;
        }
        superblock.base = self.options.base.clone();
        superblock.settings = superblock.settings_with(&self.options.settings)?;
        self.superblock_changed |= *superblock != before;
        Ok(())
    }

    fn repair_superblock(&mut self) -> Result<(), OpenError> {
        // Once: it is asked for with each poll.
        if let Some(mut copies) = self.superblock_copies.take() {
            copies.repair(&*self.pmem, BACKGROUND_AGENT)?;
        }
        if std::mem::take(&mut self.superblock_changed) {
            let superblock = &mut self.superblock;
            drop(persist_superblock(
                &*self.pmem,
                BACKGROUND_AGENT,
                superblock,
            ));
        }
        Ok(())
    }

    /// The blocks that a [`OpenStep::ReadBase`] asked for.
    pub fn on_base_block(&mut self, slot: u32, result: Result<&[u8], BaseError>) {
        if let Phase::Sampling(check) | Phase::Checking(check, _) = &mut self.phase {
            check.on_base_block(slot, result);
        }
    }

    /// The cache, after [`OpenStep::Ready`].
    ///
    /// # Panics
    /// Called before that.
    pub fn finish(self) -> Arc<Cache<P>> {
        let Phase::Ready(recovered) = self.phase else {
            panic!("an opening is finished when it is ready, not before")
        };
        let Some(pmem) = Arc::into_inner(self.pmem) else {
            unreachable!("the passes are gone, and nothing else has it")
        };
        let found = recovered.into_found();
        Cache::new(CacheParts {
            pmem,
            superblock: self.superblock,
            tails: found.tails,
            base_caps: self.options.base_caps,
            index: found.index,
            place_crcs: found.place_crcs,
            segments: found.segments,
            damage: found.damage,
            heat: found.heat,
            background: found.background,
            seq_next: found.seq_next,
            epoch: found.epoch,
            dirty_bytes: found.dirty_bytes,
            stream_count_max: self.options.stream_count_max,
        })
    }
}

/// What the header of a cache device comes to with certain options.
enum Accepted {
    /// A cache is to be made there.
    New(Box<Superblock>),
    /// There is one, for the base as it is now.
    Cache(Box<Superblock>, Copies, Growth),
}

/// Of the base, since it was last seen.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Growth {
    None,
    Grown,
}

/// Whether [`Opening::begin`] would take a device, as far as its header tells that. To be asked of one before it is opened for
/// use, which fills the holes of a file.
///
/// # Errors
/// The device, the base or an option does not fit.
pub fn check_header<R: PmemRead>(pmem: &R, options: &OpenOptions) -> Result<(), OpenError> {
    accept(pmem, options).map(drop)
}

fn accept<R: PmemRead>(pmem: &R, options: &OpenOptions) -> Result<Accepted, OpenError> {
    check_options(options)?;
    let header = match (load_header(pmem), options.format) {
        // Whatever it holds, it is to be overwritten.
        (Ok(_), FormatPolicy::Force) => HeaderState::Blank,
        (Err(SuperblockError::Poisoned(error)), FormatPolicy::Force) => return Err(error.into()),
        (Err(_), FormatPolicy::Force) => HeaderState::Blank,
        (header, _) => header?,
    };
    match header {
        HeaderState::Blank | HeaderState::Unfinished => {
            if options.format == FormatPolicy::Never {
                return Err(OpenError::Blank);
            }
            let superblock = new_superblock(pmem.len_bytes(), options)?;
            check_size(&superblock)?;
            Ok(Accepted::New(Box::new(superblock)))
        }
        HeaderState::Cache(mut superblock, copies) => {
            check_base(&superblock.base, &options.base, options.base_growth)?;
            check_fixed_options(&superblock, options)?;
            // The index is for all that the base has now; the media are told with the repairs.
            let growth = if superblock.base.block_count == options.base.block_count {
                Growth::None
            } else {
                Growth::Grown
            };
            superblock.base.block_count = options.base.block_count;
            check_size(&superblock)?;
            check_update(&superblock)?;
            Ok(Accepted::Cache(superblock, copies, growth))
        }
    }
}

fn check_options(options: &OpenOptions) -> Result<(), OpenError> {
    let bad = |name, value: String, expected: &str| {
        Err(OpenError::BadOption {
            name,
            value,
            expected: expected.to_owned(),
        })
    };
    if options.base.name.is_empty() || options.base.name.len() > 255 {
        let expected = "the name of a base device has 1 to 255 bytes";
        return bad("base_bdev_name", options.base.name.clone(), expected);
    }
    if options.base.block_count == 0 {
        return bad("num_blocks", "0".to_owned(), "the base device is empty");
    }
    Ok(())
}

/// Whether the index can name every page of the base.
fn check_size(superblock: &Superblock) -> Result<(), OpenError> {
    let pages = base_page_count(superblock);
    let max = Index::page_count_max_of(&superblock.geometry, pages);
    if pages > max {
        return Err(OpenError::BaseTooLarge { pages, max });
    }
    Ok(())
}

pub(super) fn base_page_count(superblock: &Superblock) -> u64 {
    let per_page = u64::from(superblock.geometry.blocks_per_page());
    superblock.base.block_count.div_ceil(per_page)
}

fn new_superblock(device: u64, options: &OpenOptions) -> Result<Superblock, OpenError> {
    let segment = options
        .segment_size_bytes
        .unwrap_or_else(|| Geometry::segment_size_default_bytes(device));
    let data_crc = options.data_crc.unwrap_or_default();
    let settings = SettingValues::default().with(&options.settings)?;
    settings.check_with(data_crc)?;
    Ok(Superblock {
        uuid: options.new_uuid,
        device_size_bytes: device,
        geometry: Geometry::plan(device, segment, options.base.block_size_bytes)?,
        data_crc,
        settings,
        base: options.base.clone(),
        features_compat: FEATURES_COMPAT,
        features_incompat: FEATURES_INCOMPAT,
        update: 0,
    })
}

/// Whether the base that is `given` can be `ours`, as far as it is known without reading it.
pub(crate) fn check_base(
    ours: &BaseIdentity,
    given: &BaseIdentity,
    growth: BaseGrowth,
) -> Result<(), OpenError> {
    let wrong = |what, expected: String, found: String| {
        Err(OpenError::WrongBase {
            what,
            expected,
            found,
        })
    };
    if ours.block_size_bytes != given.block_size_bytes {
        let (ours, given) = (ours.block_size_bytes, given.block_size_bytes);
        return wrong("block size", ours.to_string(), given.to_string());
    }
    let may_differ = growth == BaseGrowth::Accept && ours.block_count < given.block_count;
    if ours.block_count != given.block_count && !may_differ {
        return Err(OpenError::BaseSize {
            expected: ours.block_count,
            found: given.block_count,
        });
    }
    // Many kinds of bdev get a random uuid at each start: a changed one alone says nothing.
    if ours.uuid != given.uuid && ours.name != given.name {
        return wrong("name", ours.name.clone(), given.name.clone());
    }
    Ok(())
}

/// Whether the options that formatting has fixed are those that are asked for, and go with the settings.
fn check_fixed_options(superblock: &Superblock, options: &OpenOptions) -> Result<(), OpenError> {
    let mismatch =
        |name, media: String, asked: String| Err(OpenError::OptionMismatch { name, media, asked });
    if let Some(asked) = options.data_crc
        && asked != superblock.data_crc
    {
        let text = |crc: DataCrc| (crc == DataCrc::On).to_string();
        return mismatch("data_crc", text(superblock.data_crc), text(asked));
    }
    if let Some(asked) = options.segment_size_bytes
        && asked != superblock.geometry.segment_size_bytes()
    {
        let kib = |bytes: u64| (bytes >> 10).to_string();
        let media = superblock.geometry.segment_size_bytes();
        return mismatch("segment_size_kib", kib(media), kib(asked));
    }
    superblock.settings_with(&options.settings)?;
    Ok(())
}
