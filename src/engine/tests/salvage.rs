//! Segments whose keys become unreadable while there is something dirty in them.

use super::*;
use crate::index::BlockMap;
use crate::pmem::IovBuf;
use crate::sched;
use crate::sim::plain::{self, BackgroundRuns, Plain};
use crate::units::{Lba, NS_PER_S, Now, Page, SegId};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

const BLOCK: usize = 512;
const POLLS_MAX: usize = 10_000;

/// A cache that is written by two channels, each into a segment of its own, and what it must hold.
struct Cached {
    plain: Plain<SimPmem>,
    contents: Vec<u8>,
    fill: u8,
}

impl Cached {
    fn new() -> Self {
        let base = vec![0xbb; BLOCKS as usize * BLOCK];
        let pmem = SimPmem::new(DEVICE_SIZE_BYTES);
        let options = options(BLOCK as u32, None);
        let plain = Plain::new(pmem, base.clone(), options, BackgroundRuns::InDrains);
        Self {
            plain: plain.expect("the device is blank"),
            contents: base,
            fill: 0,
        }
    }

    fn blocks(&mut self, lba: u64, len_blocks: u64) -> &mut [u8] {
        &mut self.contents[lba as usize * BLOCK..][..len_blocks as usize * BLOCK]
    }

    fn write(&mut self, channel: usize, lba: u64, len_blocks: u64) {
        self.fill = self.fill % 0x7f + 1;
        let fill = self.fill;
        self.blocks(lba, len_blocks).fill(fill);
        let buf = IovBuf::new(self.blocks(lba, len_blocks), &[]);
        let op = Op::Write(buf.cursor(), Fua::No);
        let status = self.plain.run(channel, op, lba, len_blocks);
        assert_eq!(status, Status::Success);
    }

    fn clear(&mut self, channel: usize, op: Op, lba: u64, len_blocks: u64) {
        self.blocks(lba, len_blocks).fill(0);
        let status = self.plain.run(channel, op, lba, len_blocks);
        assert_eq!(status, Status::Success);
    }

    fn segment_of(&self, lba: u64) -> SegId {
        let cache = &self.plain.cache;
        let found = cache.index.lookup(cache.index.locate(Page(lba / 8)));
        match found.expect("nobody writes").map.block((lba % 8) as u32) {
            BlockMap::Mapped(place) | BlockMap::Zero(place) => cache.geometry.segment_of(place),
            BlockMap::Absent => panic!("block {lba} is not cached"),
        }
    }

    /// A line of the keys of a segment cannot be read any more.
    fn lose_keys(&self, id: SegId, line: u64) {
        let cache = &self.plain.cache;
        let off = u64::from(KEYS_START_BYTES) + line * 64;
        assert!(off < u64::from(cache.segments.get(id).key_end()));
        cache.pmem.poison(cache.geometry.segment_off(id).plus(off));
    }

    /// Until write-back knows that keys are lost.
    fn poll_until_told(&mut self) {
        for _ in 0..POLLS_MAX {
            self.plain.poll_background();
            if self.plain.cache.segments.key_losses() > 0 {
                return;
            }
        }
        panic!("nobody notices: {:?}", self.plain.cache.info());
    }

    fn check_base(&self) {
        let blocks = |bytes: &[u8]| -> Vec<u8> { bytes.iter().step_by(BLOCK).copied().collect() };
        assert_eq!(blocks(&self.plain.base), blocks(&self.contents));
        assert!(self.plain.base == self.contents);
    }

    /// Everything is on the base, and the segment out of service.
    fn check_saved(&mut self, id: SegId) {
        assert!(self.plain.drain(), "{:?}", self.plain.cache.info());
        self.check_base();
        (0..POLLS_MAX / 10).for_each(|_| self.plain.poll_background());
        let cache = &self.plain.cache;
        assert_eq!(cache.health(), Health::Online);
        assert_eq!(cache.segments.get(id).state(), SegmentState::Quarantined);
        let (info, stats) = (cache.info(), cache.stats());
        assert_eq!((info.dirty_bytes, info.segments_quarantined), (0, 1));
        assert_eq!(stats.key_errors, 1);
        cache.check_invariants();
    }
}

#[test]
fn a_block_without_its_key_is_written_in_its_place_among_its_versions() {
    // INV-WB-6.
    let mut cached = Cached::new();
    // Only there; parts of pages, and of a page that is in both segments.
    cached.write(0, 3, 2);
    cached.write(0, 16, 8);
    cached.write(0, 33, 1);
    cached.write(1, 36, 2);
    cached.clear(0, Op::Unmap, 48, 20);
    cached.clear(0, Op::WriteZeroes, 100, 3);
    // There it is newer.
    cached.write(1, 120, 8);
    cached.write(0, 122, 3);
    cached.clear(1, Op::Unmap, 140, 9);
    cached.write(0, 141, 2);
    cached.write(1, 160, 4);
    cached.clear(0, Op::WriteZeroes, 161, 2);
    // There it is older.
    cached.write(0, 200, 8);
    cached.write(1, 199, 4);
    cached.clear(0, Op::Unmap, 220, 8);
    cached.write(1, 221, 2);
    cached.write(0, 240, 2);
    cached.clear(1, Op::Unmap, 240, 1);
    // And three in turn.
    for channel in [1, 0, 1, 0] {
        cached.write(channel, 250, 2);
    }
    let id = cached.segment_of(3);
    assert_eq!(cached.segment_of(250), id);
    assert_ne!(cached.segment_of(120), id);
    cached.lose_keys(id, 4);
    cached.check_saved(id);
}

#[test]
fn what_is_written_while_it_is_looked_for_comes_last() {
    for pause in 0..40 {
        let mut cached = Cached::new();
        for lba in 0..60 {
            cached.write(0, lba * 8 + lba % 8, 1);
        }
        let id = cached.segment_of(0);
        cached.lose_keys(id, 30);
        cached.plain.cache.drain_start();
        cached.poll_until_told();
        // The segment gets no more, so these are in others.
        for round in 0..40 {
            if round == pause {
                (0..60).for_each(|lba| cached.write(round as usize % 2, lba * 8 + lba % 8, 1));
            }
            cached.plain.poll_background();
        }
        cached.check_saved(id);
    }
}

#[test]
fn a_segment_without_keys_gets_no_more() {
    let mut cached = Cached::new();
    for lba in 0..10 {
        cached.write(0, lba, 1);
    }
    let id = cached.segment_of(9);
    cached.lose_keys(id, 8);
    cached.plain.cache.drain_start();
    cached.poll_until_told();
    cached.plain.poll_background();
    let segment = |cached: &Cached| cached.plain.cache.segments.get(id).state();
    assert_eq!(segment(&cached), SegmentState::Sealed);
    cached.write(0, 9, 1);
    assert_ne!(cached.segment_of(9), id);
    let told = cached.plain.cache.drain_status().error;
    let named = format!("segments {} cannot be read", id.0);
    assert!(
        told.as_ref().is_some_and(|text| text.contains(&named)),
        "{told:?}"
    );
    cached.check_saved(id);
}

#[test]
fn a_loss_that_matters_to_nobody_is_forgotten() {
    let mut cached = Cached::new();
    cached.write(0, 3, 2);
    cached.write(0, 5, 2);
    assert!(cached.plain.drain());
    let id = cached.segment_of(3);
    cached.lose_keys(id, 0);
    assert!(cached.plain.cache.segments.lose_keys(id));
    assert!(!cached.plain.cache.segments.lose_keys(id));
    assert!(cached.plain.cache.segments.keyless().eq([id]));
    for _ in 0..100 {
        cached.plain.poll_background();
        assert_eq!(cached.plain.cache.health(), Health::Online);
    }
    // It was open, so it could have got something dirty.
    let state = cached.plain.cache.segments.get(id).state();
    assert_eq!(state, SegmentState::Quarantined);
    cached.write(1, 4, 4);
    assert!(cached.plain.drain());
    cached.check_base();
}

/// Writes a block.
fn write_block(channel: &mut Channel<SimPmem>, lba: u64) {
    let (buf, mut out) = (IovBuf::new(&[9; BLOCK], &[]), Outbox::new());
    let io = HostIo {
        token: IoToken(1),
        op: Op::Write(buf.cursor(), Fua::No),
        lba: Lba(lba),
        len_blocks: 1,
    };
    channel.submit(io).expect("it was idle");
    channel.poll(Now(0), &mut out);
    assert_eq!(out.completions.len(), 1, "nobody is in the way");
}

/// The first thing dirty in a segment without keys comes when the loss is just being noted: its writer looked for that
/// before, and seals the segment with the next write.
#[test]
fn keys_that_are_lost_in_a_segment_that_is_just_being_sealed_are_not_forgotten() {
    let mut written = 0;
    for point in 1_u32.. {
        let mut cached = Cached::new();
        cached.write(0, 3, 2);
        assert!(cached.plain.drain());
        let (id, cache) = (cached.segment_of(3), Arc::clone(&cached.plain.cache));
        cached.lose_keys(id, 0);
        let other = cache.channel().expect("there are few");
        let mut channel = std::mem::replace(cached.plain.channel_mut(0), other);
        let cached = Rc::new(RefCell::new(cached));
        let points_left = Rc::new(Cell::new(point));
        let (losing, left) = (Rc::clone(&cached), Rc::clone(&points_left));
        let hook = Rc::new(move || {
            let before = left.replace(left.get().saturating_sub(1));
            if before == 1 {
                sched::with_hook(None, || {
                    let plain = &mut losing.borrow_mut().plain;
                    assert!(plain.cache.segments.lose_keys(id));
                    plain.poll_background();
                });
            }
        });
        sched::with_hook(Some(hook), || write_block(&mut channel, 9));
        if points_left.get() > 0 {
            break;
        }
        write_block(&mut channel, 20);
        let mut cached = cached.borrow_mut();
        written += u32::from(cached.segment_of(9) == id);
        for lba in [9, 20] {
            cached.blocks(lba, 1).fill(9);
        }
        assert_ne!(cached.segment_of(20), id, "point {point}");
        // Nobody asks for a drain: what lies there is saved since its keys are lost.
        (0..500).for_each(|_| cached.plain.poll_background());
        let state = cache.segments.get(id).state();
        assert_eq!(state, SegmentState::Quarantined, "point {point}");
        assert!(cached.plain.drain());
        cached.check_base();
    }
    assert!(written > 0, "it came too early every time");
}

/// INV-WB-6: nothing is under way between the failure of the base and the one retry of it.
#[test]
fn a_stop_waits_for_what_a_salvage_tries_again() {
    let base = vec![0xbb; BLOCKS as usize * BLOCK];
    let pmem = SimPmem::new(DEVICE_SIZE_BYTES);
    let cache = plain::open(pmem, &base, options(BLOCK as u32, None)).expect("it is blank");
    let mut background = cache.background().expect("the first");
    let mut channel = cache.channel().expect("the first");
    write_block(&mut channel, 9);
    let id = cache.segments.next_opened().expect("there is one");
    cache.segments.tell_opened(id);
    let keys = u64::from(KEYS_START_BYTES);
    cache.pmem.poison(cache.geometry.segment_off(id).plus(keys));
    assert!(cache.segments.lose_keys(id));
    background.stop();
    let (mut writes, mut out) = (0, Outbox::new());
    for poll in 0..1000 {
        if background.in_flight() == 0 {
            break;
        }
        out.clear();
        let now = Now(poll * NS_PER_S / 10);
        background.poll(now, Budget::default(), &mut out);
        for request in std::mem::take(&mut out.base) {
            let is_write = matches!(request.kind, BaseKind::Write { .. });
            writes += u32::from(is_write);
            let result = if is_write && writes == 1 {
                Err(BaseError::Io)
            } else {
                Ok(())
            };
            background.on_base_done(request.op, result, now);
        }
    }
    assert_eq!(writes, 2);
    assert!(cache.dirty_tail() >= Seq(1));
}
