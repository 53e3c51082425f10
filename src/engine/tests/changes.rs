//! What is changed in the superblock while in use outlives an orderly stop.

use super::*;
use crate::sim::plain;
use crate::units::Now;
use std::sync::Arc;

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
