//! Goes through the blocks of a read, and gathers those that come from the same source.

use super::run::Run;
use super::{Blocked, PREFETCH_PAGES, Reader};
use crate::engine::channel::Core;
use crate::engine::io::Outbox;
use crate::index::{BlockMap, GROUP_PAGES, PageMap, Version};
use crate::pmem::Pmem;
use crate::units::{Lba, Page};

impl Core {
    /// Goes through the blocks from `start` to `end`, and serves each run.
    pub(super) fn walk<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        start: u64,
        end: u64,
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let (index, geometry) = (&reader.cache.index, &reader.cache.geometry);
        let page_blocks = u64::from(geometry.blocks_per_page());
        let group_blocks = page_blocks * GROUP_PAGES;
        let last_page = geometry.page_of(Lba(end - 1));
        let mut lba = start;
        while lba < end {
            let page = geometry.page_of(Lba(lba));
            let later = Page(page.0 + PREFETCH_PAGES);
            if later <= last_page && later.0.is_multiple_of(GROUP_PAGES) {
                index.prefetch(index.locate(later));
            }
            if lba & (group_blocks - 1) > 0 || end - lba < group_blocks {
                let page_end = ((lba | (page_blocks - 1)) + 1).min(end);
                self.walk_page(reader, lba, page_end, out)?;
                lba = page_end;
                continue;
            }
            for source in index.lookup_group(index.locate(page)) {
                let page_end = lba + page_blocks;
                match source {
                    Some(source) => {
                        let run = Run {
                            source,
                            lba: Lba(lba),
                            len_blocks: page_blocks,
                        };
                        self.extend_run(reader, run, out)?;
                    }
                    None => self.walk_page(reader, lba, page_end, out)?,
                }
                lba = page_end;
            }
        }
        self.end_run(reader, out)
    }

    /// Goes through blocks of a page.
    #[inline(always)]
    fn walk_page<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        start: u64,
        end: u64,
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let (index, geometry) = (&reader.cache.index, &reader.cache.geometry);
        let page = geometry.page_of(Lba(start));
        // INV-READ-9: the read that it was meant for may have to wait.
        let (source, version) = match reader.ahead.take() {
            Some(ahead) if ahead.page == page => (ahead.source, ahead.version),
            _ => match index.lookup(index.locate(page)) {
                Some(found) => match found.map {
                    PageMap::Whole(source) => (source, found.version),
                    PageMap::Blocks(blocks) => {
                        return self.walk_blocks(reader, (start, end), &blocks, found.version, out);
                    }
                },
                None => {
                    self.end_run(reader, out)?;
                    return Err(Blocked::Busy);
                }
            },
        };
        // A page has 8 blocks at most.
        let first = (start - geometry.page_start(page).0) as u32;
        let run = Run {
            source: source.behind(first),
            lba: Lba(start),
            len_blocks: end - start,
        };
        self.extend_versioned(reader, run, version, out)
    }

    /// Goes through blocks of a page of which these are known one by one.
    #[inline(never)]
    fn walk_blocks<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        (start, end): (u64, u64),
        blocks: &[BlockMap],
        version: Version,
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let in_page = u64::from(reader.cache.geometry.blocks_per_page()) - 1;
        for lba in start..end {
            let run = Run {
                source: blocks[(lba & in_page) as usize],
                lba: Lba(lba),
                len_blocks: 1,
            };
            self.extend_versioned(reader, run, version, out)?;
        }
        Ok(())
    }

    /// As [`Self::extend_run`], with blocks of a page of this version, which may be missing.
    #[inline(always)]
    fn extend_versioned<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        next: Run,
        version: Version,
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        self.extend_run(reader, next, out)?;
        if next.source == BlockMap::Absent {
            self.note_version(reader, next.lba, version);
        }
        Ok(())
    }

    /// Adds blocks to the run, or ends the run and starts another with them.
    #[inline(always)]
    fn extend_run<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        next: Run,
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        match &mut reader.run {
            Some(run) if run.continues(next.source) => run.len_blocks += next.len_blocks,
            _ => {
                self.end_run(reader, out)?;
                reader.run = Some(next);
                reader.version_count = 0;
            }
        }
        Ok(())
    }

    /// Notes the version of a page of which blocks from this one on were added to a run of what is missing.
    #[inline(never)]
    fn note_version<P>(&mut self, reader: &mut Reader<'_, P>, lba: Lba, version: Version) {
        let in_page = u64::from(reader.cache.geometry.blocks_per_page()) - 1;
        if lba.0 & in_page == 0 || reader.version_count == 0 {
            if let Some(slot) = self.run_versions.get_mut(reader.version_count) {
                *slot = version;
            }
            reader.version_count += 1;
        }
    }
}
