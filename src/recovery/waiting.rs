//! Parts of pages that wait to be put into the index, sorted by the range of it that they belong to: what is
//! installed together then touches little memory, which the processor keeps near.

use crate::index::{Index, Newest, PagePart, RangeId, Target};
use crate::media::Place;
use crate::memory::{self, NoMemory};
use crate::units::{Page, Seq};
use zerocopy::FromZeros;

/// For so many parts there is room in each range, for each of its buckets: they share what is fetched for them.
const PARTS_PER_BUCKET: usize = 4;
/// And for no fewer, nor more, than so many.
const PARTS_MIN: usize = 16;
const PARTS_MAX: usize = 4096;

/// So many ranges lie between those with which two workers begin.
const WORKER_DISTANCE: usize = 19;

/// A part of a page.
#[derive(Clone, Copy, Debug, FromZeros)]
#[repr(C)]
struct WaitingPart {
    /// Page (48 bits), number of the first block (3), one less than how many there are (3), whether they are zeroes.
    what: u64,
    place: u64,
    seq: u64,
}

const FIRST_SHIFT: u32 = 48;
const LEN_SHIFT: u32 = 51;
const ZERO_SHIFT: u32 = 54;
const BLOCK_MASK: u64 = 7;

impl WaitingPart {
    fn pack(page: Page, part: &PagePart) -> Self {
        debug_assert!(page.0 >> FIRST_SHIFT == 0, "pages have 48 bits");
        let (place, is_zero) = match part.target {
            Target::Mapped(place) => (place, 0),
            Target::Zero(place) => (place, 1),
        };
        let (first, len) = (u64::from(part.first), u64::from(part.len_blocks));
        Self {
            what: page.0 | first << FIRST_SHIFT | (len - 1) << LEN_SHIFT | is_zero << ZERO_SHIFT,
            place: place.0,
            seq: part.seq.0,
        }
    }

    fn unpack(&self, index: &Index) -> PagePart {
        let place = Place(self.place);
        PagePart {
            at: index.locate(Page(self.what & ((1 << FIRST_SHIFT) - 1))),
            first: (self.what >> FIRST_SHIFT & BLOCK_MASK) as u32,
            len_blocks: (self.what >> LEN_SHIFT & BLOCK_MASK) as u32 + 1,
            target: match self.what >> ZERO_SHIFT {
                0 => Target::Mapped(place),
                _ => Target::Zero(place),
            },
            seq: Seq(self.seq),
        }
    }
}

/// See the module. One worker's. How much memory it takes depends on the size of the index, up to some MiB, and of
/// that only is touched what is needed.
#[derive(Debug)]
pub(super) struct WaitingParts {
    /// So many for each range.
    capacity: usize,
    parts: Vec<WaitingPart>,
    counts: Vec<u32>,
    total: usize,
}

impl WaitingParts {
    pub(super) fn new(newest: &Newest) -> Result<Self, NoMemory> {
        let ranges = newest.range_count();
        let capacity = (newest.buckets_per_range() * PARTS_PER_BUCKET).clamp(PARTS_MIN, PARTS_MAX);
        Ok(Self {
            capacity,
            parts: memory::zeroed("a worker of recovery", ranges * capacity)?,
            counts: vec![0; ranges],
            total: 0,
        })
    }

    /// Adds a part of a page, of a range that is not full. Whether it is now.
    #[inline]
    pub(super) fn push(&mut self, range: RangeId, page: Page, part: &PagePart) -> bool {
        let count = &mut self.counts[range.index()];
        self.parts[range.index() * self.capacity + *count as usize] = WaitingPart::pack(page, part);
        *count += 1;
        self.total += 1;
        *count as usize == self.capacity
    }

    /// How many wait for a range.
    pub(super) fn count(&self, range: RangeId) -> usize {
        self.counts[range.index()] as usize
    }

    /// That which waits for a range.
    #[inline]
    pub(super) fn get(&self, range: RangeId, number: usize, index: &Index) -> PagePart {
        self.parts[range.index() * self.capacity + number].unpack(index)
    }

    /// All of a range are where they should be.
    pub(super) fn clear(&mut self, range: RangeId) {
        self.total -= self.count(range);
        self.counts[range.index()] = 0;
    }

    /// A range for which anything waits: each worker begins at another one.
    pub(super) fn next_range(&self, worker: u16) -> Option<RangeId> {
        if self.total == 0 {
            return None;
        }
        let ranges = self.counts.len();
        let start = usize::from(worker) * WORKER_DISTANCE;
        let mut numbers = (0..ranges).map(|step| (start + step) % ranges);
        numbers
            .find(|number| self.counts[*number] > 0)
            .map(RangeId::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::Geometry;

    #[test]
    fn a_part_comes_out_of_its_range_as_it_went_in() {
        let geometry = Geometry::plan(64 << 20, 1 << 20, 512).unwrap();
        let index = Index::new(geometry, 1 << 20, 1).unwrap();
        let newest = Newest::new(&index).unwrap();
        let mut waiting = WaitingParts::new(&newest).unwrap();
        assert!(newest.range_count() > 1);
        assert_eq!(waiting.next_range(7), None);
        let mut pushed = Vec::new();
        let targets = [
            Target::Mapped(Place(3)),
            Target::Zero(Place(0)),
            Target::Mapped(Place((1 << 40) + 5)),
        ];
        for (number, page) in (0..).zip([0, 1, 77, 4095, (1 << 20) - 1, (1 << 48) - 1]) {
            for (first, len_blocks) in [(0, 8), (7, 1), (2, 5)] {
                let part = PagePart {
                    at: index.locate(Page(page)),
                    first,
                    len_blocks,
                    target: targets[(number + len_blocks as usize) % 3],
                    seq: Seq((1 << 62) - page),
                };
                let range = newest.range_of(part.at);
                assert!(!waiting.push(range, Page(page), &part), "there is room");
                pushed.push((range, part));
            }
        }
        while let Some(range) = waiting.next_range(3) {
            let parts = (0..waiting.count(range)).map(|number| waiting.get(range, number, &index));
            let expected = pushed.iter().filter(|(of, _)| *of == range);
            // In their order, which counts for keys of one kset.
            assert_eq!(
                parts.map(|part| format!("{part:?}")).collect::<Vec<_>>(),
                expected
                    .map(|(_, part)| format!("{part:?}"))
                    .collect::<Vec<_>>()
            );
            waiting.clear(range);
            pushed.retain(|(of, _)| *of != range);
        }
        assert!(pushed.is_empty(), "{pushed:?}");
    }

    #[test]
    fn a_range_is_full_after_as_many_parts_as_it_has_room_for() {
        let geometry = Geometry::plan(1 << 20, 16 << 10, 4096).unwrap();
        let index = Index::new(geometry, 1 << 10, 1).unwrap();
        let newest = Newest::new(&index).unwrap();
        let mut waiting = WaitingParts::new(&newest).unwrap();
        let part = PagePart {
            at: index.locate(Page(9)),
            first: 0,
            len_blocks: 1,
            target: Target::Mapped(Place(1)),
            seq: Seq(1),
        };
        let range = newest.range_of(part.at);
        let pushes = (1..).find(|_| waiting.push(range, Page(9), &part));
        assert_eq!(pushes, Some(waiting.capacity));
        assert_eq!(waiting.count(range), waiting.capacity);
    }
}
