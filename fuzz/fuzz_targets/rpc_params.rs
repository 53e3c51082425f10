#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| pcache::sim::fuzzing::rpc_params(input));
