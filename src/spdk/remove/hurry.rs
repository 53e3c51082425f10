//! A base that ends nothing of what was asked of it, while its cache is on its way out, is reset: nobody could ask for that any more
//! by way of the cache, and without an end of what is under way there is none of the cache, nor of the base, nor of the
//! application. Again and again, since a base may fail its reset, but less and less often.

use crate::engine::StallWatch;
use crate::retry::is_rare;
use crate::spdk::base::os_text;
use crate::spdk::node::Node;
use crate::spdk::thread::now;

/// At last every so many times in which it was silent for too long: once in two minutes.
const RESETS_APART: u32 = 8;

/// What is known of a base that is waited for.
#[derive(Debug, Default)]
pub(super) struct Hurry {
    silence: StallWatch,
    /// What it has ended so far.
    ended: u64,
    /// How often it was silent for too long since.
    silences: u32,
}

impl Hurry {
    /// To be called again and again. Some: the base has ended nothing for so many seconds, and is to be reset.
    fn is_due(&mut self, under_way: usize, ended: u64) -> Option<u64> {
        if self.ended != ended {
            *self = Self::default();
            self.ended = ended;
        }
        let silent_s = self.silence.silent_s(now(), under_way)?;
        self.silence.heard();
        self.silences += 1;
        is_rare(self.silences, RESETS_APART).then_some(silent_s)
    }
}

/// Looks at the base of a cache on its way out.
pub(super) fn look(node: &Node) {
    let app = node.app.get();
    let driver = app.driver.borrow();
    let Some(queue) = driver.as_ref().map(|driver| driver.queue()) else {
        return;
    };
    if node.base.is_resetting() {
        return;
    }
    let (reads, reads_ended) = node.cache.base_reads();
    let (under_way, ended) = (
        queue.in_flight() + reads,
        queue.landed_count() + reads_ended,
    );
    let due = app.removal.borrow_mut().hurry.is_due(under_way, ended);
    let Some(silent_s) = due else {
        return;
    };
    let name = &node.name;
    log::warn!(
        "{name}: the base has ended none of {under_way} operations for {silent_s} s, and the cache is being closed: the base is reset"
    );
    if let Err(errno) = queue.reset() {
        log::warn!("{name}: the base cannot be reset yet: {}", os_text(errno));
    }
}
