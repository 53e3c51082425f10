//! Filling an index from keys that come in any order: of two keys for a block, the one with the higher seq wins
//! (INV-OPEN-6).

use super::bucket::{BUCKET_WORDS, PageSlot};
use super::map::{BlockMap, Target};
use super::side::LineStock;
use super::table::{EarlierParts, Index, IndexFull, SlotRef};
use crate::canary::{self, Canary};
use crate::media::Place;
use crate::memory::NoMemory;
use crate::pmem::Lines;
use crate::sched;
use crate::units::Seq;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Ranges of buckets that are claimed as one, at most.
const RANGES_MAX: usize = 64;

/// In the word of a page: its blocks have seqs of their own. Seqs are below 2^62 (INV-OPEN-3).
const BY_BLOCK: u64 = 1 << 63;

/// A part of a page, or all of it, and what a key says of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PagePart {
    pub(crate) at: SlotRef,
    /// Number of the first block in the page.
    pub(crate) first: u32,
    pub(crate) len_blocks: u32,
    pub(crate) target: Target,
    /// Of the kset.
    pub(crate) seq: Seq,
}

/// A range of buckets, whose pages one worker at a time may install.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RangeId(usize);

impl RangeId {
    pub(crate) fn new(number: usize) -> Self {
        Self(number)
    }

    pub(crate) fn index(self) -> usize {
        self.0
    }
}

/// Seqs beside the slots of an index, while it is filled. The word of a slot is 0 while it is empty, else the seq of all
/// that is cached of the page, or it says that its line has one for each block: there is such a line for each slot
/// where pages have several blocks, whose memory is used only where needed. Whoever holds the claim of the range in which
/// the home bucket of a page lies may touch its words, which need no order of their own.
#[derive(Debug)]
pub(crate) struct Newest {
    pages: Lines<AtomicU64>,
    blocks: Option<Lines<AtomicU64>>,
    blocks_per_page: u32,
    /// Of each range, whether a worker is at it.
    claims: Box<[AtomicBool]>,
    /// A range has this power of two of buckets, but for the last one.
    range_shift: u32,
}

impl Newest {
    /// For an index that is empty.
    pub(crate) fn new(index: &Index) -> Result<Self, NoMemory> {
        let blocks_per_page = index.geometry().blocks_per_page();
        let buckets = index.bucket_count();
        let range_shift = buckets.div_ceil(RANGES_MAX).next_power_of_two().ilog2();
        let ranges = 0..buckets.div_ceil(1 << range_shift);
        let what = "the numbers of what recovery finds";
        let blocks = (blocks_per_page > 1).then(|| Lines::new(what, buckets * BUCKET_WORDS));
        Ok(Self {
            claims: ranges.map(|_| AtomicBool::new(false)).collect(),
            range_shift,
            pages: Lines::new_dense(what, buckets)?,
            blocks: blocks.transpose()?,
            blocks_per_page,
        })
    }

    pub(crate) fn range_count(&self) -> usize {
        self.claims.len()
    }

    pub(crate) fn buckets_per_range(&self) -> usize {
        1 << self.range_shift
    }

    /// The range in which the home bucket of a page lies.
    #[inline]
    pub(crate) fn range_of(&self, at: SlotRef) -> RangeId {
        RangeId(at.bucket() >> self.range_shift)
    }

    /// Claims all pages of a range, if nobody else has. To be released.
    pub(crate) fn claim(&self, range: RangeId) -> bool {
        sched::point();
        !self.claims[range.0].swap(true, Ordering::Acquire)
    }

    /// Gives up a claim.
    pub(crate) fn release(&self, range: RangeId) {
        sched::point();
        self.claims[range.0].store(false, Ordering::Release);
    }

    /// Asks for what an installation will touch first to be brought into the cache.
    #[inline]
    pub(crate) fn prefetch(&self, index: &Index, at: SlotRef) {
        index.prefetch(at);
        crate::pmem::prefetch_line(&self.pages.line(at.bucket())[0]);
    }

    /// The second step, once the first has had its time: what is known block by block.
    #[inline]
    pub(crate) fn prefetch_parts(&self, index: &Index, at: SlotRef) {
        if let Some(blocks) = &self.blocks
            && let Some((bucket, number)) = index.prefetch_parts(at)
        {
            crate::pmem::prefetch_line(&blocks.line(bucket * BUCKET_WORDS + number)[0]);
        }
    }

    /// Lets a key take effect on those blocks of a page that no later one has set, for the holder of the claim. Of
    /// keys with the same seq, which come from one kset, the one that is installed later wins. The stock of the
    /// caller is empty before and after: nobody reads yet, so a line may be used again at once.
    #[inline]
    pub(crate) fn install(
        &self,
        index: &Index,
        part: &PagePart,
        stock: &mut LineStock,
    ) -> Result<(), IndexFull> {
        let slot = index.reserve(part.at)?;
        let word = &self.pages.line(slot.bucket())[slot.number()];
        let stored = word.load(Ordering::Relaxed);
        let is_whole = part.len_blocks == self.blocks_per_page;
        let buries = stored & BY_BLOCK != 0 && canary::is(Canary::NewerBlocksBuried);
        // A slot that was taken just now is published in any case.
        if stored == 0 || is_whole && (buries || !is_later(stored, part.seq)) {
            // The first part is a run, and all of a page needs no line either.
            index.publish(slot, part.first, part.len_blocks, part.target, stock);
            index.clear_stock(stock);
            word.store(part.seq.0, Ordering::Relaxed);
            Ok(())
        } else if self.blocks_per_page > 1 {
            self.install_blocks(index, slot, word, part, stock)
        } else {
            Ok(())
        }
    }

    /// As [`Newest::install`], where there is something of the page already, block by block.
    fn install_blocks(
        &self,
        index: &Index,
        slot: PageSlot,
        word: &AtomicU64,
        part: &PagePart,
        stock: &mut LineStock,
    ) -> Result<(), IndexFull> {
        let Some(blocks) = &self.blocks else {
            unreachable!("INV-INDEX-3: a page of one block is never split")
        };
        let line = blocks.line(slot.bucket() * BUCKET_WORDS + slot.number());
        let stored = word.load(Ordering::Relaxed);
        if stored & BY_BLOCK == 0 {
            let known = index.blocks_of(slot);
            for (seq, map) in line.iter().zip(&known) {
                let is_absent = *map == BlockMap::Absent;
                seq.store(if is_absent { 0 } else { stored }, Ordering::Relaxed);
            }
            word.store(BY_BLOCK, Ordering::Relaxed);
        }
        let seqs = &line[part.first as usize..][..part.len_blocks as usize];
        let is_older = |seq: &AtomicU64| !is_later(seq.load(Ordering::Relaxed), part.seq);
        if let [seq] = seqs {
            // Most parts are one block.
            if is_older(seq) {
                self.install_run(index, slot, part, 0, seqs, stock)?;
            }
            return Ok(());
        }
        let mut begun = 0;
        // Runs of blocks of which nothing newer is known.
        while let Some(older) = seqs[begun..].iter().position(is_older) {
            let start = begun + older;
            let newer = seqs[start..].iter().position(|seq| !is_older(seq));
            let end = newer.map_or(seqs.len(), |newer| start + newer);
            self.install_run(index, slot, part, start, &seqs[start..end], stock)?;
            begun = end;
        }
        Ok(())
    }

    /// Lets a key take effect on those blocks of a part whose `seqs` these are, the first of which lies `skipped`
    /// behind that of the part.
    #[inline]
    fn install_run(
        &self,
        index: &Index,
        slot: PageSlot,
        part: &PagePart,
        skipped: usize,
        seqs: &[AtomicU64],
        stock: &mut LineStock,
    ) -> Result<(), IndexFull> {
        // Of 8 blocks at the most.
        let (skipped, len_blocks) = (skipped as u32, seqs.len() as u32);
        let first = part.first + skipped;
        let splits = len_blocks < self.blocks_per_page
            && index.needs_line(slot, first, len_blocks, EarlierParts::No);
        if splits && !index.stock_line(stock) {
            return Err(IndexFull);
        }
        let target = behind(part.target, skipped);
        index.publish(slot, first, len_blocks, target, stock);
        index.clear_stock(stock);
        for seq in seqs {
            seq.store(part.seq.0, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Of the block that lies `blocks` behind the first one.
fn behind(target: Target, blocks: u32) -> Target {
    match target {
        Target::Mapped(place) => Target::Mapped(Place(place.0 + u64::from(blocks))),
        Target::Zero(place) => Target::Zero(place),
    }
}

/// Whether what is there came from a later key.
#[inline]
fn is_later(stored: u64, seq: Seq) -> bool {
    stored > seq.0 && !canary::is(Canary::RecoveredInSegmentOrder)
}
