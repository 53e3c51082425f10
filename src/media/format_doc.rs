//! `docs/FORMAT.md` is normative, so it must not drift from the code: its tables are held against the structs
//! and against the bytes that the code stores.
//!
//! The fields of most structs are private to their modules, so `offset_of!` cannot name them here; and it could
//! not tell that the document lacks one. A struct is laid over bytes that tell their own offsets instead, and
//! its `Debug` output, which has every field, says which of them each field got. That proves the byte order too.

mod settings;

use super::kset::{KeyOnMedia, KsetHeaderOnMedia};
use super::layout::{SEGMENT_INFO_STRIDE_BYTES, SUPERBLOCK_OFFS, TAILS_OFFS};
use super::pair::PairHeaderOnMedia;
use super::segment_info::SegmentInfoOnMedia;
use super::superblock::SuperblockOnMedia;
use super::tails::TailsOnMedia;
use super::*;
use crate::engine::{BaseIdentity, DataCrc, Setting, SettingChange, SettingValues, WritebackOrder};
use crate::pmem::{LINE_SIZE_BYTES, PmemRead};
use crate::sim::pmem::SimPmem;
use crate::units::{Agent, Epoch, Generation, Lba, PAGE_SIZE_BYTES, PmemOff, SegId, Seq};
use std::collections::BTreeMap;
use std::fmt::Debug;
use zerocopy::FromBytes;

const DOC: &str = include_str!("../../docs/FORMAT.md");
const AGENT: Agent = Agent(1);

/// A row of a table.
type Row = Vec<String>;

/// The rows of the first table behind the line that starts with `anchor`, without the head. `columns` is the
/// head, so that no other table is taken for it.
fn table(anchor: &str, columns: &[&str]) -> Vec<Row> {
    let mut lines = DOC.lines().skip_while(|line| !line.starts_with(anchor));
    assert!(lines.next().is_some(), "FORMAT.md lacks `{anchor}`");
    let mut rows = lines
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .map(cells);
    assert_eq!(rows.next().unwrap(), columns, "the table behind `{anchor}`");
    rows.skip(1).collect()
}

fn cells(line: &str) -> Row {
    let cells = line.trim().trim_matches('|').split('|');
    cells
        .map(|cell| cell.trim().trim_matches('`').to_owned())
        .collect()
}

fn number(text: &str) -> u64 {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.unwrap_or_else(|_| panic!("`{text}` in FORMAT.md is not a number"))
}

/// A field, or one word or byte of it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Field {
    name: String,
    offset: usize,
    size: usize,
}

/// A struct as the compiler has laid it out, or as the document says.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    size: usize,
    fields: Vec<Field>,
}

/// The words and bytes in the `Debug` output of a struct, in order: the path of each, and the value.
struct Parser<'a> {
    rest: &'a str,
    leaves: Vec<(String, u64, usize)>,
}

impl Parser<'_> {
    fn take(&mut self, wanted: impl Fn(char) -> bool) -> String {
        let end = self.rest.find(|c| !wanted(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken.to_owned()
    }

    fn eat(&mut self, token: &str) -> bool {
        let rest = self.rest.trim_start().strip_prefix(token);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn value(&mut self, path: &str) {
        if self.eat("[") {
            while !self.eat("]") {
                self.value(path);
                self.eat(",");
            }
            return;
        }
        self.rest = self.rest.trim_start();
        let word = self.take(|c| c.is_alphanumeric() || c == '_');
        if self.eat("{") {
            while !self.eat("}") {
                self.rest = self.rest.trim_start();
                let name = self.take(|c| c.is_alphanumeric() || c == '_');
                assert!(self.eat(":"), "a field at: {}", self.rest);
                self.value(&format!("{path}.{name}"));
                self.eat(",");
            }
        } else if self.eat("(") {
            let size = match word.as_str() {
                "U32" => 4,
                "U64" => 8,
                other => panic!("{other} is not a type for media"),
            };
            let digits = self.take(|c| c.is_ascii_digit());
            assert!(self.eat(")"));
            self.leaves
                .push((path.to_owned(), digits.parse().unwrap(), size));
        } else {
            self.leaves
                .push((path.to_owned(), word.parse().unwrap(), 1));
        }
    }
}

/// Every word and byte of a struct: its path, its offset, its size.
fn leaves<T: FromBytes + Debug>() -> Vec<Field> {
    let parse = |pattern: fn(usize) -> u8| {
        let bytes: Vec<u8> = (0..size_of::<T>()).map(pattern).collect();
        let text = format!("{:?}", T::read_from_bytes(&bytes).ok().unwrap());
        let mut parser = Parser {
            rest: &text,
            leaves: Vec::new(),
        };
        parser.value("");
        assert_eq!(parser.rest, "");
        parser.leaves
    };
    // The lowest byte of a word is the first one, and holds its offset: one half in each run.
    let low = parse(|at| (at & 0xff) as u8);
    let high = parse(|at| (at >> 8) as u8);
    let pairs = low.into_iter().zip(high);
    pairs
        .map(|((name, low, size), (_, high, _))| Field {
            name,
            offset: ((low & 0xff) | (high & 0xff) << 8) as usize,
            size,
        })
        .collect()
}

/// The fields of the struct at `path` in another one, put together of their words and bytes.
fn fields_at(leaves: &[Field], path: &str) -> Vec<Field> {
    let mut fields: Vec<Field> = Vec::new();
    for leaf in leaves {
        let Some(name) = leaf.name.strip_prefix(path) else {
            continue;
        };
        let name = name.trim_start_matches('.').split('.').next().unwrap();
        match fields.last_mut().filter(|field| field.name == name) {
            Some(field) => {
                assert_eq!(field.offset + field.size, leaf.offset, "padding");
                field.size += leaf.size;
            }
            None => fields.push(Field {
                name: name.to_owned(),
                ..leaf.clone()
            }),
        }
    }
    fields
}

fn layout<T: FromBytes + Debug>() -> Layout {
    Layout {
        size: size_of::<T>(),
        fields: fields_at(&leaves::<T>(), ""),
    }
}

/// An element of the array of structs at `path`, of `count` elements.
fn element_layout<T: FromBytes + Debug>(path: &str, count: usize) -> Layout {
    let of_array = fields_at(&leaves::<T>(), path);
    let per_element = of_array.len() / count;
    assert_eq!(of_array.len(), per_element * count);
    let start = of_array[0].offset;
    let size = of_array[per_element].offset - start;
    for (at, field) in of_array.iter().enumerate() {
        let first = &of_array[at % per_element];
        assert_eq!(field.name, first.name);
        assert_eq!(field.offset, first.offset + at / per_element * size);
    }
    let fields = of_array[..per_element].iter().map(|field| Field {
        offset: field.offset - start,
        ..field.clone()
    });
    Layout {
        size,
        fields: fields.collect(),
    }
}

/// Every struct that the document describes.
fn documented() -> BTreeMap<String, Layout> {
    let headings = DOC.lines().filter_map(|line| line.strip_prefix("### "));
    headings
        .filter_map(|heading| heading.strip_suffix(" bytes)")?.split_once(" ("))
        .map(|(name, size)| {
            let rows = table(
                &format!("### {name} "),
                &["offset", "size", "field", "meaning"],
            );
            let fields = rows.iter().map(|row| {
                assert!(
                    row.len() == 4 && !row[3].is_empty(),
                    "a row of {name}: {row:?}"
                );
                Field {
                    name: row[2].clone(),
                    offset: number(&row[0]) as usize,
                    size: number(&row[1]) as usize,
                }
            });
            let layout = Layout {
                size: number(size) as usize,
                fields: fields.collect(),
            };
            (name.to_owned(), layout)
        })
        .collect()
}

#[test]
fn every_field_is_documented_where_it_lies() {
    let mut documented = documented();
    let structs = [
        ("PairHeaderOnMedia", layout::<PairHeaderOnMedia>()),
        ("SuperblockOnMedia", layout::<SuperblockOnMedia>()),
        ("TailsOnMedia", layout::<TailsOnMedia>()),
        (
            "WitnessOnMedia",
            element_layout::<TailsOnMedia>(".witness", WITNESS_COUNT),
        ),
        ("SegmentInfoOnMedia", layout::<SegmentInfoOnMedia>()),
        ("KsetHeaderOnMedia", layout::<KsetHeaderOnMedia>()),
        ("KeyOnMedia", layout::<KeyOnMedia>()),
    ];
    for (name, layout) in structs {
        let in_doc = documented
            .remove(name)
            .unwrap_or_else(|| panic!("FORMAT.md lacks {name}"));
        assert_eq!(in_doc, layout, "FORMAT.md (left) and {name} (right)");
        let end = layout.fields.iter().map(|field| field.size).sum::<usize>();
        assert_eq!(end, layout.size, "the fields of {name} leave gaps");
    }
    assert!(
        documented.is_empty(),
        "no such struct is known: {documented:?}"
    );
}

/// Every struct of the media is in the list of the test above.
#[test]
fn no_struct_is_forgotten() {
    let sources = [
        include_str!("checksum.rs"),
        include_str!("kset.rs"),
        include_str!("layout.rs"),
        include_str!("pair.rs"),
        include_str!("segment_info.rs"),
        include_str!("superblock.rs"),
        include_str!("tails.rs"),
        include_str!("witness_pages.rs"),
    ];
    let documented = documented();
    let mut count = 0;
    for line in sources.iter().flat_map(|source| source.lines()) {
        let name = line.split_once("struct ").map(|(_, name)| name);
        let name = name.and_then(|name| name.split([' ', '<', '(', ';']).next());
        if let Some(name) = name.filter(|name| name.ends_with("OnMedia")) {
            assert!(documented.contains_key(name), "FORMAT.md lacks {name}");
            count += 1;
        }
    }
    assert_eq!(count, documented.len());
    let modules = include_str!("mod.rs").lines();
    let modules = modules.filter(|line| {
        line.starts_with("mod ") && !line.contains("format_doc") && !line.contains("seal")
    });
    assert_eq!(modules.count(), sources.len());
}

#[test]
fn offsets_read_off_the_debug_output_are_those_of_the_compiler() {
    use core::mem::offset_of;
    let by_compiler = [
        ("crc", offset_of!(PairHeaderOnMedia, crc), 4),
        ("word", offset_of!(PairHeaderOnMedia, word), 4),
        ("update", offset_of!(PairHeaderOnMedia, update), 8),
    ];
    let fields = by_compiler.map(|(name, offset, size)| Field {
        name: name.to_owned(),
        offset,
        size,
    });
    assert_eq!(layout::<PairHeaderOnMedia>().fields, fields);
}

fn hex(bytes: &[u8]) -> String {
    let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(" ")
}

fn superblock() -> Superblock {
    Superblock {
        uuid: std::array::from_fn(|at| at as u8),
        device_size_bytes: 1 << 20,
        geometry: Geometry::plan(1 << 20, 64 << 10, 512).unwrap(),
        data_crc: DataCrc::Off,
        settings: SettingValues::default(),
        base: BaseIdentity {
            uuid: [7; 16],
            name: "Base0".to_owned(),
            block_size_bytes: 512,
            block_count: 1 << 20,
        },
        features_compat: 0,
        features_incompat: 0,
        update: 0,
    }
}

fn bytes_at(pmem: &SimPmem, off: u64, len_bytes: usize) -> Vec<u8> {
    let mut bytes = vec![0; len_bytes];
    pmem.read(PmemOff(off), &mut bytes).unwrap();
    bytes
}

/// The first copy of a superblock as it is stored.
fn stored(superblock: &Superblock) -> Vec<u8> {
    let pmem = SimPmem::new(1 << 20);
    drop(persist_superblock(&pmem, AGENT, &mut superblock.clone()));
    bytes_at(&pmem, SUPERBLOCK_OFFS[0].0, 512)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// The smallest power of two that passes as the size of a segment.
fn segment_size_min() -> u64 {
    let sizes = (0..30).map(|shift| 1 << shift);
    let mut possible = sizes.filter(|size| Geometry::plan(1 << 40, *size, 512).is_ok());
    possible.next().unwrap()
}

fn segment_count_min() -> u64 {
    let passes = |count| Geometry::from_media(1 << 30, 1 << 20, 1 << 20, count, 512).is_ok();
    (0..).find(|count| passes(*count)).unwrap()
}

#[test]
fn constants_are_those_of_the_code() {
    let marked = SimPmem::new(1 << 20);
    drop(persist_unfinished_mark(&marked, AGENT).unwrap());
    let superblock = stored(&superblock());
    let mut expected: BTreeMap<String, String> = [
        ("SUPERBLOCK_OFF_0", SUPERBLOCK_OFFS[0].0),
        ("SUPERBLOCK_OFF_1", SUPERBLOCK_OFFS[1].0),
        ("TAILS_OFF_0", TAILS_OFFS[0].0),
        ("TAILS_OFF_1", TAILS_OFFS[1].0),
        ("FORMAT_VERSION", u64::from(le32(&superblock, 4))),
        ("SEGMENTS_START_MIN_BYTES", SEGMENTS_START_MIN_BYTES),
        ("SEGMENT_INFO_STRIDE_BYTES", SEGMENT_INFO_STRIDE_BYTES),
        ("KEYS_START_BYTES", u64::from(KEYS_START_BYTES)),
        ("LINE_SIZE_BYTES", LINE_SIZE_BYTES),
        ("PAGE_SIZE_BYTES", u64::from(PAGE_SIZE_BYTES)),
        ("SEGMENT_SIZE_MIN_BYTES", segment_size_min()),
        ("SEGMENT_SIZE_MAX_BYTES", SEGMENT_SIZE_MAX_BYTES),
        ("SEGMENT_COUNT_MIN", segment_count_min()),
        ("KSET_KEYS_MAX", KSET_KEYS_MAX as u64),
        ("KSET_SIZE_MAX_BYTES", kset_size_bytes(KSET_KEYS_MAX) as u64),
        ("CLEAR_SIZE_MAX_BYTES", CLEAR_SIZE_MAX_BYTES),
        ("WITNESS_COUNT", WITNESS_COUNT as u64),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_string()))
    .into();
    expected.insert("MAGIC".to_owned(), hex(&superblock[16..24]));
    let mark = bytes_at(&marked, 0, 8);
    expected.insert("UNFINISHED_MARK".to_owned(), hex(&mark));
    assert_eq!(bytes_at(&marked, 16, 8), superblock[16..24]);

    let rows = table("## Constants", &["name", "value", "meaning"]);
    let documented: BTreeMap<String, String> = rows
        .iter()
        .map(|row| (row[0].clone(), row[1].clone()))
        .collect();
    assert_eq!(documented.len(), rows.len());
    assert_eq!(documented, expected);
}

/// Value and name of each row of a table of values.
fn values(anchor: &str) -> Vec<(u64, String)> {
    let rows = table(anchor, &["value", "name", "meaning"]);
    rows.iter()
        .map(|row| (number(&row[0]), row[1].clone()))
        .collect()
}

fn named<const N: usize>(values: [(u64, &str); N]) -> Vec<(u64, String)> {
    let values = values.into_iter();
    values
        .map(|(value, name)| (value, name.to_owned()))
        .collect()
}

#[test]
fn values_of_the_superblock_are_those_of_the_code() {
    let mut superblock = superblock();
    let strict = stored(&superblock);
    superblock.settings = (superblock.settings)
        .with(&SettingChange::of(
            Setting::WritebackOrder,
            WritebackOrder::Relaxed as u32,
        ))
        .unwrap();
    superblock.data_crc = DataCrc::On;
    let relaxed = stored(&superblock);
    assert_eq!(le32(&strict, 96), 0);
    let options = [(u64::from(le32(&relaxed, 96)), "data_crc")];
    assert_eq!(values("Option flags:"), named(options));
    let orders = [
        (u64::from(strict[101]), "strict"),
        (u64::from(relaxed[101]), "relaxed"),
    ];
    assert_eq!(values("Values of `writeback_order`:"), named(orders));
}

#[test]
fn states_of_a_segment_are_those_of_the_code() {
    let (pmem, superblock) = (SimPmem::new(1 << 20), superblock());
    let checksums = Checksums::new(superblock.uuid);
    let state = |sealed| {
        let mut info = SegmentInfo {
            generation: Generation::FIRST,
            sealed,
            update: 0,
        };
        let geometry = &superblock.geometry;
        drop(info.persist(&pmem, AGENT, geometry, &checksums, SegId(2)));
        let off = geometry.segment_off(SegId(2)).0;
        let copies = [off, off + SEGMENT_INFO_STRIDE_BYTES].map(|off| bytes_at(&pmem, off, 64));
        assert_eq!(copies[0], copies[1]);
        u64::from(le32(&copies[0], 4))
    };
    let sealed = Sealed {
        kset_count: 3,
        last_seq: Seq(9),
    };
    let states = [(state(None), "unsealed"), (state(Some(sealed)), "sealed")];
    assert_eq!(values("States:"), named(states));
}

/// The bytes of a kset with one key.
fn kset_bytes(kind: KeyKind, proof: Proof) -> Vec<u8> {
    let mut builder = KsetBuilder::default();
    let key = Key {
        lba: Lba(5),
        len_blocks: 1,
        kind,
        payload_off: 0,
        crc: 0,
    };
    builder.push(&key, 9);
    builder
        .finish(ChecksumSeed(0), 0, Seq(1), Epoch(1), proof)
        .to_vec()
}

#[test]
fn flags_of_a_kset_are_those_of_the_code() {
    let flags = |proof| u64::from(le32(&kset_bytes(KeyKind::Data, proof), 12));
    assert_eq!(flags(Proof::Fence), 0);
    let flags = [(flags(Proof::Checksums), "payloads_unfenced")];
    assert_eq!(values("Kset flags:"), named(flags));
}

#[test]
fn kinds_of_keys_are_those_of_the_code() {
    use KeyKind::{Data, Fill, Unmap, Zeroes};
    let kind_at = KSET_HEADER_SIZE_BYTES + 20;
    let found = [Data, Fill, Zeroes, Unmap].map(|kind| {
        let code = u64::from(kset_bytes(kind, Proof::Fence)[kind_at]);
        (code, format!("{kind:?}"))
    });
    assert_eq!(values("Kinds of keys:"), found);
}

#[test]
fn seeds_of_checksums_are_those_of_the_code() {
    // Made here of the byte sequences in the document, without the code under test.
    let uuid: [u8; 16] = std::array::from_fn(|at| at as u8);
    let (segment, generation) = (3u32, 5u64);
    let place = [&generation.to_le_bytes()[..], &segment.to_le_bytes()].concat();
    let by_name = |name: &str| match name {
        "superblock" => (Checksums::superblock(), [0; 16], vec![0; 8]),
        "tails" => (Checksums::new(uuid).tails(), uuid, vec![0; 8]),
        "segment info" => {
            let number = u64::from(segment).to_le_bytes().to_vec();
            (Checksums::new(uuid).segment_info(segment), uuid, number)
        }
        "kset" => (
            Checksums::new(uuid).kset(segment, generation),
            uuid,
            place.clone(),
        ),
        "payload" => (
            Checksums::new(uuid).payload(segment, generation),
            uuid,
            place.clone(),
        ),
        other => panic!("FORMAT.md has a checksum of `{other}`"),
    };
    let kinds = table("## Checksums", &["structure", "kind", "seed", "covered"]);
    let checks = table("Check values", &["structure", "CRC-32C of the seed"]);
    assert_eq!((kinds.len(), checks.len()), (5, 5));
    for (row, check) in kinds.iter().zip(&checks) {
        let (by_code, uuid, rest) = by_name(&row[0]);
        let kind = u32::try_from(number(&row[1])).unwrap().to_le_bytes();
        let seed = [&uuid[..], &kind, &rest].concat();
        let crc = crc32c::crc32c(&seed);
        assert_eq!(ChecksumSeed(crc), by_code, "the seed of {}", row[0]);
        assert_eq!(check[0], row[0]);
        assert_eq!(number(&check[1]), u64::from(crc), "{}: {crc:#010x}", row[0]);
        // The checksum goes on where the seed ends.
        let whole = crc32c::crc32c(&[&seed[..], b"abc"].concat());
        assert_eq!(by_code.checksum(b"abc"), whole);
    }
    assert!(DOC.contains(&format!("{:#X}", crc32c::crc32c(b"123456789")).replace("0X", "0x")));
}

#[test]
fn checksums_cover_what_is_documented() {
    let pmem = SimPmem::new(1 << 20);
    let mut superblock = superblock();
    let checksums = Checksums::new(superblock.uuid);
    drop(persist_superblock(&pmem, AGENT, &mut superblock));
    drop(Tails::empty().persist(&pmem, AGENT, &checksums));
    for copy in 0..2 {
        let bytes = bytes_at(&pmem, SUPERBLOCK_OFFS[copy].0, 512);
        let crc = Checksums::superblock().checksum(&bytes[4..512]);
        assert_eq!(le32(&bytes, 0), crc);
        let bytes = bytes_at(&pmem, TAILS_OFFS[copy].0, 192);
        assert_eq!(le32(&bytes, 0), checksums.tails().checksum(&bytes[4..192]));
    }
    let kset = kset_bytes(KeyKind::Data, Proof::Fence);
    assert_eq!(kset.len(), 64);
    let end = KSET_HEADER_SIZE_BYTES + KEY_SIZE_BYTES;
    assert_eq!(le32(&kset, 0), ChecksumSeed(0).checksum(&kset[4..end]));
    assert!(kset[end..].iter().all(|byte| *byte == 0));
}

/// The ranges of the two maps that are numbers.
fn ranges(anchor: &str) -> Vec<(u64, u64)> {
    let rows = table(anchor, &["from", "to", "content"]);
    let numbers = |row: &Row| Some((row[0].parse().ok()?, row[1].parse().ok()?));
    rows.iter().filter_map(numbers).collect()
}

#[test]
fn maps_have_the_structures_where_they_lie() {
    let sized = |off: u64, size: usize| (off, off + size as u64);
    let superblock = size_of::<SuperblockOnMedia>();
    let tails = size_of::<TailsOnMedia>();
    let header = [
        sized(SUPERBLOCK_OFFS[0].0, superblock),
        sized(TAILS_OFFS[0].0, tails),
        sized(SUPERBLOCK_OFFS[1].0, superblock),
        sized(TAILS_OFFS[1].0, tails),
    ];
    assert_eq!(ranges("## Map of the device"), header);
    let info = size_of::<SegmentInfoOnMedia>();
    let segment = [sized(0, info), sized(SEGMENT_INFO_STRIDE_BYTES, info)];
    assert_eq!(ranges("## Map of a segment"), segment);
    let rows = table("## Map of a segment", &["from", "to", "content"]);
    assert!(rows[2][0] == KEYS_START_BYTES.to_string() && rows[2][2].starts_with("ksets"));
}
