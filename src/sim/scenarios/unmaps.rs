//! A base that claims unmaps and fails them: item 16. One that gets zeroes as data: item 18.

use super::writeback::lowest_rate;
use super::{Context, apply, check, get_well, in_order};
use crate::engine::{BaseCaps, Health};
use crate::sim::base::{Faults, SimBase};
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::Violation;
use crate::sim::script::Step;

fn unmaps(machine: &Machine) -> (u64, u64) {
    let counts = |base: &SimBase| (base.unmap_count(), base.unmap_failure_count());
    machine.with_outside(|outside| counts(&outside.base))
}

/// A trim of everything, and smaller ones between writes and barriers: write-back gets on, nothing is called sick, what
/// was cleared is zeroes all the time, and the base is not asked for each of them. When it takes unmaps again it gets them
/// (INV-WB-7).
pub(super) fn unmaps_that_the_base_always_fails_go_on_as_zeroes(
    context: &mut Context,
) -> Result<(), Violation> {
    let seed = context.seed;
    context.cut(&in_order(), |machine| {
        machine.with_outside(|outside| outside.base.fails_unmaps = true);
        let mut steps = vec![Step::Write(0, 0, 8, 0), Step::Write(1, 8, 8, 0)];
        steps.extend([Step::Drain, Step::Unmap(0, 0, 96)]);
        steps.extend([Step::Settle, Step::DrainStart, Step::Background(4)]);
        steps.extend([Step::Read(1, 0, 30, 0), Step::Turns(2), Step::Drain]);
        steps.push(Step::Read(0, 0, 96, 0));
        let machine = apply(machine, &steps)?;
        check(machine.cache().health() == Health::Online, || {
            format!("{:?} because of an unmap", machine.cache().health())
        })?;
        check(unmaps(&machine) == (0, 1), || {
            format!("{:?} unmaps of the base", unmaps(&machine))
        })?;
        let mut steps = Vec::new();
        for round in 0..6 {
            steps.extend([Step::Write(0, round * 12, 7, 0), Step::Core(0)]);
            steps.extend([Step::Unmap(1, round * 12 + 5, 3), Step::Core(1)]);
            steps.extend([Step::Flush(0), Step::Core(0), Step::Turns(1)]);
            steps.extend([Step::Unmap(0, round * 12 + 7, 4), Step::Core(0)]);
        }
        steps.extend([Step::DrainStart, Step::Background(3), Step::Base(2)]);
        steps.extend([Step::Kill(seed, 2), Step::Drain]);
        let machine = apply(machine, &steps)?;
        // The second life does not know of the first failure.
        check(unmaps(&machine).1 <= 4, || {
            format!("{:?} unmaps of the base", unmaps(&machine))
        })?;
        machine.with_outside(|outside| outside.base.fails_unmaps = false);
        let later = [Step::Pass(60_000), Step::Unmap(1, 20, 8), Step::Drain];
        let machine = apply(machine, &later)?;
        check(unmaps(&machine).0 == 1, || {
            format!("{:?} unmaps of the base", unmaps(&machine))
        })?;
        Ok(machine)
    })
}

/// It is sick as any other, and backs off.
pub(super) fn a_base_that_fails_everything_is_not_asked_in_three_ways_again_and_again(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = in_order();
    context.cut(&setup, |machine| {
        let mut steps = Vec::new();
        for lba in (0..96).step_by(16) {
            steps.extend([Step::Unmap(0, lba, 4), Step::Core(0)]);
        }
        let machine = apply(machine, &steps)?;
        let tail = machine.cache().info().dirty_tail;
        machine.with_outside(|outside| {
            outside.base.fails_unmaps = true;
            outside.base.faults = Faults {
                write_percent: 100,
                ..Faults::default()
            };
        });
        // Less than the first pause: six unmaps, and six zeroes.
        let machine = apply(machine, &[Step::DrainStart, Step::Turns(30)])?;
        let sick = |machine: &Machine, zeroes_max: u64| {
            let zeroes = machine.with_outside(|outside| outside.base.failure_count());
            let (_, failed) = unmaps(machine);
            let is_sick = matches!(machine.cache().health(), Health::WritebackFailing(_));
            let stands = machine.cache().info().dirty_tail == tail;
            let fact = failed <= 6 && zeroes <= zeroes_max && is_sick && stands;
            check(fact, || {
                format!("{failed} unmaps and {zeroes} zeroes of a base that fails all: {is_sick}, {stands}")
            })
        };
        sick(&machine, 6)?;
        let machine = apply(machine, &[Step::Pass(10_000), Step::Turns(30)])?;
        sick(&machine, 12)?;
        get_well(&machine)?;
        Ok(machine)
    })
}

/// Whoever writes zeroes to the base may write no faster than anything else; what it unmaps itself is not written.
pub(super) fn zeroes_keep_to_the_rate_where_the_base_gets_them_as_data(
    context: &mut Context,
) -> Result<(), Violation> {
    for unmap in [false, true] {
        let setup = Setup {
            settings: lowest_rate(),
            base_caps: BaseCaps {
                unmap,
                write_zeroes: false,
                ..Setup::default().base_caps
            },
            ..in_order()
        };
        let mut steps: Vec<_> = (0..4).map(|n| Step::Unmap(0, n * 8, 5)).collect();
        steps.extend([Step::Settle, Step::DrainStart, Step::Turns(30)]);
        let machine = apply(context.machine(&setup)?, &steps)?;
        let is_done = |machine: &Machine| !machine.cache().drain_status().in_progress;
        check(is_done(&machine) || !unmap, || {
            "what the base unmaps itself waits for the rate".to_owned()
        })?;
        check(!is_done(&machine) || unmap, || {
            "zeroes are written faster than the rate".to_owned()
        })?;
        let machine = apply(machine, &[Step::Pass(1_100), Step::Turns(30)])?;
        check(is_done(&machine), || {
            "zeroes wait for longer than the rate says".to_owned()
        })?;
        machine.verdict()?;
    }
    Ok(())
}
