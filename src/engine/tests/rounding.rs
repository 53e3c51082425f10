//! Which misses are rounded out to whole pages, and what becomes of their memory.

use super::asking::Asking;
use super::*;
use crate::pmem::{IovBuf, PadMemory};
use crate::units::{Lba, Now};
use std::sync::Arc;

#[test]
fn only_what_may_become_a_fill_is_rounded_out() {
    let asked = |mode: CacheMode, lba, len_blocks| {
        let settings = SettingChange::of(Setting::CacheMode, mode as u32);
        Asking::new(settings, 4).read(lba, len_blocks)
    };
    for mode in CacheMode::ALL {
        let expected = match mode {
            CacheMode::Passthrough | CacheMode::Writeonly => (7, 8),
            _ => (0, 16),
        };
        assert_eq!(asked(mode, 7, 8), [expected], "{mode:?}");
    }
    // A write has at most 32 blocks here, and so has what becomes a fill; rounded out it may have two pages more.
    assert_eq!(asked(CacheMode::Writeback, 4, 24), [(0, 32)]);
    assert_eq!(asked(CacheMode::Writeback, 4, 30), [(0, 40)]);
    assert_eq!(asked(CacheMode::Writeback, 4, 40), [(4, 40)]);
    assert_eq!(asked(CacheMode::Writeback, 8, 16), [(8, 16)]);
}

#[test]
fn blocks_that_are_pages_need_no_pads() {
    let open = |block_size| {
        let base = vec![0; BLOCKS as usize * block_size as usize];
        let rig = Rig::open(
            SimPmem::new(DEVICE_SIZE_BYTES),
            base,
            options(block_size, None),
        );
        rig.unwrap().cache().pads_size_bytes()
    };
    assert_eq!(open(4096), 0);
    assert!(open(512) > 0);
}

#[test]
fn a_miss_for_which_there_is_no_pad_is_not_rounded_out() {
    let mut asking = Asking::new(SettingChange::default(), 2);
    assert_eq!(asking.read(1, 1), [(0, 8)]);
    let first = std::mem::take(&mut asking.out.base);
    assert_eq!(asking.read(9, 1), [(8, 8)]);
    let second = std::mem::take(&mut asking.out.base);
    assert_eq!(asking.read(17, 1), [(17, 1)]);
    asking.answer(Ok(()));
    assert_eq!(asking.poll(), []);
    // One ends well, the other one is repeated without its pad: both pads are free again.
    asking.out.base = first;
    asking.answer(Ok(()));
    assert_eq!(asking.poll(), []);
    asking.out.base = second;
    asking.answer(Err(BaseError::Io));
    assert_eq!(asking.poll(), [(9, 1)]);
    let second = std::mem::take(&mut asking.out.base);
    assert_eq!(asking.read(33, 1), [(32, 8)]);
    assert_eq!(asking.read(41, 1), [(40, 8)]);
    asking.out.base = second;
    asking.answer(Ok(()));
    assert_eq!(asking.read(49, 1), [(49, 1)]);
    assert_eq!(asking.ended(), [Status::Success]);

    let mut asking = Asking::new(SettingChange::default(), 0);
    assert_eq!(asking.read(1, 1), [(1, 1)]);

    let mut asking = Asking::new(SettingChange::default(), 2);
    let cuts: Vec<usize> = (1..64).map(|cut| cut * 8).collect();
    let shredded = IovBuf::zeroed(512);
    let shredded = IovBuf::new(&shredded.bytes(), &cuts);
    asking.submit(&shredded, 1, 1);
    assert_eq!(asking.poll(), [(1, 1)]);
}

/// INV-READ-4: whatever becomes of the cache, a reader and its pad wait for the base.
#[test]
fn a_pad_is_in_use_until_the_base_has_answered() {
    for result in [Ok(()), Err(BaseError::Gone)] {
        let mut asking = Asking::new(SettingChange::default(), 1);
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
            .map(|element| element.iov_base.addr() & !8191)
            .collect::<Vec<_>>()
    };
    assert_eq!(asking.out.base.len(), 1);
    assert_ne!(starts(&base), starts(&asking.out.base));
}
