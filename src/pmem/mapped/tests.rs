use std::fs;
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

/// A mapping of 1 MiB of `0x5a` that has lost its second half.
fn with_half_lost(dir: &tempfile::TempDir) -> MappedPmem {
    let path = dir.path().join("cache");
    let pmem = MappedPmem::open(&created(&path, MIB)).unwrap();
    pmem.store(A, PmemOff(0), &vec![0x5a; MIB as usize]);
    let _ = pmem.fence(A);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(MIB / 2).unwrap();
    pmem
}

#[test]
fn a_probe_finds_each_page_that_is_gone() {
    let dir = dir();
    let pmem = with_half_lost(&dir);
    let lost = Poisoned {
        at: PmemOff(MIB / 2),
    };
    // What is lost lies in the first page, in one that is reached with a single byte, or in none.
    for (off, len_bytes, found) in [
        (0, MIB / 2, Ok(())),
        (MIB / 2 - 4096, 4096, Ok(())),
        (MIB / 2 - 1, 1, Ok(())),
        (MIB / 2 - 1, 2, Err(lost)),
        (MIB / 2 - 4095, 4096, Err(lost)),
        (MIB / 2 - 9000, 9001, Err(lost)),
        (MIB / 2, 1, Err(lost)),
    ] {
        assert_eq!(
            pmem.probe(PmemOff(off), len_bytes),
            found,
            "{off} {len_bytes}"
        );
    }
}

#[test]
fn memory_that_is_gone_is_an_error_of_the_read_and_says_where() {
    let dir = dir();
    for kernel in Kernel::available() {
        let pmem = with_half_lost(&dir).with_store_kernel(&kernel.name());
        let lost = Poisoned {
            at: PmemOff(MIB / 2),
        };
        for (off, len) in [
            (MIB / 2 - 1, 2),
            (MIB / 2 - 4096, 9000),
            (MIB / 2, 64),
            (MIB / 2 - 700, 701),
        ] {
            let target = IovBuf::new(&vec![0; len], &[1, 100, 350]);
            let read = pmem.read_to(PmemOff(off), &mut target.cursor(), len as u64);
            assert_eq!(
                read,
                Err(lost),
                "{} bytes at {off} with {}",
                len,
                kernel.name()
            );
            assert_eq!(pmem.read(PmemOff(off), &mut vec![0; len]), Err(lost));
            let slice = pmem.slice(PmemOff(off), len as u64);
            slice
                .copy_to(&mut vec![0; len])
                .expect_err("part of it is gone");
        }
        // What is left is read as ever, by the same thread.
        let mut got = vec![0; 4097];
        pmem.read(PmemOff(MIB / 2 - 4097), &mut got).unwrap();
        assert!(got.iter().all(|byte| *byte == 0x5a));
        let (off, len_bytes) = (PmemOff(MIB / 2 + 5000), 1);
        let error = pmem.read(off, &mut [0; 1]).expect_err("it is gone");
        assert_eq!(error.at.0, (off.0 / 64) * 64, "{len_bytes} byte");
        fs::remove_file(dir.path().join("cache")).unwrap();
    }
}

#[test]
fn what_is_asked_for_ahead_and_is_gone_is_no_error_of_the_read() {
    let dir = dir();
    let lost = Poisoned {
        at: PmemOff(MIB / 2),
    };
    for kernel in Kernel::available() {
        let pmem = with_half_lost(&dir).with_store_kernel(&kernel.name());
        // Less is asked for than is copied, or more; some or all of it is gone.
        for coming in [
            (MIB / 2 - 100, 1000),
            (MIB / 2, 64),
            (MIB / 2 - 64, MIB / 4),
        ] {
            let coming = Coming {
                off: PmemOff(coming.0),
                len_bytes: coming.1,
            };
            let len = 8192;
            let target = IovBuf::new(&vec![0; len], &[1, 100, 4350]);
            let read =
                |off| pmem.read_to_and_ask(PmemOff(off), &mut target.cursor(), len as u64, coming);
            assert_eq!(read(MIB / 2 - 8192), Ok(()), "{coming:?} {}", kernel.name());
            assert!(target.bytes().iter().all(|byte| *byte == 0x5a));
            // The copy itself meets what is gone, beside what is asked for or behind it.
            assert_eq!(read(MIB / 2 - 8000), Err(lost), "{coming:?}");
        }
        fs::remove_file(dir.path().join("cache")).unwrap();
    }
}

#[test]
fn a_store_that_the_memory_does_not_take_is_never_called_durable() {
    // INV-PMEM-4.
    let dir = dir();
    let stores: [fn(&MappedPmem, PmemOff); 3] = [
        |pmem, off| pmem.store(A, off, &[1; 128]),
        |pmem, off| {
            let source = IovBuf::new(&[2; 8192], &[5000]);
            pmem.store_from(A, off, &mut source.cursor(), 8192);
        },
        |pmem, off| {
            let source = IovBuf::new(&[3; 8192], &[]);
            pmem.store_from_crc(A, off, &mut source.cursor(), 8192, 0);
        },
    ];
    for kernel in Kernel::available() {
        for store in stores {
            let pmem = with_half_lost(&dir).with_store_kernel(&kernel.name());
            store(&pmem, PmemOff(MIB / 4));
            let _ = pmem.fence(A);
            store(&pmem, PmemOff(MIB / 2 - 64));
            let fence = std::panic::AssertUnwindSafe(|| drop(pmem.fence(A)));
            let panic = std::panic::catch_unwind(fence).expect_err("a store was lost");
            let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            assert!(
                text.contains("INV-PMEM-4") && text.contains("0x80"),
                "{text}"
            );
            fs::remove_file(dir.path().join("cache")).unwrap();
        }
    }
}

/// Each fault is dealt with by the thread that has met it, whatever the others meet meanwhile.
#[test]
fn threads_that_meet_lost_memory_at_once_each_learn_where() {
    const THREADS: u64 = 8;
    let dir = dir();
    let pmem = with_half_lost(&dir);
    let barrier = std::sync::Barrier::new(THREADS as usize);
    let work = |thread: u64| {
        let (mut page, target) = (vec![0; 4096], IovBuf::new(&[0; 4096], &[1000]));
        barrier.wait();
        for round in 0..500 {
            // Lines of a page of its own, and those of others.
            let line = (thread * 64 + round * 7) % (THREADS * 64);
            let at = PmemOff(MIB / 2 + line * 64);
            let lost = Err(Poisoned { at });
            assert_eq!(pmem.read(at, &mut [0; 64]), lost, "{thread}");
            let read = pmem.read_to(at, &mut target.cursor(), 4096);
            assert_eq!(read, lost, "{thread}");
            assert_eq!(pmem.probe(at, 64), lost, "{thread}");
            // In between what is left is read well.
            let well = PmemOff((thread * 500 + round) % 100 * 4096);
            page.fill(0);
            pmem.read(well, &mut page).unwrap();
            assert!(page.iter().all(|byte| *byte == 0x5a), "{thread}");
        }
    };
    std::thread::scope(|scope| {
        let work = &work;
        (0..THREADS).for_each(|thread| drop(scope.spawn(move || work(thread))));
    });
}

/// A store that one thread loses is no other thread's: its own fence knows.
#[test]
fn a_store_that_is_lost_beside_reads_that_fail_is_never_called_durable() {
    // INV-PMEM-4.
    let dir = dir();
    let pmem = with_half_lost(&dir);
    let barrier = std::sync::Barrier::new(5);
    std::thread::scope(|scope| {
        let (pmem, barrier) = (&pmem, &barrier);
        for thread in 0..4 {
            scope.spawn(move || {
                barrier.wait();
                for round in 0..500 {
                    let at = PmemOff(MIB / 2 + (thread * 500 + round) % 1000 * 64);
                    assert_eq!(pmem.read(at, &mut [0; 8]), Err(Poisoned { at }));
                }
            });
        }
        let stores = scope.spawn(move || {
            barrier.wait();
            for _ in 0..100 {
                pmem.store(A, PmemOff(MIB / 2 - 64), &[1; 64]);
                let _ = pmem.fence(A);
            }
            pmem.store(A, PmemOff(MIB / 2 - 64), &[2; 128]);
            let fence = std::panic::AssertUnwindSafe(|| drop(pmem.fence(A)));
            std::panic::catch_unwind(fence).expect_err("a store was lost");
        });
        stores.join().unwrap();
    });
    let mut got = [0; 64];
    pmem.read(PmemOff(MIB / 2 - 64), &mut got).unwrap();
    assert_eq!(got, [2; 64], "what comes before the loss is there");
}

const CHILD: &str = "PCACHE_TEST_SIGBUS_CHILD";

/// What the children of the test below do.
fn touch_what_is_lost(what: &str) {
    extern "C" fn leave(_signal: i32) {
        // SAFETY: ends the process, as a handler may.
        unsafe { libc::_exit(42) };
    }
    // SAFETY: `leave` is a handler of this kind.
    unsafe { libc::signal(libc::SIGBUS, leave as *const () as usize) };
    let dir = dir();
    let pmem = with_half_lost(&dir);
    let ours = pmem.slice(PmemOff(MIB / 2), 1).as_ptr();
    // Not a mapping of ours: it has no backing from the start.
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    let (len, flags) = (4096, libc::MAP_SHARED);
    // SAFETY: a new mapping, wherever the kernel finds room, touches no memory in use.
    let foreign = unsafe { libc::mmap(ptr::null_mut(), len, PROT, flags, file.as_raw_fd(), 0) };
    assert_ne!(foreign, libc::MAP_FAILED);
    let at = if what == "ours" { ours } else { foreign.cast() };
    // SAFETY: mapped, and no reference to it exists. That this load ends in a signal is what is tested.
    let byte = unsafe { at.read_volatile() };
    unreachable!("read {byte} from memory that does not exist");
}

/// Another process, since a signal that is not caught ends it.
#[test]
fn a_fault_that_is_not_ours_goes_to_the_handler_before_or_ends_the_process() {
    use std::os::unix::process::ExitStatusExt;
    if let Ok(what) = std::env::var(CHILD) {
        return touch_what_is_lost(&what);
    }
    let run = |what: &str| {
        let name = "a_fault_that_is_not_ours_goes_to_the_handler_before_or_ends_the_process";
        std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                &format!("pmem::mapped::tests::{name}"),
                "--nocapture",
            ])
            .env(CHILD, what)
            .output()
            .unwrap()
    };
    let foreign = run("foreign");
    assert_eq!(foreign.status.code(), Some(42), "{foreign:?}");
    // A load that nobody guards: the handler before could only return, and the load be repeated for ever.
    let ours = run("ours");
    assert_eq!(ours.status.signal(), Some(libc::SIGBUS), "{ours:?}");
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
