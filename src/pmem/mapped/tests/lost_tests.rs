//! Memory that is gone: an error of whoever reads it, and never called durable.

use super::*;

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
                &format!("pmem::mapped::tests::lost_tests::{name}"),
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
