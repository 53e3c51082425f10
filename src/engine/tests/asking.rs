//! A channel, and what it asks of a base full of sevens.

use super::*;
use crate::pmem::{IovBuf, PadMemory};
use crate::sim::recover;
use crate::units::{Lba, Now};
use std::sync::Arc;

/// See the module.
pub(super) struct Asking {
    pub(super) cache: Arc<Cache<SimPmem>>,
    pub(super) channel: Channel<SimPmem>,
    pub(super) out: Outbox,
    pub(super) buf: IovBuf,
    pub(super) now: Now,
    token: u64,
}

impl Asking {
    pub(super) fn new(settings: SettingChange, pad_pages: usize) -> Self {
        let options = OpenOptions {
            settings,
            ..options(512, None)
        };
        Self::of(Self::cache(options), pad_pages)
    }

    pub(super) fn open(options: OpenOptions) -> Self {
        Self::of(Self::cache(options), 64)
    }

    fn cache(options: OpenOptions) -> Arc<Cache<SimPmem>> {
        static BASE: [u8; BLOCKS as usize * 512] = [7; BLOCKS as usize * 512];
        let pmem = SimPmem::new(DEVICE_SIZE_BYTES);
        let cache = recover::open(pmem, options, |lba, len| {
            &BASE[lba as usize * 512..][..len as usize * 512]
        });
        cache.unwrap()
    }

    /// Another channel of the same cache.
    pub(super) fn beside(&self, pad_pages: usize) -> Self {
        Self::of(Arc::clone(&self.cache), pad_pages)
    }

    fn of(cache: Arc<Cache<SimPmem>>, pad_pages: usize) -> Self {
        let pads = (pad_pages > 0).then(|| PadMemory::from_heap(pad_pages));
        Self {
            channel: cache.channel_with(pads).unwrap(),
            cache,
            out: Outbox::new(),
            buf: IovBuf::zeroed(BLOCKS as usize * 512),
            now: Now(0),
            token: 0,
        }
    }

    pub(super) fn submit(&mut self, buf: &IovBuf, lba: u64, len_blocks: u64) {
        self.submit_op(Op::Read(buf.cursor()), lba, len_blocks);
    }

    fn submit_op(&mut self, op: Op, lba: u64, len_blocks: u64) {
        self.token += 1;
        let io = HostIo {
            token: IoToken(self.token),
            op,
            lba: Lba(lba),
            len_blocks,
        };
        self.channel.submit(io).unwrap();
    }

    /// Writes some blocks full of one byte, at once.
    pub(super) fn write(&mut self, lba: u64, len_blocks: u64, fill: u8) {
        let buf = IovBuf::new(&vec![fill; len_blocks as usize * 512], &[]);
        self.submit_op(Op::Write(buf.cursor(), Fua::No), lba, len_blocks);
        assert_eq!(self.poll(), []);
        assert_eq!(self.ended(), [Status::Success]);
    }

    pub(super) fn read(&mut self, lba: u64, len_blocks: u64) -> Vec<(u64, u64)> {
        let buf = std::mem::replace(&mut self.buf, IovBuf::zeroed(0));
        self.submit(&buf, lba, len_blocks);
        self.buf = buf;
        self.poll()
    }

    /// What the base is asked for; the requests stay in the outbox.
    pub(super) fn poll(&mut self) -> Vec<(u64, u64)> {
        self.out.clear();
        self.channel.poll(self.now, &mut self.out);
        let asked = self.out.base.iter();
        asked.map(|read| (read.lba.0, read.len_blocks)).collect()
    }

    /// The base answers what the last poll has asked.
    pub(super) fn answer(&mut self, result: Result<(), BaseError>) {
        for request in std::mem::take(&mut self.out.base) {
            if let BaseKind::Read(mut cursor) = request.kind {
                cursor.write_from(&vec![7; request.len_blocks as usize * 512]);
            }
            self.channel.on_base_done(request.op, result);
        }
    }

    /// How the requests ended that the last poll has completed.
    pub(super) fn ended(&self) -> Vec<Status> {
        self.out.completions.iter().map(|end| end.status).collect()
    }
}
