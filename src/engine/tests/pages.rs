//! Pages that reads touch, and those that they miss, are counted exactly.

use super::*;
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::units::{Lba, Now};
use std::collections::BTreeSet;

fn plain(block_size: u32, background_runs: BackgroundRuns) -> Plain<SimPmem> {
    let base = vec![0; BLOCKS as usize * block_size as usize];
    let pmem = SimPmem::new(DEVICE_SIZE_BYTES);
    Plain::new(pmem, base, options(block_size, None), background_runs).unwrap()
}

fn write(plain: &mut Plain<SimPmem>, block_size: u32, lba: u64, len_blocks: u64) {
    let bytes = vec![0x5a; len_blocks as usize * block_size as usize];
    let buf = crate::pmem::IovBuf::new(&bytes, &[]);
    let status = plain.run(0, Op::Write(buf.cursor(), Fua::No), lba, len_blocks);
    assert_eq!(status, Status::Success);
}

fn counted(plain: &Plain<SimPmem>) -> (u64, u64) {
    let stats = plain.cache.stats();
    (stats.read_pages, stats.read_missed_pages)
}

#[test]
fn a_page_with_several_holes_is_missed_once() {
    let mut plain = plain(512, BackgroundRuns::InDrains);
    // Of the second page blocks 1, 3 and 6 are cached, the third wholly.
    for lba in [9, 11, 14] {
        write(&mut plain, 512, lba, 1);
    }
    write(&mut plain, 512, 16, 8);
    plain.read(0, 8, 16);
    assert_eq!(counted(&plain), (2, 1));
    // Only the cached block of it is asked for; of the first page the last one, which is missing.
    plain.read(0, 7, 1);
    plain.read(0, 9, 1);
    assert_eq!(counted(&plain), (4, 2));
    plain.cache.reset_stats();
    assert_eq!(counted(&plain), (0, 0));
}

#[test]
fn a_lent_read_hits_all_its_pages() {
    let mut plain = plain(512, BackgroundRuns::InDrains);
    write(&mut plain, 512, 4, 16);
    assert!(matches!(plain.run(0, Op::Lend, 6, 12), Status::Lent(_)));
    assert_eq!(counted(&plain), (3, 0));
    // Those that are answered by a copy in the end count when they are.
    assert_eq!(plain.run(0, Op::Lend, 0, 8), Status::NotLent);
    assert_eq!(counted(&plain), (3, 0));
}

#[test]
fn a_read_that_joins_another_misses_as_well() {
    let mut plain = plain(512, BackgroundRuns::InDrains);
    let bufs = [0, 1].map(|_| crate::pmem::IovBuf::zeroed(8 * 512));
    for (token, buf) in bufs.iter().enumerate() {
        let io = HostIo {
            token: IoToken(token as u64),
            op: Op::Read(buf.cursor()),
            lba: Lba(4),
            len_blocks: 8,
        };
        plain.channel_mut(0).submit(io).unwrap();
    }
    let mut out = Outbox::new();
    plain.channel_mut(0).poll(Now(1), &mut out);
    assert_eq!(out.base.len(), 1, "the second has joined the first");
    let op = out.base[0].op;
    plain.channel_mut(0).on_base_done(op, Ok(()));
    out.clear();
    while out.completions.len() < 2 {
        plain.channel_mut(0).poll(Now(2), &mut out);
    }
    assert_eq!(counted(&plain), (4, 4));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn pages_are_counted_as_a_look_at_the_base_tells(
        steps in prop::collection::vec((extent(31), any::<bool>()), 1..200),
        block_size in prop_oneof![Just(512u32), Just(4096)],
    ) {
        let per_page = 4096 / u64::from(block_size);
        let mut plain = plain(block_size, BackgroundRuns::Always);
        for ((lba, len), reads) in steps {
            let before = counted(&plain);
            let mut expected = (0, 0);
            if reads {
                plain.missed.clear();
                plain.read(0, lba, len);
                expected.0 = (lba + len - 1) / per_page + 1 - lba / per_page;
                let missed: BTreeSet<u64> = plain.missed.iter().map(|lba| lba / per_page).collect();
                expected.1 = missed.len() as u64;
            } else {
                write(&mut plain, block_size, lba, len.min((16 << 10) / u64::from(block_size)));
            }
            let now = counted(&plain);
            prop_assert_eq!((now.0 - before.0, now.1 - before.1), expected);
        }
    }
}
