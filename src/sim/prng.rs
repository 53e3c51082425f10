//! Pseudo-random numbers that depend on the seed alone, whatever the version of any library; or the numbers
//! that a fuzzer's input spells out, so that whatever is drawn from a seed can be steered by a fuzzer too.

#[derive(Clone, Debug)]
enum Source {
    /// A SplitMix64 generator.
    Seed(u64),
    /// What is left of an input; zeroes follow.
    Input(std::vec::IntoIter<u8>),
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Prng {
    source: Source,
}

impl Prng {
    /// The generator of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let source = Source::Seed(mix(seed, 0x5eed));
        Self { source }
    }

    /// The numbers of an input. Each takes as few bytes as its bound allows, so that a change of one byte
    /// changes one number.
    #[must_use]
    pub fn from_input(input: &[u8]) -> Self {
        let source = Source::Input(Vec::from(input).into_iter());
        Self { source }
    }

    /// Whether only zeroes are left of an input. A seed never ends.
    #[must_use]
    pub fn is_at_end(&self) -> bool {
        matches!(&self.source, Source::Input(left) if left.len() == 0)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        match &mut self.source {
            Source::Seed(state) => {
                *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                mix(*state, 0)
            }
            Source::Input(left) => little_endian(left, 8),
        }
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        if let Source::Input(left) = &mut self.source {
            let bits = 64 - (bound - 1).leading_zeros();
            return little_endian(left, bits.div_ceil(8)) % bound;
        }
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }

    /// As [`Prng::below`], for an index.
    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True in so many cases of a hundred.
    pub fn percent(&mut self, percent: u8) -> bool {
        self.below(100) < u64::from(percent)
    }

    /// One of the items.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.index(items.len())]
    }

    /// A generator whose numbers have nothing to do with those still to come from this one.
    #[must_use]
    pub fn fork(&mut self) -> Self {
        Self::new(self.next_u64())
    }
}

fn little_endian(bytes: &mut std::vec::IntoIter<u8>, count: u32) -> u64 {
    (0..count).fold(0, |number, at| {
        number | u64::from(bytes.next().unwrap_or(0)) << (8 * at)
    })
}

/// Mixes two numbers into one (the finaliser of SplitMix64).
#[must_use]
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z = a ^ b.wrapping_mul(0xd6e8_feb8_6659_fd93);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_always_gives_the_same_numbers() {
        let mut prng = Prng::new(7);
        let first: Vec<u64> = (0..4).map(|_| prng.below(1000)).collect();
        let mut again = Prng::new(7);
        assert_eq!(first, (0..4).map(|_| again.below(1000)).collect::<Vec<_>>());
        assert_ne!(Prng::new(8).next_u64(), Prng::new(7).next_u64());
    }

    #[test]
    fn an_input_spells_out_the_numbers_and_ends_in_zeroes() {
        let mut prng = Prng::from_input(&[7, 0x34, 0x12, 9, 250]);
        assert_eq!(prng.below(1), 0);
        assert_eq!(prng.below(8), 7);
        assert_eq!(prng.below(0x10000), 0x1234);
        assert!(!prng.is_at_end());
        assert_eq!(prng.below(u64::MAX), 250 << 8 | 9);
        assert!(prng.is_at_end());
        assert_eq!((prng.below(3), prng.next_u64()), (0, 0));
        assert!(!Prng::new(0).is_at_end());
    }

    #[test]
    fn numbers_stay_in_their_bounds() {
        let mut prng = Prng::new(1);
        for bound in 1..200 {
            assert!(prng.below(bound) < bound);
            assert!((3..=7).contains(&prng.between(3, 7)));
        }
    }
}
