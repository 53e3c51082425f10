//! What the engine does not let pass: each assertion, driven to the point where it speaks.

use super::segments::{SegmentState, Segments};
use super::{
    Background, Budget, Cache, DataCrc, FormatPolicy, Fua, Health, HostIo, IoToken, Op, Outbox,
    Status,
};
use crate::index::{Change, Claim, LineStock};
use crate::media::SegmentInfo;
use crate::pmem::IovBuf;
use crate::sim::machine::Setup;
use crate::sim::pmem::SimPmem;
use crate::sim::recover;
use crate::units::{Agent, Epoch, Generation, Lba, NS_PER_S, Now, Page, PmemOff, SegId, Seq};
use std::sync::Arc;
use std::sync::atomic::Ordering;

const AGENT: Agent = Agent(1);

/// An empty cache in front of a base of zeroes.
pub(crate) fn new_cache() -> Arc<Cache<SimPmem>> {
    new_cache_of(&Setup::default())
}

pub(crate) fn new_cache_of(setup: &Setup) -> Arc<Cache<SimPmem>> {
    static ZEROES: [u8; 4096] = [0; 4096];
    let pmem = SimPmem::new(setup.device_size_bytes());
    let block = u64::from(setup.block_size_bytes);
    recover::open(pmem, setup.options(FormatPolicy::Auto), |_, len_blocks| {
        &ZEROES[..(len_blocks * block) as usize]
    })
    .expect("the device is blank")
}

fn background(cache: &Arc<Cache<SimPmem>>) -> Background<SimPmem> {
    cache.background().expect("the cache is new")
}

fn opened(segments: &Segments) -> SegId {
    segments.open_next(None).expect("the cache is empty")
}

#[test]
#[should_panic(expected = "INV-TAIL-1")]
fn a_dirty_tail_ahead_of_the_log_is_not_persisted() {
    let cache = new_cache();
    let mut tails = background(&cache).tails();
    tails.dirty_tail = Seq(cache.seq_next.load(Ordering::SeqCst));
    cache.persist_tails(&mut tails, AGENT);
}

#[test]
#[should_panic(expected = "INV-TAIL-1")]
fn a_key_tail_ahead_of_the_dirty_tail_is_not_persisted() {
    let cache = new_cache();
    let mut tails = background(&cache).tails();
    tails.key_tail = Seq(tails.dirty_tail.0 + 1);
    cache.persist_tails(&mut tails, AGENT);
}

#[test]
#[should_panic(expected = "INV-TAIL-2")]
fn a_dirty_tail_that_goes_back_is_not_persisted() {
    let cache = new_cache();
    let mut tails = background(&cache).tails();
    cache.seq_next.store(10, Ordering::SeqCst);
    tails.dirty_tail = Seq(5);
    cache.persist_tails(&mut tails, AGENT);
    tails.dirty_tail = Seq(4);
    cache.persist_tails(&mut tails, AGENT);
}

#[test]
fn tails_are_durable_before_anybody_sees_them() {
    // INV-TAIL-4: whenever a fence is about to take effect, the old tail is the one that counts.
    let cache = new_cache();
    let mut tails = background(&cache).tails();
    cache.seq_next.store(10, Ordering::SeqCst);
    tails.dirty_tail = Seq(5);
    let shared = Arc::downgrade(&cache);
    cache.pmem.on_crash_point(Some(Box::new(move |_, _| {
        let cache = shared.upgrade().expect("it is in use");
        assert_eq!(cache.dirty_tail(), Seq(0));
    })));
    cache.persist_tails(&mut tails, AGENT);
    assert_eq!(cache.dirty_tail(), Seq(5));
}

#[test]
fn a_barrier_that_was_closed_once_stays_closed() {
    // INV-EPOCH-2, as far as the tails are concerned.
    let cache = new_cache();
    let mut tails = background(&cache).tails();
    let before = Epoch(tails.epoch_min);
    cache.close_epoch();
    cache.persist_tails(&mut tails, AGENT);
    assert!(Epoch(tails.epoch_min) > before);
}

#[test]
#[should_panic(expected = "INV-SEG-1: a segment is freed once")]
fn a_free_segment_is_not_freed() {
    let cache = new_cache();
    cache.segments.put_free(SegId(0));
}

#[test]
#[should_panic(expected = "INV-SEG-3")]
fn an_open_segment_is_not_freed() {
    let cache = new_cache();
    let id = opened(&cache.segments);
    cache.segments.put_free(id);
}

#[test]
#[should_panic(expected = "INV-SEG-2")]
fn a_free_segment_that_is_not_in_the_queue_is_noticed() {
    let cache = new_cache();
    let id = opened(&cache.segments);
    cache.segments.get(id).set_state(SegmentState::Free);
    cache.check_invariants();
}

#[test]
#[should_panic(expected = "INV-SEG-4")]
fn a_generation_does_not_go_back() {
    let cache = new_cache();
    let info = SegmentInfo {
        generation: Generation::NONE,
        sealed: None,
        update: 2,
    };
    cache.segments.get(SegId(0)).set_info(&info);
}

#[test]
#[should_panic(expected = "INV-LOG-3")]
fn a_number_that_does_not_go_up_is_not_put_into_a_segment() {
    let cache = new_cache();
    let segment = cache.segments.get(SegId(0));
    segment.note_seq(Seq(3));
    segment.note_seq(Seq(3));
}

#[test]
#[should_panic(expected = "INV-LOG-2")]
fn a_segment_is_not_sealed_with_a_kset_half_done() {
    let cache = new_cache();
    let mut stream = super::cache::lock(&cache.streams[0]);
    assert!(stream.advance(&cache.stream_context(AGENT), 0));
    if let Some(open) = &mut stream.open {
        open.key_off += 64;
    }
    stream.seal(&cache.stream_context(AGENT));
}

#[test]
#[should_panic(expected = "INV-PMEM-2")]
fn a_channel_id_is_not_given_back_twice() {
    let cache = new_cache();
    let channel = cache.channel().expect("the first");
    drop(channel);
    cache.put_channel_id(0);
}

#[test]
fn a_damaged_payload_stops_write_back_before_the_base() {
    // INV-WB-5.
    let setup = Setup {
        data_crc: DataCrc::On,
        ..Setup::default()
    };
    let cache = new_cache_of(&setup);
    let mut channel = cache.channel().expect("the first");
    let mut background = background(&cache);
    let mut out = Outbox::new();
    let buf = IovBuf::new(&[7; 512], &[]);
    let io = HostIo {
        token: IoToken(1),
        op: Op::Write(buf.cursor(), Fua::No),
        lba: Lba(3),
        len_blocks: 1,
    };
    channel.submit(io).expect("the table is empty");
    channel.poll(Now(0), &mut out);
    assert_eq!(out.completions[0].status, Status::Success);
    // The first payload of the first segment ends with it.
    let end = cache.geometry.segment_off(SegId(1));
    cache.pmem.flip_bit(PmemOff(end.0 - 1), 0);
    cache.drain_start();
    for second in 0..10 {
        background.poll(Now(second * NS_PER_S), Budget::default(), &mut out);
    }
    assert!(out.base.is_empty(), "{:?}", out.base);
    assert!(matches!(cache.health(), Health::Degraded(_)));
    assert_eq!(cache.dirty_tail(), Seq(0));
}

#[test]
fn a_write_that_finds_no_line_waits_for_those_that_others_do_not_need() {
    let cache = new_cache();
    let mut channel = cache.channel().expect("the first");
    let mut out = Outbox::new();
    let buf = IovBuf::new(&[7; 512], &[]);
    let mut write = |lba, out: &mut Outbox| {
        let io = HostIo {
            token: IoToken(lba),
            op: Op::Write(buf.cursor(), Fua::No),
            lba: Lba(lba),
            len_blocks: 1,
        };
        channel.submit(io).expect("the table is empty");
        out.clear();
        channel.poll(Now(0), out);
    };
    write(8, &mut out);
    let mut taken = LineStock::new(10_000);
    while cache.index.stock_line(&mut taken) {}
    // Of the same page, apart from the first; then of others.
    write(11, &mut out);
    assert!(out.completions.is_empty(), "{:?}", out.completions);
    write(16, &mut out);
    let others: Vec<IoToken> = out.completions.iter().map(|done| done.token).collect();
    assert_eq!(others, [IoToken(16)]);
    cache.index.clear_stock(&mut taken);
    write(24, &mut out);
    let done: Vec<IoToken> = out.completions.iter().map(|done| done.token).collect();
    assert_eq!(done, [IoToken(11), IoToken(24)]);
    assert_eq!(cache.stats().conflicts, 2);
    cache.check_invariants();
}

#[test]
fn a_refused_write_leaves_its_place_to_whoever_writes_next() {
    // INV-PMEM-3: at an unfenced store of another agent in the same line the simulated memory stops.
    let cache = new_cache();
    let mut channels: Vec<_> = (0..=cache.core_stream_count)
        .map(|_| cache.channel().expect("there are enough"))
        .collect();
    let (Some(mut last), first) = (channels.pop(), &mut channels[0]) else {
        unreachable!("there are two at the least");
    };
    let bufs = [1, 2].map(|byte| IovBuf::new(&[byte; 4096], &[]));
    let io = |number: usize, lba| HostIo {
        token: IoToken(number as u64),
        op: Op::Write(bufs[number].cursor(), Fua::No),
        lba: Lba(lba),
        len_blocks: 8,
    };
    let mut out = Outbox::new();
    let page = cache.index.locate(Page(1));
    let is_apart = |number: &u64| cache.index.locate(Page(*number)).bucket() != page.bucket();
    let apart = (2..16)
        .find(is_apart)
        .expect("a page elsewhere in the index")
        * 8;
    let other = 40;
    assert_eq!(cache.index.claim(page, other), Claim::Taken);
    first.submit(io(0, 8)).expect("the table is empty");
    first.poll(Now(0), &mut out);
    assert!(out.completions.is_empty(), "somebody is at the page");
    // Both have the same stream: with as many channels as streams they begin again.
    last.submit(io(1, apart)).expect("the table is empty");
    last.poll(Now(0), &mut out);
    assert_eq!(out.completions.len(), 1);
    cache.index.release(page.bucket(), other, Change::Moved);
    first.poll(Now(0), &mut out);
    assert_eq!(out.completions.len(), 2);
    for (lba, byte) in [(8, 1), (apart, 2)] {
        let buf = IovBuf::zeroed(4096);
        let read = HostIo {
            token: IoToken(lba),
            op: Op::Read(buf.cursor()),
            lba: Lba(lba),
            len_blocks: 8,
        };
        first.submit(read).expect("the table is empty");
        first.poll(Now(0), &mut out);
        assert_eq!(buf.bytes(), [byte; 4096], "at {lba}");
    }
    assert_eq!(out.completions.len(), 4);
}
