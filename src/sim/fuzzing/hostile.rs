//! A cache device that may hold anything, and what must hold when it is opened and used all the same.

use super::trace;
use crate::engine::{Cache, Fua, Health, Op, OpenOptions, Status};
use crate::pmem::{IovBuf, Pmem};
use crate::sim::image::ImagePmem;
use crate::sim::plain::{BackgroundRuns, Plain};
use crate::sim::pmem::SimPmem;
use crate::sim::prng::Prng;
use crate::sim::recover;
use crate::sim::stamp::{self, Stamp};
use crate::units::Lba;
use std::sync::Arc;

/// Requests of one input, at most.
const REQUESTS_MAX: usize = 60;
/// The first stamp of a write here; those on the media are lower.
const FIRST_STAMP: u32 = 1 << 20;

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
pub(super) fn exercise(media: &Media, prng: &mut Prng) {
    let before = media.image.bytes();
    let cache = match open(media, media.image.clone()) {
        Ok(cache) => cache,
        Err(refusal) => {
            trace("refused", &refusal);
            assert!(
                media.image.bytes() == before,
                "refused, but written to: {refusal}"
            );
            return;
        }
    };
    cache.check_invariants();
    let contents = contents(&cache, &media.base, media.options.base.block_count);
    let repaired = media.image.bytes();
    let again = open(media, ImagePmem::new(repaired.clone()));
    let again = again.unwrap_or_else(|refusal| panic!("repaired, then refused: {refusal}"));
    again.check_invariants();
    let found = self::contents(&again, &media.base, media.options.base.block_count);
    assert!(found == contents, "a second recovery finds something else");
    use_it(media, repaired, contents, prng);
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
        request(&mut plain, &mut contents, Stamp(FIRST_STAMP + number), prng);
    }
    plain.cache.check_invariants();
    let plain = start(plain.pmem.live_image(), plain.base);
    plain.cache.check_invariants();
    let found = self::contents(&plain.cache, &plain.base, contents.len() as u64);
    let found = found.iter().map(|content| content.now.as_slice());
    compare(found, &contents, ("a restart", 0));
}

fn request(plain: &mut Plain, contents: &mut [Content], stamp: Stamp, prng: &mut Prng) {
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
            note_write(plain, status, blocks, &data);
        }
        kind @ 3..=4 => {
            let op = if kind == 3 {
                Op::WriteZeroes
            } else {
                Op::Unmap
            };
            let status = plain.run(channel, op, lba, len);
            note_write(plain, status, blocks, &data(Stamp::ZERO));
        }
        5 => {
            let (status, found) = plain.read(channel, lba, len);
            assert_eq!(status, Status::Success, "a read");
            compare(found.chunks(block_size), blocks, ("a read", lba));
        }
        6 => assert_eq!(plain.run(channel, Op::Flush, 0, 0), Status::Success),
        _ => drain(plain, contents),
    }
}

/// A write may be stuck where the damage keeps the log from moving, and only there; then nothing of it is done.
fn note_write(plain: &Plain, status: Status, blocks: &mut [Content], data: &[u8]) {
    if status == Status::Success {
        let block_size = data.len() / blocks.len();
        for (block, data) in blocks.iter_mut().zip(data.chunks(block_size)) {
            *block = Content::of(data);
        }
        return;
    }
    let health = plain.cache.health();
    let damaged = matches!(health, Health::Degraded(_));
    assert!(
        damaged && status == Status::Aborted,
        "a write ends as {status:?}: {health:?}, {:?}",
        plain.cache.info()
    );
}

fn drain(plain: &mut Plain, contents: &[Content]) {
    if !plain.drain() {
        let health = plain.cache.health();
        let info = plain.cache.info();
        let damaged = matches!(health, Health::Degraded(_));
        assert!(damaged, "a drain does not end: {health:?}, {info:?}");
        return;
    }
    let block_size = plain.base.len() / contents.len();
    compare(plain.base.chunks(block_size), contents, ("a drain", 0));
}
