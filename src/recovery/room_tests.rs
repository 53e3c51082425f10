//! Logs that name more pages than the index has room for, and how long it takes to find that out.

use super::{OpenError, OpenStep, Opening};
use crate::engine::{FormatPolicy, Fua, Op, Status};
use crate::media::{
    CLEAR_SIZE_MAX_BYTES, Checksums, KEYS_START_BYTES, Key, KeyKind, KsetBuilder, Proof, Tails,
};
use crate::pmem::{IovBuf, Pmem};
use crate::sim::image::ImagePmem;
use crate::sim::machine::Setup;
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::sim::pmem::SimPmem;
use crate::sim::recover;
use crate::units::{Agent, Epoch, Lba, SegId, Seq};

const AGENT: Agent = Agent(9);
/// More than the largest index of such a cache has room for.
const BASE_PAGES: u64 = 32 << 10;
const PAGE: usize = 4096;
/// An eighth of what the index has room for: the most that a channel takes.
const UNMAP_PAGES: u64 = 32;

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
        // What is in the index is clean, and stays so: nobody waits for it, or dirty data would be written back.
        before.cache.seal_streams();
        let waits = before.cache.stats().space_waits;
        if dirty {
            for (lba, byte) in written {
                write(&mut before, lba, byte);
            }
            unmap(&mut before, 1000);
        }
        assert_eq!(before.cache.stats().space_waits, waits);
        let dirty_bytes = before.cache.info().dirty_bytes;
        assert_eq!(dirty_bytes, if dirty { 2 * PAGE as u64 } else { 0 });
        let mut base = std::mem::take(&mut before.base);
        drop(before);
        let mut passed = None;
        for _ in 0..2 {
            // What is cached where it should not be is told from what comes from the base.
            base[5 * PAGE..][..PAGE].fill(33);
            pmem = SimPmem::from_image(pmem.live_image());
            let mut after = plain(&pmem, base);
            let checksums = &after.cache.checksums;
            let (tails, _) = Tails::load(&pmem, checksums).unwrap();
            // For good: the tail goes on with what the reads below bring.
            assert_eq!(tails.key_tail, *passed.get_or_insert(tails.dirty_tail));
            let info = after.cache.info();
            assert_eq!(info.index_bytes, index_bytes);
            assert_eq!(info.dirty_bytes, dirty_bytes);
            for (lba, byte) in written {
                let of_base = if lba == 5 { 33 } else { 0 };
                let expected = if dirty { byte } else { of_base };
                let read = after.read(0, lba, 1);
                assert_eq!(read, (Status::Success, vec![expected; PAGE]), "{lba}");
            }
            base = std::mem::take(&mut after.base);
        }
    }
}

/// A cache whose log is one kset with these keys, all dirty; how its opening ends, and after how many polls.
fn open_with(keys: &[Key]) -> (Result<u64, OpenError>, usize) {
    let setup = setup(1 << 30);
    let pmem = ImagePmem::new(vec![0; setup.device_size_bytes() as usize]);
    let options = || setup.options(FormatPolicy::Auto);
    let cache = recover::open(pmem.clone(), options(), |_, _| &[0; PAGE]).unwrap();
    let geometry = cache.geometry;
    let seed = Checksums::new(setup.uuid).kset(0, 1);
    let mut builder = KsetBuilder::default();
    keys.iter()
        .for_each(|key| builder.push(key, geometry.block_shift()));
    let start = geometry.segment_off(SegId(0));
    let kset = builder.finish(seed, 0, Seq(1), Epoch(1), Proof::Fence);
    pmem.store(AGENT, start.plus(u64::from(KEYS_START_BYTES)), kset);
    let mut opening = Opening::begin(pmem, options()).unwrap();
    for polls in 1..100_000 {
        match opening.poll() {
            Ok(OpenStep::Working { .. } | OpenStep::AwaitingBase) => {}
            Ok(OpenStep::ReadBase { slot, .. }) => opening.on_base_block(slot, Ok(&[0; PAGE])),
            Ok(OpenStep::Ready) => {
                let bytes = opening.finish().info().index_bytes;
                return (Ok(bytes / cache.info().index_bytes), polls);
            }
            Err(error) => return (Err(error), polls),
        }
    }
    panic!("the opening does not end");
}

/// So many keys of zeroes, each over as many pages.
fn zeroes(key_count: u64, page_count: u32) -> Vec<Key> {
    let key = |number| Key {
        lba: Lba(number * 2048),
        len_blocks: page_count,
        kind: KeyKind::Zeroes,
        payload_off: 0,
        crc: 0,
    };
    (0..key_count).map(key).collect()
}

#[test]
fn dirty_keys_have_an_index_made_for_them_and_as_soon_as_it_is_too_large_an_error() {
    let page_max = (CLEAR_SIZE_MAX_BYTES / PAGE as u64) as u32;
    let (opened, _) = open_with(&zeroes(3, 100));
    assert_eq!(opened, Ok(1));
    let (opened, _) = open_with(&zeroes(3, page_max));
    assert!(
        opened.as_ref().is_ok_and(|factor| *factor > 4),
        "{opened:?}"
    );
    let (refused, polls) = open_with(&zeroes(512, page_max));
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("more pages than a cache"), "{error}");
    assert!(polls < 400, "{polls} polls for some 60,000 pages");
}

#[test]
fn a_key_of_more_pages_than_anybody_writes_is_refused_at_once() {
    let page_max = (CLEAR_SIZE_MAX_BYTES / PAGE as u64) as u32;
    for page_count in [page_max + 1, u32::MAX >> 4] {
        let (refused, polls) = open_with(&zeroes(1, page_count));
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("a key is out of range"), "{error}");
        assert!(polls < 20, "{polls} polls");
    }
}

#[test]
fn a_poll_looks_at_a_part_of_a_segment_that_is_to_be_used_again() {
    let segment_size_bytes = 16 << 20;
    let setup = Setup {
        block_count: 64,
        segment_size_bytes,
        segment_count: 4,
        ..setup(64)
    };
    let pmem = ImagePmem::new(vec![0; setup.device_size_bytes() as usize]);
    let options = || setup.options(FormatPolicy::Auto);
    let mut plain = Plain::new(
        pmem.clone(),
        vec![0; 64 * PAGE],
        options(),
        BackgroundRuns::InDrains,
    )
    .unwrap();
    assert_eq!(plain.run(0, Op::Unmap, 0, 1), Status::Success);
    assert!(plain.drain());
    plain.cache.seal_streams();
    let (mut tails, _) = Tails::load(&pmem, &plain.cache.checksums).unwrap();
    assert!(tails.dirty_tail > Seq(0));
    tails.key_tail = tails.dirty_tail;
    drop(tails.persist(&pmem, AGENT, &plain.cache.checksums));

    let mut opening = Opening::begin(pmem, options()).unwrap();
    let mut repairs = 0;
    loop {
        let recovering = opening.is_recovering();
        match opening.poll().unwrap() {
            OpenStep::Ready => break,
            OpenStep::ReadBase { slot, .. } => opening.on_base_block(slot, Ok(&[0; PAGE])),
            OpenStep::Working { total: 4, .. } => repairs += u32::from(!recovering),
            OpenStep::Working { .. } | OpenStep::AwaitingBase => {}
        }
    }
    assert!((3..8).contains(&repairs), "{repairs} polls for 16 MiB");
    assert_eq!(opening.finish().info().segments_free, 4);
}
