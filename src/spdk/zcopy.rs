//! ZCOPY: a request that SPDK hands over twice. At its start the caller is given memory; at its end the
//! memory comes back, and if the caller has filled it, it is written.
//!
//! A read that is a hit in one piece is lent its place in the mapping. All other reads are copied into a
//! buffer of SPDK's, and all writes fill one: see docs/adr/0007-zero-copy.md for the reasons.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::ptr::{self, NonNull};

use spdk_sys as sys;

use super::channel::{ChannelState, Health, REQUEST_COUNT_MAX, complete};
use super::memory::Access;
use super::node::Node;
use super::thread::{Polled, Poller};
use super::trampoline::guard;
use crate::engine::{Cache, LOAN_COUNT_MAX, LoanId, Status};
use crate::pmem::MappedPmem;

/// Loans that ended behind our back are looked for so often.
const SWEEP_PERIOD_US: u64 = 100_000;

/// What a cache makes of ZCOPY.
#[derive(Clone, Copy, Debug)]
pub(super) struct Zcopy {
    /// Whether its bdev has it at all.
    supported: bool,
    /// Reads of more blocks are not lent.
    lent_blocks_max: u64,
}

impl Zcopy {
    pub(super) fn of(cache: &Cache<MappedPmem>, access: &Access) -> Self {
        // SAFETY: no arguments; the size is fixed before any bdev module starts.
        let buf_size_max = unsafe { sys::pcache_buf_size_max() };
        let blocks = buf_size_max / u64::from(cache.info().block_size);
        Self {
            // The bdev layer does not split ZCOPY: what can be lent for a write has to fit into one.
            supported: cache.write_size_max_bytes() >= buf_size_max,
            // A larger read would only succeed by chance: it cannot be copied.
            lent_blocks_max: if access.suits_all_readers() {
                blocks
            } else {
                0
            },
        }
    }

    /// Whether a read of so many blocks may be lent.
    pub(super) fn lends(self, len_blocks: u64) -> bool {
        len_blocks <= self.lent_blocks_max
    }
}

/// What a channel has lent, and the requests that need nothing more than an answer.
#[derive(Debug)]
pub(super) struct Loans {
    /// The requests that hold a loan, by its number.
    holders: RefCell<Vec<Option<NonNull<sys::spdk_bdev_io>>>>,
    /// Completed with the next poll: a completion on the way in would take a message of SPDK's.
    answered: RefCell<VecDeque<(NonNull<sys::spdk_bdev_io>, Status)>>,
    sweeper: RefCell<Option<Poller>>,
    /// A warning was given.
    told: Cell<bool>,
}

impl Loans {
    pub(super) fn new() -> Self {
        Self {
            holders: RefCell::new(vec![None; LOAN_COUNT_MAX]),
            answered: RefCell::new(VecDeque::with_capacity(REQUEST_COUNT_MAX as usize)),
            sweeper: RefCell::new(None),
            told: Cell::new(false),
        }
    }

    /// The channel goes; its loans end with the engine's channel.
    pub(super) fn close(&self) {
        *self.sweeper.borrow_mut() = None;
    }

    pub(super) fn has_answers(&self) -> bool {
        !self.answered.borrow().is_empty()
    }

    /// Completes what has been answered so far; a completion may bring the next. `false`: nothing was.
    pub(super) fn complete_answered(&self) -> bool {
        let count = self.answered.borrow().len();
        for _ in 0..count {
            let next = self.answered.borrow_mut().pop_front();
            if let Some((bdev_io, status)) = next {
                complete(bdev_io.as_ptr(), status);
            }
        }
        count > 0
    }

    fn hold(&self, loan: LoanId, bdev_io: NonNull<sys::spdk_bdev_io>) {
        let mut holders = self.holders.borrow_mut();
        if let Some(holder) = holders.get_mut(loan.0 as usize) {
            *holder = Some(bdev_io);
        }
    }

    /// `false`: the request does not hold it.
    fn release(&self, loan: LoanId, bdev_io: *mut sys::spdk_bdev_io) -> bool {
        let mut holders = self.holders.borrow_mut();
        let holder = holders.get_mut(loan.0 as usize);
        holder.is_some_and(|holder| {
            holder
                .take_if(|holder| ptr::eq(holder.as_ptr(), bdev_io))
                .is_some()
        })
    }

    fn holder(&self, loan: LoanId) -> Option<NonNull<sys::spdk_bdev_io>> {
        *self.holders.borrow().get(loan.0 as usize)?
    }
}

impl ChannelState {
    /// In `pcache_zcopy`: who has lent.
    fn as_owner(&self) -> *const c_void {
        ptr::from_ref(self).cast()
    }

    /// The start of a read that was lent.
    pub(super) fn lend(&self, bdev_io: NonNull<sys::spdk_bdev_io>, loan: LoanId) {
        let slice = self.engine.borrow().loan(loan);
        let Some(slice) = slice else {
            log::error!("{}: a loan of nothing", self.node.name);
            return complete(bdev_io.as_ptr(), Status::Failed);
        };
        self.loans.hold(loan, bdev_io);
        self.start_sweeper();
        // SAFETY: a ZCOPY request of this channel at its start, which has not been completed. The mapping
        // outlives the channel, and the loan keeps its content until it is given back.
        unsafe {
            sys::pcache_io_lend(
                bdev_io.as_ptr(),
                slice.as_ptr().cast(),
                slice.len_bytes(),
                self.as_owner(),
                loan.0,
            );
        }
        complete(bdev_io.as_ptr(), Status::Success);
    }

    /// The end of a request that is not written.
    pub(super) fn give_back(&self, bdev_io: *mut sys::spdk_bdev_io, io: &sys::pcache_io) {
        if io.lent {
            self.end_loan(LoanId(io.loan), bdev_io);
        }
        if io.commit && !self.loans.told.replace(true) {
            log::error!(
                "{}: the place of a read was given back to be written; it is for reading only",
                self.node.name
            );
        }
        let status = if io.commit {
            Status::Failed
        } else {
            Status::Success
        };
        self.answer(bdev_io, status);
    }

    /// Completes the request with the next poll.
    pub(super) fn answer(&self, bdev_io: *mut sys::spdk_bdev_io, status: Status) {
        if let Some(bdev_io) = NonNull::new(bdev_io) {
            self.loans
                .answered
                .borrow_mut()
                .push_back((bdev_io, status));
            self.awake.set(true);
        }
    }

    fn end_loan(&self, loan: LoanId, bdev_io: *mut sys::spdk_bdev_io) {
        // After a panic the engine is not touched: nothing is reclaimed any more either.
        if self.loans.release(loan, bdev_io) && self.health.get() == Health::Sound {
            self.engine.borrow_mut().give_back(loan);
        }
    }

    fn start_sweeper(&self) {
        if self.loans.sweeper.borrow().is_some() {
            return;
        }
        let arg = self.as_owner().cast_mut();
        // SAFETY: the state is boxed, and drops the poller in `close`, or with itself.
        let poller = unsafe { Poller::register(sweep, arg, SWEEP_PERIOD_US, c"pcache_loans") };
        *self.loans.sweeper.borrow_mut() = poller;
    }

    /// Ends the loans of requests that SPDK has ended without telling.
    fn sweep(&self) {
        let mut count = 0;
        for loan in (0..).map(LoanId).take(LOAN_COUNT_MAX) {
            let Some(bdev_io) = self.loans.holder(loan) else {
                continue;
            };
            // SAFETY: SPDK's requests come from a pool that outlives all channels, so this one can be looked
            // at, whoever has it now. Only one of this channel, which this thread alone changes, can look as
            // if it still had the loan.
            let holds =
                unsafe { sys::pcache_io_has_loan(bdev_io.as_ptr(), self.as_owner(), loan.0) };
            if !holds {
                self.end_loan(loan, bdev_io.as_ptr());
                count += 1;
            }
        }
        if count > 0 {
            log::info!(
                "{}: {count} lent reads were ended by a reset or an abort",
                self.node.name
            );
        }
    }
}

/// Gets memory of SPDK's for a request; ends in `pcache_up_buf_ready`.
pub(super) fn get_zcopy_buf(bdev_io: *mut sys::spdk_bdev_io) {
    // SAFETY: callers have a ZCOPY request at its start, on its own thread, that has not been completed.
    unsafe { sys::pcache_io_get_zcopy_buf(bdev_io) }
}

unsafe extern "C" fn sweep(arg: *mut c_void) -> c_int {
    // SAFETY: registered with the channel's state, which drops the poller before it goes.
    let state = unsafe { &*arg.cast::<ChannelState>() };
    guard((), || state.sweep(), |why| state.on_panic(why));
    Polled::Idle.code()
}

/// # Safety
/// `ctx` is the context of a bdev of ours.
#[unsafe(no_mangle)]
unsafe extern "C" fn pcache_up_supports_zcopy(ctx: *mut c_void) -> bool {
    // SAFETY: by the contract of this function; SPDK's reference keeps the node alive meanwhile. Not counted:
    // SPDK asks at the start of every request.
    unsafe { (*ctx.cast_const().cast::<Node>()).zcopy.supported }
}
