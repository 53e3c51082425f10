//! The methods `bdev_pcache_*`: which parameters each of them takes.

use super::definition::{check_change, settings};
use super::{Definition, Members, Params, RpcError};
use crate::engine::{
    CHECKPOINT_TIMEOUT_S_DEFAULT, CHECKPOINT_TIMEOUT_S_RANGE, CheckpointId, SettingChange,
};

/// A method, without the prefix of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Create,
    Delete,
    GetBdevs,
    GetStats,
    ResetStats,
    FlushStart,
    FlushStatus,
    SetOptions,
    CheckpointBegin,
    CheckpointEnd,
    CheckpointStatus,
}

/// Whether dirty data are written to the base before a cache is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drain {
    No,
    Yes,
}

/// What is asked for, checked as far as it can be without looking at any cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Create(Definition),
    /// The name of the cache, and what comes first.
    Delete(String, Drain),
    /// Of the one that is named, or of all.
    GetBdevs(Option<String>),
    /// Of the one that is named, or of all.
    GetStats(Option<String>),
    ResetStats(String),
    FlushStart(String),
    FlushStatus(String),
    SetOptions(String, SettingChange),
    CheckpointBegin(CheckpointRequest),
    /// The cache, and which of its checkpoints.
    CheckpointEnd(String, Option<CheckpointId>),
    CheckpointStatus(String),
}

/// A checkpoint that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CheckpointRequest {
    /// Of the cache.
    pub(crate) name: String,
    /// How long the base is held at most, in seconds.
    pub(crate) timeout_s: u32,
}

impl CheckpointRequest {
    fn take(params: &mut Params) -> Result<Self, RpcError> {
        let name = params.needed_text("name")?;
        let (low, high) = CHECKPOINT_TIMEOUT_S_RANGE.into_inner();
        let timeout_s = params.number("timeout_s", u64::from(low)..=u64::from(high))?;
        Ok(Self {
            name,
            // In range, as just checked.
            timeout_s: timeout_s
                .and_then(|timeout_s| u32::try_from(timeout_s).ok())
                .unwrap_or(CHECKPOINT_TIMEOUT_S_DEFAULT),
        })
    }
}

impl Call {
    /// From the parameters of a method.
    pub(crate) fn from_params(method: Method, members: Members) -> Result<Self, RpcError> {
        let mut params = Params::new(members);

        let call = match method {
            Method::Create => Call::Create(Definition::take(&mut params)?),
            Method::Delete => {
                let name = params.needed_text("name")?;
                let drain = match params.flag("drain")? {
                    Some(true) => Drain::Yes,
                    Some(false) | None => Drain::No,
                };
                Call::Delete(name, drain)
            }
            Method::GetBdevs => Call::GetBdevs(params.text("name")?),
            Method::GetStats => Call::GetStats(params.text("name")?),
            Method::ResetStats => Call::ResetStats(params.needed_text("name")?),
            Method::FlushStart => Call::FlushStart(params.needed_text("name")?),
            Method::FlushStatus => Call::FlushStatus(params.needed_text("name")?),
            Method::SetOptions => {
                let name = params.needed_text("name")?;
                Call::SetOptions(name, settings(&mut params)?)
            }
            Method::CheckpointBegin => Call::CheckpointBegin(CheckpointRequest::take(&mut params)?),
            Method::CheckpointEnd => {
                let name = params.needed_text("name")?;
                let id = params.number("checkpoint_id", 0..=u64::MAX)?;
                Call::CheckpointEnd(name, id)
            }
            Method::CheckpointStatus => Call::CheckpointStatus(params.needed_text("name")?),
        };
        // What is unknown is told first: it may be what the caller has misspelt.
        params.finish()?;
        call.check()?;
        Ok(call)
    }

    fn check(&self) -> Result<(), RpcError> {
        match self {
            Call::Create(definition) => definition.check(),
            Call::SetOptions(_, change) => check_change(change),
            _ => Ok(()),
        }
    }
}
