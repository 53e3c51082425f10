//! The background, apart from what it does.

use super::*;
use crate::engine::invariant_tests::new_cache;
use crate::pmem::IovBuf;
use crate::units::{Lba, Now};
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
