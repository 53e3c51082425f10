//! A test for each scenario of `docs/TESTING.md`. `PCACHE_SEED` chooses another seed than 1.

use pcache::sim::crash::Limits;
use pcache::sim::scenarios::{ALL, Context};

/// Fewer states of a moment than `make crash` takes, which runs the same scenarios.
const LIMITS: Limits = Limits {
    lines_max: 3,
    random_images: 4,
    lazy_runs_max: 20,
    twice_every: 7,
    go_on_every: 499,
    nested_every: 61,
};

fn run(name: &str) {
    let seed = std::env::var("PCACHE_SEED").map_or(1, |text| text.parse().expect("a number"));
    let scenario = ALL.iter().find(|scenario| scenario.name == name);
    let mut context = Context::new(seed, LIMITS);
    let result = (scenario.expect("it is in the list").run)(&mut context);
    println!("{:?}", context.tally());
    if let Err(violation) = result {
        panic!("{name}, seed {seed}: {violation}");
    }
}

macro_rules! tests {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*

        #[test]
        fn every_scenario_has_a_test() {
            let tests = [$(stringify!($name)),*];
            let names: Vec<&str> = ALL.iter().map(|scenario| scenario.name).collect();
            assert_eq!(names, tests);
        }
    };
}

tests! {
    an_acknowledged_write_survives_a_cut_at_any_moment
    a_flush_covers_the_open_batches_of_all_cores
    a_fua_write_survives_alone_and_is_never_torn
    a_torn_kset_is_no_kset_and_hides_nothing_older
    an_earlier_lap_of_a_segment_is_not_taken_for_the_log
    guest_data_in_the_shape_of_ksets_are_never_the_log
    the_log_can_be_cut_wherever_it_enters_another_segment
    the_newer_of_two_copies_may_be_reclaimed_first
    a_reclaimed_segment_with_checksums_is_used_again
    a_torn_update_of_any_record_can_be_repaired_and_torn_again
    numbers_near_their_end_still_count
    a_drain_ends_though_numbers_were_drawn_and_never_stored
    a_flipped_bit_in_the_log_is_reported_or_harmless
    one_copy_of_any_record_may_be_poisoned_and_both_are_an_error
    a_record_with_an_unreadable_copy_is_not_updated
    overwrites_there_and_back_reach_the_base_in_order
    a_journal_on_the_base_is_always_consistent
    a_checkpoint_holds_the_base_at_an_exact_cut
    writers_wait_for_a_checkpoint_until_its_time_limit
    a_checkpoint_is_reached_although_batch_follows_batch
    the_base_alone_is_always_a_state_that_the_barriers_allow
    failing_writes_of_the_base_hold_the_tail_and_heal
    failing_flushes_of_the_base_hold_the_tail_and_heal
    unmaps_that_the_base_always_fails_go_on_as_zeroes
    a_base_that_fails_everything_is_not_asked_in_three_ways_again_and_again
    a_recovery_that_is_cut_again_and_again_finds_the_same
    an_orderly_stop_while_everything_is_full_keeps_everything
    an_orderly_stop_does_not_wait_for_the_rate_of_write_back
    zeroes_keep_to_the_rate_where_the_base_gets_them_as_data
    a_format_can_be_cut_anywhere
    a_format_over_an_old_cache_leaves_the_old_one_or_the_new_one
    a_wrong_base_is_refused_and_nothing_is_written
    a_write_that_finds_no_room_changes_nothing
    a_fill_never_overtakes_a_write_that_overlaps_it
    unmapped_data_do_not_come_back
    dirty_data_under_an_unmap_are_not_written_back
    a_range_that_is_cleared_while_it_is_written_back_stays_cleared
    a_kill_after_any_step_loses_nothing
    every_overlap_of_two_requests_reads_right
    a_segment_can_be_filled_to_its_last_byte
    a_write_of_two_pages_waits_for_room_as_a_whole
    a_full_cache_serves_reads_and_wakes_writers_in_order
    more_cores_than_segments_do_not_block_each_other
    concurrent_misses_of_the_same_blocks_share_a_base_read
    those_who_share_a_base_read_that_fails_ask_for_themselves
    a_base_read_is_not_joined_once_its_blocks_were_written
    misses_of_different_cores_share_a_base_read
    a_read_that_has_waited_in_vain_asks_for_itself
    a_read_waits_until_the_fill_is_published
    an_overwrite_of_lost_dirty_data_lets_write_back_go_on
    an_error_of_the_memory_is_told_from_one_of_the_base
    memory_that_cannot_be_read_now_and_then_is_not_tried_without_a_pause
    poisoned_memory_fails_only_what_is_dirty_in_it
    a_scrub_finds_lost_memory_without_checksums
    a_segment_on_lost_memory_is_used_again_only_when_it_reads_well
    a_scrub_finds_damage_before_a_reader_does
    a_scrub_drops_damaged_blocks_and_none_beside_them
    an_overwrite_of_damaged_dirty_data_lets_write_back_go_on
    a_cache_that_is_full_behind_damage_is_healed
    damaged_payload_never_reaches_the_base
    requests_beyond_the_limits_are_refused_and_the_largest_is_atomic
    aborted_requests_happened_wholly_or_not_at_all
    a_recovery_takes_polls_and_memory_in_proportion_to_the_log
    a_read_miss_does_not_wait_for_a_flush_of_the_base
    relaxed_order_merges_what_barriers_separate
    barriers_between_versions_of_one_block_take_one_flush
    every_mode_keeps_what_it_promises
    modes_change_under_load
    a_mode_that_waits_for_a_drain_says_so
    a_mode_that_was_asked_for_holds_after_a_crash
    a_miss_is_rounded_out_to_whole_pages
    a_page_of_which_anything_is_known_is_not_rounded_out
    a_write_of_the_rest_of_a_page_drops_the_fill_alone
    an_error_beside_a_miss_is_not_its_own
    nothing_behind_the_end_of_the_base_comes_along
    what_is_left_of_an_overwritten_segment_is_kept
    what_is_read_again_outlives_a_scan
    what_was_asked_for_by_itself_outlives_a_scan
    keys_that_cannot_be_read_lose_no_data
    a_scrub_that_finds_keys_lost_has_their_data_written_back
    a_start_without_keys_is_refused_until_the_base_has_what_they_named
    a_block_that_is_lost_with_its_keys_is_not_written_back
    lost_keys_of_several_segments_are_dealt_with_at_once
    keys_are_lost_under_load
    an_orderly_stop_saves_what_lies_in_segments_without_keys
    a_flipped_bit_of_clean_data_reaches_no_reader
    a_flipped_bit_of_dirty_data_fails_what_its_checksum_covers
    reads_are_verified_from_the_moment_that_says_so
    what_reclaiming_has_moved_is_verified
    a_lack_of_memory_is_an_error_and_changes_nothing
    what_a_cut_has_left_of_a_kset_is_dead_before_the_next_one_comes
    read_fills_take_no_room_from_writes_while_the_tail_stands_still
    a_late_write_does_not_overtake_those_of_other_cores_that_wait
    a_core_that_waits_has_one_turn_for_what_it_has_then
    a_core_that_is_slow_does_not_hold_up_the_others
    a_stall_counts_as_long_as_somebody_waits
    a_batch_that_goes_beyond_damage_is_written_in_parts
    parts_are_written_again_when_the_flush_behind_them_fails
    a_salvage_in_parts_is_overtaken_by_writes
}
