//! Writes of several pages, which claim them by groups.

use super::*;
use crate::index::{Change, Claim, GROUP_PAGES};
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::units::{Lba, Page};

/// Somebody else.
const OTHER: u16 = 900;
/// From the middle of a group to the middle of another.
const FIRST: u64 = GROUP_PAGES + 2;
const COUNT: u64 = GROUP_PAGES;

/// A write that meets another core at one of its groups takes nothing, and is done when that one has gone, whatever of its pages
/// is cached.
#[test]
fn a_write_of_groups_of_which_one_is_held_takes_none() {
    for cached in [
        vec![],
        vec![FIRST + 1, FIRST + 2],
        (FIRST..FIRST + COUNT).collect(),
    ] {
        let base = vec![0; 64 * 4096];
        let pmem = SimPmem::new(DEVICE_SIZE_BYTES);
        let mut options = options(4096, None);
        options.base.block_count = 64;
        let mut plain = Plain::new(pmem, base, options, BackgroundRuns::InDrains).unwrap();
        for page in cached {
            let buf = IovBuf::new(&[1; 4096], &[]);
            let status = plain.run(0, Op::Write(buf.cursor(), Fua::No), page, 1);
            assert_eq!(status, Status::Success);
        }
        // One after the other is in the way.
        for held in [FIRST, FIRST + COUNT - 1] {
            let at = plain.cache.index.locate(Page(held));
            assert_eq!(plain.cache.index.claim(at, OTHER), Claim::Taken);
            let conflicts = plain.cache.stats().conflicts;
            let buf = IovBuf::new(&vec![held as u8; COUNT as usize * 4096], &[]);
            let io = HostIo {
                token: IoToken(held),
                op: Op::Write(buf.cursor(), Fua::No),
                lba: Lba(FIRST),
                len_blocks: COUNT,
            };
            plain.channel_mut(0).submit(io).unwrap();
            assert_eq!(plain.poll_channel(0), None);
            assert_eq!(plain.cache.stats().conflicts, conflicts + 1);
            // The claims of all others can be had.
            for page in FIRST..FIRST + COUNT {
                let index = &plain.cache.index;
                let other = index.locate(Page(page));
                if other.bucket() != at.bucket() {
                    assert_eq!(index.claim(other, OTHER), Claim::Taken, "page {page}");
                    index.release(other.bucket(), OTHER, Change::Moved);
                }
            }
            plain.cache.index.release(at.bucket(), OTHER, Change::Moved);
            assert_eq!(plain.poll_channel(0), Some(Status::Success));
            plain.cache.check_invariants();
            let (status, bytes) = plain.read(0, FIRST, COUNT);
            assert_eq!(status, Status::Success);
            assert!(bytes.iter().all(|&byte| byte == held as u8));
        }
    }
}
