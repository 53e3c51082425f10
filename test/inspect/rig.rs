//! A cache in a file, a base in a file, an application that writes to them, and the tool that looks at them.

use pcache::engine::{
    Background, BaseCaps, BaseGrowth, BaseIdentity, BaseKind, BaseRequest, Budget, Cache, Channel,
    DataCrc, FormatPolicy, Fua, HostIo, IoToken, Op, OpenOptions, Outbox, Setting, SettingChange,
    Status, WritebackOrder,
};
use pcache::pmem::{Extent, IovBuf, MapRequest, MappedPmem, Pmem};
use pcache::recovery::{OpenError, OpenStep, Opening};
use pcache::units::{Lba, Now};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use tempfile::TempDir;

pub(crate) const SEGMENT_SIZE_BYTES: u64 = 64 << 10;
pub(crate) const CACHE_SIZE_BYTES: u64 = 8 << 20;
pub(crate) const BASE_SIZE_BYTES: u64 = 2 << 20;

/// What kind of cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) block: u64,
    pub(crate) data_crc: DataCrc,
    pub(crate) order: WritebackOrder,
}

pub(crate) const STRICT_512: Kind = Kind {
    block: 512,
    data_crc: DataCrc::On,
    order: WritebackOrder::Strict,
};

pub(crate) const RELAXED_4096: Kind = Kind {
    block: 4096,
    data_crc: DataCrc::Off,
    order: WritebackOrder::Relaxed,
};

impl Kind {
    pub(crate) fn block_count(&self) -> u64 {
        BASE_SIZE_BYTES / self.block
    }

    pub(crate) fn options(&self, format: FormatPolicy) -> OpenOptions {
        OpenOptions {
            base: BaseIdentity {
                uuid: *b"uuid of the base",
                name: "Disk0".to_owned(),
                block_size_bytes: self.block as u32,
                block_count: self.block_count(),
            },
            base_caps: BaseCaps {
                flush: true,
                unmap: true,
                write_zeroes: true,
            },
            format,
            new_uuid: *b"uuid of a cache.",
            data_crc: (format == FormatPolicy::Auto).then_some(self.data_crc),
            segment_size_bytes: (format == FormatPolicy::Auto).then_some(SEGMENT_SIZE_BYTES),
            base_growth: BaseGrowth::Refuse,
            settings: match format {
                FormatPolicy::Auto => SettingChange::of(Setting::WritebackOrder, self.order as u32),
                FormatPolicy::Never | FormatPolicy::Force => SettingChange::default(),
            },
            stream_count_max: 2,
        }
    }
}

/// Opens a cache over a base that is in memory.
pub(crate) fn open<P: Pmem>(
    pmem: P,
    base: &[u8],
    options: OpenOptions,
) -> Result<Arc<Cache<P>>, OpenError> {
    let block = u64::from(options.base.block_size_bytes);
    let mut opening = Opening::begin(pmem, options)?;
    loop {
        match opening.poll()? {
            OpenStep::Working { .. } | OpenStep::AwaitingBase => {}
            OpenStep::ReadBase {
                slot,
                lba,
                len_blocks,
            } => {
                let range = (lba.0 * block) as usize..((lba.0 + len_blocks) * block) as usize;
                opening.on_base_block(slot, Ok(&base[range]));
            }
            OpenStep::Ready => return Ok(opening.finish()),
        }
    }
}

/// The files.
pub(crate) struct Files {
    _dir: TempDir,
    pub(crate) cache: PathBuf,
    pub(crate) base: PathBuf,
}

impl Files {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().tempdir_in("/dev/shm").unwrap();
        Self {
            cache: dir.path().join("cache"),
            base: dir.path().join("base"),
            _dir: dir,
        }
    }

    /// Their content.
    pub(crate) fn content(&self) -> (Vec<u8>, Vec<u8>) {
        let read = |path| std::fs::read(path).unwrap();
        (read(&self.cache), read(&self.base))
    }

    pub(crate) fn map(&self) -> MappedPmem {
        MappedPmem::open(&MapRequest {
            path: self.cache.clone(),
            extent: Extent::Whole,
            size_bytes_min: 1,
        })
        .unwrap()
    }

    /// Whether the engine opens the cache as it is; on a copy.
    pub(crate) fn engine_opens(&self, kind: Kind) -> bool {
        let copy = Files::new();
        std::fs::copy(&self.cache, &copy.cache).unwrap();
        let (_, base) = self.content();
        open(copy.map(), &base, kind.options(FormatPolicy::Never)).is_ok()
    }

    pub(crate) fn patch(&self, off: u64, change: impl FnOnce(&mut [u8; 64])) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.cache)
            .unwrap();
        let mut line = [0; 64];
        file.read_exact_at(&mut line, off).unwrap();
        change(&mut line);
        file.write_all_at(&line, off).unwrap();
    }

    /// Turns a bit of what lies at `off`.
    pub(crate) fn flip(&self, off: u64) {
        self.patch(off, |line| line[9] ^= 0x10);
    }
}

/// An application and its cache.
pub(crate) struct Host {
    pub(crate) kind: Kind,
    pub(crate) cache: Arc<Cache<MappedPmem>>,
    channels: Vec<Channel<MappedPmem>>,
    background: Background<MappedPmem>,
    out: Outbox,
    now: Now,
    /// The base, and what the application wrote.
    pub(crate) base: Vec<u8>,
    pub(crate) disk: Vec<u8>,
    number: u64,
}

impl Host {
    /// Formats a new cache over a base that holds something already.
    pub(crate) fn format(files: &Files, kind: Kind) -> Self {
        Self::format_sized(files, kind, CACHE_SIZE_BYTES)
    }

    pub(crate) fn format_sized(files: &Files, kind: Kind, size_bytes: u64) -> Self {
        let pmem = MappedPmem::open(&MapRequest {
            path: files.cache.clone(),
            extent: Extent::File { size_bytes },
            size_bytes_min: 1,
        })
        .unwrap();
        let base: Vec<u8> = (0..BASE_SIZE_BYTES)
            .map(|at| (at / 512 * 7 + 1) as u8)
            .collect();
        let cache = open(pmem, &base, kind.options(FormatPolicy::Auto)).unwrap();
        Self {
            kind,
            channels: (0..2).map(|_| cache.channel().unwrap()).collect(),
            background: cache.background().unwrap(),
            cache,
            out: Outbox::new(),
            now: Now(0),
            disk: base.clone(),
            base,
            number: 0,
        }
    }

    fn run(&mut self, channel: usize, op: Op, lba: u64, len_blocks: u64) {
        let io = HostIo {
            token: IoToken(1),
            op,
            lba: Lba(lba),
            len_blocks,
        };
        self.channels[channel].submit(io).unwrap();
        for _ in 0..1000 {
            self.out.clear();
            self.now.0 += 1000;
            self.channels[channel].poll(self.now, &mut self.out);
            if let Some(completion) = self.out.completions.first() {
                assert_eq!(completion.status, Status::Success);
                return;
            }
        }
        panic!("{io:?} does not complete: {:?}", self.cache.info());
    }

    fn range(&self, lba: u64, len_blocks: u64) -> std::ops::Range<usize> {
        (lba * self.kind.block) as usize..((lba + len_blocks) * self.kind.block) as usize
    }

    pub(crate) fn write(&mut self, channel: usize, lba: u64, len_blocks: u64, fua: Fua) {
        self.number += 1;
        let range = self.range(lba, len_blocks);
        let (number, block) = (self.number, self.kind.block as usize);
        let bytes: Vec<u8> = range
            .clone()
            .map(|at| (number * 31 + (at / block) as u64 * 5 + (at % 251) as u64) as u8)
            .collect();
        self.disk[range].copy_from_slice(&bytes);
        let buf = IovBuf::new(&bytes, &[]);
        self.run(channel, Op::Write(buf.cursor(), fua), lba, len_blocks);
    }

    pub(crate) fn zero(&mut self, channel: usize, op: Op, lba: u64, len_blocks: u64) {
        let range = self.range(lba, len_blocks);
        self.disk[range].fill(0);
        // As the bdev layer splits it.
        let blocks_max = self.cache.unmap_size_max_bytes() / self.kind.block;
        for start in (lba..lba + len_blocks).step_by(blocks_max as usize) {
            let left = lba + len_blocks - start;
            self.run(channel, op, start, left.min(blocks_max));
        }
    }

    pub(crate) fn flush(&mut self) {
        self.run(0, Op::Flush, 0, 0);
    }

    fn base_op(&mut self, request: &BaseRequest) {
        let range = self.range(request.lba.0, request.len_blocks);
        match request.kind {
            BaseKind::Write {
                first_source,
                source_count,
            } => {
                let mut at = range.start;
                let first = first_source as usize;
                for slice in &self.out.sources[first..first + source_count as usize] {
                    slice
                        .copy_to(&mut self.base[at..at + slice.len_bytes()])
                        .expect("memory from the heap");
                    at += slice.len_bytes();
                }
            }
            BaseKind::Unmap | BaseKind::WriteZeroes => self.base[range].fill(0),
            BaseKind::Flush => {}
            BaseKind::Read(_) => unreachable!("the background reads nothing"),
        }
    }

    pub(crate) fn drain(&mut self) {
        self.cache.drain_start();
        for _ in 0..100_000 {
            self.out.clear();
            self.now.0 += 1000;
            self.background
                .poll(self.now, Budget::default(), &mut self.out);
            for request in std::mem::take(&mut self.out.base) {
                self.base_op(&request);
                self.background.on_base_done(request.op, Ok(()), self.now);
            }
            if !self.cache.drain_status().in_progress {
                return;
            }
        }
        panic!("the drain does not end: {:?}", self.cache.info());
    }

    /// Something of everything, over both streams and many segments. With no regard to what was before.
    pub(crate) fn work(&mut self, seed: u64) {
        let mut state = seed;
        let mut draw = |below: u64| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        let per_page = 4096 / self.kind.block;
        for _ in 0..150 {
            let channel = draw(2) as usize;
            let len = 1 + draw(2 * per_page);
            let lba = draw(self.kind.block_count() - len);
            match draw(12) {
                0 => self.zero(channel, Op::Unmap, lba, len),
                1 => self.zero(channel, Op::WriteZeroes, lba, len),
                2 => self.write(channel, lba, len, Fua::Yes),
                3 => self.flush(),
                _ => self.write(channel, lba, len, Fua::No),
            }
        }
    }

    /// What is left when the process is killed now.
    pub(crate) fn kill(self, files: &Files) -> Vec<u8> {
        std::fs::write(&files.base, &self.base).unwrap();
        self.disk
    }
}

/// A cache with clean and dirty data, and what the application wrote.
pub(crate) fn worked(files: &Files, kind: Kind) -> Vec<u8> {
    let mut host = Host::format(files, kind);
    host.work(1);
    host.drain();
    host.work(2);
    host.kill(files)
}

pub(crate) fn tool() -> Command {
    Command::new(env!("CARGO_BIN_EXE_pcache-inspect"))
}

/// What a run of the tool has come to.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) status: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code().expect("it ends by itself"),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    pub(crate) fn lines(&self) -> Vec<Value> {
        self.out
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

pub(crate) fn run(command: &str, cache: &Path, options: &[&str]) -> Ran {
    let output = tool()
        .arg(command)
        .arg(cache)
        .args(options)
        .output()
        .unwrap();
    output.into()
}

/// `info --json` of a cache with nothing wrong.
pub(crate) fn info(files: &Files) -> Value {
    let ran = run("info", &files.cache, &["--json"]);
    assert_eq!((ran.status, &*ran.err), (0, ""), "{}", ran.out);
    serde_json::from_str(&ran.out).unwrap()
}
