use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn key(lba: u64, len_blocks: u32, kind: KeyKind) -> Key {
    Key {
        lba: Lba(lba),
        len_blocks,
        kind,
        payload_off: 0,
        crc: 0,
    }
}

fn overlay_for(key_count: usize) -> (Overlay, Sorter) {
    let (overlay, sorter) = (Overlay::new(key_count), Sorter::new(key_count));
    (overlay.unwrap(), sorter.unwrap())
}

impl Overlay {
    /// Sorts all of it.
    pub(in super::super) fn sort_now(&mut self) {
        let mut sorter = Sorter::new(self.keys.capacity()).unwrap();
        while !self.sort(&mut sorter, 100) {}
    }
}

/// All pieces, and how many steps they took.
fn pieces_in_steps(overlay: &mut Overlay) -> (Vec<Piece>, usize) {
    overlay.rewind();
    let (mut pieces, mut count) = (vec![], 0);
    loop {
        // It may be interrupted anywhere.
        let mut step = 1;
        match overlay.next(&mut step) {
            Ahead::Piece(piece) => pieces.push(piece),
            Ahead::Unknown => assert_eq!(step, 0),
            Ahead::End => return (pieces, count),
        }
        count += 1;
    }
}

fn pieces(overlay: &mut Overlay) -> Vec<Piece> {
    pieces_in_steps(overlay).0
}

proptest! {
    #[test]
    fn pieces_are_sorted_disjoint_and_the_newest_wins(
        keys in prop::collection::vec((0u64..40, 1u32..12, any::<bool>()), 0..24),
    ) {
        // INV-WB-4.
        let (mut overlay, mut sorter) = overlay_for(1024);
        let mut expected = vec![None; 64];
        let mut ends = (0, PmemOff(0));
        for (number, &(lba, len, goes_on)) in keys.iter().enumerate() {
            // Some go on where the one before ends, on the base and in the cache: they are laid on as one.
            let (lba, payload) = if goes_on && ends.0 + u64::from(len) <= 52 {
                ends
            } else {
                (lba, PmemOff((number as u64 + 1) << 20))
            };
            ends = (lba + u64::from(len), payload.plus(u64::from(len) << 9));
            overlay.push(&key(lba, len, KeyKind::Data), payload, 9);
            for block in 0..u64::from(len) {
                expected[(lba + block) as usize] = Some(payload.0 + (block << 9));
            }
        }
        while !overlay.sort(&mut sorter, 3) {}
        let mut found = vec![None; 64];
        let mut last_end = 0;
        let first = pieces(&mut overlay);
        for piece in &first {
            assert!(piece.len_blocks > 0 && piece.lba.0 >= last_end);
            last_end = piece.lba.0 + piece.len_blocks;
            for block in 0..piece.len_blocks {
                found[(piece.lba.0 + block) as usize] = Some(piece.payload.0 + (block << 9));
            }
        }
        prop_assert_eq!(found, expected);
        // A second time, as after a flush of the base that failed.
        prop_assert_eq!(pieces(&mut overlay), first);
    }

    #[test]
    fn what_lies_under_much_else_comes_out_as_it_should(
        small in prop::collection::vec((0u64..300, 1u32..9), 0..600),
        large in prop::collection::vec((0u64..100, 100u32..250), 1..4),
        later in prop::collection::vec((0u64..300, 1u32..9), 0..20),
    ) {
        // INV-WB-4, with far more keys at a block than one piece takes.
        let (mut overlay, mut sorter) = overlay_for(1024);
        let mut expected = vec![None; 512];
        let all = small.iter().chain(&large).chain(&later);
        for (number, &(lba, len)) in all.enumerate() {
            let payload = PmemOff((number as u64 + 1) << 20);
            overlay.push(&key(lba, len, KeyKind::Data), payload, 9);
            for block in 0..u64::from(len) {
                expected[(lba + block) as usize] = Some(payload.0 + (block << 9));
            }
        }
        while !overlay.sort(&mut sorter, 7) {}
        let mut found = vec![None; 512];
        let mut last_end = 0;
        for piece in pieces(&mut overlay) {
            assert!(piece.len_blocks > 0 && piece.lba.0 >= last_end);
            last_end = piece.lba.0 + piece.len_blocks;
            for block in 0..piece.len_blocks {
                found[(piece.lba.0 + block) as usize] = Some(piece.payload.0 + (block << 9));
            }
        }
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn many_keys_come_out_as_a_stable_sort_has_them_wherever_sorting_is_interrupted(
        seed in 0u64..1000,
        count in 257usize..1500,
        // An item has room for 32 of them.
        range_bits in 1u32..60,
        align_bits in 0u32..4,
        steps in 1usize..700,
    ) {
        let mut state = seed;
        let mut random = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            state ^ state >> 20
        };
        let lbas: Vec<u64> = (0..count)
            .map(|_| (random() & ((1 << range_bits) - 1)) << align_bits)
            .collect();
        let (mut overlay, mut sorter) = overlay_for(count);
        // Twice: what the first batch leaves behind does not show in the second.
        for _ in 0..2 {
            overlay.clear();
            for (number, &lba) in lbas.iter().enumerate() {
                overlay.push(&key(lba, 1, KeyKind::Data), PmemOff((number as u64) << 13), 12);
            }
            while !overlay.sort(&mut sorter, steps) {}
            let mut expected: Vec<(u64, u64)> = (0..).zip(&lbas).map(|(n, lba)| (*lba, n << 13)).collect();
            // The newest of those with the same address.
            expected.sort();
            expected.reverse();
            expected.dedup_by_key(|(lba, _)| *lba);
            expected.reverse();
            let found: Vec<_> = pieces(&mut overlay)
                .iter()
                .map(|piece| (piece.lba.0, piece.payload.0))
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}

/// Lays on so many keys of a block; where each block is to come from.
fn lay(overlay: &mut Overlay, seed: u64, count: u64, range: u64) -> Vec<(u64, u64)> {
    let mut state = seed;
    let mut newest = BTreeMap::new();
    overlay.clear();
    for number in 0..count {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let (lba, payload) = ((state >> 20) % range, (seed << 20) + (number << 13));
        overlay.push(&key(lba, 1, KeyKind::Data), PmemOff(payload), 12);
        newest.insert(lba, payload);
    }
    newest.into_iter().collect()
}

proptest! {
    /// A batch may be given up at any moment; the one behind it may have more keys, or fewer. It is written while the next
    /// one is sorted.
    #[test]
    fn nothing_is_left_of_a_sort_that_was_given_up(
        batches in prop::collection::vec((2u64..700, 2u64..700, 0usize..12, any::<bool>()), 1..6),
        steps in 1usize..300,
        range in 1u64..100_000,
    ) {
        let (mut next, mut sorter) = overlay_for(700);
        let mut batch = Overlay::new(700).unwrap();
        for (seed, (given_up, count, polls, is_narrowed)) in (0..).zip(batches) {
            lay(&mut next, 1000 + seed, given_up, range);
            for _ in 0..polls {
                if is_narrowed {
                    next.narrow(&mut sorter, steps, given_up as usize / 2);
                } else {
                    next.sort(&mut sorter, steps);
                }
            }
            let expected = lay(&mut next, seed, count, range);
            while !next.sort(&mut sorter, steps) {}
            mem::swap(&mut batch, &mut next);
            lay(&mut next, 2000 + seed, given_up, range);
            next.sort(&mut sorter, steps);
            let found: Vec<_> = pieces(&mut batch)
                .iter()
                .map(|piece| (piece.lba.0, piece.payload.0))
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}

/// The parts of a batch for which there is room for so many keys: the pieces of all, and how many parts there are.
fn in_parts(keys: &[(Key, PmemOff)], room: usize) -> (Vec<Piece>, usize) {
    let (mut overlay, mut sorter) = overlay_for(room);
    let (mut all, mut count, mut from) = (vec![], 0, Lba(0));
    loop {
        overlay.clear();
        overlay.begin_at(from);
        for (key, payload) in keys {
            if overlay.key_count() == room {
                while !overlay.narrow(&mut sorter, 3, room / 2) {}
                assert!(overlay.key_count() <= room / 2);
            }
            overlay.push(key, *payload, 9);
        }
        while !overlay.sort(&mut sorter, 3) {}
        let pieces = pieces(&mut overlay);
        let next = overlay.next_part();
        for piece in &pieces {
            let end = piece.lba.0 + piece.len_blocks;
            assert!(piece.lba >= from && next.is_none_or(|next| end <= next.0));
        }
        all.extend(pieces);
        count += 1;
        let Some(next) = next else {
            return (all, count);
        };
        assert!(next > from, "a part without blocks");
        from = next;
    }
}

proptest! {
    #[test]
    fn parts_hold_together_what_one_overlay_holds(
        keys in prop::collection::vec((0u64..200, 1u32..40, any::<bool>()), 0..150),
        room in 2usize..40,
    ) {
        // INV-WB-8.
        let mut expected = vec![None; 256];
        let mut laid = vec![];
        for (number, &(lba, len, is_short)) in keys.iter().enumerate() {
            let len = if is_short { 1 } else { len };
            let payload = PmemOff((number as u64 + 1) << 20);
            laid.push((key(lba, len, KeyKind::Data), payload));
            for block in 0..u64::from(len) {
                expected[(lba + block) as usize] = Some(payload.0 + (block << 9));
            }
        }
        let mut found = vec![None; 256];
        let mut last_end = 0;
        let (pieces, count) = in_parts(&laid, room);
        for piece in pieces {
            prop_assert!(piece.len_blocks > 0 && piece.lba.0 >= last_end);
            last_end = piece.lba.0 + piece.len_blocks;
            for block in 0..piece.len_blocks {
                found[(piece.lba.0 + block) as usize] = Some(piece.payload.0 + (block << 9));
            }
        }
        prop_assert_eq!(found, expected);
        // Each key begins and ends a piece; each part but the last is cut behind half of the room.
        prop_assert!(count <= 1 + 2 * keys.len() / (room / 2), "{} parts", count);
    }
}

#[test]
fn a_few_blocks_that_are_overwritten_often_make_one_part() {
    let keys: Vec<_> = (0..10_000)
        .map(|number| {
            (
                key(number % 10 * 3, 2, KeyKind::Data),
                PmemOff(number << 12),
            )
        })
        .collect();
    let (pieces, count) = in_parts(&keys, 64);
    assert_eq!((pieces.len(), count), (10, 1));
    // Scattered ones take as many parts as there must be, or twice as many.
    let keys: Vec<_> = (0..10_000)
        .map(|number| {
            (
                key(number * 7919 % 10_000 * 2, 1, KeyKind::Data),
                PmemOff(number << 12),
            )
        })
        .collect();
    let (pieces, count) = in_parts(&keys, 64);
    assert_eq!(pieces.len(), 10_000);
    assert!(
        (10_000 / 64..=10_000 / 32 + 1).contains(&count),
        "{count} parts"
    );
}

#[test]
fn the_pages_of_a_write_are_one_key_as_far_as_nothing_comes_between() {
    let (mut overlay, mut sorter) = overlay_for(100);
    // (lba, payload), in pages: three of a write; one that goes on in the cache alone, one on the base alone.
    for (lba, payload) in [(8, 100), (9, 101), (10, 102), (20, 103), (21, 200)] {
        overlay.push(&key(lba, 1, KeyKind::Data), PmemOff(payload << 12), 12);
    }
    // Newer, in the middle; behind it the write goes on.
    overlay.push(&key(9, 1, KeyKind::Data), PmemOff(50 << 12), 12);
    overlay.push(&key(11, 1, KeyKind::Data), PmemOff(103 << 12), 12);
    while !overlay.sort(&mut sorter, 1) {}
    assert_eq!(overlay.key_count(), 5);
    let found: Vec<_> = pieces(&mut overlay)
        .iter()
        .map(|piece| (piece.lba.0, piece.len_blocks, piece.payload.0 >> 12))
        .collect();
    let expected = [
        (8, 1, 100),
        (9, 1, 50),
        (10, 1, 102),
        (11, 1, 103),
        (20, 1, 103),
        (21, 1, 200),
    ];
    assert_eq!(found, expected);
    overlay.clear();
    for page in 0..100 {
        overlay.push(&key(page, 1, KeyKind::Data), PmemOff(page << 12), 12);
    }
    assert_eq!(
        overlay.key_count() as u64,
        (100u64 << 12).div_ceil(JOINED_BYTES_MAX)
    );
}

#[test]
fn a_block_that_was_overwritten_often_makes_one_key_and_few_steps() {
    const COUNT: usize = 10_000;
    let (mut overlay, mut sorter) = overlay_for(COUNT);
    for number in 0..COUNT as u64 {
        overlay.push(&key(8, 1, KeyKind::Data), PmemOff(number << 12), 12);
    }
    let mut calls = 1;
    while !overlay.sort(&mut sorter, 100) {
        calls += 1;
    }
    assert!(calls >= COUNT / 100, "{calls} calls");
    assert_eq!(overlay.key_count(), 1);
    let pieces = pieces(&mut overlay);
    assert_eq!(pieces.len(), 1);
    assert_eq!(pieces[0].payload, PmemOff((COUNT as u64 - 1) << 12));
}

#[test]
fn keys_below_a_newer_one_are_looked_at_once() {
    const COUNT: usize = 10_000;
    let (mut overlay, mut sorter) = overlay_for(COUNT + 1);
    for lba in 0..COUNT as u64 {
        // No two of them lie side by side in the cache.
        overlay.push(&key(lba, 1, KeyKind::Data), PmemOff(lba << 13), 12);
    }
    overlay.push(&key(0, COUNT as u32, KeyKind::Unmap), PmemOff(0), 12);
    while !overlay.sort(&mut sorter, 100) {}
    let (pieces, steps) = pieces_in_steps(&mut overlay);
    assert_eq!((pieces.len(), pieces[0].kind), (1, KeyKind::Unmap));
    assert_eq!(pieces[0].len_blocks, COUNT as u64);
    assert!((COUNT..COUNT + 10).contains(&steps), "{steps} steps");
}

/// Each begins and ends a block later than the one before it, and is older. The last key goes further than all of them.
#[test]
fn keys_that_come_to_their_ends_below_a_newer_one_are_looked_at_twice() {
    const COUNT: usize = 4000;
    let (mut overlay, mut sorter) = overlay_for(COUNT + 1);
    for lba in (0..COUNT as u64).rev() {
        overlay.push(&key(lba, COUNT as u32, KeyKind::Unmap), PmemOff(0), 12);
    }
    overlay.push(
        &key(COUNT as u64, COUNT as u32, KeyKind::Data),
        PmemOff(0),
        12,
    );
    while !overlay.sort(&mut sorter, 100) {}
    let (pieces, steps) = pieces_in_steps(&mut overlay);
    let kinds: Vec<KeyKind> = pieces.iter().map(|piece| piece.kind).collect();
    assert_eq!(kinds, [KeyKind::Unmap, KeyKind::Data]);
    assert!(
        (COUNT * 2..COUNT * 2 + 10).contains(&steps),
        "{steps} steps"
    );
}
