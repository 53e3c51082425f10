//! A cache device that may hold anything, and what must hold when it is opened and used all the same.

use crate::engine::{Cache, DamagedRange, Fua, Health, Op, OpenOptions, Status};
use crate::media::{
    COUNTER_START_MAX, HeaderState, KEYS_START_BYTES, SegmentInfo, Spot, Tails, load_header,
};
use crate::pmem::{IovBuf, LINE_SIZE_BYTES, Pmem};
use crate::sim::image::ImagePmem;
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::sim::pmem::SimPmem;
use crate::sim::prng::Prng;
use crate::sim::recover;
use crate::sim::stamp::{self, Stamp};
use crate::units::{Generation, Lba, SegId};
use std::ops::ControlFlow;
use std::sync::Arc;

/// Requests of one input, at most.
const REQUESTS_MAX: usize = 60;
/// The first stamp of a write here; those on the media are lower.
const FIRST_STAMP: u32 = 1 << 20;
/// More than the requests of one input can use up.
const NUMBERS_LEFT_MIN: u64 = 1 << 20;
/// How often one input recycles a segment, at most.
const LAPS_MAX: u64 = 8;

/// A cache device, and the base to which it belongs.
#[derive(Debug)]
pub(super) struct Media {
    pub(super) image: ImagePmem,
    pub(super) base: Vec<u8>,
    pub(super) options: OpenOptions,
}

/// What a block may read as. Hostile media can hold a fill, or something clean, that is not what the base
/// holds: a read then returns either, depending on what is reclaimed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Content {
    now: Vec<u8>,
    or: Option<Vec<u8>>,
}

impl Content {
    fn of(block: &[u8]) -> Self {
        Self {
            now: block.to_vec(),
            or: None,
        }
    }

    fn allows(&self, block: &[u8]) -> bool {
        self.now == block || self.or.as_deref() == Some(block)
    }
}

/// Opens the media; if that works, uses them.
///
/// # Errors
/// They were refused, and left as they were.
pub(super) fn exercise(media: &Media, prng: &mut Prng) -> Result<(), String> {
    let before = media.image.bytes();
    let opened = open(media, media.image.clone());
    let cache = opened.inspect_err(|refusal| {
        assert!(
            media.image.bytes() == before,
            "refused, but written to: {refusal}"
        );
    })?;
    cache.check_invariants();
    let contents = contents(&cache, &media.base, media.options.base.block_count);
    if has_no_numbers_left(&cache, &media.image)
        || holds_ksets_to_come(&cache, &ImagePmem::new(before))
    {
        return Ok(());
    }
    let repaired = media.image.bytes();
    let again = open(media, ImagePmem::new(repaired.clone()));
    let again = again.unwrap_or_else(|refusal| panic!("repaired, then refused: {refusal}"));
    again.check_invariants();
    let found = self::contents(&again, &media.base, media.options.base.block_count);
    assert!(found == contents, "a second recovery finds something else");
    use_it(media, repaired, contents, prng);
    Ok(())
}

/// Counters stop short of [`COUNTER_START_MAX`], behind which a cache is refused. Media that pretend to have counted
/// nearly so far can be opened, but not for ever.
fn has_no_numbers_left(cache: &Cache<ImagePmem>, image: &ImagePmem) -> bool {
    let info = cache.info();
    let mut counters = vec![info.seq_next, info.epoch];
    if let Ok(HeaderState::Cache(superblock, _)) = load_header(image) {
        counters.push(superblock.update);
    }
    if let Ok((tails, _)) = Tails::load(image, &cache.checksums) {
        counters.push(tails.update);
    }
    for segment in (0..cache.geometry.segment_count()).map(SegId) {
        let info = SegmentInfo::load(image, &cache.geometry, &cache.checksums, segment);
        counters.extend(
            info.iter()
                .flat_map(|(info, _)| [info.update, info.generation.0]),
        );
    }
    counters
        .iter()
        .any(|number| number + NUMBERS_LEFT_MIN > COUNTER_START_MAX)
}

/// A generation that was set back brings earlier laps of the segment to life again as soon as it is counted
/// up: with good checksums nothing tells them from the truth. What is found then is anybody's guess.
fn holds_ksets_to_come(cache: &Cache<ImagePmem>, image: &ImagePmem) -> bool {
    let (geometry, checksums) = (&cache.geometry, &cache.checksums);
    (0..geometry.segment_count()).map(SegId).any(|segment| {
        let info = SegmentInfo::load(image, geometry, checksums, segment);
        let now = info.map_or(0, |(info, _)| info.generation.0);
        let end = u32::try_from(geometry.segment_size_bytes()).unwrap_or(u32::MAX);
        let mut offs = (KEYS_START_BYTES..end).step_by(LINE_SIZE_BYTES as usize);
        offs.any(|off| {
            (now + 1..=now + LAPS_MAX).any(|lap| {
                let kset = (segment, Generation(lap));
                Spot::kset(image, geometry, checksums, kset, off)
                    .is_some_and(|spot| spot.is_sealed(image))
            })
        })
    })
}

fn open(media: &Media, image: ImagePmem) -> Result<Arc<Cache<ImagePmem>>, String> {
    let block_size = media.options.base.block_size_bytes as usize;
    let base =
        |lba: u64, len: u64| &media.base[lba as usize * block_size..][..len as usize * block_size];
    recover::open(image, media.options.clone(), base).map_err(|error| error.to_string())
}

/// Every block.
fn contents<P: Pmem>(cache: &Cache<P>, base: &[u8], block_count: u64) -> Vec<Content> {
    let block_size = base.len() / block_count as usize;
    let content = |(lba, of_base): (u64, &[u8])| {
        let mut now = of_base.to_vec();
        if let Err(error) = cache.peek(Lba(lba), &mut now) {
            panic!("hostile media are not poisoned: {error}");
        }
        let or = (now != of_base).then(|| of_base.to_vec());
        Content { now, or }
    };
    (0..).zip(base.chunks(block_size)).map(content).collect()
}

/// Whether the blocks from `lba` on are what they may be.
fn compare<'a>(
    found: impl Iterator<Item = &'a [u8]>,
    expected: &[Content],
    (who, lba): (&str, u64),
) {
    for ((lba, found), expected) in (lba..).zip(found).zip(expected) {
        assert!(
            expected.allows(found),
            "{who} finds block {lba} with another content"
        );
    }
}

/// Requests, each of which must be answered, and rightly; then a restart.
fn use_it(media: &Media, image: Vec<u8>, mut contents: Vec<Content>, prng: &mut Prng) {
    let start = |image, base| {
        let pmem = SimPmem::from_image(image);
        let plain = Plain::new(pmem, base, media.options.clone(), BackgroundRuns::Always);
        plain.unwrap_or_else(|refusal| panic!("refused after it was used: {refusal}"))
    };
    let mut plain = start(image, media.base.clone());
    for number in 0..REQUESTS_MAX as u32 {
        if prng.is_at_end() {
            break;
        }
        let stamp = Stamp(FIRST_STAMP + number);
        if request(&mut plain, &mut contents, stamp, prng).is_break() {
            break;
        }
    }
    plain.cache.check_invariants();
    let plain = start(plain.pmem().live_image(), plain.base);
    plain.cache.check_invariants();
    let found = self::contents(&plain.cache, &plain.base, contents.len() as u64);
    let found = found.iter().map(|content| content.now.as_slice());
    compare(found, &contents, ("a restart", 0));
}

/// One request. `Break`: the damage keeps the log from moving; more requests would only wait, too.
fn request(
    plain: &mut Plain<SimPmem>,
    contents: &mut [Content],
    stamp: Stamp,
    prng: &mut Prng,
) -> ControlFlow<()> {
    let channel = prng.index(2);
    let block_size = plain.base.len() / contents.len();
    // What a channel takes, up to some blocks that cross a page.
    let len_max = plain.cache.write_size_max_bytes() / block_size as u64;
    let len = prng.between(1, len_max.min(11));
    let lba = prng.below(contents.len() as u64 - len + 1);
    let blocks = &mut contents[lba as usize..(lba + len) as usize];
    let data = |stamp| -> Vec<u8> {
        let mut data = vec![0; len as usize * block_size];
        for (lba, block) in (lba..).zip(data.chunks_mut(block_size)) {
            stamp::fill(block, stamp, lba);
        }
        data
    };
    match prng.below(8) {
        0..=2 => {
            let fua = prng.pick(&[Fua::No, Fua::No, Fua::Yes]);
            let data = data(stamp);
            let buf = IovBuf::new(&data, &[]);
            let status = plain.run(channel, Op::Write(buf.cursor(), fua), lba, len);
            return note_write(plain, status, blocks, &data);
        }
        kind @ 3..=4 => {
            let op = if kind == 3 {
                Op::WriteZeroes
            } else {
                Op::Unmap
            };
            let status = plain.run(channel, op, lba, len);
            return note_write(plain, status, blocks, &data(Stamp::ZERO));
        }
        5 => {
            let (status, found) = plain.read(channel, lba, len);
            if status == Status::Success {
                compare(found.chunks(block_size), blocks, ("a read", lba));
            } else {
                let damaged = plain.cache.info().damaged;
                let hit = |range: &DamagedRange| {
                    range.lba < lba + len && lba < range.lba + range.len_blocks
                };
                assert!(
                    status == Status::Failed && damaged.iter().any(hit),
                    "a read of {len} blocks at {lba} ends as {status:?}: {damaged:?}"
                );
            }
        }
        6 => assert_eq!(plain.run(channel, Op::Flush, 0, 0), Status::Success),
        _ => return drain(plain, contents),
    }
    ControlFlow::Continue(())
}

/// A write may be stuck where the damage keeps the log from moving, and only there; then nothing of it is done. Or
/// write-back stands still, and a mode holds the write for it in vain: it fails, but is in the log.
fn note_write(
    plain: &Plain<SimPmem>,
    status: Status,
    blocks: &mut [Content],
    data: &[u8],
) -> ControlFlow<()> {
    let health = plain.cache.health();
    let damaged = matches!(health, Health::Degraded(_));
    let held_in_vain =
        damaged && status == Status::Failed && plain.cache.settings.cache_mode().holds_writes();
    if status == Status::Success || held_in_vain {
        let block_size = data.len() / blocks.len();
        for (block, data) in blocks.iter_mut().zip(data.chunks(block_size)) {
            *block = Content::of(data);
        }
        return ControlFlow::Continue(());
    }
    assert!(
        damaged && status == Status::Aborted,
        "a write ends as {status:?}: {health:?}, {:?}",
        plain.cache.info()
    );
    ControlFlow::Break(())
}

fn drain(plain: &mut Plain<SimPmem>, contents: &[Content]) -> ControlFlow<()> {
    if !plain.drain() {
        let health = plain.cache.health();
        let info = plain.cache.info();
        let damaged = matches!(health, Health::Degraded(_));
        assert!(damaged, "a drain does not end: {health:?}, {info:?}");
        return ControlFlow::Break(());
    }
    let block_size = plain.base.len() / contents.len();
    compare(plain.base.chunks(block_size), contents, ("a drain", 0));
    ControlFlow::Continue(())
}
