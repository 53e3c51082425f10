//! Whether the source of an operation is lost is looked at with care.

use super::*;
use crate::engine::invariant_tests::new_cache;
use crate::media::Key;

const BLOCKS_PER_OP: u32 = 4;

/// A batch of separate writes, all of them under way, and where the source of each lies.
fn begun(cache: &Cache<crate::sim::pmem::SimPmem>, count: u64) -> (Batch, Vec<PmemOff>) {
    let mut batch = Batch::new(count as usize).unwrap();
    let source = |number: u64| PmemOff((1 << 16) + number * 4096);
    for number in 0..count {
        let key = Key {
            lba: Lba(number * 8),
            len_blocks: BLOCKS_PER_OP,
            kind: KeyKind::Data,
            payload_off: 0,
            crc: 0,
        };
        batch.overlay.push(&key, source(number), 9);
    }
    batch.overlay.sort_now();
    batch.rewind();
    let (tails, load_max) = (
        Tails::empty(),
        Load {
            data_bytes: 1 << 20,
            cleared_bytes: 1 << 20,
        },
    );
    let mut out = Outbox::new();
    while batch
        .start_ops(cache, &tails, Manners::Full, load_max, Now(0), &mut out)
        .is_some()
    {}
    assert_eq!(batch.in_flight() as u64, count);
    (batch, (0..count).map(source).collect())
}

/// Of the operation that writes to here.
fn number_of(batch: &Batch, lba: u64) -> BaseOpId {
    let number = batch
        .ops
        .iter()
        .position(|op| op.lba == Lba(lba) && op.is_in_flight);
    BaseOpId(number.expect("it is under way") as u32)
}

#[test]
fn an_outage_of_the_base_reads_one_source_in_each_poll() {
    let cache = new_cache();
    let (mut batch, sources) = begun(&cache, 3);
    let numbers = [0, 1, 2].map(|number| number_of(&batch, number * 8));
    cache.pmem.poison(sources[1]);
    let fail = |batch: &mut Batch, number: BaseOpId, error| {
        assert_eq!(batch.on_done(number, Err(error), Now(0)), Some(error));
        batch.look_for_cause(&cache, number, error)
    };
    // Only one of these can come from the memory.
    assert!(!fail(&mut batch, numbers[1], BaseError::Gone));
    assert!(!batch.looked_for_cause);
    assert!(!fail(&mut batch, numbers[0], BaseError::Io));
    assert!(batch.looked_for_cause);
    assert!(!batch.look_for_cause(&cache, numbers[1], BaseError::Io));
    assert!(!batch.source_lost, "another was looked at in this poll");
    // The next poll.
    batch.looked_for_cause = false;
    assert!(batch.look_for_cause(&cache, numbers[1], BaseError::Io));
    assert!(batch.source_lost);
}
