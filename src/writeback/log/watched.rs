//! Segments that may get more ksets.

use crate::memory::{self, NoMemory};
use crate::units::SegId;

/// See the module. Each is in it once.
#[derive(Debug)]
pub(super) struct Watched {
    ids: Vec<SegId>,
    /// For each segment whether it is one of them.
    has: Vec<bool>,
}

impl Watched {
    pub(super) fn new(segment_count: usize) -> Result<Self, NoMemory> {
        let what = "write-back";
        Ok(Self {
            ids: memory::with_room(what, segment_count)?,
            has: memory::filled(what, segment_count, || false)?,
        })
    }

    /// `false`: it was there already.
    pub(super) fn add(&mut self, id: SegId) -> bool {
        let has = &mut self.has[id.index()];
        if !*has {
            self.ids.push(id);
        }
        !std::mem::replace(has, true)
    }

    pub(super) fn get(&self, at: usize) -> Option<SegId> {
        self.ids.get(at).copied()
    }

    /// Another one takes its place.
    pub(super) fn remove(&mut self, at: usize) {
        let id = self.ids.swap_remove(at);
        self.has[id.index()] = false;
    }

    pub(super) fn clear(&mut self) {
        self.ids.clear();
        self.has.fill(false);
    }
}
