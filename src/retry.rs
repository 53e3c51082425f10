//! Whether and when something is tried again, such as to open a cache that could not be opened, although nobody has mended
//! anything.

use crate::units::{NS_PER_S, Now};

/// Whether an attempt that failed so may work later by itself: the base or the system is short of something, or a process
/// that ends has hold of the cache device still.
pub(crate) fn may_pass(errno: i32) -> bool {
    matches!(
        errno,
        libc::EAGAIN
            | libc::EBUSY
            | libc::EMFILE
            | libc::ENFILE
            | libc::ENODEV
            | libc::ENOMEM
            | libc::EREMOTEIO
    )
}

/// The pause after an attempt that has failed, in nanoseconds. Each is twice as long as the one before, up to a minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pause(u64);

impl Pause {
    /// After the first attempt.
    pub(crate) const FIRST: Self = Self(NS_PER_S);
    const LONGEST: Self = Self(60 * NS_PER_S);

    /// The pause after another attempt.
    pub(crate) fn next(self) -> Self {
        Self((2 * self.0).min(Self::LONGEST.0))
    }

    /// When it is over, if it begins now.
    pub(crate) fn end(self, now: Now) -> Now {
        Now(now.0 + self.0)
    }
}

/// Whether it is the turn of something that is done at the first of many looks, and then less and less often: the pause doubles
/// until it is as long as `apart` looks. `look` counts from 1.
pub(crate) fn is_rare(look: u32, apart: u32) -> bool {
    look.is_power_of_two() && look < apart || look.is_multiple_of(apart)
}

/// Notices that nothing of what is waited for ends.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Standstill {
    /// What had ended at the last look, and since when that has not changed; `None`: nothing was waited for.
    stands: Option<(u64, Now)>,
    /// How often it has stood for so long.
    times: u32,
}

impl Standstill {
    /// To be called again and again. `under_way`: how many are waited for; `ended`: changes when one has ended. Some: for
    /// `after_ns` none has, for the first, second ... time.
    pub(crate) fn lasts(
        &mut self,
        under_way: usize,
        ended: u64,
        now: Now,
        after_ns: u64,
    ) -> Option<u32> {
        let stands = self
            .stands
            .filter(|(then, _)| under_way > 0 && *then == ended);
        let since = stands.map_or(now, |(_, since)| since);
        let lasts = now.since_ns(since) >= after_ns;
        let since = if lasts { now } else { since };
        self.stands = (under_way > 0).then_some((ended, since));
        self.times += u32::from(lasts);
        lasts.then_some(self.times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_minute() {
        let pauses = std::iter::successors(Some(Pause::FIRST), |pause| Some(pause.next()));
        let ends = pauses.map(|pause| pause.end(Now(5)).since_ns(Now(5)) / NS_PER_S);
        let seconds: Vec<_> = ends.take(9).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    }

    #[test]
    fn what_is_done_again_and_again_is_done_less_and_less_often() {
        let turns: Vec<_> = (1..60).filter(|look| is_rare(*look, 12)).collect();
        assert_eq!(turns, [1, 2, 4, 8, 12, 24, 36, 48]);
    }

    #[test]
    fn it_is_a_standstill_if_nothing_ends_although_something_is_waited_for() {
        let mut standstill = Standstill::default();
        let mut lasts = |under_way, ended, s: u64| {
            standstill.lasts(under_way, ended, Now(s * NS_PER_S), 5 * NS_PER_S)
        };
        assert_eq!([100, 104].map(|s| lasts(2, 7, s)), [None; 2]);
        // One has ended.
        assert_eq!([105, 109].map(|s| lasts(1, 8, s)), [None; 2]);
        let turns = [110, 111, 114, 115].map(|s| lasts(1, 8, s));
        assert_eq!(turns, [Some(1), None, None, Some(2)]);
        // Nothing is waited for; then something else.
        assert_eq!(lasts(0, 8, 121), None);
        assert_eq!(
            [122, 126, 127].map(|s| lasts(1, 8, s)),
            [None, None, Some(3)]
        );
    }

    #[test]
    fn a_shortage_may_pass_and_a_mistake_does_not() {
        let shortages = [libc::EAGAIN, libc::ENOMEM, libc::EMFILE, libc::ENFILE];
        let others = [libc::EBUSY, libc::ENODEV, libc::EREMOTEIO];
        assert!(shortages.into_iter().chain(others).all(may_pass));
        let mistakes = [
            libc::EINVAL,
            libc::ENOTSUP,
            libc::EMEDIUMTYPE,
            libc::EIO,
            libc::ENOSPC,
        ];
        assert!(!mistakes.into_iter().any(may_pass));
    }
}
