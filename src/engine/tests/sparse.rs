//! Which segments are compacted.

use super::*;
use crate::sim::plain::{BackgroundRuns, Plain};

const SEGMENT_BYTES: u64 = 64 << 10;
/// Of a third of the segments.
const PAGES: u64 = 300;

/// A cache with segments of which three of five pages are in use, and nothing else. Before that it was full of other pages, if
/// `had_more`.
fn sparse(had_more: bool) -> Plain<SimPmem> {
    let mut options = options(4096, None);
    options.base.block_count = 6 * PAGES;
    options.settings = SettingChange::of(Setting::DirtyAgeS, 0).and(Setting::GcPercent, 90);
    let base = vec![0; (6 * PAGES * 4096) as usize];
    let pmem = SimPmem::new(SEGMENT_BYTES + 64 * SEGMENT_BYTES);
    let mut plain = Plain::new(pmem, base, options, BackgroundRuns::InDrains).unwrap();
    if had_more {
        // All of it is forgotten, or nearly.
        write(&mut plain, 2 * PAGES..4 * PAGES);
        reclaim(&mut plain, 0);
    }
    write(&mut plain, 0..PAGES);
    write(&mut plain, (0..PAGES).filter(|page| page % 5 < 2));
    plain
}

fn write(plain: &mut Plain<SimPmem>, pages: impl Iterator<Item = u64>) {
    for page in pages {
        let buf = IovBuf::new(&[page as u8; 4096], &[]);
        let status = plain.run(0, Op::Write(buf.cursor(), Fua::No), page, 1);
        assert_eq!(status, Status::Success);
    }
    assert!(plain.drain());
}

fn read(plain: &mut Plain<SimPmem>, pages: impl Iterator<Item = u64>) {
    for page in pages {
        let (status, bytes) = plain.read(0, page, 1);
        assert_eq!((status, bytes[0]), (Status::Success, page as u8));
    }
}

/// Returns how many segments were compacted for that.
fn reclaim(plain: &mut Plain<SimPmem>, gc_percent: u32) -> u64 {
    let before = plain.cache.stats().segments_compacted;
    for percent in [gc_percent, 90] {
        let change = SettingChange::of(Setting::GcPercent, percent);
        plain.cache.change_settings(&change).unwrap();
        for _ in 0..2000 {
            plain.poll_background();
        }
    }
    plain.cache.stats().segments_compacted - before
}

#[test]
fn what_is_used_for_the_greater_part_is_compacted_as_long_as_all_finds_room() {
    let mut plain = sparse(false);
    // There are some thirty segments of 64 in use.
    assert!(reclaim(&mut plain, 40) > 3);
    read(&mut plain, 0..PAGES);
    assert!(plain.missed.is_empty(), "{} are missed", plain.missed.len());
}

#[test]
fn where_not_all_finds_room_it_is_compacted_only_if_anything_is_read() {
    let mut plain = sparse(true);
    assert_eq!(reclaim(&mut plain, 40), 0);
    let mut plain = sparse(true);
    // Fewer than one of a hundred.
    read(&mut plain, 0..1);
    assert_eq!(reclaim(&mut plain, 40), 0);
    let mut plain = sparse(true);
    read(&mut plain, (0..PAGES).step_by(10));
    assert!(reclaim(&mut plain, 40) > 3);
}
