//! Requests of a recorded block device, replayed through the engine alone; `make bench-trace` asks for it.
//!
//! `trace PATH MIB BLOCKS REQUESTS`: replays the file REQUESTS, which `trace.py` writes, through a new cache of so many
//! MiB in the file at PATH, before a base of BLOCKS blocks of 512 bytes. One request is under way at a time; each is a
//! line `read LBA LEN` or `write LBA LEN`, in blocks. The counters of the cache are the line of JSON in the end.
//!
//! Between two requests the background runs until it has nothing to do. That is how it is in the application: there
//! the way of the next request through the network is so much longer than a slice of background work that the
//! background has the core to itself, and sleeps most of the time. Time is counted, not measured, so that the same
//! trace always gives the same figures.

mod device;

use device::{Base, map, open};
use pcache::engine::{
    Background, Budget, Cache, Channel, DataCrc, Fua, HostIo, IoToken, Op, Outbox, Progress,
    Setting, SettingChange, Status,
};
use pcache::pmem::{IovBuf, MappedPmem};
use pcache::units::{Lba, Now};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;

const BLOCK_SIZE_BYTES: u32 = 512;
/// As `trace.py` says: what is kept free is no cache.
const GC_PERCENT: u32 = 90;
/// The largest request, as `trace.py` splits them. A cache of any size takes a write of that.
const REQUEST_BYTES_MAX: usize = 64 << 10;
/// From one request to the next: about what the replay over NVMe/TCP takes. It matters to the age of dirty data alone.
const REQUEST_NS: u64 = 100_000;
/// Of a poll of a request that waits.
const POLL_NS: u64 = 1_000;
/// After so many polls a request or the background counts as stuck.
const POLLS_MAX: usize = 10_000_000;

/// One request after the other.
struct Replay {
    channel: Channel<MappedPmem>,
    background: Background<MappedPmem>,
    buffer: IovBuf,
    out: Outbox,
    background_out: Outbox,
    at: Now,
}

impl Replay {
    fn new(cache: &Arc<Cache<MappedPmem>>) -> Self {
        Self {
            channel: cache.channel().expect("a channel"),
            background: cache.background().expect("the background"),
            buffer: IovBuf::zeroed(REQUEST_BYTES_MAX),
            out: Outbox::new(),
            background_out: Outbox::new(),
            at: Now(0),
        }
    }

    /// Runs a request to its end, then lets the background do what there is to do.
    fn run(&mut self, op: Op, lba: u64, len_blocks: u64) {
        let io = HostIo {
            token: IoToken(0),
            op,
            lba: Lba(lba),
            len_blocks,
        };
        self.at.0 += REQUEST_NS;
        self.channel.submit(io).expect("the table has room");
        let ended = (0..POLLS_MAX).find_map(|_| self.poll_request());
        assert_eq!(ended, Some(Status::Success), "{io:?}");
        let idle = (0..POLLS_MAX).any(|_| self.poll_background() == Progress::Idle);
        assert!(idle, "the background always finds something to do");
    }

    fn poll_request(&mut self) -> Option<Status> {
        self.at.0 += POLL_NS;
        self.out.clear();
        self.channel.poll(self.at, &mut self.out);
        let status = self.out.completions.first().map(|done| done.status);
        for request in std::mem::take(&mut self.out.base) {
            self.channel.on_base_done(request.op, Ok(()));
        }
        if status.is_none() {
            // It may be what the request waits for.
            self.poll_background();
        }
        status
    }

    fn poll_background(&mut self) -> Progress {
        self.background_out.clear();
        let progress = self
            .background
            .poll(self.at, Budget::default(), &mut self.background_out);
        let asked = !self.background_out.base.is_empty();
        for request in &self.background_out.base {
            self.background.on_base_done(request.op, Ok(()), self.at);
        }
        // It has not heard of their end before.
        if asked { Progress::Busy } else { progress }
    }

    /// Brings everything that is dirty to the base.
    fn drain(&mut self, cache: &Cache<MappedPmem>) {
        cache.drain_start();
        let drained = (0..POLLS_MAX).any(|_| {
            self.at.0 += POLL_NS;
            self.poll_background();
            !cache.drain_status().in_progress
        });
        assert!(drained, "the drain ends");
    }
}

/// Runs a line of the file.
fn replay_line(replay: &mut Replay, line: &str) {
    let mut words = line.split_ascii_whitespace();
    let kind = words.next().expect("the kind of a request");
    let [lba, len_blocks] =
        [(); 2].map(|()| words.next().and_then(|word| word.parse::<u64>().ok()));
    let (lba, len_blocks) = (
        lba.expect("its first block"),
        len_blocks.expect("its length"),
    );
    assert!(
        len_blocks <= REQUEST_BYTES_MAX as u64 / u64::from(BLOCK_SIZE_BYTES),
        "{line}: longer than a request can be"
    );
    let op = match kind {
        "read" => Op::Read(replay.buffer.cursor()),
        "write" => Op::Write(replay.buffer.cursor(), Fua::No),
        _ => panic!("{line}: neither a read nor a write"),
    };
    replay.run(op, lba, len_blocks);
}

fn main() {
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| arg != "--bench")
        .collect();
    let [path, mib, block_count, requests] = args.as_slice() else {
        panic!("trace PATH MIB BLOCKS REQUESTS");
    };
    let size_bytes = mib.parse::<u64>().expect("a number of MiB") << 20;
    let base = Base {
        block_size_bytes: BLOCK_SIZE_BYTES,
        block_count: block_count.parse().expect("a number of blocks"),
    };
    let requests = std::fs::read_to_string(requests).expect("the file of requests");
    let cache = open(map(Path::new(path), size_bytes), DataCrc::Off, base);
    cache
        .change_settings(&SettingChange::of(Setting::GcPercent, GC_PERCENT))
        .expect("it is in range");
    let mut replay = Replay::new(&cache);
    requests
        .lines()
        .for_each(|line| replay_line(&mut replay, line));
    replay.drain(&cache);
    println!("{}", json!({ "stats": cache.stats() }));
}
