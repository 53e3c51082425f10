//! Memory in lines of eight words.

use zerocopy::FromZeros;

const LINE_WORDS: usize = 8;

/// Lines of eight words, each at a multiple of its own size, so that none lies in two lines of the CPU's cache.
#[derive(Debug)]
pub(super) struct Lines<T> {
    words: Vec<T>,
    start: usize,
}

impl<T: FromZeros> Lines<T> {
    /// Zeroed memory; the system provides it when it is first touched.
    ///
    /// # Panics
    /// There is none.
    pub(super) fn new(line_count: usize) -> Self {
        let words = T::new_vec_zeroed((line_count + 1) * LINE_WORDS).unwrap_or_default();
        assert!(
            !words.is_empty(),
            "no memory for an index of {line_count} lines"
        );
        let misaligned_bytes = words.as_ptr() as usize % size_of::<[T; LINE_WORDS]>();
        let misaligned_words = misaligned_bytes / size_of::<T>();
        Self {
            words,
            start: (LINE_WORDS - misaligned_words) % LINE_WORDS,
        }
    }

    /// As [`Lines::new`], for lines all of which will be touched: in huge pages, if the system has them, which are
    /// provided far sooner than as many small ones.
    pub(super) fn new_dense(line_count: usize) -> Self {
        let lines = Self::new(line_count);
        crate::pmem::advise_huge_pages(&lines.words);
        lines
    }

    #[inline]
    pub(super) fn line(&self, line: usize) -> &[T; LINE_WORDS] {
        let (lines, _) = self.words[self.start..].as_chunks::<LINE_WORDS>();
        &lines[line]
    }
}
