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
