//! Which images of one moment are made: levels L1 to L4.

use crate::pmem::LINE_SIZE_BYTES;
use crate::sim::image::ImagePmem;
use crate::sim::pmem::{PendingWord, SimState, WORD_SIZE_BYTES};
use crate::sim::prng::{Prng, mix};

const WORDS_PER_LINE: u64 = LINE_SIZE_BYTES / WORD_SIZE_BYTES as u64;

/// The choice of each pending word: 0 the durable value, `n` the version `n - 1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Image(Vec<u8>);

impl Image {
    /// Equal images have equal ones.
    pub(super) fn hash(&self) -> u64 {
        let choices = self.0.iter();
        choices.fold(self.0.len() as u64, |hash, choice| {
            mix(hash, u64::from(*choice))
        })
    }

    /// Makes a durable image this one.
    pub(super) fn apply(&self, words: &[PendingWord], image: &ImagePmem) {
        for (word, choice) in words.iter().zip(&self.0) {
            if let Some(version) = usize::from(*choice).checked_sub(1) {
                image.patch(word.off, &word.versions[version].bytes);
            }
        }
    }

    /// As [`Image::apply`], for plain bytes.
    pub(super) fn write(&self, words: &[PendingWord], image: &mut [u8]) {
        for (word, choice) in words.iter().zip(&self.0) {
            if let Some(version) = usize::from(*choice).checked_sub(1) {
                let at = word.off.0 as usize;
                image[at..at + WORD_SIZE_BYTES].copy_from_slice(&word.versions[version].bytes);
            }
        }
    }

    /// For a report: the words that survive, or those that do not if they are fewer.
    pub(super) fn describe(&self, words: &[PendingWord]) -> String {
        let kept = self.0.iter().filter(|choice| **choice > 0).count();
        let (title, wanted_kept) = if kept * 2 <= self.0.len() {
            ("kept", true)
        } else {
            ("lost", false)
        };
        let mut text = format!("{kept} of {} words kept; {title}:", self.0.len());
        let listed = words.iter().zip(&self.0);
        for (word, _) in listed
            .filter(|(_, choice)| (**choice > 0) == wanted_kept)
            .take(16)
        {
            text.push_str(&format!(" {:#x}", word.off.0));
        }
        text
    }
}

/// The words of one line.
#[derive(Clone, Debug)]
struct Line {
    /// Indices into the pending words.
    words: std::ops::Range<usize>,
}

/// The images of levels L1 to L3 of one moment, by number.
#[derive(Debug)]
pub(super) struct Images<'a> {
    words: &'a [PendingWord],
    lines: Vec<Line>,
}

impl<'a> Images<'a> {
    /// `words` are those of `state`.
    pub(super) fn new(
        state: &SimState,
        words: &'a [PendingWord],
        lines_max: usize,
        prng: &mut Prng,
    ) -> Self {
        debug_assert!(words.len() <= state.durable().len());
        let mut lines: Vec<Line> = Vec::new();
        let mut last = None;
        for (at, word) in words.iter().enumerate() {
            let line = word.off.0 / LINE_SIZE_BYTES;
            match lines.last_mut() {
                Some(open) if last == Some(line) => open.words.end = at + 1,
                _ => lines.push(Line { words: at..at + 1 }),
            }
            last = Some(line);
        }
        while lines.len() > lines_max {
            lines.swap_remove(prng.index(lines.len()));
        }
        Self { words, lines }
    }

    fn prefixes(&self) -> u64 {
        self.lines.len() as u64 * (WORDS_PER_LINE - 1)
    }

    fn pairs(&self) -> u64 {
        let lines = self.lines.len() as u64;
        lines * lines.saturating_sub(1) / 2
    }

    /// Number of the images of L1 to L3.
    pub(super) fn count(&self) -> u64 {
        2 + 2 * self.lines.len() as u64 + 2 * self.pairs() + 2 * self.prefixes()
    }

    /// The image of a number; from [`Images::count`] on, a random one (L4).
    pub(super) fn choose(&self, number: u64, prng: &mut Prng) -> Image {
        if number >= self.count() {
            return self.random(prng);
        }
        // Even numbers start with nothing, odd ones with everything.
        let all = !number.is_multiple_of(2);
        let mut image = if all { self.all() } else { self.nothing() };
        let Some(mut number) = (number / 2).checked_sub(1) else {
            return image; // L1
        };
        let lines = self.lines.len() as u64;
        if number < lines {
            self.turn(&mut image, number, WORDS_PER_LINE as usize, all); // L2, one line
            return image;
        }
        number -= lines;
        if number < self.pairs() {
            let (a, b) = pair(number);
            self.turn(&mut image, a, WORDS_PER_LINE as usize, all); // L2, two lines
            self.turn(&mut image, b, WORDS_PER_LINE as usize, all);
            return image;
        }
        number -= self.pairs();
        let (line, len) = (number / (WORDS_PER_LINE - 1), number % (WORDS_PER_LINE - 1));
        self.turn(&mut image, line, len as usize + 1, all); // L3
        image
    }

    fn nothing(&self) -> Image {
        Image(vec![0; self.words.len()])
    }

    fn all(&self) -> Image {
        let newest = |word: &PendingWord| word.versions.len() as u8;
        Image(self.words.iter().map(newest).collect())
    }

    /// Turns the first words of a line to what the rest of the image is not. If everything else is kept, the
    /// others of the line are kept too.
    fn turn(&self, image: &mut Image, line: u64, len: usize, all: bool) {
        let words = self.lines[line as usize].words.clone();
        for at in words.take(len) {
            image.0[at] = if all {
                0
            } else {
                self.words[at].versions.len() as u8
            };
        }
    }

    fn random(&self, prng: &mut Prng) -> Image {
        let kept_percent = prng.pick(&[5, 30, 50, 70, 95]);
        let choose = |word: &PendingWord| {
            if prng.percent(kept_percent) {
                1 + prng.index(word.versions.len()) as u8
            } else {
                0
            }
        };
        Image(self.words.iter().map(choose).collect())
    }
}

/// The pair of a number: two different ones, the higher first.
fn pair(number: u64) -> (u64, u64) {
    let mut high = 1;
    let mut left = number;
    while left >= high {
        left -= high;
        high += 1;
    }
    (high, left)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pmem::Pmem;
    use crate::sim::pmem::SimPmem;
    use crate::units::{Agent, PmemOff};
    use std::collections::BTreeSet;

    #[test]
    fn the_levels_come_out_as_they_should() {
        let sim = SimPmem::new(4096);
        for line in 0..3 {
            sim.store(Agent(1), PmemOff(line * 64), &[line as u8 + 1; 64]);
        }
        sim.with_state(|state| {
            let words = state.pending_words();
            let mut prng = Prng::new(1);
            let images = Images::new(state, &words, 3, &mut prng);
            let made: Vec<Image> = (0..images.count())
                .map(|number| images.choose(number, &mut prng))
                .collect();
            let different: BTreeSet<_> = made.iter().map(|image| image.0.clone()).collect();
            // One line and two lines are each other's complement when there are three.
            assert_eq!(different.len(), 2 + 3 + 3 + 2 * 3 * 7);
            let kept = |image: &Image| image.0.iter().filter(|c| **c > 0).count();
            let by_kept = |count| made.iter().filter(|image| kept(image) == count).count();
            assert_eq!((by_kept(0), by_kept(24)), (1, 1));
            assert_eq!(by_kept(8), 3 + 3, "one line kept, and two lines lost");
            assert_eq!(by_kept(1), 3, "a prefix of one word");
            assert_eq!(by_kept(23), 3, "all but a prefix of one word");
        });
    }

    #[test]
    fn a_word_that_was_stored_twice_may_keep_the_first_value() {
        let sim = SimPmem::new(4096);
        sim.store(Agent(1), PmemOff(0), &[1; 64]);
        sim.store(Agent(1), PmemOff(0), &[2; 64]);
        sim.with_state(|state| {
            let words = state.pending_words();
            let mut prng = Prng::new(1);
            let images = Images::new(state, &words, 3, &mut prng);
            let mut seen = BTreeSet::new();
            for _ in 0..50 {
                let mut bytes = state.durable().to_vec();
                images
                    .choose(images.count(), &mut prng)
                    .write(&words, &mut bytes);
                seen.insert(bytes[0]);
            }
            assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 1, 2]);
        });
    }
}
