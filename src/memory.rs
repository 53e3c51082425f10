//! Memory for what grows with a cache: with its device, its segments, its keys. If there is none, that is an error of who
//! asked for the cache, and not the end of the process. What has the same size in every cache is small, and asked for as usual.

use std::collections::HashSet;
use std::hash::Hash;
use zerocopy::FromZeros;

/// There is not enough memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no memory for {what}: {} MiB are wanted; let the application have more, or make the cache device smaller",
    bytes.div_ceil(1 << 20)
)]
pub struct NoMemory {
    /// What it was wanted for.
    pub what: &'static str,
    /// How much was wanted at once.
    pub bytes: u64,
}

impl NoMemory {
    fn of<T>(what: &'static str, count: usize) -> Self {
        let bytes = (count as u64).saturating_mul(size_of::<T>() as u64);
        Self { what, bytes }
    }
}

/// `count` values whose bytes are zeroes. The system provides the memory when it is first touched.
pub(crate) fn zeroed<T: FromZeros>(what: &'static str, count: usize) -> Result<Vec<T>, NoMemory> {
    let found = (!shortage::is_now()).then(|| T::new_vec_zeroed(count).ok());
    found
        .flatten()
        .ok_or_else(|| NoMemory::of::<T>(what, count))
}

/// No value, with room for `count`.
pub(crate) fn with_room<T>(what: &'static str, count: usize) -> Result<Vec<T>, NoMemory> {
    let mut values = Vec::new();
    if shortage::is_now() || values.try_reserve_exact(count).is_err() {
        return Err(NoMemory::of::<T>(what, count));
    }
    Ok(values)
}

/// Lets a set have room for one more.
pub(crate) fn grow<T: Eq + Hash>(what: &'static str, set: &mut HashSet<T>) -> Result<(), NoMemory> {
    if shortage::is_now() || set.try_reserve(1).is_err() {
        return Err(NoMemory::of::<T>(what, set.len() + 1));
    }
    Ok(())
}

/// `count` values, each made by `make`.
pub(crate) fn filled<T>(
    what: &'static str,
    count: usize,
    make: impl FnMut() -> T,
) -> Result<Vec<T>, NoMemory> {
    let mut values = with_room(what, count)?;
    values.resize_with(count, make);
    Ok(values)
}

/// What `make` makes, which asks for `bytes` by itself and cannot be refused: so much is there a moment before.
pub(crate) fn rehearsed<T>(
    what: &'static str,
    bytes: usize,
    make: impl FnOnce() -> T,
) -> Result<T, NoMemory> {
    // Or the compiler sees that nobody needs it.
    drop(std::hint::black_box(with_room::<u8>(what, bytes)?));
    Ok(make())
}

/// Requests that are refused although there is memory.
#[cfg(any(test, feature = "sim"))]
mod shortage {
    use std::cell::Cell;

    thread_local! {
        /// Requests of this thread up to the one that is refused.
        static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
    }

    pub(super) fn is_now() -> bool {
        let left = LEFT.get();
        LEFT.set(left.and_then(|left| left.checked_sub(1)));
        left == Some(0)
    }

    /// Runs `run`, in which the request with this number, from 0 on, is refused. Whether there was one.
    pub(crate) fn at<R>(number: u64, run: impl FnOnce() -> R) -> (R, bool) {
        LEFT.set(Some(number));
        let result = run();
        (result, LEFT.take().is_none())
    }
}

#[cfg(any(test, feature = "sim"))]
pub(crate) use shortage::at as short_at;

#[cfg(not(any(test, feature = "sim")))]
mod shortage {
    pub(super) const fn is_now() -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_had_is_an_error_that_says_what_and_how_much() {
        // Of addresses there are 2^47 bytes at the most.
        let error = zeroed::<u64>("stars", 1 << 50).unwrap_err();
        assert_eq!((error.what, error.bytes), ("stars", 1 << 53));
        assert_eq!(with_room::<u64>("stars", 1 << 50), Err(error));
        assert!(filled("stars", usize::MAX, || 0u64).is_err());
        assert!(rehearsed("stars", 1 << 50, || ()).is_err());
        let text = error.to_string();
        assert!(
            text.contains("no memory for stars: 8589934592 MiB"),
            "{text}"
        );
        let text = NoMemory::of::<u8>("a star", 1).to_string();
        assert!(text.contains("1 MiB"), "{text}");
    }

    #[test]
    fn the_request_with_a_number_is_refused_and_no_other() {
        let three = || [0, 1, 2].map(|_| zeroed::<u8>("it", 4).is_ok());
        assert_eq!(short_at(1, three), ([true, false, true], true));
        assert_eq!(short_at(3, three), ([true; 3], false));
        assert_eq!(three(), [true; 3]);
    }
}
