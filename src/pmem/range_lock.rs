//! The lock that keeps two caches apart: on the part of the device that a cache uses, and on no more, so that
//! several caches can share a device.
//!
//! Two locks are taken. The one on the range of bytes belongs to the open file, not to the process, so it keeps
//! out a second cache of the same process as well; the kernel does not tell whose it is. The one on the whole
//! file is shared by all, and tells. Both go when the file is closed, however the process ends.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::MapError;
use super::backing::{Part, io_error};

/// Against whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Against {
    /// Everybody else.
    Everybody,
    /// Those who write.
    Writers,
}

/// A range of bytes of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockRange {
    start_bytes: u64,
    /// `None`: to the end, wherever that is.
    end_bytes: Option<u64>,
}

impl LockRange {
    /// Of a part, or of everything.
    pub(super) fn of(part: Option<Part>) -> Self {
        Self {
            start_bytes: part.map_or(0, |part| part.offset_bytes),
            end_bytes: part.map(Part::end_bytes),
        }
    }

    fn of_flock(flock: &libc::flock) -> Option<Self> {
        let start_bytes = u64::try_from(flock.l_start).ok()?;
        let len_bytes = u64::try_from(flock.l_len).ok()?;
        Some(Self {
            start_bytes,
            end_bytes: (len_bytes > 0).then(|| start_bytes + len_bytes),
        })
    }
}

impl fmt::Display for LockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes >> 20;
        match (self.start_bytes, self.end_bytes) {
            (0, None) => f.write_str("all of it"),
            (start, None) => write!(f, "MiB {} to its end", mib(start)),
            (start, Some(end)) => write!(f, "MiB {} to {}", mib(start), mib(end)),
        }
    }
}

/// Locks a part of a device, or all of it.
pub(super) fn lock(
    file: &File,
    path: &Path,
    part: Option<Part>,
    against: Against,
) -> Result<(), MapError> {
    let wanted = LockRange::of(part);
    let in_use = |found| MapError::InUse {
        path: path.to_owned(),
        wanted,
        found,
        pids: file
            .metadata()
            .map(|meta| holders(&meta))
            .unwrap_or_default(),
    };
    match file.try_lock_shared() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => return Err(in_use(None)),
        Err(fs::TryLockError::Error(error)) => return Err(io_error(path, "lock")(error)),
    }
    let mut flock = request(wanted, against);
    match control(file, libc::F_OFD_SETLK, &mut flock) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            let mut other = request(wanted, against);
            let asked = control(file, libc::F_OFD_GETLK, &mut other);
            // It may have been given up since.
            let found = asked.is_ok() && i32::from(other.l_type) != libc::F_UNLCK;
            Err(in_use(found.then(|| LockRange::of_flock(&other)).flatten()))
        }
        Err(error) => Err(io_error(path, "lock a part of")(error)),
    }
}

fn request(range: LockRange, against: Against) -> libc::flock {
    // SAFETY: all-zero bytes are a valid `flock`, a struct of integers.
    let mut flock: libc::flock = unsafe { std::mem::zeroed() };
    let kind = match against {
        Against::Everybody => libc::F_WRLCK,
        Against::Writers => libc::F_RDLCK,
    };
    flock.l_type = kind as libc::c_short;
    flock.l_whence = libc::SEEK_SET as libc::c_short;
    flock.l_start = i64::try_from(range.start_bytes).unwrap_or(i64::MAX);
    // 0: to the end, wherever that is.
    flock.l_len = range
        .end_bytes
        .map_or(0, |end| i64::try_from(end - range.start_bytes).unwrap_or(0));
    flock
}

fn control(file: &File, command: libc::c_int, flock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open as long as `file`; the commands used read and write a `flock`, which is
    // what they are given.
    if unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(flock)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The processes that have the device locked, all of it or a part, as far as /proc/locks names them. Empty if
/// they are in another pid namespace, or the file system shows other device numbers there.
fn holders(meta: &fs::Metadata) -> Vec<u32> {
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let dev = meta.dev();
    let id = format!(
        "{:02x}:{:02x}:{}",
        libc::major(dev),
        libc::minor(dev),
        meta.ino()
    );
    parse_holders(&locks, &id, std::process::id())
}

/// Lines are "1: FLOCK  ADVISORY  READ 4711 00:19:1234 0 EOF"; waiters have "->" in the second place. One of
/// `own` is of whoever asks.
fn parse_holders(locks: &str, id: &str, own: u32) -> Vec<u32> {
    let holder = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields[..] {
            [_, "FLOCK", _, _, pid, at, ..] if at == id => pid.parse().ok(),
            _ => None,
        }
    };
    let mut pids: Vec<u32> = locks
        .lines()
        .filter_map(holder)
        .filter(|pid| *pid != 0)
        .collect();
    if let Some(at) = pids.iter().position(|pid| *pid == own) {
        pids.swap_remove(at);
    }
    pids.sort_unstable();
    pids.dedup();
    pids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_holders_are_found_by_device_and_inode() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 00:1a:77 0 EOF\n\
                     2: FLOCK  ADVISORY  READ 4711 00:1a:77 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 4712 00:1a:77 0 EOF\n\
                     3: FLOCK  ADVISORY  READ 4713 00:1a:78 0 EOF\n\
                     4: FLOCK  ADVISORY  READ 0 00:1a:77 0 EOF\n\
                     5: FLOCK  ADVISORY  READ 4711 00:1a:77 0 EOF\n\
                     6: FLOCK  ADVISORY  READ 5 00:1a:77 0 EOF\n\
                     7: OFDLCK ADVISORY  WRITE -1 00:1a:77 0 1023\n\
                     rubbish\n";
        assert_eq!(parse_holders(locks, "00:1a:77", 5), [4711]);
        assert_eq!(parse_holders(locks, "00:1a:77", 4711), [5, 4711]);
    }

    #[test]
    fn ranges_are_named_in_mib() {
        let part = Part {
            offset_bytes: 64 << 20,
            size_bytes: 32 << 20,
        };
        assert_eq!(LockRange::of(Some(part)).to_string(), "MiB 64 to 96");
        assert_eq!(LockRange::of(None).to_string(), "all of it");
        let flock = request(LockRange::of(Some(part)), Against::Writers);
        assert_eq!(LockRange::of_flock(&flock), Some(LockRange::of(Some(part))));
        let flock = request(LockRange::of(None), Against::Everybody);
        assert_eq!(LockRange::of_flock(&flock), Some(LockRange::of(None)));
    }
}
