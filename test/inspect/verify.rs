//! verify: nothing is found where nothing is wrong, and everything where something is.

use crate::rig::{Files, Host, Kind, RELAXED_4096, Ran, STRICT_512, info, open, run, worked};
use pcache::engine::{FormatPolicy, Fua};
use pcache::inspect::{Findings, OutputFormat, ProgressLine, Severity, verify};
use pcache::media::{
    Checksums, HeaderState, Key, KsetBuilder, KsetContext, KsetReader, Spot, load_header,
};
use pcache::pmem::{Pmem, PmemRead};
use pcache::sim::image::ImagePmem;
use pcache::sim::pmem::SimPmem;
use pcache::units::{Agent, Generation, PmemOff, SegId, Seq};
use serde_json::Value;

fn verified(files: &Files) -> Ran {
    let base = files.base.to_str().unwrap();
    run("verify", &files.cache, &["--base", base])
}

#[test]
fn a_whole_cache_has_no_findings() {
    for kind in [STRICT_512, RELAXED_4096] {
        let files = Files::new();
        worked(&files, kind);
        let ran = verified(&files);
        assert_eq!((ran.status, &*ran.out, &*ran.err), (0, "no findings\n", ""));
        let ran = run("verify", &files.cache, &["--json"]);
        let none = r#"{"findings":{"clean":0,"dirty":0,"refused":0,"repairable":0}}"#;
        assert_eq!((ran.status, ran.out.trim()), (0, none));
    }
}

/// Where things lie, by `dump`.
struct Places {
    lines: Vec<Value>,
}

fn number(line: &Value, field: &str) -> u64 {
    line[field].as_u64().unwrap()
}

impl Places {
    fn of(files: &Files) -> Self {
        Self {
            lines: run("dump", &files.cache, &["--json"]).lines(),
        }
    }

    fn segment_off(&self, segment: u64) -> u64 {
        let of = |line: &&Value| line["type"] == "segment" && number(line, "segment") == segment;
        number(self.lines.iter().find(of).unwrap(), "off")
    }

    fn segments(&self, wanted: impl Fn(&Value) -> bool) -> Vec<u64> {
        let segments = self.lines.iter().filter(|line| line["type"] == "segment");
        segments
            .filter(|line| wanted(line))
            .map(|line| number(line, "segment"))
            .collect()
    }

    /// Offsets on the device.
    fn ksets(&self, wanted: impl Fn(&Value) -> bool) -> Vec<u64> {
        let ksets = self.lines.iter().filter(|line| line["type"] == "kset");
        ksets
            .filter(|line| wanted(line))
            .map(|line| self.segment_off(number(line, "segment")) + number(line, "off"))
            .collect()
    }

    /// Offset on the device and first block of a payload.
    fn payload(&self, state: &str) -> (u64, u64) {
        let (mut segment, mut found) = (0, false);
        for line in &self.lines {
            if line["type"] == "kset" {
                segment = number(line, "segment");
                found = line["state"] == state;
            } else if found && line["kind"] == "data" {
                let off = self.segment_off(segment) + number(line, "payload_off");
                return (off, number(line, "lba"));
            }
        }
        panic!("there is no {state} payload");
    }
}

/// Damages a cache as `damage` says, which returns what must be told; with which exit status.
#[track_caller]
fn check(kind: Kind, status: i32, damage: impl FnOnce(&Files, &Places) -> Vec<String>) {
    let files = Files::new();
    worked(&files, kind);
    let told = damage(&files, &Places::of(&files));
    let before = files.content();
    let ran = verified(&files);
    assert_eq!(ran.status, status, "{ran:?}");
    for told in &told {
        assert!(ran.out.contains(told), "{told:?} is not told: {}", ran.out);
    }
    assert_eq!(ran.out.lines().count(), told.len() + 1, "{}", ran.out);
    assert!(files.content() == before);
    let refused = ran.out.contains("refused: ");
    assert_eq!(files.engine_opens(kind), !refused, "{}", ran.out);
}

fn told<const N: usize>(texts: [&str; N]) -> Vec<String> {
    texts.map(str::to_owned).to_vec()
}

#[test]
fn one_damaged_copy_loses_nothing() {
    for (copy, which) in [(0, "first"), (1, "second")] {
        check(STRICT_512, 1, |files, _| {
            files.flip(copy * (32 << 10));
            vec![format!("repairable: the {which} copy of the superblock")]
        });
        check(STRICT_512, 1, |files, _| {
            files.flip((8 << 10) + copy * (32 << 10));
            vec![format!("repairable: the {which} copy of the tails")]
        });
        check(STRICT_512, 1, |files, places| {
            files.flip(places.segment_off(7) + copy * (4 << 10));
            vec![format!(
                "repairable: the {which} copy of the segment info of segment 7"
            )]
        });
    }
}

#[test]
fn an_update_that_was_cut_short_loses_nothing() {
    let files = Files::new();
    let mut host = Host::format(&files, STRICT_512);
    host.work(1);
    let (before, _) = (std::fs::read(&files.cache).unwrap(), ());
    host.drain();
    host.kill(&files);
    // The second copy of the tails is as it was before.
    for line in 0..3 {
        let at = (40 << 10) + line * 64;
        files.patch(at, |bytes| {
            bytes.copy_from_slice(&before[at as usize..][..64])
        });
    }
    let ran = verified(&files);
    assert_eq!(ran.status, 1);
    assert!(ran.out.contains("an update was cut short"), "{}", ran.out);
    assert!(files.engine_opens(STRICT_512));
}

#[test]
fn two_damaged_copies_are_refused() {
    check(STRICT_512, 2, |files, _| {
        files.flip(8 << 10);
        files.flip(40 << 10);
        told(["refused: the tails of the log are damaged"])
    });
    check(STRICT_512, 2, |files, places| {
        let segment = places.segments(|line| line["sealed"] == true)[1];
        let off = places.segment_off(segment);
        files.flip(off);
        files.flip(off + (4 << 10));
        vec![format!("refused: the info of segment {segment} is damaged")]
    });
    check(STRICT_512, 2, |files, _| {
        files.flip(0);
        files.flip(32 << 10);
        told(["refused: the superblock of the cache is damaged"])
    });
    check(STRICT_512, 2, |files, _| {
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(&files.cache)
            .unwrap();
        file.set_len(1 << 20).unwrap();
        told(["it was truncated"])
    });
}

#[test]
fn damaged_keys_are_found_and_weighed() {
    // All of a sealed segment is on the base: it is given up.
    check(STRICT_512, 1, |files, places| {
        let dirty_tail = number(&info(files)["tails"], "dirty_tail");
        let on_base = |line: &Value| {
            line["last_seq"]
                .as_u64()
                .is_some_and(|seq| seq <= dirty_tail)
        };
        let segment = places.segments(on_base)[0];
        files.flip(places.segment_off(segment) + (8 << 10));
        vec![format!(
            "clean: segment {segment} is damaged behind 0 ksets"
        )]
    });
    check(STRICT_512, 2, |files, places| {
        let dirty = places.ksets(|line| line["state"] == "dirty");
        files.flip(dirty[0]);
        told(["refused: segment "])
    });
}

#[test]
fn damaged_payloads_are_found_and_weighed() {
    check(STRICT_512, 2, |files, places| {
        let (off, lba) = places.payload("dirty");
        files.flip(off);
        vec![format!("dirty: the payload of blocks {lba}..")]
    });
    check(STRICT_512, 1, |files, places| {
        let (off, lba) = places.payload("clean");
        files.flip(off);
        vec![format!("clean: the payload of blocks {lba}..")]
    });
}

#[test]
fn all_findings_are_told_not_just_the_first() {
    check(STRICT_512, 2, |files, places| {
        files.flip(0);
        files.flip(40 << 10);
        let off = places.segment_off(3);
        files.flip(off + (4 << 10));
        let (dirty, _) = places.payload("dirty");
        files.flip(dirty);
        let (clean, _) = places.payload("clean");
        files.flip(clean);
        told([
            "first copy of the superblock",
            "second copy of the tails",
            "segment info of segment 3",
            "dirty: the payload",
            "clean: the payload",
        ])
    });
}

#[test]
fn another_base_and_a_changed_one_are_found() {
    let files = Files::new();
    worked(&files, STRICT_512);
    let witness = info(&files)["witness"].clone();
    let (_, base) = files.content();
    let mut changed = base.clone();
    for entry in witness.as_array().unwrap() {
        changed[number(entry, "lba") as usize * 512] ^= 1;
    }
    std::fs::write(&files.base, &changed).unwrap();
    let ran = verified(&files);
    assert_eq!(ran.status, 2);
    assert!(
        ran.out.contains("refused: the base device does not hold"),
        "{}",
        ran.out
    );
    assert!(!files.engine_opens(STRICT_512));

    std::fs::write(&files.base, &base[512..]).unwrap();
    let ran = verified(&files);
    assert_eq!(ran.status, 2);
    for part in ["number of blocks", "4096", "4095"] {
        assert!(ran.out.contains(part), "{}", ran.out);
    }
}

/// Changes a kset, and gives it a checksum that fits: its seq, and its keys.
fn rewrite(files: &Files, seq: u64, new_seq: u64, change: impl FnOnce(&mut Vec<Key>)) {
    let places = Places::of(files);
    let is_it = |line: &&Value| line["type"] == "kset" && line["seq"] == seq;
    let kset = places.lines.iter().find(is_it).unwrap();
    let is_its = |line: &&Value| line["type"] == "segment" && line["segment"] == kset["segment"];
    let segment = places.lines.iter().find(is_its).unwrap();
    let (id, generation) = (
        SegId(number(segment, "segment") as u32),
        number(segment, "generation"),
    );
    let pmem = files.map();
    let Ok(HeaderState::Cache(superblock, _)) = load_header(&pmem) else {
        panic!("there is a cache");
    };
    let (geometry, checksums) = (superblock.geometry, Checksums::new(superblock.uuid));
    let count = superblock.base.block_count;
    let context = KsetContext::new(&geometry, count, &checksums, id, Generation(generation));
    let (off, index) = (
        number(kset, "off") as u32,
        number(kset, "kset_index") as u32,
    );
    let mut keys: Vec<Key> = Vec::new();
    let mut reader = KsetReader::default();
    let read = reader.read(&pmem, &context, off, index, &mut keys).unwrap();
    change(&mut keys);
    let mut builder = KsetBuilder::default();
    keys.iter()
        .for_each(|key| builder.push(key, geometry.block_shift()));
    let seed = checksums.kset(id.0, generation);
    let bytes = builder.finish(seed, index, Seq(new_seq), read.epoch, read.proof);
    pmem.store(
        Agent(1),
        geometry.segment_off(id).plus(u64::from(off)),
        bytes,
    );
    drop(pmem.fence(Agent(1)));
}

/// Seqs 1, 3 and 5 in one segment, 2, 4 and 6 in another; a block each.
fn two_streams(kind: Kind) -> Files {
    let files = Files::new();
    let mut host = Host::format(&files, kind);
    for round in 0..3 {
        host.write(0, round * 8, 1, Fua::No);
        host.write(1, 256 + round * 8, 1, Fua::No);
    }
    host.kill(&files);
    files
}

#[test]
fn two_ksets_with_one_number_are_refused() {
    let files = two_streams(STRICT_512);
    rewrite(&files, 6, 5, |_| {});
    let ran = verified(&files);
    assert_eq!(ran.status, 2);
    assert!(
        ran.out.contains("both hold a kset with number 5"),
        "{}",
        ran.out
    );
    assert!(!files.engine_opens(STRICT_512));
}

#[test]
fn ksets_out_of_order_and_keys_out_of_range_are_refused() {
    let files = two_streams(STRICT_512);
    rewrite(&files, 6, 2, |_| {});
    rewrite(&files, 3, 3, |keys| keys[0].lba.0 = 4096);
    let ran = verified(&files);
    assert_eq!(ran.status, 2);
    assert_eq!(
        ran.out.matches("a key is out of range").count(),
        2,
        "{}",
        ran.out
    );
    assert!(!files.engine_opens(STRICT_512));
}

#[test]
fn payloads_that_lie_over_each_other_are_found() {
    // Without checksums nothing else would tell.
    let files = two_streams(RELAXED_4096);
    rewrite(&files, 3, 3, |keys| keys[0].payload_off += 4096);
    let ran = verified(&files);
    assert_eq!(ran.status, 2);
    let told = "dirty: the payload of block 8 in segment ";
    assert!(
        ran.out.contains(told) && ran.out.contains("lies over that of block 0"),
        "{}",
        ran.out
    );

    let files = Files::new();
    let mut host = Host::format(&files, STRICT_512);
    (0..9).for_each(|lba| host.write(0, lba, 1, Fua::No));
    host.kill(&files);
    // Behind its own kset, as it must be, and over one that follows.
    rewrite(&files, 1, 1, |keys| keys[0].payload_off = (8 << 10) + 512);
    let ran = verified(&files);
    assert_eq!(ran.status, 2);
    assert!(
        ran.out.contains("at byte 0x2200 lies over the keys"),
        "{}",
        ran.out
    );
}

#[test]
fn memory_that_cannot_be_read_is_a_finding() {
    let files = Files::new();
    worked(&files, RELAXED_4096);
    let places = Places::of(&files);
    let image = || SimPmem::from_image(files.content().0);
    let info_off = places.segment_off(3);
    for (off, worst) in [
        (0, Severity::Repairable),
        (info_off, Severity::Repairable),
        (places.payload("dirty").0, Severity::Dirty),
        (
            places.ksets(|line| line["state"] == "dirty")[0],
            Severity::Refused,
        ),
    ] {
        let pmem = image();
        pmem.poison(PmemOff(off));
        assert_eq!(worst_of(&pmem), Some(worst), "at {off:#x}");
    }
    let pmem = image();
    pmem.poison(PmemOff(0));
    pmem.poison(PmemOff(32 << 10));
    assert_eq!(worst_of(&pmem), Some(Severity::Refused));
}

/// What verify finds in an image, at worst.
fn worst_of(image: &impl PmemRead) -> Option<Severity> {
    let mut out = Vec::new();
    let mut findings = Findings::new(&mut out, OutputFormat::Text);
    verify(image, None, &mut findings, &mut ProgressLine::default()).unwrap();
    findings.worst()
}

#[test]
fn verify_refuses_what_the_engine_refuses_and_nothing_else() {
    let files = Files::new();
    worked(&files, STRICT_512);
    let (cache, base) = files.content();
    let metadata = metadata_lines(&files);
    let mut state = 7u64;
    let mut draw = |below: usize| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let image = ImagePmem::new(cache);
    let (mut refused, mut opened) = (0, 0);
    for _ in 0..1000 {
        image.mark();
        for _ in 0..=draw(3) {
            let at = PmemOff(metadata[draw(metadata.len())]);
            let mut line = [0; 64];
            match draw(4) {
                0 => {}
                1 => {
                    let from = PmemOff(metadata[draw(metadata.len())]);
                    image.read(from, &mut line).unwrap();
                }
                _ => {
                    image.read(at, &mut line).unwrap();
                    line[draw(64)] ^= 1 << draw(8);
                }
            }
            image.patch(at, &line);
        }
        let worst = worst_of(&image);
        let options = STRICT_512.options(FormatPolicy::Never);
        let result = open(image.clone(), &base, options);
        image.roll_back();
        let is_refused = worst == Some(Severity::Refused);
        assert_eq!(result.is_err(), is_refused, "{worst:?}, {:?}", result.err());
        if is_refused {
            refused += 1;
        } else {
            opened += 1;
        }
    }
    assert!(
        refused > 50 && opened > 50,
        "{refused} refused, {opened} opened"
    );
}

/// Offsets of the lines that hold something that is not payload.
fn metadata_lines(files: &Files) -> Vec<u64> {
    let places = Places::of(files);
    let mut offs: Vec<u64> = [0, 64, 8 << 10, (8 << 10) + 64, 32 << 10, 40 << 10].to_vec();
    for segment in places.segments(|_| true) {
        let off = places.segment_off(segment);
        offs.extend([off, off + 4096]);
    }
    offs.extend(places.ksets(|_| true));
    offs
}

#[test]
fn a_witness_at_the_end_of_all_numbers_is_told_and_harms_nobody() {
    for kind in [STRICT_512, RELAXED_4096] {
        let files = Files::new();
        worked(&files, kind);
        let pmem = files.map();
        let Ok(HeaderState::Cache(superblock, _)) = load_header(&pmem) else {
            panic!("it holds a cache");
        };
        let checksums = Checksums::new(superblock.uuid);
        for copy in [0, 1] {
            Spot::tails(&checksums, copy).edit(&pmem, |bytes| {
                bytes[48..56].copy_from_slice(&u64::MAX.to_le_bytes());
                bytes[56..60].copy_from_slice(&1u32.to_le_bytes());
            });
        }
        drop(pmem);
        let text = format!("witness {}", u64::MAX);
        for ran in [run("info", &files.cache, &[]), verified(&files)] {
            let all = format!("{}{}", ran.out, ran.err);
            assert!(ran.status != 101 && all.contains(&text), "{all}");
        }
    }
}
