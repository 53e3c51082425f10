mod lost_tests;

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::{Extent, IovBuf, Part};
use super::*;

const A: Agent = Agent(0);
const MIB: u64 = 1 << 20;

/// A directory in tmpfs, where the development machines have room.
fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn existing(path: &Path) -> MapRequest {
    MapRequest {
        path: path.to_owned(),
        extent: Extent::Whole,
        size_bytes_min: 4096,
    }
}

fn created(path: &Path, size_bytes: u64) -> MapRequest {
    MapRequest {
        extent: Extent::File { size_bytes },
        ..existing(path)
    }
}

fn refusal(request: &MapRequest) -> MapError {
    MappedPmem::open(request).expect_err("the device is refused")
}

#[test]
fn a_file_is_created_and_keeps_its_content() {
    let dir = dir();
    let path = dir.path().join("cache");
    let pmem = MappedPmem::open(&created(&path, 4 * MIB + 5000)).unwrap();
    assert_eq!(pmem.len_bytes(), 4 * MIB + 4096);
    assert_eq!(pmem.durability(), Durability::Process);
    assert_eq!(pmem.backing(), Backing::Tmpfs);
    assert!(pmem.map.base().addr().is_multiple_of(MAP_ALIGN_BYTES));
    pmem.store(A, PmemOff(4 * MIB), &[7; 64]);
    let _ = pmem.fence(A);
    drop(pmem);

    let pmem = MappedPmem::open(&existing(&path)).unwrap();
    let mut got = [0; 66];
    pmem.read(PmemOff(4 * MIB - 1), &mut got).unwrap();
    assert_eq!((got[0], got[65]), (0, 0));
    assert_eq!(got[1..65], [7; 64]);
    drop(pmem);
    MappedPmem::open(&created(&path, 4 * MIB + 5000)).expect("the same size is no contradiction");
}

#[test]
fn a_created_file_has_memory_behind_every_byte() {
    let dir = dir();
    let path = dir.path().join("cache");
    let _pmem = MappedPmem::open(&created(&path, 3 * MIB)).unwrap();
    assert!(fs::metadata(&path).unwrap().blocks() * 512 >= 3 * MIB);
}

#[test]
fn the_holes_of_an_existing_file_are_filled_and_its_content_stays() {
    let dir = dir();
    let path = dir.path().join("cache");
    let file = fs::File::create(&path).unwrap();
    file.set_len(2 * MIB).unwrap();
    file.write_all_at(&[9; 10], MIB).unwrap();
    let pmem = MappedPmem::open(&existing(&path)).unwrap();
    assert!(fs::metadata(&path).unwrap().blocks() * 512 >= 2 * MIB);
    let mut got = [0; 10];
    pmem.read(PmemOff(MIB), &mut got).unwrap();
    assert_eq!(got, [9; 10]);
}

/// What lies behind its end counts as blocks of the file.
#[test]
fn a_hole_is_filled_though_the_file_has_as_many_blocks_as_it_is_long() {
    let dir = dir();
    let path = dir.path().join("cache");
    let file = fs::File::create(&path).unwrap();
    file.set_len(2 * MIB).unwrap();
    let (fd, len) = (file.as_raw_fd(), 2 * MIB as i64);
    // SAFETY: the descriptor is open; no memory is passed.
    let behind = unsafe { libc::fallocate(fd, libc::FALLOC_FL_KEEP_SIZE, len, len) };
    assert_eq!(behind, 0);
    let space_bytes = || fs::metadata(&path).unwrap().blocks() * 512;
    assert!(space_bytes() >= 2 * MIB);
    drop(MappedPmem::open(&existing(&path)).unwrap());
    assert!(space_bytes() >= 4 * MIB, "{}", space_bytes());
}

#[test]
fn who_opens_a_file_knows_whether_it_was_created_for_that() {
    let dir = dir();
    let path = dir.path().join("cache");
    let request = created(&path, 2 * MIB);
    assert!(MappedPmem::open(&request).unwrap().is_new());
    assert!(!MappedPmem::open(&request).unwrap().is_new());
}

#[test]
fn a_file_without_room_is_refused_and_not_left_behind() {
    let dir = dir();
    let path = dir.path().join("cache");
    let error = refusal(&created(&path, 1 << 50));
    assert!(
        matches!(error, MapError::NoSpace { size_bytes, .. } if size_bytes == 1 << 50),
        "{error}"
    );
    assert_eq!(error.errno(), libc::ENOSPC);
    assert!(!path.exists());
}

#[test]
fn a_file_that_does_not_exist_is_not_created_without_a_size() {
    let dir = dir();
    let error = refusal(&existing(&dir.path().join("cache")));
    assert!(matches!(error, MapError::NotFound { .. }), "{error}");
    assert_eq!(error.errno(), libc::ENOENT);
}

#[test]
fn a_mistyped_device_name_does_not_become_a_file_in_dev() {
    let path = PathBuf::from("/dev/dax999.9-of-a-pcache-test");
    let error = refusal(&created(&path, MIB));
    assert!(matches!(error, MapError::NotCreatedInDev { .. }), "{error}");
    assert!(!path.exists());
}

#[test]
fn another_size_than_that_of_the_file_is_refused_with_both() {
    let dir = dir();
    let path = dir.path().join("cache");
    drop(MappedPmem::open(&created(&path, MIB)).unwrap());
    let text = refusal(&created(&path, 2 * MIB)).to_string();
    assert!(
        text.contains("1048576") && text.contains("2097152"),
        "{text}"
    );
    assert_eq!(fs::metadata(&path).unwrap().len(), MIB);
}

#[test]
fn a_device_that_is_too_small_is_refused() {
    let dir = dir();
    let path = dir.path().join("cache");
    fs::write(&path, [0; 4095]).unwrap();
    let error = refusal(&existing(&path));
    assert!(
        matches!(
            error,
            MapError::TooSmall {
                found_bytes: 0,
                min_bytes: 4096,
                ..
            }
        ),
        "{error}"
    );
    let path = dir.path().join("new");
    let error = refusal(&MapRequest {
        size_bytes_min: 2 * MIB,
        ..created(&path, MIB)
    });
    assert!(matches!(error, MapError::TooSmall { .. }), "{error}");
    assert!(!path.exists());
}

#[test]
fn what_is_neither_a_file_nor_device_dax_is_refused() {
    let dir = dir();
    let fifo = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo")
        .arg(&fifo)
        .status()
        .unwrap();
    assert!(made.success());
    for (path, found) in [
        (dir.path(), "a directory"),
        (&fifo, "a FIFO"),
        (Path::new("/dev/null"), "a character device without a size"),
    ] {
        let error = refusal(&existing(path));
        assert!(error.to_string().contains(found), "{error}");
        assert_eq!(error.errno(), libc::EINVAL);
    }
}

#[test]
fn a_device_in_use_is_refused_and_its_owner_is_named() {
    let dir = dir();
    let path = dir.path().join("cache");
    let first = MappedPmem::open(&created(&path, MIB)).unwrap();
    let error = refusal(&existing(&path));
    assert_eq!(error.errno(), libc::EBUSY);
    let MapError::InUse { pids, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(pids[..], [std::process::id()]);
    drop(first);
    MappedPmem::open(&existing(&path)).expect("the lock goes with its owner");
}

fn part(path: &Path, offset_mib: u64, size_mib: u64) -> MapRequest {
    MapRequest {
        extent: Extent::Part(Part {
            offset_bytes: offset_mib * MIB,
            size_bytes: size_mib * MIB,
        }),
        ..existing(path)
    }
}

#[test]
fn parts_of_one_file_are_mapped_and_locked_each_by_itself() {
    let dir = dir();
    let path = dir.path().join("cache");
    drop(MappedPmem::open(&created(&path, 16 * MIB)).unwrap());
    let first = MappedPmem::open(&part(&path, 0, 4)).unwrap();
    let second = MappedPmem::open(&part(&path, 4, 6)).unwrap();
    assert_eq!((first.len_bytes(), second.len_bytes()), (4 * MIB, 6 * MIB));
    assert!(second.map.base().addr().is_multiple_of(MAP_ALIGN_BYTES));
    first.store(A, PmemOff(4 * MIB - 64), &[1; 64]);
    second.store(A, PmemOff(0), &[2; 64]);
    let _ = (first.fence(A), second.fence(A));
    let bytes = fs::read(&path).unwrap();
    let border = 4 * MIB as usize;
    assert_eq!(bytes[border - 64..border], [1; 64]);
    assert_eq!(bytes[border..border + 64], [2; 64]);
    assert_eq!(bytes[border + 64..].iter().max(), Some(&0));

    for (request, wanted, taken) in [
        (part(&path, 2, 4), "MiB 2 to 6", "MiB 0 to 4"),
        (part(&path, 8, 8), "MiB 8 to 16", "MiB 4 to 10"),
        (existing(&path), "all of it", "MiB 0 to 4"),
    ] {
        let text = refusal(&request).to_string();
        assert!(
            text.contains(&format!("{wanted} is wanted, {taken} is taken")),
            "{text}"
        );
    }
    drop(first);
    drop(MappedPmem::open(&part(&path, 0, 4)).expect("its lock goes with the part"));
    let whole = refusal(&existing(&path));
    assert_eq!(whole.errno(), libc::EBUSY);
    drop(second);
    let _whole = MappedPmem::open(&existing(&path)).unwrap();
    let text = refusal(&part(&path, 4, 6)).to_string();
    assert!(text.contains("all of it is taken"), "{text}");
}

#[test]
fn a_part_must_be_aligned_and_within_its_device() {
    let dir = dir();
    let path = dir.path().join("cache");
    let error = refusal(&part(&path, 0, 4));
    assert!(matches!(error, MapError::NotFound { .. }), "{error}");
    drop(MappedPmem::open(&created(&path, 16 * MIB)).unwrap());
    for (request, said) in [
        (part(&path, 1, 4), "1048576"),
        (part(&path, 2, 5), "5242880"),
        (part(&path, 12, 6), "16777216"),
        (part(&path, 16, 4), "16777216"),
    ] {
        let error = refusal(&request);
        assert!(error.to_string().contains(said), "{error}");
        assert_eq!(error.errno(), libc::EINVAL);
    }
    assert_eq!(fs::metadata(&path).unwrap().len(), 16 * MIB);
}

#[test]
fn only_the_holes_in_the_part_are_filled() {
    let dir = dir();
    let path = dir.path().join("cache");
    fs::File::create(&path).unwrap().set_len(16 * MIB).unwrap();
    let _pmem = MappedPmem::open(&part(&path, 4, 4)).unwrap();
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((meta.len(), meta.blocks() * 512), (16 * MIB, 4 * MIB));
}

#[test]
fn population_covers_the_mapping_and_keeps_its_content() {
    let dir = dir();
    let path = dir.path().join("cache");
    let mut pmem = MappedPmem::open(&created(&path, 65 * MIB)).unwrap();
    pmem.store(A, PmemOff(64 * MIB), &[1; 64]);
    let _ = pmem.fence(A);
    let mut last = None;
    while let Some(progress) = pmem.populate_next() {
        assert_eq!(progress.total_bytes, 65 * MIB);
        last = Some(progress.done_bytes);
    }
    assert_eq!(last, Some(65 * MIB));
    let mut got = [0; 64];
    pmem.read(PmemOff(64 * MIB), &mut got).unwrap();
    assert_eq!(got, [1; 64]);
}

#[test]
#[should_panic(expected = "bytes 0xfffc0+0x80 lie outside")]
fn a_store_past_the_end_panics() {
    let dir = dir();
    let pmem = MappedPmem::open(&created(&dir.path().join("cache"), MIB)).unwrap();
    pmem.store(A, PmemOff(MIB - 64), &[0; 128]);
}

#[test]
fn a_slice_of_a_mapping_is_not_read_after_it_is_closed() {
    let dir = dir();
    let pmem = MappedPmem::open(&created(&dir.path().join("cache"), MIB)).unwrap();
    pmem.store(A, PmemOff(64), &[3; 64]);
    let slice = pmem.slice(PmemOff(64), 64);
    let mut got = [0; 64];
    slice.copy_to(&mut got).unwrap();
    assert_eq!(got, [3; 64]);
    drop(pmem);
    let read = std::panic::AssertUnwindSafe(|| slice.copy_to(&mut [0; 64]));
    // Another test may have mapped something there meanwhile, which is safe to read too.
    if let Err(panic) = std::panic::catch_unwind(read) {
        let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
        assert!(text.contains("has been closed"), "{text}");
    }
}

/// Skipped where there are no huge pages.
#[test]
fn hugetlbfs_is_mapped_in_whole_huge_pages() {
    let Ok(dir) = tempfile::tempdir_in("/dev/hugepages") else {
        return;
    };
    let path = dir.path().join("cache");
    match MappedPmem::open(&created(&path, 5 * MIB)) {
        Ok(pmem) => {
            assert_eq!(
                (pmem.len_bytes(), pmem.backing()),
                (4 * MIB, Backing::Hugetlbfs)
            );
            pmem.store(A, PmemOff(4 * MIB - 64), &[5; 64]);
            let _ = pmem.fence(A);
        }
        Err(MapError::NoSpace { .. }) => assert!(!path.exists()),
        Err(error) => panic!("{error}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn stored_scatter_lists_are_read_back_through_others(
        lines in 1u64..200,
        at in 0u64..50,
        cuts in vec(0usize..12_800, 0..9),
        back in vec(0usize..12_800, 0..9),
        ahead in (0u64..MIB / 2, 0u64..20_000),
        seed: u32,
    ) {
        let dir = dir();
        let pmem = MappedPmem::open(&created(&dir.path().join("cache"), MIB)).unwrap();
        let len = lines * 64;
        let bytes: Vec<u8> = (0..len).map(|i| (i * 17 + i / 255) as u8).collect();
        let source = IovBuf::new(&bytes, &cuts);
        let off = PmemOff(at * 64);
        pmem.store_from(A, off, &mut source.cursor(), len);
        let target = IovBuf::new(&vec![0; bytes.len()], &back);
        pmem.read_to(off, &mut target.cursor(), len).unwrap();
        prop_assert_eq!(target.bytes(), &bytes[..]);
        let target = IovBuf::new(&vec![0; bytes.len()], &back);
        let coming = Coming { off: PmemOff(ahead.0), len_bytes: ahead.1 };
        pmem.read_to_and_ask(off, &mut target.cursor(), len, coming).unwrap();
        prop_assert_eq!(target.bytes(), &bytes[..]);
        let off = PmemOff(off.0 + len);
        let crc = pmem.store_from_crc(A, off, &mut source.cursor(), len, seed);
        prop_assert_eq!(crc, crc32c::crc32c_append(seed, &bytes));
        let mut got = vec![0; bytes.len()];
        pmem.read(off, &mut got).unwrap();
        prop_assert_eq!(got, bytes);
    }
}

#[test]
fn flushes_are_left_out_only_where_the_platform_saves_the_caches() {
    use PersistenceDomain::{CpuCache, MemoryController, Undeclared};
    let flushes = |durability, domain| {
        let name = kernel_for(durability, domain).name();
        !name.contains("no flush")
    };
    for domain in [CpuCache, MemoryController, Undeclared] {
        assert!(flushes(Durability::Process, domain), "{domain:?}");
    }
    assert!(flushes(Durability::Power, MemoryController));
    assert_eq!(
        flushes(Durability::Power, CpuCache),
        cfg!(not(target_arch = "x86_64"))
    );
}
