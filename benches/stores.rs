//! Which stores: the ways to make a copy durable beside each other, without anything of pcache. The numbers of
//! docs/adr/0015-stores.md are from here.
//!
//! `cargo bench --bench stores -- [PATH] [MIB]`: nanoseconds for each store of so many bytes with a fence behind it, or
//! behind 32 of them, to places of a file in sequence, and 4 KiB to random ones. One row for each way. The last two
//! columns are a write at depth 1: 4 KiB and then a record of 64 bytes, each with its fence; both in this way, or the
//! record alone. Rounds of all ways in turn; medians.

mod random;
#[cfg(target_arch = "x86_64")]
mod ways;

fn main() {
    #[cfg(target_arch = "x86_64")]
    ways::compare();
    #[cfg(not(target_arch = "x86_64"))]
    println!("there is one way only");
}
