//! What `bdev_pcache_create` was told: enough to open the cache, now or when its base device turns up.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Params, RpcError};
#[cfg(feature = "spdk")]
use crate::engine::CacheInfo;
use crate::engine::{DataCrc, FormatPolicy, SETTINGS, SettingChange, SettingValueKind};

/// The longest name of a cache, in bytes. SPDK has no limit of its own; its tools print names in columns,
/// and NVMe-oF and iSCSI derive shorter ones from them.
const NAME_LEN_MAX: usize = 255;
/// The longest name of a base device, in bytes: what fits into a superblock.
const BASE_NAME_LEN_MAX: usize = 255;

/// The smallest cache device that makes sense.
pub(crate) const CACHE_SIZE_MIB_MIN: u64 = 8;
/// The largest that can be asked for: 16 TiB.
const CACHE_SIZE_MIB_MAX: u64 = 16 << 20;
/// The smallest segment: a write of 64 KiB, which is to be atomic, has to fit into a quarter of one.
const SEGMENT_SIZE_KIB_MIN: u64 = 256;
/// The largest: offsets within a segment are 32 bits wide.
const SEGMENT_SIZE_KIB_MAX: u64 = 1 << 20;

const FORMATS: &[(&str, FormatPolicy)] = &[
    ("auto", FormatPolicy::Auto),
    ("never", FormatPolicy::Never),
    ("force", FormatPolicy::Force),
];

/// A cache as the user described it. `None`: not given; what the media say holds, or the default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Definition {
    /// Of the cache's bdev.
    pub(crate) name: String,
    /// Name or alias (uuid) of the bdev behind the cache.
    pub(crate) base_bdev_name: String,
    /// The cache device.
    pub(crate) cache_path: PathBuf,
    pub(crate) cache_size_mib: Option<u64>,
    pub(crate) data_crc: Option<DataCrc>,
    pub(crate) segment_size_kib: Option<u64>,
    pub(crate) settings: SettingChange,
    pub(crate) format: FormatPolicy,
}

impl Definition {
    /// Takes the parameters of `bdev_pcache_create`; [`Definition::check`] is still to be asked.
    pub(super) fn take(params: &mut Params) -> Result<Self, RpcError> {
        let name = params.needed_text("name")?;
        let base_bdev_name = params.needed_text("base_bdev_name")?;
        let cache_path = params.needed_text("cache_path")?;
        Ok(Self {
            cache_size_mib: params
                .number("cache_size_mib", CACHE_SIZE_MIB_MIN..=CACHE_SIZE_MIB_MAX)?,
            data_crc: params
                .flag("data_crc")?
                .map(|on| if on { DataCrc::On } else { DataCrc::Off }),
            segment_size_kib: params.number(
                "segment_size_kib",
                SEGMENT_SIZE_KIB_MIN..=SEGMENT_SIZE_KIB_MAX,
            )?,
            settings: settings(params)?,
            format: params.choice("format", FORMATS)?.unwrap_or_default(),
            name,
            base_bdev_name,
            cache_path: PathBuf::from(cache_path),
        })
    }

    /// Refuses what cannot be, as far as it can be told without looking at a device.
    pub(super) fn check(&self) -> Result<(), RpcError> {
        check_name("name", &self.name, NAME_LEN_MAX)?;
        check_name("base_bdev_name", &self.base_bdev_name, BASE_NAME_LEN_MAX)?;
        if self.name == self.base_bdev_name {
            return Err(RpcError::invalid_params(format!(
                "name and base_bdev_name are both {:?}: the cache needs a name of its own",
                self.name
            )));
        }
        if !self.cache_path.is_absolute() || has_nul(&self.cache_path) {
            return Err(RpcError::invalid_params(format!(
                "cache_path is {:?}: an absolute path is needed",
                self.cache_path
            )));
        }
        match self.segment_size_kib {
            Some(size_kib) if !size_kib.is_power_of_two() => Err(RpcError::invalid_params(
                format!("segment_size_kib is {size_kib}: a power of two is needed"),
            )),
            _ => Ok(()),
        }
    }

    /// The size of a file to be created.
    #[cfg(feature = "spdk")]
    pub(crate) fn cache_size_bytes(&self) -> Option<u64> {
        self.cache_size_mib.map(|mib| mib << 20)
    }

    /// The cache was opened: from now on the definition describes that very cache, and nothing may be
    /// formatted in its place.
    #[cfg(feature = "spdk")]
    pub(crate) fn settle(&mut self, info: &CacheInfo) {
        self.format = FormatPolicy::Never;
        self.data_crc = Some(if info.data_crc {
            DataCrc::On
        } else {
            DataCrc::Off
        });
        self.segment_size_kib = Some(info.segment_size_kib);
        self.settings = SettingChange::all_of(&info.settings);
    }

    /// The call that makes the same cache again.
    ///
    /// A configuration is loaded again and again. So it never says that something is to be formatted by
    /// force, and once the cache exists it says that nothing is to be formatted at all: should the cache
    /// device be lost or exchanged, loading fails instead of starting over with an empty cache in front of
    /// a base device that lacks the dirty data.
    pub(crate) fn to_config(&self) -> Value {
        let format = match self.format {
            FormatPolicy::Force => FormatPolicy::Auto,
            other => other,
        };
        let mut params = json!({
            "name": self.name,
            "base_bdev_name": self.base_bdev_name,
            "cache_path": self.cache_path.to_string_lossy(),
            "format": format,
        });
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                params[name] = value;
            }
        };
        put("cache_size_mib", self.cache_size_mib.map(Value::from));
        put(
            "data_crc",
            self.data_crc.map(|crc| Value::from(crc == DataCrc::On)),
        );
        put("segment_size_kib", self.segment_size_kib.map(Value::from));
        for info in SETTINGS {
            let value = self.settings.get(info.setting);
            let say = |value| match info.kind {
                SettingValueKind::Number { .. } => Value::from(value),
                SettingValueKind::Words(words) => Value::from(words[value as usize]),
            };
            put(info.name, value.map(say));
        }
        json!({ "method": "bdev_pcache_create", "params": params })
    }
}

/// Takes the parameters that are settings.
pub(super) fn settings(params: &mut Params) -> Result<SettingChange, RpcError> {
    let mut change = SettingChange::default();
    for info in SETTINGS {
        let value = match info.kind {
            SettingValueKind::Number { min, max } => {
                let number = params.number(info.name, u64::from(min)..=u64::from(max))?;
                // In range, as just checked.
                number.and_then(|number| u32::try_from(number).ok())
            }
            SettingValueKind::Words(words) => {
                let choices: Vec<_> = words.iter().copied().zip(0..).collect();
                params.choice(info.name, &choices)?
            }
        };
        if let Some(value) = value {
            change = change.and(info.setting, value);
        }
    }
    Ok(change)
}

/// Refuses a change of nothing; to be asked once everything that was given is known to be understood.
pub(super) fn check_change(change: &SettingChange) -> Result<(), RpcError> {
    if change.is_empty() {
        let names: Vec<_> = SETTINGS.iter().map(|info| info.name).collect();
        return Err(RpcError::invalid_params(format!(
            "there is nothing to change: give at least one of {}",
            names.join(", ")
        )));
    }
    Ok(())
}

fn check_name(parameter: &str, name: &str, len_max: usize) -> Result<(), RpcError> {
    let wrong = if name.is_empty() {
        Some("a name of at least one character is needed".to_owned())
    } else if name.len() > len_max {
        Some(format!("a name of at most {len_max} bytes is needed"))
    } else if name.chars().any(char::is_control) {
        Some("a name without control characters is needed".to_owned())
    } else {
        None
    };
    match wrong {
        Some(right) => Err(RpcError::invalid_params(format!(
            "{parameter} is {name:?}: {right}"
        ))),
        None => Ok(()),
    }
}

fn has_nul(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().contains(&0)
}

#[cfg(test)]
mod tests {
    use super::super::{Call, Members, Method};
    use super::*;

    fn create(members: Members) -> Result<Definition, RpcError> {
        match Call::from_params(Method::Create, members)? {
            Call::Create(definition) => Ok(definition),
            other => panic!("{other:?}"),
        }
    }

    fn parse(text: &str) -> Result<Definition, RpcError> {
        create(Members::parse(text.as_bytes())?)
    }

    const LEAST: &str = r#"{"name": "P0", "base_bdev_name": "B0", "cache_path": "/dev/dax0.0"}"#;

    #[test]
    fn the_least_that_is_needed() {
        let definition = parse(LEAST).unwrap();
        assert_eq!(definition.format, FormatPolicy::Auto);
        assert!(definition.cache_size_mib.is_none());
    }

    #[test]
    fn every_bad_parameter_is_named() {
        for (extra, named) in [
            (r#""name": """#, "name is"),
            (r#""name": "B0""#, "both"),
            (r#""cache_path": "relative""#, "cache_path is"),
            (r#""cache_size_mib": 7"#, "cache_size_mib is 7"),
            (r#""segment_size_kib": 300"#, "segment_size_kib is 300"),
            (r#""gc_percent": 91"#, "gc_percent is 91"),
            (
                r#""writeback_order": "lazy""#,
                "writeback_order is \"lazy\"",
            ),
            (r#""format": true"#, "format is true"),
            (r#""data_crc": 1"#, "data_crc is 1"),
            (r#""mode": "wb""#, "mode"),
        ] {
            let mut members = Members::parse(LEAST.as_bytes()).unwrap();
            let more = Members::parse(format!("{{{extra}}}").as_bytes()).unwrap();
            members.0.extend(more.0);
            let error = create(members).unwrap_err();
            assert!(error.message.contains(named), "{extra}: {}", error.message);
        }
    }

    #[test]
    fn the_schema_tells_range_and_default_of_every_setting() {
        let schema: Value = serde_json::from_str(include_str!("../../rpc/schema.json")).unwrap();
        for method in ["bdev_pcache_create", "bdev_pcache_set_options"] {
            let methods = schema["methods"].as_array().unwrap();
            let found = methods.iter().find(|found| found["name"] == method);
            let params = found.unwrap()["params"].as_array().unwrap();
            for info in SETTINGS {
                let (kind, range) = match info.kind {
                    SettingValueKind::Number { min, max } => (
                        "number",
                        format!(": {min} to {max}. Default: {}", info.default),
                    ),
                    SettingValueKind::Words(words) => {
                        let default = words[info.default as usize];
                        let words = words.join(", ");
                        ("string", format!(": {words}. Default: {default}"))
                    }
                };
                let param = params.iter().find(|param| param["name"] == info.name);
                let param = param.unwrap_or_else(|| panic!("{method} lacks {}", info.name));
                assert_eq!(param["type"], kind, "{}", info.name);
                let text = param["description"].as_str().unwrap();
                assert!(
                    text.ends_with(&range),
                    "{text:?} does not end with {range:?}"
                );
            }
        }
    }

    #[test]
    fn a_saved_configuration_never_formats_by_force() {
        let mut definition = parse(LEAST).unwrap();
        definition.format = FormatPolicy::Force;
        assert_eq!(definition.to_config()["params"]["format"], "auto");
    }
}
