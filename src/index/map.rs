//! What is known of pages and blocks.

use crate::canary::{self, Canary};
use crate::media::Place;

/// Blocks in a page, at most.
pub(crate) const PAGE_BLOCKS_MAX: usize = 8;

/// What is known of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockMap {
    /// Not cached.
    Absent,
    /// Lies here.
    Mapped(Place),
    /// Zeroes; the key that says so lies in the segment of this place.
    Zero(Place),
}

impl BlockMap {
    /// Of the block that lies `blocks` behind this one in a run.
    pub(crate) fn behind(self, blocks: u32) -> Self {
        match self {
            BlockMap::Mapped(place) => BlockMap::Mapped(Place(place.0 + u64::from(blocks))),
            map => map,
        }
    }
}

/// What a page, or a part of one, is set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The first block of the range lies here, the others behind it.
    Mapped(Place),
    /// Zeroes, by a key in the segment of this place.
    Zero(Place),
}

impl Target {
    /// Where the first block lies, or the segment whose key says that it is zeroes.
    pub(crate) fn place(self) -> Place {
        match self {
            Target::Mapped(place) | Target::Zero(place) => place,
        }
    }
}

impl From<Target> for BlockMap {
    fn from(target: Target) -> Self {
        match target {
            Target::Mapped(place) => BlockMap::Mapped(place),
            Target::Zero(place) => BlockMap::Zero(place),
        }
    }
}

/// Of each block of a page; those behind the last are absent.
pub(crate) type Blocks = [BlockMap; PAGE_BLOCKS_MAX];

/// What is known of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageMap {
    /// The same for all blocks; places count up from the first one.
    Whole(BlockMap),
    /// Block by block.
    Blocks(Blocks),
}

impl PageMap {
    /// What is known of block number `block` of the page.
    pub(crate) fn block(&self, block: u32) -> BlockMap {
        match self {
            PageMap::Whole(map) => map.behind(block),
            PageMap::Blocks(blocks) => blocks[block as usize],
        }
    }

    /// Whether any of so many blocks lies where `wanted` says, or is zeroes by a key there.
    pub(super) fn any(&self, len_blocks: u32, wanted: impl Fn(Place) -> bool) -> bool {
        (0..len_blocks).any(|block| match self.block(block) {
            BlockMap::Mapped(place) | BlockMap::Zero(place) => wanted(place),
            BlockMap::Absent => false,
        })
    }
}

/// Neighbouring blocks of a page, at one place or all zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: u32,
    /// Not 0.
    pub(super) len_blocks: u32,
    /// Of the first block.
    pub(super) map: BlockMap,
}

impl Run {
    /// Lays the run over what is known of a page.
    pub(super) fn lay_over(&self, blocks: &mut Blocks) {
        for number in 0..self.len_blocks {
            blocks[(self.first + number) as usize] = self.map.behind(number);
        }
    }

    /// A page with nothing but this run in it.
    pub(super) fn alone(&self) -> Blocks {
        let mut blocks = [BlockMap::Absent; PAGE_BLOCKS_MAX];
        if canary::is(Canary::RunTakenForPage) {
            return std::array::from_fn(|number| self.map.behind(number as u32));
        }
        self.lay_over(&mut blocks);
        blocks
    }

    /// Where the first block lies, or the segment whose key says that it is zeroes.
    pub(super) fn place(&self) -> Place {
        match self.map {
            BlockMap::Mapped(place) | BlockMap::Zero(place) => place,
            BlockMap::Absent => unreachable!("a run lies somewhere"),
        }
    }

    pub(super) fn lies_within(&self, first: u32, len_blocks: u32) -> bool {
        first <= self.first && self.first + self.len_blocks <= first + len_blocks
    }
}

/// What a slot can say of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// Nothing is known.
    Absent,
    /// One run is all.
    Run(Run),
    /// There are several.
    Runs,
}

impl Shape {
    pub(super) fn of(blocks: &Blocks) -> Self {
        let Some(first) = blocks.iter().position(|map| *map != BlockMap::Absent) else {
            return Shape::Absent;
        };
        let map = blocks[first];
        let len = (0..)
            .zip(&blocks[first..])
            .take_while(|(number, block)| **block == map.behind(*number))
            .count();
        if blocks[first + len..]
            .iter()
            .any(|map| *map != BlockMap::Absent)
        {
            return Shape::Runs;
        }
        // 8 at the most.
        Shape::Run(Run {
            first: first as u32,
            len_blocks: len as u32,
            map,
        })
    }
}
