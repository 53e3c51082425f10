//! Memory was lost somewhere: what is free is looked at before it is used, in small pieces.

use super::super::segments::SegmentState;
use super::*;
use crate::sim::pmem::PoisonedStore;
use crate::units::{Lba, Now, SegId};
use std::sync::Arc;

const BLOCK: usize = 512;
/// Two looks.
const SEGMENT_BYTES: u64 = 1 << 20;
const SEGMENT_COUNT: u64 = 10;
/// More than is written.
const BASE_BYTES: u64 = 64 << 20;

/// A cache without a background, in which a segment that is in use is known to have lost memory.
fn with_a_loss(segment_count: u64) -> (Plain<SimPmem>, IovBuf) {
    let mut options = options(BLOCK as u32, Some(DataCrc::Off));
    options.base.block_count = BASE_BYTES / BLOCK as u64;
    let options = OpenOptions {
        segment_size_bytes: Some(SEGMENT_BYTES),
        settings: options.settings.and(Setting::ScrubMibS, 0),
        ..options
    };
    let base = vec![0; options.base.block_count as usize * BLOCK];
    let pmem = SimPmem::new((64 << 10) + segment_count * SEGMENT_BYTES);
    let plain = Plain::new(pmem, base, options, BackgroundRuns::InDrains);
    let mut plain = plain.expect("the device is blank");
    plain.pmem().set_poisoned_store(PoisonedStore::Faults);
    let buf = IovBuf::new(&[1; BLOCK], &[]);
    let status = plain.run(0, Op::Write(buf.cursor(), Fua::No), 8, 1);
    assert_eq!(status, Status::Success);
    let mut ids = plain.cache.segments.ids();
    let open = ids.find(|id| plain.cache.segments.get(*id).state() == SegmentState::Open);
    assert!(
        plain
            .cache
            .segments
            .suspect(open.expect("it was written to"))
    );
    (plain, buf)
}

/// Submits a write, and polls until it has ended. How, and how many segments were out of service after each poll.
fn write(plain: &mut Plain<SimPmem>, buf: &IovBuf) -> (Status, Vec<usize>) {
    let (cache, channel) = (Arc::clone(&plain.cache), plain.channel_mut(0));
    let io = HostIo {
        token: IoToken(1),
        op: Op::Write(buf.cursor(), Fua::No),
        lba: Lba(16),
        len_blocks: 1,
    };
    channel.submit(io).expect("there is room");
    let mut out = Outbox::new();
    let mut counts = Vec::new();
    while counts.len() < 100 {
        channel.poll(Now(0), &mut out);
        counts.push(cache.segments.quarantined_count());
        if let Some(end) = out.completions.first() {
            return (end.status, counts);
        }
    }
    panic!("the write gets nowhere: {counts:?}");
}

#[test]
fn free_memory_is_looked_at_in_several_polls() {
    let (mut plain, buf) = with_a_loss(SEGMENT_COUNT);
    assert_eq!(write(&mut plain, &buf), (Status::Success, vec![0; 2]));
    // It is known from now on.
    assert_eq!(write(&mut plain, &buf), (Status::Success, vec![0]));
}

#[test]
fn of_free_segments_that_are_lost_one_goes_out_of_service_in_a_poll() {
    let (mut plain, buf) = with_a_loss(SEGMENT_COUNT);
    let geometry = plain.cache.geometry;
    // All but the last, in the second half of each.
    for id in (0..geometry.segment_count() - 1).map(SegId) {
        let lost = geometry.segment_off(id).plus(SEGMENT_BYTES - 4096);
        plain.pmem().poison(lost);
    }
    let (status, counts) = write(&mut plain, &buf);
    assert_eq!(status, Status::Success);
    let steps = counts.windows(2).map(|pair| pair[1] - pair[0]);
    assert!(steps.clone().all(|step| step <= 1), "{counts:?}");
    assert!(counts.last() >= Some(&3), "{counts:?}");
    assert_eq!(counts[0], 0, "{counts:?}");
}

/// What reclaiming keeps has to wait for the look at where it goes, and is not given up for that.
#[test]
fn what_is_read_often_is_kept_while_free_memory_is_looked_at() {
    const HOT_PAGES: u64 = 8;
    let (mut plain, _) = with_a_loss(4 * SEGMENT_COUNT);
    let change = SettingChange::of(Setting::GcPercent, 50).and(Setting::DirtyHighPercent, 1);
    let change = change.and(Setting::DirtyLowPercent, 0);
    plain.cache.change_settings(&change).unwrap();
    let buf = IovBuf::new(&[7; 4096], &[]);
    let others = HOT_PAGES..plain.cache.block_count() / 8;
    let pages = (0..HOT_PAGES).chain(others.cycle().take(40 * 256));
    for (count, page) in pages.enumerate() {
        let status = plain.run(0, Op::Write(buf.cursor(), Fua::No), page * 8, 8);
        assert_eq!(status, Status::Success);
        // In time: nobody waits for room.
        (0..8).for_each(|_| plain.poll_background());
        if count == 2 * 256 {
            assert!(plain.drain());
            for page in (0..2).flat_map(|_| 0..HOT_PAGES) {
                assert_eq!(plain.read(0, page * 8, 8).0, Status::Success);
            }
        }
    }
    let stats = plain.cache.stats();
    assert!(stats.segments_reclaimed > 2, "{stats:?}");
    assert!(stats.gc_copied_bytes >= HOT_PAGES * 4096, "{stats:?}");
    // Nothing of them was left behind.
    for page in 0..HOT_PAGES {
        plain.missed.clear();
        assert_eq!(plain.read(0, page * 8, 8).0, Status::Success);
        assert!(plain.missed.is_empty(), "page {page}");
    }
}
