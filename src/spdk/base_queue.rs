//! Operations on the base bdev, from their start to their end, on one SPDK thread.
//!
//! SPDK's completions only note what has ended; the owner's poller collects it ([`BaseQueue::advance`]) and
//! tells the engine. So nothing is ever re-entered. A shortage of SPDK's own requests is waited for here;
//! the engine never hears of it. An operation that needs a bounce buffer and finds none waits its turn.

mod op;
mod reset;
mod room;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::mem;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;

use spdk_sys as sys;

use super::base::Base;
use super::memory::{BOUNCE_SIZE_BYTES, DmaBuf};
use super::trampoline::guard;
use crate::engine::{BaseError, BaseOpId, BaseRequest, ZeroesWent};
use crate::pmem::MemSlice;
use op::{Op, Payload, Verb};
pub(super) use room::Room;

/// Whether base writes are copied to bounce buffers first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copying {
    Direct,
    Bounced,
}

/// The base operations of a channel or of the background.
#[derive(Debug)]
pub(super) struct BaseQueue {
    base: Arc<Base>,
    channel: NonNull<sys::spdk_io_channel>,
    copying: Copying,
    /// A block of the base is two to the power of this, in bytes.
    block_shift: u32,
    room: Room,
    in_flight: Cell<usize>,
    /// Parts of operations that have ended so far.
    landed_count: Cell<u64>,
    /// A reset of the base by `reset` is under way.
    is_resetting: Cell<bool>,
    /// Whether `advance` has anything to do.
    news: Cell<bool>,
    zeroes_went: Cell<ZeroesWent>,
    inner: RefCell<Inner>,
}

/// The lists have room for all operations.
#[derive(Debug)]
struct Inner {
    /// All that there are, in pieces of the heap.
    slabs: Vec<NonNull<[Op]>>,
    free: Vec<NonNull<Op>>,
    bounce: Vec<DmaBuf>,
    /// Made when the base first fails a WRITE_ZEROES.
    zeroes: Option<DmaBuf>,
    /// That the base fails unmaps has been told.
    unmap_failure_told: bool,
    /// Parts that SPDK has completed.
    landed: Vec<(NonNull<Op>, Result<(), BaseError>)>,
    /// Taken by `advance` in exchange for `landed`, so that both keep their memory.
    landed_spare: Vec<(NonNull<Op>, Result<(), BaseError>)>,
    /// To be submitted again with the next `advance`.
    retry: VecDeque<NonNull<Op>>,
    /// Waiting for a bounce buffer, in order.
    bounce_queue: VecDeque<NonNull<Op>>,
}

impl BaseQueue {
    /// A queue on the current SPDK thread; it is dropped on that thread too. `bounce` empty: base writes go
    /// out from where their data are. `None`: the base has no channel to give.
    pub(super) fn new(base: Arc<Base>, room: Room, bounce: Vec<DmaBuf>) -> Option<Rc<Self>> {
        // SAFETY: the descriptor is open while `base` lives.
        let channel = NonNull::new(unsafe { sys::spdk_bdev_get_io_channel(base.desc()) })?;
        let copying = if bounce.is_empty() {
            Copying::Direct
        } else {
            Copying::Bounced
        };
        let queue = Rc::new(Self {
            block_shift: base.facts.identity.block_size_bytes.trailing_zeros(),
            base,
            channel,
            copying,
            room,
            in_flight: Cell::new(0),
            landed_count: Cell::new(0),
            is_resetting: Cell::new(false),
            news: Cell::new(false),
            zeroes_went: Cell::default(),
            inner: RefCell::new(Inner {
                slabs: Vec::with_capacity(1),
                free: Vec::with_capacity(room.ops),
                bounce,
                zeroes: None,
                unmap_failure_told: false,
                landed: Vec::with_capacity(room.ops),
                landed_spare: Vec::with_capacity(room.ops),
                retry: VecDeque::with_capacity(room.ops),
                bounce_queue: VecDeque::with_capacity(room.ops),
            }),
        });
        queue.add_ops(room.ops);
        Some(queue)
    }

    /// How the last zeroes went that the base has taken. Known before their end is told.
    pub(super) fn zeroes_went(&self) -> ZeroesWent {
        self.zeroes_went.get()
    }

    /// Operations that were started and whose end `advance` has not told yet, and a reset. The queue is not dropped before
    /// there are none.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.get() + usize::from(self.is_resetting.get())
    }

    /// Changes whenever the base has ended something.
    pub(super) fn landed_count(&self) -> u64 {
        self.landed_count.get()
    }

    /// Starts an operation. `sources` is the outbox's list.
    pub(super) fn start(&self, request: &BaseRequest, sources: &[MemSlice]) {
        let op = self.take_op();
        self.in_flight.set(self.in_flight.get() + 1);
        with_op(op, |op| op.fill(request, sources, self.copying));
        self.start_part(op);
    }

    /// Goes on with whatever SPDK has completed, and calls `ended` for each operation that is at its end.
    pub(super) fn advance(&self, mut ended: impl FnMut(BaseOpId, Result<(), BaseError>)) {
        if !self.news.replace(false) {
            return;
        }
        let retry_count = self.inner.borrow().retry.len();
        for _ in 0..retry_count {
            let next = self.inner.borrow_mut().retry.pop_front();
            if let Some(op) = next {
                self.submit(op);
            }
        }
        let mut landed = {
            let inner = &mut *self.inner.borrow_mut();
            mem::swap(&mut inner.landed, &mut inner.landed_spare);
            mem::take(&mut inner.landed_spare)
        };
        for (op, result) in landed.drain(..) {
            if result.is_err() && self.goes_on_otherwise(op, result) {
                self.start_part(op);
                continue;
            }
            let end = |op: &mut Op| (op.end_part(), op.id, op.zeroes_went());
            let (is_at_end, id, zeroes_went) = with_op(op, end);
            if !is_at_end && result.is_ok() {
                self.start_part(op);
                continue;
            }
            if let Some(went) = zeroes_went
                && result.is_ok()
            {
                self.zeroes_went.set(went);
            }
            self.finish(op);
            ended(id, result);
        }
        self.inner.borrow_mut().landed_spare = landed;
    }

    /// A part has failed. Whether it is to be done in another way.
    #[cold]
    fn goes_on_otherwise(&self, op: NonNull<Op>, result: Result<(), BaseError>) -> bool {
        let is_refusal = matches!(result, Err(BaseError::Io | BaseError::Unsupported));
        if is_refusal && self.falls_back_to_data(op) {
            return true;
        }
        if result == Err(BaseError::Io) {
            self.tell_unmap_failure(op);
        }
        false
    }

    /// A base may claim WRITE_ZEROES and then fail it always: an aio bdev does, on a file system that cannot
    /// zero a range. Repeating it would never end, so zeroes are written. `false`: that is not the case.
    fn falls_back_to_data(&self, op: NonNull<Op>) -> bool {
        if !with_op(op, |op| matches!(op.verb, Verb::WriteZeroes)) {
            return false;
        }
        let mut inner = self.inner.borrow_mut();
        if inner.zeroes.is_none() {
            log::warn!("the base device fails WRITE_ZEROES: zeroes are written to it as data");
            inner.zeroes = DmaBuf::zeroed(BOUNCE_SIZE_BYTES);
        }
        let zeroes = inner
            .zeroes
            .as_ref()
            .map(|buf| (buf.as_ptr(), buf.len_bytes()));
        drop(inner);
        let Some((at, len_bytes)) = zeroes else {
            return false;
        };
        with_op(op, |op| {
            op.verb = Verb::Write;
            op.payload = Payload::Zeroes(at, len_bytes);
        });
        true
    }

    /// Write-back goes on with zeroes, so that nobody would hear of a base that fails unmaps and nothing else.
    fn tell_unmap_failure(&self, op: NonNull<Op>) {
        let is_unmap = with_op(op, |op| matches!(op.verb, Verb::Unmap));
        if is_unmap && !mem::replace(&mut self.inner.borrow_mut().unmap_failure_told, true) {
            log::warn!("the base device fails UNMAP: zeroes are written to it instead");
        }
    }

    fn finish(&self, op: NonNull<Op>) {
        self.in_flight.set(self.in_flight.get() - 1);
        let bounce = with_op(op, |op| {
            match mem::replace(&mut op.payload, Payload::None) {
                Payload::Bounced => op.bounce.take(),
                _ => None,
            }
        });
        self.release(op);
        let Some(buffer) = bounce else { return };
        let next = {
            let mut inner = self.inner.borrow_mut();
            inner.bounce.push(buffer);
            inner.bounce_queue.pop_front()
        };
        if let Some(waiting) = next {
            self.start_part(waiting);
        }
    }

    /// Prepares the next part of an operation and submits it, unless there is no bounce buffer for it.
    fn start_part(&self, op: NonNull<Op>) {
        if with_op(op, |op| op.needs_bounce()) {
            let buffer = self.inner.borrow_mut().bounce.pop();
            match buffer {
                Some(buffer) => with_op(op, |op| op.bounce = Some(buffer)),
                None => {
                    self.inner.borrow_mut().bounce_queue.push_back(op);
                    return;
                }
            }
        }
        match with_op(op, |op| op.prepare(self.block_shift)) {
            Ok(()) => self.submit(op),
            Err(reason) => {
                log::error!("a base write was not begun: {reason}");
                self.land(op, Err(BaseError::Io));
            }
        }
    }

    /// Hands the prepared part to SPDK.
    fn submit(&self, op: NonNull<Op>) {
        let rc = self.call(op);
        if rc == 0 {
            return;
        }
        if rc != -libc::ENOMEM {
            self.land(op, Err(self.base.error(-rc)));
            return;
        }
        // SAFETY: the entry is inside the operation, which does not move or end before `resume` is called;
        // it is aligned like a pointer and large enough (`WAIT_ENTRY_WORDS`). The channel is ours.
        let rc = unsafe {
            sys::pcache_queue_io_wait(
                self.base.desc(),
                self.channel.as_ptr(),
                (&raw mut (*op.as_ptr()).wait_entry).cast(),
                Some(resume),
                op.as_ptr().cast(),
            )
        };
        if rc != 0 {
            // It was not for want of SPDK's requests: something else is short. Try again soon.
            self.inner.borrow_mut().retry.push_back(op);
            self.news.set(true);
        }
    }

    fn call(&self, op: NonNull<Op>) -> c_int {
        let (desc, channel, arg) = (self.base.desc(), self.channel.as_ptr(), op.as_ptr().cast());
        let done: sys::spdk_bdev_io_completion_cb = Some(part_landed);
        // SAFETY: the operation is ours alone until SPDK is called below.
        let op = unsafe { &mut *op.as_ptr() };
        let (verb, lba, blocks) = (op.verb, op.left.start, op.part_blocks);
        let flat = match op.payload {
            Payload::Flat(at, _) | Payload::Zeroes(at, _) => Some(at),
            Payload::None | Payload::Read(_) | Payload::InPlace | Payload::Bounced => None,
        };
        let mut iovs = || {
            let count = c_int::try_from(op.iovs.len()).unwrap_or(c_int::MAX);
            (op.iovs.as_mut_ptr(), count)
        };
        // SAFETY: descriptor and channel are open and belong together and to this thread. The scatter list
        // lies in the operation, which stays as it is until `part_landed` is called with it; the memory it
        // names, or that is named without one, is the caller's until the engine hears of the end (read), pinned by the engine
        // until then, the operation's own bounce buffer, or the queue's zeroes (write).
        unsafe {
            match verb {
                Verb::Read => {
                    let (iovs, count) = iovs();
                    sys::spdk_bdev_readv_blocks(desc, channel, iovs, count, lba, blocks, done, arg)
                }
                Verb::Write => match flat {
                    Some(at) => sys::spdk_bdev_write_blocks(
                        desc,
                        channel,
                        at.cast(),
                        lba,
                        blocks,
                        done,
                        arg,
                    ),
                    None => {
                        let (iovs, count) = iovs();
                        sys::spdk_bdev_writev_blocks(
                            desc, channel, iovs, count, lba, blocks, done, arg,
                        )
                    }
                },
                Verb::Unmap => sys::spdk_bdev_unmap_blocks(desc, channel, lba, blocks, done, arg),
                Verb::WriteZeroes => {
                    sys::spdk_bdev_write_zeroes_blocks(desc, channel, lba, blocks, done, arg)
                }
                Verb::Flush => sys::spdk_bdev_flush_blocks(desc, channel, lba, blocks, done, arg),
            }
        }
    }

    fn land(&self, op: NonNull<Op>, result: Result<(), BaseError>) {
        self.landed_count.set(self.landed_count.get() + 1);
        self.inner.borrow_mut().landed.push((op, result));
        self.news.set(true);
    }

    /// An operation that is not under way. There are enough: an owner that asks for more than it has said gets one more, at
    /// the price of an allocation.
    fn take_op(&self) -> NonNull<Op> {
        loop {
            let free = self.inner.borrow_mut().free.pop();
            if let Some(op) = free {
                return op;
            }
            self.add_ops(1);
        }
    }

    /// Makes more operations.
    fn add_ops(&self, count: usize) {
        let source_count_max = match self.copying {
            Copying::Direct => 0,
            Copying::Bounced => self.room.sources,
        };
        let op = |_| Op::new(NonNull::from(self), source_count_max);
        let slab = NonNull::from(Box::leak((0..count).map(op).collect::<Box<[Op]>>()));
        let inner = &mut *self.inner.borrow_mut();
        inner.slabs.push(slab);
        // SAFETY: there are so many in the slab.
        let ops = (0..count).map(|number| unsafe { slab.cast::<Op>().add(number) });
        inner.free.extend(ops);
    }

    fn release(&self, op: NonNull<Op>) {
        self.inner.borrow_mut().free.push(op);
    }
}

/// With an operation of a queue, and no other pointer is one of this module.
fn with_op<R>(op: NonNull<Op>, body: impl FnOnce(&mut Op) -> R) -> R {
    // SAFETY: made by `add_ops`, operations live as long as their queue (`drop` frees them), which calls this; `body` calls
    // neither SPDK nor the queue, so nobody else refers to the operation meanwhile.
    body(unsafe { &mut *op.as_ptr() })
}

impl Drop for BaseQueue {
    fn drop(&mut self) {
        // Owners wait for this: SPDK would otherwise complete into freed memory.
        if self.in_flight() != 0 {
            log::error!(
                "{} base operations are abandoned: their memory is lost",
                self.in_flight()
            );
            return;
        }
        for ops in self.inner.get_mut().slabs.drain(..) {
            // SAFETY: leaked by `add_ops`, freed once, and none is under way.
            drop(unsafe { Box::from_raw(ops.as_ptr()) });
        }
        // SAFETY: got in `new` on this thread, put once.
        unsafe { sys::spdk_put_io_channel(self.channel.as_ptr()) }
    }
}

/// SPDK has completed a part.
unsafe extern "C" fn part_landed(bdev_io: *mut sys::spdk_bdev_io, success: bool, arg: *mut c_void) {
    guard(
        (),
        || {
            // SAFETY: `arg` is the operation that `call` passed, which waits for this call; its queue is not
            // dropped before. The request is SPDK's and is given back once, here.
            let (op, queue) = unsafe {
                sys::spdk_bdev_free_io(bdev_io);
                let op = NonNull::new_unchecked(arg.cast::<Op>());
                (op, (*op.as_ptr()).queue.as_ref())
            };
            let result = if success {
                Ok(())
            } else {
                Err(queue.base.error(0))
            };
            queue.land(op, result);
        },
        |_| (),
    );
}

/// SPDK has a request to give again.
unsafe extern "C" fn resume(arg: *mut c_void) {
    guard(
        (),
        || {
            // SAFETY: `arg` is the operation that `submit` queued, which waits for this call; its queue is
            // not dropped before.
            let (op, queue) = unsafe {
                let op = NonNull::new_unchecked(arg.cast::<Op>());
                (op, (*op.as_ptr()).queue.as_ref())
            };
            queue.submit(op);
        },
        |_| (),
    );
}
