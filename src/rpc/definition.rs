//! What `bdev_pcache_create` was told: enough to open the cache, now or when its base device turns up.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{Params, RpcError};
#[cfg(feature = "spdk")]
use crate::engine::CacheInfo;
use crate::engine::{
    BaseGrowth, DataCrc, FormatPolicy, SETTINGS, Setting, SettingChange, SettingError,
    SettingValueKind, SettingValues,
};
use crate::pmem::PART_ALIGN_BYTES;
#[cfg(any(test, feature = "spdk"))]
use crate::pmem::{Extent, Part};

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

const BASE_GROWTHS: &[(&str, BaseGrowth)] = &[
    ("refuse", BaseGrowth::Refuse),
    ("accept", BaseGrowth::Accept),
];

const FORMATS: &[(&str, FormatPolicy)] = &[
    ("auto", FormatPolicy::Auto),
    ("never", FormatPolicy::Never),
    ("force", FormatPolicy::Force),
];

/// Whether the bdev says that it has a volatile write cache. It has none, but hosts that see one send their barriers as
/// FLUSH, by which write-back goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum WriteCache {
    #[default]
    Reported,
    Hidden,
}

/// A cache as the user described it. `None`: not given; what the media say holds, or the default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Definition {
    /// Of the cache's bdev.
    pub(crate) name: String,
    /// Name or alias (uuid) of the bdev behind the cache.
    pub(crate) base_bdev_name: String,
    /// The cache device.
    pub(crate) cache_path: PathBuf,
    /// Where the part of the cache device begins that is used; then `cache_size_mib` is its size.
    pub(crate) cache_offset_mib: Option<u64>,
    pub(crate) cache_size_mib: Option<u64>,
    pub(crate) data_crc: Option<DataCrc>,
    pub(crate) segment_size_kib: Option<u64>,
    pub(crate) settings: SettingChange,
    pub(crate) write_cache: WriteCache,
    pub(crate) base_growth: BaseGrowth,
    pub(crate) format: FormatPolicy,
}

impl Definition {
    /// Takes the parameters of `bdev_pcache_create`; [`Definition::check`] is still to be asked.
    pub(super) fn take(params: &mut Params) -> Result<Self, RpcError> {
        let name = params.needed_text("name")?;
        let base_bdev_name = params.needed_text("base_bdev_name")?;
        let cache_path = params.needed_text("cache_path")?;
        Ok(Self {
            cache_offset_mib: params.number("cache_offset_mib", 0..=CACHE_SIZE_MIB_MAX)?,
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
            write_cache: match params.flag("report_write_cache")? {
                Some(false) => WriteCache::Hidden,
                Some(true) | None => WriteCache::Reported,
            },
            base_growth: (params.choice("base_growth", BASE_GROWTHS)?).unwrap_or_default(),
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
        let path = &self.cache_path;
        if !path.is_absolute() || path.to_string_lossy().chars().any(char::is_control) {
            return Err(RpcError::invalid_params(format!(
                "cache_path is {path:?}: an absolute path without control characters is needed"
            )));
        }
        self.check_part()?;
        self.check_settings()
            .map_err(|error| RpcError::invalid_params(error.to_string()))?;
        match self.segment_size_kib {
            Some(size_kib) if !size_kib.is_power_of_two() => {
                Err(RpcError::invalid_params(format!(
                    "segment_size_kib is {size_kib}: a power of two from {SEGMENT_SIZE_KIB_MIN} to \
                     {SEGMENT_SIZE_KIB_MAX} is needed"
                )))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what contradicts itself. What is not given may be kept by the cache device, and is compared when that is opened.
    fn check_settings(&self) -> Result<(), SettingError> {
        let (low, high) = (Setting::DirtyLowPercent, Setting::DirtyHighPercent);
        if self.settings.get(low).is_some() && self.settings.get(high).is_some() {
            SettingValues::default().with(&self.settings)?;
        }
        let verify_reads = self.settings.get(Setting::VerifyReads);
        if let (Some(data_crc), Some(verify_reads)) = (self.data_crc, verify_reads) {
            let change = SettingChange::of(Setting::VerifyReads, verify_reads);
            SettingValues::default()
                .with(&change)?
                .check_with(data_crc)?;
        }
        Ok(())
    }

    fn check_part(&self) -> Result<(), RpcError> {
        let Some(offset_mib) = self.cache_offset_mib else {
            return Ok(());
        };
        let Some(size_mib) = self.cache_size_mib else {
            return Err(RpcError::invalid_params(format!(
                "cache_size_mib is missing: with cache_offset_mib {offset_mib}, the size of the part is needed"
            )));
        };
        for (name, mib) in [
            ("cache_offset_mib", offset_mib),
            ("cache_size_mib", size_mib),
        ] {
            if !(mib << 20).is_multiple_of(PART_ALIGN_BYTES) {
                let align_mib = PART_ALIGN_BYTES >> 20;
                return Err(RpcError::invalid_params(format!(
                    "{name} is {mib}: of a part, a multiple of {align_mib} is needed"
                )));
            }
        }
        Ok(())
    }

    /// How much of the cache device is used.
    #[cfg(any(test, feature = "spdk"))]
    pub(crate) fn extent(&self) -> Extent {
        // Both are in range, and far from an overflow.
        let size_bytes = self.cache_size_mib.map(|mib| mib << 20);
        match (self.cache_offset_mib, size_bytes) {
            (Some(offset_mib), Some(size_bytes)) => Extent::Part(Part {
                offset_bytes: offset_mib << 20,
                size_bytes,
            }),
            (None, Some(size_bytes)) => Extent::File { size_bytes },
            (_, None) => Extent::Whole,
        }
    }

    /// Whether both cannot be used at the same time, because they name the same bytes. Two names of one device
    /// are not told apart here; its lock does that.
    #[cfg(any(test, feature = "spdk"))]
    pub(crate) fn collides_with(&self, other: &Definition) -> bool {
        if self.cache_path != other.cache_path {
            return false;
        }
        match (self.extent(), other.extent()) {
            (Extent::Part(part), Extent::Part(other)) => part.overlaps(other),
            _ => true,
        }
    }

    /// The part of the cache device, for messages: "all of it", "MiB 64 to 128".
    #[cfg(feature = "spdk")]
    pub(crate) fn extent_text(&self) -> String {
        match (self.cache_offset_mib, self.cache_size_mib) {
            (Some(offset), Some(size)) => format!("MiB {offset} to {}", offset + size),
            _ => "all of it".to_owned(),
        }
    }

    /// The cache was opened: from now on the definition describes that very cache, and nothing may be
    /// formatted in its place. The settings are left to the cache device, which keeps them: they may be changed, and what
    /// they were at first is not to come back with the base.
    #[cfg(feature = "spdk")]
    pub(crate) fn settle(&mut self, info: &CacheInfo) {
        self.format = FormatPolicy::Never;
        self.base_growth = BaseGrowth::Refuse;
        self.data_crc = Some(if info.data_crc {
            DataCrc::On
        } else {
            DataCrc::Off
        });
        self.segment_size_kib = Some(info.segment_size_kib);
        self.settings = SettingChange::default();
    }

    /// The call that makes the same cache again, of one that is in use: with all its settings.
    #[cfg(feature = "spdk")]
    pub(crate) fn to_config_of(&self, info: &CacheInfo) -> Value {
        let mut definition = self.clone();
        definition.settle(info);
        definition.settings = SettingChange::all_of(&info.settings);
        definition.to_config()
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
        put("cache_offset_mib", self.cache_offset_mib.map(Value::from));
        let grown = (self.base_growth == BaseGrowth::Accept).then(|| Value::from("accept"));
        put("base_growth", grown);
        let hidden = (self.write_cache == WriteCache::Hidden).then(|| Value::from(false));
        put("report_write_cache", hidden);
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
                SettingValueKind::Flag => Value::from(value != 0),
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
            SettingValueKind::Flag => params.flag(info.name)?.map(u32::from),
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
            (
                r#""cache_path": "/dev/a\nb""#,
                r#"cache_path is "/dev/a\nb""#,
            ),
            (r#""cache_size_mib": 7"#, "cache_size_mib is 7"),
            (r#""cache_offset_mib": 64"#, "cache_size_mib is missing"),
            (
                r#""cache_offset_mib": 63, "cache_size_mib": 64"#,
                "cache_offset_mib is 63",
            ),
            (
                r#""cache_offset_mib": 64, "cache_size_mib": 65"#,
                "cache_size_mib is 65",
            ),
            (r#""segment_size_kib": 300"#, "segment_size_kib is 300"),
            (r#""gc_percent": 91"#, "gc_percent is 91"),
            (
                r#""writeback_order": "lazy""#,
                "writeback_order is \"lazy\"",
            ),
            (r#""format": true"#, "format is true"),
            (r#""data_crc": 1"#, "data_crc is 1"),
            (r#""verify_reads": "yes""#, "verify_reads is \"yes\""),
            (r#""report_write_cache": 0"#, "report_write_cache is 0"),
            (r#""base_growth": "yes""#, "base_growth is \"yes\""),
            (
                r#""dirty_low_percent": 40, "dirty_high_percent": 40"#,
                "dirty_low_percent is 40",
            ),
            (
                r#""verify_reads": true, "data_crc": false"#,
                "verify_reads is true",
            ),
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
    fn what_goes_with_values_that_are_not_given_is_left_to_the_cache_device() {
        for extra in [
            r#""dirty_low_percent": 40"#,
            r#""dirty_high_percent": 10"#,
            r#""verify_reads": true"#,
            r#""verify_reads": true, "data_crc": true"#,
            r#""verify_reads": false, "data_crc": false"#,
            r#""dirty_low_percent": 40, "dirty_high_percent": 41"#,
        ] {
            let text = format!("{}, {extra}}}", LEAST.trim_end_matches('}'));
            assert!(parse(&text).is_ok(), "{extra}");
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
                    SettingValueKind::Flag => {
                        ("boolean", format!(". Default: {}", info.default != 0))
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
    fn parts_collide_if_they_have_a_byte_in_common() {
        let part = |extra: &str| {
            let text = format!("{}, {extra}}}", LEAST.trim_end_matches('}'));
            parse(&text).unwrap()
        };
        let first = part(r#""cache_offset_mib": 64, "cache_size_mib": 64"#);
        for (offset, size, collides) in [
            (0, 64, false),
            (0, 66, true),
            (64, 64, true),
            (126, 8, true),
            (128, 8, false),
        ] {
            let other = part(&format!(
                r#""cache_offset_mib": {offset}, "cache_size_mib": {size}"#
            ));
            assert_eq!(first.collides_with(&other), collides, "{offset}+{size}");
            assert_eq!(other.collides_with(&first), collides, "{offset}+{size}");
        }
        assert!(first.collides_with(&parse(LEAST).unwrap()));
        let elsewhere = parse(&LEAST.replace("dax0.0", "dax0.1")).unwrap();
        assert!(!first.collides_with(&elsewhere));
        assert_eq!(first.to_config()["params"]["cache_offset_mib"], 64);
    }

    #[test]
    fn operators_are_told_default_and_range_of_every_setting() {
        let text = include_str!("../../docs/OPERATIONS.md");
        for info in SETTINGS {
            let row = match info.kind {
                SettingValueKind::Number { min, max } => {
                    format!("| `{}` | {} | {min} to {max} | ", info.name, info.default)
                }
                SettingValueKind::Words(words) => {
                    let default = words[info.default as usize];
                    format!("| `{}` | {default} | {} | ", info.name, words.join(", "))
                }
                SettingValueKind::Flag => {
                    let default = info.default != 0;
                    format!("| `{}` | {default} | true, false | ", info.name)
                }
            };
            assert!(text.contains(&row), "OPERATIONS.md lacks {row:?}");
        }
    }

    #[test]
    fn a_saved_configuration_never_formats_by_force() {
        let mut definition = parse(LEAST).unwrap();
        definition.format = FormatPolicy::Force;
        assert_eq!(definition.to_config()["params"]["format"], "auto");
    }
}
