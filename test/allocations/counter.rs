//! Counts what a thread asks of the heap and gives back to it, while it is told to. The heap of this program goes
//! through here; of threads that count nothing nothing is noted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::{Cell, RefCell};

/// Calls of which it is kept where they came from; the first say it.
const TRACES_MAX: usize = 3;

struct Counting;

#[global_allocator]
static HEAP: Counting = Counting;

/// What has gone to the heap and back.
#[derive(Debug, Default)]
pub(crate) struct Heap {
    pub(crate) allocations: u64,
    pub(crate) allocated_bytes: u64,
    pub(crate) frees: u64,
    traces: Vec<Backtrace>,
}

impl Heap {
    const UNTOUCHED: Self = Self {
        allocations: 0,
        allocated_bytes: 0,
        frees: 0,
        traces: Vec::new(),
    };

    /// # Panics
    /// It was touched; where.
    #[track_caller]
    pub(crate) fn assert_untouched(&self, during: &str) {
        self.assert_touched_at_most(0, during);
    }

    /// # Panics
    /// More was asked for, or given back; where.
    #[track_caller]
    pub(crate) fn assert_touched_at_most(&self, times: u64, during: &str) {
        assert!(
            self.allocations <= times && self.frees <= times,
            "{during}: {} allocations of {} bytes, and {} were given back. The first:\n{}",
            self.allocations,
            self.allocated_bytes,
            self.frees,
            self.origins()
        );
    }

    /// Where the first calls came from: what lies in pcache, and here.
    fn origins(&self) -> String {
        let mut found = String::new();
        for trace in &self.traces {
            let text = trace.to_string();
            let mut is_ours = false;
            for line in text.lines() {
                let is_place = line.trim_start().starts_with("at ");
                if !is_place {
                    is_ours = line.contains("pcache::") || line.contains("allocations::");
                }
                if is_ours {
                    found += &format!("{line}\n");
                }
            }
            found += "   --\n";
        }
        found
    }
}

thread_local! {
    static IS_COUNTING: Cell<bool> = const { Cell::new(false) };
    static COUNTED: RefCell<Heap> = const { RefCell::new(Heap::UNTOUCHED) };
}

/// Runs `run`, and counts what this thread asks of the heap meanwhile.
pub(crate) fn counted<R>(run: impl FnOnce() -> R) -> (R, Heap) {
    /// Also when `run` panics: what the test harness then does is its own affair.
    struct Stop;
    impl Drop for Stop {
        fn drop(&mut self) {
            IS_COUNTING.set(false);
        }
    }
    COUNTED.replace(Heap::UNTOUCHED);
    let stop = Stop;
    IS_COUNTING.set(true);
    let result = run();
    drop(stop);
    (result, COUNTED.take())
}

/// Notes a call. To look where it came from takes memory by itself, which does not count.
fn note(count: impl FnOnce(&mut Heap)) {
    // The heap is used after the end of a thread's own data, too.
    if !IS_COUNTING.try_with(Cell::get).unwrap_or(false) {
        return;
    }
    IS_COUNTING.set(false);
    COUNTED.with_borrow_mut(|heap| {
        count(heap);
        if heap.traces.len() < TRACES_MAX {
            heap.traces.push(Backtrace::force_capture());
        }
    });
    IS_COUNTING.set(true);
}

fn note_allocation(size_bytes: usize) {
    note(|heap| {
        heap.allocations += 1;
        heap.allocated_bytes += size_bytes as u64;
    });
}

// SAFETY: all is done by the system's allocator, with what the caller has passed.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note_allocation(layout.size());
        // SAFETY: the contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note_allocation(layout.size());
        // SAFETY: the contract is the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size_bytes: usize) -> *mut u8 {
        note_allocation(size_bytes);
        // SAFETY: the contract is the same.
        unsafe { System.realloc(at, layout, size_bytes) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        note(|heap| heap.frees += 1);
        // SAFETY: the contract is the same.
        unsafe { System.dealloc(at, layout) }
    }
}
