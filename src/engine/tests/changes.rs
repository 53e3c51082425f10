//! What is changed in the superblock while in use outlives an orderly stop.

use super::*;
use crate::recovery::OpenError;
use crate::sim::plain;
use crate::sim::pmem::{CrashPointHook, PoisonedStore};
use crate::units::{Now, PmemOff};
use std::sync::{Arc, Mutex};

static BASE: [u8; BLOCKS as usize * 512] = [0; BLOCKS as usize * 512];
/// The base has this size at first.
const BLOCKS_FIRST: u64 = BLOCKS / 2;

fn open(pmem: SimPmem, block_count: u64) -> Arc<Cache<SimPmem>> {
    let mut options = options(512, None);
    options.base.block_count = block_count;
    plain::open(pmem, &BASE, options).unwrap()
}

/// When the changes are made, seen from the stop.
#[derive(Clone, Copy, Debug)]
enum When {
    Before,
    /// While the background ends what it has begun.
    Within,
    /// When that has ended.
    After,
}

#[test]
fn an_option_or_a_growth_is_not_lost_in_an_orderly_stop() {
    for when in [When::Before, When::Within, When::After] {
        let cache = open(SimPmem::new(DEVICE_SIZE_BYTES), BLOCKS_FIRST);
        let mut background = cache.background().unwrap();
        let change = || {
            let change = SettingChange::of(Setting::GcPercent, 33);
            assert_eq!(cache.change_settings(&change), Ok(()));
            assert_eq!(cache.grow(BLOCKS), Ok(()));
        };
        if matches!(when, When::Before) {
            change();
        }
        background.stop();
        if matches!(when, When::Within) {
            change();
        }
        background.poll(Now(1), Budget::default(), &mut Outbox::new());
        assert_eq!(background.in_flight(), 0);
        drop(background);
        if matches!(when, When::After) {
            change();
        }
        cache.seal_streams();
        let image = cache.pmem.durable_image();
        let cache = open(SimPmem::from_image(image), BLOCKS);
        let percent = cache.info().settings.get(Setting::GcPercent);
        assert_eq!((percent, cache.block_count()), (33, BLOCKS), "{when:?}");
    }
}

#[test]
fn a_stop_that_takes_its_time_makes_changes_durable_at_once() {
    let cache = open(SimPmem::new(DEVICE_SIZE_BYTES), BLOCKS);
    let mut background = cache.background().unwrap();
    background.stop();
    let change = SettingChange::of(Setting::GcPercent, 33);
    cache.change_settings(&change).unwrap();
    background.poll(Now(1), Budget::default(), &mut Outbox::new());
    let killed = SimPmem::from_image(cache.pmem.durable_image());
    let percent = open(killed, BLOCKS).info().settings.get(Setting::GcPercent);
    assert_eq!(percent, 33);
}

/// INV-PAIR-3.
#[test]
fn a_change_is_not_stored_where_one_copy_is_damaged_and_the_other_cannot_be_read() {
    for (damaged, lost) in [(0, 32 << 10), (32 << 10, 0)] {
        let cache = open(SimPmem::new(DEVICE_SIZE_BYTES), BLOCKS);
        let mut background = cache.background().unwrap();
        cache.pmem.set_poisoned_store(PoisonedStore::Faults);
        cache.pmem.flip_bit(PmemOff(damaged + 20), 3);
        cache.pmem.poison(PmemOff(lost));
        let settings = SettingChange::of(Setting::GcPercent, 33).and(Setting::ScrubMibS, 0);
        cache.change_settings(&settings).unwrap();
        background.poll(Now(1), Budget::default(), &mut Outbox::new());
        assert!(!cache.has_failed());
        assert_eq!(cache.stats().metadata_errors, 1);
        assert_eq!(cache.changes_not_kept(), 1);
    }
}

/// A cut in a change leaves a whole copy, whichever was damaged before.
#[test]
fn a_damaged_copy_is_made_whole_before_a_change() {
    for damaged in [0, 32 << 10] {
        let cache = open(SimPmem::new(DEVICE_SIZE_BYTES), BLOCKS);
        let mut background = cache.background().unwrap();
        cache.pmem.flip_bit(PmemOff(damaged + 20), 3);
        let images = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&images);
        let hook: CrashPointHook = Box::new(move |state, _| {
            seen.lock().unwrap().push(state.durable().to_vec());
        });
        cache.pmem.on_crash_point(Some(hook));
        let settings = SettingChange::of(Setting::GcPercent, 33).and(Setting::ScrubMibS, 0);
        cache.change_settings(&settings).unwrap();
        background.poll(Now(1), Budget::default(), &mut Outbox::new());
        cache.pmem.on_crash_point(None);
        let images = images.lock().unwrap();
        assert!(images.len() > 2);
        for image in images.iter() {
            open(SimPmem::from_image(image.clone()), BLOCKS);
        }
    }
}

#[test]
fn a_cache_that_has_failed_takes_no_change() {
    let cache = open(SimPmem::new(DEVICE_SIZE_BYTES), BLOCKS_FIRST);
    let before = cache.info().settings;
    cache.poison("a test");
    let change = SettingChange::of(Setting::GcPercent, 33);
    assert_eq!(cache.change_settings(&change), Err(ChangeError::Failed));
    assert_eq!(cache.grow(BLOCKS), Err(GrowError::Failed));
    assert_eq!(cache.info().settings, before);
}

/// A value that is given is compared with those that the cache keeps, or is to have, and not with what a new one would have.
#[test]
fn a_setting_goes_with_what_the_cache_keeps() {
    let open_with = |pmem, change| {
        let mut options = options(512, None);
        (options.base.block_count, options.settings) = (BLOCKS, change);
        plain::open(pmem, &BASE, options)
    };
    let both = SettingChange::of(Setting::DirtyHighPercent, 60);
    let both = both.and(Setting::DirtyLowPercent, 10);
    let cache = open_with(SimPmem::new(DEVICE_SIZE_BYTES), both).unwrap();
    let image = cache.pmem.durable_image();
    let again = |setting, value| {
        let pmem = SimPmem::from_image(image.clone());
        let cache = open_with(pmem, SettingChange::of(setting, value))?;
        let settings = cache.info().settings;
        let of = |setting| settings.get(setting);
        Ok((of(Setting::DirtyLowPercent), of(Setting::DirtyHighPercent)))
    };
    // Above what a new cache has for the other, and below.
    assert_eq!(again(Setting::DirtyLowPercent, 50), Ok((50, 60)));
    assert_eq!(again(Setting::DirtyHighPercent, 15), Ok((10, 15)));
    let refused: Result<_, OpenError> = again(Setting::DirtyLowPercent, 60);
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("60"), "{text}");
    let new = open_with(
        SimPmem::new(DEVICE_SIZE_BYTES),
        SettingChange::of(Setting::DirtyLowPercent, 50),
    );
    let text = new.unwrap_err().to_string();
    assert!(text.contains("50"), "{text}");
}
