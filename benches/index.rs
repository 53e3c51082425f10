//! The index beside what else it could be: time and memory of one core. docs/adr/0009 has a run of it.
//!
//! `cargo bench --features heap --bench index -- SHAPE PAGES`: one line of JSON for so many pages of 4 KiB, spread over
//! a base of 1 TiB, of a cache that they fill. A process for each, so that the memory is that of one shape. Shapes:
//!
//! - `quotient`: the index; a line of the CPU's cache is a bucket, and a slot a word. With blocks of 512 bytes and
//!   `PARTS` of them written to each page, by themselves: `quotient PAGES PARTS`.
//! - `open`: a table of entries of page and place, linear probing, as full as that of the index;
//! - `extents`: a tree of extents for each part of the base.

mod memory;
mod random;

use memory::resident_bytes;
use pcache::index::probe::Probe;
use random::Rng;
use serde_json::json;
use std::collections::BTreeMap;
use std::hint::black_box;

const BASE_PAGE_BITS: u32 = 28;
/// Look-ups of a round; those of a batch are prefetched together.
const ROUND: u64 = 1 << 20;
const BATCH: u64 = 32;
const ROUNDS: usize = 7;
/// Pages of the base in one tree.
const TREE_PAGE_BITS: u32 = 18;

/// Number `n` of pages that are spread over the base; no two are the same.
fn page(n: u64) -> u64 {
    let mask = (1 << BASE_PAGE_BITS) - 1;
    let x = n.wrapping_mul(0x9e37_79b1) & mask;
    (x ^ x >> (BASE_PAGE_BITS / 2)).wrapping_mul(0x85eb_ca6b) & mask
}

trait Shape {
    /// Whether there was room.
    fn insert(&mut self, page: u64, place: u64) -> bool;
    fn find(&self, page: u64) -> Option<u64>;
    fn prefetch(&self, _page: u64) {}
}

struct Quotient {
    probe: Probe,
    parts: u32,
}

impl Shape for Quotient {
    fn insert(&mut self, page: u64, place: u64) -> bool {
        let len_blocks = if self.parts == 0 { 1 } else { self.parts };
        (0..len_blocks).all(|part| {
            // Neighbours do not lie side by side.
            let (first, place) = match self.parts {
                0 => (0, place),
                _ => (part, place * 8 + u64::from(7 - part)),
            };
            self.probe.insert(page, first, 1, place)
        })
    }

    fn find(&self, page: u64) -> Option<u64> {
        self.probe.find(page, 0)
    }

    fn prefetch(&self, page: u64) {
        self.probe.prefetch(page);
    }
}

/// Entries of page plus one and place.
struct Open(Vec<(u64, u64)>);

impl Open {
    fn home(&self, page: u64) -> usize {
        let hash = u128::from(page.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        ((hash * self.0.len() as u128) >> 64) as usize
    }
}

impl Shape for Open {
    fn insert(&mut self, page: u64, place: u64) -> bool {
        let (mut at, len) = (self.home(page), self.0.len());
        while self.0[at].0 != 0 && self.0[at].0 != page + 1 {
            at = (at + 1) % len;
        }
        self.0[at] = (page + 1, place);
        true
    }

    fn find(&self, page: u64) -> Option<u64> {
        let mut at = self.home(page);
        loop {
            let (key, place) = self.0[at];
            if key == page + 1 {
                return Some(place);
            }
            if key == 0 {
                return None;
            }
            at = (at + 1) % self.0.len();
        }
    }
}

/// First page, and length and place.
struct Extents(Vec<BTreeMap<u64, (u32, u64)>>);

impl Shape for Extents {
    fn insert(&mut self, page: u64, place: u64) -> bool {
        self.0[(page >> TREE_PAGE_BITS) as usize].insert(page, (1, place));
        true
    }

    fn find(&self, page: u64) -> Option<u64> {
        let tree = &self.0[(page >> TREE_PAGE_BITS) as usize];
        let (first, (len, place)) = tree.range(..=page).next_back()?;
        (page - first < u64::from(*len)).then(|| place + (page - first))
    }
}

/// How long this thread was on a processor: what others do there is not counted.
fn busy_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("/proc is mounted");
    let busy = text.split(' ').next().and_then(|text| text.parse().ok());
    busy.expect("the kernel counts")
}

/// Nanoseconds for each of `count` steps.
fn ns_per_step(count: u64, steps: impl FnOnce()) -> f64 {
    let start = busy_ns();
    steps();
    (busy_ns() - start) as f64 / count as f64
}

/// The median of rounds of [`ROUND`] steps.
fn median_ns(mut round: impl FnMut()) -> f64 {
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| ns_per_step(ROUND, &mut round))
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}

fn measure(mut shape: impl Shape, pages: u64) -> serde_json::Value {
    let before = resident_bytes();
    let mut refused = 0;
    let insert_ns = ns_per_step(pages, || {
        refused = (0..pages).filter(|n| !shape.insert(page(*n), *n)).count();
    });
    let grown_bytes = resident_bytes() - before;
    let mut rng = Rng::new(7);
    let mut look = |prepare: &dyn Fn(&[u64])| {
        for _ in 0..ROUND / BATCH {
            let batch: [u64; BATCH as usize] = std::array::from_fn(|_| page(rng.next() % pages));
            prepare(&batch);
            for page in batch {
                black_box(shape.find(page));
            }
        }
    };
    let lookup_ns = median_ns(|| look(&|_| ()));
    let prefetched_ns =
        median_ns(|| look(&|batch| batch.iter().for_each(|page| shape.prefetch(*page))));
    let mut next = 0;
    let again_ns = median_ns(|| {
        for _ in 0..ROUND {
            next = (next + 1) % pages;
            shape.insert(page(next), next);
        }
    });
    json!({
        "pages": pages,
        "refused": refused,
        "insert_ns": insert_ns,
        "replace_ns": again_ns,
        "lookup_ns": lookup_ns,
        "lookup_prefetched_ns": prefetched_ns,
        "bytes_per_page": grown_bytes as f64 / pages as f64,
    })
}

fn main() {
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| arg != "--bench")
        .collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u64>().expect("a number");
    let quotient = |pages, parts: u32| {
        let block_size_bytes = if parts == 0 { 4096 } else { 512 };
        let probe = Probe::new(pages, 1 << BASE_PAGE_BITS, block_size_bytes);
        let probe = probe.expect("a cache of this size");
        measure(Quotient { probe, parts }, pages)
    };
    let answer = match args[..] {
        ["quotient", pages] => quotient(number(pages), 0),
        ["quotient", pages, parts] => quotient(number(pages), number(parts) as u32),
        ["open", pages] => {
            let entries = number(pages) as usize * 100 / 78;
            measure(Open(vec![(0, 0); entries]), number(pages))
        }
        ["extents", pages] => {
            let trees = 1 << (BASE_PAGE_BITS - TREE_PAGE_BITS);
            measure(Extents(vec![BTreeMap::new(); trees]), number(pages))
        }
        _ => {
            eprintln!("index quotient|open|extents PAGES ...: see the head of the source");
            std::process::exit(2);
        }
    };
    println!("{answer}");
}
