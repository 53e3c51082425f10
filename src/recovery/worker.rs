//! Workers of recovery. Each of them goes through a segment at a time, and puts its keys into the index.

use super::error::OpenError;
use super::pass::{Counts, FoundSegment, Pass};
use super::seqs::Noted;
use super::waiting::WaitingParts;
use super::walk::{SegmentWalk, WalkBuf};
use crate::canary::{self, Canary};
use crate::engine::lock;
use crate::index::{LineStock, PagePart, RangeId, Target};
use crate::media::{Copies, Key, KeyKind, SegmentInfo, WITNESS_COUNT, Witness};
use crate::pmem::Pmem;
use crate::units::{Lba, Page, SegId, Seq};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// How many parts ahead of an installation what it will touch is asked for: first what tells where a page lies, then
/// what is known of it block by block.
const FIRST_AHEAD: usize = 16;
const SECOND_AHEAD: usize = 8;
/// Ksets and parts of pages in one slice of work: some tens of microseconds.
const STEPS_PER_SLICE: usize = 1024;

/// What a slice of work has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Something was done.
    Done,
    /// There is nothing to do now, but there may be later.
    Nothing,
    /// There never will be.
    Over,
}

/// What the workers of an opening have in common.
#[derive(Debug)]
struct Crew<P> {
    /// Held for a moment only; a worker that does not get it comes back.
    pass: Mutex<Option<Arc<Pass<P>>>>,
    over: AtomicBool,
}

/// The opening's end of the crew. Without it there is no more work.
#[derive(Debug)]
pub(super) struct Lead<P>(Arc<Crew<P>>);

impl<P> Default for Lead<P> {
    fn default() -> Self {
        Self(Arc::new(Crew {
            pass: Mutex::new(None),
            over: AtomicBool::new(false),
        }))
    }
}

impl<P> Drop for Lead<P> {
    fn drop(&mut self) {
        self.dismiss();
    }
}

impl<P> Lead<P> {
    /// There is nothing to do any more.
    pub(super) fn dismiss(&self) {
        self.0.over.store(true, Ordering::Release);
    }

    /// Lets the workers begin with a pass.
    pub(super) fn set_pass(&self, pass: Pass<P>) {
        *lock(&self.0.pass) = Some(Arc::new(pass));
    }

    /// Takes the pass from the workers if it is so; `None`: it is not, or a worker is just looking for it.
    pub(super) fn take_pass_if(
        &self,
        is_so: impl FnOnce(&Pass<P>) -> bool,
    ) -> Option<Arc<Pass<P>>> {
        let mut pass = self.0.pass.try_lock().ok()?;
        pass.take_if(|pass| is_so(pass))
    }

    pub(super) fn worker(&self, number: u16) -> Worker<P> {
        Worker {
            crew: Arc::clone(&self.0),
            number,
            job: None,
            scanning: None,
            installing: None,
            buf: WalkBuf::default(),
            lines: LineStock::new(1),
        }
    }
}

/// See the module. Used by one thread at a time; it has to be asked for work until that is over.
#[derive(Debug)]
pub struct Worker<P> {
    crew: Arc<Crew<P>>,
    /// Workers begin at different ends of the index.
    number: u16,
    job: Option<Job<P>>,
    scanning: Option<Scanning<P>>,
    /// What waits for this range is being installed, and so much of it is.
    installing: Option<(RangeId, usize)>,
    buf: WalkBuf,
    /// Empty between installations.
    lines: LineStock,
}

/// What a worker has in hand of a pass.
#[derive(Debug)]
struct Job<P> {
    pass: Arc<Pass<P>>,
    waiting: WaitingParts,
    /// Segments that it has gone through, whose keys may be waiting.
    unsettled: u32,
}

/// A segment that a worker goes through.
#[derive(Debug)]
struct Scanning<P> {
    pass: Arc<Pass<P>>,
    id: SegId,
    info: SegmentInfo,
    copies: Copies,
    walk: SegmentWalk,
    kset: Option<OpenKset>,
    stage: Stage,
    counts: Counts,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Walking,
    /// All ksets were read.
    AtEnd,
}

/// A kset whose keys are being prepared; they are in the worker's buffer.
#[derive(Clone, Copy, Debug)]
struct OpenKset {
    seq: Seq,
    noted: Option<Noted>,
    next_key: usize,
    /// Where to go on within that key.
    next_lba: Option<Lba>,
}

impl<P: Pmem> Worker<P> {
    /// A bounded piece of work.
    pub fn work(&mut self) -> Work {
        let mut steps_left = STEPS_PER_SLICE;
        while steps_left > 0 {
            let end = if self.installing.is_some() {
                self.install(&mut steps_left)
            } else if self.scanning.is_some() {
                self.scan(&mut steps_left)
            } else {
                self.begin()
            };
            if let Some(work) = end {
                return work;
            }
        }
        Work::Done
    }

    /// Goes to the next segment that is to be walked; after the last one, to what waits. What ends the slice, if
    /// something does.
    fn begin(&mut self) -> Option<Work> {
        if self.crew.over.load(Ordering::Acquire) {
            self.job = None;
            return Some(Work::Over);
        }
        let pass = match &self.job {
            Some(job) => Some(Arc::clone(&job.pass)),
            None => self.crew.pass.try_lock().ok().and_then(|pass| pass.clone()),
        };
        let Some(pass) = pass else {
            return Some(Work::Nothing);
        };
        let Some(id) = pass.take_segment() else {
            return self.wind_up();
        };
        if self.job.is_none() {
            match pass.waiting_parts() {
                Ok(waiting) => {
                    self.job = Some(Job {
                        waiting,
                        pass: Arc::clone(&pass),
                        unsettled: 0,
                    });
                }
                Err(error) => {
                    pass.note_no_memory(error);
                    pass.end_segment(id, None);
                    pass.settle(1);
                    return Some(Work::Done);
                }
            }
        }
        self.job.iter_mut().for_each(|job| job.unsettled += 1);
        match pass.info_of(id) {
            Ok(Some((info, copies))) => {
                self.scanning = Some(Scanning {
                    walk: SegmentWalk::new(
                        &pass.known.superblock,
                        pass.known.tails.dirty_tail,
                        id,
                        info,
                    ),
                    pass,
                    id,
                    info,
                    copies,
                    kset: None,
                    stage: Stage::Walking,
                    counts: Counts::default(),
                });
                return None;
            }
            Ok(None) => pass.end_segment(id, None),
            Err(error) => pass.end_segment(id, Some(Err(error))),
        }
        Some(Work::Done)
    }

    /// There are no more segments: everything that waits goes into the index.
    fn wind_up(&mut self) -> Option<Work> {
        let Some(job) = &self.job else {
            return Some(Work::Nothing);
        };
        self.installing = job.waiting.next_range(self.number).map(|range| (range, 0));
        if self.installing.is_none() || canary::is(Canary::WaitingKeysDropped) {
            self.installing = None;
            job.pass.settle(job.unsettled);
            self.job = None;
            return Some(Work::Done);
        }
        None
    }

    /// Goes on with a segment, until too much waits for a range.
    fn scan(&mut self, steps_left: &mut usize) -> Option<Work> {
        let (mut scanning, job) = (self.scanning.take()?, self.job.as_mut()?);
        let full = scanning.prepare(&mut self.buf, &mut job.waiting, steps_left);
        self.installing = full.map(|range| (range, 0));
        if full.is_none() && scanning.stage == Stage::AtEnd {
            let found = scanning.found(&mut self.buf);
            scanning.pass.add(&scanning.counts);
            scanning.pass.end_segment(scanning.id, Some(found));
            return Some(Work::Done);
        }
        scanning.pass.add(&std::mem::take(&mut scanning.counts));
        self.scanning = Some(scanning);
        None
    }

    /// Puts what waits for a range into the index. Another worker that is at it is not waited for.
    fn install(&mut self, steps_left: &mut usize) -> Option<Work> {
        let ((range, begun), job) = (self.installing?, self.job.as_mut()?);
        let (pass, waiting) = (&job.pass, &mut job.waiting);
        let is_claimed = pass.memory.newest.claim(range);
        if !is_claimed && !canary::is(Canary::RecoveryClaimsIgnored) {
            return Some(Work::Done);
        }
        let count = waiting.count(range);
        let end = count.min(begun + *steps_left);
        let is_full = pass.is_full() || !install(pass, waiting, range, begun..end, &mut self.lines);
        if is_claimed {
            pass.memory.newest.release(range);
        }
        *steps_left -= end - begun;
        self.installing = (end < count && !is_full).then_some((range, end));
        if self.installing.is_none() {
            waiting.clear(range);
        }
        None
    }
}

/// Puts parts that wait for a range into the index, for the holder of its claim. `false`: there is no room.
fn install<P: Pmem>(
    pass: &Pass<P>,
    waiting: &WaitingParts,
    range: RangeId,
    numbers: Range<usize>,
    lines: &mut LineStock,
) -> bool {
    let (index, newest) = (&pass.memory.index, &pass.memory.newest);
    let Some(first) = numbers.clone().next() else {
        return true;
    };
    let mut ahead = [waiting.get(range, first, index); FIRST_AHEAD];
    for number in numbers.start..numbers.end + FIRST_AHEAD {
        if let Some(ready) = number.checked_sub(FIRST_AHEAD)
            && ready >= numbers.start
        {
            let part = &ahead[ready % FIRST_AHEAD];
            if newest.install(index, part, lines).is_err() {
                pass.note_full(index.geometry().segment_of(part.target.place()));
                return false;
            }
        }
        if number < numbers.end {
            let part = waiting.get(range, number, index);
            newest.prefetch(index, part.at);
            ahead[number % FIRST_AHEAD] = part;
        }
        if let Some(near) = number.checked_sub(SECOND_AHEAD)
            && numbers.contains(&near)
        {
            newest.prefetch_parts(index, ahead[near % FIRST_AHEAD].at);
        }
    }
    true
}

impl<P: Pmem> Scanning<P> {
    /// Lets the parts of the next keys wait; returns a range for which there is no more room.
    fn prepare(
        &mut self,
        buf: &mut WalkBuf,
        waiting: &mut WaitingParts,
        steps_left: &mut usize,
    ) -> Option<RangeId> {
        while *steps_left > 0 && self.stage == Stage::Walking {
            *steps_left -= 1;
            let Some(mut kset) = self.kset.take() else {
                self.next_kset(buf);
                continue;
            };
            if kset.noted.is_none_or(|noted| noted == Noted::Busy) {
                let noted = self.note(kset.seq);
                kset.noted = Some(noted);
                if noted == Noted::Busy {
                    // Whoever is at it is done by the next slice.
                    self.kset = Some(kset);
                    *steps_left = 0;
                    return None;
                }
            }
            let full = self.take_parts(&mut kset, &buf.keys, waiting, steps_left);
            if kset.next_key < buf.keys.len() {
                self.kset = Some(kset);
            }
            if full.is_some() {
                return full;
            }
        }
        None
    }

    fn take_parts(
        &mut self,
        kset: &mut OpenKset,
        keys: &[Key],
        waiting: &mut WaitingParts,
        steps_left: &mut usize,
    ) -> Option<RangeId> {
        if self.pass.is_full() {
            // Of this pass only the numbers of the ksets count. A key may have very many parts.
            kset.next_key = keys.len();
            return None;
        }
        while let Some(key) = keys.get(kset.next_key)
            && *steps_left > 0
        {
            if kset.next_lba.is_none() {
                self.count(kset.seq, key);
                self.note_crc(key);
            }
            let (page, part, next_lba) = self.part(kset, key);
            kset.next_lba = next_lba;
            kset.next_key += usize::from(next_lba.is_none());
            let is_zeroes = matches!(part.target, Target::Zero(_));
            if is_zeroes && canary::is(Canary::ZeroesForgotten) {
                continue;
            }
            *steps_left -= 1;
            let range = self.pass.memory.newest.range_of(part.at);
            if waiting.push(range, page, &part) {
                return Some(range);
            }
        }
        None
    }

    /// Reads the next kset, if it counts; its keys are in `buf` then.
    fn next_kset(&mut self, buf: &mut WalkBuf) {
        let Some(kset) = self.walk.next(&*self.pass.pmem, buf) else {
            self.stage = Stage::AtEnd;
            return;
        };
        self.counts.seq_max = self.counts.seq_max.max(kset.seq);
        self.counts.epoch_max = self.counts.epoch_max.max(kset.epoch);
        let counts = kset.seq > self.pass.known.tails.key_tail;
        if counts || canary::is(Canary::KeyTailIgnored) {
            self.kset = Some(OpenKset {
                seq: kset.seq,
                noted: (!counts).then_some(Noted::New),
                next_key: 0,
                next_lba: None,
            });
        }
    }

    fn note(&self, seq: Seq) -> Noted {
        let noted = self.pass.memory.seqs.note(seq).unwrap_or_else(|error| {
            self.pass.note_no_memory(error);
            Noted::New
        });
        if noted == Noted::Twice {
            self.pass.note_twice(seq);
        }
        noted
    }

    fn count(&mut self, seq: Seq, key: &Key) {
        let known = &self.pass.known;
        self.counts.keys += 1;
        if seq > known.tails.dirty_tail && key.kind.is_dirty() {
            let geometry = &known.superblock.geometry;
            let len_blocks = u64::from(key.len_blocks);
            if key.kind == KeyKind::Data {
                self.counts.dirty_bytes += geometry.bytes(len_blocks);
            }
            if self
                .pass
                .witness_pages
                .may_hold(geometry, key.lba, len_blocks)
            {
                self.counts.witness_dropped |= overwritten(&known.tails.witness, key);
            }
        }
    }

    /// Before the index names the place (INV-CRC-2).
    fn note_crc(&self, key: &Key) {
        if let Some(crcs) = &self.pass.memory.place_crcs
            && key.kind.has_payload()
            && !canary::is(Canary::RecoveredCrcsForgotten)
        {
            let geometry = &self.pass.known.superblock.geometry;
            crcs.note(geometry.place(self.id, key.payload_off), key);
        }
    }

    /// The part of a key that begins where the kset is, and where the next one begins.
    fn part(&self, kset: &OpenKset, key: &Key) -> (Page, PagePart, Option<Lba>) {
        let geometry = &self.pass.known.superblock.geometry;
        let place = geometry.place(self.id, key.payload_off);
        let target = if key.kind.has_payload() {
            Target::Mapped(place)
        } else {
            Target::Zero(place)
        };
        let start = kset.next_lba.unwrap_or(key.lba).0;
        let page = geometry.page_of(Lba(start));
        let page_start = geometry.page_start(page).0;
        let key_end = key.end().0;
        let end = key_end.min(page_start + u64::from(geometry.blocks_per_page()));
        let part = PagePart {
            at: self.pass.memory.index.locate(page),
            first: (start - page_start) as u32,
            len_blocks: (end - start) as u32,
            target,
            seq: kset.seq,
        };
        (page, part, (end < key_end).then_some(Lba(end)))
    }

    /// What there is in the segment, behind its last kset.
    fn found(&self, buf: &mut WalkBuf) -> Result<FoundSegment, OpenError> {
        let walk = &self.walk;
        let mut found = FoundSegment {
            info: self.info,
            copies: self.copies,
            key_end: walk.key_end(),
            last_kset_off: walk.last_kset_off(),
            torn_kset_off: walk.torn_kset_off(),
            kset_count: walk.kset_count(),
            last_seq: walk.last_seq(),
            given_up: false,
            quarantined: false,
            suspect: false,
        };
        if let Some(reason) = walk.find_damage(&*self.pass.pmem, buf)? {
            let Some(last_seq) = walk.end_on_base(self.pass.known.tails.dirty_tail) else {
                // INV-OPEN-4.
                return Err(walk.refusal(reason));
            };
            found.given_up = true;
            found.last_seq = last_seq;
        }
        Ok(found)
    }
}

/// A bit for each entry whose blocks a dirty key is about to overwrite on the base, or has already.
fn overwritten(witness: &[Witness; WITNESS_COUNT], key: &Key) -> u8 {
    let bits = witness.iter().enumerate().map(|(number, entry)| {
        let hit = super::witness::is_overwritten(entry, key);
        u8::from(hit) << number
    });
    bits.fold(0, |all, bit| all | bit)
}
