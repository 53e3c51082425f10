//! The management interface: `bdev_pcache_*`.

use std::ptr::NonNull;

use serde::Serialize;
use spdk_sys as sys;

use super::json::{Json, Request, members_of};
use super::registry;
use super::remove;
use super::thread::now;
use super::trampoline::guard;
use crate::engine::{ChangeError, CheckpointError, CheckpointId, SettingChange};
use crate::rpc::{Call, Members, Method, RpcError, Statistics};

/// # Safety
/// `request` and `params` are as SPDK hands them to a method's handler, on the app thread.
#[unsafe(no_mangle)]
unsafe extern "C" fn pcache_up_rpc(
    method: sys::pcache_rpc_method,
    request: *mut sys::spdk_jsonrpc_request,
    params: *const sys::spdk_json_val,
) {
    let Some(request) = NonNull::new(request) else {
        return;
    };
    guard(
        (),
        || {
            // SAFETY: by the contract of this function; a request that is dropped in a panic is answered.
            let request = unsafe { Request::from_raw(request) };
            // SAFETY: by the contract of this function.
            match unsafe { members_of(params) } {
                Ok(members) => dispatch(method, members, request),
                Err(error) => request.answer(Err(error)),
            }
        },
        |_| (),
    );
}

fn dispatch(method: sys::pcache_rpc_method, members: Members, request: Request) {
    let call = match method {
        sys::PCACHE_RPC_CREATE => Method::Create,
        sys::PCACHE_RPC_DELETE => Method::Delete,
        sys::PCACHE_RPC_GET_BDEVS => Method::GetBdevs,
        sys::PCACHE_RPC_GET_STATS => Method::GetStats,
        sys::PCACHE_RPC_RESET_STATS => Method::ResetStats,
        sys::PCACHE_RPC_FLUSH_START => Method::FlushStart,
        sys::PCACHE_RPC_FLUSH_STATUS => Method::FlushStatus,
        sys::PCACHE_RPC_SET_OPTIONS => Method::SetOptions,
        sys::PCACHE_RPC_CHECKPOINT_BEGIN => Method::CheckpointBegin,
        sys::PCACHE_RPC_CHECKPOINT_END => Method::CheckpointEnd,
        sys::PCACHE_RPC_CHECKPOINT_STATUS => Method::CheckpointStatus,
        _ => {
            let error = RpcError::invalid_params("there is no such method");
            return request.answer(Err(error));
        }
    };
    match Call::from_params(call, members) {
        Ok(call) => run(call, request),
        Err(error) => request.answer(Err(error)),
    }
}

fn run(call: Call, request: Request) {
    match call {
        Call::Create(definition) => registry::create(definition, request),
        Call::Delete(name, drain) => registry::delete(&name, drain, request),
        Call::GetBdevs(name) => request.answer(registry::describe(name.as_deref())),
        Call::GetStats(name) => request.answer(get_stats(name)),
        Call::ResetStats(name) => request.answer(reset_stats(&name)),
        Call::FlushStart(name) => request.answer(flush_start(&name)),
        Call::FlushStatus(name) => request.answer(flush_status(&name)),
        Call::SetOptions(name, change) => request.answer(set_options(&name, change)),
        Call::CheckpointBegin(asked) => {
            request.answer(checkpoint_begin(&asked.name, asked.timeout_s));
        }
        Call::CheckpointEnd(name, id) => request.answer(checkpoint_end(&name, id)),
        Call::CheckpointStatus(name) => request.answer(checkpoint_status(&name)),
    }
}

/// Statistics of one cache.
#[derive(Serialize)]
struct NamedStats<'a> {
    name: &'a str,
    #[serde(flatten)]
    statistics: Statistics,
}

/// An array with one object for each cache in use, or for the one that is named.
fn get_stats(name: Option<String>) -> Result<Json, RpcError> {
    let nodes = match name {
        Some(name) => vec![registry::online(&name)?],
        None => registry::all_online(),
    };
    let stats: Vec<_> = nodes
        .iter()
        .map(|node| NamedStats {
            name: &node.name,
            statistics: Statistics::of(&node.cache),
        })
        .collect();
    Ok(Json::of(&stats))
}

fn reset_stats(name: &str) -> Result<Json, RpcError> {
    registry::online(name)?.cache.reset_stats();
    Ok(Json::yes())
}

fn flush_start(name: &str) -> Result<Json, RpcError> {
    let node = registry::online(name)?;
    if !remove::writes_back(&node) {
        let message = format!("{name} is being closed");
        return Err(RpcError::errno(libc::EBUSY, message));
    }
    if node.cache.drain_start() {
        return Ok(Json::yes());
    }
    let message = format!("a flush of {} is running already", node.name);
    Err(RpcError::errno(libc::EBUSY, message))
}

fn flush_status(name: &str) -> Result<Json, RpcError> {
    let node = registry::online(name)?;
    Ok(Json::of(&node.cache.drain_status()))
}

fn set_options(name: &str, change: SettingChange) -> Result<Json, RpcError> {
    let node = registry::online(name)?;
    let changed = node.cache.change_settings(&change);
    changed.map_err(|error| match error {
        ChangeError::Setting(error) => RpcError::invalid_params(error.to_string()),
        ChangeError::Failed => RpcError::errno(libc::EIO, format!("{name}: {error}")),
    })?;
    Ok(Json::yes())
}

/// The number of the checkpoint; the base gets to its cut later.
fn checkpoint_begin(name: &str, timeout_s: u32) -> Result<Json, RpcError> {
    let node = registry::online(name)?;
    if !remove::is_staying(&node) {
        let message = format!("{name} is about to be deleted");
        return Err(RpcError::errno(libc::EBUSY, message));
    }
    let begun = node.cache.checkpoint_begin(timeout_s, now());
    let id = begun.map_err(|error| checkpoint_error(name, &error))?;
    log::info!("{name}: checkpoint {id} is asked for, to be held {timeout_s} s at the most");
    Ok(Json::of(&serde_json::json!({ "checkpoint_id": id })))
}

fn checkpoint_end(name: &str, id: Option<CheckpointId>) -> Result<Json, RpcError> {
    let node = registry::online(name)?;
    let ended = node.cache.checkpoint_end(id, now());
    let cut = ended.map_err(|error| checkpoint_error(name, &error))?;
    log::info!("{name}: checkpoint {} has ended", cut.checkpoint_id);
    Ok(Json::of(&cut))
}

fn checkpoint_status(name: &str) -> Result<Json, RpcError> {
    let node = registry::online(name)?;
    Ok(Json::of(&node.cache.checkpoint_status(now())))
}

fn checkpoint_error(name: &str, error: &CheckpointError) -> RpcError {
    let errno = match error {
        CheckpointError::Busy(_) => libc::EBUSY,
        CheckpointError::Missing | CheckpointError::Other { .. } => libc::ENOENT,
        CheckpointError::NotReached(_) => libc::ECANCELED,
        CheckpointError::Expired { .. } => libc::ETIMEDOUT,
        CheckpointError::Failed { .. } => libc::EIO,
    };
    RpcError::errno(errno, format!("{name}: {error}"))
}
