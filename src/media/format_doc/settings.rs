//! The settings in the superblock.

use super::{le32, stored, superblock, table};
use crate::engine::{
    SETTING_SLOT_COUNT, SETTINGS, Setting, SettingChange, SettingValueKind, SettingValues,
};

#[test]
fn settings_are_those_of_the_code() {
    let rows = table("## Settings", &["slot", "name", "values", "default"]);
    let expected: Vec<Vec<String>> = SETTINGS
        .iter()
        .map(|info| {
            let (values, default) = match info.kind {
                SettingValueKind::Number { min, max } => {
                    (format!("{min} to {max}"), info.default.to_string())
                }
                SettingValueKind::Words(words) => {
                    let words: Vec<_> = (words.iter().zip(0..))
                        .map(|(word, value)| format!("{value} {word}"))
                        .collect();
                    (words.join(", "), info.default.to_string())
                }
                SettingValueKind::Flag => ("0 false, 1 true".to_owned(), info.default.to_string()),
            };
            let slot = info.slot.to_string();
            vec![slot, info.name.to_owned(), values, default]
        })
        .collect();
    assert_eq!(rows, expected);
}

#[test]
fn a_setting_is_stored_where_the_document_says() {
    let mut superblock = superblock();
    let mut slots = [0; SETTING_SLOT_COUNT];
    // The last slot, which nobody knows yet, and the two that have fields of their own.
    slots[29] = 0x0102_0304;
    superblock.settings = SettingValues::from_slots(slots)
        .unwrap()
        .with(&SettingChange::of(Setting::GcPercent, 42))
        .unwrap();
    let bytes = stored(&superblock);
    assert_eq!(le32(&bytes, 392 + 29 * 4), 0x0102_0304);
    assert_eq!((bytes[100], le32(&bytes, 392)), (42, 0));
}
