//! Writes that wait for the base.

use super::*;
use crate::pmem::IovBuf;
use crate::sim::plain::{BackgroundRuns, Plain};

fn plain(mode: CacheMode) -> Plain<SimPmem> {
    let base = vec![0; BLOCKS as usize * 512];
    let options = OpenOptions {
        settings: SettingChange::of(Setting::CacheMode, mode as u32),
        ..options(512, None)
    };
    Plain::new(
        SimPmem::new(DEVICE_SIZE_BYTES),
        base,
        options,
        BackgroundRuns::InDrains,
    )
    .unwrap()
}

fn write(plain: &mut Plain<SimPmem>, lba: u64, fill: u8) -> Status {
    let buf = IovBuf::new(&[fill; 512], &[]);
    plain.run(0, Op::Write(buf.cursor(), Fua::No), lba, 1)
}

#[test]
fn a_held_write_that_is_given_up_fails() {
    let mut plain = plain(CacheMode::Writethrough);
    // Nobody writes back: the request is given up in the end.
    assert_eq!(write(&mut plain, 3, 5), Status::Failed);
    // It is in the log all the same, and goes to the base some time.
    assert_eq!(plain.read(0, 3, 1), (Status::Success, vec![5; 512]));
    assert!(plain.drain());
    assert_eq!(plain.base[3 * 512..4 * 512], [5; 512]);
}

#[test]
fn a_held_write_completes_when_another_mode_is_asked_for() {
    let mut plain = plain(CacheMode::Writearound);
    let buf = IovBuf::new(&[7; 512], &[]);
    let io = HostIo {
        token: IoToken(9),
        op: Op::Write(buf.cursor(), Fua::No),
        lba: crate::units::Lba(8),
        len_blocks: 1,
    };
    plain.channel_mut(0).submit(io).unwrap();
    for _ in 0..10 {
        assert_eq!(plain.poll_channel(0), None);
    }
    // One that is under way can still not be aborted: it is in the log.
    assert!(!plain.channel_mut(0).abort(IoToken(9)));
    let change = SettingChange::of(Setting::CacheMode, CacheMode::Writeonly as u32);
    plain.cache.change_settings(&change).unwrap();
    assert_eq!(plain.poll_channel(0), Some(Status::Success));
    assert_eq!(plain.cache.mode_now(), CacheMode::Writeonly);
}
