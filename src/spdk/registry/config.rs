//! What `save_config` writes.

use serde_json::Value;

use super::{Entry, EntryId, State, node_of, with, with_entry};
use crate::spdk::remove;

/// The call that makes the cache again, with what was changed since it was created. None: it is being deleted.
pub(in crate::spdk) fn config_of(id: EntryId) -> Option<Value> {
    let node = node_of(id)?;
    if remove::is_leaving_for_good(&node) {
        return None;
    }
    with_entry(id, |entry| {
        entry.definition.to_config_of(&node.cache.info())
    })
}

/// The calls that make the caches that have no bdev now.
pub(in crate::spdk) fn configs_without_bdev() -> Vec<Value> {
    let stays = |entry: &&Entry| match &entry.state {
        State::Waiting { .. } | State::Awaiting(_) | State::Creating(_) => true,
        State::Online(node) => remove::stays_without_bdev(node),
        State::Closing { stays, .. } => *stays,
    };
    with(|registry| {
        let without = registry.entries.iter().filter(stays);
        without.map(|entry| entry.definition.to_config()).collect()
    })
}
