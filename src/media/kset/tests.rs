//! What a key's numbers are held against.

use super::*;

const BASE_BLOCK_COUNT: u64 = 1 << 16;
/// Behind ksets of several sizes: of one whose end is no end of a block, and of one whose end is.
const KSETS: [(u32, u32); 2] = [(8192 + 64, 192), (8192, 4096)];

/// A key that is in range, with its first payload where the first block behind the keys begins.
fn good(kind: KeyKind, bounds: &KeyBounds) -> KeyOnMedia {
    let place = if kind.has_payload() {
        bounds.place_min as u32
    } else {
        0
    };
    KeyOnMedia {
        lba: 800.into(),
        len_blocks: 1.into(),
        place: place.into(),
        crc: 5.into(),
        kind: kind.code(),
        rsv: [0; 3],
    }
}

fn for_all_bounds(check: impl Fn(&Geometry, &Kset, &KeyBounds)) {
    for block_size in [512, 4096] {
        let geometry = Geometry::plan(64 << 20, 1 << 20, block_size).unwrap();
        let checksums = Checksums::new([7; 16]);
        let context = KsetContext::new(
            &geometry,
            BASE_BLOCK_COUNT,
            &checksums,
            SegId(1),
            Generation::FIRST,
        );
        for (off, size_bytes) in KSETS {
            let kset = Kset {
                kset_index: 0,
                seq: Seq(1),
                epoch: Epoch(1),
                off,
                size_bytes,
                key_count: 1,
                proof: Proof::Fence,
            };
            check(&geometry, &kset, &KeyBounds::of(&context, &kset));
        }
    }
}

fn accepted(bounds: &KeyBounds, media: &KeyOnMedia) -> Option<Key> {
    let (key, is_good) = bounds.decode(media);
    is_good.then_some(key)
}

#[test]
fn a_payload_lies_behind_the_keys_and_in_the_segment() {
    for_all_bounds(|geometry, kset, bounds| {
        let block_bytes = geometry.bytes(1);
        let keys_end = u64::from(kset.off + kset.size_bytes);
        let lens = 1..=u64::from(geometry.blocks_per_page());
        for (kind, len) in lens.flat_map(|len| [(KeyKind::Data, len), (KeyKind::Fill, len)]) {
            let place_of = |place: u64| {
                let media = KeyOnMedia {
                    len_blocks: (len as u32).into(),
                    place: (place as u32).into(),
                    ..good(kind, bounds)
                };
                accepted(bounds, &media).map(|key| u64::from(key.payload_off))
            };
            let segment_blocks = geometry.segment_size_bytes() / block_bytes;
            for place in 0..=segment_blocks {
                let off = place * block_bytes;
                let end = off + len * block_bytes;
                let is_in = keys_end <= off && end <= geometry.segment_size_bytes();
                assert_eq!(
                    place_of(place),
                    is_in.then_some(off),
                    "{kind:?} {place}+{len}"
                );
            }
            assert_eq!(place_of(u64::from(u32::MAX)), None);
        }
    });
}

#[test]
fn a_payload_lies_in_one_page() {
    for_all_bounds(|geometry, _, bounds| {
        let per_page = u64::from(geometry.blocks_per_page());
        for lba in 800..800 + 2 * per_page {
            for len in 1..=2 * per_page {
                let media = KeyOnMedia {
                    lba: lba.into(),
                    len_blocks: (len as u32).into(),
                    ..good(KeyKind::Data, bounds)
                };
                let is_in_one = lba / per_page == (lba + len - 1) / per_page;
                assert_eq!(bounds.decode(&media).1, is_in_one, "{lba}+{len}");
            }
        }
    });
}

#[test]
fn what_is_cleared_has_no_place_and_is_not_too_long() {
    for_all_bounds(|geometry, _, bounds| {
        let most = (CLEAR_SIZE_MAX_BYTES / geometry.bytes(1)) as u32;
        for kind in [KeyKind::Zeroes, KeyKind::Unmap] {
            let key = |len_blocks: u32, place: u32| {
                let media = KeyOnMedia {
                    len_blocks: len_blocks.into(),
                    place: place.into(),
                    ..good(kind, bounds)
                };
                accepted(bounds, &media)
            };
            assert_eq!(key(most, 0).map(|key| key.kind), Some(kind));
            assert_eq!(key(most + 1, 0), None);
            assert_eq!(key(u32::MAX, 0), None);
            assert_eq!(key(1, 1), None);
            assert_eq!(key(1, bounds.place_min as u32), None);
        }
    });
}

#[test]
fn a_key_lies_on_the_base_and_has_a_kind() {
    for_all_bounds(|_, _, bounds| {
        for kind in [KeyKind::Data, KeyKind::Zeroes] {
            let key = |lba: u64, len_blocks: u32| {
                let media = KeyOnMedia {
                    lba: lba.into(),
                    len_blocks: len_blocks.into(),
                    ..good(kind, bounds)
                };
                bounds.decode(&media).1
            };
            assert!(key(BASE_BLOCK_COUNT - 1, 1));
            assert!(!key(BASE_BLOCK_COUNT, 1) && !key(BASE_BLOCK_COUNT - 1, 2));
            assert!(!key(u64::MAX, 1) && !key(u64::MAX - 1, 1));
            assert!(!key(800, 0) && !key(0, 0) && !key(BASE_BLOCK_COUNT, 0));
        }
        for code in 0..=u8::MAX {
            let media = KeyOnMedia {
                kind: code,
                ..good(KeyKind::Data, bounds)
            };
            // The others have no payload.
            assert_eq!(bounds.decode(&media).1, matches!(code, 1 | 2));
        }
    });
}

#[test]
fn what_lies_in_one_piece_is_cut_where_pages_end() {
    let geometry = Geometry::plan(64 << 20, 1 << 20, 512).unwrap();
    let mut builder = KsetBuilder::default();
    let key = Key {
        lba: Lba(5),
        len_blocks: 20,
        kind: KeyKind::Fill,
        payload_off: 1 << 16,
        crc: 0,
    };
    builder.push_pages(&key, &geometry);
    let cut: Vec<_> = builder.keys(geometry.block_shift()).collect();
    let of = |lba, len_blocks, before: u32| Key {
        lba: Lba(lba),
        len_blocks,
        payload_off: (1 << 16) + before * 512,
        ..key
    };
    assert_eq!(
        cut,
        [of(5, 3, 0), of(8, 8, 3), of(16, 8, 11), of(24, 1, 19)]
    );
}
