//! Reads that meet a flaw of clean data while a channel has as many base reads as it can have.

use super::asking::Asking;
use super::*;
use crate::engine::channel::MISS_COUNT_MAX;
use crate::index::BlockMap;
use crate::pmem::IovBuf;
use crate::units::Page;

/// Pages 0 to 2 are read, and of page 1 something is wrong.
const LEN: u64 = 24;
/// Behind them each block is a miss of its own.
const OTHERS: u64 = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Poisoned,
    BitFlipped,
}

/// The three pages are cached as read fills on probation: the base holds what is there.
fn with_clean_pages(data_crc: DataCrc) -> Asking {
    let probation = ReadAdmission::Probation as u32;
    let settings = SettingChange::of(Setting::ReadAdmission, probation)
        .and(Setting::VerifyReads, u32::from(data_crc == DataCrc::On));
    let mut asking = Asking::open(OpenOptions {
        settings,
        ..options(512, Some(data_crc))
    });
    assert_eq!(asking.read(0, LEN), [(0, LEN)]);
    asking.answer(Ok(()));
    asking.poll();
    assert_eq!(asking.ended(), [Status::Success]);
    // Without memory for more: what is missed from now on is not rounded out.
    let mut asking = asking.beside(0);
    assert_eq!(asking.read(0, LEN), []);
    asking
}

fn damage_page_1(asking: &Asking, trouble: Trouble) {
    let cache = &asking.cache;
    let found = cache.index.lookup(cache.index.locate(Page(1))).unwrap();
    let BlockMap::Mapped(place) = found.map.block(0) else {
        panic!("page 1 is cached");
    };
    assert!(cache.is_clean(place));
    let off = cache.geometry.place_off(place).plus(512);
    match trouble {
        Trouble::Poisoned => cache.pmem.poison(off),
        Trouble::BitFlipped => cache.pmem.flip_bit(off, 3),
    }
}

/// As many misses as there can be, none of which goes together with another; what they ask the base for.
fn fill_up(asking: &mut Asking, bufs: &[IovBuf]) -> Vec<BaseRequest> {
    for (lba, buf) in (OTHERS..).zip(bufs) {
        asking.submit(buf, lba, 1);
    }
    let mut asked = Vec::new();
    while asked.len() < bufs.len() {
        assert!(!asking.poll().is_empty(), "there is room for more");
        asked.append(&mut asking.out.base);
    }
    asked
}

fn check_read_waits(data_crc: DataCrc, trouble: Trouble) {
    let mut asking = with_clean_pages(data_crc);
    let bufs: Vec<_> = (0..MISS_COUNT_MAX).map(|_| IovBuf::zeroed(512)).collect();
    let mut asked = fill_up(&mut asking, &bufs);
    damage_page_1(&asking, trouble);
    // In front of it another one waits for room.
    let first = IovBuf::zeroed(512);
    asking.submit(&first, OTHERS - 8, 1);
    let read = IovBuf::zeroed(LEN as usize * 512);
    asking.submit(&read, 0, LEN);
    for _ in 0..50 {
        assert_eq!(asking.poll(), [], "there is no room");
        assert_eq!(asking.ended(), [], "it waits");
    }
    // What has no flaw is served meanwhile.
    assert_eq!(asking.read(16, 8), []);
    assert_eq!(asking.ended(), [Status::Success]);

    // Room for one is the first one's, the next is its own.
    let mut served = Vec::new();
    for number in 1..=2 {
        asking.out.base = vec![asked.pop().unwrap()];
        asking.answer(Ok(()));
        let mut ended = Vec::new();
        // The room is free when what was brought is in the cache.
        for _ in 0..3 {
            served.extend(asking.poll());
            ended.extend(asking.ended());
            asked.append(&mut asking.out.base);
        }
        assert_eq!(ended, [Status::Success]);
        assert_eq!(served.len(), number, "{served:?}");
    }
    assert_eq!(served[0], (OTHERS - 8, 1));
    let (lba, len_blocks) = served[1];
    assert!(lba <= 8 && lba + len_blocks >= 16, "{served:?}");

    asking.out.base = asked;
    asking.answer(Ok(()));
    let mut ended = 0;
    while asking.channel.outstanding() > 0 {
        assert_eq!(asking.poll(), [], "nothing is asked for twice");
        assert!(asking.ended().iter().all(|end| *end == Status::Success));
        ended += asking.ended().len();
    }
    assert_eq!(ended, MISS_COUNT_MAX);
    assert!(bufs.iter().all(|buf| buf.bytes() == [7; 512]));
    assert_eq!(first.bytes(), [7; 512]);
    assert_eq!(read.bytes(), [7; LEN as usize * 512]);
    // However often it was met.
    let stats = asking.cache.stats();
    let flaws = (stats.poisoned_reads, stats.crc_errors);
    let is_poisoned = trouble == Trouble::Poisoned;
    assert_eq!(flaws, (u64::from(is_poisoned), u64::from(!is_poisoned)));
    assert_eq!(stats.failed, 0);
    assert_eq!(asking.cache.info().damaged, []);
}

#[test]
fn a_read_that_meets_a_flaw_without_room_for_a_base_read_waits_for_it() {
    check_read_waits(DataCrc::Off, Trouble::Poisoned);
    check_read_waits(DataCrc::On, Trouble::Poisoned);
    check_read_waits(DataCrc::On, Trouble::BitFlipped);
}
