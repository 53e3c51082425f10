//! Base reads under way, and who waits for which: misses of the same blocks share one base read.
//!
//! A miss joins a base read of its channel that is under way for the same blocks, if nothing has happened to their
//! pages since that one was asked for. Misses of different channels meet in [`super::fetches`].

use super::cache::Cache;
use super::channel::{Core, MISS_COUNT_MAX, RequestId, Slab};
use super::fetches::PageSet;
use super::io::{BaseError, BaseKind, BaseOpId, BaseRequest, Outbox};
use super::read_path::FILL_PAGES_MAX;
use super::staging::Staged;
use crate::canary::{self, Canary};
use crate::index::Version;
use crate::media::Geometry;
use crate::pmem::{IovCursor, PadMemory, Pads, Pmem};
use crate::units::{Lba, Now};

/// One base read serves so many bytes of other misses, at most: they are copied within one poll.
const JOINED_BYTES_MAX: u64 = 2 << 20;

/// Of what base reads have brought, one poll copies so much to the cache and to those that have joined, at most; the last
/// base read may go beyond.
const MISS_BYTES_PER_POLL: u64 = 2 << 20;

/// Blocks that are not cached, and that a read waits for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Miss {
    pub(super) request: RequestId,
    pub(super) lba: Lba,
    pub(super) len_blocks: u64,
    /// Where the base is to bring the blocks: memory of the reader's, or a pad.
    pub(super) cursor: IovCursor,
    /// Of the bucket of each page when it was found missing.
    pub(super) versions: [Version; FILL_PAGES_MAX],
    /// Whether it may be put into the cache.
    pub(super) admitted: bool,
    /// It is, on probation.
    pub(super) apart: bool,
    /// When its base read was asked for.
    pub(super) asked_at: Now,
    pub(super) result: Option<Result<(), BaseError>>,
    /// What is to be kept goes through a pad.
    pub(super) staged: Option<Staged>,
    /// Pages that others wait for.
    pub(super) announced: PageSet,
    /// The first of those that wait for this one's base read; of such a one, the next.
    followers: Option<u32>,
    joined_bytes: u64,
}

impl Miss {
    pub(super) fn new(
        request: RequestId,
        (lba, len_blocks): (Lba, u64),
        cursor: IovCursor,
        asked_at: Now,
    ) -> Self {
        Self {
            request,
            lba,
            len_blocks,
            cursor,
            versions: [Version::UNSTABLE; FILL_PAGES_MAX],
            admitted: false,
            apart: false,
            asked_at,
            result: None,
            staged: None,
            announced: PageSet::default(),
            followers: None,
            joined_bytes: 0,
        }
    }

    pub(super) fn base_read(&self, op: u32) -> BaseRequest {
        BaseRequest {
            op: BaseOpId(op),
            kind: BaseKind::Read(self.cursor),
            lba: self.lba,
            len_blocks: self.len_blocks,
        }
    }
}

/// A base read that can be joined.
#[derive(Clone, Copy, Debug)]
struct Joinable {
    start: u64,
    end: u64,
    op: u32,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Misses {
    pub(super) table: Slab<Miss>,
    /// Apart from the rest and closely packed, because every miss looks through all of them.
    joinable: Vec<Joinable>,
    /// For what is to be kept, if there is memory.
    pub(super) pads: Option<Pads>,
}

/// The first part of some missing blocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) end: u64,
    pub(super) source: Source,
}

/// Who brings it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// This base read of the channel.
    Joined(u32),
    /// Nobody of the channel.
    Own,
    /// The same, since its pages were written after the base read that brings them was asked for: what that one brings
    /// is not put into the cache.
    Outdated,
}

impl Misses {
    pub(super) fn new(pads: Option<PadMemory>) -> Self {
        Self {
            table: Slab::new(MISS_COUNT_MAX),
            joinable: Vec::with_capacity(MISS_COUNT_MAX),
            pads: pads.map(Pads::new),
        }
    }

    pub(super) fn get(&self, op: u32) -> Option<&Miss> {
        self.table.get(op)
    }

    /// A base read has ended; nobody joins it any more.
    pub(super) fn set_result(&mut self, op: u32, result: Result<(), BaseError>) -> bool {
        self.joinable.retain(|other| other.op != op);
        self.table
            .get_mut(op)
            .map(|miss| miss.result = Some(result))
            .is_some()
    }

    /// How much of the blocks from `start` to `end` is brought by one base read, from the start on. `versions` are
    /// those of their pages; of more pages than there are versions nothing is shared.
    pub(super) fn first_part(
        &self,
        geometry: &Geometry,
        (start, end): (u64, u64),
        versions: &[Version],
    ) -> Part {
        let page_of = |lba: u64| geometry.page_of(Lba(lba)).0;
        let mut source = Source::Own;
        if page_of(end - 1) - page_of(start) >= versions.len() as u64 {
            return Part { end, source };
        }
        let in_common = |other: &Joinable| (start.max(other.start), end.min(other.end));
        let has_room = |other: &Joinable| {
            let (from, to) = in_common(other);
            geometry.bytes(to - from) <= self.room_bytes(other.op)
        };
        let unchanged = |other: &Joinable| {
            let (from, to) = in_common(other);
            (page_of(from)..=page_of(to - 1)).all(|page| {
                // INV-READ-2: the base has held the newest content since that one was asked for.
                let now = versions[(page - page_of(start)) as usize];
                let then = self.version_at(other.op, page - page_of(other.start));
                now.is_unwritten_since(then) || canary::is(Canary::StaleReadJoined)
            })
        };
        let covers = |other: &&Joinable, lba| other.start <= lba && lba < other.end;
        for first in self.joinable.iter().filter(|other| covers(other, start)) {
            if !unchanged(first) {
                source = Source::Outdated;
            } else if has_room(first) {
                return Part {
                    end: end.min(first.end),
                    source: Source::Joined(first.op),
                };
            }
        }
        let last = self.joinable.iter().find(|other| {
            let at_end = covers(other, end - 1) && other.start > start;
            at_end && has_room(other) && unchanged(other)
        });
        let end = last.map_or(end, |last| last.start);
        Part { end, source }
    }

    /// What is to be copied when a base read has ended.
    fn bytes_to_copy(&self, geometry: &Geometry, op: u32) -> u64 {
        let Some(miss) = self.table.get(op) else {
            return 0;
        };
        let fill_bytes = if miss.admitted {
            geometry.bytes(miss.len_blocks)
        } else {
            0
        };
        fill_bytes + miss.joined_bytes
    }

    fn room_bytes(&self, op: u32) -> u64 {
        let joined = self.table.get(op).map(|miss| miss.joined_bytes);
        JOINED_BYTES_MAX.saturating_sub(joined.unwrap_or(u64::MAX))
    }

    fn version_at(&self, op: u32, page: u64) -> Version {
        let versions = self.table.get(op).map(|miss| &miss.versions);
        let version = versions.and_then(|versions| versions.get(page as usize));
        version.copied().unwrap_or(Version::UNSTABLE)
    }

    /// A miss with a base read of its own; `None`: the table is full. It is joined if it has versions, and a pad, whose
    /// content is nobody else's.
    pub(super) fn lead(&mut self, miss: Miss) -> Option<BaseRequest> {
        let op = self.table.insert(miss)?;
        if miss.versions[0] != Version::UNSTABLE && miss.staged.is_some() {
            self.joinable.push(Joinable {
                start: miss.lba.0,
                end: miss.lba.0 + miss.len_blocks,
                op,
            });
        }
        Some(miss.base_read(op))
    }

    /// A miss that waits for the base read `leader`; `None`: the table is full.
    pub(super) fn follow(&mut self, mut miss: Miss, bytes: u64, leader: u32) -> Option<()> {
        miss.followers = self.table.get(leader)?.followers;
        let op = self.table.insert(miss)?;
        let leader = self.table.get_mut(leader)?;
        leader.followers = Some(op);
        leader.joined_bytes += bytes;
        Some(())
    }
}

impl Core {
    /// The next base read that has ended, unless this poll has come to copy enough.
    pub(super) fn next_done<P: Pmem>(&mut self, cache: &Cache<P>, bytes: &mut u64) -> Option<u32> {
        if *bytes >= MISS_BYTES_PER_POLL {
            return None;
        }
        let op = self.misses_done.pop_front()?;
        *bytes += self.misses.bytes_to_copy(&cache.geometry, op);
        Some(op)
    }

    /// Gives those that wait for a base read what it has brought. If it failed, the error is not theirs: each asks
    /// the base for its own blocks, unless the base was reset, which is to end them all.
    pub(super) fn serve_followers<P: Pmem>(&mut self, cache: &Cache<P>, op: u32, out: &mut Outbox) {
        let Some(leader) = self.misses.table.get_mut(op) else {
            return;
        };
        let mut next = leader.followers.take();
        let leader = *leader;
        while let Some(at) = next {
            let Some(miss) = self.misses.table.get_mut(at) else {
                return;
            };
            next = miss.followers.take();
            let is_over = matches!(leader.result, Some(Ok(()) | Err(BaseError::Reset)));
            if !is_over && !cache.has_failed() {
                miss.asked_at = self.now;
                let request = miss.base_read(at);
                self.ask_base(cache, request, out);
                continue;
            }
            let bytes = cache.geometry.bytes(miss.len_blocks);
            miss.result = leader.result;
            let mut from = leader.cursor;
            from.advance(cache.geometry.bytes(miss.lba.0 - leader.lba.0) as usize);
            if leader.result == Some(Ok(())) {
                miss.cursor.copy_from(&mut from, bytes as usize);
                self.counters(cache).joined_read_bytes.add(bytes);
            }
            self.settle_miss(cache, at, out);
        }
    }
}
