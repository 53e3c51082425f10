//! What is kept of base reads goes through memory of the channel's own.

use super::asking::Asking;
use super::*;
use crate::pmem::{IovBuf, PadMemory};
use crate::units::{Lba, Now};
use std::sync::Arc;

/// Whether reads of these blocks find them in the cache, as the base has them.
#[track_caller]
fn assert_cached(asking: &mut Asking, blocks: &[(u64, u64)]) {
    for (lba, len_blocks) in blocks {
        assert_eq!(asking.read(*lba, *len_blocks), [], "block {lba} is cached");
        assert_eq!(asking.ended(), [Status::Success]);
        let bytes = asking.buf.bytes();
        let len_bytes = *len_blocks as usize * 512;
        assert!(bytes[..len_bytes].iter().all(|byte| *byte == 7), "{lba}");
    }
}

fn scribble(buf: &IovBuf) {
    buf.cursor().write_from(&vec![0xee; buf.len_bytes()]);
}

/// INV-READ-8.
#[test]
fn what_a_reader_does_to_its_memory_is_its_own_affair() {
    let mut asking = Asking::new(SettingChange::default(), 64);
    let [first, other] = [(); 2].map(|()| IovBuf::zeroed(16 * 512));
    asking.submit(&first, 16, 16);
    assert_eq!(asking.poll(), [(16, 16)]);
    let base = std::mem::take(&mut asking.out.base);
    // Another one joins.
    asking.submit(&other, 20, 12);
    assert_eq!(asking.poll(), []);
    asking.out.base = base;
    asking.answer(Ok(()));
    scribble(&first);
    assert_eq!(asking.poll(), []);
    assert_eq!(asking.ended(), [Status::Success; 2]);
    assert_eq!(first.bytes(), vec![7; 16 * 512], "it arrives last");
    assert_eq!(other.bytes()[..12 * 512], [7; 12 * 512]);
    assert_cached(&mut asking, &[(16, 16)]);
}

/// INV-READ-8.
#[test]
fn reads_into_one_place_bring_to_the_cache_what_is_theirs() {
    let mut asking = Asking::new(SettingChange::default(), 64);
    asking.write(40, 8, 9);
    let place = IovBuf::zeroed(8 * 512);
    // Two misses, which end in one poll with a hit.
    asking.submit(&place, 16, 8);
    asking.submit(&place, 24, 8);
    assert_eq!(asking.poll(), [(16, 8), (24, 8)]);
    for request in std::mem::take(&mut asking.out.base) {
        let BaseKind::Read(mut cursor) = request.kind else {
            panic!("a base read, not {request:?}")
        };
        // The base, unlike that of the others, has something else in each page.
        cursor.write_from(&[request.lba.0 as u8; 8 * 512]);
        asking.channel.on_base_done(request.op, Ok(()));
    }
    asking.submit(&place, 40, 8);
    assert_eq!(asking.poll(), []);
    assert_eq!(asking.ended(), [Status::Success; 3]);
    for (lba, content) in [(16, 16), (24, 24), (40, 9)] {
        assert_eq!(asking.read(lba, 8), []);
        assert_eq!(asking.buf.bytes()[..8 * 512], [content; 8 * 512], "{lba}");
    }
}

#[test]
fn a_miss_for_which_there_is_no_pad_is_its_readers_alone() {
    let mut asking = Asking::new(SettingChange::default(), 2);
    assert_eq!(asking.read(1, 1), [(0, 8)]);
    let first = std::mem::take(&mut asking.out.base);
    assert_eq!(asking.read(9, 1), [(8, 8)]);
    let second = std::mem::take(&mut asking.out.base);
    // Neither rounded out nor joined.
    for _ in 0..2 {
        assert_eq!(asking.read(17, 1), [(17, 1)]);
        asking.answer(Ok(()));
        assert_eq!(asking.poll(), []);
        assert_eq!(asking.ended(), [Status::Success]);
    }
    // One ends well, the other one is repeated without the rest of its page, in the same pad.
    asking.out.base = first;
    asking.answer(Ok(()));
    assert_eq!(asking.poll(), []);
    asking.out.base = second;
    asking.answer(Err(BaseError::Io));
    assert_eq!(asking.poll(), [(9, 1)]);
    let second = std::mem::take(&mut asking.out.base);
    assert_eq!(asking.read(33, 1), [(32, 8)]);
    let third = std::mem::take(&mut asking.out.base);
    assert_eq!(asking.read(41, 1), [(41, 1)]);
    asking.answer(Ok(()));
    assert_eq!(asking.poll(), []);
    asking.out.base = second;
    asking.answer(Ok(()));
    assert_eq!(asking.poll(), []);
    assert_eq!(asking.ended(), [Status::Success]);
    assert_eq!(asking.read(49, 1), [(48, 8)]);
    asking.out.base.extend(third);
    asking.answer(Ok(()));
    assert_eq!(asking.poll(), []);
    assert_cached(&mut asking, &[(0, 8), (9, 1), (32, 8), (48, 8)]);

    let mut asking = Asking::new(SettingChange::default(), 0);
    assert_eq!(asking.read(1, 1), [(1, 1)]);
}

/// INV-READ-4: whatever becomes of the cache, a reader and its pad wait for the base.
#[test]
fn a_pad_is_in_use_until_the_base_has_answered() {
    for result in [Ok(()), Err(BaseError::Gone)] {
        let mut asking = Asking::new(SettingChange::default(), 2);
        assert_eq!(asking.read(7, 2), [(0, 16)]);
        let base = std::mem::take(&mut asking.out.base);
        assert!(!asking.channel.abort(IoToken(1)));
        asking.channel.abort_waiting();
        assert_eq!(asking.read(20, 1), [(20, 1)], "the pad is taken");
        asking.answer(Ok(()));
        asking.cache.poison("for a test");
        assert_eq!(asking.poll(), []);
        assert_eq!(asking.ended().len(), 1, "the second alone");
        asking.out.base = base;
        asking.answer(result);
        assert_eq!(asking.poll(), [], "nothing is attempted any more");
        let status = if result.is_ok() {
            Status::Success
        } else {
            Status::Failed
        };
        assert_eq!(asking.ended(), [status]);
        assert_eq!(asking.channel.outstanding(), 0);
    }
}

#[test]
fn pads_that_are_abandoned_are_nobody_elses() {
    let mut asking = Asking::new(SettingChange::default(), 977);
    assert_eq!(asking.read(7, 2), [(0, 16)]);
    let base = std::mem::take(&mut asking.out.base);
    asking.channel.abandon_pads();
    asking.channel = asking.cache.channel().unwrap();
    // As many as no other test has: what was given back would be found again.
    let cache = Arc::clone(&asking.cache);
    let mut next = cache.channel_with(Some(PadMemory::from_heap(977))).unwrap();
    let buf = IovBuf::zeroed(512);
    let io = HostIo {
        token: IoToken(1),
        op: Op::Read(buf.cursor()),
        lba: Lba(33),
        len_blocks: 1,
    };
    next.submit(io).unwrap();
    asking.out.clear();
    next.poll(Now(0), &mut asking.out);
    let starts = |base: &[BaseRequest]| {
        let mut list = Vec::new();
        for request in base {
            if let BaseKind::Read(cursor) = request.kind {
                cursor.fill_iovecs(512, &mut list);
            }
        }
        list.iter()
            .map(|element| element.iov_base.addr())
            .collect::<Vec<_>>()
    };
    assert_eq!(asking.out.base.len(), 1);
    assert_ne!(starts(&base), starts(&asking.out.base));
}
