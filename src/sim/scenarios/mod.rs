//! Scenarios: the traps that a write-back cache is known to fall into, each laid on purpose. `docs/TESTING.md`
//! lists all of them by item, with those that other tests cover.
//!
//! Most run on a [`Machine`] with the crash enumerator as its observer, so that every fence and every
//! acknowledgement of the scenario is cut.

mod awaiting;
mod checkpoint;
mod clear;
mod damage;
#[cfg(test)]
mod doc_tests;
mod durability;
mod eviction;
mod log;
mod metadata;
mod modes;
mod opening;
mod parts;
mod reads;
mod reclaim;
mod requests;
mod rounding;
mod salvage;
mod scrub;
mod shortage;
mod unmaps;
mod verified;
mod waiting;

mod writeback;

use super::base::Faults;
use super::crash::{self, Enumerator, Limits, Tally};
use super::machine::{Machine, Setup};
use super::model::Violation;
use super::script::{self, Step};
use crate::engine::{Fua, Health};
use crate::index::BlockMap;
use crate::media::Place;
use crate::units::{Lba, Page};
use std::sync::{Arc, Mutex, PoisonError};

/// A named scenario.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// A sentence.
    pub name: &'static str,
    /// Its item of the list in `docs/TESTING.md`.
    pub item: u32,
    /// Runs it.
    pub run: fn(&mut Context) -> Result<(), Violation>,
}

impl std::fmt::Debug for Scenario {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.item, self.name)
    }
}

macro_rules! scenarios {
    ($($item:literal $module:ident::$name:ident,)+) => {
        /// All of them.
        pub const ALL: &[Scenario] = &[
            $(Scenario { name: stringify!($name), item: $item, run: $module::$name },)+
        ];
    };
}

scenarios! {
    1 durability::an_acknowledged_write_survives_a_cut_at_any_moment,
    2 durability::a_flush_covers_the_open_batches_of_all_cores,
    3 durability::a_fua_write_survives_alone_and_is_never_torn,
    4 durability::a_torn_kset_is_no_kset_and_hides_nothing_older,
    5 log::an_earlier_lap_of_a_segment_is_not_taken_for_the_log,
    6 log::guest_data_in_the_shape_of_ksets_are_never_the_log,
    7 log::the_log_can_be_cut_wherever_it_enters_another_segment,
    8 reclaim::the_newer_of_two_copies_may_be_reclaimed_first,
    9 reclaim::a_reclaimed_segment_with_checksums_is_used_again,
    10 metadata::a_torn_update_of_any_record_can_be_repaired_and_torn_again,
    11 metadata::numbers_near_their_end_still_count,
    11 metadata::a_drain_ends_though_numbers_were_drawn_and_never_stored,
    12 log::a_flipped_bit_in_the_log_is_reported_or_harmless,
    13 metadata::one_copy_of_any_record_may_be_poisoned_and_both_are_an_error,
    13 metadata::a_record_with_an_unreadable_copy_is_not_updated,
    14 writeback::overwrites_there_and_back_reach_the_base_in_order,
    14 writeback::a_journal_on_the_base_is_always_consistent,
    14 checkpoint::a_checkpoint_holds_the_base_at_an_exact_cut,
    14 checkpoint::writers_wait_for_a_checkpoint_until_its_time_limit,
    14 checkpoint::a_checkpoint_is_reached_although_batch_follows_batch,
    15 writeback::the_base_alone_is_always_a_state_that_the_barriers_allow,
    16 writeback::failing_writes_of_the_base_hold_the_tail_and_heal,
    16 writeback::failing_flushes_of_the_base_hold_the_tail_and_heal,
    16 unmaps::unmaps_that_the_base_always_fails_go_on_as_zeroes,
    16 unmaps::a_base_that_fails_everything_is_not_asked_in_three_ways_again_and_again,
    17 metadata::a_recovery_that_is_cut_again_and_again_finds_the_same,
    18 reclaim::an_orderly_stop_while_everything_is_full_keeps_everything,
    18 writeback::an_orderly_stop_does_not_wait_for_the_rate_of_write_back,
    18 unmaps::zeroes_keep_to_the_rate_where_the_base_gets_them_as_data,
    19 opening::a_format_can_be_cut_anywhere,
    19 opening::a_format_over_an_old_cache_leaves_the_old_one_or_the_new_one,
    20 opening::a_wrong_base_is_refused_and_nothing_is_written,
    21 requests::a_write_that_finds_no_room_changes_nothing,
    22 reads::a_fill_never_overtakes_a_write_that_overlaps_it,
    23 clear::unmapped_data_do_not_come_back,
    23 clear::dirty_data_under_an_unmap_are_not_written_back,
    23 clear::a_range_that_is_cleared_while_it_is_written_back_stays_cleared,
    24 durability::a_kill_after_any_step_loses_nothing,
    26 requests::every_overlap_of_two_requests_reads_right,
    27 requests::a_segment_can_be_filled_to_its_last_byte,
    27 requests::a_write_of_two_pages_waits_for_room_as_a_whole,
    28 reclaim::a_full_cache_serves_reads_and_wakes_writers_in_order,
    29 reclaim::more_cores_than_segments_do_not_block_each_other,
    31 reads::concurrent_misses_of_the_same_blocks_share_a_base_read,
    31 reads::those_who_share_a_base_read_that_fails_ask_for_themselves,
    31 reads::a_base_read_is_not_joined_once_its_blocks_were_written,
    31 awaiting::misses_of_different_cores_share_a_base_read,
    31 awaiting::a_read_that_has_waited_in_vain_asks_for_itself,
    31 awaiting::a_read_waits_until_the_fill_is_published,
    32 damage::an_overwrite_of_lost_dirty_data_lets_write_back_go_on,
    32 damage::an_error_of_the_memory_is_told_from_one_of_the_base,
    32 damage::memory_that_cannot_be_read_now_and_then_is_not_tried_without_a_pause,
    32 reads::poisoned_memory_fails_only_what_is_dirty_in_it,
    32 scrub::a_scrub_finds_lost_memory_without_checksums,
    32 scrub::a_segment_on_lost_memory_is_used_again_only_when_it_reads_well,
    33 scrub::a_scrub_finds_damage_before_a_reader_does,
    33 scrub::a_scrub_drops_damaged_blocks_and_none_beside_them,
    33 damage::an_overwrite_of_damaged_dirty_data_lets_write_back_go_on,
    33 damage::a_cache_that_is_full_behind_damage_is_healed,
    33 writeback::damaged_payload_never_reaches_the_base,
    35 requests::requests_beyond_the_limits_are_refused_and_the_largest_is_atomic,
    36 requests::aborted_requests_happened_wholly_or_not_at_all,
    38 opening::a_recovery_takes_polls_and_memory_in_proportion_to_the_log,
    39 reads::a_read_miss_does_not_wait_for_a_flush_of_the_base,
    40 writeback::relaxed_order_merges_what_barriers_separate,
    40 writeback::barriers_between_versions_of_one_block_take_one_flush,
    41 modes::every_mode_keeps_what_it_promises,
    41 modes::modes_change_under_load,
    41 modes::a_mode_that_waits_for_a_drain_says_so,
    41 modes::a_mode_that_was_asked_for_holds_after_a_crash,
    42 rounding::a_miss_is_rounded_out_to_whole_pages,
    42 rounding::a_page_of_which_anything_is_known_is_not_rounded_out,
    42 rounding::a_write_of_the_rest_of_a_page_drops_the_fill_alone,
    42 rounding::an_error_beside_a_miss_is_not_its_own,
    42 rounding::nothing_behind_the_end_of_the_base_comes_along,
    43 eviction::what_is_left_of_an_overwritten_segment_is_kept,
    44 eviction::what_is_read_again_outlives_a_scan,
    44 eviction::what_was_asked_for_by_itself_outlives_a_scan,
    45 salvage::keys_that_cannot_be_read_lose_no_data,
    45 salvage::a_scrub_that_finds_keys_lost_has_their_data_written_back,
    45 salvage::a_start_without_keys_is_refused_until_the_base_has_what_they_named,
    45 salvage::a_block_that_is_lost_with_its_keys_is_not_written_back,
    45 salvage::lost_keys_of_several_segments_are_dealt_with_at_once,
    45 salvage::keys_are_lost_under_load,
    45 salvage::an_orderly_stop_saves_what_lies_in_segments_without_keys,
    46 verified::a_flipped_bit_of_clean_data_reaches_no_reader,
    46 verified::a_flipped_bit_of_dirty_data_fails_what_its_checksum_covers,
    46 verified::reads_are_verified_from_the_moment_that_says_so,
    46 verified::what_reclaiming_has_moved_is_verified,
    47 shortage::a_lack_of_memory_is_an_error_and_changes_nothing,
    48 log::what_a_cut_has_left_of_a_kset_is_dead_before_the_next_one_comes,
    49 eviction::read_fills_take_no_room_from_writes_while_the_tail_stands_still,
    50 waiting::a_late_write_does_not_overtake_those_of_other_cores_that_wait,
    50 waiting::a_core_that_waits_has_one_turn_for_what_it_has_then,
    50 waiting::a_core_that_is_slow_does_not_hold_up_the_others,
    50 waiting::a_stall_counts_as_long_as_somebody_waits,
    51 parts::a_batch_that_goes_beyond_damage_is_written_in_parts,
    51 parts::parts_are_written_again_when_the_flush_behind_them_fails,
    51 parts::a_salvage_in_parts_is_overtaken_by_writes,
}

/// What a scenario is given, and where it leaves what it did.
#[derive(Debug)]
pub struct Context {
    seed: u64,
    limits: Limits,
    tally: Tally,
}

impl Context {
    /// For a run.
    #[must_use]
    pub fn new(seed: u64, limits: Limits) -> Self {
        Self {
            seed,
            limits,
            tally: Tally::default(),
        }
    }

    /// The crash states that were checked.
    #[must_use]
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Runs a history with a cut at every moment.
    fn cut_script(&mut self, setup: &Setup, steps: &[Step]) -> Result<(), Violation> {
        let tally = crash::run(setup, self.seed, steps, self.limits)?;
        self.tally.add(&tally);
        Ok(())
    }

    /// Runs `history` on a new machine, and its end, with a cut at every moment.
    fn cut(
        &mut self,
        setup: &Setup,
        history: impl FnOnce(Machine) -> Result<Machine, Violation>,
    ) -> Result<(), Violation> {
        let enumerator = Enumerator::new(setup, self.limits, self.seed);
        let enumerator = Arc::new(Mutex::new(enumerator));
        let ended = Machine::new(setup.clone(), self.seed, Some(enumerator.clone()))
            .and_then(history)
            .and_then(|machine| script::finish(&machine));
        let enumerator = enumerator.lock().unwrap_or_else(PoisonError::into_inner);
        self.tally.add(&enumerator.tally());
        enumerator.verdict()?;
        ended
    }

    /// A machine that is not cut.
    fn machine(&self, setup: &Setup) -> Result<Machine, Violation> {
        Machine::new(setup.clone(), self.seed, None)
    }
}

/// A setup in which nobody has a turn in the middle of something: what happens is what the scenario says.
fn in_order() -> Setup {
    Setup {
        yield_percent: 0,
        ..Setup::default()
    }
}

fn apply(machine: Machine, steps: &[Step]) -> Result<Machine, Violation> {
    steps.iter().copied().try_fold(machine, script::apply)
}

/// The base answers nothing from now on; writes of seven blocks, two to a segment, until one waits for room.
/// Returns their number.
fn fill_up(machine: &Machine) -> Result<u64, Violation> {
    machine.with_outside(|outside| outside.base.faults.stuck = true);
    let places = machine.setup().block_count / 8;
    for number in 0..1000 {
        machine.write(0, number % places * 8, 7, Fua::No, &[]);
        (0..3).for_each(|_| machine.poll_all());
        if machine.outstanding() > 0 {
            return Ok(number + 1);
        }
    }
    Err(Violation(
        "a cache of a few segments does not fill up".to_owned(),
    ))
}

fn heal(machine: &Machine) {
    machine.with_outside(|outside| outside.base.faults = Faults::default());
}

/// The base is well again: whatever is dirty gets to it, and the cache has nothing to complain of.
fn get_well(machine: &Machine) -> Result<(), Violation> {
    heal(machine);
    machine.pass_ms(10_000);
    machine.drain()?;
    check(machine.cache().health() == Health::Online, || {
        format!("{:?} on a healthy base", machine.cache().health())
    })
}

/// A fact that a scenario is about, or that it needs.
fn check(fact: bool, text: impl FnOnce() -> String) -> Result<(), Violation> {
    if fact { Ok(()) } else { Err(Violation(text())) }
}

/// Where the cache holds a block; `None` if it does not, or as zeroes.
fn place_of(machine: &Machine, lba: Lba) -> Option<Place> {
    let cache = machine.cache();
    let per_page = u64::from(cache.geometry.blocks_per_page());
    let found = cache
        .index
        .lookup(cache.index.locate(Page(lba.0 / per_page)));
    match found?.map.block((lba.0 % per_page) as u32) {
        BlockMap::Mapped(place) => Some(place),
        BlockMap::Absent | BlockMap::Zero(_) => None,
    }
}

/// Whether the cache holds a block, as data or as zeroes.
fn is_cached(machine: &Machine, lba: Lba) -> bool {
    let cache = machine.cache();
    let per_page = u64::from(cache.geometry.blocks_per_page());
    let found = cache
        .index
        .lookup(cache.index.locate(Page(lba.0 / per_page)));
    found.is_some_and(|found| found.map.block((lba.0 % per_page) as u32) != BlockMap::Absent)
}
