//! The engine against a naive model, one request at a time: the first thing that must hold.

mod lend;

use super::*;
use crate::pmem::IovBuf;
use crate::recovery::{OpenError, OpenStep, Opening};
use crate::sim::pmem::SimPmem;
use crate::units::{Lba, Now};
use proptest::prelude::*;
use std::sync::Arc;

const BLOCKS: u64 = 512;

fn options(block_size_bytes: u32, data_crc: Option<DataCrc>) -> OpenOptions {
    OpenOptions {
        base: BaseIdentity {
            uuid: [7; 16],
            name: "Base0".to_owned(),
            block_size_bytes,
            block_count: BLOCKS,
        },
        base_caps: BaseCaps {
            flush: true,
            unmap: true,
        },
        format: FormatPolicy::Auto,
        new_uuid: [9; 16],
        data_crc,
        segment_size_bytes: Some(64 << 10),
        gc_percent: None,
        writeback_order: None,
        stream_count_max: 2,
    }
}

/// A cache over a base that does everything at once.
struct Rig {
    pmem: SimPmem,
    base: Vec<u8>,
    cache: Arc<Cache<SimPmem>>,
    channel: Channel<SimPmem>,
    background: Background<SimPmem>,
    out: Outbox,
    now: Now,
    block: usize,
    next_token: u64,
}

fn open(
    pmem: SimPmem,
    base: &[u8],
    options: OpenOptions,
) -> Result<Arc<Cache<SimPmem>>, OpenError> {
    let block = options.base.block_size_bytes as usize;
    let mut opening = Opening::begin(pmem, options)?;
    loop {
        match opening.poll()? {
            OpenStep::Working { .. } | OpenStep::AwaitingBase => {}
            OpenStep::ReadBase {
                slot,
                lba,
                len_blocks,
            } => {
                let start = lba.0 as usize * block;
                let bytes = &base[start..start + len_blocks as usize * block];
                opening.on_base_block(slot, Ok(bytes));
            }
            OpenStep::Ready => return Ok(opening.finish()),
        }
    }
}

impl Rig {
    fn new(options: OpenOptions, cache_size: u64) -> Self {
        let pmem = SimPmem::new(cache_size);
        let base = vec![0; (BLOCKS * u64::from(options.base.block_size_bytes)) as usize];
        Self::with(pmem, base, options)
    }

    fn with(pmem: SimPmem, base: Vec<u8>, options: OpenOptions) -> Self {
        let block = options.base.block_size_bytes as usize;
        let cache = open(pmem.clone(), &base, options).unwrap();
        let channel = cache.channel().unwrap();
        let background = cache.background().unwrap();
        let out = Outbox::new();
        Self {
            pmem,
            base,
            cache,
            channel,
            background,
            out,
            now: Now(0),
            block,
            next_token: 0,
        }
    }

    fn reopen(self, options: OpenOptions) -> Self {
        let image = SimPmem::from_image(self.pmem.durable_image());
        Self::with(image, self.base.clone(), options)
    }

    /// Polls everything until `token` has completed.
    fn run(&mut self, op: Op, lba: u64, len_blocks: u64) -> Status {
        self.next_token += 1;
        let token = IoToken(self.next_token);
        self.channel
            .submit(HostIo {
                token,
                op,
                lba: Lba(lba),
                len_blocks,
            })
            .unwrap();
        for _ in 0..100_000 {
            if let Some(status) = self.step() {
                return status;
            }
        }
        panic!(
            "request {token:?} does not complete: {:?}",
            self.cache.info()
        );
    }

    fn step(&mut self) -> Option<Status> {
        self.now.0 += 1_000_000;
        self.out.clear();
        self.channel.poll(self.now, &mut self.out);
        let status = self
            .out
            .completions
            .first()
            .map(|completion| completion.status);
        for request in std::mem::take(&mut self.out.base) {
            let result = self.base_op(&request);
            self.channel.on_base_done(request.op, result);
        }
        self.out.clear();
        self.background.poll(self.now, &mut self.out);
        for request in std::mem::take(&mut self.out.base) {
            let result = self.base_op(&request);
            self.background.on_base_done(request.op, result);
        }
        status
    }

    fn base_op(&mut self, request: &BaseRequest) -> Result<(), BaseError> {
        let start = request.lba.0 as usize * self.block;
        let end = start + request.len_blocks as usize * self.block;
        match request.kind {
            BaseKind::Read(mut cursor) => cursor.write_from(&self.base[start..end]),
            BaseKind::Write {
                first_source,
                source_count,
            } => {
                let mut at = start;
                let first = first_source as usize;
                for slice in &self.out.sources[first..first + source_count as usize] {
                    slice.copy_to(&mut self.base[at..at + slice.len_bytes()]);
                    at += slice.len_bytes();
                }
                assert_eq!(at, end);
            }
            BaseKind::Unmap | BaseKind::WriteZeroes => self.base[start..end].fill(0),
            BaseKind::Flush => {}
        }
        Ok(())
    }

    fn write(&mut self, lba: u64, bytes: &[u8], cuts: &[usize]) {
        let buf = IovBuf::new(bytes, cuts);
        let len_blocks = (bytes.len() / self.block) as u64;
        let status = self.run(Op::Write(buf.cursor(), Fua::No), lba, len_blocks);
        assert_eq!(status, Status::Success);
    }

    fn read(&mut self, lba: u64, len_blocks: u64) -> Vec<u8> {
        let buf = IovBuf::zeroed(len_blocks as usize * self.block);
        assert_eq!(
            self.run(Op::Read(buf.cursor()), lba, len_blocks),
            Status::Success
        );
        buf.bytes()
    }

    fn drain(&mut self) {
        self.cache.drain_start();
        for _ in 0..100_000 {
            if !self.cache.drain_status().in_progress {
                return;
            }
            self.step();
        }
        panic!("the drain does not end: {:?}", self.cache.info());
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write {
        lba: u64,
        len: u64,
        fill: u8,
        cut: usize,
    },
    Read {
        lba: u64,
        len: u64,
    },
    Zero {
        lba: u64,
        len: u64,
    },
    Unmap {
        lba: u64,
        len: u64,
    },
    Flush,
    Reopen,
    Drain,
}

fn extent() -> impl Strategy<Value = (u64, u64)> {
    (0..BLOCKS - 1, prop_oneof![1u64..4, 1u64..32])
        .prop_map(|(lba, len)| (lba, len.min(BLOCKS - lba)))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (extent(), any::<u8>(), 0usize..5000)
            .prop_map(|((lba, len), fill, cut)| Step::Write { lba, len, fill, cut }),
        6 => extent().prop_map(|(lba, len)| Step::Read { lba, len }),
        1 => extent().prop_map(|(lba, len)| Step::Zero { lba, len }),
        1 => extent().prop_map(|(lba, len)| Step::Unmap { lba, len }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => Just(Step::Drain),
    ]
}

fn check(steps: &[Step], block_size: u32, data_crc: DataCrc) {
    // Each write is limited to a quarter of a segment.
    let len_max = (16 << 10) / u64::from(block_size);
    let block = block_size as usize;
    let mut rig = Rig::new(
        options(block_size, Some(data_crc)),
        (64 << 10) + 12 * (64 << 10),
    );
    let mut model = vec![0u8; BLOCKS as usize * block];
    for (number, step) in steps.iter().enumerate() {
        match *step {
            Step::Write {
                lba,
                len,
                fill,
                cut,
            } => {
                let len = len.min(len_max);
                let bytes: Vec<u8> = (0..len as usize * block)
                    .map(|at| {
                        fill.wrapping_add((at / 512) as u8)
                            .wrapping_add(number as u8)
                    })
                    .collect();
                rig.write(lba, &bytes, &[cut.min(bytes.len())]);
                model[lba as usize * block..][..bytes.len()].copy_from_slice(&bytes);
            }
            Step::Read { lba, len } => {
                let range = lba as usize * block..(lba + len) as usize * block;
                assert!(
                    rig.read(lba, len) == model[range],
                    "step {number}: stale or misplaced data"
                );
            }
            Step::Zero { lba, len } | Step::Unmap { lba, len } => {
                let op = if matches!(step, Step::Zero { .. }) {
                    Op::WriteZeroes
                } else {
                    Op::Unmap
                };
                assert_eq!(rig.run(op, lba, len), Status::Success);
                model[lba as usize * block..(lba + len) as usize * block].fill(0);
            }
            Step::Flush => assert_eq!(rig.run(Op::Flush, 0, 0), Status::Success),
            Step::Reopen => rig = rig.reopen(options(block_size, None)),
            Step::Drain => {
                rig.drain();
                assert!(
                    rig.base == model,
                    "step {number}: the base differs after a drain"
                );
            }
        }
        rig.cache.check_invariants();
    }
    assert!(rig.read(0, BLOCKS) == model);
    rig.drain();
    assert!(rig.base == model);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_cache_behaves_like_a_disk_with_512_byte_blocks(
        steps in prop::collection::vec(step(), 1..120),
        crc in prop_oneof![Just(DataCrc::Off), Just(DataCrc::On)],
    ) {
        check(&steps, 512, crc);
    }

    #[test]
    fn a_cache_behaves_like_a_disk_with_4096_byte_blocks(
        steps in prop::collection::vec(step(), 1..120),
    ) {
        check(&steps, 4096, DataCrc::Off);
    }
}
