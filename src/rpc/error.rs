//! What the caller of an RPC is told when it does not work.

use std::fmt;

/// "Invalid params" of JSON-RPC 2.0.
const INVALID_PARAMS: i32 = -32602;

/// An error for the caller of an RPC: a JSON-RPC code or a negative errno, and a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RpcError {
    pub(crate) code: i32,
    pub(crate) message: String,
}

impl RpcError {
    /// The parameters are wrong: the message names the parameter, its value and what would be right.
    pub(crate) fn invalid_params(message: impl Into<String>) -> Self {
        Self {
            code: INVALID_PARAMS,
            message: message.into(),
        }
    }
}

impl fmt::Display for RpcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
