//! Writes that heal: they overwrite damaged dirty data, of which write-back stands still (`writeback/lost.rs`).
//!
//! As long as it stands, nothing that is written becomes clean, and the log fills up until every write waits for room. Nothing
//! makes room then but write-back, and nothing lets that go on but a write to the damaged blocks. So one segment is kept free
//! for such writes, also before there is any damage, and they go there before all that waits.
//!
//! What is left of that segment is for other such writes: from whatever channel they come. A start seals it.

use super::cache::Cache;
use super::channel::Core;
use super::io::Outbox;
use super::stream::Stream;
use crate::canary::{self, Canary};
use crate::pmem::Pmem;
use crate::units::Agent;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

/// A cache with fewer segments needs all of them.
const SEGMENTS_MIN: usize = 8;

/// Whose room in the log a batch may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    Anybodys,
    /// That which is kept for what heals.
    Healers,
}

impl<P: Pmem> Cache<P> {
    /// Segments that are kept free.
    pub(crate) fn segments_kept_free(&self) -> usize {
        usize::from(self.segments_in_service() >= SEGMENTS_MIN)
    }

    /// Whether a free segment may be opened.
    pub(super) fn may_open(&self, who: Agent, room: Room) -> bool {
        let free_count = self.segments.free_count();
        match room {
            Room::Healers => free_count > 0,
            Room::Anybodys => {
                let free_count = free_count.saturating_sub(self.segments_kept_free());
                free_count > 0 && self.room_queue.may_take(who, free_count)
            }
        }
    }

    /// Whether what is left of a stream's open segment is for what heals. Else there is another one for that.
    pub(super) fn is_for_healers(&self, stream: &Stream) -> bool {
        stream.is_for_healers
            && self.writeback_stands.load(Ordering::Relaxed)
            && self.segments.free_count() < self.segments_kept_free()
    }
}

impl Core {
    /// The head of the queue waits for room. Lets those behind it which heal go first. Which these are is looked for only
    /// while write-back stands still, so it may take its time.
    #[cold]
    pub(super) fn run_healers<P: Pmem>(&mut self, cache: &Cache<P>, out: &mut Outbox) {
        let stands = cache.writeback_stands.load(Ordering::Relaxed);
        if !stands || canary::is(Canary::HealerWaitsForRoom) {
            return;
        }
        let requests = &self.requests;
        let heals = |id| {
            let io = requests.get(id).map(|request| request.io);
            io.is_some_and(|io| cache.damage.holds_up(io.lba, io.len_blocks))
        };
        // In their order.
        let (healers, others): (Vec<_>, Vec<_>) = self.writes.drain(..).partition(|id| heals(*id));
        let count = healers.len();
        self.writes.extend(healers);
        if count > 0
            && let Some((number, mut stream)) = self.lock_stream_of_healers(cache)
        {
            self.run_batch_of(cache, (number, &mut stream), Room::Healers, out);
        }
        self.writes.extend(others);
    }

    /// The stream that has the segment for them, or the home stream to open it.
    fn lock_stream_of_healers<'a, P: Pmem>(
        &self,
        cache: &'a Cache<P>,
    ) -> Option<(usize, MutexGuard<'a, Stream>)> {
        let numbers = 0..cache.core_stream_count;
        let locked =
            numbers.filter_map(|number| Some((number, cache.streams[number].try_lock().ok()?)));
        let mut home = None;
        for (number, stream) in locked {
            if cache.is_for_healers(&stream) {
                return Some((number, stream));
            }
            if number == self.home_stream {
                home = Some((number, stream));
            }
        }
        home
    }
}
