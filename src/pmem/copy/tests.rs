use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::pmem::IovBuf;

/// A target with a line before and behind it that must stay as it is.
#[repr(C, align(64))]
struct Target([u8; 16384]);

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 253) as u8).collect()
}

fn check_stored(target: &Target, want: &[u8], what: &str) {
    let (before, rest) = target.0.split_at(LINE);
    let (stored, behind) = rest.split_at(want.len());
    assert!(
        before.iter().all(|byte| *byte == 0xcc),
        "{what}: a store before the target"
    );
    assert!(stored == want, "{what}: {} bytes differ", want.len());
    assert!(
        behind.iter().all(|byte| *byte == 0xcc),
        "{what}: a store behind the target"
    );
}

#[test]
fn every_kernel_stores_what_it_is_given_from_any_alignment() {
    let source = pattern(8192 + 64);
    for kernel in Kernel::available() {
        for skew in 0..64 {
            for len in [0, 64, 128, 192, 448, 4096, 4160, 8192] {
                let mut target = Target([0xcc; 16384]);
                let want = &source[skew..skew + len];
                let dst = target.0.as_mut_ptr().wrapping_add(LINE);
                // SAFETY: the target is aligned to a line and has room for a line and `len` bytes.
                unsafe { kernel.store(dst, want.as_ptr(), len) };
                fence();
                check_stored(&target, want, &kernel.name());
                target.0.fill(0xcc);
                let dst = target.0.as_mut_ptr().wrapping_add(LINE);
                // SAFETY: as above.
                unsafe { kernel.store_record(dst, want.as_ptr(), len) };
                fence();
                check_stored(&target, want, &kernel.name());
            }
        }
    }
}

proptest! {
    #[test]
    fn every_kernel_stores_scattered_sources_and_knows_their_checksum(
        lines in 0usize..160,
        skip in 0usize..130,
        cuts in vec(0usize..10_500, 0..20),
        seed: u32,
    ) {
        let len = lines * LINE;
        let source = pattern(skip + len + 5);
        let want = &source[skip..skip + len];
        let buf = IovBuf::new(&source, &cuts);
        for kernel in Kernel::available() {
            let mut target = Target([0xcc; 16384]);
            let dst = target.0.as_mut_ptr().wrapping_add(LINE);
            let mut cursor = buf.cursor();
            cursor.advance(skip);
            // SAFETY: the target is aligned to a line and has room for a line and `len` bytes.
            unsafe { kernel.store_from(dst, &mut cursor, len) };
            fence();
            check_stored(&target, want, &kernel.name());
            prop_assert_eq!(cursor.remaining(), 5);

            let mut target = Target([0xcc; 16384]);
            let dst = target.0.as_mut_ptr().wrapping_add(LINE);
            let mut cursor = buf.cursor();
            cursor.advance(skip);
            // SAFETY: as above.
            let crc = unsafe { kernel.store_from_crc(dst, &mut cursor, len, seed) };
            fence();
            check_stored(&target, want, &kernel.name());
            prop_assert_eq!(crc, crc32c::crc32c_append(seed, want));
            prop_assert_eq!(cursor.remaining(), 5);
        }
    }
}

#[test]
fn the_checksum_is_that_of_what_was_stored_while_the_source_changes() {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    // Atomics, so that the racing writer is well-defined on its side.
    let source: Vec<AtomicU64> = (0..1024).map(AtomicU64::new).collect();
    let iov = libc::iovec {
        iov_base: source.as_ptr().cast_mut().cast(),
        iov_len: source.len() * 8,
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                for word in &source {
                    word.store(round, Ordering::Relaxed);
                }
            }
        });
        for _ in 0..2000 {
            let mut target = Target([0xcc; 16384]);
            // SAFETY: the element names `source`, which outlives the cursor.
            let mut cursor = unsafe { IovCursor::new(&raw const iov, 1) };
            let dst = target.0.as_mut_ptr();
            // SAFETY: the target is aligned to a line and larger than the source.
            let crc = unsafe { Kernel::best().store_from_crc(dst, &mut cursor, 8192, 7) };
            fence();
            let stored = std::hint::black_box(&target.0[..8192]);
            assert_eq!(crc, crc32c::crc32c_append(7, stored));
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[cfg(target_arch = "x86_64")]
#[test]
fn the_best_kernel_stores_records_in_the_way_that_is_sooner() {
    use super::arch::kernels_of;
    use super::records::Sooner;
    let names = |sooner| {
        let kernels = kernels_of(sooner);
        kernels.iter().map(Kernel::name).collect::<Vec<_>>()
    };
    let [flushed, streamed] = [Sooner::Flushed, Sooner::Streamed].map(names);
    assert!(flushed[0].contains("records by cl"), "{flushed:?}");
    assert!(!streamed[0].contains("records"), "{streamed:?}");
    // Whichever it is, the tests of all kernels store records in each way.
    let ways = |names: &[String]| {
        let ways = names.iter().filter_map(|name| name.split(" by ").nth(1));
        ways.map(str::to_owned)
            .collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(ways(&flushed), ways(&streamed));
}
