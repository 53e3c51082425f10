//! Which misses are rounded out to whole pages.

use super::asking::Asking;
use super::*;

#[test]
fn only_what_may_become_a_fill_is_rounded_out() {
    let asked = |mode: CacheMode, lba, len_blocks| {
        let settings = SettingChange::of(Setting::CacheMode, mode as u32);
        Asking::new(settings, 64).read(lba, len_blocks)
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
