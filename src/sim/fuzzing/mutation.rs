//! Valid media, then changes to their structures that get past the checksums.

use super::hostile::Media;
use super::layout::{KsetPlace, Layout, open_options};
use super::trace;
use crate::engine::{DataCrc, WritebackOrder};
use crate::media::{COUNTER_MAX, KEYS_START_BYTES, KSET_KEYS_MAX, Spot};
use crate::pmem::PmemRead;
use crate::sim::image::ImagePmem;
use crate::sim::machine::{Machine, Setup};
use crate::sim::prng::Prng;
use crate::sim::script::{self, Weights};
use crate::units::{PmemOff, SegId};
use std::sync::OnceLock;

const MUTATIONS_MAX: u64 = 8;

/// One change. Where it depends on chance that is decided when it is drawn, so that its `Debug` output tells
/// all of it.
#[derive(Clone, Copy, Debug)]
enum Mutation {
    /// A number at a byte of a structure.
    Set {
        spot: Spot,
        at: usize,
        width: usize,
        value: u64,
    },
    /// One structure over another of its kind.
    Copy { from: Spot, to: Spot },
    /// A structure as it was earlier.
    Older(Spot),
    /// Bytes of a structure turn to zeroes.
    Zero { spot: Spot, at: usize, len: usize },
    /// A kset once more, behind the last one of a segment, numbered as the next one there.
    Append {
        kset: Spot,
        to: SegId,
        add_to_seq: u64,
    },
    /// A bit flips, and no checksum is made good afterwards.
    Damage { off: PmemOff, bit: u64 },
}

/// Media as a history left them, and as they were in the middle of it.
#[derive(Debug)]
struct History {
    setup: Setup,
    layout: Layout,
    earlier: Vec<u8>,
    image: Vec<u8>,
    base: Vec<u8>,
    places: Vec<KsetPlace>,
    /// By kind: superblocks, tails, infos of segments, ksets.
    spots: [Vec<Spot>; 4],
}

fn histories() -> &'static [History] {
    static HISTORIES: OnceLock<Vec<History>> = OnceLock::new();
    HISTORIES.get_or_init(|| {
        let small = Setup {
            yield_percent: 0,
            ..Setup::default()
        };
        let large = Setup {
            block_size_bytes: 4096,
            block_count: 24,
            data_crc: DataCrc::On,
            gc_percent: 30,
            ..small.clone()
        };
        let relaxed = Setup {
            data_crc: DataCrc::On,
            order: WritebackOrder::Relaxed,
            gc_percent: 0,
            segment_count: 6,
            ..small.clone()
        };
        let setups = [small, large, relaxed];
        setups.into_iter().zip(1..).map(run_history).collect()
    })
}

fn run_history((setup, seed): (Setup, u64)) -> History {
    let weights = Weights {
        crash: 0,
        fault: 0,
        key_loss: 0,
        busy_percent: 0,
    };
    let mut prng = Prng::new(seed);
    let mut run = |machine, count| {
        let mut steps = script::draw(&mut prng, &setup, weights, count).into_iter();
        let machine = steps.try_fold(machine, script::apply);
        let machine = machine.expect("the history is valid");
        machine.settle().expect("the history is valid");
        let image = machine.pmem().live_image();
        (machine, image)
    };
    let machine = Machine::new(setup.clone(), seed, None).expect("the device is blank");
    let (machine, earlier) = run(machine, 80);
    let (machine, image) = run(machine, 40);
    let base = machine.with_outside(|outside| outside.base.current_image());
    let layout = Layout::of(&setup);
    let device = ImagePmem::new(image.clone());
    let mut places = layout.kset_places(&device);
    let spot = |place: &KsetPlace| layout.kset(&device, *place);
    places.retain(|place| spot(place).is_some_and(|kset| kset.is_sealed(&device)));
    let infos = layout
        .segments()
        .flat_map(|id| [layout.info(id, 0), layout.info(id, 1)]);
    let ksets = places.iter().filter_map(spot);
    History {
        spots: [
            [0, 1].map(Spot::superblock).to_vec(),
            [0, 1]
                .map(|copy| Spot::tails(&layout.checksums, copy))
                .to_vec(),
            infos.collect(),
            ksets.collect(),
        ],
        base: base.blocks(0, setup.block_count).to_vec(),
        layout,
        earlier,
        image,
        places,
        setup,
    }
}

/// Media with some changes.
pub(super) fn draw(prng: &mut Prng) -> Media {
    let histories = histories();
    let history = &histories[prng.index(histories.len())];
    let count = prng.between(0, MUTATIONS_MAX);
    let mutations: Vec<Mutation> = (0..count).map(|_| history.mutation(prng)).collect();
    trace("mutations", &mutations);
    history.media_after(&mutations)
}

impl History {
    fn media_after(&self, mutations: &[Mutation]) -> Media {
        let image = ImagePmem::new(self.image.clone());
        let mut places = self.places.clone();
        for mutation in mutations {
            self.apply(&image, *mutation, &mut places);
        }
        self.layout.seal(&image, &places);
        for mutation in mutations {
            if let Mutation::Damage { off, bit } = mutation {
                let mut byte = [0];
                // An image is never poisoned.
                if image.read(*off, &mut byte).is_ok() {
                    image.patch(*off, &[byte[0] ^ 1 << bit]);
                }
            }
        }
        Media {
            image,
            base: self.base.clone(),
            options: open_options(&self.setup),
        }
    }

    fn mutation(&self, prng: &mut Prng) -> Mutation {
        // Mostly ksets, of which there are most.
        let kind = prng.pick(&[3, 3, 3, 2, 2, 1, 1, 0]);
        let spots = &self.spots[kind];
        let spot = prng.pick(spots);
        match prng.below(10) {
            0..=4 => {
                let width = prng.pick(&[4, 8, 1]);
                Mutation::Set {
                    spot,
                    at: prng.index(spot.len_bytes / width) * width,
                    width,
                    value: self.value(prng),
                }
            }
            5 => Mutation::Copy {
                from: spot,
                to: prng.pick(spots),
            },
            6 => Mutation::Older(spot),
            7 => {
                let at = prng.index(spot.len_bytes);
                let len = prng.between(1, (spot.len_bytes - at) as u64) as usize;
                Mutation::Zero { spot, at, len }
            }
            8 => Mutation::Append {
                kset: prng.pick(&self.spots[3]),
                to: SegId(prng.below(self.setup.segment_count) as u32),
                add_to_seq: prng.pick(&[0, 1, 100, 1 << 40]),
            },
            _ => Mutation::Damage {
                off: spot.off.plus(prng.below(spot.len_bytes as u64)),
                bit: prng.below(8),
            },
        }
    }

    /// A number that is likely to be wrong in an interesting way.
    fn value(&self, prng: &mut Prng) -> u64 {
        let segment = self.setup.segment_size_bytes;
        let special = [
            0,
            self.setup.block_count,
            self.setup.segment_count,
            segment,
            segment / u64::from(self.setup.block_size_bytes),
            self.setup.device_size_bytes(),
            u64::from(KEYS_START_BYTES),
            KSET_KEYS_MAX as u64,
            COUNTER_MAX,
            u64::from(u32::MAX),
            i64::MAX as u64,
            u64::MAX,
            u64::from(u32::MAX) + 1,
        ];
        match prng.below(4) {
            0 => prng.below(256),
            1 => prng.next_u64(),
            2 => 1 << prng.below(64),
            _ => prng
                .pick(&special)
                .wrapping_add(prng.below(5))
                .wrapping_sub(2),
        }
    }

    fn apply(&self, image: &ImagePmem, mutation: Mutation, places: &mut Vec<KsetPlace>) {
        match mutation {
            Mutation::Set {
                spot,
                at,
                width,
                value,
            } => image.patch(spot.off.plus(at as u64), &value.to_le_bytes()[..width]),
            Mutation::Copy { from, to } => {
                let bytes = image.bytes();
                let len = from.size_bytes().min(to.size_bytes());
                image.patch(to.off, &bytes[from.off.0 as usize..][..len]);
            }
            Mutation::Older(spot) => {
                let bytes = &self.earlier[spot.off.0 as usize..][..spot.size_bytes()];
                image.patch(spot.off, bytes);
            }
            Mutation::Zero { spot, at, len } => {
                image.patch(spot.off.plus(at as u64), &vec![0; len])
            }
            Mutation::Append {
                kset,
                to,
                add_to_seq,
            } => places.extend(self.append(image, kset, to, add_to_seq, places)),
            // Once everything is sealed.
            Mutation::Damage { .. } => {}
        }
    }

    fn append(
        &self,
        image: &ImagePmem,
        kset: Spot,
        to: SegId,
        add_to_seq: u64,
        places: &[KsetPlace],
    ) -> Option<KsetPlace> {
        let there = places.iter().filter(|place| place.0 == to);
        let (index, last) = there.enumerate().last()?;
        let last_len = self.layout.kset(image, *last)?.size_bytes();
        let place = (to, last.1 + last_len as u32);
        let mut bytes = image.bytes()[kset.off.0 as usize..][..kset.size_bytes()].to_vec();
        Spot::renumber_kset(&mut bytes, index as u32 + 1, add_to_seq);
        let room = self
            .setup
            .segment_size_bytes
            .checked_sub(u64::from(place.1))?;
        bytes.truncate(room as usize);
        let off = self
            .layout
            .geometry
            .segment_off(to)
            .plus(u64::from(place.1));
        image.patch(off, &bytes);
        Some(place)
    }
}

#[cfg(test)]
mod tests {
    use super::super::hostile;
    use super::*;

    /// What opening the first history says after some changes.
    fn outcome(change: impl Fn(&History) -> Vec<Mutation>) -> Result<(), String> {
        let history = &histories()[0];
        let media = history.media_after(&change(history));
        hostile::exercise(&media, &mut Prng::new(1))
    }

    fn set(spot: Spot, at: usize, value: u64) -> Mutation {
        Mutation::Set {
            spot,
            at,
            width: 8,
            value,
        }
    }

    #[test]
    fn unchanged_media_open() {
        for history in histories() {
            let media = history.media_after(&[]);
            assert_eq!(hostile::exercise(&media, &mut Prng::new(1)), Ok(()));
        }
    }

    #[test]
    fn hostile_numbers_get_past_the_checksums() {
        // The dirty tail; the address in the first key.
        let tails = |h: &History| {
            h.spots[1]
                .iter()
                .map(|spot| set(*spot, 16, u64::MAX))
                .collect()
        };
        let refusal = outcome(tails).unwrap_err();
        assert!(refusal.contains("dirty_tail"), "{refusal}");
        // Where the base holds all that is in the segment, it costs the segment only.
        let refusals = (0..histories()[0].spots[3].len())
            .filter_map(|at| outcome(|h: &History| vec![set(h.spots[3][at], 32, u64::MAX)]).err());
        let mut refusals = refusals.peekable();
        assert!(refusals.peek().is_some(), "something is dirty");
        refusals.for_each(|refusal| {
            assert!(refusal.contains("a key is out of range"), "{refusal}");
        });
    }

    #[test]
    fn a_kset_can_be_appended_to_another_segment() {
        let found_twice = |to: SegId, kset: Spot| {
            let add_to_seq = 0;
            let refusal = outcome(|_| {
                vec![Mutation::Append {
                    kset,
                    to,
                    add_to_seq,
                }]
            });
            refusal.is_err_and(|refusal| refusal.contains("both hold a kset"))
        };
        // Where it may be depends on the order of the segments.
        let history = &histories()[0];
        let ksets = &history.spots[3];
        let mut segments = history.layout.segments();
        assert!(segments.any(|to| ksets.iter().any(|kset| found_twice(to, *kset))));
    }
}
