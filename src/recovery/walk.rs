//! What one segment holds: its info, its ksets in order, and whether they end where they should. Only reads.

use super::error::OpenError;
use crate::canary::{self, Canary};
use crate::media::{
    COUNTER_START_MAX, Checksums, Copies, KEYS_START_BYTES, KSET_KEYS_MAX, Key, Kset, KsetContext,
    KsetError, KsetReader, SegmentInfo, Superblock, kset_size_bytes,
};
use crate::pmem::PmemRead;
use crate::units::{SegId, Seq};

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
    /// Of the kset that was read last.
    pub(crate) keys: Vec<Key>,
}

impl Default for WalkBuf {
    fn default() -> Self {
        Self {
            reader: KsetReader::default(),
            keys: Vec::with_capacity(KSET_KEYS_MAX),
        }
    }
}

/// Goes through the ksets of a segment, up to the first place without one.
#[derive(Debug)]
pub(crate) struct SegmentWalk {
    context: KsetContext,
    info: SegmentInfo,
    key_end: u32,
    kset_count: u32,
    last_seq: Seq,
    stop: Option<KsetError>,
}

impl SegmentWalk {
    pub(crate) fn new(superblock: &Superblock, id: SegId, info: SegmentInfo) -> Self {
        let context = KsetContext::new(
            &superblock.geometry,
            superblock.base.block_count,
            &Checksums::new(superblock.uuid),
            id,
            info.generation,
        );
        Self {
            context,
            info,
            key_end: KEYS_START_BYTES,
            kset_count: 0,
            last_seq: Seq(0),
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
        buf.keys.clear();
        let (off, kset_index) = (self.key_end, self.kset_count);
        let read = buf
            .reader
            .read(pmem, &self.context, off, kset_index, &mut buf.keys);
        match read {
            Ok(kset) if self.is_plausible(&kset) => {
                self.key_end += kset.size_bytes;
                self.kset_count += 1;
                self.last_seq = kset.seq;
                Some(kset)
            }
            Ok(_) => self.end(KsetError::KeyRange),
            Err(error) => self.end(error),
        }
    }

    fn end(&mut self, error: KsetError) -> Option<Kset> {
        self.stop = Some(error);
        None
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
