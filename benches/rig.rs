//! Load on the engine without SPDK, for the benches: a base that answers at once, requests as fast as they end.

use crate::random::Rng;
use pcache::engine::{
    Background, BaseKind, Budget, Cache, Channel, HostIo, IoToken, Op, Outbox, Progress,
};
use pcache::pmem::{IovBuf, IovCursor, MappedPmem};
use pcache::units::{Lba, Now};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

/// Requests that a rig can keep under way.
const DEPTH_MAX: usize = 128;
/// For how many polls of the channel a background that found nothing to do is left alone. An application leaves
/// it alone for 50 us.
const NAP_POLLS: u32 = 64;
/// The largest request in bytes.
const IO_SIZE_BYTES_MAX: usize = 128 << 10;

#[expect(clippy::disallowed_methods, reason = "a bench measures time")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Where requests go.
#[derive(Clone, Copy)]
pub(crate) enum Pattern {
    Random,
    Sequential,
}

/// Requests of one kind.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) depth: usize,
    pub(crate) len_blocks: u64,
    pub(crate) pattern: Pattern,
}

/// Keeps requests under way on one channel.
pub(crate) struct Rig {
    channel: Channel<MappedPmem>,
    background: Background<MappedPmem>,
    buffers: Vec<IovBuf>,
    out: Outbox,
    background_out: Outbox,
    nap_polls_left: u32,
    rng: Rng,
    /// Time goes with the requests, so much for each that has ended, so that what a profiler counts is the same in each run.
    pub(crate) counted_ns: Option<u64>,
    clock: Instant,
    block_count: u64,
    /// Of a sequential load.
    place_next: u64,
    /// Requests that have ended.
    done: u64,
}

/// Some machines store zeroes at twice the rate of anything else.
pub(crate) fn noise(rng: &mut Rng, len_bytes: usize) -> Vec<u8> {
    let words = (0..len_bytes / 8).map(|_| rng.next().to_le_bytes());
    words.flatten().collect()
}

impl Rig {
    pub(crate) fn new(cache: &Arc<Cache<MappedPmem>>) -> Self {
        Self {
            channel: cache.channel().expect("a channel"),
            background: cache.background().expect("the background"),
            buffers: (0..DEPTH_MAX)
                .map(|_| IovBuf::zeroed(IO_SIZE_BYTES_MAX))
                .collect(),
            out: Outbox::new(),
            background_out: Outbox::new(),
            nap_polls_left: 0,
            rng: Rng::new(1),
            counted_ns: None,
            clock: now(),
            block_count: cache.info().block_count,
            place_next: 0,
            done: 0,
        }
    }

    /// What is written is noise from now on, and not what the base has: no cache that has written it back may be opened again.
    pub(crate) fn with_noise(mut self) -> Self {
        for buffer in &mut self.buffers {
            *buffer = IovBuf::new(&noise(&mut self.rng, IO_SIZE_BYTES_MAX), &[]);
        }
        self
    }

    /// Keeps requests under way until `enough`, which is told how many have ended; returns how many have in
    /// all.
    pub(crate) fn run(
        &mut self,
        load: Load,
        make: impl Fn(IovCursor) -> Op,
        enough: impl Fn(u64) -> bool,
    ) -> u64 {
        let done_before = self.done;
        for slot in 0..load.depth {
            self.submit(slot, load, &make);
        }
        let mut stopping = false;
        let mut under_way = load.depth;
        while under_way > 0 {
            self.out.clear();
            let at = Now(match self.counted_ns {
                Some(counted_ns) => self.done * counted_ns,
                None => self.clock.elapsed().as_nanos() as u64,
            });
            self.channel.poll(at, &mut self.out);
            self.run_background(at);
            for number in 0..self.out.completions.len() {
                let slot = self.out.completions[number].token.0 as usize;
                self.done += 1;
                if stopping {
                    under_way -= 1;
                } else {
                    self.submit(slot, load, &make);
                }
            }
            for request in std::mem::take(&mut self.out.base) {
                self.channel.on_base_done(request.op, Ok(()));
            }
            stopping = enough(self.done - done_before);
        }
        self.done - done_before
    }

    fn submit(&mut self, slot: usize, load: Load, make: &impl Fn(IovCursor) -> Op) {
        let places = self.block_count / load.len_blocks;
        let place = match load.pattern {
            Pattern::Random => self.rng.next() % places,
            Pattern::Sequential => self.place_next % places,
        };
        self.place_next += 1;
        let io = HostIo {
            token: IoToken(slot as u64),
            op: make(self.buffers[slot].cursor()),
            lba: Lba(place * load.len_blocks),
            len_blocks: load.len_blocks,
        };
        self.channel.submit(io).expect("the table has room");
    }

    fn run_background(&mut self, at: Now) {
        if self.nap_polls_left > 0 {
            self.nap_polls_left -= 1;
            return;
        }
        self.background_out.clear();
        let progress = self
            .background
            .poll(at, Budget::default(), &mut self.background_out);
        if progress == Progress::Idle && self.background_out.base.is_empty() {
            self.nap_polls_left = NAP_POLLS;
        }
        for request in &self.background_out.base {
            black_box(matches!(request.kind, BaseKind::Flush));
            self.background.on_base_done(request.op, Ok(()), at);
        }
    }
}
