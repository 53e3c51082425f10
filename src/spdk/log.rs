//! The `log` crate's messages, and panics, go to SPDK's log.

use std::ffi::{c_char, c_int};
use std::panic::PanicHookInfo;

use log::{Level, LevelFilter, Log, Metadata, Record};
use spdk_sys as sys;

struct SpdkLog;

static LOGGER: SpdkLog = SpdkLog;

/// Installs the logger and the panic hook. Both belong to this module's own copy of the libraries: the
/// application's are not touched.
pub(super) fn install() {
    // An error means that it is installed already: the module is initialised again after a failed start.
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Debug);
        std::panic::set_hook(Box::new(on_panic));
    }
}

fn on_panic(info: &PanicHookInfo<'_>) {
    // Not through the `log` macros: a message is due even if the logger was never installed.
    write(
        sys::SPDK_LOG_ERROR,
        file!(),
        line!(),
        &format!("internal error: {info}"),
    );
}

impl Log for SpdkLog {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        // SPDK decides, by its print level.
        true
    }

    fn log(&self, record: &Record<'_>) {
        let level = match record.level() {
            Level::Error => sys::SPDK_LOG_ERROR,
            Level::Warn => sys::SPDK_LOG_WARN,
            Level::Info => sys::SPDK_LOG_NOTICE,
            Level::Debug | Level::Trace => sys::SPDK_LOG_DEBUG,
        };
        let (file, line) = (record.file().unwrap_or("?"), record.line().unwrap_or(0));
        match record.args().as_str() {
            Some(text) => write(level, file, line, text),
            None => write(level, file, line, &record.args().to_string()),
        }
    }

    fn flush(&self) {}
}

fn write(level: sys::spdk_log_level, file: &str, line: u32, text: &str) {
    // SAFETY: both texts are passed with their lengths and are copied before the call returns.
    unsafe {
        sys::pcache_log(
            level,
            file.as_ptr().cast::<c_char>(),
            file.len(),
            c_int::try_from(line).unwrap_or(0),
            text.as_ptr().cast::<c_char>(),
            text.len(),
        );
    }
}
