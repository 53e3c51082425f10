//! Which key has its payload at a place: the index knows places alone, so the keys of the segment are gone through. For
//! reads that meet damage, which have to know whether the base holds the same.
//!
//! A segment may have very many keys. So a channel has one search at a time, which goes on by a bounded piece in each poll;
//! other reads that ask meanwhile wait for their turn. None of them looks at the lost memory again before it has an answer:
//! each look at that is an exception.
//! The next search begins where the last one ended, and goes round: who reads a damaged segment from one end to the other
//! finds each key next to the last.

use super::cache::Cache;
use super::channel::{Core, RequestId};
use super::kset_cursor::KsetCursor;
use crate::canary::{self, Canary};
use crate::media::{KEYS_START_BYTES, KSET_KEYS_MAX, Key, KsetReader, Place};
use crate::pmem::Pmem;
use crate::units::{Generation, Lba, SegId, Seq};

/// What one poll reads of keys; one kset may go beyond. Some ten microseconds.
const BYTES_PER_POLL: u32 = 16 << 10;

/// Whose payload has this block at this place?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Question {
    asker: RequestId,
    lba: Lba,
    place: Place,
    /// Of the segment: keys of an earlier use say nothing.
    generation: Generation,
}

/// What has its payload at a place.
#[derive(Clone, Copy, Debug)]
pub(super) enum Owner {
    /// This key, of a kset with this number.
    Key(Seq, Key),
    /// No key that can be read says so.
    Unknown,
}

/// See the module.
#[derive(Debug)]
pub(super) struct KeySearch {
    question: Option<Question>,
    /// Kept until it is asked for.
    answer: Option<Owner>,
    segment: SegId,
    /// The next kset to be looked at.
    next: KsetCursor,
    /// Where the search has begun.
    begun_off: u32,
    /// It goes on from the first kset to where it has begun.
    has_turned: bool,
    reader: KsetReader,
    keys: Vec<Key>,
}

impl Default for KeySearch {
    fn default() -> Self {
        Self {
            question: None,
            answer: None,
            segment: SegId(0),
            next: KsetCursor::start(Generation::NONE),
            begun_off: KEYS_START_BYTES,
            has_turned: false,
            reader: KsetReader::default(),
            keys: Vec::with_capacity(KSET_KEYS_MAX),
        }
    }
}

impl Core {
    /// Looks for the key of a block that `asker`, a read, has found at a place and cannot take from there. It is the next
    /// block of that read. To be asked in the grace period in which the index has named the place (INV-GRACE-1): until
    /// its end the keys stay what they are. `None`: to be asked again when the read does not have to wait any more.
    pub(super) fn find_owner<P: Pmem>(
        &mut self,
        cache: &Cache<P>,
        asker: RequestId,
        lba: Lba,
        place: Place,
    ) -> Option<Owner> {
        let id = cache.geometry.segment_of(place);
        let asked = Question {
            asker,
            lba,
            place,
            generation: cache.segments.get(id).generation(),
        };
        match self.key_search.question {
            Some(question) if question == asked => {
                let answer = self.key_search.answer.take()?;
                self.key_search.question = None;
                Some(answer)
            }
            Some(other) if other.asker != asker && self.is_asking(other) => None,
            _ => {
                // It goes on with the next poll: in this one another may have gone on.
                self.key_search.begin(id, asked);
                None
            }
        }
    }

    /// Whether a read has asked for a key and has to wait on, be it for its own search, which goes on by a piece, or for that
    /// of another.
    #[inline]
    pub(super) fn waits_for_key<P: Pmem>(&mut self, cache: &Cache<P>, asker: RequestId) -> bool {
        let read = self
            .requests
            .get(asker)
            .and_then(|request| request.read.as_ref());
        read.is_some_and(|read| read.asks_for_key) && self.search_goes_on(cache, asker)
    }

    #[cold]
    fn search_goes_on<P: Pmem>(&mut self, cache: &Cache<P>, asker: RequestId) -> bool {
        match self.key_search.question {
            Some(own) if own.asker == asker => {
                if cache.is_overwritten(own.lba, own.place) || cache.is_clean(own.place) {
                    return false;
                }
                self.key_search.go_on(cache, own);
                self.key_search.answer.is_none()
            }
            Some(other) => self.is_asking(other),
            None => false,
        }
    }

    /// Whether a read is still where it was when it asked.
    fn is_asking(&self, question: Question) -> bool {
        let request = self.requests.get(question.asker);
        request.is_some_and(|request| {
            let read = request.read.as_ref();
            read.is_some_and(|read| read.next_block(request.io.lba) == question.lba)
        })
    }
}

impl KeySearch {
    fn begin(&mut self, id: SegId, question: Question) {
        if self.segment != id || self.next.generation != question.generation {
            self.segment = id;
            self.next = KsetCursor::start(question.generation);
        }
        self.question = Some(question);
        self.answer = None;
        self.begun_off = self.next.off;
        self.has_turned = false;
    }

    /// Looks at some more ksets, if there is no answer yet.
    fn go_on<P: Pmem>(&mut self, cache: &Cache<P>, question: Question) {
        let mut left_bytes = BYTES_PER_POLL;
        while left_bytes > 0 && self.answer.is_none() {
            if self.has_turned && self.next.off >= self.begun_off {
                self.answer = Some(Owner::Unknown);
                return;
            }
            let here = self.next;
            self.keys.clear();
            // Not to the end that the segment tells: a key may be published before that has moved on. Behind the last
            // kset there is none that is valid.
            let (reader, keys) = (&mut self.reader, &mut self.keys);
            match self.next.read(cache, self.segment, reader, keys) {
                Ok(kset) => {
                    left_bytes = left_bytes.saturating_sub(kset.size_bytes);
                    if let Some(key) = self.find(cache, question) {
                        self.answer = Some(Owner::Key(kset.seq, key));
                        self.next = here;
                    }
                }
                Err(_) if self.has_turned => self.begun_off = KEYS_START_BYTES,
                Err(_) => {
                    self.has_turned = true;
                    self.next = KsetCursor::start(here.generation);
                }
            }
        }
    }

    /// The key of the kset that was read which says so.
    fn find<P: Pmem>(&self, cache: &Cache<P>, question: Question) -> Option<Key> {
        let says_so = |key: &&Key| {
            let Place(first) = cache.geometry.place(self.segment, key.payload_off);
            let is_block = (key.lba.0..key.end().0).contains(&question.lba.0);
            is_block && first + (question.lba.0 - key.lba.0) == question.place.0
        };
        let mut with_payload = self.keys.iter().filter(|key| key.kind.has_payload());
        if canary::is(Canary::DamageJudgedByNeighbour) && self.keys.iter().any(|key| says_so(&key))
        {
            return with_payload.next().copied();
        }
        with_payload.find(says_so).copied()
    }
}
