//! Rules of the project that no compiler knows: plain scanning of the files that git has or would take.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

const FILE_LINES_MAX: usize = 600;
/// Files that were longer when the rule came, with what they had then: they may shrink, not grow.
const LONGER_FILES: &[(&str, usize)] = &[];
/// What may lie at the top, besides dot files.
const TOP: &str = "Cargo.lock Cargo.toml LICENSE Makefile README.md benches build.rs clippy.toml \
                   docs fuzz rpc rustfmt.toml spdk-sys src test";
/// Where code may be unsafe.
const ISLANDS: &[&str] = &[
    "src/pmem/",
    "src/spdk/",
    "spdk-sys/",
    "fuzz/",
    "test/",
    "benches/ways.rs",
];
/// Files of `src` that are for tests, or read by them, besides those named `tests`.
const TEST_FILES: &[&str] = &[
    "src/sim/",
    "src/engine/tests/",
    "src/media/format_doc.rs",
    "src/media/format_doc/",
    "src/media/seal.rs",
];
/// `unwrap` and `expect` elsewhere: file, a part of the line, why it does no harm.
const UNWRAPS: &[(&str, &str, &str)] = &[
    ("src/pmem/heap.rs", "smaller than the address", "for tests"),
    ("src/pmem/heap.rs", "there until drop", "for tests"),
    (
        "src/pmem/mapped.rs",
        "a kernel that this CPU has",
        "for tests",
    ),
];
/// Traces of work that is not done; without the bars, so that this file may say them.
const UNFINISHED: &[&str] = &["to|do!(", "unimplemen|ted!(", "db|g!(", "FIX|ME", "XX|X:"];

/// Text by path from the top.
type Files = BTreeMap<String, String>;

fn files() -> Files {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Whoever owns the clone: nothing of it is run.
    let args = "-c safe.directory=* ls-files --cached --others --exclude-standard -z";
    let mut git = Command::new("git");
    let listed = git.args(args.split(' ')).current_dir(root).output();
    let listed = listed.expect("git is there").stdout;
    let names = String::from_utf8(listed).expect("names are UTF-8");
    let read = |name: &str| {
        Some((
            name.to_owned(),
            std::fs::read_to_string(root.join(name)).ok()?,
        ))
    };
    let files: Files = names.split_terminator('\0').filter_map(read).collect();
    assert!(files.contains_key("Cargo.toml"), "git knows no files here");
    files
}

/// Everything that is wrong, at once.
fn report(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n  {}\n", wrong.join("\n  "));
}

fn starts_with_any(name: &str, prefixes: &[&str]) -> bool {
    prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// The code of a Rust file, and its tests: those come last.
fn code_and_tests<'a>(name: &str, text: &'a str) -> (&'a str, &'a str) {
    if !name.starts_with("src/") || starts_with_any(name, TEST_FILES) || name.ends_with("tests.rs")
    {
        return ("", text);
    }
    let tests = text.find("#[cfg(test)]\nmod tests {");
    text.split_at(tests.unwrap_or(text.len()))
}

fn rust(files: &Files) -> impl Iterator<Item = (&str, &str)> {
    let all = files.iter().map(|(name, text)| (&**name, &**text));
    all.filter(|(name, _)| name.ends_with(".rs"))
}

/// Numbered lines that are not comments.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = (1..).zip(text.lines());
    lines.filter(|(_, line)| !line.trim_start().starts_with("//"))
}

/// The ids in a text. `INV-LOG-2 to INV-LOG-4` stands for three.
fn ids(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut last = ("", 0, 0);
    for (at, _) in text.match_indices("INV-") {
        let rest = &text[at + 4..];
        let end_of =
            |text: &str, inside: fn(char) -> bool| text.find(|c| !inside(c)).unwrap_or(text.len());
        let (area, rest) = rest.split_at(end_of(rest, |c| c.is_ascii_uppercase()));
        let digits = rest.strip_prefix('-').unwrap_or("");
        let digits = &digits[..end_of(digits, |c| c.is_ascii_digit())];
        let Ok(number) = digits.parse::<u32>() else {
            continue;
        };
        let (from_area, from, end) = last;
        let is_range = from_area == area && text[end..at].trim() == "to";
        let first = if is_range { from } else { number };
        found.extend((first..=number).map(|number| format!("INV-{area}-{number}")));
        last = (area, number, at + 4 + area.len() + 1 + digits.len());
    }
    found
}

/// The table of invariants: id, and what the row has in backquotes.
fn invariants(files: &Files) -> BTreeMap<String, Vec<&str>> {
    let mut found = BTreeMap::new();
    for line in files["docs/ARCHITECTURE.md"].lines() {
        let Some((id, rest)) = line
            .strip_prefix("| INV-")
            .and_then(|row| row.split_once(" |"))
        else {
            continue;
        };
        let names = rest.split('`').skip(1).step_by(2).collect();
        let before = found.insert(format!("INV-{id}"), names);
        assert!(before.is_none(), "INV-{id} is listed twice");
    }
    assert!(found.len() > 30, "the table of invariants was not found");
    found
}

#[test]
fn every_invariant_is_asserted_and_tested_under_its_id() {
    let files = files();
    let listed = invariants(&files);
    let (mut in_code, mut in_tests) = (BTreeSet::new(), BTreeSet::new());
    let mut wrong = Vec::new();
    for (name, text) in rust(&files).filter(|(name, _)| *name != "test/tidy.rs") {
        let (code, tests) = code_and_tests(name, text);
        for id in ids(text).iter().filter(|id| !listed.contains_key(*id)) {
            wrong.push(format!("{id} in {name} is not in docs/ARCHITECTURE.md"));
        }
        in_code.extend(ids(code));
        in_tests.extend(ids(tests));
    }
    for (id, names) in &listed {
        if !in_code.contains(id) {
            wrong.push(format!("{id}: no assertion and no comment in src names it"));
        }
        if !in_tests.contains(id) {
            wrong.push(format!("{id}: no test names it"));
        }
        for name in names.iter().filter(|name| name.ends_with(".rs")) {
            if !files.get(*name).is_some_and(|text| ids(text).contains(id)) {
                wrong.push(format!(
                    "{id}: the table names {name}, which does not name it"
                ));
            }
        }
    }
    report(&wrong);
}

#[test]
fn names_in_documents_and_comments_exist() {
    let files = files();
    let functions: String = files.values().flat_map(|text| text.lines()).collect();
    let mut wrong = Vec::new();
    for (name, text) in &files {
        let is_doc = name.ends_with(".md");
        if !is_doc && !name.ends_with(".rs") && name != "Makefile" {
            continue;
        }
        for word in text.split(|c: char| !c.is_alphanumeric() && !"/._-".contains(c)) {
            let word = word.trim_end_matches('.');
            let is_path = starts_with_any(word, &["src/", "docs/", "test/"]);
            let is_file = word.ends_with(".md") || word.ends_with(".rs");
            if is_path && is_file && !files.contains_key(word) {
                wrong.push(format!("{name} names {word}"));
            }
            // Names of tests are sentences, those of RPC methods begin with bdev. Figures have names as long.
            let is_test = is_doc
                && name != "docs/PERFORMANCE.md"
                && word.matches('_').count() > 4
                && !word.starts_with("bdev");
            if is_test && !functions.contains(&format!(" {word}(")) {
                wrong.push(format!("{name} names a test {word}"));
            }
        }
        let dir = Path::new(name).parent().expect("a file has a folder");
        let links = text.split("](").skip(1).filter(|_| is_doc);
        for link in links.filter_map(|rest| rest.split([')', '#']).next()) {
            let target = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir).join(link);
            if !link.contains("://") && !target.exists() {
                wrong.push(format!("{name} links to {link}"));
            }
        }
    }
    report(&wrong);
}

#[test]
fn unsafe_code_and_spdk_stay_on_their_islands() {
    let files = files();
    let mut wrong = Vec::new();
    for (name, text) in rust(&files) {
        let is_island = starts_with_any(name, ISLANDS);
        let knows_spdk = !name.starts_with("src/") || name.starts_with("src/spdk/");
        for (number, line) in code_lines(text) {
            // The lints in src/lib.rs open the islands.
            let lint = line.contains("allow(unsafe_code)") || line.contains("expect(unsafe_code");
            if !is_island && (line.contains("unsafe ") || lint && name != "src/lib.rs") {
                wrong.push(format!(
                    "{name}:{number} is unsafe; that belongs in src/pmem or src/spdk"
                ));
            }
            if !knows_spdk && (line.contains("crate::spdk") || line.contains("spdk_sys")) {
                wrong.push(format!("{name}:{number} knows SPDK: only src/spdk does"));
            }
        }
    }
    report(&wrong);
}

#[test]
fn nothing_is_unfinished_and_only_tests_unwrap() {
    let files = files();
    let mut wrong = Vec::new();
    for (name, text) in &files {
        let traces = UNFINISHED.iter().map(|trace| trace.replace('|', ""));
        for trace in traces.filter(|trace| text.contains(trace.as_str())) {
            wrong.push(format!("{name} has a {trace}"));
        }
    }
    for (name, text) in rust(&files) {
        for (number, line) in code_lines(code_and_tests(name, text).0) {
            let allowed =
                |allowed: &(&str, &str, &str)| name == allowed.0 && line.contains(allowed.1);
            let unwraps = line.contains(".unwrap()") || line.contains(".expect(");
            if unwraps && !UNWRAPS.iter().any(allowed) {
                wrong.push(format!(
                    "{name}:{number} may panic; return an error, or see UNWRAPS"
                ));
            }
        }
    }
    report(&wrong);
}

#[test]
fn files_have_one_subject_a_licence_and_a_place() {
    let files = files();
    let mut wrong = Vec::new();
    for (name, text) in &files {
        let longer = LONGER_FILES.iter().find(|(file, _)| file == name);
        let (count, max) = (
            text.lines().count(),
            longer.map_or(FILE_LINES_MAX, |longer| longer.1),
        );
        if name.starts_with("src/") && name.ends_with(".rs") && count > max {
            wrong.push(format!(
                "{name} has {count} lines, more than {max}: split it by subject"
            ));
        }
        if longer.is_some() && (count < max || max <= FILE_LINES_MAX) {
            wrong.push(format!(
                "{name} has shrunk to {count} lines: say so in LONGER_FILES"
            ));
        }
        // Rust files have theirs in Cargo.toml.
        let needs_licence = name == "Makefile"
            || text.starts_with("#!/")
            || [".py", ".c", ".h"].iter().any(|end| name.ends_with(end));
        if needs_licence
            && !text
                .lines()
                .take(3)
                .any(|line| line.contains("SPDX-License-Identifier: BSD-3-Clause"))
        {
            wrong.push(format!(
                "{name} has no SPDX-License-Identifier in its first lines"
            ));
        }
        let top = name.split('/').next().unwrap_or(name);
        if !top.starts_with('.') && !TOP.split(' ').any(|allowed| allowed == top) {
            wrong.push(format!("{top} does not belong at the top of the project"));
        }
    }
    for (name, _) in LONGER_FILES
        .iter()
        .filter(|(name, _)| !files.contains_key(*name))
    {
        wrong.push(format!("{name} is gone: take it from LONGER_FILES"));
    }
    report(&wrong);
}

#[test]
fn ids_are_found_in_a_text() {
    let found = ids("INV-A-1, (INV-B-2 to INV-B-4); INV-X, INV-B-12: INV-B-6 and INV-B-8");
    let found: Vec<_> = found.iter().map(String::as_str).collect();
    let expected = "INV-A-1 INV-B-12 INV-B-2 INV-B-3 INV-B-4 INV-B-6 INV-B-8";
    assert_eq!(found.join(" "), expected);
}
