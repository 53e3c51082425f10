//! Writes that heal: they overwrite damaged dirty data, of which write-back stands still (`writeback/lost.rs`).
//!
//! As long as it stands, nothing that is written becomes clean, and the log fills up until every write waits for room. Nothing
//! makes room then but write-back, and nothing lets that go on but a write to the damaged blocks. So one segment is kept free
//! for such writes, also before there is any damage, and they go there before all that waits.
//!
//! What is left of that segment is for other such writes, from whatever channel they come, until another one is free. A start
//! seals it.

use super::cache::Cache;
use super::channel::Core;
use super::damage::ASKED_PER_POLL;
use super::io::Outbox;
use super::stream::Stream;
use crate::canary::{self, Canary};
use crate::pmem::Pmem;
use crate::units::{Agent, Lba};
use std::mem;
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

    /// So many segments have to be left when one is opened; `None`: there is none to be opened, or it is somebody else's
    /// turn.
    pub(super) fn leaves_free(&self, who: Agent, room: Room) -> Option<usize> {
        let free_count = self.segments.free_count();
        match room {
            Room::Healers => (free_count > 0).then_some(0),
            Room::Anybodys => {
                let kept = self.segments_kept_free();
                let free_count = free_count.saturating_sub(kept);
                (free_count > 0 && self.room_queue.may_take(who, free_count)).then_some(kept)
            }
        }
    }

    /// Whether what is left of a stream's open segment is for what heals. Else there is another one for that. It does not
    /// matter whether write-back stands at the moment: when much is healed it goes on, and finds more.
    pub(super) fn is_for_healers(&self, stream: &Stream) -> bool {
        stream.is_for_healers && self.segments.free_count() < self.segments_kept_free()
    }

    /// Whether a write to these blocks overwrites something that holds write-back up. Each block of which that is to be found
    /// out takes one of `asked_left`.
    fn heals(&self, lba: Lba, len_blocks: u64, asked_left: &mut usize) -> bool {
        let (mut from, end) = (lba, Lba(lba.0 + len_blocks));
        while *asked_left > 0
            && let Some((lba, place)) = self.damage.next_that_holds(from, end)
        {
            *asked_left -= 1;
            // It may have been healed a moment ago, and is written again and again.
            if !self.is_overwritten(lba, place) {
                return true;
            }
            from = Lba(lba.0 + 1);
        }
        false
    }
}

impl Core {
    /// Writes wait for room, and `gone` of the channel's turn have left the queue in this poll. Lets those among them which
    /// heal go first. Returns how many have gone.
    #[cold]
    pub(super) fn run_healers<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        gone: usize,
        out: &mut Outbox,
    ) -> usize {
        let stands = cache.writeback_stands.load(Ordering::Relaxed);
        if !stands || canary::is(Canary::HealerWaitsForRoom) {
            return 0;
        }
        let of_turn = self.take_healers(cache, gone);
        let count = self.healers.len();
        if count == 0 {
            return 0;
        }
        let conflicted = self.gathered.conflicted_count();
        mem::swap(&mut self.writes, &mut self.healers);
        if let Some((number, mut stream)) = self.lock_stream_of_healers(cache) {
            self.run_batch_of(cache, (number, &mut stream), Room::Healers, out);
        }
        mem::swap(&mut self.writes, &mut self.healers);
        let left = self.healers.len();
        while let Some(id) = self.healers.pop_back() {
            self.writes.push_front(id);
        }
        let left = left + self.gathered.conflicted_count() - conflicted;
        let gone = count - left;
        self.count_healers(cache, of_turn, gone, left);
        gone
    }

    /// Takes them out of the queue, in their order: of a part of it, and of others with the next poll. Returns how many of
    /// them are of the channel's turn.
    fn take_healers<P: Pmem>(&mut self, cache: &Cache<P>, gone: usize) -> usize {
        let (mut of_turn, mut asked_left) = (0, ASKED_PER_POLL);
        let mut at = mem::take(&mut self.healers_at);
        for _ in 0..ASKED_PER_POLL {
            let Some(id) = self.writes.get(at).copied() else {
                return of_turn;
            };
            let io = self.requests.get(id).map(|request| request.io);
            let is_first = asked_left == ASKED_PER_POLL;
            let heals = io.is_some_and(|io| cache.heals(io.lba, io.len_blocks, &mut asked_left));
            if asked_left == 0 && !heals {
                // One that takes more than a poll has is passed over: what it overwrites is forgotten meanwhile.
                at += usize::from(is_first);
                break;
            }
            if heals {
                self.writes.remove(at);
                self.healers.push_back(id);
                of_turn += usize::from(gone + at + of_turn < self.turn);
            } else {
                at += 1;
            }
        }
        self.healers_at = at;
        of_turn
    }

    /// The stream that has the segment for them, with the most room, or the home stream to open it.
    fn lock_stream_of_healers<'a, P: Pmem>(
        &self,
        cache: &'a Cache<P>,
    ) -> Option<(usize, MutexGuard<'a, Stream>)> {
        let is_sound = |id| !cache.segments.get(id).is_suspect();
        let room_of = |stream: &Stream| match &stream.open {
            Some(open) if cache.is_for_healers(stream) && is_sound(open.id) => open.room_bytes(),
            _ => 0,
        };
        let numbers = 0..cache.core_stream_count;
        let free = numbers.filter_map(|number| {
            let stream = cache.streams[number].try_lock().ok()?;
            let room = room_of(&stream);
            (room > 0 || number == self.home_stream).then_some((room, number, stream))
        });
        let (_, number, stream) = free.max_by_key(|(room, ..)| *room)?;
        Some((number, stream))
    }
}
