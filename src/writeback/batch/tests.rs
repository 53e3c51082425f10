use super::*;
use crate::engine::ZeroesWent;
use crate::engine::invariant_tests::{new_cache, new_cache_of};
use crate::media::{CLEAR_SIZE_MAX_BYTES, Key};
use crate::sim::machine::Setup;
use crate::sim::pmem::SimPmem;
use std::collections::VecDeque;

const LOAD_MAX: Load = Load {
    data_bytes: 1 << 20,
    cleared_bytes: 32 << 20,
};

fn start(
    batch: &mut Batch,
    cache: &Cache<SimPmem>,
    load_max: Load,
    out: &mut Outbox,
) -> Option<Load> {
    let (tails, manners) = (Tails::empty(), Manners::Full);
    batch.start_ops(cache, &tails, manners, load_max, Now(0), out)
}

/// Neighbouring keys of the largest size.
fn clearing(kind: KeyKind, key_count: u64) -> Batch {
    let mut batch = Batch::new(key_count as usize).unwrap();
    let len_blocks = CLEAR_SIZE_MAX_BYTES / 512;
    for number in 0..key_count {
        let key = Key {
            lba: Lba(number * len_blocks),
            len_blocks: len_blocks as u32,
            kind,
            payload_off: 0,
            crc: 0,
        };
        batch.overlay.push(&key, PmemOff(0), 9);
    }
    batch.overlay.sort_now();
    batch.rewind();
    batch
}

#[test]
fn one_operation_and_all_under_way_clear_no_more_than_is_good() {
    const KEY_COUNT: u64 = 600;
    let setup = Setup {
        block_count: KEY_COUNT * CLEAR_SIZE_MAX_BYTES / 512,
        ..Setup::default()
    };
    let cache = new_cache_of(&setup);
    // The base unmaps itself, and has not shown that it zeroes.
    for (kind, op_max, in_flight_max) in [
        (KeyKind::Unmap, 32 << 20, 1 << 30),
        (KeyKind::Zeroes, 1 << 20, 32 << 20),
    ] {
        let mut batch = clearing(kind, KEY_COUNT);
        let (mut under_way, mut end, mut out) = (VecDeque::new(), 0, Outbox::new());
        loop {
            out.clear();
            let started = start(&mut batch, &cache, LOAD_MAX, &mut out);
            let mut bytes = 0;
            for request in &out.base {
                assert_eq!(request.lba.0, end, "one behind the other");
                end += request.len_blocks;
                let len_bytes = request.len_blocks * 512;
                assert!(len_bytes <= op_max, "{kind:?} of {len_bytes} bytes");
                bytes += len_bytes;
                under_way.push_back((request.op, len_bytes));
            }
            assert!(bytes <= op_max, "one poll starts {bytes} bytes");
            if started.is_some() {
                continue;
            }
            // The base has as much as it may have, or all that is left.
            let in_flight: u64 = under_way.iter().map(|(_, bytes)| bytes).sum();
            let is_handed_out = batch.is_handed_out();
            assert!(in_flight == in_flight_max || is_handed_out && in_flight < in_flight_max);
            let Some((op, _)) = under_way.pop_front() else {
                break;
            };
            let failed = Err(BaseError::Gone);
            if kind == KeyKind::Zeroes {
                // One that fails shows nothing, and comes again.
                assert_eq!(batch.on_done(op, failed, Now(0)), Some(BaseError::Gone));
                batch.failed = false;
                let again = start(&mut batch, &cache, LOAD_MAX, &mut Outbox::new());
                assert_eq!(again.map(|load| load.cleared_bytes), Some(0));
                batch.clearing_base.zeroes_went = ZeroesWent::AsData;
            }
            assert_eq!(batch.on_done(op, Ok(()), Now(0)), None);
        }
        assert_eq!(end, setup.block_count);
        let all = KEY_COUNT * CLEAR_SIZE_MAX_BYTES;
        let mut written = Load::NOTHING;
        match kind {
            KeyKind::Unmap => written.cleared_bytes = all,
            _ => written.data_bytes = all,
        }
        assert_eq!((batch.written, batch.written_bytes), (written, 0));
    }
}

#[test]
fn many_keys_below_a_newer_one_are_looked_at_over_several_polls() {
    const COUNT: usize = 10 * KEYS_LOOKED_AT_PER_POLL;
    let cache = new_cache();
    let mut batch = Batch::new(COUNT + 1).unwrap();
    let key = |lba, len_blocks| Key {
        lba: Lba(lba),
        len_blocks,
        kind: KeyKind::Unmap,
        payload_off: 0,
        crc: 0,
    };
    for lba in 0..COUNT {
        batch.overlay.push(&key(lba as u64, 1), PmemOff(0), 9);
    }
    batch.overlay.push(&key(0, COUNT as u32), PmemOff(0), 9);
    batch.overlay.sort_now();
    batch.rewind();
    assert!(batch.has_ops && !batch.is_handed_out());
    let mut out = Outbox::new();
    for _ in 0..10 {
        assert!(out.base.is_empty() && !batch.is_done());
        // There is more to do, and nothing was started.
        let started = start(&mut batch, &cache, LOAD_MAX, &mut out);
        assert_eq!(started.map(|load| load.cleared_bytes), Some(0));
    }
    start(&mut batch, &cache, LOAD_MAX, &mut out);
    assert_eq!(out.base.len(), 1);
    assert_eq!(out.base[0].len_blocks, COUNT as u64);
    assert!(batch.is_handed_out());
}

#[test]
fn a_poll_puts_some_pieces_together_that_clear_neighbouring_blocks() {
    const COUNT: u64 = 1000;
    let cache = new_cache();
    let mut batch = Batch::new(COUNT as usize).unwrap();
    for lba in 0..COUNT {
        let key = Key {
            lba: Lba(lba),
            len_blocks: 1,
            kind: KeyKind::Zeroes,
            payload_off: 0,
            crc: 0,
        };
        batch.overlay.push(&key, PmemOff(0), 9);
    }
    batch.overlay.sort_now();
    batch.rewind();
    let (mut cleared, mut out) = (0, Outbox::new());
    while cleared < COUNT {
        out.clear();
        let started = start(&mut batch, &cache, LOAD_MAX, &mut out).expect("some are left");
        assert_eq!(started.cleared_bytes, 0, "it has not shown that it clears");
        let pieces: u64 = out.base.iter().map(|request| request.len_blocks).sum();
        assert!(pieces <= (PIECES_PER_POLL + PIECES_CLEARED_MAX) as u64);
        assert!(out.base.iter().all(|request| request.lba.0 >= cleared));
        cleared += pieces;
    }
    assert_eq!(cleared, COUNT);
}
