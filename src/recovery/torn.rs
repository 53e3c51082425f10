//! What a crash has left of the last batch of an open segment. Everything before it was fenced.

use super::error::OpenError;
use super::pass::FoundSegment;
use super::walk::WalkBuf;
use crate::canary::{self, Canary};
use crate::engine::BACKGROUND_AGENT;
use crate::media::{Checksums, Geometry, Key, KsetContext, Proof, Superblock};
use crate::pmem::{LINE_SIZE_BYTES, Pmem};
use crate::units::SegId;

/// Stores the last kset of an open segment once more as it was found, and its payloads if it may have been stored before these were
/// durable (INV-LOG-12). Whoever stored it may have died before the fence: then it may be in the CPU's caches alone. A cut would
/// take it back, from a segment that was sealed with it, or behind a dirty tail that has passed it.
///
/// # Errors
/// It is not what was found a moment ago.
pub(super) fn store_last_again<P: Pmem>(
    pmem: &P,
    superblock: &Superblock,
    id: SegId,
    found: &FoundSegment,
    buf: &mut WalkBuf,
) -> Result<(), OpenError> {
    let (geometry, off) = (&superblock.geometry, found.last_kset_off);
    let context = KsetContext::new(
        geometry,
        superblock.base.block_count,
        &Checksums::new(superblock.uuid),
        id,
        found.info.generation,
    );
    let read = buf.read_kset(pmem, &context, off, found.kset_count - 1);
    let kset = read.map_err(|_| OpenError::Segment {
        segment: id.0,
        ksets_valid: found.kset_count,
        off,
        reason: "its last kset is not what it was a moment ago",
    })?;
    let payloads = buf.keys.iter().filter(|key| key.kind.has_payload());
    for key in payloads.filter(|_| kset.proof == Proof::Checksums) {
        store_payload_again(pmem, geometry, id, key);
    }
    let at = geometry.segment_off(id).plus(off.into());
    if !canary::is(Canary::KilledKsetTrusted) {
        pmem.store(BACKGROUND_AGENT, at, buf.kset_bytes(&kset));
    }
    drop(pmem.fence(BACKGROUND_AGENT));
    Ok(())
}

/// Line by line: what cannot be read may take no store either, and is an error for who reads it.
fn store_payload_again<P: Pmem>(pmem: &P, geometry: &Geometry, id: SegId, key: &Key) {
    let start = geometry.payload_off(id, key);
    let mut line = [0; LINE_SIZE_BYTES as usize];
    for at in (0..geometry.bytes(key.len_blocks.into())).step_by(line.len()) {
        if pmem.read(start.plus(at), &mut line).is_ok() {
            pmem.store(BACKGROUND_AGENT, start.plus(at), &line);
        }
    }
}

/// Makes no kset of one whose payloads are torn, in a segment that can be neither sealed nor freed (INV-LOG-11). Its number will be
/// that of another, and be passed by the dirty tail: as it is, it would count then.
pub(super) fn end_torn_kset<P: Pmem>(
    pmem: &P,
    geometry: &Geometry,
    id: SegId,
    found: &FoundSegment,
) {
    let Some(off) = found.torn_kset_off else {
        return;
    };
    let at = geometry.segment_off(id).plus(off.into());
    pmem.store(BACKGROUND_AGENT, at, &[0; LINE_SIZE_BYTES as usize]);
    drop(pmem.fence(BACKGROUND_AGENT));
}
