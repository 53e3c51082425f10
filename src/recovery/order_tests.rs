//! What recovery makes of a log does not depend on who meets its keys in which order: it is what applying them one by
//! one, in the order of their seqs, makes of it.

use super::{OpenError, Opening, Work};
use crate::engine::{Cache, FormatPolicy};
use crate::index::BlockMap;
use crate::media::{
    Checksums, Geometry, KEYS_START_BYTES, Key, KeyKind, KsetBuilder, Proof, Sealed, SegmentInfo,
    Superblock, Tails, kset_size_bytes,
};
use crate::pmem::Pmem;
use crate::sim::image::ImagePmem;
use crate::sim::machine::Setup;
use crate::sim::prng::Prng;
use crate::sim::recover::{self, Crew};
use crate::units::{Agent, Epoch, Lba, PmemOff, SegId, Seq};
use std::collections::BTreeMap;
use std::sync::Arc;

const AGENT: Agent = Agent(9);
const SEGMENT_COUNT: u64 = 8;

/// A kset of a log, and where it lies.
struct Written {
    segment: SegId,
    seq: Seq,
    keys: Vec<Key>,
}

/// Media with a log that nobody needs to have written.
struct Log {
    setup: Setup,
    pmem: ImagePmem,
    geometry: Geometry,
    checksums: Checksums,
    tails: Tails,
    ksets: Vec<Written>,
}

impl Log {
    fn new(setup: Setup) -> Self {
        let device = vec![0; setup.device_size_bytes() as usize];
        let pmem = ImagePmem::new(device);
        drop(open(&setup, Crew::ALONE, pmem.clone()).unwrap());
        let superblock: Superblock = recover::superblock_of(&pmem);
        let checksums = Checksums::new(superblock.uuid);
        let (mut tails, _) = Tails::load(&pmem, &checksums).unwrap();
        tails.witness.iter_mut().for_each(|w| w.len_blocks = 0);
        Self {
            setup,
            pmem,
            geometry: superblock.geometry,
            checksums,
            tails,
            ksets: Vec::new(),
        }
    }

    /// Writes ksets with these seqs into a segment; returns the offset of the last one.
    fn fill(&mut self, segment: SegId, seqs: &[Seq], prng: &mut Prng) -> PmemOff {
        let start = self.geometry.segment_off(segment);
        let seed = self.checksums.kset(segment.0, 1);
        let (mut builder, mut off, mut last) = (KsetBuilder::default(), KEYS_START_BYTES, start);
        for (number, seq) in (0..).zip(seqs) {
            let keys: Vec<Key> = (0..prng.between(1, 5)).map(|_| self.key(prng)).collect();
            builder.clear();
            for key in &keys {
                builder.push(key, self.geometry.block_shift());
            }
            last = start.plus(u64::from(off));
            let bytes = builder.finish(seed, number, *seq, Epoch(seq.0 / 4), Proof::Fence);
            self.pmem.store(AGENT, last, bytes);
            off += kset_size_bytes(keys.len()) as u32;
            self.ksets.push(Written {
                segment,
                seq: *seq,
                keys,
            });
        }
        last
    }

    fn key(&self, prng: &mut Prng) -> Key {
        let per_page = u64::from(self.geometry.blocks_per_page());
        let kind = prng.pick(&[
            KeyKind::Data,
            KeyKind::Data,
            KeyKind::Data,
            KeyKind::Fill,
            KeyKind::Zeroes,
            KeyKind::Unmap,
        ]);
        // Few pages, so that keys meet; whole ones and parts.
        let page = prng.below(6) * per_page;
        let somewhere = prng.below(per_page);
        let first = prng.pick(&[0, somewhere]);
        let room = if kind.has_payload() {
            per_page - first
        } else {
            4 * per_page
        };
        let less = prng.between(1, room);
        let len_blocks = prng.pick(&[room, less]);
        // The last page of the segment holds all payloads.
        let payload_off = match kind.has_payload() {
            true => 12288 + self.geometry.bytes(prng.below(per_page - len_blocks + 1)) as u32,
            false => 0,
        };
        Key {
            lba: Lba(page + first),
            len_blocks: len_blocks as u32,
            kind,
            payload_off,
            crc: 0,
        }
    }

    /// Seals a segment, and takes the checksum of its last kset away.
    fn damage(&mut self, segment: SegId, last_kset: PmemOff, kset_count: u32, last_seq: Seq) {
        let (mut info, _) =
            SegmentInfo::load(&self.pmem, &self.geometry, &self.checksums, segment).unwrap();
        info.sealed = Some(Sealed {
            kset_count,
            last_seq,
        });
        let (geometry, checksums) = (&self.geometry, &self.checksums);
        drop(info.persist(&self.pmem, AGENT, geometry, checksums, segment));
        self.pmem.store(AGENT, last_kset, &[0xff; 64]);
        // The base holds all of it, so that it counts for nothing, and nothing older does.
        self.ksets.retain(|kset| kset.segment != segment);
        self.tails.dirty_tail = self.tails.dirty_tail.max(last_seq);
    }

    /// What every block is, by the book; and how many bytes are dirty.
    fn expected(&self, key_tail: Seq) -> (BTreeMap<u64, BlockMap>, u64) {
        let (mut blocks, mut dirty_bytes) = (BTreeMap::new(), 0);
        let mut ksets: Vec<_> = self.ksets.iter().filter(|k| k.seq > key_tail).collect();
        ksets.sort_by_key(|kset| kset.seq);
        for kset in ksets {
            for key in &kset.keys {
                let place = self.geometry.place(kset.segment, key.payload_off);
                for number in 0..u64::from(key.len_blocks) {
                    let map = if key.kind.has_payload() {
                        BlockMap::Mapped(crate::media::Place(place.0 + number))
                    } else {
                        BlockMap::Zero(place)
                    };
                    blocks.insert(key.lba.0 + number, map);
                }
                if kset.seq > self.tails.dirty_tail && key.kind == KeyKind::Data {
                    dirty_bytes += self.geometry.bytes(u64::from(key.len_blocks));
                }
            }
        }
        (blocks, dirty_bytes)
    }
}

fn open(setup: &Setup, crew: Crew, pmem: ImagePmem) -> Result<Arc<Cache<ImagePmem>>, OpenError> {
    const ZEROES: [u8; 4096] = [0; 4096];
    let size = u64::from(setup.block_size_bytes);
    let options = setup.options(FormatPolicy::Auto);
    recover::open_by(crew, pmem, options, |_, len| {
        &ZEROES[..(len * size) as usize]
    })
}

/// A log of some segments with interleaved seqs; one segment may be damaged and on the base.
fn log_of(seed: u64) -> (Log, Seq) {
    let mut prng = Prng::new(seed);
    let block_size_bytes = prng.pick(&[512, 512, 4096]);
    let setup = Setup {
        block_size_bytes,
        block_count: 12 * 4096 / u64::from(block_size_bytes),
        segment_count: SEGMENT_COUNT,
        ..Setup::default()
    };
    let mut log = Log::new(setup);
    let mut seqs = vec![Vec::new(); SEGMENT_COUNT as usize];
    let seq_max = prng.between(5, 60);
    for seq in (1..=seq_max).map(Seq) {
        // A number may be missing.
        if !prng.percent(10) {
            seqs[prng.below(SEGMENT_COUNT - 2) as usize].push(seq);
        }
    }
    log.tails.dirty_tail = Seq(prng.below(seq_max));
    log.tails.key_tail = Seq(prng.below(log.tails.dirty_tail.0 + 1));
    let mut key_tail = log.tails.key_tail;
    let damaged = prng.percent(30).then(|| prng.index(seqs.len()));
    for (number, seqs) in seqs.iter().enumerate().filter(|(_, seqs)| !seqs.is_empty()) {
        let (segment, last_seq) = (SegId(number as u32), seqs[seqs.len() - 1]);
        let last_kset = log.fill(segment, seqs, &mut prng);
        if damaged == Some(number) {
            log.damage(segment, last_kset, seqs.len() as u32, last_seq);
            key_tail = key_tail.max(last_seq);
        }
    }
    drop(log.tails.persist(&log.pmem, AGENT, &log.checksums));
    (log, key_tail)
}

fn check(log: &Log, key_tail: Seq, cache: &Cache<ImagePmem>, what: &str) {
    cache.check_invariants();
    let (blocks, dirty_bytes) = log.expected(key_tail);
    for lba in (0..log.setup.block_count).map(Lba) {
        let page = log.geometry.page_of(lba);
        let found = cache.index.lookup(cache.index.locate(page)).unwrap();
        let block = (lba.0 - log.geometry.page_start(page).0) as u32;
        let expected = blocks.get(&lba.0).copied().unwrap_or(BlockMap::Absent);
        assert_eq!(found.map.block(block), expected, "{lba}, {what}");
    }
    assert_eq!(cache.info().dirty_bytes, dirty_bytes, "{what}");
}

/// INV-OPEN-6.
#[test]
fn keys_take_effect_in_the_order_of_seq_however_many_workers_meet_them() {
    let mut damaged = 0;
    for seed in 0..600 {
        let (log, key_tail) = log_of(seed);
        damaged += u32::from(key_tail != log.tails.key_tail);
        let bytes = log.pmem.bytes();
        for worker_count in 1..=4 {
            let crew = Crew {
                worker_count,
                yield_percent: 20,
                seed,
            };
            let cache = open(&log.setup, crew, ImagePmem::new(bytes.clone())).unwrap();
            check(&log, key_tail, &cache, &format!("seed {seed}, {crew:?}"));
        }
    }
    assert!(damaged > 20, "{damaged}");
}

#[test]
#[expect(clippy::disallowed_methods, reason = "it is about threads")]
fn threads_that_recover_together_find_the_same() {
    for seed in 0..40 {
        let (log, key_tail) = log_of(seed);
        let image = ImagePmem::new(log.pmem.bytes());
        let mut opening = Opening::begin(image, log.setup.options(FormatPolicy::Auto)).unwrap();
        let workers: Vec<_> = (0..3).map(|_| opening.worker()).collect();
        let threads = workers
            .into_iter()
            .map(|mut worker| std::thread::spawn(move || while worker.work() != Work::Over {}));
        let threads: Vec<_> = threads.collect();
        while opening.poll().unwrap() != super::OpenStep::Ready {}
        let progress = opening.recovery().unwrap();
        assert_eq!(progress.segments_scanned, progress.segments_total);
        let cache = opening.finish();
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        check(&log, key_tail, &cache, &format!("seed {seed}"));
    }
}

#[test]
fn an_opening_that_is_given_up_sends_its_workers_home() {
    let (log, _) = log_of(1);
    let image = ImagePmem::new(log.pmem.bytes());
    let mut opening = Opening::begin(image, log.setup.options(FormatPolicy::Auto)).unwrap();
    let mut worker = opening.worker();
    assert_eq!(worker.work(), Work::Done);
    drop(opening);
    // What it has begun it ends.
    while worker.work() == Work::Done {}
    assert_eq!(worker.work(), Work::Over);
}
