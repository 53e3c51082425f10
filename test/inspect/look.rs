//! info, dump, and what the command line refuses.

use crate::rig::{Files, Host, RELAXED_4096, STRICT_512, info, run, worked};
use pcache::pmem::{Extent, MapError, MapRequest, MappedPmem, ReadOnlyPmem, Sharing};
use serde_json::Value;
use std::path::PathBuf;

#[test]
fn info_tells_what_the_engine_knows() {
    for kind in [STRICT_512, RELAXED_4096] {
        let files = Files::new();
        let mut host = Host::format(&files, kind);
        host.work(3);
        host.drain();
        host.work(4);
        let known = host.cache.info();
        host.kill(&files);
        let told = info(&files);
        assert_eq!(told["uuid"], known.uuid);
        assert_eq!(told["base"]["name"], "Disk0");
        assert_eq!(told["base"]["block_size"], known.block_size);
        assert_eq!(told["base"]["block_count"], known.block_count);
        assert_eq!(told["geometry"]["segment_count"], known.segment_count);
        assert_eq!(told["segments"]["free"], known.segments_free);
        assert_eq!(told["options"]["data_crc"], known.data_crc);
        assert_eq!(told["tails"]["dirty_tail"], known.dirty_tail);
        assert_eq!(told["log"]["dirty_bytes"], known.dirty_bytes);
        assert_eq!(told["log"]["seq_max"], known.seq_next - 1);
        assert!(known.dirty_bytes > 0 && told["log"]["dirty_zero_blocks"].as_u64() > Some(0));
        let text = run("info", &files.cache, &[]).out;
        for part in [
            &*known.uuid,
            "Disk0",
            &format!("{} bytes and", known.dirty_bytes),
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}

#[test]
fn released_images_are_understood() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("test/compat");
    for (file, dirty_tail, dirty_bytes) in [
        ("v1-512.img", 26, 16384),
        ("v1-512-unfenced.img", 26, 16384),
        ("v1-4096.img", 12, 12288),
    ] {
        let ran = run("info", &root.join(file), &["--json"]);
        let told: Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(ran.status, 0, "{ran:?}");
        assert_eq!(told["base"]["name"], "Base0");
        assert_eq!(told["geometry"]["segment_count"], 10);
        assert_eq!(told["tails"]["dirty_tail"], dirty_tail);
        assert_eq!(told["log"]["dirty_bytes"], dirty_bytes);
        let ran = run("verify", &root.join(file), &[]);
        assert_eq!((ran.status, &*ran.out), (0, "no findings\n"));
    }
}

#[test]
fn dump_says_which_ksets_were_stored_before_the_fence_of_their_payloads() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("test/compat");
    for (file, has_such) in [("v1-512-unfenced.img", true), ("v1-512.img", false)] {
        let ran = run("dump", &root.join(file), &["--json"]);
        let lines = ran.lines();
        let ksets = lines.iter().filter(|line| line["type"] == "kset");
        assert_eq!(
            ksets.clone().any(|kset| kset["payloads_unfenced"] == true),
            has_such
        );
        let text = run("dump", &root.join(file), &[]).out;
        assert_eq!(text.contains(" unfenced\n"), has_such);
    }
}

/// The newest content of every block that the log says, as far as it says any.
fn content_by_dump(cache: &[u8], lines: &[Value], block: usize) -> Vec<Option<Vec<u8>>> {
    let mut found: Vec<(u64, Option<Vec<u8>>)> = Vec::new();
    let (mut segment_off, mut seq) = (0, 0);
    for line in lines {
        match line["type"].as_str().unwrap() {
            "segment" => segment_off = line["off"].as_u64().unwrap() as usize,
            "kset" => seq = line["seq"].as_u64().unwrap(),
            _ => {
                let lba = line["lba"].as_u64().unwrap() as usize;
                let len = line["len_blocks"].as_u64().unwrap() as usize;
                found.resize(found.len().max(lba + len), (0, None));
                for number in 0..len {
                    if found[lba + number].0 > seq {
                        continue;
                    }
                    let bytes = match line["payload_off"].as_u64() {
                        Some(off) => {
                            let at = segment_off + off as usize + number * block;
                            cache[at..at + block].to_vec()
                        }
                        None => vec![0; block],
                    };
                    found[lba + number] = (seq, Some(bytes));
                }
            }
        }
    }
    found.into_iter().map(|(_, bytes)| bytes).collect()
}

#[test]
fn dump_names_every_key_with_its_payload() {
    for kind in [STRICT_512, RELAXED_4096] {
        let files = Files::new();
        let mut host = Host::format(&files, kind);
        host.work(5);
        let disk = host.kill(&files);
        let ran = run("dump", &files.cache, &["--json"]);
        assert_eq!((ran.status, &*ran.err), (0, ""));
        let lines = ran.lines();
        let keys = lines.iter().filter(|line| line["type"] == "key").count();
        assert_eq!(info(&files)["log"]["keys"], keys);
        let (cache, base) = files.content();
        let block = kind.block as usize;
        let content = content_by_dump(&cache, &lines, block);
        assert!(content.iter().flatten().count() > 50);
        for lba in 0..kind.block_count() as usize {
            let range = lba * block..(lba + 1) * block;
            let cached = content.get(lba).cloned().flatten();
            let found = cached.unwrap_or_else(|| base[range.clone()].to_vec());
            assert!(found == disk[range], "block {lba}");
        }
        let text = run("dump", &files.cache, &[]).out;
        assert_eq!(text.lines().count(), lines.len());
        assert!(text.contains("  kset 0 at 0x2000 seq "), "{text}");
    }
}

#[test]
fn dump_can_be_narrowed() {
    let files = Files::new();
    worked(&files, STRICT_512);
    let all = run("dump", &files.cache, &["--json"]).lines();
    let touches = |line: &Value| {
        let lba = line["lba"].as_u64().unwrap();
        lba < 1000 && lba + line["len_blocks"].as_u64().unwrap() > 900
    };
    let wanted: Vec<&Value> = all
        .iter()
        .filter(|l| l["type"] == "key" && touches(l))
        .collect();
    let some = run("dump", &files.cache, &["--json", "--lba", "900..1000"]).lines();
    let keys: Vec<&Value> = some.iter().filter(|line| line["type"] == "key").collect();
    assert!(keys == wanted && wanted.len() > 3 && some.len() < all.len());

    let one = run("dump", &files.cache, &["--json", "--segment", "1"]).lines();
    let others = one
        .iter()
        .filter(|l| l["type"] != "key" && l["segment"] != 1);
    assert_eq!((others.count(), &one[0]["type"]), (0, &"segment".into()));

    let ran = run("dump", &files.cache, &["--segment", "5000"]);
    let count = info(&files)["geometry"]["segment_count"].to_string();
    assert_eq!(ran.status, 3);
    assert!(
        ran.err.contains("5000") && ran.err.contains(&count),
        "{}",
        ran.err
    );
}

#[test]
fn what_only_looks_changes_no_byte() {
    let files = Files::new();
    worked(&files, STRICT_512);
    // Something to repair, which must stay as it is.
    files.flip(0);
    let before = files.content();
    let base = files.base.to_str().unwrap();
    for (command, options) in [
        ("info", &["--json"][..]),
        ("info", &[]),
        ("dump", &[]),
        ("dump", &["--lba", "3..4"]),
        ("verify", &[]),
        ("verify", &["--json", "--base", base]),
    ] {
        let ran = run(command, &files.cache, options);
        assert_eq!(ran.status, 1, "{command}: {ran:?}");
        assert!(
            files.content() == before,
            "{command} {options:?} has written"
        );
    }
}

#[test]
fn a_hole_in_a_file_stays_one() {
    use std::os::unix::fs::MetadataExt;
    let files = Files::new();
    std::fs::File::create(&files.cache)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    let ran = run("verify", &files.cache, &[]);
    assert_eq!(ran.status, 2);
    assert!(ran.out.contains("it is blank"), "{}", ran.out);
    assert_eq!(std::fs::metadata(&files.cache).unwrap().blocks(), 0);
}

#[test]
fn a_cache_in_use_is_refused() {
    let files = Files::new();
    let mut host = Host::format(&files, STRICT_512);
    host.work(6);
    std::fs::write(&files.base, &host.base).unwrap();
    let before = files.content();
    let base = files.base.to_str().unwrap();
    let pid = format!("process {}", std::process::id());
    for (command, options) in [
        ("info", &[][..]),
        ("dump", &[]),
        ("verify", &[]),
        ("drain", &["--base", base]),
    ] {
        let ran = run(command, &files.cache, options);
        assert_eq!((ran.status, &*ran.out), (3, ""), "{command}");
        assert!(
            ran.err.contains("in use") && ran.err.contains(&pid),
            "{}",
            ran.err
        );
    }
    for command in ["info", "dump"] {
        let ran = run(command, &files.cache, &["--even-if-in-use"]);
        assert!(ran.status == 0 && !ran.out.is_empty(), "{ran:?}");
    }
    assert!(files.content() == before);
}

#[test]
fn no_cache_is_opened_while_somebody_looks_at_it() {
    let files = Files::new();
    worked(&files, STRICT_512);
    let request = MapRequest {
        path: files.cache.clone(),
        extent: Extent::Whole,
        size_bytes_min: 1,
    };
    let looking = ReadOnlyPmem::open(&files.cache, None, Sharing::Readers).unwrap();
    // Two may look.
    assert_eq!(run("verify", &files.cache, &[]).status, 0);
    let refused = MappedPmem::open(&request);
    assert!(
        matches!(refused, Err(MapError::InUse { .. })),
        "{refused:?}"
    );
    drop(looking);
    let looking = ReadOnlyPmem::open(&files.cache, None, Sharing::Anybody).unwrap();
    drop(MappedPmem::open(&request).unwrap());
    drop(looking);
}

#[test]
fn wrong_usage_is_told() {
    let files = Files::new();
    worked(&files, STRICT_512);
    let path = files.cache.to_str().unwrap();
    for (args, told) in [
        (&["frobnicate", path][..], "frobnicate"),
        (&["info"], "1 words"),
        (&["drain", path], "--base"),
        (&["verify", path, "--even-if-in-use"], "--even-if-in-use"),
        (&["info", path, "--segment", "1"], "--segment"),
        (&["dump", path, "--lba", "9..9"], "9..9"),
        (&["dump", path, "--segment", "x"], "x"),
        (&["info", path, "--loud"], "--loud"),
        (&["info", "/nowhere/cache"], "/nowhere/cache"),
        (&["info", "/dev/shm"], "a directory"),
        (
            &["verify", path, "--base", "/nowhere/base"],
            "/nowhere/base",
        ),
        (&["drain", path, "--base", "/dev/null"], "character device"),
    ] {
        let output = crate::rig::tool().args(args).output().unwrap();
        let ran = crate::rig::Ran::from(output);
        assert_eq!(ran.status, 3, "{args:?}: {ran:?}");
        assert!(ran.err.contains(told), "{args:?}: {}", ran.err);
    }
    let help = crate::rig::tool().arg("--help").output().unwrap();
    assert!(help.status.success() && !help.stdout.is_empty());
}
