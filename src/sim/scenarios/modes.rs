//! Cache modes: where what is acknowledged is, and what stays cached. Item 41.

use super::{Context, apply, check, heal, in_order, is_cached};
use crate::engine::{CacheMode, Fua, Op, Setting, SettingChange};
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::Violation;
use crate::sim::script::{self, Step};
use crate::units::Lba;

fn in_mode(mode: CacheMode) -> Setup {
    Setup {
        settings: SettingChange::of(Setting::CacheMode, mode as u32),
        ..in_order()
    }
}

/// The machine checks every acknowledgement against the base; here it is also seen that a write waits for it, and
/// what is cached afterwards.
pub(super) fn every_mode_keeps_what_it_promises(context: &mut Context) -> Result<(), Violation> {
    for mode in CacheMode::ALL {
        context.cut(&in_mode(mode), |machine| {
            machine.with_outside(|outside| outside.base.faults.stuck = true);
            machine.write(0, 16, 8, Fua::No, &[700]);
            machine.write(1, 30, 3, Fua::Yes, &[]);
            machine.clear(0, Op::Unmap, 8, 4);
            machine.flush(1);
            (0..20).for_each(|_| machine.poll_all());
            let waiting = machine.outstanding();
            let expected = if mode.holds_writes() { 3 } else { 0 };
            check(waiting == expected, || {
                format!("{mode:?}: {waiting} requests wait for the base, not {expected}")
            })?;
            heal(&machine);
            machine.settle()?;
            let kept = is_cached(&machine, Lba(16)) && is_cached(&machine, Lba(8));
            check(kept != mode.forgets_writes(), || {
                format!("{mode:?}: a write is cached: {kept}")
            })?;
            let before = machine.cache().stats().base_read_bytes;
            for _ in 0..2 {
                machine.read(0, 40, 8, &[]);
                machine.settle()?;
            }
            let reads = (machine.cache().stats().base_read_bytes - before) / 4096;
            let expected = if mode.keeps_reads() { 1 } else { 2 };
            check(reads == expected, || {
                format!("{mode:?}: two reads ask the base {reads} times, not {expected}")
            })?;
            Ok(machine)
        })?;
    }
    Ok(())
}

/// From every mode to every other with requests under way, dirty data left, and a base that fails for a while.
pub(super) fn modes_change_under_load(context: &mut Context) -> Result<(), Violation> {
    for (at, from) in CacheMode::ALL.into_iter().enumerate() {
        for to in CacheMode::ALL {
            let mut steps = vec![
                Step::Write(0, 16, 8, 0),
                Step::Read(1, 60, 8, 0),
                Step::Turns(2),
                Step::Faults(50, 50, 0),
                Step::Write(1, 20, 8, 900),
                Step::Core(1),
                Step::Mode(to),
                Step::Write(0, 18, 4, 0),
                Step::Read(1, 16, 12, 0),
                Step::Unmap(1, 23, 3),
                Step::Turns(3),
                Step::Read(0, 14, 16, 0),
                Step::Heal,
                Step::Turns(30),
                Step::Mode(from),
                Step::WriteFua(0, 20, 6, 0),
                Step::Settle,
            ];
            // Nothing of a mode is left behind for the next one.
            steps.extend([Step::Mode(to), Step::Read(0, 14, 16, 0), Step::Settle]);
            // The machine sees a broken promise without a cut as well; so not all pairs are cut.
            if to == CacheMode::ALL[(at + 1) % CacheMode::ALL.len()] {
                context.cut_script(&in_mode(from), &steps)?;
            } else {
                script::finish(&apply(context.machine(&in_mode(from))?, &steps)?)?;
            }
        }
    }
    Ok(())
}

/// Dirty data of an earlier mode are read from the cache in any mode, until the base has them; then the mode is the
/// new one, and the base serves the reads.
pub(super) fn a_mode_that_waits_for_a_drain_says_so(
    context: &mut Context,
) -> Result<(), Violation> {
    context.cut(&in_order(), |machine| {
        let machine = apply(machine, &[Step::Write(0, 16, 8, 0), Step::Settle])?;
        machine.with_outside(|outside| outside.base.faults.stuck = true);
        let machine = apply(machine, &[Step::Mode(CacheMode::Passthrough)])?;
        let mode = || {
            let info = machine.cache().info();
            (info.cache_mode_now, info.settings.cache_mode())
        };
        let draining = (CacheMode::Writeback, CacheMode::Passthrough);
        (0..5).for_each(|_| machine.poll_all());
        check(mode() == draining, || format!("{:?}", mode()))?;
        machine.read(0, 16, 8, &[]);
        machine.poll_core(0);
        check(machine.outstanding() == 0, || {
            "dirty data are asked from the base".to_owned()
        })?;
        heal(&machine);
        (0..60).for_each(|_| machine.poll_all());
        let done = (CacheMode::Passthrough, CacheMode::Passthrough);
        check(mode() == done, || format!("{:?}", mode()))?;
        let before = machine.cache().stats().base_read_bytes;
        machine.read(0, 16, 8, &[]);
        machine.settle()?;
        let asked = machine.cache().stats().base_read_bytes - before;
        check(asked == 4096, || format!("the base served {asked} bytes"))?;
        Ok(machine)
    })
}

/// A mode is kept on the media; what is dirty after the crash is written back before it counts as reached.
pub(super) fn a_mode_that_was_asked_for_holds_after_a_crash(
    context: &mut Context,
) -> Result<(), Violation> {
    let seed = context.seed;
    context.cut(&in_order(), |machine: Machine| {
        let machine = apply(machine, &[Step::Write(0, 16, 8, 0), Step::Settle])?;
        machine.with_outside(|outside| outside.base.faults.stuck = true);
        let steps = [
            Step::Mode(CacheMode::Writethrough),
            Step::Background(2),
            Step::Write(1, 20, 8, 0),
            Step::Core(1),
        ];
        let machine = apply(machine, &steps)?;
        let machine = machine.cut_power(seed, |setup| setup.core_count = 1)?;
        let info = machine.cache().info();
        let mode = (info.cache_mode_now, info.settings.cache_mode());
        check(
            mode == (CacheMode::Writeback, CacheMode::Writethrough),
            || format!("{mode:?}"),
        )?;
        (0..60).for_each(|_| machine.poll_all());
        let info = machine.cache().info();
        check(
            info.cache_mode_now == CacheMode::Writethrough && info.dirty_bytes == 0,
            || format!("{info:?}"),
        )?;
        Ok(machine)
    })
}
