//! Hits that are verified: each payload is copied to a buffer, compared with its checksum, and the reader gets what was
//! compared, as much of it as was asked for.
//!
//! A checksum covers a payload as a whole, a page at the most. So a part of one is not served either if the rest of it
//! cannot be read.

use super::{Blocked, Reader, Run};
use crate::canary::{self, Canary};
use crate::engine::cache::Cache;
use crate::engine::channel::Core;
use crate::engine::damage::{Depth, Flaw};
use crate::engine::io::Outbox;
use crate::engine::place_crcs::PlaceCrcs;
use crate::media::{Key, Place};
use crate::pmem::Pmem;
use crate::units::{Lba, SegId};

impl Core {
    /// Serves a mapped run payload by payload.
    pub(super) fn serve_verified<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        crcs: &PlaceCrcs,
        (run, place): (&Run, Place),
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let cache = reader.cache;
        let end = run.lba.0 + run.len_blocks;
        let mut lba = run.lba;
        for (id, key) in cache.payloads(crcs, run.lba, place, run.len_blocks) {
            let place = Place(place.0 + (lba.0 - run.lba.0));
            let next = Lba(key.end().0.min(end));
            let part = Run::mapped(lba, place, next.0 - lba.0);
            self.serve_part(reader, (id, &key), (&part, place), out)?;
            lba = next;
        }
        Ok(())
    }

    /// Serves a part of a payload, or all of it.
    fn serve_part<P: Pmem>(
        &mut self,
        reader: &mut Reader<'_, P>,
        (id, key): (SegId, &Key),
        (part, place): (&Run, Place),
        out: &mut Outbox,
    ) -> Result<(), Blocked> {
        let cache = reader.cache;
        if cache.damage.covers(place, part.len_blocks) {
            return self.do_without(reader, (part, place), out);
        }
        if let Err(flaw) = self.check_hit(cache, id, key) {
            return self.serve_flawed(reader, (id, key, flaw), (part, place), out);
        }
        // A page at the most.
        let start = cache.geometry.bytes(part.lba.0 - key.lba.0) as usize;
        let bytes = cache.geometry.bytes(part.len_blocks) as usize;
        let mut cursor = reader.state.cursor;
        cursor.write_from(&self.payload_buf[start..start + bytes]);
        self.end_hit(reader, part, place, cursor);
        Ok(())
    }

    /// Copies a payload to the buffer and compares it with its checksum (INV-READ-6).
    pub(in crate::engine) fn check_hit<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        id: SegId,
        key: &Key,
    ) -> Result<(), Flaw> {
        let bytes = cache.geometry.bytes(u64::from(key.len_blocks));
        self.counters(cache).verified_bytes.add(bytes);
        match cache.check_payload(id, key, &mut self.payload_buf, Depth::Read) {
            Err(Flaw::Checksum) if canary::is(Canary::ReadNotVerified) => Ok(()),
            checked => checked,
        }
    }
}
