//! What is made of a kset that was stored before the fence of its payloads (INV-LOG-11), and of what a kill has left unfenced
//! (INV-LOG-12).

use super::compat_tests::IMAGES;
use super::walk::{SegmentWalk, WalkBuf, load_info};
use crate::engine::{DataCrc, FormatPolicy, Fua, Op, Status};
use crate::media::{Checksums, FEATURES_INCOMPAT, Kset, Proof, Sealed, SegmentInfo};
use crate::pmem::IovBuf;
use crate::sim::machine::Setup;
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::sim::pmem::{PoisonedStore, SimPmem, SimState};
use crate::sim::recover::superblock_of;
use crate::units::{Agent, PmemOff, SegId, Seq};
use std::panic::{AssertUnwindSafe, catch_unwind};

const AGENT: Agent = Agent(9);
const PAGE: usize = 4096;

fn setup() -> Setup {
    Setup {
        core_count: 1,
        data_crc: DataCrc::Off,
        block_size_bytes: 512,
        segment_size_bytes: 64 << 10,
        ..Setup::default()
    }
}

fn start(pmem: SimPmem) -> Plain<SimPmem> {
    start_over(pmem, vec![0; setup().block_count as usize * 512])
}

fn start_over(pmem: SimPmem, base: Vec<u8>) -> Plain<SimPmem> {
    let setup = setup();
    let options = setup.options(FormatPolicy::Auto);
    Plain::new(pmem, base, options, BackgroundRuns::InDrains).unwrap()
}

fn write(plain: &mut Plain<SimPmem>, page: u64, byte: u8, len_bytes: usize) {
    let buf = IovBuf::new(&vec![byte; len_bytes], &[]);
    let op = Op::Write(buf.cursor(), Fua::No);
    let status = plain.run(0, op, page * 8, len_bytes as u64 / 512);
    assert_eq!(status, Status::Success);
}

/// What a page reads as: it is of one byte.
fn page(plain: &mut Plain<SimPmem>, page: u64) -> u8 {
    let (status, bytes) = plain.read(0, page * 8, 8);
    assert_eq!(status, Status::Success);
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

/// The segment with the last kset of all, its info and its ksets, whatever their payloads are, and where the payload of
/// the last key lies.
struct End {
    segment: SegId,
    info: SegmentInfo,
    ksets: Vec<Kset>,
    payload: PmemOff,
}

fn end_of_log(pmem: &SimPmem) -> End {
    let superblock = superblock_of(pmem);
    let geometry = superblock.geometry;
    let ends = (0..geometry.segment_count()).map(SegId).map(|segment| {
        let (info, _) = load_info(pmem, &superblock, segment).unwrap();
        let mut walk = SegmentWalk::new(&superblock, Seq(u64::MAX), segment, info);
        let (mut buf, mut ksets, mut payload_off) = (WalkBuf::default(), Vec::new(), 0);
        while let Some(kset) = walk.next(pmem, &mut buf) {
            ksets.push(kset);
            payload_off = buf.keys.last().map_or(0, |key| key.payload_off);
        }
        End {
            segment,
            info,
            ksets,
            payload: geometry.segment_off(segment).plus(payload_off.into()),
        }
    });
    ends.max_by_key(|end| end.ksets.last().map(|kset| kset.seq))
        .unwrap()
}

/// How many ksets of the segment count, and whether it is damaged.
fn walk(pmem: &SimPmem, end: &End, dirty_tail: Seq) -> (usize, bool) {
    let superblock = superblock_of(pmem);
    let mut walk = SegmentWalk::new(&superblock, dirty_tail, end.segment, end.info);
    let mut buf = WalkBuf::default();
    let count = std::iter::from_fn(|| walk.next(pmem, &mut buf)).count();
    let damage = walk.find_damage(pmem, &mut buf).unwrap();
    (count, damage.is_some())
}

/// After a write of page 3.
fn written_once() -> (SimPmem, Plain<SimPmem>, End) {
    let pmem = SimPmem::new(setup().device_size_bytes());
    let mut plain = start(pmem.clone());
    write(&mut plain, 3, 1, PAGE);
    let end = end_of_log(&pmem);
    (pmem, plain, end)
}

/// After two of them, each by itself.
fn written_twice() -> (SimPmem, End) {
    let (pmem, mut plain, _) = written_once();
    write(&mut plain, 3, 2, PAGE);
    let end = end_of_log(&pmem);
    assert_eq!(end.ksets.len(), 2);
    assert!(end.ksets.iter().all(|kset| kset.proof == Proof::Checksums));
    (SimPmem::from_image(pmem.durable_image()), end)
}

/// A copy of the device, with a word of this payload that is not what was stored.
fn tear(pmem: &SimPmem, payload: PmemOff) -> SimPmem {
    let mut bytes = pmem.durable_image();
    bytes[payload.0 as usize + 64] ^= 0x10;
    SimPmem::from_image(bytes)
}

#[test]
fn a_write_whose_payload_is_torn_was_never_made() {
    let (pmem, end) = written_twice();
    assert_eq!(walk(&pmem, &end, Seq(0)), (2, false));
    let torn = tear(&pmem, end.payload);
    assert_eq!(page(&mut start(pmem), 3), 2);

    assert_eq!(walk(&torn, &end, Seq(0)), (1, false));
    let mut plain = start(torn.clone());
    assert_eq!(page(&mut plain, 3), 1);
    assert_eq!(plain.cache.info().dirty_bytes, PAGE as u64);
    // Another start finds the same, and what was written meanwhile.
    write(&mut plain, 4, 7, PAGE);
    let mut again = start(SimPmem::from_image(torn.durable_image()));
    assert_eq!((page(&mut again, 3), page(&mut again, 4)), (1, 7));
    again.cache.check_invariants();
}

/// Of a write over two pages each has a key.
#[test]
fn a_write_of_which_one_of_two_payloads_is_torn_was_never_made() {
    let pmem = SimPmem::new(setup().device_size_bytes());
    let mut plain = start(pmem.clone());
    let buf = IovBuf::new(&[5; PAGE], &[]);
    let status = plain.run(0, Op::Write(buf.cursor(), Fua::No), 3 * 8 + 1, 8);
    assert_eq!(status, Status::Success);
    let end = end_of_log(&pmem);
    assert_eq!((end.ksets.len(), end.ksets[0].key_count), (1, 2));
    for payload in [end.payload, PmemOff(end.payload.0 - 512)] {
        let torn = tear(&pmem, payload);
        assert_eq!(walk(&torn, &end, Seq(0)), (0, false));
    }
}

/// The segment can be neither sealed nor freed: what is torn in it must not come back when its number was given to another, and
/// that one was written back.
#[test]
fn a_torn_write_does_not_come_back_from_a_segment_that_stays_as_it_is() {
    let (pmem, end) = written_twice();
    let torn = tear(&pmem, end.payload);
    torn.poison(superblock_of(&torn).geometry.segment_off(end.segment));
    let mut plain = start(torn.clone());
    assert_eq!(page(&mut plain, 3), 1);
    write(&mut plain, 4, 7, PAGE);
    assert_eq!(
        end_of_log(&torn).ksets.last().unwrap().seq,
        end.ksets[1].seq
    );
    assert!(plain.drain());
    let base = plain.base.clone();
    let again = SimPmem::from_image(torn.durable_image());
    again.poison(superblock_of(&torn).geometry.segment_off(end.segment));
    let mut again = start_over(again, base);
    assert_eq!((page(&mut again, 3), page(&mut again, 4)), (1, 7));
}

/// Nobody was told of the write, so what it was to overwrite is still there.
#[test]
fn a_write_that_the_memory_does_not_take_is_not_in_the_log() {
    let (pmem, mut plain, end) = written_once();
    pmem.set_poisoned_store(PoisonedStore::Faults);
    let lost = PmemOff(end.payload.0 - PAGE as u64);
    pmem.poison(lost);
    let write = AssertUnwindSafe(|| write(&mut plain, 3, 2, PAGE));
    catch_unwind(write).expect_err("the cache fails");
    let after = SimPmem::from_image(pmem.live_image());
    after.poison(lost);
    assert_eq!(page(&mut start(after), 3), 1);
}

#[test]
fn a_torn_write_that_is_alone_in_its_segment_leaves_it_free() {
    let (pmem, _, end) = written_once();
    let torn = tear(&pmem, end.payload);
    let mut plain = start(torn);
    let info = plain.cache.info();
    assert_eq!(
        (info.dirty_bytes, info.segments_free),
        (0, u64::from(info.segment_count))
    );
    assert_eq!(page(&mut plain, 3), 0);
}

#[test]
fn what_was_fenced_for_sure_counts_whatever_its_payload_is() {
    let (pmem, end) = written_twice();
    let torn = tear(&pmem, end.payload);
    let last = end.ksets[1].seq;
    assert_eq!(walk(&torn, &end, Seq(last.0 - 1)), (1, false));
    // It was written back.
    assert_eq!(walk(&torn, &end, last), (2, false));

    // Its segment was sealed behind it.
    let superblock = superblock_of(&torn);
    let checksums = Checksums::new(superblock.uuid);
    let mut info = end.info;
    info.sealed = Some(Sealed {
        kset_count: 2,
        last_seq: last,
    });
    let sealed = SimPmem::from_image(torn.durable_image());
    let geometry = &superblock.geometry;
    drop(info.persist(&sealed, AGENT, geometry, &checksums, end.segment));
    let sealed_end = end_of_log(&sealed);
    assert_eq!(walk(&sealed, &sealed_end, Seq(0)), (2, false));

    // Another kset was stored behind it.
    let (pmem, mut plain, first) = written_once();
    write(&mut plain, 4, 2, PAGE);
    let end = end_of_log(&pmem);
    let torn = tear(&pmem, first.payload);
    assert_eq!(walk(&torn, &end, Seq(0)), (2, false));
}

#[test]
fn a_write_whose_payload_cannot_be_read_is_not_taken_for_torn() {
    let (pmem, end) = written_twice();
    pmem.poison(end.payload);
    assert_eq!(walk(&pmem, &end, Seq(0)), (2, false));
    let mut plain = start(pmem);
    let (status, _) = plain.read(0, 3 * 8, 8);
    assert_ne!(status, Status::Success);
}

#[test]
fn what_takes_longer_to_checksum_than_to_fence_is_fenced() {
    let pmem = SimPmem::new(setup().device_size_bytes());
    let mut plain = start(pmem.clone());
    write(&mut plain, 3, 1, PAGE + 512);
    let end = end_of_log(&pmem);
    assert_eq!(end.ksets[0].proof, Proof::Fence);
    // Without checksums nobody can tell.
    let torn = tear(&pmem, end.payload);
    assert_eq!(walk(&torn, &end, Seq(0)), (1, false));
}

/// The flag is durable before the first kset that needs it, which is the first store to a segment.
#[test]
fn an_older_cache_gets_the_new_features_unless_its_superblock_cannot_be_changed() {
    // It has all features but this one.
    let image = &IMAGES[2];
    for lost in [None, Some(PmemOff(0)), Some(PmemOff(32 << 10))] {
        let pmem = SimPmem::from_image(image.load());
        assert_eq!(superblock_of(&pmem).features_incompat, 0);
        lost.inspect(|off| pmem.poison(*off));
        let runs = BackgroundRuns::InDrains;
        let mut plain =
            Plain::new(pmem.clone(), image.base_content(), image.options(), runs).unwrap();
        let features = lost.map_or(FEATURES_INCOMPAT, |_| 0);
        let stored = SimPmem::from_image(pmem.durable_image());
        assert_eq!(superblock_of(&stored).features_incompat, features);
        assert!(plain.drain());
        // Reclaiming.
        (0..1000).for_each(|_| plain.poll_background());
        // What has no payload needs no fence for it, and no flag.
        assert_eq!(plain.run(0, Op::Unmap, 9, 1), Status::Success);
        assert_eq!(end_of_log(&pmem).ksets.last().unwrap().proof, Proof::Fence);
        let buf = IovBuf::new(&[7; 512], &[]);
        let status = plain.run(0, Op::Write(buf.cursor(), Fua::No), 3, 1);
        assert_eq!(status, Status::Success);
        let proof = end_of_log(&pmem).ksets.last().unwrap().proof;
        assert_eq!(proof == Proof::Checksums, lost.is_none());
    }
}

/// The device at each fence of some writes, as a kill there leaves it.
fn kills() -> Vec<SimPmem> {
    let pmem = SimPmem::new(setup().device_size_bytes());
    let mut plain = start(pmem.clone());
    let ((), kills) = pmem.at_fences(SimState::killed, || {
        for (number, len_bytes) in (1..).zip([PAGE, PAGE + 512, 512, 3 * PAGE, PAGE]) {
            write(&mut plain, number, number as u8, len_bytes);
        }
    });
    // Those of payloads that are more than one page are fenced before.
    assert_eq!(kills.len(), 7);
    kills
}

/// What the first pages read as.
fn content(plain: &mut Plain<SimPmem>) -> Vec<(Status, Vec<u8>)> {
    (0..8).map(|page| plain.read(0, page * 8, 8)).collect()
}

/// INV-LOG-12.
#[test]
fn what_a_start_has_found_after_a_kill_is_there_after_a_cut() {
    let mut most = 0;
    for pmem in kills() {
        let durable = |state: &SimState| state.durable().to_vec();
        let (mut plain, cuts) = pmem.at_fences(durable, || start(pmem.clone()));
        let dirty_bytes = plain.cache.info().dirty_bytes;
        let before = content(&mut plain);
        let cut = SimPmem::from_image(pmem.durable_image());
        let mut plain = start(cut);
        assert_eq!(plain.cache.info().dirty_bytes, dirty_bytes);
        assert_eq!(content(&mut plain), before);
        most = dirty_bytes.max(most);
        // The start may be cut short.
        assert!(cuts.len() > 2);
        for image in cuts {
            let found = start(SimPmem::from_image(image)).cache.info().dirty_bytes;
            assert!(found <= dirty_bytes);
        }
    }
    // At the fence of the last kset all of it was stored.
    assert_eq!(most, 6 * PAGE as u64 + 1024);
}

/// The same where the segment can be neither sealed nor freed: a dirty tail passes what is in it all the same.
#[test]
fn what_was_written_back_after_a_kill_is_not_taken_back_by_a_cut() {
    for pmem in kills() {
        let segment = end_of_log(&pmem).segment;
        let info_off = superblock_of(&pmem).geometry.segment_off(segment);
        pmem.poison(info_off);
        let mut plain = start(pmem.clone());
        let before = content(&mut plain);
        assert!(plain.drain());
        let cut = SimPmem::from_image(pmem.durable_image());
        cut.poison(info_off);
        let mut plain = start_over(cut, plain.base.clone());
        assert_eq!(content(&mut plain), before);
    }
}
