//! The JSON object that parameters come in.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::RpcError;

/// The members of a JSON object, each name once.
#[derive(Debug, Default)]
pub(crate) struct Members(pub(super) Map<String, Value>);

impl Members {
    /// From the text of an object.
    pub(crate) fn parse(text: &[u8]) -> Result<Self, RpcError> {
        serde_json::from_slice(text)
            .map_err(|error| RpcError::invalid_params(format!("the parameters are wrong: {error}")))
    }
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Once;
        impl<'de> Visitor<'de> for Once {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with named parameters")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Members, A::Error> {
                let mut members = Map::new();
                while let Some((name, value)) = access.next_entry::<String, Value>()? {
                    if members.contains_key(&name) {
                        return Err(A::Error::custom(format!("{name} is given twice")));
                    }
                    members.insert(name, value);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Once)
    }
}
