//! pcache-inspect: looks into a cache device, verifies it, and writes its dirty data to the base, without
//! SPDK. `docs/inspect.md` is the manual.
#![forbid(unsafe_code)]

use lexopt::prelude::*;
use pcache::inspect::{
    self, Findings, InspectError, OutputFormat, ProgressLine, Selection, Severity,
};
use pcache::pmem::{Part, ReadOnlyPmem, Sharing};
use pcache::units::Lba;
use std::ffi::OsString;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;

const HELP: &str = "\
pcache-inspect: looks into the cache device of a pcache, without SPDK

  pcache-inspect info CACHE [--json] [--even-if-in-use]
      what the cache is, and how much it holds
  pcache-inspect dump CACHE [--segment N] [--lba A..B] [--json] [--even-if-in-use]
      segment infos, ksets and keys, one a line
  pcache-inspect verify CACHE [--base PATH] [--json]
      every checksum and invariant; with --base also whether the base is the right one
  pcache-inspect drain CACHE --base PATH
      write all dirty data to the base, a file or a block device

CACHE is a file or a device-DAX device. Of one that holds several caches, all commands
look at the part that --cache-offset-mib N --cache-size-mib N name, as for the RPC. info, dump and verify never write to it.

Exit status: 0 nothing is wrong; 1 something is, but nothing is lost by it; 2 data are at
risk or lost, or the cache cannot be opened; 3 wrong usage, or an I/O error.
";

/// What the command line asks for.
#[derive(Debug)]
enum Command {
    Help,
    Version,
    Info(ReadArgs),
    Dump(ReadArgs, Selection),
    Verify(ReadArgs, Option<PathBuf>),
    Drain {
        cache: PathBuf,
        part: Option<Part>,
        base: PathBuf,
    },
}

#[derive(Debug)]
struct ReadArgs {
    cache: PathBuf,
    part: Option<Part>,
    format: OutputFormat,
    sharing: Sharing,
}

/// All that may be given, before it is known what may be.
#[derive(Debug, Default)]
struct Args {
    words: Vec<OsString>,
    json: bool,
    even_if_in_use: bool,
    base: Option<PathBuf>,
    offset_mib: Option<u64>,
    size_mib: Option<u64>,
    segment: Option<u32>,
    blocks: Option<Range<Lba>>,
    /// As they were written, for errors.
    options: Vec<&'static str>,
}

/// What every command knows.
const PART_OPTIONS: &[&str] = &["--cache-offset-mib", "--cache-size-mib"];

fn parse() -> Result<Command, lexopt::Error> {
    let mut parser = lexopt::Parser::from_env();
    let mut args = Args::default();
    while let Some(arg) = parser.next()? {
        let option = match arg {
            Short('h') | Long("help") => return Ok(Command::Help),
            Short('V') | Long("version") => return Ok(Command::Version),
            Long("json") => {
                args.json = true;
                "--json"
            }
            Long("even-if-in-use") => {
                args.even_if_in_use = true;
                "--even-if-in-use"
            }
            Long("base") => {
                args.base = Some(parser.value()?.into());
                "--base"
            }
            Long("cache-offset-mib") => {
                args.offset_mib = Some(parser.value()?.parse()?);
                "--cache-offset-mib"
            }
            Long("cache-size-mib") => {
                args.size_mib = Some(parser.value()?.parse()?);
                "--cache-size-mib"
            }
            Long("segment") => {
                args.segment = Some(parser.value()?.parse()?);
                "--segment"
            }
            Long("lba") => {
                args.blocks = Some(parser.value()?.parse_with(parse_range)?);
                "--lba"
            }
            Value(word) => {
                args.words.push(word);
                continue;
            }
            _ => return Err(arg.unexpected()),
        };
        args.options.push(option);
    }
    command(args)
}

fn parse_range(text: &str) -> Result<Range<Lba>, String> {
    let wrong = || format!("{text:?} is no range of blocks: give FIRST..END, such as 8..16");
    let (first, end) = text.split_once("..").ok_or_else(wrong)?;
    let first: u64 = first.parse().map_err(|_| wrong())?;
    let end: u64 = end.parse().map_err(|_| wrong())?;
    if first >= end {
        return Err(wrong());
    }
    Ok(Lba(first)..Lba(end))
}

/// Offset and size of a part come together.
fn part_of(offset_mib: Option<u64>, size_mib: Option<u64>) -> Result<Option<Part>, String> {
    let bytes = |option: &str, mib: u64| {
        mib.checked_mul(1 << 20)
            .ok_or_else(|| format!("{option} is {mib}: that is more than any device has"))
    };
    match (offset_mib, size_mib) {
        (None, None) => Ok(None),
        (Some(offset_mib), Some(size_mib)) => Ok(Some(Part {
            offset_bytes: bytes("--cache-offset-mib", offset_mib)?,
            size_bytes: bytes("--cache-size-mib", size_mib)?,
        })),
        _ => Err("--cache-offset-mib and --cache-size-mib come together".to_owned()),
    }
}

fn command(args: Args) -> Result<Command, lexopt::Error> {
    let usage = |text: String| lexopt::Error::from(format!("{text}; --help tells the usage"));
    let [name, cache] = &args.words[..] else {
        return Err(usage(format!(
            "a command and a cache device are needed, but {} words were given",
            args.words.len()
        )));
    };
    let (name, cache) = (name.to_string_lossy(), PathBuf::from(cache));
    let known: &[&str] = match &*name {
        "info" => &["--json", "--even-if-in-use"],
        "dump" => &["--json", "--even-if-in-use", "--segment", "--lba"],
        "verify" => &["--json", "--base"],
        "drain" => &["--base"],
        _ => {
            let commands = "info, dump, verify and drain are the commands";
            return Err(usage(format!("{name:?} is no command: {commands}")));
        }
    };
    let knows = |option: &&str| known.contains(option) || PART_OPTIONS.contains(option);
    if let Some(option) = args.options.iter().find(|option| !knows(option)) {
        let known = known.join(", ");
        return Err(usage(format!("{name} knows no {option}: it knows {known}")));
    }
    let part = part_of(args.offset_mib, args.size_mib).map_err(usage)?;
    let read = ReadArgs {
        cache: cache.clone(),
        part,
        format: if args.json {
            OutputFormat::Json
        } else {
            OutputFormat::Text
        },
        sharing: if args.even_if_in_use {
            Sharing::Anybody
        } else {
            Sharing::Readers
        },
    };
    let (segment, blocks) = (args.segment, args.blocks);
    match (&*name, args.base) {
        ("info", _) => Ok(Command::Info(read)),
        ("dump", _) => Ok(Command::Dump(read, Selection { segment, blocks })),
        ("verify", base) => Ok(Command::Verify(read, base)),
        (_, Some(base)) => Ok(Command::Drain { cache, part, base }),
        (_, None) => Err(usage("drain needs --base PATH".to_owned())),
    }
}

fn run(command: Command) -> Result<Option<Severity>, InspectError> {
    let mut out = BufWriter::new(io::stdout().lock());
    let mut err = io::stderr();
    let mut progress = ProgressLine::default();
    let mut findings = Findings::new(&mut err, OutputFormat::Text);
    let worst = match command {
        Command::Help => {
            out.write_all(HELP.as_bytes())?;
            None
        }
        Command::Version => {
            writeln!(out, "pcache-inspect {}", env!("CARGO_PKG_VERSION"))?;
            None
        }
        Command::Info(args) => {
            let pmem = ReadOnlyPmem::open(&args.cache, args.part, args.sharing)?;
            let info = inspect::info(&pmem, &mut findings, &mut progress)?;
            match args.format {
                OutputFormat::Text => write!(out, "{info}")?,
                OutputFormat::Json => writeln!(out, "{}", info.to_json()?)?,
            }
            findings.worst()
        }
        Command::Dump(args, selection) => {
            let pmem = ReadOnlyPmem::open(&args.cache, args.part, args.sharing)?;
            let format = args.format;
            inspect::dump(
                &pmem,
                &selection,
                &mut out,
                format,
                &mut findings,
                &mut progress,
            )?;
            findings.worst()
        }
        Command::Verify(args, base) => {
            let pmem = ReadOnlyPmem::open(&args.cache, args.part, args.sharing)?;
            let mut findings = Findings::new(&mut out, args.format);
            inspect::verify(&pmem, base.as_deref(), &mut findings, &mut progress)?;
            findings.write_summary()?;
            findings.worst()
        }
        Command::Drain { cache, part, base } => {
            let drained = inspect::drain(&cache, part, &base, &mut progress)?;
            writeln!(
                out,
                "drained: {} dirty bytes, of which {} were written in {} batches; the base holds everything",
                drained.dirty_bytes, drained.written_bytes, drained.batches
            )?;
            None
        }
    };
    out.flush()?;
    Ok(worst)
}

fn main() -> ExitCode {
    let command = match parse() {
        Ok(command) => command,
        Err(error) => {
            eprintln!("pcache-inspect: {error}");
            return ExitCode::from(3);
        }
    };
    let result = run(command);
    match &result {
        Err(InspectError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {}
        Err(error) => eprintln!("pcache-inspect: {error}"),
        Ok(_) => {}
    }
    ExitCode::from(inspect::exit_status(&result))
}
