//! Parameters of an RPC, taken out one by one, so that a refusal names the parameter, its value and what
//! would be right.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::{Members, RpcError};

/// The parameters that have not been taken yet.
#[derive(Debug)]
pub(super) struct Params {
    left: Map<String, Value>,
    known: Vec<&'static str>,
}

impl Params {
    pub(super) fn new(members: Members) -> Self {
        Self {
            left: members.0,
            known: Vec::new(),
        }
    }

    /// An optional text.
    pub(super) fn text(&mut self, name: &'static str) -> Result<Option<String>, RpcError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(name, &other, "a text")),
        }
    }

    /// A text that has to be there.
    pub(super) fn needed_text(&mut self, name: &'static str) -> Result<String, RpcError> {
        self.text(name)?
            .ok_or_else(|| RpcError::invalid_params(format!("{name} is missing: a text is needed")))
    }

    /// An optional whole number.
    pub(super) fn number(
        &mut self,
        name: &'static str,
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, RpcError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                let (low, high) = (range.start(), range.end());
                Err(wrong(
                    name,
                    &value,
                    &format!("a whole number from {low} to {high}"),
                ))
            }
        }
    }

    /// An optional yes or no.
    pub(super) fn flag(&mut self, name: &'static str) -> Result<Option<bool>, RpcError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(wrong(name, &other, "true or false")),
        }
    }

    /// An optional word out of a list.
    pub(super) fn choice<T: Copy>(
        &mut self,
        name: &'static str,
        choices: &[(&str, T)],
    ) -> Result<Option<T>, RpcError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let found = value
            .as_str()
            .and_then(|word| choices.iter().find(|choice| choice.0 == word));
        match found {
            Some(choice) => Ok(Some(choice.1)),
            None => {
                let words: Vec<_> = choices
                    .iter()
                    .map(|choice| format!("\"{}\"", choice.0))
                    .collect();
                Err(wrong(name, &value, &format!("one of {}", words.join(", "))))
            }
        }
    }

    /// Refuses what has not been taken.
    pub(super) fn finish(self) -> Result<(), RpcError> {
        let Some(unknown) = self.left.keys().next() else {
            return Ok(());
        };
        let known = match self.known.as_slice() {
            [] => "this method takes none".to_owned(),
            names => format!("this method knows {}", names.join(", ")),
        };
        Err(RpcError::invalid_params(format!(
            "there is no parameter {unknown:?}: {known}"
        )))
    }

    /// An explicit null is as good as nothing.
    fn take(&mut self, name: &'static str) -> Option<Value> {
        self.known.push(name);
        self.left.remove(name).filter(|value| !value.is_null())
    }
}

fn wrong(name: &str, value: &Value, right: &str) -> RpcError {
    RpcError::invalid_params(format!("{name} is {value}: {right} is needed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(text: &str) -> Params {
        Params::new(Members::parse(text.as_bytes()).unwrap())
    }

    #[test]
    fn a_refusal_names_parameter_value_and_what_is_right() {
        let error = params(r#"{"gc_percent": 91}"#)
            .number("gc_percent", 0..=90)
            .unwrap_err();
        assert_eq!(
            error.message,
            "gc_percent is 91: a whole number from 0 to 90 is needed"
        );
        let error = params(r#"{"drain": "yes"}"#).flag("drain").unwrap_err();
        assert_eq!(error.message, "drain is \"yes\": true or false is needed");
        let error = params("{}").needed_text("name").unwrap_err();
        assert_eq!(error.message, "name is missing: a text is needed");
    }

    #[test]
    fn negative_and_broken_numbers_are_refused() {
        for text in [
            r#"{"n": -1}"#,
            r#"{"n": 1.5}"#,
            r#"{"n": "1"}"#,
            r#"{"n": [1]}"#,
        ] {
            assert!(params(text).number("n", 0..=10).is_err(), "{text}");
        }
    }

    #[test]
    fn unknown_parameters_are_refused_with_the_known_ones() {
        let mut params = params(r#"{"name": "a", "nmae": "b"}"#);
        params.needed_text("name").unwrap();
        let message = params.finish().unwrap_err().message;
        assert_eq!(
            message,
            "there is no parameter \"nmae\": this method knows name"
        );
    }

    #[test]
    fn a_parameter_given_twice_is_refused() {
        let error = Members::parse(br#"{"a": 1, "a": 2}"#).unwrap_err();
        assert!(error.message.contains("a is given twice"));
    }
}
