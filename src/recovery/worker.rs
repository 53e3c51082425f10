//! Workers of recovery. Each of them goes through a segment at a time, and puts its keys into the index.

use super::error::OpenError;
use super::pass::{Counts, FoundSegment, Pass};
use super::seqs::Noted;
use super::walk::{SegmentWalk, WalkBuf};
use crate::canary::{self, Canary};
use crate::engine::lock;
use crate::index::{Change, Claim, LineStock, PagePart, Target};
use crate::media::{Copies, Key, KeyKind, SegmentInfo, WITNESS_COUNT, Witness};
use crate::pmem::Pmem;
use crate::units::{Lba, SegId, Seq};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Parts of pages that are prepared before they are installed, so that what the processor has to fetch for them
/// is on its way meanwhile.
const PARTS_MAX: usize = 64;
/// How many parts ahead of an installation its lines are asked for.
const PARTS_AHEAD: usize = 8;
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
            scanning: None,
            buf: WalkBuf::default(),
            parts: Vec::with_capacity(PARTS_MAX),
            installed: 0,
            lines: LineStock::new(1),
        }
    }
}

/// See the module. Used by one thread at a time; it has to be asked for work until that is over.
#[derive(Debug)]
pub struct Worker<P> {
    crew: Arc<Crew<P>>,
    /// What it claims buckets with.
    number: u16,
    scanning: Option<Scanning<P>>,
    buf: WalkBuf,
    parts: Vec<PagePart>,
    /// How many of these are in the index.
    installed: usize,
    /// Empty between installations.
    lines: LineStock,
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
        let mut scanning = match self.scanning.take() {
            Some(scanning) => scanning,
            None => match self.begin() {
                Ok(scanning) => scanning,
                Err(work) => return work,
            },
        };
        let mut steps_left = STEPS_PER_SLICE;
        while steps_left > 0 {
            if self.parts.is_empty() {
                self.prepare(&mut scanning, &mut steps_left);
            }
            if self.parts.is_empty() && scanning.stage == Stage::AtEnd {
                self.end(scanning);
                return Work::Done;
            }
            if !self.install(&scanning) {
                break;
            }
        }
        scanning.pass.add(&std::mem::take(&mut scanning.counts));
        self.scanning = Some(scanning);
        Work::Done
    }

    /// The next segment that is to be walked.
    fn begin(&mut self) -> Result<Scanning<P>, Work> {
        if self.crew.over.load(Ordering::Acquire) {
            return Err(Work::Over);
        }
        let pass = self.crew.pass.try_lock().ok().and_then(|pass| pass.clone());
        let pass = pass.ok_or(Work::Nothing)?;
        let id = pass.take_segment().ok_or(Work::Nothing)?;
        match pass.info_of(id) {
            Ok(Some((info, copies))) => Ok(Scanning {
                walk: SegmentWalk::new(&pass.known.superblock, id, info),
                pass,
                id,
                info,
                copies,
                kset: None,
                stage: Stage::Walking,
                counts: Counts::default(),
            }),
            Ok(None) => {
                pass.end_segment(id, None);
                Err(Work::Done)
            }
            Err(error) => {
                pass.end_segment(id, Some(Err(error)));
                Err(Work::Done)
            }
        }
    }

    /// Fills the list of parts from the next ksets.
    fn prepare(&mut self, scanning: &mut Scanning<P>, steps_left: &mut usize) {
        while self.parts.len() < PARTS_MAX && *steps_left > 0 {
            *steps_left -= 1;
            let Some(mut kset) = scanning.kset.take() else {
                scanning.next_kset(&mut self.buf);
                if scanning.stage == Stage::AtEnd {
                    return;
                }
                continue;
            };
            if kset.noted.is_none_or(|noted| noted == Noted::Busy) {
                let noted = scanning.note(kset.seq);
                kset.noted = Some(noted);
                if noted == Noted::Busy {
                    // Whoever is at it is done by the next slice.
                    scanning.kset = Some(kset);
                    *steps_left = 0;
                    return;
                }
            }
            while let Some(key) = self.buf.keys.get(kset.next_key)
                && self.parts.len() < PARTS_MAX
            {
                if kset.next_lba.is_none() {
                    scanning.count(kset.seq, key);
                    scanning.note_crc(key);
                }
                let (part, next_lba) = scanning.part(&kset, key);
                kset.next_lba = next_lba;
                kset.next_key += usize::from(next_lba.is_none());
                let is_zeroes = matches!(part.target, Target::Zero(_));
                if is_zeroes && canary::is(Canary::ZeroesForgotten) {
                    continue;
                }
                let pass = &scanning.pass;
                pass.newest.prefetch(&pass.index, part.at);
                self.parts.push(part);
                *steps_left = steps_left.saturating_sub(1);
            }
            if kset.next_key < self.buf.keys.len() {
                scanning.kset = Some(kset);
            }
        }
    }

    /// Puts the parts into the index. `false`: another worker is at one of the pages, and it was not waited for.
    fn install(&mut self, scanning: &Scanning<P>) -> bool {
        let pass = &scanning.pass;
        let ask_for = |part: &PagePart| pass.newest.prefetch_parts(&pass.index, part.at);
        let begun = &self.parts[self.installed..];
        begun.iter().take(PARTS_AHEAD).for_each(ask_for);
        while let Some(part) = self.parts.get(self.installed)
            && !pass.is_full()
        {
            if let Some(later) = self.parts.get(self.installed + PARTS_AHEAD) {
                ask_for(later);
            }
            let claim = pass.index.claim(part.at, self.number);
            if claim == Claim::Busy && !canary::is(Canary::RecoveryClaimsIgnored) {
                return false;
            }
            let result = pass.newest.install(&pass.index, part, &mut self.lines);
            if claim == Claim::Taken {
                pass.index
                    .release(part.at.bucket(), self.number, Change::Written);
            }
            match result {
                Ok(()) => self.installed += 1,
                Err(_) => pass.note_full(scanning.id),
            }
        }
        self.parts.clear();
        self.installed = 0;
        true
    }

    /// Tells what there is in a segment.
    fn end(&mut self, scanning: Scanning<P>) {
        let Scanning {
            pass, id, counts, ..
        } = &scanning;
        let found = scanning.found(&mut self.buf);
        pass.add(counts);
        pass.end_segment(*id, Some(found));
    }
}

impl<P: Pmem> Scanning<P> {
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
        let noted = self.pass.seqs.note(seq);
        if noted == Noted::Twice {
            self.pass.note_twice(seq);
        }
        noted
    }

    fn count(&mut self, seq: Seq, key: &Key) {
        let known = &self.pass.known;
        self.counts.keys += 1;
        if seq > known.tails.dirty_tail && key.kind.is_dirty() {
            if key.kind == KeyKind::Data {
                let len_blocks = u64::from(key.len_blocks);
                self.counts.dirty_bytes += known.superblock.geometry.bytes(len_blocks);
            }
            if self
                .pass
                .witness_pages
                .may_hold(&known.superblock.geometry, key)
            {
                self.counts.witness_dropped |= overwritten(&known.tails.witness, key);
            }
        }
    }

    /// Before the index names the place (INV-CRC-2).
    fn note_crc(&self, key: &Key) {
        if let Some(crcs) = &self.pass.place_crcs
            && key.kind.has_payload()
            && !canary::is(Canary::RecoveredCrcsForgotten)
        {
            let geometry = &self.pass.known.superblock.geometry;
            crcs.note(geometry.place(self.id, key.payload_off), key);
        }
    }

    /// The part of a key that begins where the kset is, and where the next one begins.
    fn part(&self, kset: &OpenKset, key: &Key) -> (PagePart, Option<Lba>) {
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
        let key_end = key.lba.0 + u64::from(key.len_blocks);
        let end = key_end.min(page_start + u64::from(geometry.blocks_per_page()));
        let part = PagePart {
            at: self.pass.index.locate(page),
            first: (start - page_start) as u32,
            len_blocks: (end - start) as u32,
            target,
            seq: kset.seq,
        };
        (part, (end < key_end).then_some(Lba(end)))
    }

    /// What there is in the segment, behind its last kset.
    fn found(&self, buf: &mut WalkBuf) -> Result<FoundSegment, OpenError> {
        let walk = &self.walk;
        let mut found = FoundSegment {
            info: self.info,
            copies: self.copies,
            key_end: walk.key_end(),
            kset_count: walk.kset_count(),
            last_seq: walk.last_seq(),
            given_up: false,
            quarantined: false,
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
