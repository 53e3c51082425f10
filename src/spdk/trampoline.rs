//! The border: a panic never unwinds into C.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `body`. If it panics, that is logged (by the panic hook), and `on_panic` is run with the message; a
/// panic in there ends in `last_resort`.
///
/// What a panic may have left half-done must not be used again: `on_panic` sees to that.
pub(super) fn guard<R>(
    last_resort: R,
    body: impl FnOnce() -> R,
    on_panic: impl FnOnce(&str) -> R,
) -> R {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(value) => value,
        Err(payload) => {
            let result = catch_unwind(AssertUnwindSafe(|| on_panic(message(payload.as_ref()))));
            // A payload's own destructor may panic as well.
            let _ = catch_unwind(AssertUnwindSafe(move || drop(payload)));
            result.unwrap_or(last_resort)
        }
    }
}

fn message(payload: &(dyn Any + Send)) -> &str {
    if let Some(text) = payload.downcast_ref::<&str>() {
        text
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text
    } else {
        "a panic without a text"
    }
}
