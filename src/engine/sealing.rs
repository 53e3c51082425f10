//! Ending the open segments of channels ahead of their end: a segment is clean when all of it is, so something in one to
//! which newer data come is never clean, however long ago the base got it.

use super::BACKGROUND_AGENT;
use super::cache::Cache;
use super::stream::OpenSegment;
use crate::pmem::Pmem;

/// What came of an attempt to seal a stream's open segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sealed {
    Yes,
    /// It was not wanted, or none is open.
    No,
    /// Somebody is at the stream.
    Busy,
}

/// Goes through the streams of channels, once. For the background.
#[derive(Debug, Default)]
pub(crate) struct Sealing {
    stream: usize,
    has_sealed: bool,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SealingStep {
    More,
    Finished,
}

impl Sealing {
    /// Seals the next segment of which anything is dirty, one in a poll: that costs a look at memory and two fences. Where
    /// a channel is at its stream, it is tried again with the next poll.
    pub(crate) fn poll<P: Pmem>(&mut self, cache: &Cache<P>) -> SealingStep {
        let dirty_tail = cache.dirty_tail();
        let is_dirty = |open: &OpenSegment| {
            open.kset_index > 0 && !cache.segments.get(open.id).is_on_base(dirty_tail)
        };
        while self.stream < cache.core_stream_count {
            let sealed = cache.try_seal(self.stream, BACKGROUND_AGENT, is_dirty);
            if sealed != Sealed::Busy {
                self.stream += 1;
            }
            self.has_sealed |= sealed == Sealed::Yes;
            if sealed != Sealed::No {
                return SealingStep::More;
            }
        }
        SealingStep::Finished
    }

    /// Whether any segment was sealed.
    pub(crate) fn has_sealed(&self) -> bool {
        self.has_sealed
    }
}
