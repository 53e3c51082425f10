use super::*;
use crate::engine::invariant_tests::new_cache_of;
use crate::engine::{Cache, DataCrc, Fua, HostIo, IoToken, Op, Outbox, Status};
use crate::index::BlockMap;
use crate::pmem::IovBuf;
use crate::sim::machine::Setup;
use crate::sim::pmem::SimPmem;
use crate::units::{PAGE_SIZE_BYTES, PmemOff};
use crate::writeback::log::LogReader;
use crate::writeback::next::Hurry;
use std::sync::Arc;

const PAGE_BLOCKS: u64 = 8;
const PAGES: u64 = 1000;

fn new_cache() -> Arc<Cache<SimPmem>> {
    new_cache_of(&Setup {
        block_size_bytes: 512,
        block_count: 4 * PAGES * PAGE_BLOCKS,
        segment_size_bytes: 1 << 20,
        segment_count: 12,
        data_crc: DataCrc::On,
        ..Setup::default()
    })
}

/// Writes each page once; no two of them are neighbours.
fn write_pages(cache: &Arc<Cache<SimPmem>>) {
    let mut channel = cache.channel().expect("the last one is gone");
    let (buf, mut out) = (
        IovBuf::new(&[7; PAGE_SIZE_BYTES as usize], &[]),
        Outbox::new(),
    );
    for page in 0..PAGES {
        let io = HostIo {
            token: IoToken(1),
            op: Op::Write(buf.cursor(), Fua::No),
            lba: Lba(lba_of(page)),
            len_blocks: PAGE_BLOCKS,
        };
        channel.submit(io).expect("the table is empty");
        out.clear();
        channel.poll(Now(0), &mut out);
        assert_eq!(out.completions[0].status, Status::Success);
    }
}

fn lba_of(page: u64) -> u64 {
    (1 + 2 * page) * PAGE_BLOCKS
}

/// Damages a payload that lies where the index says.
fn flip(cache: &Cache<SimPmem>, page: u64) {
    let at = cache
        .index
        .locate(cache.geometry.page_of(Lba(lba_of(page))));
    let found = cache.index.lookup(at).expect("nobody changes it");
    let BlockMap::Mapped(place) = found.map.block(0) else {
        panic!("page {page} is not there");
    };
    let PmemOff(off) = cache.geometry.place_off(place);
    cache.pmem.flip_bit(PmemOff(off + 1000), 2);
}

/// Takes a part from the log. Returns how many pieces it has.
fn gather(next: &mut Next, log: &mut LogReader, cache: &Cache<SimPmem>) -> usize {
    for _ in 0..100_000 {
        if next.is_dry() {
            let settled = loop {
                if let Some(settled) = log.look(cache).expect("no key is lost") {
                    break settled;
                }
            };
            next.extend(settled);
        }
        let counters = cache.background_counters();
        next.go_on(cache, counters, log, Hurry::Yes)
            .expect("no key is lost");
        assert!(!next.is_damaged(), "{:?}", next.lost.blocks());
        if next.is_ready() {
            return next.overlay.key_count();
        }
    }
    panic!("it gets nowhere: {next:?}");
}

/// All of it is overwritten by what comes later in the same batch, and there is more of it than is kept in mind.
#[test]
fn a_part_that_meets_more_damage_than_it_can_keep_in_mind_becomes_narrower() {
    // As if the first part had ended there; or as if it had been all of a salvage, with which the batch catches up.
    becomes_narrower(Lba(PAGE_BLOCKS), CatchesUp::No);
    becomes_narrower(Lba(0), CatchesUp::Yes);
}

#[derive(PartialEq)]
enum CatchesUp {
    No,
    Yes,
}

fn becomes_narrower(first: Lba, catches_up: CatchesUp) {
    let cache = new_cache();
    write_pages(&cache);
    (0..PAGES).for_each(|page| flip(&cache, page));
    write_pages(&cache);
    let last_seq = Seq(cache.seq_next().0 - 1);
    let key_count = 3 * PAGES as usize;
    let mut next = Next::new(key_count).expect("there is memory");
    let mut log = LogReader::new(cache.segments.count()).expect("there is memory");
    next.limits.room = key_count;
    let part = Part {
        last_seq: Some(last_seq),
        catches_up: catches_up == CatchesUp::Yes,
    };
    let (mut from, mut pieces, mut parts) = (first, 0, 0);
    loop {
        next.begin_part(part, from, Stage::Ordinary, Now(0));
        log.restart_after(Seq(0));
        pieces += gather(&mut next, &mut log, &cache);
        parts += 1;
        assert_eq!(next.taken.last_seq, Some(last_seq));
        let Some(behind) = next.overlay.next_part() else {
            break;
        };
        assert!(from < behind);
        from = behind;
    }
    assert_eq!(pieces as u64, PAGES, "each page is in one part");
    assert!((2..200).contains(&parts), "{parts} parts");
}
