use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

const A: Agent = Agent(0);
const B: Agent = Agent(1);
const AT: PmemOff = PmemOff(128);

fn line(byte: u8) -> [u8; 64] {
    [byte; 64]
}

/// A line whose first word alone differs from zeroes.
fn word(byte: u8) -> [u8; 64] {
    let mut line = [0; 64];
    line[..8].fill(byte);
    line
}

/// The values of the first word at `AT` in all images that a power cut may leave.
fn survivors(pmem: &SimPmem) -> BTreeSet<u8> {
    let words = pmem.pending_words();
    assert!(words.len() <= 1, "the test stores to one word");
    let choices = words.first().map_or(1, PendingWord::choice_count);
    (0..choices)
        .map(|choice| pmem.crash_image(|_, _| choice)[AT.0 as usize])
        .collect()
}

#[test]
fn a_fenced_store_survives() {
    let pmem = SimPmem::new(4096);
    pmem.store(A, AT, &line(1));
    let _ = pmem.fence(A);
    assert_eq!(pmem.pending_words(), []);
    assert_eq!(pmem.durable_image()[128..192], line(1));
    pmem.assert_durable(AT, 64);
}

#[test]
fn an_unfenced_store_may_survive_or_not_word_by_word() {
    let pmem = SimPmem::new(4096);
    pmem.store(A, AT, &line(1));
    assert_eq!(pmem.pending_words().len(), 8);
    assert_eq!(pmem.durable_image()[128..192], line(0));
    assert_eq!(pmem.live_image()[128..192], line(1));
    let image = pmem.crash_image(|index, _| usize::from(index == 2));
    let mut want = vec![0; 4096];
    want[144..152].fill(1);
    assert_eq!(image, want);
}

#[test]
fn a_reader_sees_a_store_at_once() {
    let pmem = SimPmem::new(4096);
    pmem.store(A, AT, &line(1));
    let mut got = [0; 64];
    pmem.read(AT, &mut got).unwrap();
    assert_eq!(got, line(1));
    pmem.slice(AT, 64).copy_to(&mut got).unwrap();
    assert_eq!(got, line(1));
}

#[test]
fn the_fence_of_another_agent_does_not_help() {
    let pmem = SimPmem::new(4096);
    pmem.store(A, AT, &word(1));
    let _ = pmem.fence(B);
    assert_eq!(survivors(&pmem), BTreeSet::from([0, 1]));
    assert_eq!(
        pmem.check_durable(AT, 1),
        Err(NotDurable { at: AT, agent: A })
    );
    assert_eq!(pmem.counters().idle_fences, 1);
}

#[test]
fn any_version_of_a_word_may_survive() {
    let pmem = SimPmem::new(4096);
    pmem.store(A, AT, &word(1));
    pmem.store(A, AT, &word(2));
    pmem.store(A, AT, &word(1));
    assert_eq!(survivors(&pmem), BTreeSet::from([0, 1, 2]));
    let _ = pmem.fence(A);
    assert_eq!(survivors(&pmem), BTreeSet::from([1]));
}

#[test]
fn a_fence_settles_what_its_agent_overwrote_but_not_what_came_after() {
    let pmem = SimPmem::new(4096);
    pmem.set_overlap_lint(OverlapLint::Count);
    pmem.store(B, AT, &word(1));
    pmem.store(A, AT, &word(2));
    pmem.store(B, AT, &word(3));
    let _ = pmem.fence(A);
    assert_eq!(survivors(&pmem), BTreeSet::from([2, 3]));
    let _ = pmem.fence(B);
    assert_eq!(survivors(&pmem), BTreeSet::from([3]));
    assert_eq!(pmem.counters().foreign_overlaps, 2);
}

#[test]
#[should_panic(expected = "while a store of Agent(0) to it is pending")]
fn a_store_over_another_agents_pending_one_panics() {
    let pmem = SimPmem::new(4096);
    pmem.store(A, AT, &line(1));
    pmem.store(B, AT, &line(2));
}

#[test]
#[should_panic(expected = "acknowledged too early: cache offset 0x88 holds a store of Agent(0)")]
fn an_acknowledgement_over_a_pending_word_panics() {
    let pmem = SimPmem::new(4096);
    let mut bytes = line(0);
    bytes[8] = 1;
    pmem.store(A, AT, &bytes);
    pmem.assert_durable(AT, 8);
    pmem.assert_durable(PmemOff(0), 4096);
}

#[test]
fn lines_are_listed_with_their_stores_in_program_order() {
    let pmem = SimPmem::new(4096);
    pmem.store(A, PmemOff(64), &[1; 128]);
    pmem.store(A, AT, &line(2));
    let lines = pmem.pending_lines();
    assert_eq!(
        lines.iter().map(|line| line.off.0).collect::<Vec<_>>(),
        [64, 128]
    );
    let orders: Vec<u64> = lines[1].stores.iter().map(|store| store.order).collect();
    assert_eq!(orders, [1, 2]);
    assert_eq!(lines[1].stores[1].bytes, line(2));
}

#[test]
fn a_word_that_keeps_its_value_is_no_choice() {
    let pmem = SimPmem::from_image(vec![5; 4096]);
    pmem.store(A, AT, &line(5));
    assert_eq!(pmem.pending_words(), []);
    pmem.assert_durable(AT, 64);
}

#[test]
fn with_caches_in_the_persistence_domain_a_store_is_durable_at_once() {
    let pmem = SimPmem::new(4096);
    pmem.set_model(PersistenceModel::Eadr);
    let points = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&points);
    pmem.on_crash_point(Some(Box::new(move |state, point| {
        if point == CrashPoint::Store(A) {
            assert_eq!(state.durable()[128], 0, "the hook comes before the store");
            seen.fetch_add(1, Ordering::Relaxed);
        }
    })));
    pmem.store(A, AT, &line(1));
    assert_eq!(survivors(&pmem), BTreeSet::from([1]));
    assert_eq!(points.load(Ordering::Relaxed), 1);
}

#[test]
fn the_hook_sees_the_state_before_each_fence() {
    let pmem = SimPmem::new(4096);
    let images = Arc::new(Mutex::new(BTreeSet::new()));
    let found = Arc::clone(&images);
    pmem.on_crash_point(Some(Box::new(move |state, point| {
        assert_eq!(point, CrashPoint::Fence(A));
        let words = state.pending_words();
        let mut image = Vec::new();
        for mask in 0..1usize << words.len() {
            state.crash_image_into(&words, |index, _| mask >> index & 1, &mut image);
            found.lock().unwrap().insert(image.clone());
        }
    })));
    pmem.store(A, AT, &line(1));
    let _ = pmem.fence(A);
    pmem.on_crash_point(None);
    let _ = pmem.fence(A);
    assert_eq!(images.lock().unwrap().len(), 256);
}

#[test]
fn a_poisoned_line_cannot_be_read_until_it_is_healed() {
    let pmem = SimPmem::new(4096);
    pmem.poison(PmemOff(130));
    let mut buf = [0; 64];
    assert_eq!(pmem.read(PmemOff(64), &mut buf), Ok(()));
    assert_eq!(pmem.read(PmemOff(65), &mut buf), Err(Poisoned { at: AT }));
    assert_eq!(pmem.read(PmemOff(191), &mut buf), Err(Poisoned { at: AT }));
    pmem.store(A, AT, &line(1));
    assert_eq!(pmem.read(AT, &mut buf), Err(Poisoned { at: AT }));
    pmem.heal(AT);
    pmem.read(AT, &mut buf).unwrap();
    assert_eq!(buf, line(1));
}

#[test]
fn a_flipped_bit_is_flipped_in_every_version() {
    let pmem = SimPmem::new(4096);
    pmem.store(A, AT, &word(1));
    pmem.flip_bit(AT, 7);
    assert_eq!(survivors(&pmem), BTreeSet::from([0x80, 0x81]));
    assert_eq!(pmem.live_image()[128], 0x81);
}

#[test]
fn a_clone_is_the_same_device() {
    let pmem = SimPmem::new(4096);
    pmem.clone().store(A, AT, &line(1));
    assert_eq!(pmem.counters().stored_bytes, 64);
}
