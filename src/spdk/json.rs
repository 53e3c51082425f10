//! JSON between SPDK's parser and writer and `serde_json`.

use std::ffi::{CString, c_int, c_void};
use std::ptr::NonNull;

use serde::Serialize;
use spdk_sys as sys;

use crate::rpc::{Members, RpcError};

impl RpcError {
    /// The operation failed; `errno` is positive.
    pub(super) fn errno(errno: i32, message: impl Into<String>) -> Self {
        Self {
            code: -errno,
            message: message.into(),
        }
    }

    fn internal(message: impl Into<String>) -> Self {
        Self {
            code: sys::SPDK_JSONRPC_ERROR_INTERNAL_ERROR,
            message: message.into(),
        }
    }
}

/// One whole JSON value, as text: its members stay in the order in which they were declared.
#[derive(Clone, Debug)]
pub(super) struct Json(String);

impl Json {
    pub(super) fn of(value: &impl Serialize) -> Self {
        // What is written here are structs and maps with text keys: they cannot fail to serialise.
        Self(serde_json::to_string(value).unwrap_or_else(|_| "null".to_owned()))
    }

    /// What methods answer that have nothing to tell.
    pub(super) fn yes() -> Self {
        Self("true".to_owned())
    }
}

/// An RPC that waits for its answer. It gets exactly one: if it is dropped without, an internal error.
#[derive(Debug)]
pub(super) struct Request(Option<NonNull<sys::spdk_jsonrpc_request>>);

impl Request {
    /// # Safety
    /// `request` is one that SPDK handed to a method's handler and that nobody has answered.
    pub(super) unsafe fn from_raw(request: NonNull<sys::spdk_jsonrpc_request>) -> Self {
        Self(Some(request))
    }

    /// Answers.
    pub(super) fn answer(mut self, result: Result<Json, RpcError>) {
        match result {
            Ok(value) => self.send_result(&value),
            Err(error) => self.send_error(&error),
        }
    }

    fn send_result(&mut self, Json(text): &Json) {
        let Some(request) = self.0.take() else { return };
        // SAFETY: the request is unanswered (it was still in `self`); the text is one whole JSON value and
        // is copied.
        unsafe {
            let writer = sys::spdk_jsonrpc_begin_result(request.as_ptr());
            sys::spdk_json_write_val_raw(writer, text.as_ptr().cast(), text.len());
            sys::spdk_jsonrpc_end_result(request.as_ptr(), writer);
        }
    }

    fn send_error(&mut self, error: &RpcError) {
        let Some(request) = self.0.take() else { return };
        // A text from the outside (a file name) may hold a NUL, which C's strings cannot.
        let message = CString::new(error.message.replace('\0', "\\0")).unwrap_or_default();
        // SAFETY: the request is unanswered (it was still in `self`); the message is copied.
        unsafe {
            sys::spdk_jsonrpc_send_error_response(request.as_ptr(), error.code, message.as_ptr());
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.send_error(&RpcError::internal(
            "internal error of the pcache module; see the log",
        ));
    }
}

/// The parameters of an RPC.
///
/// # Safety
/// `params` is NULL or a parsed value as SPDK hands it to a method's handler.
pub(super) unsafe fn members_of(params: *const sys::spdk_json_val) -> Result<Members, RpcError> {
    if params.is_null() {
        return Ok(Members::default());
    }
    let mut text: Vec<u8> = Vec::new();
    // SAFETY: the writer appends to `text`, which outlives it; `params` by the contract of this function.
    let rc = unsafe {
        let writer = sys::spdk_json_write_begin(Some(append), (&raw mut text).cast(), 0);
        if writer.is_null() {
            return Err(RpcError::errno(
                libc::ENOMEM,
                "there is no memory to read the parameters",
            ));
        }
        let written = sys::spdk_json_write_val(writer, params);
        let ended = sys::spdk_json_write_end(writer);
        if written != 0 { written } else { ended }
    };
    if rc != 0 {
        return Err(RpcError::invalid_params("the parameters cannot be read"));
    }
    Members::parse(&text)
}

/// Called by SPDK's writer with a piece of its output.
unsafe extern "C" fn append(ctx: *mut c_void, data: *const c_void, size: usize) -> c_int {
    if size > 0 {
        // SAFETY: `ctx` is the vector that `members_of` passed in, which nobody else uses meanwhile; `data`
        // has `size` bytes by the writer's contract.
        unsafe {
            let text = &mut *ctx.cast::<Vec<u8>>();
            text.extend_from_slice(std::slice::from_raw_parts(data.cast(), size));
        }
    }
    0
}

/// A place in a JSON text that SPDK is writing.
#[derive(Debug)]
pub(super) struct Writer(NonNull<sys::spdk_json_write_ctx>);

impl Writer {
    /// # Safety
    /// `writer` is one that SPDK handed to a callback, and it is used during that callback only.
    pub(super) unsafe fn from_raw(writer: NonNull<sys::spdk_json_write_ctx>) -> Self {
        Self(writer)
    }

    /// Writes a value, where one is due.
    pub(super) fn value(&mut self, value: &impl Serialize) {
        let Json(text) = Json::of(value);
        // SAFETY: the writer is valid (contract of `from_raw`); the text is one whole value and is copied.
        unsafe {
            sys::spdk_json_write_val_raw(self.0.as_ptr(), text.as_ptr().cast(), text.len());
        }
    }

    /// Writes a member, inside an object.
    pub(super) fn member(&mut self, name: &str, value: &impl Serialize) {
        // SAFETY: the writer is valid (contract of `from_raw`); the name is copied.
        unsafe {
            sys::spdk_json_write_name_raw(self.0.as_ptr(), name.as_ptr().cast(), name.len());
        }
        self.value(value);
    }
}
