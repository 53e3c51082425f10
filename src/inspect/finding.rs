//! What is wrong with a cache, and how bad it is.

use serde::Serialize;
use std::io::{self, Write};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// One of two copies is damaged or old; the other has all there is, and the next opening repairs it.
    Repairable,
    /// What is damaged is on the base as well.
    Clean,
    /// What is damaged is not on the base.
    Dirty,
    /// The cache cannot be opened, and its dirty data not be had, until this is mended.
    Refused,
}

const SEVERITIES: [Severity; 4] = [
    Severity::Repairable,
    Severity::Clean,
    Severity::Dirty,
    Severity::Refused,
];

impl Severity {
    fn name(self) -> &'static str {
        match self {
            Severity::Repairable => "repairable",
            Severity::Clean => "clean",
            Severity::Dirty => "dirty",
            Severity::Refused => "refused",
        }
    }
}

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Which structure: `superblock`, `tails`, `segment info`, `ksets`, `payload`, `base`.
    pub what: &'static str,
    /// In which segment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub segment: Option<u32>,
    /// Byte offset on the cache device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub off: Option<u64>,
    /// First block of the base that it concerns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lba: Option<u64>,
    /// How many blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub len_blocks: Option<u32>,
    /// The whole of it, for people.
    pub text: String,
}

impl Finding {
    pub(super) fn new(severity: Severity, what: &'static str, text: String) -> Self {
        Self {
            severity,
            what,
            segment: None,
            off: None,
            lba: None,
            len_blocks: None,
            text,
        }
    }
}

/// How findings, and what is found, are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputFormat {
    /// For people.
    Text,
    /// An object a line.
    Json,
}

/// Writes findings as they come, and counts them: a cache may have more than memory can hold.
pub struct Findings<'a> {
    out: &'a mut dyn Write,
    format: OutputFormat,
    counts: [u64; SEVERITIES.len()],
}

impl std::fmt::Debug for Findings<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Findings")
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

impl<'a> Findings<'a> {
    /// None yet.
    pub fn new(out: &'a mut dyn Write, format: OutputFormat) -> Self {
        Self {
            out,
            format,
            counts: [0; SEVERITIES.len()],
        }
    }

    pub(super) fn add(&mut self, finding: &Finding) -> io::Result<()> {
        self.counts[finding.severity as usize] += 1;
        match self.format {
            OutputFormat::Text => {
                writeln!(self.out, "{}: {}", finding.severity.name(), finding.text)
            }
            OutputFormat::Json => writeln!(self.out, "{}", serde_json::to_string(finding)?),
        }
    }

    /// The worst that was found.
    #[must_use]
    pub fn worst(&self) -> Option<Severity> {
        let found = SEVERITIES.into_iter().zip(self.counts);
        found
            .filter(|(_, count)| *count > 0)
            .map(|(severity, _)| severity)
            .max()
    }

    /// Writes how many there are of each kind.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn write_summary(&mut self) -> io::Result<()> {
        let counts = SEVERITIES.into_iter().zip(self.counts);
        match self.format {
            OutputFormat::Text if self.worst().is_none() => writeln!(self.out, "no findings"),
            OutputFormat::Text => {
                let counts: Vec<String> = counts
                    .map(|(severity, count)| format!("{count} {}", severity.name()))
                    .collect();
                writeln!(self.out, "findings: {}", counts.join(", "))
            }
            OutputFormat::Json => {
                let counts: serde_json::Map<_, _> = counts
                    .map(|(severity, count)| (severity.name().to_owned(), count.into()))
                    .collect();
                writeln!(self.out, "{}", serde_json::json!({ "findings": counts }))
            }
        }
    }
}
