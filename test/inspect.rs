//! The offline tool: the program as it is run, on caches that the engine has written.

#![expect(
    clippy::unwrap_used,
    reason = "a helper of a test may fail like a test"
)]
#[path = "inspect/rig.rs"]
mod rig;

#[path = "inspect/drain.rs"]
mod drain;
#[path = "inspect/look.rs"]
mod look;
#[path = "inspect/verify.rs"]
mod verify;
