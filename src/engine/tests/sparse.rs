//! Which segments are compacted.

use super::*;
use crate::sim::plain::{BackgroundRuns, Plain};

const SEGMENT_BYTES: u64 = 64 << 10;
/// Of a third of the segments.
const PAGES: u64 = 300;

/// Reclaims segments of which three of five pages are in use, when `read` are read after they were sealed. Returns how many
/// were compacted, and how many reclaimed in all.
fn compacted(read: impl Iterator<Item = u64>) -> (u64, u64) {
    let mut options = options(4096, None);
    options.base.block_count = 2 * PAGES;
    options.settings = SettingChange::of(Setting::DirtyAgeS, 0).and(Setting::GcPercent, 90);
    let base = vec![0; (2 * PAGES * 4096) as usize];
    let pmem = SimPmem::new(SEGMENT_BYTES + 64 * SEGMENT_BYTES);
    let mut plain = Plain::new(pmem, base, options, BackgroundRuns::InDrains).unwrap();
    let overwritten = (0..PAGES).filter(|page| page % 5 < 2);
    for page in (0..PAGES).chain(overwritten) {
        let buf = IovBuf::new(&[page as u8; 4096], &[]);
        let status = plain.run(0, Op::Write(buf.cursor(), Fua::No), page, 1);
        assert_eq!(status, Status::Success);
    }
    assert!(plain.drain());
    for page in read {
        let (status, bytes) = plain.read(0, page, 1);
        assert_eq!((status, bytes[0]), (Status::Success, page as u8));
    }
    let change = SettingChange::of(Setting::GcPercent, 20);
    plain.cache.change_settings(&change).unwrap();
    for _ in 0..2000 {
        plain.poll_background();
    }
    assert!(plain.missed.is_empty(), "all that was read was cached");
    let stats = plain.cache.stats();
    (stats.segments_compacted, stats.segments_reclaimed)
}

#[test]
fn what_is_used_for_the_greater_part_is_copied_only_where_anything_is_read() {
    let (unread, reclaimed) = compacted(0..0);
    assert!(unread == 0 && reclaimed > 5, "{unread} of {reclaimed}");
    // Fewer than one of a hundred.
    let (hardly_read, _) = compacted(0..1);
    assert_eq!(hardly_read, 0);
    let (read, reclaimed) = compacted((0..PAGES).step_by(10));
    assert!(read > 5, "{read} of {reclaimed}");
}
