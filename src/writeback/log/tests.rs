use super::*;
use crate::engine::invariant_tests::new_cache_of;
use crate::engine::{Fua, HostIo, IoToken, Op, Outbox, Status};
use crate::media::KEYS_START_BYTES;
use crate::pmem::IovBuf;
use crate::sim::machine::Setup;
use crate::sim::pmem::SimPmem;
use crate::units::Now;
use std::sync::Arc;

const SEGMENTS: u64 = 100;

/// A cache whose log goes through many segments.
fn long_log() -> Arc<Cache<SimPmem>> {
    let cache = new_cache_of(&Setup {
        segment_count: SEGMENTS,
        ..Setup::default()
    });
    let mut channel = cache.channel().expect("the first");
    let (buf, mut out) = (IovBuf::new(&[7; 4096], &[]), Outbox::new());
    while cache.segments.free_count() > 2 {
        let io = HostIo {
            token: IoToken(1),
            op: Op::Write(buf.cursor(), Fua::No),
            lba: Lba(8),
            len_blocks: 8,
        };
        channel.submit(io).expect("the table is empty");
        out.clear();
        channel.poll(Now(0), &mut out);
        assert_eq!(out.completions[0].status, Status::Success);
    }
    cache
}

/// What is taken of the log.
struct Taking {
    log: LogReader,
    limits: Limits,
    taken: Taken,
    overlay: Overlay,
    lost: Lost,
}

impl Taking {
    fn new(cache: &Cache<SimPmem>) -> Self {
        let mut log = LogReader::new(cache.segments.count());
        log.refresh(cache).expect("all can be read");
        Self {
            log,
            limits: Limits {
                settled: cache.seq_settled(),
                bytes: u64::MAX,
                key_count: usize::MAX,
                ..Limits::NONE
            },
            taken: Taken::NOTHING,
            overlay: Overlay::new(10_000),
            lost: Lost::default(),
        }
    }

    fn gather(&mut self, cache: &Cache<SimPmem>) -> Result<Gathered, KeysLost> {
        let batch = Gathering {
            limits: &self.limits,
            taken: &mut self.taken,
            overlay: &mut self.overlay,
            lost: &mut self.lost,
        };
        self.log.gather(cache, cache.background_counters(), batch)
    }

    /// Keys that there is memory for.
    fn capacity(&self) -> usize {
        let at_hand = self.log.next.iter().flatten().map(|next| &next.keys);
        let vectors = at_hand.chain(&self.log.spare).chain([&self.log.looked_at]);
        vectors.map(Vec::capacity).sum()
    }
}

#[test]
fn the_log_is_read_into_memory_that_is_there_from_the_start() {
    let cache = long_log();
    let mut taking = Taking::new(&cache);
    assert_eq!(taking.log.ready.len() as u64, SEGMENTS - 2);
    let capacity = taking.capacity();
    assert!(capacity >= (AT_HAND_MAX + 2) * KSET_KEYS_MAX);
    while taking.gather(&cache).expect("all can be read") == Gathered::InPart {
        assert_eq!(taking.capacity(), capacity);
    }
    assert_eq!(taking.capacity(), capacity);
    assert_eq!(taking.taken.last_seq, Some(Seq(cache.seq_next().0 - 1)));
}

/// INV-WB-1: most segments are ready long before it is their turn.
#[test]
fn a_kset_that_is_lost_before_its_turn_counts_as_lost() {
    let cache = long_log();
    let mut taking = Taking::new(&cache);
    let hit = SegId(50);
    let keys = cache.geometry.segment_off(hit);
    let keys = keys.plus(u64::from(KEYS_START_BYTES));
    cache.pmem.flip_bit(keys, 3);
    let lost = loop {
        match taking.gather(&cache) {
            Ok(gathered) => assert_eq!(gathered, Gathered::InPart),
            Err(KeysLost(id)) => break id,
        }
    };
    assert_eq!(lost, hit);
}
