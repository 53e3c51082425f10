//! What lies on the cache device, and its checked decoding. `docs/FORMAT.md` is the normative description.
//!
//! Types ending in `OnMedia` are the bytes; they never leave this module undecoded. Every number is range
//! checked while it is decoded.

mod checksum;
#[cfg(test)]
mod format_doc;
mod kset;
mod layout;
mod pair;
#[cfg(any(test, feature = "sim"))]
mod seal;
mod segment_info;
mod superblock;
mod tails;
mod witness_pages;

pub use checksum::{ChecksumSeed, Checksums};
pub use kset::{
    CLEAR_SIZE_MAX_BYTES, KEY_SIZE_BYTES, KSET_HEADER_SIZE_BYTES, KSET_KEYS_MAX, Key, KeyKind,
    Kset, KsetBuilder, KsetContext, KsetError, KsetReader, Proof, kset_size_bytes,
};
pub(crate) use layout::aligned_pieces;
pub use layout::{
    Geometry, GeometryError, KEYS_START_BYTES, Place, SEGMENT_SIZE_MAX_BYTES,
    SEGMENTS_START_MIN_BYTES,
};
pub use pair::{COUNTER_MAX, COUNTER_START_MAX, Copies, CopyState, PairError};
#[cfg(any(test, feature = "sim"))]
pub use seal::Spot;
pub use segment_info::{Sealed, SegmentInfo};
pub use superblock::{
    FEATURES_COMPAT, FEATURES_INCOMPAT, HeaderState, Superblock, SuperblockError, load_header,
    persist_superblock, persist_unfinished_mark, superblock_copies,
};
pub use tails::{Tails, WITNESS_COUNT, Witness};
pub(crate) use witness_pages::WitnessPages;
