//! A cache on a real mapping, its cores and its background, without SPDK: what an application does with them, in one
//! thread or in several. Everything that the rig needs while it runs is there before.

use crate::random::Rng;
use pcache::engine::{
    Background, BaseCaps, BaseError, BaseGrowth, BaseIdentity, BaseKind, BaseOpId, Budget, Cache,
    Channel, Completion, DataCrc, FormatPolicy, Fua, HostIo, IoToken, LOAN_COUNT_MAX, LoanId, Op,
    OpenOptions, Outbox, SettingChange, Stats, Status,
};
use pcache::pmem::{Extent, IovBuf, MapRequest, MappedPmem};
use pcache::recovery::{OpenStep, Opening};
use pcache::units::{Lba, NS_PER_US, Now};
use std::collections::VecDeque;
use std::sync::Arc;

/// Enough of them for streams of what reclaiming copies.
const CACHE_SIZE_BYTES: u64 = 129 << 20;
const SEGMENT_SIZE_BYTES: u64 = 4 << 20;
/// Of the base, in MiB.
pub(crate) const BASE_MIB: u64 = 512;
/// Requests that a core has under way at once.
const DEPTH_MAX: usize = 64;
/// The largest request that has a buffer.
const IO_SIZE_BYTES_MAX: usize = 1 << 20;
/// What passes between two turns.
const TURN_NS: u64 = 20 * NS_PER_US;
/// How many turns the base takes for an operation.
const BASE_TURNS: u64 = 6;
/// More than a core and the background ever ask of the base at once.
const BASE_OPS_MAX: usize = 512;
/// Loans are given back when there are so many.
const LOANS_KEPT: usize = 48;
/// In turns: then something does not end.
const TURNS_MAX: u64 = 20_000_000;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Write,
    Fua,
    Read,
    Lend,
    Unmap,
    WriteZeroes,
    Flush,
}

/// Where requests go, in steps of their own length.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pattern {
    Random,
    /// Each place so many times, one after the other.
    InOrder(u64),
}

/// Requests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load<'a> {
    /// One after the other, again and again.
    pub(crate) kinds: &'a [Kind],
    pub(crate) depth: usize,
    pub(crate) len_bytes: u64,
    pub(crate) pattern: Pattern,
    /// Where on the base, in MiB: from, and how much.
    pub(crate) area_mib: (u64, u64),
    pub(crate) count: u64,
}

/// One core.
pub(crate) struct Core {
    channel: Channel<MappedPmem>,
    out: Outbox,
    buffers: Vec<IovBuf>,
    free: Vec<u64>,
    block_size_bytes: u64,
    rng: Rng,
    base: VecDeque<(BaseOpId, u64)>,
    loans: VecDeque<LoanId>,
    /// What base reads bring.
    content: Vec<u8>,
    submitted: u64,
    completed: u64,
    pub(crate) aborted: u64,
    turn: u64,
}

impl Core {
    fn new(cache: &Arc<Cache<MappedPmem>>, seed: u64, block_size_bytes: u64) -> Self {
        let content = vec![seed as u8; IO_SIZE_BYTES_MAX];
        Self {
            channel: cache.channel().unwrap(),
            out: Outbox::new(),
            // Some are in one piece, others in three.
            buffers: (0..DEPTH_MAX)
                .map(|slot| IovBuf::new(&content, if slot % 4 == 0 { &[700, 9000] } else { &[] }))
                .collect(),
            free: (0..DEPTH_MAX as u64).collect(),
            block_size_bytes,
            rng: Rng::new(seed),
            base: VecDeque::with_capacity(BASE_OPS_MAX),
            loans: VecDeque::with_capacity(LOAN_COUNT_MAX),
            content,
            submitted: 0,
            completed: 0,
            aborted: 0,
            turn: 0,
        }
    }

    /// All of a load has ended.
    pub(crate) fn has_done(&self, load: &Load<'_>) -> bool {
        self.completed == load.count
    }

    /// Before another load.
    pub(crate) fn begin(&mut self) {
        (self.submitted, self.completed) = (0, 0);
    }

    /// A turn: what is to come, a poll, what has come of it.
    pub(crate) fn step(&mut self, now: Now, load: &Load<'_>) {
        self.turn += 1;
        while self.submitted < load.count && DEPTH_MAX - self.free.len() < load.depth {
            self.submit(load);
        }
        while let Some(&(op, at)) = self.base.front()
            && at <= self.turn
        {
            self.base.pop_front();
            self.channel.on_base_done(op, Ok(()));
        }
        self.out.clear();
        self.channel.poll(now, &mut self.out);
        for request in &self.out.base {
            let BaseKind::Read(mut cursor) = request.kind else {
                panic!("a channel reads the base, and nothing else: {request:?}");
            };
            let len_bytes = request.len_blocks * self.block_size_bytes;
            cursor.write_from(&self.content[..len_bytes as usize]);
            assert!(self.base.len() < self.base.capacity());
            self.base.push_back((request.op, self.turn + BASE_TURNS));
        }
        for number in 0..self.out.completions.len() {
            self.complete(self.out.completions[number]);
        }
        let is_last = self.completed == load.count;
        while self.loans.len() > LOANS_KEPT || is_last && !self.loans.is_empty() {
            let loan = self.loans.pop_front().unwrap();
            self.channel.give_back(loan);
        }
    }

    fn complete(&mut self, Completion { token, status }: Completion) {
        match status {
            Status::Success | Status::NotLent => {}
            Status::Aborted => self.aborted += 1,
            Status::Lent(loan) => {
                let slice = self.channel.loan(loan).unwrap();
                slice.part(0, 512).copy_to(&mut [0; 512]).unwrap();
                self.loans.push_back(loan);
            }
            Status::Failed => panic!("a request has failed"),
        }
        self.free.push(token.0);
        self.completed += 1;
    }

    fn submit(&mut self, load: &Load<'_>) {
        let slot = self.free.pop().unwrap();
        let cursor = || self.buffers[slot as usize].cursor();
        let (area_start, area_size) = (load.area_mib.0 << 20, load.area_mib.1 << 20);
        let places = area_size / load.len_bytes;
        let place = match load.pattern {
            Pattern::Random => self.rng.next() % places,
            Pattern::InOrder(times) => self.submitted / times % places,
        };
        let op = match load.kinds[self.submitted as usize % load.kinds.len()] {
            Kind::Write => Op::Write(cursor(), Fua::No),
            Kind::Fua => Op::Write(cursor(), Fua::Yes),
            Kind::Read => Op::Read(cursor()),
            Kind::Lend => Op::Lend,
            Kind::Unmap => Op::Unmap,
            Kind::WriteZeroes => Op::WriteZeroes,
            Kind::Flush => Op::Flush,
        };
        let io = HostIo {
            token: IoToken(slot),
            op,
            lba: Lba((area_start + place * load.len_bytes) / self.block_size_bytes),
            len_blocks: load.len_bytes / self.block_size_bytes,
        };
        self.channel.submit(io).expect("there is room");
        self.submitted += 1;
    }

    /// Has the channel give up what was submitted last, and then everything of which nothing is done yet.
    pub(crate) fn give_up(&mut self, load: &Load<'_>) {
        for _ in 0..load.depth {
            self.submit(load);
        }
        let busy = (0..DEPTH_MAX as u64).find(|slot| !self.free.contains(slot));
        assert!(self.channel.abort(IoToken(busy.unwrap())));
        self.channel.abort_waiting();
    }
}

/// How the base does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answers {
    Yes,
    /// Everything fails.
    WithErrors,
    /// Not until it does again.
    No,
}

/// What goes on behind the requests.
pub(crate) struct Behind {
    background: Background<MappedPmem>,
    out: Outbox,
    base: VecDeque<(BaseOpId, u64)>,
    pub(crate) answers: Answers,
    turn: u64,
}

impl Behind {
    /// A turn.
    pub(crate) fn step(&mut self, now: Now) {
        self.turn += 1;
        let result = match self.answers {
            Answers::WithErrors => Err(BaseError::Io),
            Answers::Yes | Answers::No => Ok(()),
        };
        while self.answers != Answers::No
            && let Some(&(op, at)) = self.base.front()
            && at <= self.turn
        {
            self.base.pop_front();
            self.background.on_base_done(op, result, now);
        }
        self.out.clear();
        self.background.poll(now, Budget::default(), &mut self.out);
        for request in &self.out.base {
            if let BaseKind::Write {
                first_source,
                source_count,
            } = request.kind
            {
                let sources = &self.out.sources[first_source as usize..][..source_count as usize];
                let mut byte = [0];
                sources[0].part(0, 1).copy_to(&mut byte).unwrap();
            }
            assert!(self.base.len() < self.base.capacity());
            self.base.push_back((request.op, self.turn + BASE_TURNS));
        }
        std::hint::black_box(self.background.pressure());
        std::hint::black_box(self.background.has_new_held_writes());
    }
}

/// See the module.
pub(crate) struct Rig {
    pub(crate) cache: Arc<Cache<MappedPmem>>,
    pub(crate) cores: Vec<Core>,
    pub(crate) behind: Behind,
    pub(crate) now: Now,
    seen: Stats,
    _folder: tempfile::TempDir,
}

impl Rig {
    /// A new cache with two cores.
    pub(crate) fn new(block_size_bytes: u32, data_crc: DataCrc, settings: SettingChange) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let request = MapRequest {
            path: folder.path().join("cache"),
            extent: Extent::File {
                size_bytes: CACHE_SIZE_BYTES,
            },
            size_bytes_min: CACHE_SIZE_BYTES,
        };
        let pmem = MappedPmem::open(&request).unwrap();
        let options = options(block_size_bytes, data_crc, settings);
        let mut opening = Opening::begin(pmem, options).unwrap();
        while let step = opening.poll().unwrap()
            && !matches!(step, OpenStep::Ready)
        {
            if let OpenStep::ReadBase {
                slot, len_blocks, ..
            } = step
            {
                let len_bytes = len_blocks as usize * block_size_bytes as usize;
                opening.on_base_block(slot, Ok(&vec![0; len_bytes]));
            }
        }
        let cache = opening.finish();
        let core = |seed| Core::new(&cache, seed, u64::from(block_size_bytes));
        Self {
            cores: vec![core(1), core(2)],
            behind: Behind {
                background: cache.background().unwrap(),
                out: Outbox::new(),
                base: VecDeque::with_capacity(BASE_OPS_MAX),
                answers: Answers::Yes,
                turn: 0,
            },
            now: Now(0),
            seen: cache.stats(),
            cache,
            _folder: folder,
        }
    }

    /// A turn for each.
    pub(crate) fn step(&mut self, load: &Load<'_>) {
        self.now.0 += TURN_NS;
        for core in &mut self.cores {
            core.step(self.now, load);
        }
        self.behind.step(self.now);
    }

    /// Keeps a load under way on each core, until all of it has ended.
    pub(crate) fn run(&mut self, load: &Load<'_>) {
        self.begin();
        let mut turns = 0;
        while !self.cores.iter().all(|core| core.has_done(load)) {
            self.step(load);
            turns += 1;
            assert!(turns < TURNS_MAX, "{load:?} does not end");
        }
    }

    /// Before another load.
    pub(crate) fn begin(&mut self) {
        self.cores.iter_mut().for_each(Core::begin);
    }

    /// What has come since this was asked last.
    pub(crate) fn news(&mut self) -> Stats {
        let now = self.cache.stats();
        let news = now.since(&self.seen);
        self.seen = now;
        news
    }
}

fn options(block_size_bytes: u32, data_crc: DataCrc, settings: SettingChange) -> OpenOptions {
    OpenOptions {
        base: BaseIdentity {
            uuid: [1; 16],
            name: "base".to_owned(),
            block_size_bytes,
            block_count: (BASE_MIB << 20) / u64::from(block_size_bytes),
        },
        base_caps: BaseCaps {
            flush: true,
            unmap: true,
            write_zeroes: true,
        },
        format: FormatPolicy::Auto,
        new_uuid: [7; 16],
        data_crc: Some(data_crc),
        segment_size_bytes: Some(SEGMENT_SIZE_BYTES),
        base_growth: BaseGrowth::Refuse,
        settings,
        stream_count_max: 64,
    }
}
