//! What of several read fills at once gets into the cache. Pages 0 to 3 share a bucket of the index.

use super::asking::Asking;
use super::*;
use crate::engine::segments::{Class, Special};
use crate::index::{BlockMap, OWNER_MAX};
use crate::pmem::IovBuf;
use crate::units::Page;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Blocks of the first four pages that are not in the cache.
fn missing(asking: &mut Asking) -> Vec<(u64, u64)> {
    let asked = asking.read(0, 32);
    asking.answer(Ok(()));
    asking.poll();
    asked
}

#[test]
fn fills_of_neighbours_do_not_refuse_each_other() {
    let mut asking = Asking::new(SettingChange::default(), 64);
    let bufs: Vec<_> = (0..4).map(|_| IovBuf::zeroed(4096)).collect();
    // The second two are answered with a poll of their own, when the first two are cached.
    for (number, buf) in (0..).zip(&bufs) {
        asking.submit(buf, number * 8, 8);
    }
    assert_eq!(asking.poll().len(), 4);
    let late = asking.out.base.split_off(2);
    asking.answer(Ok(()));
    asking.poll();
    asking.out.base = late;
    asking.answer(Ok(()));
    asking.poll();
    assert_eq!(missing(&mut asking), []);
    assert_eq!(asking.cache.stats().fills_dropped, 0);
}

#[test]
fn all_holes_of_a_page_are_filled_at_once() {
    let mut asking = Asking::new(SettingChange::default(), 64);
    asking.write(2, 1, 9);
    asking.write(5, 1, 9);
    assert_eq!(asking.read(0, 8), [(0, 2), (3, 2), (6, 2)]);
    asking.answer(Ok(()));
    asking.poll();
    assert_eq!(missing(&mut asking), [(8, 24)]);
    assert_eq!(asking.cache.stats().fills_dropped, 0);
}

#[test]
fn a_fill_is_dropped_if_a_neighbour_was_written_meanwhile() {
    // It may be the same page: the bucket does not tell.
    let mut asking = Asking::new(SettingChange::default(), 64);
    assert_eq!(asking.read(0, 8), [(0, 8)]);
    let asked = std::mem::take(&mut asking.out.base);
    asking.write(8, 8, 9);
    asking.out.base = asked;
    asking.answer(Ok(()));
    asking.poll();
    assert_eq!(asking.ended(), [Status::Success]);
    assert_eq!(missing(&mut asking), [(0, 8), (16, 16)]);
    assert_eq!(asking.cache.stats().fills_dropped, 1);
}

#[test]
fn what_another_channel_has_brought_is_not_filled_again() {
    let mut first = Asking::new(SettingChange::default(), 64);
    let mut second = first.beside(64);
    // Parts of pages are shared within a channel only. Of this one something is known.
    first.write(7, 1, 9);
    for asking in [&mut first, &mut second] {
        assert_eq!(asking.read(0, 4), [(0, 4)]);
        asking.answer(Ok(()));
    }
    for asking in [&mut first, &mut second] {
        asking.poll();
        assert_eq!(asking.ended(), [Status::Success]);
    }
    let stats = first.cache.stats();
    assert_eq!((stats.fill_bytes, stats.fills_dropped), (4 * 512, 1));
}

/// What the segment is for in which the first block of a page lies.
fn class_of(asking: &Asking, page: u64) -> Option<Class> {
    let cache = &asking.cache;
    let found = cache.index.lookup(cache.index.locate(Page(page)))?;
    let BlockMap::Mapped(place) = found.map.block(0) else {
        return None;
    };
    let segment = cache.geometry.segment_of(place);
    Some(cache.segments.get(segment).class())
}

/// One fill, of a page of its own, while another core is at the stream of fills.
fn fill_beside_another_core(asking: &mut Asking, page: u64) -> Option<Class> {
    let cache = Arc::clone(&asking.cache);
    let number = cache.special_stream(Special::Fills).expect("there is room");
    assert_eq!(asking.read(page * 8, 8), [(page * 8, 8)]);
    let stream = cache.streams[number].try_lock();
    asking.answer(Ok(()));
    asking.poll();
    assert_eq!(asking.ended(), [Status::Success]);
    drop(stream);
    class_of(asking, page)
}

#[test]
fn fills_go_into_segments_of_their_own() {
    let mut asking = Asking::new(SettingChange::default(), 64);
    asking.write(0, 8, 9);
    // From the end to the beginning: no sequence, which would be on probation.
    assert_eq!(asking.read(50 * 8, 8), [(50 * 8, 8)]);
    asking.answer(Ok(()));
    asking.poll();
    assert_eq!(class_of(&asking, 0), Some(Class::Log));
    assert_eq!(class_of(&asking, 50), Some(Class::Fills));
    let fills = fill_beside_another_core(&mut asking, 30);
    assert_eq!(fills, Some(Class::Log), "it is not waited for");
    asking.cache.tail_stands.store(true, Ordering::Relaxed);
    let fills = fill_beside_another_core(&mut asking, 10);
    assert_eq!(fills, None, "it could not be reclaimed");
    assert_eq!(asking.cache.stats().fills_dropped, 1);
}

/// Reads these blocks, one request after the other, in a cache that takes 8 KiB for a long sequence. What becomes of the
/// first page of the last one.
fn class_of_last_read(
    policy: ReadAdmission,
    cutoff_kib: u32,
    reads: &[(u64, u64)],
) -> Option<Class> {
    let settings = SettingChange::of(Setting::ReadAdmission, policy as u32)
        .and(Setting::SequentialKib, 8)
        .and(Setting::SequentialCutoffKib, cutoff_kib);
    let mut asking = Asking::new(settings, 64);
    for &(lba, len_blocks) in reads {
        assert_ne!(asking.read(lba, len_blocks), []);
        asking.answer(Ok(()));
        asking.poll();
        assert_eq!(asking.ended(), [Status::Success]);
    }
    let (lba, _) = reads.last()?;
    class_of(&asking, lba / 8)
}

#[test]
fn what_is_read_is_kept_put_on_probation_or_left_out_by_policy_and_length() {
    const KEPT: Option<Class> = Some(Class::Fills);
    const PROBATION: Option<Class> = Some(Class::Probation);
    let short: &[(u64, u64)] = &[(64, 15)];
    let long: &[(u64, u64)] = &[(64, 16)];
    let long_in_pieces: &[(u64, u64)] = &[(64, 8), (72, 8)];
    // The second lies before the first: no sequence.
    let apart: &[(u64, u64)] = &[(256, 8), (64, 8)];
    let below_cutoff: &[(u64, u64)] = &[(64, 31)];
    let at_cutoff: &[(u64, u64)] = &[(64, 32)];
    let at_cutoff_in_pieces: &[(u64, u64)] = &[(64, 16), (80, 16)];
    let table = [
        // Reads, the cut-off, and what comes of them by sequence, on probation, and always.
        (short, 16, [KEPT, PROBATION, KEPT]),
        (apart, 16, [KEPT, PROBATION, KEPT]),
        (long, 16, [PROBATION, PROBATION, KEPT]),
        (long_in_pieces, 16, [PROBATION, PROBATION, KEPT]),
        (below_cutoff, 16, [PROBATION, PROBATION, KEPT]),
        (at_cutoff, 16, [None; 3]),
        (at_cutoff_in_pieces, 16, [None; 3]),
        // Without a cut-off.
        (at_cutoff, 0, [PROBATION, PROBATION, KEPT]),
        // One that comes before anything is long.
        (short, 4, [None; 3]),
    ];
    let policies = [
        ReadAdmission::Sequence,
        ReadAdmission::Probation,
        ReadAdmission::Always,
    ];
    for (reads, cutoff_kib, classes) in table {
        for (policy, class) in policies.into_iter().zip(classes) {
            let found = class_of_last_read(policy, cutoff_kib, reads);
            assert_eq!(found, class, "{policy:?}, {reads:?}, {cutoff_kib} KiB");
        }
    }
}

/// Pushes the first page out of the cache.
fn forget(asking: &Asking) {
    let index = &asking.cache.index;
    let at = index.locate(Page(0));
    assert!(index.evict(at, OWNER_MAX, |_| true), "idle");
}

/// The first half of a page, asked for and brought by another channel; all of it if nothing is known of it.
fn fill_first_half(asking: &mut Asking, asked_blocks: u64) {
    assert_eq!(asking.read(0, 4), [(0, asked_blocks)]);
    asking.answer(Ok(()));
    asking.poll();
    assert_eq!(asking.ended(), [Status::Success]);
}

#[test]
fn what_was_evicted_and_brought_again_meanwhile_is_not_filled_again() {
    for is_brought_again in [true, false] {
        let mut late = Asking::new(SettingChange::default(), 64);
        let mut other = late.beside(64);
        other.write(7, 1, 9);
        assert_eq!(late.read(0, 4), [(0, 4)]);
        fill_first_half(&mut other, 4);
        // As if it had been written back before.
        forget(&other);
        if is_brought_again {
            fill_first_half(&mut other, 8);
        }
        late.answer(Ok(()));
        late.poll();
        assert_eq!(late.ended(), [Status::Success]);
        // Once for each time that it was missing; the page was not written, so what is late is as good.
        let stats = late.cache.stats();
        let filled_blocks = if is_brought_again { 4 + 8 } else { 4 + 4 };
        assert_eq!(stats.fill_bytes, filled_blocks * 512, "{is_brought_again}");
        assert_eq!(stats.fills_dropped, u64::from(is_brought_again));
        assert_eq!(late.read(0, 4), [], "it is cached");
    }
}

#[test]
fn a_fill_is_dropped_though_what_was_written_meanwhile_has_left_the_cache() {
    let mut late = Asking::new(SettingChange::default(), 64);
    let mut other = late.beside(64);
    assert_eq!(late.read(0, 4), [(0, 8)]);
    other.write(1, 1, 9);
    // As if it had been written back before.
    forget(&other);
    late.answer(Ok(()));
    late.poll();
    assert_eq!(late.ended(), [Status::Success]);
    let stats = late.cache.stats();
    assert_eq!((stats.fill_bytes, stats.fills_dropped), (0, 1));
}
