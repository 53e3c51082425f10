use super::*;
use crate::sim::prng::Prng;
use crate::sim::stamp::Garbage;

fn stamp_of(model: &Model, id: WriteId) -> Stamp {
    model.write(id).stamp
}

fn images(stamps: &[Stamp]) -> impl FnMut(u64) -> Result<Stamp, Garbage> + '_ {
    |lba| Ok(stamps[lba as usize])
}

/// Two blocks, one write of both that is acknowledged, one of both under way.
fn two_writes() -> (Model, Stamp, Stamp) {
    let mut model = Model::new(2, Stamp::ZERO);
    let first = model.begin_write(WriteKind::Data, 0, 2);
    model.end_write(first);
    let second = model.begin_write(WriteKind::Data, 0, 2);
    let stamps = (stamp_of(&model, first), stamp_of(&model, second));
    (model, stamps.0, stamps.1)
}

#[test]
fn a_read_may_return_what_is_acknowledged_or_under_way_and_nothing_older() {
    let (mut model, old, new) = two_writes();
    for stamp in [old, new, old, Stamp::ZERO] {
        let begin = model.begin_read();
        let result = model.end_read(begin, 0, Some(&[stamp]));
        // The third read begins after the second one saw the new data.
        let allowed = [old, new].contains(&stamp) && !(stamp == old && begin.0 > 6);
        assert_eq!(
            result.is_ok(),
            allowed,
            "{stamp:?} at {begin:?}: {result:?}"
        );
    }
}

#[test]
fn a_read_under_way_during_an_acknowledgement_may_return_either() {
    let (mut model, old, _) = two_writes();
    let early = model.begin_read();
    model.end_write(WriteId(2));
    let late = model.begin_read();
    assert!(model.end_read(early, 0, Some(&[old])).is_ok());
    assert!(model.end_read(late, 0, Some(&[old])).is_err());
}

#[test]
fn what_a_read_returns_of_one_block_takes_nothing_from_what_it_may_return_of_the_next() {
    let mut model = Model::new(2, Stamp::ZERO);
    let both = model.begin_write(WriteKind::Data, 0, 2);
    let begin = model.begin_read();
    let second = model.begin_write(WriteKind::Data, 1, 1);
    model.end_write(second);
    // It began before either of the writes ended: each block may be old or new.
    let found = [stamp_of(&model, both), Stamp::ZERO];
    assert_eq!(model.end_read(begin, 0, Some(&found)), Ok(()));
    let later = model.begin_read();
    assert!(model.end_read(later, 1, Some(&[Stamp::ZERO])).is_err());
}

#[test]
fn a_crash_leaves_a_write_under_way_whole_or_absent() {
    let (model, old, new) = two_writes();
    let expectation = Expectation::of(&model);
    assert!(expectation.check(images(&[old, old])).is_ok());
    assert!(expectation.check(images(&[new, new])).is_ok());
    assert!(expectation.check(images(&[old, new])).is_err());
    assert!(expectation.check(images(&[Stamp::ZERO, old])).is_err());
    assert!(
        expectation
            .check(|_| Err(Garbage {
                words: [0, 1],
                at: 1
            }))
            .is_err()
    );
}

#[test]
fn concurrent_writes_come_in_one_order_in_all_their_blocks() {
    let mut model = Model::new(2, Stamp::ZERO);
    let a = model.begin_write(WriteKind::Data, 0, 2);
    let b = model.begin_write(WriteKind::Data, 0, 2);
    model.end_write(a);
    model.end_write(b);
    let (a, b) = (stamp_of(&model, a), stamp_of(&model, b));
    let expectation = Expectation::of(&model);
    assert!(expectation.check(images(&[a, a])).is_ok());
    assert!(expectation.check(images(&[b, b])).is_ok());
    assert!(expectation.check(images(&[a, b])).is_err());
    assert!(expectation.check(images(&[Stamp::ZERO, b])).is_err());
}

#[test]
fn what_a_crash_has_taken_back_never_returns() {
    let (mut model, old, new) = two_writes();
    model.restart(&[old, old]);
    assert!(Expectation::of(&model).check(images(&[new, new])).is_err());
    assert!(
        model
            .check_base(BaseRule::Barriers, images(&[new, old]))
            .is_err()
    );
}

#[test]
fn the_base_keeps_barriers_and_a_cut_keeps_the_order_of_everything() {
    let mut model = Model::new(3, Stamp::ZERO);
    let a = model.begin_write(WriteKind::Data, 0, 1);
    model.end_write(a);
    let b = model.begin_write(WriteKind::Data, 1, 1);
    model.end_write(b);
    let flush = model.begin_flush();
    model.end_flush(flush);
    let c = model.begin_write(WriteKind::Data, 2, 1);
    model.end_write(c);
    let [a, b, c] = [a, b, c].map(|id| stamp_of(&model, id));
    let zero = Stamp::ZERO;
    let check = |rule, stamps: [Stamp; 3]| model.check_base(rule, images(&stamps)).is_ok();
    assert!(check(BaseRule::Barriers, [zero, b, zero]));
    assert!(!check(BaseRule::Cut, [zero, b, zero]));
    assert!(check(BaseRule::Cut, [a, zero, zero]));
    assert!(!check(BaseRule::Barriers, [a, zero, c]));
    assert!(check(BaseRule::Cut, [a, b, c]));
}

#[test]
fn a_fua_write_is_on_the_base_before_what_follows_it() {
    let mut model = Model::new(2, Stamp::ZERO);
    let a = model.begin_write(WriteKind::Fua, 0, 1);
    model.end_write(a);
    let b = model.begin_write(WriteKind::Data, 1, 1);
    model.end_write(b);
    let [a, b] = [a, b].map(|id| stamp_of(&model, id));
    assert!(
        model
            .check_base(BaseRule::Barriers, images(&[Stamp::ZERO, b]))
            .is_err()
    );
    assert!(
        model
            .check_base(BaseRule::Barriers, images(&[a, b]))
            .is_ok()
    );
}

/// One of the states that `check_base_cuts` answers for, checked by itself.
fn any_state_is_forbidden(model: &Model, versions: &[Vec<Stamp>]) -> bool {
    let count: usize = versions.iter().map(Vec::len).product();
    (0..count).any(|mut number| {
        let state: Vec<Stamp> = versions
            .iter()
            .map(|of_block| {
                let stamp = of_block[number % of_block.len()];
                number /= of_block.len();
                stamp
            })
            .collect();
        model
            .check_base(BaseRule::Barriers, images(&state))
            .is_err()
    })
}

#[test]
fn pairs_of_blocks_stand_for_all_states_that_a_cut_of_the_base_can_leave() {
    let (mut allowed, mut forbidden) = (0, 0);
    for seed in 0..4000 {
        let mut prng = Prng::new(seed);
        let blocks = 4;
        let mut model = Model::new(blocks, Stamp::ZERO);
        let mut stamps: Vec<Vec<Stamp>> = vec![vec![Stamp::ZERO]; blocks as usize];
        for _ in 0..prng.between(2, 9) {
            if prng.percent(25) {
                let begin = model.begin_flush();
                model.end_flush(begin);
                continue;
            }
            let lba = prng.below(blocks);
            let len = prng.between(1, (blocks - lba).min(2));
            let kind = prng.pick(&[WriteKind::Data, WriteKind::Fua, WriteKind::Zeroes]);
            let id = model.begin_write(kind, lba, len);
            for block in lba..lba + len {
                let stamp = stamp_of(&model, id);
                stamps[block as usize].push(stamp);
            }
            if prng.percent(80) {
                model.end_write(id);
            }
        }
        // A suffix of the versions of each block, as when the earlier ones have been flushed.
        let versions: Vec<Vec<Stamp>> = stamps
            .iter()
            .map(|of_block| of_block[prng.index(of_block.len())..].to_vec())
            .collect();
        let by_pairs = model
            .check_base_cuts(|lba| versions[lba as usize].iter().map(|s| Ok(*s)).collect())
            .is_err();
        assert_eq!(
            by_pairs,
            any_state_is_forbidden(&model, &versions),
            "seed {seed}: {versions:?}"
        );
        if by_pairs {
            forbidden += 1;
        } else {
            allowed += 1;
        }
    }
    assert!(allowed > 400 && forbidden > 400, "{allowed} {forbidden}");
}
