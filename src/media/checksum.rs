//! Seeded CRC-32C: every checksum starts from the cache's random uuid, the kind of structure and where it
//! belongs, so that blank media, an old lap, another cache and bytes that a guest wrote never pass
//! (INV-CRC-1).

use crate::canary::{self, Canary};
use crate::pmem::crc32c_append_short;
use crc32c::crc32c;

/// The running CRC from which a checksum of one kind starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChecksumSeed(pub u32);

impl ChecksumSeed {
    /// The checksum of `bytes`.
    #[inline]
    #[must_use]
    pub fn checksum(self, bytes: &[u8]) -> u32 {
        crc32c_append_short(self.0, bytes)
    }
}

/// What kind of structure a checksum covers. The numbers are part of the format.
#[derive(Clone, Copy)]
enum StructKind {
    Superblock = 1,
    Tails = 2,
    SegmentInfo = 3,
    Kset = 4,
    Payload = 5,
}

/// The checksum seeds of one cache.
#[derive(Clone, Copy, Debug)]
pub struct Checksums {
    uuid: [u8; 16],
}

impl Checksums {
    /// For the cache of this uuid.
    #[must_use]
    pub fn new(uuid: [u8; 16]) -> Self {
        Self { uuid }
    }

    /// For a superblock; it holds the uuid itself.
    #[must_use]
    pub fn superblock() -> ChecksumSeed {
        seed([0; 16], StructKind::Superblock, 0)
    }

    /// For the tails.
    #[must_use]
    pub fn tails(&self) -> ChecksumSeed {
        seed(self.uuid, StructKind::Tails, 0)
    }

    /// For the info of segment number `segment`; a copy of another segment's never passes.
    #[must_use]
    pub fn segment_info(&self, segment: u32) -> ChecksumSeed {
        seed(self.uuid, StructKind::SegmentInfo, u64::from(segment))
    }

    /// For the ksets of a segment under a generation.
    #[must_use]
    pub fn kset(&self, segment: u32, mut generation: u64) -> ChecksumSeed {
        if canary::is(Canary::ChecksumWithoutGeneration) || canary::is(Canary::StaleLapAccepted) {
            generation = 0;
        }
        seed_of_segment(self.uuid, StructKind::Kset, generation, segment)
    }

    /// For the payloads in a segment under a generation.
    #[must_use]
    pub fn payload(&self, segment: u32, generation: u64) -> ChecksumSeed {
        seed_of_segment(self.uuid, StructKind::Payload, generation, segment)
    }
}

fn seed(uuid: [u8; 16], kind: StructKind, number: u64) -> ChecksumSeed {
    let bytes = seed_bytes(uuid, kind, number, 0);
    ChecksumSeed(crc32c(&bytes[..SEED_BYTES]))
}

/// With the number of a segment behind the rest.
fn seed_of_segment(uuid: [u8; 16], kind: StructKind, number: u64, segment: u32) -> ChecksumSeed {
    ChecksumSeed(crc32c(&seed_bytes(uuid, kind, number, segment)))
}

/// Of what all seeds are made.
const SEED_BYTES: usize = 28;

/// In one piece: that of the parts, one after the other, is the same, and each call costs more than its few bytes.
fn seed_bytes(mut uuid: [u8; 16], kind: StructKind, number: u64, segment: u32) -> [u8; 32] {
    if canary::is(Canary::ChecksumWithoutUuid) {
        uuid = [0; 16];
    }
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&uuid);
    bytes[16..20].copy_from_slice(&(kind as u32).to_le_bytes());
    bytes[20..SEED_BYTES].copy_from_slice(&number.to_le_bytes());
    bytes[SEED_BYTES..].copy_from_slice(&segment.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_place_and_lap_has_a_seed_of_its_own() {
        // INV-CRC-1.
        let a = Checksums::new([1; 16]);
        let b = Checksums::new([2; 16]);
        let seeds = [
            Checksums::superblock(),
            a.tails(),
            b.tails(),
            a.segment_info(0),
            a.segment_info(1),
            a.kset(0, 1),
            a.kset(0, 2),
            a.kset(1, 1),
            a.payload(0, 1),
            b.payload(0, 1),
        ];
        for (i, x) in seeds.iter().enumerate() {
            for y in &seeds[i + 1..] {
                assert_ne!(x, y);
            }
        }
    }

    #[test]
    fn zeroes_do_not_carry_a_zero_checksum() {
        assert_ne!(Checksums::new([0; 16]).kset(0, 0).checksum(&[0; 64]), 0);
    }
}
