//! The committed inputs of the fuzz targets, without a fuzzer: each once found something, or reaches what
//! no other does.

use pcache::sim::fuzzing;
use std::path::{Path, PathBuf};

fn folder(target: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("fuzz/corpus").join(target)
}

fn replay(target: &str, run: fn(&[u8])) {
    let entries = std::fs::read_dir(folder(target)).expect("the corpus is committed");
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.expect("the corpus can be read").path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "{target} has no inputs");
    for path in paths {
        // Shown if it fails.
        println!("{}", path.display());
        run(&std::fs::read(path).expect("an input can be read"));
    }
}

#[test]
fn inputs_of_media_recovery_break_no_promise() {
    replay("media_recovery", fuzzing::media_recovery);
}

#[test]
fn inputs_of_media_mutations_break_no_promise() {
    replay("media_mutations", fuzzing::media_mutations);
}

#[test]
fn inputs_of_engine_ops_break_no_promise() {
    replay("engine_ops", fuzzing::engine_ops);
}

#[test]
fn inputs_of_rpc_params_break_no_promise() {
    replay("rpc_params", fuzzing::rpc_params);
}

#[test]
#[ignore = "writes inputs from which a fuzzer can start: for a new version of the format"]
fn write_seeds() {
    for (name, input) in fuzzing::media_recovery_seeds() {
        let path = folder("media_recovery").join(name);
        std::fs::write(path, input).expect("the corpus can be written");
    }
}
