//! Logs that name more pages than the index has room for.

use crate::engine::{FormatPolicy, Fua, Op, Status};
use crate::media::Tails;
use crate::pmem::IovBuf;
use crate::sim::machine::Setup;
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::sim::pmem::SimPmem;

/// More than the largest index of such a cache has room for.
const BASE_PAGES: u64 = 32 << 10;
const PAGE: usize = 4096;
/// A quarter of what the index has room for.
const UNMAP_PAGES: u64 = 64;

fn setup(block_count: u64) -> Setup {
    Setup {
        block_size_bytes: PAGE as u32,
        block_count,
        segment_size_bytes: 64 << 10,
        segment_count: 16,
        yield_percent: 0,
        ..Setup::default()
    }
}

/// A cache over a base that holds these bytes.
fn plain(pmem: &SimPmem, base: Vec<u8>) -> Plain<SimPmem> {
    let options = setup(BASE_PAGES).options(FormatPolicy::Auto);
    Plain::new(pmem.clone(), base, options, BackgroundRuns::Always).unwrap()
}

fn write(plain: &mut Plain<SimPmem>, lba: u64, byte: u8) {
    let buf = IovBuf::new(&[byte; PAGE], &[]);
    let status = plain.run(0, Op::Write(buf.cursor(), Fua::No), lba, 1);
    assert_eq!(status, Status::Success);
}

fn unmap(plain: &mut Plain<SimPmem>, lba: u64) {
    let status = plain.run(0, Op::Unmap, lba, UNMAP_PAGES);
    assert_eq!(status, Status::Success);
}

/// INV-OPEN-8.
#[test]
fn a_discard_of_far_more_than_there_is_room_for_leaves_a_cache_that_opens() {
    let written = [(5, 1), (9, 2)];
    for dirty in [false, true] {
        let mut pmem = SimPmem::new(setup(BASE_PAGES).device_size_bytes());
        let mut before = plain(&pmem, vec![0; BASE_PAGES as usize * PAGE]);
        let index_bytes = before.cache.info().index_bytes;
        write(&mut before, 5, 7);
        for lba in (0..BASE_PAGES).step_by(UNMAP_PAGES as usize) {
            unmap(&mut before, lba);
        }
        assert!(before.drain());
        if dirty {
            for (lba, byte) in written {
                write(&mut before, lba, byte);
            }
            unmap(&mut before, 1000);
        }
        let dirty_bytes = before.cache.info().dirty_bytes;
        assert_eq!(dirty_bytes, if dirty { 2 * PAGE as u64 } else { 0 });
        let mut base = std::mem::take(&mut before.base);
        drop(before);
        for _ in 0..2 {
            // What is cached where it should not be is told from what comes from the base.
            base[5 * PAGE..][..PAGE].fill(33);
            pmem = SimPmem::from_image(pmem.live_image());
            let mut after = plain(&pmem, base);
            let info = after.cache.info();
            assert_eq!(info.index_bytes, index_bytes);
            assert_eq!(info.dirty_bytes, dirty_bytes);
            for (lba, byte) in written {
                let of_base = if lba == 5 { 33 } else { 0 };
                let expected = if dirty { byte } else { of_base };
                let read = after.read(0, lba, 1);
                assert_eq!(read, (Status::Success, vec![expected; PAGE]), "{lba}");
            }
            let checksums = &after.cache.checksums;
            let (tails, _) = Tails::load(&pmem, checksums).unwrap();
            assert_eq!(tails.key_tail, tails.dirty_tail, "for good");
            base = std::mem::take(&mut after.base);
        }
    }
}
