//! What counts as what.

use super::asking::Asking;
use super::*;

#[test]
fn a_read_that_fails_is_neither_a_hit_nor_a_miss() {
    let mut asking = Asking::new(SettingChange::default(), 0);
    assert_eq!(asking.read(0, 8), [(0, 8)]);
    asking.answer(Err(BaseError::Io));
    asking.poll();
    assert_eq!(asking.ended(), [Status::Failed]);
    asking.write(0, 8, 1);
    asking.read(0, 8);
    assert_eq!(asking.ended(), [Status::Success]);
    // Part of it would be a hit.
    assert_eq!(asking.read(0, 16), [(8, 8)]);
    asking.answer(Err(BaseError::Gone));
    asking.poll();
    assert_eq!(asking.ended(), [Status::Failed]);
    asking.cache.poison("a test");
    asking.read(0, 8);
    assert_eq!(asking.ended(), [Status::Failed]);
    let stats = asking.cache.stats();
    let reads = (
        stats.read_hits,
        stats.read_partial_hits,
        stats.read_misses,
        stats.read_bytes,
        (stats.read_pages, stats.read_missed_pages),
    );
    assert_eq!(reads, (1, 0, 0, 8 * 512, (1, 0)));
    assert_eq!(stats.failed, 3);
}
