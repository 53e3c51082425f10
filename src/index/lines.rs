//! Memory in lines of eight words.

use crate::memory::{self, NoMemory};
use zerocopy::FromZeros;

const LINE_WORDS: usize = 8;

/// Lines of eight words, each at a multiple of its own size, so that none lies in two lines of the CPU's cache.
#[derive(Debug)]
pub(super) struct Lines<T> {
    words: Vec<T>,
    start: usize,
}

impl<T: FromZeros> Lines<T> {
    /// Zeroed memory, for `what`; the system provides it when it is first touched.
    pub(super) fn new(what: &'static str, line_count: usize) -> Result<Self, NoMemory> {
        let word_count = line_count.saturating_add(1).saturating_mul(LINE_WORDS);
        let words: Vec<T> = memory::zeroed(what, word_count)?;
        let misaligned_bytes = words.as_ptr() as usize % size_of::<[T; LINE_WORDS]>();
        let misaligned_words = misaligned_bytes / size_of::<T>();
        Ok(Self {
            words,
            start: (LINE_WORDS - misaligned_words) % LINE_WORDS,
        })
    }

    /// As [`Lines::new`], for lines all of which will be touched: in huge pages, if the system has them, which are
    /// provided far sooner than as many small ones.
    pub(super) fn new_dense(what: &'static str, line_count: usize) -> Result<Self, NoMemory> {
        let lines = Self::new(what, line_count)?;
        crate::pmem::advise_huge_pages(&lines.words);
        Ok(lines)
    }

    #[inline]
    pub(super) fn line(&self, line: usize) -> &[T; LINE_WORDS] {
        let (lines, _) = self.words[self.start..].as_chunks::<LINE_WORDS>();
        &lines[line]
    }
}
