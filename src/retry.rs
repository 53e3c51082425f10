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
