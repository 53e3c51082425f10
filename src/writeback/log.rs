//! Reads the log from the dirty tail on: the ksets of all segments, in the order of their sequence numbers.

use super::overlay::Overlay;
use crate::engine::{Cache, DataCrc, SegmentState, WritebackOrder};
use crate::media::{KEYS_START_BYTES, Key, KeyKind, Kset, KsetContext, KsetError, KsetReader};
use crate::pmem::Pmem;
use crate::units::{Epoch, PAGE_SIZE_BYTES, SegId, Seq};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Payload of a batch; one kset may go beyond.
const BATCH_BYTES_MAX: u64 = 16 << 20;
/// Keys of a batch.
const BATCH_KEYS_MAX: usize = 16 << 10;

/// Why the log cannot be read on.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub(crate) enum LogStop {
    /// A kset that was there is not any more.
    #[error("kset {kset_index} of segment {segment} is damaged: {error}; write-back stands still")]
    Kset {
        segment: u32,
        kset_index: u32,
        error: KsetError,
    },
    /// The payload of a dirty key is damaged.
    #[error(
        "the payload of block {lba} in segment {segment} is damaged: its checksum is {found:#x}, not {expected:#x}; write-back stands still"
    )]
    Payload {
        segment: u32,
        lba: u64,
        expected: u32,
        found: u32,
    },
    /// The payload of a dirty key cannot be read.
    #[error(
        "the payload of block {lba} in segment {segment} cannot be read; write-back stands still"
    )]
    Poisoned { segment: u32, lba: u64 },
}

/// The next kset to take of a segment.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    off: u32,
    kset_index: u32,
}

/// What was taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    pub(super) last_seq: Seq,
    pub(super) dirty_bytes: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct LogReader {
    /// For each segment.
    cursors: Vec<Cursor>,
    /// Segments with a kset to take, lowest sequence number first.
    ready: BinaryHeap<Reverse<(Seq, u32)>>,
    /// Segments that may get more.
    watched: Vec<SegId>,
    reader: KsetReader,
    keys: Vec<Key>,
    epoch: Epoch,
    batch_end: Option<Seq>,
    payload: Vec<u8>,
}

impl LogReader {
    pub(super) fn new(segment_count: usize) -> Self {
        let start = Cursor {
            off: KEYS_START_BYTES,
            kset_index: 0,
        };
        Self {
            cursors: vec![start; segment_count],
            ready: BinaryHeap::with_capacity(segment_count),
            watched: Vec::with_capacity(segment_count),
            reader: KsetReader::default(),
            keys: Vec::with_capacity(crate::media::KSET_KEYS_MAX),
            epoch: Epoch(0),
            batch_end: None,
            payload: vec![0; PAGE_SIZE_BYTES as usize],
        }
    }

    /// Whether there is anything to write back below `seq`.
    pub(super) fn has_below(&self, seq: Seq) -> bool {
        self.ready
            .peek()
            .is_some_and(|Reverse((next, _))| *next < seq)
    }

    /// The last number of the batch that was taken and has not ended.
    pub(super) fn batch_end(&self) -> Option<Seq> {
        self.batch_end
    }

    pub(super) fn end_batch(&mut self) {
        self.batch_end = None;
    }

    /// Looks for ksets that have come since.
    pub(super) fn refresh<P: Pmem>(&mut self, cache: &Cache<P>) -> Result<(), LogStop> {
        while let Some(id) = cache.segments.next_opened() {
            self.cursors[id.index()] = Cursor {
                off: KEYS_START_BYTES,
                kset_index: 0,
            };
            self.watched.push(id);
        }
        let mut at = 0;
        while at < self.watched.len() {
            let id = self.watched[at];
            // The state is read before the end: a segment that is sealed now gets no more.
            let open = cache.segments.get(id).state() == SegmentState::Open;
            if self.peek(cache, id)? || !open {
                self.watched.swap_remove(at);
            } else {
                at += 1;
            }
        }
        Ok(())
    }

    /// Puts a segment among the ready ones if it has a kset to take. Those that the tail has passed already
    /// are left behind.
    fn peek<P: Pmem>(&mut self, cache: &Cache<P>, id: SegId) -> Result<bool, LogStop> {
        let dirty_tail = cache.dirty_tail();
        while self.cursors[id.index()].off < cache.segments.get(id).key_end() {
            self.keys.clear();
            let kset = self.read(cache, id)?;
            if kset.seq > dirty_tail {
                self.ready.push(Reverse((kset.seq, id.0)));
                return Ok(true);
            }
            self.epoch = self.epoch.max(kset.epoch);
            self.advance(id, &kset);
        }
        Ok(false)
    }

    /// Reads the kset at a segment's cursor; its keys are pushed on `keys`.
    fn read<P: Pmem>(&mut self, cache: &Cache<P>, id: SegId) -> Result<Kset, LogStop> {
        let cursor = self.cursors[id.index()];
        let generation = cache.segments.get(id).generation();
        let context = KsetContext::new(
            &cache.geometry,
            cache.base.block_count,
            &cache.checksums,
            id,
            generation,
        );
        self.reader
            .read(
                &cache.pmem,
                &context,
                cursor.off,
                cursor.kset_index,
                &mut self.keys,
            )
            .map_err(|error| LogStop::Kset {
                segment: id.0,
                kset_index: cursor.kset_index,
                error,
            })
    }

    fn advance(&mut self, id: SegId, kset: &Kset) {
        let cursor = &mut self.cursors[id.index()];
        cursor.off += kset.size_bytes;
        cursor.kset_index += 1;
    }

    /// Takes ksets below `settled`, in order, as many as make a batch, and lays their keys on `overlay`.
    pub(super) fn take_batch<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        settled: Seq,
        order: WritebackOrder,
        overlay: &mut Overlay,
    ) -> Result<Taken, LogStop> {
        let mut taken = Taken {
            last_seq: cache.dirty_tail(),
            dirty_bytes: 0,
        };
        let (mut bytes, mut dirty) = (0, false);
        while let Some(&Reverse((seq, segment))) = self.ready.peek() {
            if seq >= settled {
                break;
            }
            let id = SegId(segment);
            self.keys.clear();
            let kset = self.read(cache, id)?;
            // Numbers and epochs are drawn apart: a kset with an older epoch behind a newer one was under
            // way while the barrier came, and belongs on either side of it.
            let epoch = self.epoch.max(kset.epoch);
            let crosses = order == WritebackOrder::Strict && epoch > self.epoch && dirty;
            let full = bytes >= BATCH_BYTES_MAX || overlay.key_count() >= BATCH_KEYS_MAX;
            if crosses || full {
                break;
            }
            self.epoch = epoch;
            self.verify_payloads(cache, id)?;
            for key in self.keys.iter().filter(|key| key.kind.is_dirty()) {
                dirty = true;
                let payload = cache
                    .geometry
                    .segment_off(id)
                    .plus(u64::from(key.payload_off));
                overlay.push(key, payload, cache.geometry.block_shift());
                if key.kind == KeyKind::Data {
                    bytes += cache.geometry.bytes(u64::from(key.len_blocks));
                }
            }
            taken.last_seq = seq;
            self.batch_end = Some(seq);
            self.ready.pop();
            self.advance(id, &kset);
            if !self.peek(cache, id)? {
                self.watched.push(id);
            }
        }
        taken.dirty_bytes = bytes;
        Ok(taken)
    }

    /// Damaged data are never written to the base.
    fn verify_payloads<P: Pmem>(&mut self, cache: &Cache<P>, id: SegId) -> Result<(), LogStop> {
        if cache.data_crc == DataCrc::Off {
            return Ok(());
        }
        let generation = cache.segments.get(id).generation();
        let seed = cache.checksums.payload(id.0, generation.0);
        for key in self.keys.iter().filter(|key| key.kind == KeyKind::Data) {
            let bytes = cache.geometry.bytes(u64::from(key.len_blocks)) as usize;
            let off = cache
                .geometry
                .segment_off(id)
                .plus(u64::from(key.payload_off));
            let payload = &mut self.payload[..bytes];
            let (segment, lba) = (id.0, key.lba.0);
            cache
                .pmem
                .read(off, payload)
                .map_err(|_| LogStop::Poisoned { segment, lba })?;
            let found = seed.checksum(payload);
            if found != key.crc {
                return Err(LogStop::Payload {
                    segment,
                    lba,
                    expected: key.crc,
                    found,
                });
            }
        }
        Ok(())
    }
}
