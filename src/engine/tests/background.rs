//! The background, apart from what it does.

use super::*;
use crate::engine::invariant_tests::new_cache;
use crate::pmem::IovBuf;
use crate::units::{Lba, NS_PER_S, Now};
use std::sync::Arc;

/// A cache with something dirty that is to be drained.
fn dirty() -> (Arc<Cache<SimPmem>>, Background<SimPmem>) {
    let cache = new_cache();
    let background = cache.background().expect("the first");
    let mut channel = cache.channel().expect("the first");
    let (buf, mut out) = (IovBuf::new(&[7; 512], &[]), Outbox::new());
    for lba in [3, 40] {
        let io = HostIo {
            token: IoToken(lba),
            op: Op::Write(buf.cursor(), Fua::No),
            lba: Lba(lba),
            len_blocks: 1,
        };
        channel.submit(io).expect("the table is empty");
        channel.poll(Now(0), &mut out);
    }
    assert_eq!(out.completions.len(), 2);
    cache.drain_start();
    (cache, background)
}

/// Polls until operations are asked of the base.
fn asked(background: &mut Background<SimPmem>) -> Vec<BaseRequest> {
    let mut out = Outbox::new();
    for poll in 1..1000 {
        background.poll(Now(poll), Budget::default(), &mut out);
        if !out.base.is_empty() {
            return out.base;
        }
    }
    panic!("nothing is asked of the base");
}

fn end(background: &mut Background<SimPmem>, ops: &[BaseRequest]) {
    for request in ops {
        background.on_base_done(request.op, Ok(()), Now(2000));
    }
}

#[test]
fn nothing_is_stored_when_operations_of_the_base_end_after_an_internal_error() {
    for polls_before in [0, 1] {
        let (cache, mut background) = dirty();
        for _ in 0..polls_before {
            let writes = asked(&mut background);
            end(&mut background, &writes);
        }
        let last = asked(&mut background);
        let is_flush = matches!(last[0].kind, BaseKind::Flush);
        assert_eq!(is_flush, polls_before == 1);
        assert_eq!(background.in_flight(), last.len());
        cache.poison("a channel has panicked");
        let before = cache.pmem.live_image();
        end(&mut background, &last);
        let mut out = Outbox::new();
        for poll in 3000..3100 {
            background.poll(Now(poll), Budget::default(), &mut out);
        }
        assert!(out.base.is_empty());
        assert_eq!(background.in_flight(), 0, "the base owes nothing");
        assert_eq!(cache.dirty_tail(), Seq(0));
        assert!(cache.pmem.live_image() == before);
    }
}

/// Another one would not know of the segments that this one has heard of, and take what lies in them for clean.
#[test]
fn the_background_is_given_out_once() {
    let (cache, mut background) = dirty();
    assert!(cache.background().is_none());
    asked(&mut background);
    drop(background);
    assert!(cache.background().is_none());
}

#[test]
fn writes_that_the_base_does_not_answer_are_told_until_a_batch_ends() {
    let (cache, mut background) = dirty();
    let writes = asked(&mut background);
    assert_eq!(writes.len(), 2);
    let health_at = |background: &mut Background<SimPmem>, seconds: u64| {
        let now = Now(seconds * NS_PER_S);
        background.poll(now, Budget::default(), &mut Outbox::new());
        cache.health()
    };
    let silent = |text: &str| {
        let reason = format!(
            "the base has not answered for {text} of write-back under way; nothing is lost"
        );
        Health::WritebackFailing(reason)
    };
    for seconds in [1, 15] {
        assert_eq!(health_at(&mut background, seconds), Health::Online);
    }
    let told = silent("15 s, with 2 operations");
    for seconds in [16, 17] {
        assert_eq!(health_at(&mut background, seconds), told);
    }
    // One of two is an answer, but no end.
    end(&mut background, &writes[..1]);
    assert_eq!(health_at(&mut background, 40), told);
    end(&mut background, &writes[1..]);
    let flush = asked(&mut background);
    assert!(matches!(flush[0].kind, BaseKind::Flush));
    assert_eq!(cache.health(), told);
    end(&mut background, &flush);
    assert_eq!(health_at(&mut background, 60), Health::Online);
}

#[test]
fn reads_that_the_base_does_not_answer_are_told_and_that_is_taken_back() {
    let cache = new_cache();
    let mut background = cache.background().expect("the first");
    let mut channel = cache.channel().expect("the first");
    let (bufs, mut out) = ([0, 40].map(|_| IovBuf::zeroed(512)), Outbox::new());
    for (lba, buf) in [3, 40].into_iter().zip(&bufs) {
        let io = HostIo {
            token: IoToken(lba),
            op: Op::Read(buf.cursor()),
            lba: Lba(lba),
            len_blocks: 1,
        };
        channel.submit(io).expect("the table is empty");
    }
    channel.poll(Now(0), &mut out);
    let reads: Vec<_> = out.base.iter().map(|request| request.op).collect();
    assert_eq!(reads.len(), 2);
    let mut health_at = |seconds: u64| {
        let now = Now(seconds * NS_PER_S);
        background.poll(now, Budget::default(), &mut Outbox::new());
        cache.health()
    };
    assert_eq!(
        [0, 14].map(&mut health_at),
        [Health::Online, Health::Online]
    );
    let silent = |text: &str| {
        let reason = format!("the base has not answered for {text}; nothing is lost");
        Health::WritebackFailing(reason)
    };
    let told = silent("15 s, with 2 reads under way");
    assert_eq!([15, 16].map(&mut health_at), [told.clone(), told]);
    channel.on_base_done(reads[0], Ok(()));
    assert_eq!(
        [20, 34].map(&mut health_at),
        [Health::Online, Health::Online]
    );
    assert_eq!(health_at(35), silent("15 s, with 1 reads under way"));
    // What something else says meanwhile stays.
    let other = Health::WritebackFailing("the base fails flushes".to_owned());
    cache.set_health(other.clone());
    channel.on_base_done(reads[1], Ok(()));
    assert_eq!([36, 60].map(&mut health_at), [other.clone(), other]);
}

/// A cache with many dirty blocks that are apart, which are to be drained.
fn dirty_apart(count: u64) -> (Arc<Cache<SimPmem>>, Background<SimPmem>) {
    let setup = crate::sim::machine::Setup {
        block_count: 16 * count,
        segment_count: 128,
        segment_size_bytes: 64 << 10,
        ..crate::sim::machine::Setup::default()
    };
    let cache = crate::engine::invariant_tests::new_cache_of(&setup);
    let background = cache.background().expect("the first");
    let mut channel = cache.channel().expect("the first");
    let (buf, mut out) = (IovBuf::new(&[7; 512], &[]), Outbox::new());
    for number in 0..count {
        let io = HostIo {
            token: IoToken(number),
            op: Op::Write(buf.cursor(), Fua::No),
            lba: Lba(16 * number),
            len_blocks: 1,
        };
        channel.submit(io).expect("the table is empty");
        out.clear();
        channel.poll(Now(0), &mut out);
        assert_eq!(out.completions.len(), 1);
    }
    cache.drain_start();
    (cache, background)
}

/// Answers all operations for so many seconds, as `result` says of the number of each. Returns how many rounds of them with
/// an error there were, and after how many seconds nothing is dirty any more.
fn answer(
    cache: &Cache<SimPmem>,
    background: &mut Background<SimPmem>,
    seconds: u64,
    result: impl Fn(u64, &BaseKind) -> Result<(), BaseError>,
) -> (usize, Option<u64>) {
    let (mut number, mut failing_rounds, mut out) = (0, 0, Outbox::new());
    let mut now = Now(NS_PER_S);
    for ms in 0..seconds * 1000 {
        now.0 += NS_PER_S / 1000;
        out.clear();
        background.poll(now, Budget::default(), &mut out);
        let mut has_failed = false;
        for request in &out.base {
            number += 1;
            let result = result(number, &request.kind);
            has_failed |= result.is_err();
            background.on_base_done(request.op, result, now);
        }
        failing_rounds += usize::from(has_failed);
        if !cache.drain_status().in_progress {
            return (failing_rounds, Some(ms / 1000));
        }
    }
    (failing_rounds, None)
}

#[test]
fn a_base_that_fails_few_operations_of_many_is_not_taken_for_one_that_fails() {
    let (cache, mut background) = dirty_apart(1000);
    let few = |number: u64, kind: &BaseKind| match kind {
        BaseKind::Write { .. } if number.is_multiple_of(20) => Err(BaseError::Io),
        _ => Ok(()),
    };
    let (rounds, ended) = answer(&cache, &mut background, 600, few);
    assert!(rounds > 20, "{rounds} rounds");
    assert!(ended.is_some_and(|seconds| seconds < 10), "{ended:?}");
    assert_eq!(cache.health(), Health::Online);
}

#[test]
fn a_base_that_fails_everything_is_asked_less_and_less_often() {
    let (cache, mut background) = dirty_apart(100);
    let all = |_, _: &BaseKind| Err(BaseError::Io);
    let (rounds, ended) = answer(&cache, &mut background, 60, all);
    assert_eq!(ended, None);
    assert!((10..25).contains(&rounds), "{rounds} rounds in a minute");
}

/// The writes that end well before the flush are lost with it.
#[test]
fn a_base_that_fails_its_flushes_is_asked_less_and_less_often() {
    let (cache, mut background) = dirty_apart(100);
    let flushes = |number: u64, kind: &BaseKind| match kind {
        BaseKind::Flush => Err(BaseError::Io),
        // Some of these as well.
        _ if number.is_multiple_of(40) => Err(BaseError::Io),
        _ => Ok(()),
    };
    let (rounds, ended) = answer(&cache, &mut background, 60, flushes);
    assert_eq!(ended, None);
    assert!((10..40).contains(&rounds), "{rounds} rounds in a minute");
}
