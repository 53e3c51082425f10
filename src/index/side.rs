//! The side table: a line, of one word for each block, for every page whose blocks lie at several places.
//!
//! Lines are handed out one by one, those given back before those never used: only so many are ever touched as
//! were in use at once. Those given back are a stack, linked through their first words.

use super::map::{BlockMap, Blocks, PAGE_BLOCKS_MAX, Run};
use crate::media::Place;
use crate::memory::NoMemory;
use crate::pmem::Lines;
use crate::sched;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Lines are numbered by 32 bits, from 1 where 0 is none.
const LINE_COUNT_MAX: u64 = u32::MAX as u64;
/// How often a core looks for a line that was given back when others do so too.
const TAKE_TRIES: usize = 64;

/// Bits of a place, plus one, that a narrow word holds beside the one for zeroes.
const NARROW_PLACE_BITS: u32 = 31;
const NARROW_ZERO: u32 = 1 << NARROW_PLACE_BITS;
const WIDE_ZERO: u64 = 1 << 63;

/// A word is 0 for a block that is absent, else a place plus one, and a bit that says whether it means zeroes.
#[derive(Debug)]
enum Words {
    /// Lines of 32 bytes.
    Narrow(Lines<AtomicU32>),
    /// Lines of 64 bytes, where places are too large for that.
    Wide(Lines<AtomicU64>),
}

/// A word of a line, whatever its width.
trait SideWord {
    /// With the bit for zeroes where it is in wide ones.
    fn get(&self) -> u64;
    /// Takes what `get` gives.
    fn put(&self, word: u64);
}

impl SideWord for AtomicU32 {
    #[inline]
    fn get(&self) -> u64 {
        let word = self.load(Ordering::Acquire);
        let zero = if word & NARROW_ZERO != 0 {
            WIDE_ZERO
        } else {
            0
        };
        u64::from(word & !NARROW_ZERO) | zero
    }

    #[inline]
    fn put(&self, word: u64) {
        let zero = if word & WIDE_ZERO != 0 {
            NARROW_ZERO
        } else {
            0
        };
        // Places fit, or the words would be wide.
        self.store(word as u32 | zero, Ordering::Release);
    }
}

impl SideWord for AtomicU64 {
    #[inline]
    fn get(&self) -> u64 {
        self.load(Ordering::Acquire)
    }

    #[inline]
    fn put(&self, word: u64) {
        self.store(word, Ordering::Release);
    }
}

#[inline]
fn encode(map: BlockMap) -> u64 {
    match map {
        BlockMap::Absent => 0,
        BlockMap::Mapped(Place(place)) => place + 1,
        BlockMap::Zero(Place(place)) => (place + 1) | WIDE_ZERO,
    }
}

#[inline]
fn decode(word: u64) -> BlockMap {
    match ((word & !WIDE_ZERO).checked_sub(1), word & WIDE_ZERO != 0) {
        (None, _) => BlockMap::Absent,
        (Some(place), false) => BlockMap::Mapped(Place(place)),
        (Some(place), true) => BlockMap::Zero(Place(place)),
    }
}

/// See [`SideTable::write_beside_others`].
#[inline]
fn write_beside_others<T: SideWord>(words: &[T; PAGE_BLOCKS_MAX], run: &Run) -> bool {
    let (start, end) = (run.first as usize, (run.first + run.len_blocks) as usize);
    let first = encode(run.map);
    // What the word of a block is if the page is one run, with this one in it.
    let step = u64::from(first & WIDE_ZERO == 0);
    let in_line = |block: usize| {
        first.wrapping_add((block as u64).wrapping_sub(start as u64).wrapping_mul(step))
    };
    let differs = |block: usize| {
        let word = words[block].get();
        word != 0 && word != in_line(block)
    };
    let stays = (0..start).any(differs) || (end..words.len()).any(differs);
    if stays {
        (start..end).for_each(|block| words[block].put(in_line(block)));
    }
    stays
}

/// See the module.
#[derive(Debug)]
pub(super) struct SideTable {
    words: Words,
    line_count: u64,
    /// The first line that was never used. May pass the last by as many as there are cores.
    fresh: AtomicU64,
    /// The line that was given back last, plus one, in the lower half; above it how often this has changed, so
    /// that a core that was away for long does not take an old value for the present one.
    returned: AtomicU64,
}

impl SideTable {
    /// `line_count` lines or a little fewer, for places of `place_bits` bits.
    pub(super) fn new(line_count: u64, place_bits: u32) -> Result<Self, NoMemory> {
        let line_count = line_count.min(LINE_COUNT_MAX);
        let lines = usize::try_from(line_count).unwrap_or(usize::MAX);
        let what = "the parts of pages in the index";
        Ok(Self {
            words: if place_bits <= NARROW_PLACE_BITS {
                Words::Narrow(Lines::new(what, lines)?)
            } else {
                Words::Wide(Lines::new(what, lines)?)
            },
            line_count,
            fresh: AtomicU64::new(0),
            returned: AtomicU64::new(0),
        })
    }

    /// DRAM that was ever used, in bytes.
    pub(super) fn used_bytes(&self) -> u64 {
        let line_bytes = match self.words {
            Words::Narrow(_) => 32,
            Words::Wide(_) => 64,
        };
        self.used_count() * line_bytes
    }

    /// Lines that were ever used.
    pub(super) fn used_count(&self) -> u64 {
        self.fresh.load(Ordering::Relaxed).min(self.line_count)
    }

    /// Asks for a line to be brought into the cache.
    #[inline]
    pub(super) fn prefetch(&self, line: u32) {
        match &self.words {
            Words::Narrow(lines) => crate::pmem::prefetch_line(&lines.line(line as usize)[0]),
            Words::Wide(lines) => crate::pmem::prefetch_line(&lines.line(line as usize)[0]),
        }
    }

    /// What a line says. It may be another page's meanwhile: the reader then finds its slot changed.
    pub(super) fn read(&self, line: u32) -> Blocks {
        match &self.words {
            Words::Narrow(lines) => lines
                .line(line as usize)
                .each_ref()
                .map(|w| decode(w.get())),
            Words::Wide(lines) => lines
                .line(line as usize)
                .each_ref()
                .map(|w| decode(w.get())),
        }
    }

    /// Says something of each block.
    pub(super) fn write_all(&self, line: u32, blocks: &Blocks) {
        for (block, map) in blocks.iter().enumerate() {
            self.write(line, block, *map);
        }
    }

    /// Says something of one block.
    pub(super) fn write(&self, line: u32, block: usize, map: BlockMap) {
        match &self.words {
            Words::Narrow(lines) => lines.line(line as usize)[block].put(encode(map)),
            Words::Wide(lines) => lines.line(line as usize)[block].put(encode(map)),
        }
    }

    /// Lays a run over what a line says, if it is plain at once that the page takes a line then too. `false`: it may
    /// not, and nothing was done.
    #[inline]
    pub(super) fn write_beside_others(&self, line: u32, run: &Run) -> bool {
        match &self.words {
            Words::Narrow(lines) => write_beside_others(lines.line(line as usize), run),
            Words::Wide(lines) => write_beside_others(lines.line(line as usize), run),
        }
    }

    /// The line below one that was given back, plus one; 0: there is none. Who has seen the line on top of the stack
    /// sees its link.
    fn link(&self, line: u32) -> u32 {
        match &self.words {
            Words::Narrow(lines) => lines.line(line as usize)[0].load(Ordering::Relaxed),
            // A link has 32 bits; what was a place a moment ago is not used.
            Words::Wide(lines) => lines.line(line as usize)[0].load(Ordering::Relaxed) as u32,
        }
    }

    /// With Release, like all words of a line: a reader who takes a link for a place finds the slot changed, which
    /// was before.
    fn set_link(&self, line: u32, below: u32) {
        match &self.words {
            Words::Narrow(lines) => lines.line(line as usize)[0].store(below, Ordering::Release),
            Words::Wide(lines) => {
                lines.line(line as usize)[0].store(u64::from(below), Ordering::Release);
            }
        }
    }

    /// A line that is the caller's alone; `None`: all are in use.
    pub(super) fn take(&self) -> Option<u32> {
        let mut head = self.returned.load(Ordering::Acquire);
        for _ in 0..TAKE_TRIES {
            let Some(line) = (head as u32).checked_sub(1) else {
                break;
            };
            // Of another life, if somebody else was faster; then the exchange fails.
            let below = self.link(line);
            sched::point();
            match self.returned.compare_exchange_weak(
                head,
                next_head(head, below),
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Some(line),
                Err(now) => head = now,
            }
        }
        if self.fresh.load(Ordering::Relaxed) >= self.line_count {
            return None;
        }
        let line = self.fresh.fetch_add(1, Ordering::Relaxed);
        (line < self.line_count).then_some(line as u32)
    }

    /// Takes lines back. No slot names them any more.
    pub(super) fn give_back(&self, lines: &[u32]) {
        let (Some(bottom), Some(top)) = (lines.first(), lines.last()) else {
            return;
        };
        for pair in lines.windows(2) {
            self.set_link(pair[1], pair[0] + 1);
        }
        let mut head = self.returned.load(Ordering::Acquire);
        // Each time that this is repeated, another core has got on with its work.
        loop {
            self.set_link(*bottom, head as u32);
            sched::point();
            match self.returned.compare_exchange_weak(
                head,
                next_head(head, *top + 1),
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// The lines that were given back and not taken again. While nobody does either.
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn returned_lines(&self) -> impl Iterator<Item = u32> {
        let top = self.returned.load(Ordering::Acquire) as u32;
        std::iter::successors(top.checked_sub(1), |line| self.link(*line).checked_sub(1))
            .take(self.line_count as usize + 1)
    }
}

/// The head of the stack when `line`, plus one, is on top, after `head`.
fn next_head(head: u64, line: u32) -> u64 {
    (head >> 32).wrapping_add(1) << 32 | u64::from(line)
}

/// Lines taken before they are needed, so that publishing cannot fail; and those that publishing has set free.
/// One batch's; empty between batches.
#[derive(Debug)]
pub(crate) struct LineStock {
    spare: Vec<u32>,
    /// Not used again before the batch has ended: while somebody holds the claim of a page, none of its slots
    /// names a line that one named before (INV-INDEX-9).
    freed: Vec<u32>,
}

impl LineStock {
    /// Empty, for `parts` parts of pages in a batch. Allocates here alone.
    pub(crate) fn new(parts: usize) -> Self {
        Self {
            spare: Vec::with_capacity(parts),
            freed: Vec::with_capacity(parts),
        }
    }

    /// Lines that are there to be used.
    pub(crate) fn spare_count(&self) -> usize {
        self.spare.len()
    }

    /// Their numbers.
    #[cfg(test)]
    pub(super) fn spare_lines(&self) -> impl Iterator<Item = u32> {
        self.spare.iter().copied()
    }

    pub(super) fn put(&mut self, line: u32) {
        self.spare.push(line);
    }

    pub(super) fn take(&mut self) -> Option<u32> {
        self.spare.pop()
    }

    pub(super) fn set_free(&mut self, line: u32) {
        self.freed.push(line);
    }

    /// Gives up all but the first `keep` of the spare lines.
    pub(super) fn cut(&mut self, keep: usize, side: &SideTable) {
        side.give_back(&self.spare[keep..]);
        self.spare.truncate(keep);
    }

    /// Gives up everything.
    pub(super) fn clear(&mut self, side: &SideTable) {
        self.cut(0, side);
        side.give_back(&self.freed);
        self.freed.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.spare.is_empty() && self.freed.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::map::Shape;
    use crate::sim::prng::Prng;

    /// Few places, so that runs come about; what follows a block, too.
    fn draw(prng: &mut Prng, before: BlockMap) -> BlockMap {
        let place = Place(prng.below(2) * 100);
        prng.pick(&[
            BlockMap::Absent,
            BlockMap::Mapped(place),
            BlockMap::Zero(place),
            before.behind(1),
            before.behind(1),
            before.behind(1),
        ])
    }

    #[test]
    fn a_run_beside_others_is_written_at_once_and_no_other() {
        let mut written = [0; 2];
        for (seed, place_bits) in (0..20_000).zip([30, 40].into_iter().cycle()) {
            let mut prng = Prng::new(seed);
            let side = SideTable::new(1, place_bits).unwrap();
            let mut before = [BlockMap::Absent; PAGE_BLOCKS_MAX];
            let mut last = BlockMap::Absent;
            for block in &mut before {
                last = draw(&mut prng, last);
                *block = last;
            }
            let first = prng.below(8) as u32;
            let run = Run {
                first,
                len_blocks: prng.between(1, u64::from(8 - first)) as u32,
                map: match before[first as usize] {
                    // What makes one run of them, sometimes.
                    BlockMap::Absent => BlockMap::Mapped(Place(u64::from(first))),
                    map => map,
                },
            };
            side.write_all(0, &before);
            let mut after = before;
            run.lay_over(&mut after);
            let done = side.write_beside_others(0, &run);
            written[usize::from(done)] += 1;
            let shape = Shape::of(&after);
            assert!(!done || shape == Shape::Runs, "{before:?} and {run:?}");
            assert_eq!(side.read(0), if done { after } else { before }, "{run:?}");
        }
        assert!(written.iter().all(|count| *count > 1000), "{written:?}");
    }
}
