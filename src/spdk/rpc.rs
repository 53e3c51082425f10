//! The management interface: `bdev_pcache_*`.

use std::ptr::NonNull;

use serde::Serialize;
use spdk_sys as sys;

use super::definition::{Definition, check_change, option_change};
use super::json::{Json, Members, Request, RpcError, members_of};
use super::params::Params;
use super::registry;
use super::remove::Drain;
use super::trampoline::guard;
use crate::engine::Stats;

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
    match method {
        sys::PCACHE_RPC_CREATE => match Definition::from_params(members) {
            Ok(definition) => registry::create(definition, request),
            Err(error) => request.answer(Err(error)),
        },
        sys::PCACHE_RPC_DELETE => match delete_params(members) {
            Ok((name, drain)) => registry::delete(&name, drain, request),
            Err(error) => request.answer(Err(error)),
        },
        sys::PCACHE_RPC_GET_BDEVS => request.answer(get_bdevs(members)),
        sys::PCACHE_RPC_GET_STATS => request.answer(get_stats(members)),
        sys::PCACHE_RPC_RESET_STATS => request.answer(reset_stats(members)),
        sys::PCACHE_RPC_FLUSH_START => request.answer(flush_start(members)),
        sys::PCACHE_RPC_FLUSH_STATUS => request.answer(flush_status(members)),
        sys::PCACHE_RPC_SET_OPTIONS => request.answer(set_options(members)),
        _ => request.answer(Err(RpcError::invalid_params("there is no such method"))),
    }
}

fn delete_params(members: Members) -> Result<(String, Drain), RpcError> {
    let mut params = Params::new(members);
    let name = params.needed_text("name")?;
    let drain = match params.flag("drain")? {
        Some(true) => Drain::Yes,
        Some(false) | None => Drain::No,
    };
    params.finish()?;
    Ok((name, drain))
}

fn get_bdevs(members: Members) -> Result<Json, RpcError> {
    let mut params = Params::new(members);
    let name = params.text("name")?;
    params.finish()?;
    registry::describe(name.as_deref())
}

/// Statistics of one cache.
#[derive(Serialize)]
struct NamedStats<'a> {
    name: &'a str,
    #[serde(flatten)]
    stats: Stats,
}

/// An array with one object for each cache in use, or for the one that is named.
fn get_stats(members: Members) -> Result<Json, RpcError> {
    let mut params = Params::new(members);
    let name = params.text("name")?;
    params.finish()?;
    let nodes = match name {
        Some(name) => vec![registry::online(&name)?],
        None => registry::all_online(),
    };
    let stats: Vec<_> = nodes
        .iter()
        .map(|node| NamedStats {
            name: &node.name,
            stats: node.cache.stats(),
        })
        .collect();
    Ok(Json::of(&stats))
}

fn reset_stats(members: Members) -> Result<Json, RpcError> {
    registry::online(&only_name(members)?)?.cache.reset_stats();
    Ok(Json::yes())
}

fn flush_start(members: Members) -> Result<Json, RpcError> {
    let node = registry::online(&only_name(members)?)?;
    if node.cache.drain_start() {
        return Ok(Json::yes());
    }
    let message = format!("a flush of {} is running already", node.name);
    Err(RpcError::errno(libc::EBUSY, message))
}

fn flush_status(members: Members) -> Result<Json, RpcError> {
    let node = registry::online(&only_name(members)?)?;
    Ok(Json::of(&node.cache.drain_status()))
}

fn set_options(members: Members) -> Result<Json, RpcError> {
    let mut params = Params::new(members);
    let name = params.needed_text("name")?;
    let change = option_change(&mut params)?;
    params.finish()?;
    check_change(&change)?;
    let node = registry::online(&name)?;
    node.cache
        .change_options(change)
        .map_err(|error| RpcError::invalid_params(error.to_string()))?;
    Ok(Json::yes())
}

fn only_name(members: Members) -> Result<String, RpcError> {
    let mut params = Params::new(members);
    let name = params.needed_text("name")?;
    params.finish()?;
    Ok(name)
}
