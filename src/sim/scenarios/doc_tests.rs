//! Holds the table of `docs/TESTING.md` against the scenarios.

use super::ALL;
use std::collections::BTreeSet;
use std::path::Path;

/// The items of the list.
const ITEMS: std::ops::RangeInclusive<u32> = 1..=51;

/// The rows of the table: item, and the rest of the line.
fn rows() -> Vec<(u32, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/TESTING.md");
    let text = std::fs::read_to_string(path).unwrap();
    let row = |line: &str| {
        let (item, rest) = line.strip_prefix("| ")?.split_once(" | ")?;
        Some((item.parse().ok()?, rest.to_owned()))
    };
    text.lines().filter_map(row).collect()
}

#[test]
fn every_item_has_its_row_and_its_scenarios_in_it() {
    let rows = rows();
    let items: Vec<u32> = rows.iter().map(|(item, _)| *item).collect();
    assert_eq!(items, ITEMS.collect::<Vec<_>>());
    for scenario in ALL {
        let (_, row) = &rows[scenario.item as usize - 1];
        assert!(
            row.contains(&format!("`{}`", scenario.name)),
            "{scenario:?} is missing in its row"
        );
    }
}

#[test]
fn what_the_table_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut sources = String::new();
    let mut folders = vec![root.join("src"), root.join("test")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let is_source = path
                .extension()
                .is_some_and(|ext| ext == "rs" || ext == "py");
            if path.is_dir() {
                folders.push(path);
            } else if is_source {
                sources.push_str(&std::fs::read_to_string(path).unwrap());
            }
        }
    }
    for (item, row) in rows() {
        let names = row.split('`').skip(1).step_by(2);
        for name in names {
            let last = name.rsplit([':', '/']).next().unwrap_or(name);
            let known = root.join(name).exists()
                || ["fn", "def"]
                    .iter()
                    .any(|word| sources.contains(&format!("{word} {last}(")));
            assert!(known, "item {item} names {name}, which does not exist");
        }
    }
}

#[test]
fn names_are_different() {
    let names: BTreeSet<_> = ALL.iter().map(|scenario| scenario.name).collect();
    assert_eq!(names.len(), ALL.len());
}
