//! Seeded bugs: does the search for lost data find them? A search that finds nothing in good code proves
//! something only if it finds what is wrong in bad code.
//!
//! Each canary is one mistake at the place where it would be made. They exist with the feature `canary`
//! alone, and do nothing before a test plants one. Without the feature [`is`] is constant, and its branches
//! are not compiled. The adapter refuses to be built with the feature.

/// Makes the enum, the list of its variants, and their names.
macro_rules! canaries {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// A mistake.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Canary {
            $($(#[doc = $doc])+ $variant,)+
        }

        #[cfg(feature = "canary")]
        impl Canary {
            /// All of them.
            pub const ALL: &[Canary] = &[$(Canary::$variant,)+];

            /// Its name in reports.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Canary::$variant => $name,)+
                }
            }
        }
    };
}

canaries! {
    /// No fence between the payloads and the kset that names them.
    PayloadsNotFenced = "payloads_not_fenced",
    /// A kset that was stored before the fence of its payloads counts whatever these are.
    UnfencedKsetTrusted = "unfenced_kset_trusted",
    /// What a kill has left of the last kset of a segment counts as durable.
    KilledKsetTrusted = "killed_kset_trusted",
    /// What a kill has left of the copy of a record that counts is taken for durable when the other one is stored.
    KilledCopyTrusted = "killed_copy_trusted",
    /// The fence behind the kset is another core's, which does nothing for this one.
    KsetFencedByAnotherCore = "kset_fenced_by_another_core",
    /// A batch is published before its kset is durable.
    PublishedBeforeDurable = "published_before_durable",
    /// A write that met another core at its pages is acknowledged, and not logged any more.
    AcknowledgedUnlogged = "acknowledged_unlogged",
    /// The keys of a batch go into two ksets, each durable by itself.
    BatchSplitOverTwoKsets = "batch_split_over_two_ksets",
    /// The pages of a write are not claimed when another core is at them.
    ClaimsIgnored = "claims_ignored",
    /// A batch draws its number before it says from where on one may be missing.
    FloorNotSet = "floor_not_set",
    /// Publishing a part of a page forgets its last block.
    OverlapLost = "overlap_lost",
    /// Some blocks of a page at one place are taken for all of it.
    RunTakenForPage = "run_taken_for_page",
    /// A reader of a split page does not look whether it is still where it was.
    SplitReadOnce = "split_read_once",
    /// The line of a page of which a part is forgotten is given to another.
    LineFreedInUse = "line_freed_in_use",
    /// A read fill goes into the cache although its page was written meanwhile.
    StaleFillInstalled = "stale_fill_installed",
    /// A miss joins a base read that was asked for before its blocks were written.
    StaleReadJoined = "stale_read_joined",
    /// A page that a miss was fetching still counts as on its way when the miss has ended.
    FetchNotWithdrawn = "fetch_not_withdrawn",
    /// A page counts as arrived when the base read has ended, before its fill is published.
    FetchWithdrawnEarly = "fetch_withdrawn_early",
    /// A miss is rounded out to a whole page although the cache holds a part of it.
    KnownPageRounded = "known_page_rounded",
    /// What a base read brings is put into the cache as it stands in the reader's memory later.
    FilledFromReader = "filled_from_reader",
    /// The memory of a base read is given to the next one while this one is under way.
    PadFreedInUse = "pad_freed_in_use",
    /// Reads take what they find, whatever its checksum, although they are to be verified.
    ReadNotVerified = "read_not_verified",
    /// What is lent is not compared with its checksum.
    LoanNotVerified = "loan_not_verified",
    /// The checksum of a payload is noted after the index names its place.
    CrcNotedLate = "crc_noted_late",
    /// In a mode in which a write waits for the base, it does not.
    WriteNotHeld = "write_not_held",
    /// A write that is not to stay cached takes with it what was written later.
    DirtyWriteForgotten = "dirty_write_forgotten",
    /// A read that is to be served by the base is, although the base does not have the data yet.
    DirtyDataPassedBy = "dirty_data_passed_by",
    /// A flush of the application closes no epoch.
    FlushClosesNoEpoch = "flush_closes_no_epoch",
    /// A FUA write closes no epoch.
    FuaClosesNoEpoch = "fua_closes_no_epoch",

    /// Blocks that the base has grown by are taken before the superblock says so.
    GrowthNotPersisted = "growth_not_persisted",

    /// A device is formatted before it is known whether there is memory for the cache.
    FormattedWithoutMemory = "formatted_without_memory",
    /// The second copy of metadata is never written.
    SecondCopyNotWritten = "second_copy_not_written",
    /// Both copies of metadata are written before one fence.
    BothCopiesBeforeOneFence = "both_copies_before_one_fence",
    /// A copy of metadata counts whatever its checksum says.
    PairChecksumIgnored = "pair_checksum_ignored",
    /// A record is stored to where one of its copies cannot be read.
    UnreadableCopyStored = "unreadable_copy_stored",
    /// A segment without ksets keeps its generation, though there may be the rest of a torn one in it.
    TornKsetCompleted = "torn_kset_completed",
    /// A kset counts whatever its checksum says: one that was torn too.
    KsetChecksumIgnored = "kset_checksum_ignored",
    /// Ksets of an earlier use of their segment have good checksums.
    ChecksumWithoutGeneration = "checksum_without_generation",
    /// The same, and their numbers need not go up either.
    StaleLapAccepted = "stale_lap_accepted",
    /// Ksets of another cache have good checksums.
    ChecksumWithoutUuid = "checksum_without_uuid",
    /// A segment is sealed with one kset less than it has.
    SealedOneShort = "sealed_one_short",

    /// The dirty tail moves before the base is flushed.
    TailBeforeBaseFlush = "tail_before_base_flush",
    /// The dirty tail moves although the flush of the base has failed.
    FailedBaseFlushIgnored = "failed_base_flush_ignored",
    /// Only the flush of the base is repeated after it has failed, not the writes that it may have lost.
    OnlyBaseFlushRepeated = "only_base_flush_repeated",
    /// A write to the base that has failed counts as done.
    FailedBaseWriteIgnored = "failed_base_write_ignored",
    /// An unmap that the base fails is repeated as an unmap, and as nothing else.
    FailedUnmapRepeated = "failed_unmap_repeated",
    /// A batch in strict order spans a barrier.
    StrictBatchSpansBarrier = "strict_batch_spans_barrier",
    /// A batch in strict order that spans a barrier, with versions of one block, takes another block too.
    SpanningBatchTakesMore = "spanning_batch_takes_more",
    /// Zeroes that the base gets as data count as nothing that is written.
    ZeroesWithoutWeight = "zeroes_without_weight",
    /// At a stop the batch under way is written no faster than write-back may write.
    StopKeepsToRate = "stop_keeps_to_rate",
    /// Where keys of a batch overlap, the older one is written to the base.
    OldestKeyWins = "oldest_key_wins",
    /// Unmaps are not passed on to the base.
    UnmapNotWrittenBack = "unmap_not_written_back",
    /// How far the batch under way goes is not made durable before its first write to the base.
    BatchEndNotRecorded = "batch_end_not_recorded",
    /// The witness is not renewed when the base changes.
    WitnessNotRenewed = "witness_not_renewed",
    /// Dirty data whose memory is lost or whose checksum is wrong are written to the base all the same.
    DamagedPayloadWritten = "damaged_payload_written",
    /// What the base could not be given, since the memory cannot be read, is taken again as if nothing had happened.
    LostSourceForgotten = "lost_source_forgotten",
    /// Dirty data that are damaged are read from the base, which holds something older.
    DirtyDamageReadFromBase = "dirty_damage_read_from_base",
    /// What is damaged counts as clean if the first key of its kset names clean data.
    DamageJudgedByNeighbour = "damage_judged_by_neighbour",
    /// What lies in segments whose keys are lost is written back as of before it was looked for.
    SalvageEndsEarly = "salvage_ends_early",
    /// What lies there is taken for older than what the log says.
    SalvageLaidBelow = "salvage_laid_below",
    /// What lies there is passed over where somebody is about to write.
    ClaimedPagesNotSalvaged = "claimed_pages_not_salvaged",
    /// An orderly stop leaves what lies there as it is.
    SalvageLeftAtStop = "salvage_left_at_stop",
    /// A drain ends when one kset is still missing on the base.
    DrainEndsEarly = "drain_ends_early",
    /// One of the parts in which a large batch is written is left out.
    PartLeftOut = "part_left_out",
    /// Where a key is cut at the border of two parts, the second gets the payload of the first.
    PartTakesWrongPayload = "part_takes_wrong_payload",
    /// A part of a batch is written again by itself when the flush behind the last one has failed.
    LastPartRepeated = "last_part_repeated",
    /// What lies there and is written in parts counts as written to where the last one ends.
    SalvageEndsWithLastPart = "salvage_ends_with_last_part",
    /// A checkpoint holds the base before all that was acknowledged before it is there.
    CheckpointHeldTooEarly = "checkpoint_held_too_early",
    /// A batch begins although a checkpoint holds the base.
    BatchBegunDuringHold = "batch_begun_during_hold",

    /// The generation of a segment goes up before the key tail has passed it.
    GenerationBeforeKeyTail = "generation_before_key_tail",
    /// A segment is free under the generation that it had.
    GenerationNotRaised = "generation_not_raised",
    /// A segment is free although somebody may still read in it.
    ReclaimIgnoresReaders = "reclaim_ignores_readers",
    /// Reclaiming puts a copy into the index although its page has changed since.
    StaleCopyInstalled = "stale_copy_installed",
    /// Who comes first when a segment has become free takes it, whoever has waited for it.
    LateWriterGoesFirst = "late_writer_goes_first",
    /// A write that heals waits for room like any other.
    HealerWaitsForRoom = "healer_waits_for_room",
    /// Reclaiming frees a segment before the copies of what it keeps are durable.
    ReclaimedWithoutCopies = "reclaimed_without_copies",
    /// The key tail does not pass a segment out of which something was forgotten.
    ForgottenUnnoted = "forgotten_unnoted",
    /// A segment whose memory is damaged is used again.
    SuspectSegmentReused = "suspect_segment_reused",
    /// The scrub takes damaged dirty data out of the cache, as if the base had them.
    ScrubDropsDirtyData = "scrub_drops_dirty_data",
    /// A segment is reclaimed although the base does not hold all of it.
    DirtySegmentReclaimed = "dirty_segment_reclaimed",
    /// Read fills go where writes go, where they cannot be reclaimed while the dirty tail stands still.
    FillsAmongWrites = "fills_among_writes",
    /// What a long sequence of reads brings is kept as long as what was asked for by itself.
    ScanNotOnProbation = "scan_not_on_probation",
    /// Reclaiming does not look for a victim again when the dirty tail has moved.
    TailNotWatched = "tail_not_watched",

    /// Recovery lets keys take effect as it meets them, whatever their order.
    RecoveredInSegmentOrder = "recovered_in_segment_order",
    /// A key for a whole page wins over later ones for blocks of it that recovery has met before.
    NewerBlocksBuried = "newer_blocks_buried",
    /// A worker of recovery does not wait for another one that is at the same range of the index.
    RecoveryClaimsIgnored = "recovery_claims_ignored",
    /// A worker of recovery is done with its segments although keys of them wait to be put into the index.
    WaitingKeysDropped = "waiting_keys_dropped",
    /// Recovery lets clean keys below the key tail count.
    KeyTailIgnored = "key_tail_ignored",
    /// Recovery forgets unmapped and zeroed blocks.
    ZeroesForgotten = "zeroes_forgotten",
    /// Recovery does not note the checksums of payloads.
    RecoveredCrcsForgotten = "recovered_crcs_forgotten",
    /// After recovery numbers are given out again that are in the log.
    SeqGivenOutAgain = "seq_given_out_again",
    /// After recovery epochs begin again from what the tails say.
    EpochForgotten = "epoch_forgotten",
}

#[cfg(feature = "canary")]
mod planted {
    use super::Canary;
    use std::cell::Cell;
    use std::marker::PhantomData;

    thread_local! {
        static PLANTED: Cell<Option<Canary>> = const { Cell::new(None) };
    }

    /// The mistake is made, by this thread alone, as long as this lives.
    #[derive(Debug)]
    pub struct Planted {
        /// Stays in its thread.
        _thread: PhantomData<*const ()>,
    }

    /// Plants a canary.
    ///
    /// # Panics
    /// There is one already.
    #[must_use]
    pub fn plant(canary: Canary) -> Planted {
        let before = PLANTED.replace(Some(canary));
        assert_eq!(before, None, "one canary at a time");
        Planted {
            _thread: PhantomData,
        }
    }

    impl Drop for Planted {
        fn drop(&mut self) {
            PLANTED.set(None);
        }
    }

    pub(super) fn current() -> Option<Canary> {
        PLANTED.get()
    }
}

#[cfg(feature = "canary")]
pub use planted::{Planted, plant};

/// Whether this mistake is to be made here.
#[cfg(feature = "canary")]
#[inline(always)]
pub(crate) fn is(canary: Canary) -> bool {
    planted::current() == Some(canary)
}

/// Whether this mistake is to be made here: never.
#[cfg(not(feature = "canary"))]
#[inline(always)]
pub(crate) const fn is(_: Canary) -> bool {
    false
}
