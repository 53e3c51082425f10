//! Memory for the tables.

use std::sync::atomic::AtomicU64;
use zerocopy::FromZeros;

/// Words that start on a cache line.
#[derive(Debug)]
pub(super) struct Lines {
    words: Vec<AtomicU64>,
    start: usize,
}

impl Lines {
    /// Zeroed memory; the system provides it when it is first touched.
    pub(super) fn new(line_count: usize) -> Self {
        let words = AtomicU64::new_vec_zeroed((line_count + 1) * 8).unwrap_or_default();
        assert!(
            !words.is_empty(),
            "no memory for an index of {line_count} lines"
        );
        let misaligned_words = (words.as_ptr() as usize % 64) / 8;
        Self {
            words,
            start: (8 - misaligned_words) % 8,
        }
    }

    #[inline]
    pub(super) fn line(&self, line: usize) -> &[AtomicU64; 8] {
        let (lines, _) = self.words[self.start..].as_chunks::<8>();
        &lines[line]
    }
}
