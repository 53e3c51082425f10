//! Formatting. A cut at any store leaves the old cache, or a device that is known to hold none, or the new
//! cache.

use super::error::OpenError;
use super::opening::OpenStep;
use crate::engine::BACKGROUND_AGENT;
use crate::media::{
    Checksums, SegmentInfo, Superblock, Tails, WITNESS_COUNT, Witness, persist_superblock,
    persist_unfinished_mark,
};
use crate::pmem::Pmem;
use crate::units::{Generation, SegId};

/// Segment infos that one poll writes.
const SEGMENTS_PER_POLL: u32 = 256;

#[derive(Debug)]
pub(super) struct Formatting {
    tails: Tails,
    marked: bool,
    next_segment: u32,
}

impl Formatting {
    pub(super) fn new(witness: [Witness; WITNESS_COUNT]) -> Self {
        Self {
            tails: Tails {
                witness,
                ..Tails::empty()
            },
            marked: false,
            next_segment: 0,
        }
    }

    pub(super) fn into_tails(self) -> Tails {
        self.tails
    }

    /// A slice of the work; `None` when the cache exists.
    pub(super) fn poll<P: Pmem>(
        &mut self,
        pmem: &P,
        superblock: &mut Superblock,
    ) -> Result<Option<OpenStep>, OpenError> {
        let checksums = Checksums::new(superblock.uuid);
        let agent = BACKGROUND_AGENT;
        // 1. From here on there is no cache on the device.
        if !self.marked {
            drop(persist_unfinished_mark(pmem, agent)?);
            self.marked = true;
        }
        // 2. Every segment gets an info under the new uuid: nothing of an older cache passes any more.
        let count = superblock.geometry.segment_count();
        let end = (self.next_segment + SEGMENTS_PER_POLL).min(count);
        for segment in self.next_segment..end {
            let mut info = SegmentInfo {
                generation: Generation::FIRST,
                sealed: None,
                update: 0,
            };
            drop(info.persist(
                pmem,
                agent,
                &superblock.geometry,
                &checksums,
                SegId(segment),
            ));
        }
        self.next_segment = end;
        if end < count {
            return Ok(Some(OpenStep::Working {
                done: u64::from(end),
                total: u64::from(count),
            }));
        }
        // 3. The tails of an empty log.
        drop(self.tails.persist(pmem, agent, &checksums));
        // 4. The superblock: with its first valid copy the cache exists (INV-OPEN-2).
        drop(persist_superblock(pmem, agent, superblock));
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use crate::engine::FormatPolicy;
    use crate::media::{HeaderState, load_header};
    use crate::recovery::compat_tests::IMAGES;
    use crate::sim::image::ImagePmem;
    use crate::sim::plain::open;
    use crate::sim::pmem::SimPmem;
    use std::sync::{Arc, Mutex};

    /// Which cache a device holds, if any.
    fn uuid_on(image: Vec<u8>) -> Option<[u8; 16]> {
        match load_header(&ImagePmem::new(image)) {
            Ok(HeaderState::Cache(superblock, _)) => Some(superblock.uuid),
            Ok(HeaderState::Unfinished) => None,
            other => panic!("a cut during formatting leaves {other:?}"),
        }
    }

    #[test]
    fn a_cut_during_formatting_leaves_the_old_cache_none_or_the_new_one() {
        // INV-OPEN-2.
        let image = &IMAGES[0];
        let pmem = SimPmem::from_image(image.load());
        let old = uuid_on(image.load());
        let found = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&found);
        pmem.on_crash_point(Some(Box::new(move |state, _| {
            for word in 0..=state.pending_words().len() {
                let mut seen = seen.lock().unwrap();
                // All words from the start on, all but one, one alone.
                seen.push(uuid_on(state.crash_image(|at, _| usize::from(at < word))));
                seen.push(uuid_on(state.crash_image(|at, _| usize::from(at != word))));
                seen.push(uuid_on(state.crash_image(|at, _| usize::from(at == word))));
            }
        })));
        let mut options = image.options_at_format();
        (options.format, options.new_uuid) = (FormatPolicy::Force, [0x5c; 16]);
        open(pmem, &image.base_content(), options).unwrap();
        let found = std::mem::take(&mut *found.lock().unwrap());
        for expected in [old, None, Some([0x5c; 16])] {
            assert!(found.contains(&expected), "never seen: {expected:?}");
        }
        let stray = found
            .iter()
            .find(|uuid| uuid.is_some() && **uuid != old && **uuid != Some([0x5c; 16]));
        assert_eq!(stray, None);
    }
}
