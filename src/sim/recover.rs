//! Opens a cache over a simulated device in one go, and looks at all of it.

use super::base::BaseImage;
use super::image::ImagePmem;
use super::machine::Setup;
use super::model::{Expectation, Model, Violation};
use super::peek::Peek;
use super::prng::Prng;
use super::stamp::{self, Garbage, Stamp};
use crate::engine::{Cache, FormatPolicy, OpenOptions};
use crate::media::{HeaderState, Superblock, load_header};
use crate::pmem::{Pmem, PmemRead};
use crate::recovery::{OpenError, OpenStep, Opening, Worker};
use crate::sched;
use crate::units::Lba;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

/// Polls of one opening: far more than a small device needs.
const POLLS_MAX: usize = 100_000;

/// Who recovers: so many workers, which run into each other as a seed says.
#[derive(Clone, Copy, Debug)]
pub struct Crew {
    /// From 1.
    pub worker_count: usize,
    /// How often another one gets a turn in the middle of something, in percent of the accesses.
    pub yield_percent: u8,
    /// Decides whose turn it is.
    pub seed: u64,
}

impl Crew {
    /// One that nobody disturbs.
    pub const ALONE: Crew = Crew {
        worker_count: 1,
        yield_percent: 0,
        seed: 0,
    };
}

/// Opens, or formats, as `options` say. The base is read from `base`: first block, number of blocks.
///
/// # Errors
/// The cache is refused.
pub fn open<'a, P: Pmem>(
    pmem: P,
    options: OpenOptions,
    base: impl Fn(u64, u64) -> &'a [u8],
) -> Result<Arc<Cache<P>>, OpenError> {
    open_by(Crew::ALONE, pmem, options, base)
}

/// As [`open`], by several workers.
///
/// # Errors
/// The cache is refused.
///
/// # Panics
/// The opening does not end.
pub fn open_by<'a, P: Pmem>(
    crew: Crew,
    pmem: P,
    options: OpenOptions,
    base: impl Fn(u64, u64) -> &'a [u8],
) -> Result<Arc<Cache<P>>, OpenError> {
    let mut opening = Opening::begin(pmem, options)?;
    let helpers = Rc::new(Helpers::new(crew, &mut opening));
    for _ in 0..POLLS_MAX {
        helpers.turn();
        match helpers.disturb(|| opening.poll())? {
            OpenStep::Working { .. } | OpenStep::AwaitingBase => {}
            OpenStep::ReadBase {
                slot,
                lba,
                len_blocks,
            } => opening.on_base_block(slot, Ok(base(lba.0, len_blocks))),
            OpenStep::Ready => return Ok(opening.finish()),
        }
    }
    panic!("the opening does not end")
}

/// The workers beside the one of the opening.
struct Helpers<P> {
    workers: Vec<RefCell<Worker<P>>>,
    yield_percent: u8,
    dice: RefCell<Prng>,
}

impl<P: Pmem> Helpers<P> {
    fn new(crew: Crew, opening: &mut Opening<P>) -> Self {
        let workers = (1..crew.worker_count).map(|_| RefCell::new(opening.worker()));
        Self {
            workers: workers.collect(),
            yield_percent: crew.yield_percent,
            dice: RefCell::new(Prng::new(crew.seed)),
        }
    }

    /// Runs `f`, with turns of the others in the middle of it.
    fn disturb<R>(self: &Rc<Self>, f: impl FnOnce() -> R) -> R {
        if self.workers.is_empty() || self.yield_percent == 0 {
            return f();
        }
        let helpers = Rc::clone(self);
        let hook = move || {
            let is_due = helpers.dice.borrow_mut().percent(helpers.yield_percent);
            if is_due {
                helpers.work();
            }
        };
        sched::with_hook(Some(Rc::new(hook)), f)
    }

    /// One of them may work.
    fn turn(self: &Rc<Self>) {
        let is_due = !self.workers.is_empty() && self.dice.borrow_mut().percent(50);
        if is_due {
            self.disturb(|| self.work());
        }
    }

    /// Lets one work, unless it is in the middle of something.
    fn work(&self) {
        let choice = self.dice.borrow_mut().index(self.workers.len());
        if let Ok(mut worker) = self.workers[choice].try_borrow_mut() {
            worker.work();
        }
    }
}

/// The superblock of a device that holds a cache.
///
/// # Panics
/// It holds none.
pub(crate) fn superblock_of(pmem: &impl PmemRead) -> Superblock {
    match load_header(pmem) {
        Ok(HeaderState::Cache(superblock, _)) => *superblock,
        other => panic!("the device holds a cache, not {other:?}"),
    }
}

/// What every block of a cache that was just recovered would read as.
///
/// # Errors
/// Something is damaged, or what counts as clean is not what the base holds.
pub fn look<P: Pmem>(
    cache: &Cache<P>,
    base: &BaseImage,
    block_count: u64,
) -> Result<Vec<Result<Stamp, Garbage>>, Violation> {
    let mut block = vec![0; cache.geometry.block_size_bytes() as usize];
    let mut found = Vec::with_capacity(block_count as usize);
    for lba in 0..block_count {
        let from = cache
            .peek(Lba(lba), &mut block)
            .map_err(|error| Violation(format!("block {lba} of a recovered cache: {error}")))?;
        match from {
            Peek::Base => found.push(base.stamp(lba)),
            Peek::Dirty => found.push(stamp::read(&block, lba)),
            Peek::Clean => {
                if block != base.blocks(lba, 1) {
                    return Err(Violation(format!(
                        "block {lba} counts as clean and is {:?}, but the base holds {:?}",
                        stamp::read(&block, lba),
                        base.stamp(lba)
                    )));
                }
                found.push(stamp::read(&block, lba));
            }
        }
    }
    Ok(found)
}

/// Recovers from a crash: `image` and `base` are what it left. Returns what every block reads as, and the
/// cache.
///
/// # Errors
/// The cache is refused, or a promise was broken.
pub fn judge(
    image: ImagePmem,
    setup: &Setup,
    model: &Model,
    base: &BaseImage,
) -> Result<(Vec<Stamp>, Arc<Cache<ImagePmem>>), Violation> {
    judge_with(image, setup, &Expectation::of(model), base)
}

/// As [`judge`], for many images of one moment.
///
/// # Errors
/// The cache is refused, or a promise was broken.
pub fn judge_with<P: Pmem>(
    image: P,
    setup: &Setup,
    expectation: &Expectation,
    base: &BaseImage,
) -> Result<(Vec<Stamp>, Arc<Cache<P>>), Violation> {
    let options = setup.options(FormatPolicy::Auto);
    let cache = open_by(setup.recovered_by, image, options, |lba, len| {
        base.blocks(lba, len)
    })
    .map_err(|error| Violation(format!("the cache is refused after a crash: {error}")))?;
    cache.check_invariants();
    let found = look(&cache, base, setup.block_count)?;
    let stamps = expectation.check(|lba| found[lba as usize])?;
    Ok((stamps, cache))
}

/// A start with a base of another size is refused, and changes nothing.
///
/// # Errors
/// It is not, or does.
pub fn offer_another_base(setup: &Setup, image: &[u8], prng: &mut Prng) -> Result<(), Violation> {
    let count = setup.block_count;
    let mut other = setup.clone();
    // Whoever expects it to grow would take a larger one.
    other.block_count_first = None;
    other.block_count = prng.pick(&[count - 1, count + 1, count * 2, count / 2]);
    let copy = ImagePmem::new(image.to_vec());
    let zeroes = vec![0; 4096];
    let opened = open(copy.clone(), other.options(FormatPolicy::Auto), |_, len| {
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
