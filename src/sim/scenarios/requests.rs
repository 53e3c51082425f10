//! Requests that overlap, do not fit, are given up: items 21, 26, 27, 35, 36.

use super::{Context, apply, check, fill_up, heal, in_order};
use crate::engine::{DataCrc, Fua, HostIo, IoToken, Op, Outbox, Status};
use crate::pmem::IovBuf;
use crate::sim::machine::{Machine, Setup};
use crate::sim::model::Violation;
use crate::sim::script::{self, Step};
use crate::units::{Lba, Now};

/// Gives up what waits on core 0.
fn give_up_all(machine: &Machine) {
    while machine.outstanding() > 0 {
        machine.abort(0, 0);
        machine.poll_core(0);
    }
}

/// A write over cached data waits for room; readers see what was acknowledged last. Then it is given up, and
/// the power goes.
pub(super) fn a_write_that_finds_no_room_changes_nothing(
    context: &mut Context,
) -> Result<(), Violation> {
    let seed = context.seed;
    let setup = Setup {
        segment_count: 4,
        ..in_order()
    };
    for given_up in [false, true] {
        context.cut(&setup, |machine| {
            fill_up(&machine)?;
            let waiting = machine.outstanding();
            // The block that waits was written before, and so was the one behind it.
            let machine = apply(machine, &[Step::Write(0, 0, 8, 0), Step::Turns(2)])?;
            check(machine.outstanding() == waiting + 1, || {
                "it has found room".to_owned()
            })?;
            let machine = apply(machine, &[Step::Read(1, 0, 7, 0), Step::Turns(2)])?;
            check(machine.outstanding() == waiting + 1, || {
                "a hit waits for room".to_owned()
            })?;
            if given_up {
                give_up_all(&machine);
            }
            let machine = apply(machine, &[Step::Read(1, 0, 7, 0), Step::Turns(2)])?;
            let left = if given_up { 0 } else { waiting + 1 };
            check(machine.outstanding() == left, || {
                format!("{} requests are left", machine.outstanding())
            })?;
            machine.cut_power(seed, |_| ())
        })?;
    }
    Ok(())
}

/// What a range holds before, or what comes over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    Nothing,
    Fill,
    Data,
    Zeroes,
    Unmapped,
}

impl Over {
    fn act(self, machine: &Machine, core: usize, lba: u64, len_blocks: u64) {
        match self {
            Over::Nothing => {}
            Over::Fill => machine.read(core, lba, len_blocks, &[]),
            Over::Data => machine.write(core, lba, len_blocks, Fua::No, &[]),
            Over::Zeroes => machine.clear(core, Op::WriteZeroes, lba, len_blocks),
            Over::Unmapped => machine.clear(core, Op::Unmap, lba, len_blocks),
        }
    }
}

/// Two pages; the second request goes through all ranges of them.
const GROUP: u64 = 16;
/// The first one: within a page, across its border, a page.
const FIRST: [(u64, u64); 3] = [(2, 4), (4, 8), (0, 8)];

/// In steps of 512 bytes: every range over every kind of range. Read at once, after write-back, and after a
/// power cut.
pub(super) fn every_overlap_of_two_requests_reads_right(
    context: &mut Context,
) -> Result<(), Violation> {
    let ranges: Vec<(u64, u64)> = (0..GROUP)
        .flat_map(|first| (1..=8).map(move |len| (first, len)))
        .filter(|(first, len)| first + len <= GROUP)
        .collect();
    // For the index, unmapped is zeroed.
    let before = [Over::Nothing, Over::Fill, Over::Data, Over::Zeroes];
    let after = [Over::Fill, Over::Data, Over::Zeroes, Over::Unmapped];
    for first in FIRST {
        for before in before {
            for after in after {
                // Fills of parts of pages, and of whole ones where that is possible.
                let fills = [before, after].contains(&Over::Fill);
                for pad_pages in if fills { &[0, 64][..] } else { &[0][..] } {
                    let setup = Setup {
                        block_count: GROUP * ranges.len() as u64,
                        segment_size_bytes: 64 << 10,
                        segment_count: 24,
                        pad_pages: *pad_pages,
                        ..in_order()
                    };
                    let machine = context.machine(&setup)?;
                    overlap(machine, context.seed, (before, first), (after, &ranges)).map_err(
                        |violation| {
                            let told = format!("{before:?} at {first:?}, then {after:?}");
                            Violation(format!("{told}, {pad_pages} pages of pads: {violation}"))
                        },
                    )?;
                }
            }
        }
    }
    Ok(())
}

fn overlap(
    machine: Machine,
    seed: u64,
    (before, first): (Over, (u64, u64)),
    (after, ranges): (Over, &[(u64, u64)]),
) -> Result<(), Violation> {
    for group in 0..ranges.len() as u64 {
        before.act(&machine, 0, group * GROUP + first.0, first.1);
    }
    machine.settle()?;
    for (group, range) in (0..).zip(ranges) {
        after.act(&machine, 1, group * GROUP + range.0, range.1);
    }
    machine.settle()?;
    machine.read_all()?;
    script::finish(&machine.cut_power(seed, |_| ())?)
}

/// Keys and data meet exactly, or miss each other by a line.
pub(super) fn a_segment_can_be_filled_to_its_last_byte(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        core_count: 1,
        ..in_order()
    };
    let mut full = 0;
    for short_keys in 3..=6 {
        context.cut(&setup, |machine| {
            // 2 times 3,584 and 512 bytes of data, a line for the kset of each: five lines are left.
            let mut steps = Vec::new();
            for (lba, len) in [(0, 7), (8, 7), (16, 1)] {
                steps.extend([Step::Write(0, lba, len, 0), Step::Core(0)]);
            }
            for number in 0..short_keys {
                steps.extend([Step::Zero(0, 30 + number * 3, 2), Step::Core(0)]);
            }
            let machine = apply(machine, &steps)?;
            let stream = machine.cache().streams[0].lock().expect("nobody panics");
            full += u32::from(
                stream
                    .open
                    .as_ref()
                    .is_some_and(|open| open.key_off == open.data_off),
            );
            drop(stream);
            let more = [
                Step::Write(0, 5, 8, 0),
                Step::Core(0),
                Step::Unmap(0, 7, 2),
                Step::Core(0),
            ];
            apply(machine, &more)
        })?;
    }
    check(full == 1, || {
        format!("{full} segments were full to the last byte")
    })
}

/// The piece in the first page would still fit into the open segment.
pub(super) fn a_write_of_two_pages_waits_for_room_as_a_whole(
    context: &mut Context,
) -> Result<(), Violation> {
    let seed = context.seed;
    let setup = Setup {
        segment_count: 4,
        ..in_order()
    };
    context.cut(&setup, |machine| {
        fill_up(&machine)?;
        // Whoever came before is out of the way; 896 bytes are left in the open segment.
        give_up_all(&machine);
        machine.write(0, 7, 2, Fua::No, &[]);
        (0..3).for_each(|_| machine.poll_all());
        check(machine.outstanding() == 1, || "it does not wait".to_owned())?;
        machine.read(1, 8, 1, &[]);
        machine.poll_core(1);
        check(machine.outstanding() == 1, || "a hit waits".to_owned())?;
        let machine = machine.cut_power(seed, |_| ())?;
        heal(&machine);
        Ok(machine)
    })
}

fn submit_aside(machine: &Machine, op: Op, lba: u64, len_blocks: u64) -> Option<Status> {
    let mut channel = machine.cache().channel().expect("there are few channels");
    let mut out = Outbox::new();
    let io = HostIo {
        token: IoToken(1),
        op,
        lba: Lba(lba),
        len_blocks,
    };
    channel.submit(io).expect("the channel is empty");
    channel.poll(Now(0), &mut out);
    out.completions.first().map(|completion| completion.status)
}

/// Both block sizes. Operations of the base are in blocks too, so none can be unaligned.
pub(super) fn requests_beyond_the_limits_are_refused_and_the_largest_is_atomic(
    context: &mut Context,
) -> Result<(), Violation> {
    for block_size_bytes in [512, 4096] {
        let setup = Setup {
            block_size_bytes,
            segment_size_bytes: 64 << 10,
            segment_count: 6,
            data_crc: DataCrc::On,
            core_count: 1,
            ..in_order()
        };
        let max = setup.write_blocks_max();
        context.cut(&setup, |machine| {
            let (blocks, size) = (machine.setup().block_count, block_size_bytes as usize);
            let buf = IovBuf::zeroed((max as usize + 1) * size);
            let write = Op::Write(buf.cursor(), Fua::No);
            let unmap_max = machine.cache().unmap_size_max_bytes() / u64::from(block_size_bytes);
            let beyond = [
                (write, 0, max + 1),
                (write, blocks, 1),
                (write, blocks - 1, 2),
                (write, 3, 0),
                (write, u64::MAX, 2),
                (Op::Unmap, 0, unmap_max + 1),
                (Op::WriteZeroes, blocks - 1, 2),
                (Op::Read(buf.cursor()), blocks - 1, 2),
            ];
            let before = machine.cache().info().seq_next;
            for (op, lba, len) in beyond {
                let status = submit_aside(&machine, op, lba, len);
                check(status == Some(Status::Failed), || {
                    format!("{len} blocks from {lba} on: {status:?}")
                })?;
            }
            check(machine.cache().info().seq_next == before, || {
                "something was stored".to_owned()
            })?;
            let mut steps = Vec::new();
            for round in 0..4 {
                steps.extend([Step::Write(0, round * 3 + 1, max, 1000), Step::Core(0)]);
                steps.extend([Step::Write(0, round * 2, 1, 0), Step::Core(0)]);
            }
            apply(machine, &steps)
        })?;
    }
    Ok(())
}

/// Requests are given up at any moment, the base goes away and comes back.
pub(super) fn aborted_requests_happened_wholly_or_not_at_all(
    context: &mut Context,
) -> Result<(), Violation> {
    let setup = Setup {
        yield_percent: 20,
        segment_count: 6,
        ..Setup::default()
    };
    let mut steps = Vec::new();
    for round in 0..12 {
        steps.extend([
            Step::Write(0, round * 6, 8, 0),
            Step::Write(0, round * 6 + 4, 8, 0),
            Step::Unmap(1, round * 6 + 2, 7),
            Step::Read(1, 80, 6, 0),
            Step::Abort(0, round),
        ]);
        steps.extend([
            Step::Core(0),
            Step::Abort(1, round),
            Step::Turns(1),
            Step::Abort(0, round),
        ]);
        match round {
            4 => steps.push(Step::Away(true)),
            7 => steps.extend([Step::DrainStart, Step::Turns(10), Step::Heal]),
            _ => {}
        }
    }
    context.cut_script(&setup, &steps)
}
