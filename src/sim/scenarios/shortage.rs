//! Not enough memory for a cache: item 47 (INV-OPEN-7).

use super::{Context, apply, check, in_order};
use crate::engine::{DataCrc, FormatPolicy, OpenOptions};
use crate::memory::short_at;
use crate::recovery::OpenError;
use crate::sim::base::BaseImage;
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::Violation;
use crate::sim::pmem::SimPmem;
use crate::sim::recover::{self, Crew};
use crate::sim::script::Step;

/// More than this is asked for in any opening: index, checksums, write-back, and so on.
const REQUESTS_MIN: u64 = 15;

/// A device as it is found, and how it is to be opened.
struct Case<'a> {
    what: &'a str,
    bytes: &'a [u8],
    options: OpenOptions,
    crew: Crew,
}

/// A cache with clean and dirty data.
fn used(context: &Context, setup: &Setup) -> Result<Machine, Violation> {
    let len = setup.write_blocks_max().min(4);
    let mut steps = Vec::new();
    for round in 0..6 {
        steps.extend([Step::Write(0, round * 8, len, 0), Step::Core(0)]);
        steps.extend([Step::Write(1, round * 8 + 2, len, 0), Step::Core(1)]);
        if round == 3 {
            steps.extend([Step::Settle, Step::Drain, Step::Turns(20)]);
        }
    }
    let machine = apply(context.machine(setup)?, &steps)?;
    machine.settle()?;
    Ok(machine)
}

/// Refuses one request for memory after the other.
fn open_with_shortages(case: &Case<'_>, base: &BaseImage) -> Result<(), Violation> {
    let what = case.what;
    let blocks = |lba, len| base.blocks(lba, len);
    for number in 0..1000 {
        let pmem = SimPmem::from_image(case.bytes.to_vec());
        let open = || recover::open_by(case.crew, pmem.clone(), case.options.clone(), blocks);
        let (opened, is_short) = short_at(number, open);
        match opened {
            Ok(cache) if !is_short => {
                cache.check_invariants();
                return check(number > REQUESTS_MIN, || {
                    format!("{what}: {number} requests are none")
                });
            }
            Err(OpenError::NoMemory(_)) if is_short => {}
            other => {
                let opened = other.map(|_| "it opens");
                return Err(Violation(format!("{what}, request {number}: {opened:?}")));
            }
        }
        check(pmem.live_image() == case.bytes, || {
            format!("{what}, request {number}: without memory the device was written to")
        })?;
        open().map_err(|error| Violation(format!("{what}: later it is refused: {error}")))?;
    }
    Err(Violation(format!("{what}: there is no end of requests")))
}

/// Opening, by one worker and by several; formatting a blank device, and one that held a cache.
pub(super) fn a_lack_of_memory_is_an_error_and_changes_nothing(
    context: &mut Context,
) -> Result<(), Violation> {
    for (block_size_bytes, data_crc) in [(512, DataCrc::On), (4096, DataCrc::Off)] {
        let setup = Setup {
            block_size_bytes,
            data_crc,
            segment_size_bytes: 64 << 10,
            ..in_order()
        };
        let machine = used(context, &setup)?;
        let bytes = machine.pmem().live_image();
        let base = machine.with_outside(|outside| outside.base.current_image());
        let blank = vec![0; bytes.len()];
        let several = Crew {
            worker_count: 3,
            yield_percent: 10,
            seed: context.seed,
        };
        let cases = [
            ("a cache", &bytes, FormatPolicy::Never, Crew::ALONE),
            (
                "a cache, three workers",
                &bytes,
                FormatPolicy::Auto,
                several,
            ),
            ("a blank device", &blank, FormatPolicy::Auto, Crew::ALONE),
            (
                "a format by force",
                &bytes,
                FormatPolicy::Force,
                Crew::ALONE,
            ),
        ];
        for (what, bytes, format, crew) in cases {
            let case = Case {
                what,
                bytes,
                options: setup.options(format),
                crew,
            };
            open_with_shortages(&case, &base)?;
        }
    }
    Ok(())
}
