//! Memory in lines of eight words.

use super::hint::advise_huge_pages;
use crate::memory::{self, NoMemory};
use std::ptr::NonNull;
use zerocopy::FromZeros;

const LINE_WORDS: usize = 8;

/// Lines of eight words, each at a multiple of its own size, so that none lies in two lines of the CPU's cache.
///
/// Each is one comparison and a sum away. A vector of lines would be the same if an allocator gave zeroed memory with such an
/// alignment without a touch of it; in one of words, where the first line begins takes a few more, for each look at the index.
#[derive(Debug)]
pub(crate) struct Lines<T> {
    first: NonNull<[T; LINE_WORDS]>,
    count: usize,
    /// In which they lie. Nobody touches it.
    _words: Vec<T>,
}

// SAFETY: it owns its words, as the vector does.
unsafe impl<T: Send> Send for Lines<T> {}
// SAFETY: it gives out shared references alone.
unsafe impl<T: Sync> Sync for Lines<T> {}

impl<T: FromZeros> Lines<T> {
    /// Zeroed memory, for `what`; the system provides it when it is first touched.
    pub(crate) fn new(what: &'static str, line_count: usize) -> Result<Self, NoMemory> {
        let word_count = line_count.saturating_add(1).saturating_mul(LINE_WORDS);
        let mut words = memory::zeroed::<T>(what, word_count)?;
        let misaligned_bytes = words.as_ptr().addr() % size_of::<[T; LINE_WORDS]>();
        let misaligned_words = misaligned_bytes / size_of::<T>();
        let before = (LINE_WORDS - misaligned_words) % LINE_WORDS;
        // SAFETY: that of a vector is never null; `before` is less than a line, and it has words for one at least.
        let first = unsafe { NonNull::new_unchecked(words.as_mut_ptr()).add(before) };
        Ok(Self {
            first: first.cast(),
            count: (words.len() - before) / LINE_WORDS,
            _words: words,
        })
    }

    /// As [`Lines::new`], for lines all of which will be touched: in huge pages, if the system has them, which are
    /// provided far sooner than as many small ones.
    pub(crate) fn new_dense(what: &'static str, line_count: usize) -> Result<Self, NoMemory> {
        let lines = Self::new(what, line_count)?;
        // SAFETY: as in `line`, all of them.
        advise_huge_pages(unsafe {
            NonNull::slice_from_raw_parts(lines.first, lines.count).as_ref()
        });
        Ok(lines)
    }
}

impl<T> Lines<T> {
    /// # Panics
    /// There are no so many.
    #[inline]
    pub(crate) fn line(&self, line: usize) -> &[T; LINE_WORDS] {
        assert!(line < self.count, "there is no such line");
        // SAFETY: one of the `count` lines that were made of words of the vector, which are initialised, and which nobody but
        // this has. A vector that is moved leaves them where they are until it is dropped; they are lent to readers alone.
        unsafe { self.first.add(line).as_ref() }
    }

    /// A word by its number among those of all lines.
    ///
    /// # Panics
    /// There are no so many.
    #[inline]
    pub(crate) fn word(&self, word: usize) -> &T {
        assert!(word / LINE_WORDS < self.count, "there is no such line");
        // SAFETY: as in `line`, one of the words of such a line.
        unsafe { self.first.cast::<T>().add(word).as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

    #[test]
    fn lines_are_aligned_apart_and_zeroed() {
        let lines = Lines::<AtomicU64>::new("a test", 1000).unwrap();
        for number in 0..1000 {
            let line = lines.line(number);
            assert_eq!(line.as_ptr() as usize % 64, 0);
            for word in line {
                assert_eq!(word.swap(number as u64 + 1, Ordering::Relaxed), 0);
            }
        }
        let narrow = Lines::<AtomicU32>::new_dense("a test", 3).unwrap();
        assert!((0..3).all(|number| narrow.line(number).as_ptr().addr().is_multiple_of(32)));
        let words = |number| {
            lines
                .line(number)
                .iter()
                .map(|word| word.load(Ordering::Relaxed))
        };
        assert!((0..1000).all(|number| words(number).eq([number as u64 + 1; LINE_WORDS])));
    }

    #[test]
    fn what_is_behind_the_last_line_is_none() {
        let lines = Lines::<AtomicU64>::new("a test", 998).unwrap();
        lines.line(lines.count - 1);
        let line = std::panic::AssertUnwindSafe(|| lines.line(lines.count).len());
        let panicked = std::panic::catch_unwind(line).unwrap_err();
        lines.word(lines.count * LINE_WORDS - 1);
        let word = std::panic::AssertUnwindSafe(|| {
            lines.word(lines.count * LINE_WORDS);
        });
        std::panic::catch_unwind(word).unwrap_err();
        let text = panicked.downcast_ref::<&str>().unwrap();
        assert!(text.contains("no such line"), "{text}");
        assert!((998..=999).contains(&lines.count));
    }
}
