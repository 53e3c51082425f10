//! What the cache device is used for.

use super::*;
use crate::index::BlockMap;
use crate::pmem::IovBuf;
use crate::sim::plain;
use crate::units::{Lba, NS_PER_MS, NS_PER_US, Now};

/// Blocks that lie on the cache device, by asking for each.
fn mapped_blocks<P: Pmem>(cache: &Cache<P>) -> u64 {
    let per_page = u64::from(cache.geometry.blocks_per_page());
    let block_count = cache.block_count();
    let is_mapped = |lba: &u64| {
        let at = cache.index.locate(cache.geometry.page_of(Lba(*lba)));
        let found = cache.index.lookup(at).expect("nobody changes it");
        let map = found.map.block((lba % per_page) as u32);
        matches!(map, BlockMap::Mapped(_))
    };
    (0..block_count).filter(is_mapped).count() as u64
}

/// A cache of the size of tests is counted exactly.
pub(super) fn check_usage<P: Pmem>(cache: &Cache<P>) {
    let usage = cache.usage();
    let block_bytes = u64::from(cache.geometry.block_size_bytes());
    assert_eq!(usage.occupancy, mapped_blocks(cache) * block_bytes);
    assert_eq!(usage.clean + usage.dirty, usage.occupancy);
    let parts = usage.occupancy + usage.free + usage.dead + usage.quarantined;
    assert_eq!(parts, usage.size);
    assert!(usage.dirty <= cache.info().dirty_bytes);
}

#[test]
fn what_is_written_is_dirty_then_clean_then_dead() {
    let base = vec![0; BLOCKS as usize * 512];
    let settings = SettingChange::of(Setting::DirtyAgeS, 0);
    let options = OpenOptions {
        settings,
        ..options(512, None)
    };
    let mut rig = Rig::open(SimPmem::new(DEVICE_SIZE_BYTES), base, options).unwrap();
    let empty = rig.cache().usage();
    assert_eq!(empty.size, 14 * (64 << 10));
    assert_eq!((empty.free, empty.occupancy), (empty.size, 0));
    rig.write(0, &[1; 8192], &[], Fua::No);
    // Parts of a page at several places.
    rig.write(100, &[2; 512], &[], Fua::No);
    rig.write(103, &[3; 512], &[], Fua::No);
    let written = rig.cache().usage();
    assert_eq!((written.dirty, written.clean), (9216, 0));
    rig.write(0, &[4; 8192], &[], Fua::No);
    let overwritten = rig.cache().usage();
    assert_eq!(overwritten.dirty, 9216);
    assert!(overwritten.dead >= written.dead + 8192, "{overwritten:?}");
    rig.drain();
    let drained = rig.cache().usage();
    assert_eq!((drained.dirty, drained.clean), (0, 9216));
    // Zeroes lie nowhere.
    rig.run(Op::WriteZeroes, 0, 16);
    let zeroed = rig.cache().usage();
    assert_eq!((zeroed.dirty, zeroed.clean), (0, 1024));
    check_usage(rig.cache());
    // The base lacks them all the same.
    assert_eq!(rig.cache().drain_status().dirty_bytes_left, 0);
    assert!(rig.cache().may_be_dirty());
    rig.drain();
    assert!(!rig.cache().may_be_dirty());
}

#[test]
fn sizes_and_lengths_are_measured() {
    let base = vec![0; BLOCKS as usize * 512];
    let mut rig = Rig::open(SimPmem::new(DEVICE_SIZE_BYTES), base, options(512, None)).unwrap();
    rig.write(0, &[1; 4096], &[], Fua::No);
    assert_eq!(rig.read(0, 8), [1; 4096]);
    assert_eq!(rig.read(64, 8), [0; 4096]);
    rig.drain();
    let stats = rig.cache().stats();
    assert_eq!(stats.hit_bytes, 4096);
    // The write and the read fill, a payload and a kset of one line each.
    assert_eq!(stats.logged_bytes, 2 * (4096 + 64));
    let lengths = &stats.distributions;
    assert_eq!(
        (lengths.batch_requests.count(), lengths.batch_requests.sum),
        (2, 2)
    );
    // A turn takes a millisecond there, of the channel and of the background one after the other; what is asked for
    // in one ends with it, and is seen in the next. A flush is seen at once.
    let turn_us = NS_PER_MS / NS_PER_US;
    let read = &lengths.base_read_us;
    assert_eq!((read.count(), read.sum), (1, 2 * turn_us));
    let write = &lengths.base_write_us;
    assert_eq!((write.count(), write.sum), (1, turn_us));
    let flush = &lengths.base_flush_us;
    assert_eq!((flush.count(), flush.sum), (1, 0));
    assert_eq!(lengths.gather_us.count(), 1);
    assert_eq!(lengths.held_write_us.count(), 0);
    rig.cache().reset_stats();
    assert_eq!(rig.cache().stats(), Stats::default());
}

/// One that comes goes on where the one before it has left off.
#[test]
fn channels_that_come_and_go_leave_one_segment_open() {
    let pmem = SimPmem::new((64 << 10) + 64 * (64 << 10));
    static BASE: [u8; BLOCKS as usize * 512] = [0; BLOCKS as usize * 512];
    let options = OpenOptions {
        stream_count_max: 16,
        ..options(512, None)
    };
    let cache = plain::open(pmem, &BASE, options).unwrap();
    let (buf, mut out) = (IovBuf::new(&[7; 512], &[]), Outbox::new());
    for round in 0..64 {
        let mut channel = cache.channel().unwrap();
        let io = HostIo {
            token: IoToken(1),
            op: Op::Write(buf.cursor(), Fua::No),
            lba: Lba(round),
            len_blocks: 1,
        };
        channel.submit(io).unwrap();
        out.clear();
        channel.poll(Now(0), &mut out);
        assert_eq!(out.completions[0].status, Status::Success);
    }
    assert!(cache.core_stream_count > 2);
    assert_eq!(cache.segments.count() - cache.segments.free_count(), 1);
}
