//! What one segment holds: its info, its ksets in order, and whether they end where they should. Only reads.

use super::error::OpenError;
use crate::canary::{self, Canary};
use crate::media::{
    COUNTER_START_MAX, ChecksumSeed, Checksums, Copies, KEYS_START_BYTES, KSET_KEYS_MAX, Key, Kset,
    KsetContext, KsetError, KsetReader, Proof, SegmentInfo, Superblock, kset_size_bytes,
};
use crate::pmem::PmemRead;
use crate::units::{PAGE_SIZE_BYTES, SegId, Seq};

/// Loads the info of a segment.
pub(crate) fn load_info<P: PmemRead>(
    pmem: &P,
    superblock: &Superblock,
    id: SegId,
) -> Result<(SegmentInfo, Copies), OpenError> {
    let checksums = Checksums::new(superblock.uuid);
    let loaded = SegmentInfo::load(pmem, &superblock.geometry, &checksums, id);
    let (info, copies) = loaded.map_err(|error| OpenError::SegmentInfo {
        segment: id.0,
        error,
    })?;
    let name = |what| format!("the {what} of segment {}", id.0);
    check_counter(info.generation.0, || name("generation"))?;
    check_counter(info.update, || name("update number"))?;
    Ok((info, copies))
}

/// Whether a cache with this counter can be used (INV-OPEN-9).
pub(crate) fn check_counter(value: u64, name: impl FnOnce() -> String) -> Result<(), OpenError> {
    if value <= COUNTER_START_MAX {
        return Ok(());
    }
    let counter = name();
    Err(OpenError::CountedOut { counter, value })
}

/// The memory that walks need. Allocates once.
#[derive(Debug)]
pub(crate) struct WalkBuf {
    reader: KsetReader,
    /// A payload, which lies within a page.
    payload: Box<[u8; PAGE_SIZE_BYTES as usize]>,
    /// Of the kset that was read last.
    pub(crate) keys: Vec<Key>,
}

impl Default for WalkBuf {
    fn default() -> Self {
        Self {
            reader: KsetReader::default(),
            payload: Box::new([0; PAGE_SIZE_BYTES as usize]),
            keys: Vec::with_capacity(KSET_KEYS_MAX),
        }
    }
}

impl WalkBuf {
    /// The kset number `kset_index` at byte `off` of the segment; its keys are in `keys`.
    pub(crate) fn read_kset<P: PmemRead>(
        &mut self,
        pmem: &P,
        context: &KsetContext,
        off: u32,
        kset_index: u32,
    ) -> Result<Kset, KsetError> {
        self.keys.clear();
        (self.reader).read(pmem, context, off, kset_index, &mut self.keys)
    }

    /// The bytes of the kset that was read last.
    pub(crate) fn kset_bytes(&self, kset: &Kset) -> &[u8] {
        self.reader.bytes(kset)
    }
}

/// Goes through the ksets of a segment, up to the first place without one.
#[derive(Debug)]
pub(crate) struct SegmentWalk {
    context: KsetContext,
    payload_seed: ChecksumSeed,
    /// What was written back had been durable.
    dirty_tail: Seq,
    info: SegmentInfo,
    key_end: u32,
    last_kset_off: u32,
    kset_count: u32,
    last_seq: Seq,
    torn_kset_off: Option<u32>,
    stop: Option<KsetError>,
}

impl SegmentWalk {
    pub(crate) fn new(
        superblock: &Superblock,
        dirty_tail: Seq,
        id: SegId,
        info: SegmentInfo,
    ) -> Self {
        let checksums = Checksums::new(superblock.uuid);
        let context = KsetContext::new(
            &superblock.geometry,
            superblock.base.block_count,
            &checksums,
            id,
            info.generation,
        );
        Self {
            context,
            payload_seed: checksums.payload(id.0, info.generation.0),
            dirty_tail,
            info,
            key_end: KEYS_START_BYTES,
            last_kset_off: KEYS_START_BYTES,
            kset_count: 0,
            last_seq: Seq(0),
            torn_kset_off: None,
            stop: None,
        }
    }

    pub(crate) fn segment(&self) -> SegId {
        self.context.segment()
    }

    /// Byte offset behind the last kset that was read.
    pub(crate) fn key_end(&self) -> u32 {
        self.key_end
    }

    /// Byte offset of the last kset that was read.
    pub(crate) fn last_kset_off(&self) -> u32 {
        self.last_kset_off
    }

    /// Byte offset of a kset that ends the walk because its payloads are torn.
    pub(crate) fn torn_kset_off(&self) -> Option<u32> {
        self.torn_kset_off
    }

    /// How many were read.
    pub(crate) fn kset_count(&self) -> u32 {
        self.kset_count
    }

    /// Of the last one; 0 before the first.
    pub(crate) fn last_seq(&self) -> Seq {
        self.last_seq
    }

    /// The next kset; its keys are in `buf`. `None`: that was all.
    pub(crate) fn next<P: PmemRead>(&mut self, pmem: &P, buf: &mut WalkBuf) -> Option<Kset> {
        if self.stop.is_some() || self.has_all() {
            return None;
        }
        match buf.read_kset(pmem, &self.context, self.key_end, self.kset_count) {
            Ok(kset) if !self.is_plausible(&kset) => self.end(KsetError::KeyRange),
            Ok(kset) if self.is_torn(pmem, buf, &kset) => {
                self.torn_kset_off = Some(kset.off);
                self.end(KsetError::Invalid)
            }
            Ok(kset) => {
                self.last_kset_off = kset.off;
                self.key_end += kset.size_bytes;
                self.kset_count += 1;
                self.last_seq = kset.seq;
                Some(kset)
            }
            Err(error) => self.end(error),
        }
    }

    fn end(&mut self, error: KsetError) -> Option<Kset> {
        self.stop = Some(error);
        None
    }

    /// Whether a kset is there and its payloads are not (INV-LOG-11): a cut may have left such a one if they were stored
    /// before the same fence. A payload of which part cannot be read is no sign of a cut: the kset may have been acknowledged, and
    /// whoever reads that part gets an error.
    fn is_torn<P: PmemRead>(&self, pmem: &P, buf: &mut WalkBuf, kset: &Kset) -> bool {
        let is_proven = kset.proof == Proof::Fence
            || kset.seq <= self.dirty_tail
            || self.info.sealed.is_some()
            || canary::is(Canary::UnfencedKsetTrusted);
        if is_proven {
            return false;
        }
        let (next_off, next_index) = (kset.off + kset.size_bytes, kset.kset_index + 1);
        if (buf.reader).is_at(pmem, &self.context, next_off, next_index) {
            return false;
        }
        let geometry = self.context.geometry();
        let WalkBuf { payload, keys, .. } = buf;
        keys.iter().filter(|key| key.kind.has_payload()).any(|key| {
            let bytes = &mut payload[..geometry.bytes(key.len_blocks.into()) as usize];
            let off = geometry.payload_off(self.segment(), key);
            pmem.read(off, bytes).is_ok() && self.payload_seed.checksum(bytes) != key.crc
        })
    }

    fn has_all(&self) -> bool {
        let sealed = self.info.sealed;
        sealed.is_some_and(|sealed| sealed.kset_count == self.kset_count)
    }

    /// INV-LOG-3, and counters that somebody can have reached (INV-OPEN-3, INV-OPEN-9).
    fn is_plausible(&self, kset: &Kset) -> bool {
        let seq_is_next = self.kset_count == 0
            || kset.seq > self.last_seq
            || canary::is(Canary::StaleLapAccepted);
        let in_range = kset.seq.0 <= COUNTER_START_MAX && kset.epoch.0 <= COUNTER_START_MAX;
        seq_is_next && kset.seq.0 > 0 && in_range
    }

    /// After the last kset: whether they end where they should not. Each kset is durable before the next is
    /// stored, so behind the last one there is nothing valid unless something before it was damaged.
    pub(crate) fn find_damage<P: PmemRead>(
        &self,
        pmem: &P,
        buf: &mut WalkBuf,
    ) -> Result<Option<&'static str>, OpenError> {
        match (self.stop, self.info.sealed) {
            (None, Some(sealed)) if sealed.last_seq == self.last_seq => Ok(None),
            (None, _) => Ok(Some("its last kset is not the one that was sealed")),
            (Some(KsetError::Poisoned(_)), _) => Ok(Some("its keys cannot be read")),
            (Some(KsetError::KeyRange), _) => Ok(Some("a key is out of range")),
            (Some(KsetError::Invalid), Some(_)) => Ok(Some("it was sealed with more ksets")),
            (Some(KsetError::Invalid), None) => {
                let (off, kset_count) = (self.key_end, self.kset_count);
                let window = kset_size_bytes(KSET_KEYS_MAX) as u32;
                let later = buf
                    .reader
                    .find_later(pmem, &self.context, off, kset_count, window)?;
                Ok(later.map(|_| "a valid kset follows a damaged one"))
            }
        }
    }

    /// The seq of its last kset if the base holds all of the segment: then it may be damaged.
    pub(crate) fn end_on_base(&self, dirty_tail: Seq) -> Option<Seq> {
        let last_seq = self.info.sealed.map(|sealed| sealed.last_seq);
        last_seq.filter(|last_seq| *last_seq <= dirty_tail)
    }

    /// Why a damaged segment is refused.
    pub(crate) fn refusal(&self, reason: &'static str) -> OpenError {
        OpenError::Segment {
            segment: self.segment().0,
            ksets_valid: self.kset_count,
            off: self.key_end,
            reason,
        }
    }
}
