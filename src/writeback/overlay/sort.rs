//! The keys of an overlay are put in order of address, and of those with the same start the newest is left.
//!
//! They are sorted by digits: a walk over all of them for each digit, which can be interrupted anywhere, and whose length does
//! not depend on what the keys are. What is moved are items of 8 bytes, the bits by which keys are told apart and the number of
//! the key: many thousands of keys do not fit into the CPU's first cache, and each is moved once, to its place at the end
//! (docs/adr/0012-pacing.md).

use super::{Laid, end};
use crate::memory::{self, NoMemory};
use std::mem;

/// Bits of the address in an item.
const ADDRESS_BITS: u32 = u32::BITS;
/// Digits have at most so many bits: their counts stay in the CPU's first cache.
const DIGIT_BITS_MAX: u32 = 11;
const DIGIT_VALUES: usize = 1 << DIGIT_BITS_MAX;
const DIGITS_MAX: usize = ADDRESS_BITS.div_ceil(DIGIT_BITS_MAX) as usize;
/// So few keys are sorted in one go. In simulations batches are small, and are to be sorted as large ones are.
const SMALL_COUNT: usize = if cfg!(feature = "sim") { 4 } else { 256 };

/// Some bits of where a key starts, above the number of the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Item(u64);

impl Item {
    /// An overlay has far fewer keys than 2^32.
    fn new(number: usize) -> Self {
        Self(number as u64)
    }

    fn number(self) -> usize {
        self.0 as u32 as usize
    }

    /// With the bits of its address from `shift` on.
    fn with_address(self, keys: &[Laid], shift: u32) -> Self {
        let address = keys[self.number()].lba.0 >> shift;
        Self(address << ADDRESS_BITS | self.number() as u64)
    }
}

/// Where a digit lies in an item.
#[derive(Clone, Copy, Debug)]
struct Digit {
    shift: u32,
    mask: u64,
}

impl Digit {
    #[inline]
    fn of(self, item: Item) -> usize {
        // The second one tells that it is not out of bounds.
        (item.0 >> self.shift & self.mask) as usize & (DIGIT_VALUES - 1)
    }
}

/// How far the keys are.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The items are in order of the bits of their keys below `shift`. Those up to `at` have the bits above, whose
    /// digits are counted.
    Packing { shift: u32, at: usize },
    /// The items are in order of the digits before this one. Those up to `at` have been moved to where it says.
    Moving { shift: u32, digit: usize, at: usize },
    /// The items are in order. Of the keys of those up to `at` the ones that are left have been put together.
    Pruning { at: usize },
    /// That is all.
    Done,
}

/// What sorting takes besides the keys. Has its memory from the start (INV-WB-8).
#[derive(Debug)]
pub(in super::super) struct Sorter {
    step: Step,
    items: Vec<Item>,
    /// What moving moves them to: at least as long then.
    moved: Vec<Item>,
    /// For each digit, and each value of it: how often it occurs, then where the next item with it goes.
    places: Box<[[u32; DIGIT_VALUES]; DIGITS_MAX]>,
    digits: [Digit; DIGITS_MAX],
    digit_count: usize,
    /// Bits in which the addresses of the keys differ.
    varying: u64,
    pub(super) sorted: Vec<Laid>,
}

impl Sorter {
    /// For overlays with room for so many keys.
    pub(in super::super) fn new(key_count: usize) -> Result<Self, NoMemory> {
        let what = "the sorting of the keys of write-back";
        let digit = Digit { shift: 0, mask: 0 };
        Ok(Self {
            step: Step::Done,
            items: memory::with_room(what, key_count)?,
            moved: memory::with_room(what, key_count)?,
            places: Box::new([[0; DIGIT_VALUES]; DIGITS_MAX]),
            digits: [digit; DIGITS_MAX],
            digit_count: 0,
            varying: 0,
            sorted: memory::with_room(what, key_count)?,
        })
    }

    /// Begins with keys whose addresses differ in bits that are `varying`.
    pub(super) fn begin(&mut self, keys: &[Laid], varying: u64) {
        self.items.clear();
        self.sorted.clear();
        // If they do in none, they are put in order of any.
        self.varying = varying.max(1);
        if keys.len() > SMALL_COUNT {
            self.begin_group(self.varying.trailing_zeros());
            return;
        }
        self.items.extend((0..keys.len()).map(Item::new));
        let order = |item: &Item| (keys[item.number()].lba, item.number());
        self.items.sort_unstable_by_key(order);
        self.step = Step::Pruning { at: 0 };
    }

    /// Goes on, by at most about `steps` keys. `true`: they are sorted, and those that are left are in `sorted`.
    pub(super) fn go_on(&mut self, keys: &[Laid], steps: usize) -> bool {
        let mut left = steps;
        loop {
            match self.step {
                Step::Done => return true,
                _ if left == 0 => return false,
                Step::Packing { shift, at } => self.pack(keys, shift, at, &mut left),
                Step::Moving { shift, digit, at } => self.move_items(shift, digit, at, &mut left),
                Step::Pruning { at } => self.prune(keys, at, &mut left),
            }
        }
    }

    /// Begins with as many bits as an item has room for.
    fn begin_group(&mut self, shift: u32) {
        let bits = u64::BITS - self.varying.unbounded_shr(shift).leading_zeros();
        if bits == 0 {
            self.step = Step::Pruning { at: 0 };
            return;
        }
        // As few digits as there can be, of equal width.
        let bits = bits.min(ADDRESS_BITS);
        let count = bits.div_ceil(DIGIT_BITS_MAX);
        let width = bits.div_ceil(count);
        self.digit_count = count as usize;
        for (number, digit) in (0..count).zip(&mut self.digits) {
            *digit = Digit {
                shift: ADDRESS_BITS + number * width,
                mask: (1 << width) - 1,
            };
            self.places[number as usize][..1 << width].fill(0);
        }
        self.step = Step::Packing { shift, at: 0 };
    }

    fn pack(&mut self, keys: &[Laid], shift: u32, at: usize, left: &mut usize) {
        let end = keys.len().min(at + *left);
        // The first time they are in the order of the keys.
        let added = self.items.len()..end;
        self.items.extend(added.map(Item::new));
        if self.moved.len() < end {
            let more = &self.items[self.moved.len()..end];
            self.moved.extend_from_slice(more);
        }
        let digits = &self.digits[..self.digit_count];
        for item in &mut self.items[at..end] {
            *item = item.with_address(keys, shift);
            for (places, digit) in self.places.iter_mut().zip(digits) {
                places[digit.of(*item)] += 1;
            }
        }
        *left -= end - at;
        if end < keys.len() {
            self.step = Step::Packing { shift, at: end };
            return;
        }
        for (places, digit) in self.places.iter_mut().zip(digits) {
            let mut place = 0;
            for count in &mut places[..=digit.mask as usize] {
                place += mem::replace(count, place);
            }
        }
        // That took as long as some hundreds of keys.
        *left = 0;
        self.step = Step::Moving {
            shift,
            digit: 0,
            at: 0,
        };
    }

    fn move_items(&mut self, shift: u32, number: usize, at: usize, left: &mut usize) {
        let end = self.items.len().min(at + *left);
        let (digit, places) = (self.digits[number], &mut self.places[number]);
        for item in &self.items[at..end] {
            let place = &mut places[digit.of(*item)];
            self.moved[*place as usize] = *item;
            *place += 1;
        }
        *left -= end - at;
        if end < self.items.len() {
            self.step = Step::Moving {
                shift,
                digit: number,
                at: end,
            };
            return;
        }
        let count = self.items.len();
        mem::swap(&mut self.items, &mut self.moved);
        self.items.truncate(count);
        if number + 1 == self.digit_count {
            self.begin_group(shift + ADDRESS_BITS);
        } else {
            self.step = Step::Moving {
                shift,
                digit: number + 1,
                at: 0,
            };
        }
    }

    /// Leaves out what a newer key with the same start covers (INV-WB-4): a block may have been overwritten any number of times.
    fn prune(&mut self, keys: &[Laid], at: usize, left: &mut usize) {
        let to = self.items.len().min(at + *left);
        for item in &self.items[at..to] {
            let key = &keys[item.number()];
            let covers = |older: &Laid| older.lba == key.lba && end(older) <= end(key);
            while self.sorted.last().is_some_and(covers) {
                self.sorted.pop();
            }
            self.sorted.push(*key);
        }
        *left -= to - at;
        self.step = if to < self.items.len() {
            Step::Pruning { at: to }
        } else {
            Step::Done
        };
    }
}
