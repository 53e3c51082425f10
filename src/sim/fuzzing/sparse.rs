//! A short text for a cache device that is mostly zeroes, so that a fuzzer's bytes reach every part of it.
//!
//! An input is a byte of [`flags`], then pieces: number of a line (2 bytes), number of bytes, the bytes.
//! Behind a line that does not exist requests begin.

use super::hostile::Media;
use super::layout::{Layout, open_options};
use crate::engine::DataCrc;
use crate::media::{KEYS_START_BYTES, Tails, WITNESS_COUNT, Witness};
use crate::pmem::LINE_SIZE_BYTES;
use crate::sim::image::ImagePmem;
use crate::sim::machine::{INITIAL, Machine, Setup};
use crate::sim::prng::Prng;
use crate::sim::script::{self, Weights};
use crate::sim::stamp;
use crate::units::{Agent, Lba, PmemOff};

const LINE: usize = LINE_SIZE_BYTES as usize;

/// The first byte of an input.
mod flags {
    /// Blocks of 4096 bytes instead of 512.
    pub(super) const LARGE_BLOCKS: u8 = 1;
    /// Payloads carry checksums.
    pub(super) const DATA_CRC: u8 = 2;
    /// Whatever lies where a structure belongs gets a good checksum.
    pub(super) const SEAL: u8 = 4;
}

fn setup_of(flags: u8) -> Setup {
    let large = flags & flags::LARGE_BLOCKS != 0;
    let crc = flags & flags::DATA_CRC != 0;
    Setup {
        block_size_bytes: if large { 4096 } else { 512 },
        block_count: if large { 16 } else { 64 },
        segment_count: 5,
        data_crc: if crc { DataCrc::On } else { DataCrc::Off },
        yield_percent: 0,
        ..Setup::default()
    }
}

/// The media of an input, over a base that was never written to, and what is left of it for requests.
pub(super) fn decode(input: &[u8]) -> (Media, Prng) {
    let (flags, mut rest) = input.split_first().map_or((0, input), |(f, r)| (*f, r));
    let setup = setup_of(flags);
    let mut bytes = vec![0; setup.device_size_bytes() as usize];
    while let [low, high, len, tail @ ..] = rest {
        let at = usize::from(u16::from_le_bytes([*low, *high])) * LINE;
        let len = usize::from(*len).min(tail.len());
        rest = tail;
        if at + len > bytes.len() {
            break;
        }
        bytes[at..at + len].copy_from_slice(&tail[..len]);
        rest = &tail[len..];
    }
    let image = ImagePmem::new(bytes);
    if flags & flags::SEAL != 0 {
        let layout = Layout::of(&setup);
        layout.seal(&image, &layout.kset_places(&image));
    }
    let block_size = setup.block_size_bytes as usize;
    let mut base = vec![0; block_size * setup.block_count as usize];
    for (lba, block) in (0..).zip(base.chunks_mut(block_size)) {
        stamp::fill(block, INITIAL, lba);
    }
    let options = open_options(&setup);
    let media = Media {
        image,
        base,
        options,
    };
    (media, Prng::from_input(rest))
}

/// Inputs that stand for valid media, each with some requests, and their names.
#[must_use]
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let all = [
        0,
        flags::LARGE_BLOCKS,
        flags::DATA_CRC,
        flags::SEAL,
        flags::SEAL | flags::LARGE_BLOCKS | flags::DATA_CRC,
    ];
    let seed = |flags: u8| (format!("valid-{flags}"), encode(flags));
    all.into_iter().map(seed).collect()
}

fn encode(flags: u8) -> Vec<u8> {
    let setup = setup_of(flags);
    let layout = Layout::of(&setup);
    let image = image_of(&setup, u64::from(flags));
    // Payloads say nothing, and are long.
    for segment in layout.segments() {
        let mut ksets = layout
            .kset_places(&image)
            .into_iter()
            .filter(|p| p.0 == segment);
        let last = ksets
            .next_back()
            .and_then(|place| layout.kset(&image, place));
        let start = layout.geometry.segment_off(segment);
        let keys_end = last.map_or(start.0 + u64::from(KEYS_START_BYTES), |kset| {
            kset.off.0 + kset.size_bytes() as u64
        });
        let end = start.0 + layout.geometry.segment_size_bytes();
        image.patch(PmemOff(keys_end), &vec![0; (end - keys_end) as usize]);
    }
    let mut input = vec![flags];
    for (number, line) in image.bytes().chunks(LINE).enumerate() {
        let zeroes = line.iter().rev().take_while(|byte| **byte == 0).count();
        if zeroes < LINE {
            input.extend((number as u16).to_le_bytes());
            input.push((LINE - zeroes) as u8);
            input.extend(&line[..LINE - zeroes]);
        }
    }
    input.extend([0xff; 3]);
    let mut prng = Prng::new(u64::from(flags));
    input.extend((0..40).map(|_| prng.below(256) as u8));
    input
}

/// A cache device after a short history, with nothing known of the base.
fn image_of(setup: &Setup, seed: u64) -> ImagePmem {
    let weights = Weights {
        crash: 0,
        fault: 0,
        key_loss: 0,
        busy_percent: 0,
    };
    let mut prng = Prng::new(seed);
    let steps = script::draw(&mut prng, setup, weights, 30);
    let machine = Machine::new(setup.clone(), seed, None);
    let machine = steps
        .into_iter()
        .try_fold(machine.expect("it is blank"), script::apply);
    let machine = machine.expect("the history is valid");
    machine.settle().expect("the history is valid");
    let image = ImagePmem::new(machine.pmem().live_image());
    let checksums = Layout::of(setup).checksums;
    let (mut tails, _) = Tails::load(&image, &checksums).expect("the image is valid");
    tails.witness = [Witness {
        lba: Lba(0),
        len_blocks: 0,
        crc: 0,
    }; WITNESS_COUNT];
    drop(tails.persist(&image, Agent(0), &checksums));
    image
}

#[cfg(test)]
mod tests {
    use super::super::hostile;
    use super::*;

    #[test]
    fn the_first_inputs_stand_for_media_that_open() {
        for (name, input) in seeds() {
            let (media, mut requests) = decode(&input);
            assert!(!requests.is_at_end(), "{name} has requests");
            assert_eq!(hostile::exercise(&media, &mut requests), Ok(()), "{name}");
        }
    }
}
