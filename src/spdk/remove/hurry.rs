//! A base that ends nothing of what was asked of it, while its cache is on its way out, is reset, as for a RESET of a cache in use
//! (`reset.rs`): nobody could ask for that any more, and without an end of it there is none of the cache, nor of the base, nor of
//! the application. Again and again, since a base may fail its reset, but less and less often, down to once a minute.

use crate::retry::is_rare;
use crate::spdk::base::os_text;
use crate::spdk::node::Node;
use crate::spdk::reset::{BASE_RESET_AFTER_US, BASE_RESETS_APART};
use crate::spdk::thread::now;
use crate::units::NS_PER_US;

/// Looks at the base of a cache on its way out.
pub(super) fn look(node: &Node) {
    let app = node.app.get();
    let driver = app.driver.borrow();
    let Some(queue) = driver.as_ref().map(|driver| driver.queue()) else {
        return;
    };
    let (reads, reads_ended) = node.cache.base_reads();
    let (under_way, ended) = (queue.in_flight() + reads, queue.ended() + reads_ended);
    let (time, after_ns) = (now(), BASE_RESET_AFTER_US * NS_PER_US);
    let mut removal = app.removal.borrow_mut();
    let stood = removal.standstill.lasts(under_way, ended, time, after_ns);
    drop(removal);
    if !stood.is_some_and(|times| is_rare(times, BASE_RESETS_APART)) {
        return;
    }
    let name = &node.name;
    log::warn!(
        "{name}: the base does not end {under_way} operations, and the cache is being closed: it is reset"
    );
    if let Err(errno) = queue.reset() {
        log::warn!("{name}: the base cannot be reset yet: {}", os_text(errno));
    }
}
