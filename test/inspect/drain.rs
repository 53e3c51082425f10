//! drain: the base ends up with exactly what the application wrote, whatever happens on the way.

use crate::rig::{Files, Host, Kind, RELAXED_4096, STRICT_512, info, run, tool, worked};
use pcache::engine::{DataCrc, Fua, Op, WritebackOrder};
use serde_json::Value;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

fn drain(files: &Files) -> crate::rig::Ran {
    let base = files.base.to_str().unwrap();
    run("drain", &files.cache, &["--base", base])
}

fn dirty_ksets(files: &Files) -> u64 {
    info(files)["log"]["dirty_ksets"].as_u64().unwrap()
}

#[track_caller]
fn assert_drained(files: &Files, disk: &[u8]) {
    assert!(
        files.content().1 == disk,
        "the base is not what was written"
    );
    assert_eq!(dirty_ksets(files), 0);
    let base = files.base.to_str().unwrap();
    let ran = run("verify", &files.cache, &["--base", base]);
    assert_eq!((ran.status, &*ran.out), (0, "no findings\n"));
}

#[test]
fn the_base_holds_what_the_application_wrote() {
    let other = |kind: Kind| Kind {
        data_crc: match kind.data_crc {
            DataCrc::On => DataCrc::Off,
            DataCrc::Off => DataCrc::On,
        },
        order: match kind.order {
            WritebackOrder::Strict => WritebackOrder::Relaxed,
            WritebackOrder::Relaxed => WritebackOrder::Strict,
        },
        ..kind
    };
    for kind in [
        STRICT_512,
        RELAXED_4096,
        other(STRICT_512),
        other(RELAXED_4096),
    ] {
        let files = Files::new();
        let disk = worked(&files, kind);
        assert!(files.content().1 != disk);
        let ran = drain(&files);
        assert_eq!((ran.status, &*ran.err), (0, ""));
        assert!(ran.out.starts_with("drained: "), "{}", ran.out);
        assert_drained(&files, &disk);
        // Once more: there is nothing left to do.
        let ran = drain(&files);
        assert!(
            ran.status == 0 && ran.out.contains(" 0 dirty bytes"),
            "{ran:?}"
        );
        assert_drained(&files, &disk);
    }
}

#[test]
fn a_drained_cache_serves_its_host_again() {
    let files = Files::new();
    let disk = worked(&files, STRICT_512);
    assert_eq!(drain(&files).status, 0);
    let before = info(&files);
    let (_, base) = files.content();
    let options = STRICT_512.options(pcache::engine::FormatPolicy::Never);
    let cache = crate::rig::open(files.map(), &base, options).unwrap();
    assert_eq!(cache.info().dirty_bytes, 0);
    drop(cache);
    assert!(files.content().1 == disk);
    // The identity that the host gave is still there.
    assert_eq!(info(&files)["base"], before["base"]);
}

#[test]
fn unmapped_blocks_become_a_hole() {
    let files = Files::new();
    let mut host = Host::format(&files, STRICT_512);
    host.zero(0, Op::Unmap, 0, 2048);
    host.zero(1, Op::WriteZeroes, 2048, 1024);
    let disk = host.kill(&files);
    let before = std::fs::metadata(&files.base).unwrap();
    assert_eq!(drain(&files).status, 0);
    let after = std::fs::metadata(&files.base).unwrap();
    assert_eq!(before.len(), after.len());
    assert!(
        after.blocks() < before.blocks() / 2,
        "{} blocks",
        after.blocks()
    );
    assert_drained(&files, &disk);
}

/// A cache in which every block was written once, each write behind a barrier.
fn many_epochs(files: &Files) -> Vec<u8> {
    let kind = Kind {
        data_crc: DataCrc::Off,
        ..STRICT_512
    };
    let mut host = Host::format_sized(files, kind, 32 << 20);
    for lba in 0..kind.block_count() {
        host.write((lba % 2) as usize, lba, 1, Fua::Yes);
    }
    host.kill(files)
}

#[test]
fn a_drain_that_is_killed_again_and_again_goes_on_where_it_was() {
    // The faster the machine, the closer must its kills lie.
    let mut steps_us = [5000, 1000, 200, 50].into_iter();
    let kills_midway = steps_us.any(|step_us| kill_drains(Duration::from_micros(step_us)) > 0);
    assert!(kills_midway, "it was never killed in the middle");
}

/// Kills drains of a cache, each so much later than the one before, until one comes to its end. Returns how many had begun.
fn kill_drains(step: Duration) -> u32 {
    let files = Files::new();
    let disk = many_epochs(&files);
    let before = files.content().1;
    let (all, mut left, mut kills_midway) = (dirty_ksets(&files), dirty_ksets(&files), 0);
    for round in 0..200 {
        let mut child = tool()
            .arg("drain")
            .arg(&files.cache)
            .arg("--base")
            .arg(&files.base)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // Later each time, so that it comes to an end on a slow machine too.
        std::thread::sleep(Duration::from_millis(10) + step * round);
        child.kill().unwrap();
        let ended = child.wait().unwrap().code();
        // Each block was behind a barrier of its own: the base has taken a part from the beginning.
        let (_, base) = files.content();
        let blocks = (0..base.len()).step_by(512).map(|at| at..at + 512);
        let taken = blocks
            .clone()
            .take_while(|at| base[at.clone()] == disk[at.clone()])
            .count();
        let rest = taken * 512..;
        assert!(
            base[rest.clone()] == before[rest],
            "round {round}: not in order"
        );
        let now_left = dirty_ksets(&files);
        assert!(
            now_left <= left,
            "round {round}: the dirty tail has gone back"
        );
        kills_midway += u32::from(0 < now_left && now_left < all);
        left = now_left;
        if ended.is_some() {
            assert_eq!((ended, now_left), (Some(0), 0));
            break;
        }
    }
    assert_eq!(drain(&files).status, 0);
    assert_drained(&files, &disk);
    kills_midway
}

#[test]
fn a_wrong_base_is_refused_and_left_alone() {
    let files = Files::new();
    worked(&files, STRICT_512);
    let (cache, base) = files.content();
    let mut foreign = base.clone();
    foreign.iter_mut().for_each(|byte| *byte ^= 0x55);
    let longer = [&base[..], &[0; 512]].concat();
    for (wrong, told) in [
        (
            &foreign[..],
            &["does not hold what this cache wrote back"][..],
        ),
        (
            &base[..base.len() / 2],
            &["number of blocks", "4096", "2048"],
        ),
        (&longer, &["number of blocks", "4096", "4097"]),
    ] {
        std::fs::write(&files.base, wrong).unwrap();
        let ran = drain(&files);
        assert_eq!((ran.status, &*ran.out), (2, ""));
        for told in told {
            assert!(ran.err.contains(told), "{}", ran.err);
        }
        let (cache_after, base_after) = files.content();
        assert!(
            cache_after == cache && base_after == wrong,
            "something was written"
        );
    }
}

#[test]
fn a_base_in_use_is_refused() {
    let files = Files::new();
    worked(&files, STRICT_512);
    let before = files.content();
    let holder = std::fs::File::open(&files.base).unwrap();
    holder.lock().unwrap();
    let ran = drain(&files);
    assert_eq!(ran.status, 3);
    assert!(ran.err.contains("is in use"), "{}", ran.err);
    drop(holder);
    // The cache itself is none, either.
    let ran = run(
        "drain",
        &files.cache,
        &["--base", files.cache.to_str().unwrap()],
    );
    assert_eq!(ran.status, 3);
    assert!(ran.err.contains("is in use"), "{}", ran.err);
    assert!(files.content() == before);
    assert_eq!(drain(&files).status, 0);
}

#[test]
fn damaged_dirty_data_are_named_and_stay_where_they_are() {
    let files = Files::new();
    let mut host = Host::format(&files, STRICT_512);
    host.write(0, 100, 1, Fua::Yes);
    host.write(0, 200, 1, Fua::Yes);
    host.write(0, 300, 1, Fua::Yes);
    let disk = host.kill(&files);
    let lines = run("dump", &files.cache, &["--json"]).lines();
    let off = |line: &Value, field: &str| line[field].as_u64().unwrap();
    let segment = lines
        .iter()
        .find(|line| line["type"] == "segment" && line["segment"] == 0);
    let key = lines.iter().find(|line| line["lba"] == 200).unwrap();
    files.flip(off(segment.unwrap(), "off") + off(key, "payload_off"));
    let ran = drain(&files);
    assert_eq!(ran.status, 2);
    for told in ["blocks 200+1 is damaged", "pcache-inspect verify"] {
        assert!(ran.err.contains(told), "{}", ran.err);
    }
    // What comes before it is on the base, and nothing else.
    let (_, base) = files.content();
    let block = |lba: usize| lba * 512..(lba + 1) * 512;
    assert!(base[block(100)] == disk[block(100)]);
    assert!(base[block(200)] != disk[block(200)] && base[block(300)] != disk[block(300)]);
    assert_eq!(dirty_ksets(&files), 2);
}

/// A block device over a file.
struct Loop(std::path::PathBuf);

impl Loop {
    fn over(file: &std::path::Path) -> Self {
        let mut losetup = std::process::Command::new("losetup");
        let output = losetup
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        Self(String::from_utf8(output.stdout).unwrap().trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup")
            .arg("-d")
            .arg(&self.0)
            .status();
    }
}

#[test]
#[ignore = "needs root and a loop device"]
fn a_block_device_is_drained_to_like_a_file_and_refused_while_it_is_in_use() {
    use std::os::unix::fs::OpenOptionsExt;
    let files = Files::new();
    let disk = worked(&files, STRICT_512);
    let device = Loop::over(&files.base);
    let base = device.0.to_str().unwrap();
    let mut exclusive = std::fs::OpenOptions::new();
    let holder = exclusive
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(&device.0)
        .unwrap();
    let ran = run("drain", &files.cache, &["--base", base]);
    assert_eq!(ran.status, 3);
    assert!(ran.err.contains("is in use"), "{}", ran.err);
    drop(holder);
    let ran = run("verify", &files.cache, &["--base", base]);
    assert_eq!((ran.status, &*ran.out), (0, "no findings\n"));
    let ran = run("drain", &files.cache, &["--base", base]);
    assert_eq!((ran.status, &*ran.err), (0, ""));
    let ran = run("verify", &files.cache, &["--base", base]);
    assert_eq!((ran.status, &*ran.out), (0, "no findings\n"));
    drop(device);
    assert_drained(&files, &disk);
}
