//! What a queue of base operations has room for from the start. Its owner asks for no more, so nothing is allocated while it
//! is used.

use crate::engine::{BACKGROUND_BASE_OPS_MAX, BASE_WRITE_SOURCES_MAX, CHANNEL_BASE_OPS_MAX};

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(in crate::spdk) struct Room {
    /// Operations under way at once.
    pub(in crate::spdk) ops: usize,
    /// Pieces of the cache device in one base write.
    pub(in crate::spdk) sources: usize,
}

impl Room {
    /// For those of a channel: they read.
    pub(in crate::spdk) const CHANNEL: Self = Self {
        ops: CHANNEL_BASE_OPS_MAX,
        sources: 0,
    };
    /// For those of the background.
    pub(in crate::spdk) const BACKGROUND: Self = Self {
        ops: BACKGROUND_BASE_OPS_MAX,
        sources: BASE_WRITE_SOURCES_MAX,
    };
}
