//! What lies under the cache device, and whether it keeps its content when the power fails.
//!
//! Stores that went past the cache are power-safe if two things hold: they address the persistent medium
//! itself, and the platform saves the memory controller's write queue, into which a fence pushes them.
//!
//! - The first holds for device-DAX, and for a file mapped with `MAP_SYNC`; never for tmpfs, hugetlbfs or a
//!   file in the page cache.
//! - The second is what the kernel calls the persistence domain of the region under the device
//!   (`/sys/bus/nd/devices/regionN/persistence_domain`): `memory_controller` (ADR) or `cpu_cache` (eADR).
//!
//! Only what the platform declares counts. Emulated memory (`memmap=`), virtio-pmem (whose stores the host
//! may still lose), volatile memory offered as device-DAX (CXL, HBM) and some early NVDIMM platforms declare
//! nothing, so they are called kill-safe only. A virtual machine's host can declare what is not true; that
//! cannot be seen from inside.

use std::fmt;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// What a completed write survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// A power cut, and everything less.
    Power,
    /// The death of the process at any instruction, but no power cut.
    Process,
}

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Power => "power",
            Self::Process => "process",
        })
    }
}

/// What kind of thing is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// A device-DAX character device. The only kind that a device may access directly for good.
    DevDax,
    /// A file in hugetlbfs: pinned memory, fit for DMA, volatile.
    Hugetlbfs,
    /// A file in tmpfs: volatile, not fit for DMA.
    Tmpfs,
    /// A file in any other file system, on DAX or in the page cache. Not fit for DMA.
    File,
}

/// Which part of the way to the medium the platform saves when the power fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PersistenceDomain {
    /// The caches too (eADR).
    CpuCache,
    /// The memory controller's write queue (ADR).
    MemoryController,
    /// Nothing is declared.
    Undeclared,
}

impl PersistenceDomain {
    /// Whether a fenced non-temporal store has arrived.
    pub(super) fn covers_write_queue(self) -> bool {
        self != Self::Undeclared
    }
}

/// A device-DAX device as sysfs describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DaxDevice {
    pub(super) size_bytes: u64,
    /// Mappings must be a multiple of this in address and length.
    pub(super) align_bytes: u64,
}

/// Alignment of a device whose kernel does not tell: the default of `ndctl create-namespace`.
const DAX_ALIGN_DEFAULT_BYTES: u64 = 2 << 20;

/// How deep stacked block devices (device-mapper) are followed.
const STACK_DEPTH_MAX: u32 = 8;

/// The tree in which the kernel describes devices.
#[derive(Debug)]
pub(super) struct Sysfs {
    root: PathBuf,
}

impl Sysfs {
    pub(super) fn new() -> Self {
        Self {
            root: PathBuf::from("/sys"),
        }
    }

    /// The device-DAX device with this number, if it is one.
    pub(super) fn dax_device(&self, rdev: libc::dev_t) -> Option<DaxDevice> {
        let dir = self.device_dir("char", rdev)?;
        let subsystem = fs::canonicalize(dir.join("subsystem")).ok()?;
        if subsystem.file_name()? != "dax" {
            return None;
        }
        let size_bytes = read_u64(&dir.join("size"))?;
        // Kernels before 5.1 have it in the region above, next to the device.
        let align_bytes = [
            "align",
            "../align",
            "device/align",
            "../../dax_region/align",
        ]
        .iter()
        .find_map(|name| read_u64(&dir.join(name)))
        .filter(|align| align.is_power_of_two())
        .unwrap_or(DAX_ALIGN_DEFAULT_BYTES);
        Some(DaxDevice {
            size_bytes,
            align_bytes,
        })
    }

    /// The persistence domain under a character device.
    pub(super) fn domain_of_char(&self, rdev: libc::dev_t) -> PersistenceDomain {
        self.device_dir("char", rdev)
            .map_or(PersistenceDomain::Undeclared, |dir| domain_above(&dir))
    }

    /// The persistence domain under the block device of a file system.
    pub(super) fn domain_of_block(&self, dev: libc::dev_t) -> PersistenceDomain {
        self.device_dir("block", dev)
            .map_or(PersistenceDomain::Undeclared, |dir| {
                domain_of_block_dir(&dir, STACK_DEPTH_MAX)
            })
    }

    fn device_dir(&self, kind: &str, dev: libc::dev_t) -> Option<PathBuf> {
        let name = format!("{}:{}", libc::major(dev), libc::minor(dev));
        fs::canonicalize(self.root.join("dev").join(kind).join(name)).ok()
    }
}

/// The domain that the nearest directory above a device declares: that of its region.
fn domain_above(dir: &Path) -> PersistenceDomain {
    let declared = dir
        .ancestors()
        .find_map(|above| fs::read_to_string(above.join("persistence_domain")).ok());
    match declared.as_deref().map(str::trim) {
        Some("cpu_cache") => PersistenceDomain::CpuCache,
        Some("memory_controller") => PersistenceDomain::MemoryController,
        _ => PersistenceDomain::Undeclared,
    }
}

/// As [`domain_above`]; of a device-mapper device, the weakest of what it is made of.
fn domain_of_block_dir(dir: &Path, depth_left: u32) -> PersistenceDomain {
    let parts: Vec<PathBuf> = fs::read_dir(dir.join("slaves"))
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    if parts.is_empty() {
        return domain_above(dir);
    }
    if depth_left == 0 {
        return PersistenceDomain::Undeclared;
    }
    let mut weakest = PersistenceDomain::CpuCache;
    for part in parts {
        let domain = fs::canonicalize(part).map_or(PersistenceDomain::Undeclared, |part| {
            domain_of_block_dir(&part, depth_left - 1)
        });
        weakest = match (weakest, domain) {
            (PersistenceDomain::CpuCache, other) => other,
            (_, PersistenceDomain::Undeclared) => PersistenceDomain::Undeclared,
            (weakest, _) => weakest,
        };
    }
    weakest
}

fn read_u64(path: &Path) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The file system under a regular file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileSystem {
    pub(super) backing: Backing,
    /// Size of a page of a mapping: the huge page in hugetlbfs.
    pub(super) page_size_bytes: u64,
    /// For messages: 0 if statvfs does not tell.
    pub(super) free_bytes: u64,
}

/// Asks the kernel what `file` lies on.
pub(super) fn file_system_of(file: &fs::File) -> std::io::Result<FileSystem> {
    // SAFETY: all-zero bytes are a valid `statfs`, a struct of integers.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open as long as `file`, and `stat` is a local to be filled.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    let block_size_bytes = stat.f_bsize as u64;
    let free_bytes = stat.f_bavail.saturating_mul(block_size_bytes);
    // The type's width and sign differ between C libraries; the magic numbers have 32 bits.
    let (backing, page_size_bytes) = match stat.f_type as u32 {
        magic if magic == libc::HUGETLBFS_MAGIC as u32 => (Backing::Hugetlbfs, block_size_bytes),
        magic if magic == libc::TMPFS_MAGIC as u32 => (Backing::Tmpfs, 4096),
        _ => (Backing::File, 4096),
    };
    Ok(FileSystem {
        backing,
        page_size_bytes,
        free_bytes,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn file(&self, path: &str, content: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }

        fn link(&self, path: &str, target: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(self.0.path().join(target), path).unwrap();
        }

        fn sysfs(&self) -> Sysfs {
            Sysfs {
                root: self.0.path().to_owned(),
            }
        }
    }

    const REGION: &str = "devices/LNXSYSTM:00/ndbus0/region0";

    fn dax_tree(domain: Option<&str>) -> Tree {
        let tree = Tree::new();
        let dir = format!("{REGION}/dax0.0/dax0.0");
        tree.file(&format!("{dir}/size"), "4294967296\n");
        tree.file(&format!("{dir}/align"), "0x40000000\n");
        tree.file("bus/dax/uevent", "");
        tree.link(&format!("{dir}/subsystem"), "bus/dax");
        tree.link("dev/char/252:3", &dir);
        if let Some(domain) = domain {
            tree.file(&format!("{REGION}/persistence_domain"), domain);
        }
        tree
    }

    #[test]
    fn a_dax_device_is_described_by_sysfs() {
        let tree = dax_tree(Some("memory_controller\n"));
        let sysfs = tree.sysfs();
        let dev = libc::makedev(252, 3);
        let want = DaxDevice {
            size_bytes: 4 << 30,
            align_bytes: 1 << 30,
        };
        assert_eq!(sysfs.dax_device(dev), Some(want));
        assert_eq!(
            sysfs.domain_of_char(dev),
            PersistenceDomain::MemoryController
        );
        assert_eq!(sysfs.dax_device(libc::makedev(252, 4)), None);
    }

    #[test]
    fn a_region_that_declares_nothing_is_not_power_safe() {
        for tree in [dax_tree(None), dax_tree(Some("\n"))] {
            let domain = tree.sysfs().domain_of_char(libc::makedev(252, 3));
            assert!(!domain.covers_write_queue());
        }
    }

    #[test]
    fn a_stacked_block_device_is_as_safe_as_its_weakest_part() {
        let tree = Tree::new();
        for (index, domain) in ["cpu_cache", "memory_controller", ""].iter().enumerate() {
            let region = format!("devices/ndbus0/region{index}");
            tree.file(&format!("{region}/persistence_domain"), domain);
            tree.file(&format!("{region}/namespace/block/pmem{index}/size"), "1");
            tree.link(
                &format!("dev/block/259:{index}"),
                &format!("{region}/namespace/block/pmem{index}"),
            );
        }
        for (minor, parts) in [(0, &[0, 1][..]), (1, &[0, 1, 2][..])] {
            let dir = format!("devices/virtual/block/dm-{minor}");
            for part in parts {
                tree.link(
                    &format!("{dir}/slaves/pmem{part}"),
                    &format!("devices/ndbus0/region{part}/namespace/block/pmem{part}"),
                );
            }
            tree.link(&format!("dev/block/253:{minor}"), &dir);
        }
        let sysfs = tree.sysfs();
        let domain = |major, minor| sysfs.domain_of_block(libc::makedev(major, minor));
        assert_eq!(domain(259, 0), PersistenceDomain::CpuCache);
        assert_eq!(domain(253, 0), PersistenceDomain::MemoryController);
        assert_eq!(domain(253, 1), PersistenceDomain::Undeclared);
        assert_eq!(domain(8, 0), PersistenceDomain::Undeclared);
    }

    #[test]
    fn durability_is_named_in_lower_case() {
        assert_eq!(
            serde_json::to_string(&Durability::Power).unwrap(),
            "\"power\""
        );
        assert_eq!(Durability::Process.to_string(), "process");
    }
}
