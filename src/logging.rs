//! Log lines as etcd writes them: one JSON object a line (or a line for people), over `tracing`.
//!
//! Anything in the process logs with tracing's macros. Names of fields are etcd's, quoted where Rust
//! would not have them: `info!("remote-addr" = %peer, "took" = %GoDuration::from(took), "message")`.
//! Numbers and booleans stay what they are, everything else becomes a text; [`list`] makes an array.
//! A line of a level beyond error has the target [`FATAL`] (see [`fatal!`](crate::fatal)) or [`PANIC`]; a line
//! of a named logger has the target `logger/<name>`.
//!
//! A level that is off costs one load and one branch at the place that would log: what is on is
//! decided once for each such place and again when [`Logging::set_level`] changes it. A line is put
//! together in a buffer of its thread and handed over with one write.
//!
//! Of other crates' lines only those are written that are a step more severe than ours must be: at
//! `info` their warnings, at `debug` their infos. Spans are not recorded.

use std::cell::RefCell;
use std::fmt::{self, Write as _};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span;
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};

use crate::config::{Log, LogFormat, LogLevel, LogOutput, Rotation};

/// The target of lines after which the process ends.
pub const FATAL: &str = "quorate::fatal";
/// The target of lines about a broken invariant.
pub const PANIC: &str = "quorate::panic";
/// What the target of a named logger begins with.
const NAMED: &str = "logger/";

const JOURNAL_SOCKET: &str = "/run/systemd/journal/socket";
/// How much of a line the journal is sent if it refuses the whole.
const JOURNAL_BYTES_MAX: usize = 48 * 1024;

/// Per second and per level and message, this many lines are written...
const SAMPLE_FIRST: u64 = 100;
/// ...and then every one of so many.
const SAMPLE_EVERY: u64 = 100;
/// Messages are told apart by a hash of so many values.
const SAMPLE_SLOTS: usize = 1024;

/// Logs with tracing's syntax a line of level fatal. It does not end the process. Where a target is
/// given, as here, tracing wants fields with quoted names in braces: `fatal!({ "a-b" = 1 }, "message")`.
#[macro_export]
macro_rules! fatal {
    ($($line:tt)+) => {
        ::tracing::error!(target: $crate::logging::FATAL, $($line)+)
    };
}

/// Why there is no log.
#[derive(thiserror::Error, Debug)]
pub enum LogError {
    #[error("cannot open log file {}: {source}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("cannot reach the systemd journal at {JOURNAL_SOCKET}: {0}")]
    Journal(io::Error),
    #[error("the process has a log already")]
    Installed,
}

/// The process's log, while it runs.
#[derive(Clone, Debug)]
pub struct Logging {
    level: Arc<AtomicU8>,
}

impl Logging {
    /// Makes every later line of the process go where `config` says. Called once, by main.
    ///
    /// # Errors
    /// [`LogError`], naming what could not be opened.
    pub fn install(config: &Log) -> Result<Self, LogError> {
        let logger = Logger::open(config)?;
        let logging = logger.handle();
        tracing::subscriber::set_global_default(logger).map_err(|_| LogError::Installed)?;
        log_panics(config.outputs.contains(&LogOutput::Stderr));
        Ok(logging)
    }

    /// The least severe level that is written.
    pub fn level(&self) -> LogLevel {
        LogLevel::ALL[usize::from(self.level.load(Ordering::Relaxed))]
    }

    /// Changes the level from now on.
    pub fn set_level(&self, level: LogLevel) {
        self.level.store(level as u8, Ordering::Relaxed);
        tracing::callsite::rebuild_interest_cache();
    }
}

/// Writes a line for each panic, then lets the process end as it would have.
fn log_panics(seen_on_stderr: bool) {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let message = match (info.payload().downcast_ref::<&str>(), info.payload().downcast_ref()) {
            (Some(text), _) => text,
            (None, Some(text)) => String::as_str(text),
            (None, None) => "no message",
        };
        let thread = std::thread::current();
        let name = thread.name().unwrap_or_default();
        tracing::error!(target: PANIC, place, thread = name, panic = message, "panic");
        if !seen_on_stderr {
            default(info);
        }
    }));
}

/// Where finished lines go.
pub trait Sink: Send + Sync {
    /// Takes one line, which ends with a line feed.
    ///
    /// # Errors
    /// If it could not be kept; the line is then written to stderr.
    fn write(&self, line: &Line<'_>) -> io::Result<()>;
}

/// A finished line and what a sink may want to know of it.
pub struct Line<'a> {
    pub text: &'a str,
    pub level: LogLevel,
    /// The file it was logged in, with the directory's name before it.
    pub file: &'a str,
}

struct Stderr;

impl Sink for Stderr {
    fn write(&self, line: &Line<'_>) -> io::Result<()> {
        io::stderr().lock().write_all(line.text.as_bytes())
    }
}

struct Stdout;

impl Sink for Stdout {
    fn write(&self, line: &Line<'_>) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(line.text.as_bytes())?;
        stdout.flush()
    }
}

/// Opened for appending, so that a write is one line whole, also among several processes.
struct Appended(File);

impl Sink for Appended {
    fn write(&self, line: &Line<'_>) -> io::Result<()> {
        (&self.0).write_all(line.text.as_bytes())
    }
}

struct Journal {
    socket: UnixDatagram,
    identifier: String,
}

impl Journal {
    fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(path)?;
        let program = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
        let identifier = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Journal { socket, identifier })
    }

    fn entry(&self, line: &Line<'_>, text: &str) -> Vec<u8> {
        let priority = match line.level {
            LogLevel::Debug => "7",
            LogLevel::Info => "6",
            LogLevel::Warn => "4",
            LogLevel::Error => "3",
            LogLevel::Dpanic | LogLevel::Panic | LogLevel::Fatal => "2",
        };
        let package = line.file.rsplit_once('/').map_or("", |(directory, _)| directory);
        let mut entry = Vec::with_capacity(text.len() + 96);
        for (name, value) in [
            ("MESSAGE", text.trim_end_matches('\n')),
            ("PRIORITY", priority),
            ("PACKAGE", package),
            ("SYSLOG_IDENTIFIER", &self.identifier),
        ] {
            entry.extend_from_slice(name.as_bytes());
            if value.contains('\n') {
                // A value of several lines is sent with its length before it.
                entry.push(b'\n');
                entry.extend_from_slice(&(value.len() as u64).to_le_bytes());
            } else {
                entry.push(b'=');
            }
            entry.extend_from_slice(value.as_bytes());
            entry.push(b'\n');
        }
        entry
    }
}

impl Sink for Journal {
    fn write(&self, line: &Line<'_>) -> io::Result<()> {
        match self.socket.send(&self.entry(line, line.text)) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EMSGSIZE) => {
                let end = line.text.floor_char_boundary(JOURNAL_BYTES_MAX);
                self.socket.send(&self.entry(line, &line.text[..end]))?;
            }
            sent => {
                sent?;
            }
        }
        Ok(())
    }
}

/// A log file that is put aside when it is full.
struct Rotating {
    path: PathBuf,
    rotation: Rotation,
    state: Mutex<RotatingState>,
    /// Whether a thread is compressing and deleting old files.
    tidying: Arc<AtomicBool>,
}

struct RotatingState {
    file: File,
    bytes: u64,
}

impl Rotating {
    fn open(path: &Path, rotation: &Rotation) -> io::Result<Self> {
        let (file, bytes) = Self::open_file(path)?;
        let rotating = Rotating {
            path: path.to_owned(),
            rotation: rotation.clone(),
            state: Mutex::new(RotatingState { file, bytes }),
            tidying: Arc::default(),
        };
        rotating.tidy();
        Ok(rotating)
    }

    fn open_file(path: &Path) -> io::Result<(File, u64)> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        let bytes = file.metadata()?.len();
        Ok((file, bytes))
    }

    fn bytes_max(&self) -> u64 {
        let megabytes = if self.rotation.maxsize == 0 { 100 } else { self.rotation.maxsize };
        megabytes.saturating_mul(1024 * 1024)
    }

    fn rotate(&self, state: &mut RotatingState, now: SystemTime) -> io::Result<()> {
        let stamp = old_stamp(now, self.rotation.localtime);
        let (stem, extension) = stem_and_extension(&self.path);
        fs::rename(&self.path, self.path.with_file_name(format!("{stem}-{stamp}{extension}")))?;
        let (file, bytes) = Self::open_file(&self.path)?;
        *state = RotatingState { file, bytes };
        self.tidy();
        Ok(())
    }

    /// Compresses and deletes old files, on a thread of its own; one at a time.
    fn tidy(&self) {
        let Rotation { maxage, maxbackups, compress, .. } = self.rotation;
        if maxage == 0 && maxbackups == 0 && !compress {
            return;
        }
        if self.tidying.swap(true, Ordering::AcqRel) {
            return; // the files it leaves are seen to at the next rotation
        }
        let (path, rotation, tidying) =
            (self.path.clone(), self.rotation.clone(), Arc::clone(&self.tidying));
        let spawned =
            std::thread::Builder::new().name("log-rotation".to_owned()).spawn(move || {
                if let Err(error) = tidy_files(&path, &rotation, SystemTime::now()) {
                    tracing::warn!(path = %path.display(), %error, "cannot tidy old log files");
                }
                tidying.store(false, Ordering::Release);
            });
        if spawned.is_err() {
            self.tidying.store(false, Ordering::Release);
        }
    }
}

impl Sink for Rotating {
    fn write(&self, line: &Line<'_>) -> io::Result<()> {
        let bytes = line.text.len() as u64;
        let mut state = self.state.lock();
        let full = state.bytes > 0 && state.bytes + bytes > self.bytes_max();
        // A line is rather written to a file that is too long than lost.
        let rotated = if full { self.rotate(&mut state, SystemTime::now()) } else { Ok(()) };
        state.file.write_all(line.text.as_bytes())?;
        state.bytes += bytes;
        rotated
    }
}

/// The name of a file before its extension, and the extension with its dot.
fn stem_and_extension(path: &Path) -> (String, String) {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map(|extension| extension.to_string_lossy());
    (stem.into_owned(), extension.map_or_else(String::new, |extension| format!(".{extension}")))
}

/// The time in an old file's name; of two names the later sorts behind.
fn old_stamp(now: SystemTime, local: bool) -> String {
    let (seconds, micros) = since_epoch(now);
    let offset = if local { local_offset(seconds) } else { 0 };
    let (year, month, day, hour, minute, second) = civil(seconds + offset);
    let millis = micros / 1000;
    format!("{year:04}-{month:02}-{day:02}T{hour:02}-{minute:02}-{second:02}.{millis:03}")
}

fn tidy_files(path: &Path, rotation: &Rotation, now: SystemTime) -> io::Result<()> {
    let (stem, extension) = stem_and_extension(path);
    let directory = match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    };
    // Stamps of old files, each once: a file and its compressed form are one.
    let mut stamps: Vec<String> = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        let Some(name) = name.to_str() else { continue };
        let plain = name.strip_suffix(".gz").unwrap_or(name);
        let stamp = plain
            .strip_prefix(&stem)
            .and_then(|rest| rest.strip_prefix('-'))
            .and_then(|rest| rest.strip_suffix(&extension));
        if let Some(stamp) = stamp.filter(|stamp| is_stamp(stamp)) {
            stamps.push(stamp.to_owned());
        }
    }
    stamps.sort_unstable_by(|a, b| b.cmp(a));
    stamps.dedup();
    let oldest = (rotation.maxage > 0).then(|| {
        let age = Duration::from_secs(rotation.maxage.saturating_mul(86_400));
        old_stamp(now.checked_sub(age).unwrap_or(UNIX_EPOCH), rotation.localtime)
    });
    for (n, stamp) in stamps.iter().enumerate() {
        let old = directory.join(format!("{stem}-{stamp}{extension}"));
        let compressed = directory.join(format!("{stem}-{stamp}{extension}.gz"));
        let too_many = rotation.maxbackups > 0 && n as u64 >= rotation.maxbackups;
        if too_many || oldest.as_ref().is_some_and(|oldest| stamp < oldest) {
            for file in [&old, &compressed] {
                match fs::remove_file(file) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
        } else if rotation.compress && old.exists() {
            compress(&old, &compressed)?;
        }
    }
    Ok(())
}

/// Whether `text` has the form of [`old_stamp`].
fn is_stamp(text: &str) -> bool {
    const FORM: &[u8] = b"0000-00-00T00-00-00.000";
    text.len() == FORM.len()
        && text.bytes().zip(FORM).all(|(byte, form)| match form {
            b'0' => byte.is_ascii_digit(),
            _ => byte == *form,
        })
}

/// Leaves `old` alone until its compressed form is whole on disk.
fn compress(old: &Path, compressed: &Path) -> io::Result<()> {
    let partial = compressed.with_extension("gz.part");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let level = flate2::Compression::default();
    let mut encoder = flate2::write::GzEncoder::new(options.open(&partial)?, level);
    io::copy(&mut File::open(old)?, &mut encoder)?;
    encoder.finish()?.sync_all()?;
    fs::rename(&partial, compressed)?;
    fs::remove_file(old)
}

/// Turns tracing's events into lines. [`Logging::install`] makes one that the whole process uses.
pub struct Logger {
    level: Arc<AtomicU8>,
    format: LogFormat,
    sampler: Option<Sampler>,
    sinks: Vec<Box<dyn Sink>>,
    /// Whether the last line went to stderr because a sink failed.
    failing: AtomicBool,
}

impl Logger {
    /// A logger that writes to `sinks`; `sampled` says whether lines that repeat are thinned out.
    pub fn new(
        level: LogLevel,
        format: LogFormat,
        sampled: bool,
        sinks: Vec<Box<dyn Sink>>,
    ) -> Self {
        Logger {
            level: Arc::new(AtomicU8::new(level as u8)),
            format,
            sampler: sampled.then(Sampler::new),
            sinks,
            failing: AtomicBool::new(false),
        }
    }

    fn open(config: &Log) -> Result<Self, LogError> {
        let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
        for output in &config.outputs {
            let sink: Box<dyn Sink> = match output {
                LogOutput::Stderr => Box::new(Stderr),
                LogOutput::Stdout => Box::new(Stdout),
                LogOutput::Null => continue,
                LogOutput::Journal => {
                    let journal = Journal::connect(Path::new(JOURNAL_SOCKET));
                    Box::new(journal.map_err(LogError::Journal)?)
                }
                LogOutput::File(path) => {
                    let fail = |source| LogError::Open { path: path.clone(), source };
                    match &config.rotation {
                        Some(rotation) => Box::new(Rotating::open(path, rotation).map_err(fail)?),
                        None => {
                            let mut options = OpenOptions::new();
                            let file = options.append(true).create(true).open(path);
                            Box::new(Appended(file.map_err(fail)?))
                        }
                    }
                }
            };
            sinks.push(sink);
        }
        let sampled = !config.outputs.contains(&LogOutput::Journal);
        Ok(Logger::new(config.level, config.format, sampled, sinks))
    }

    /// What changes its level while it is in use.
    pub fn handle(&self) -> Logging {
        Logging { level: Arc::clone(&self.level) }
    }

    /// Whether lines of this kind are written.
    fn writes(&self, metadata: &Metadata<'_>) -> bool {
        if !metadata.is_event() || self.sinks.is_empty() {
            return false;
        }
        let Some(level) = level_of(metadata) else { return false };
        let least = self.level.load(Ordering::Relaxed);
        let target = metadata.target();
        let ours = target == "quorate" || target.starts_with("quorate::") || is_named(target);
        let least = match ours {
            true => least,
            false if least < LogLevel::Warn as u8 => least + 1,
            false => least,
        };
        level as u8 >= least
    }

    fn write(&self, event: &Event<'_>, buffers: &mut Buffers) {
        let metadata = event.metadata();
        let Some(level) = level_of(metadata) else { return };
        buffers.clear();
        event.record(buffers);
        let now = SystemTime::now();
        if let Some(sampler) = &self.sampler
            && !sampler.passes(level, &buffers.message, now)
        {
            return;
        }
        let Buffers { line, message, fields } = buffers;
        let file = short_path(metadata.file().unwrap_or_default());
        let source = metadata.line().unwrap_or_default();
        let name = metadata.target().strip_prefix(NAMED);
        // Writing into a string cannot fail.
        let _ = match self.format {
            LogFormat::Json => {
                let _ = write!(line, "{{\"level\":\"{level}\",\"ts\":\"{}\"", Stamp(now));
                if let Some(name) = name {
                    line.push_str(",\"logger\":");
                    quote(line, name);
                }
                line.push_str(",\"caller\":");
                quote(line, format_args!("{file}:{source}"));
                line.push_str(",\"msg\":");
                quote(line, message.as_str());
                writeln!(line, "{fields}}}")
            }
            LogFormat::Console => {
                let _ = write!(line, "{}\t{level}", Stamp(now));
                if let Some(name) = name {
                    let _ = write!(line, "\t{name}");
                }
                let _ = write!(line, "\t{file}:{source}\t{message}");
                match fields.strip_prefix(',') {
                    Some(fields) => writeln!(line, "\t{{{fields}}}"),
                    None => writeln!(line),
                }
            }
        };
        let line = Line { text: line, level, file };
        for sink in &self.sinks {
            match sink.write(&line) {
                Ok(()) => self.failing.store(false, Ordering::Relaxed),
                Err(error) => {
                    // Where stderr fails as well there is nowhere left to tell of it.
                    let mut stderr = io::stderr().lock();
                    if !self.failing.swap(true, Ordering::Relaxed) {
                        let _ = writeln!(stderr, "cannot write to the log: {error}");
                    }
                    let _ = stderr.write_all(line.text.as_bytes());
                }
            }
        }
    }
}

impl Subscriber for Logger {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.writes(metadata) { Interest::always() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.writes(metadata)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(match LogLevel::ALL[usize::from(self.level.load(Ordering::Relaxed))] {
            LogLevel::Debug => LevelFilter::DEBUG,
            LogLevel::Info => LevelFilter::INFO,
            LogLevel::Warn => LevelFilter::WARN,
            _ => LevelFilter::ERROR,
        })
    }

    fn event(&self, event: &Event<'_>) {
        thread_local! {
            static BUFFERS: RefCell<Buffers> = RefCell::default();
        }
        let kept = BUFFERS.try_with(|buffers| match buffers.try_borrow_mut() {
            Ok(mut buffers) => {
                self.write(event, &mut buffers);
                true
            }
            Err(_) => false,
        });
        // The buffers are taken if printing a field logs, and gone while a thread ends.
        if !kept.unwrap_or(false) {
            self.write(event, &mut Buffers::default());
        }
    }

    // Spans are never enabled, so nothing below is called for one.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

fn is_named(target: &str) -> bool {
    target.starts_with(NAMED)
}

/// etcd's level of a line; it has none below debug.
fn level_of(metadata: &Metadata<'_>) -> Option<LogLevel> {
    match *metadata.level() {
        Level::ERROR => Some(match metadata.target() {
            FATAL => LogLevel::Fatal,
            PANIC => LogLevel::Panic,
            _ => LogLevel::Error,
        }),
        Level::WARN => Some(LogLevel::Warn),
        Level::INFO => Some(LogLevel::Info),
        Level::DEBUG => Some(LogLevel::Debug),
        _ => None,
    }
}

/// The file's name with the directory before it.
fn short_path(path: &str) -> &str {
    let mut slashes = path.rmatch_indices('/').map(|(at, _)| at + 1);
    slashes.nth(1).map_or(path, |at| &path[at..])
}

/// A line in the making.
#[derive(Default)]
struct Buffers {
    line: String,
    message: String,
    /// Each `,"name":value`.
    fields: String,
}

impl Buffers {
    fn clear(&mut self) {
        /// A buffer that one long line has blown up is given back.
        const KEPT_BYTES_MAX: usize = 64 * 1024;
        for buffer in [&mut self.line, &mut self.message, &mut self.fields] {
            buffer.clear();
            if buffer.capacity() > KEPT_BYTES_MAX {
                buffer.shrink_to(KEPT_BYTES_MAX);
            }
        }
    }

    /// Begins a field.
    fn name(&mut self, field: &Field) -> &mut String {
        self.fields.push(',');
        quote(&mut self.fields, field.name());
        self.fields.push(':');
        &mut self.fields
    }
}

impl Visit for Buffers {
    fn record_i64(&mut self, field: &Field, value: i64) {
        let _ = write!(self.name(field), "{value}");
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        let _ = write!(self.name(field), "{value}");
    }

    fn record_i128(&mut self, field: &Field, value: i128) {
        let _ = write!(self.name(field), "{value}");
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        let _ = write!(self.name(field), "{value}");
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        let _ = write!(self.name(field), "{value}");
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        let fields = self.name(field);
        // JSON has no words for these; they are written as zap does.
        let _ = match value {
            _ if value.is_nan() => write!(fields, "\"NaN\""),
            f64::INFINITY => write!(fields, "\"+Inf\""),
            f64::NEG_INFINITY => write!(fields, "\"-Inf\""),
            _ => write!(fields, "{value}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
        } else {
            quote(self.name(field), value);
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        let fields = self.name(field);
        if let Some(List(array)) = value.downcast_ref() {
            fields.push_str(array);
            return;
        }
        // The causes follow, unless an error tells of its cause itself.
        let mut text = value.to_string();
        let mut cause = value.source();
        while let Some(error) = cause {
            let error_text = error.to_string();
            if !text.ends_with(&error_text) {
                let _ = write!(text, ": {error_text}");
            }
            cause = error.source();
        }
        quote(fields, text.as_str());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
        } else {
            quote(self.name(field), format_args!("{value:?}"));
        }
    }
}

/// An array of texts as the value of a field: `info!("urls" = list(&urls).value(), "message")`.
pub fn list<T: fmt::Display>(items: impl IntoIterator<Item = T>) -> List {
    let mut array = String::from("[");
    for item in items {
        if array.len() > 1 {
            array.push(',');
        }
        quote(&mut array, item);
    }
    array.push(']');
    List(array)
}

/// What [`list`] makes: a JSON array.
///
/// It goes through tracing as an error, the only kind of value whose type can be found again there.
#[derive(Debug)]
pub struct List(String);

impl List {
    /// The value of a field.
    pub fn value(&self) -> &(dyn std::error::Error + 'static) {
        self
    }
}

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for List {}

/// Writes `text` as a JSON string.
fn quote(to: &mut String, text: impl fmt::Display) {
    struct Escaped<'a>(&'a mut String);

    impl fmt::Write for Escaped<'_> {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            let mut plain = 0;
            for (at, byte) in text.bytes().enumerate() {
                if byte >= b' ' && byte != b'"' && byte != b'\\' {
                    continue;
                }
                self.0.push_str(&text[plain..at]);
                plain = at + 1;
                match byte {
                    b'"' => self.0.push_str("\\\""),
                    b'\\' => self.0.push_str("\\\\"),
                    b'\n' => self.0.push_str("\\n"),
                    b'\r' => self.0.push_str("\\r"),
                    b'\t' => self.0.push_str("\\t"),
                    _ => write!(self.0, "\\u{byte:04x}")?,
                }
            }
            self.0.push_str(&text[plain..]);
            Ok(())
        }
    }

    to.push('"');
    let _ = write!(Escaped(to), "{text}"); // a string takes it all
    to.push('"');
}

/// Thins out lines that repeat within a second.
struct Sampler {
    /// By level, then by a hash of the message.
    counters: Box<[[Counter; SAMPLE_SLOTS]]>,
}

#[derive(Default)]
struct Counter {
    /// The second, since the epoch, that `lines` counts.
    second: AtomicI64,
    lines: AtomicU64,
}

impl Sampler {
    fn new() -> Self {
        let level = |_| std::array::from_fn(|_| Counter::default());
        Sampler { counters: LogLevel::ALL.iter().map(level).collect() }
    }

    fn passes(&self, level: LogLevel, message: &str, now: SystemTime) -> bool {
        // FNV-1a.
        let hash = message
            .bytes()
            .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        let counter = &self.counters[level as usize][hash as usize % SAMPLE_SLOTS];
        let (second, _) = since_epoch(now);
        if counter.second.swap(second, Ordering::Relaxed) != second {
            counter.lines.store(0, Ordering::Relaxed);
        }
        let line = counter.lines.fetch_add(1, Ordering::Relaxed) + 1;
        line <= SAMPLE_FIRST || (line - SAMPLE_FIRST).is_multiple_of(SAMPLE_EVERY)
    }
}

/// A moment as etcd writes it: local time to the microsecond and the offset, `Z` for none.
struct Stamp(SystemTime);

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, micros) = since_epoch(self.0);
        write_stamp(f, seconds, micros, local_offset(seconds))
    }
}

/// A moment in UTC to the nanosecond, as RFC 3339 has it.
pub fn rfc3339_nanos(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (year, month, day, hour, minute, second) = civil(since.as_secs() as i64);
    let nanos = since.subsec_nanos();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

fn write_stamp(f: &mut impl fmt::Write, seconds: i64, micros: u32, offset: i64) -> fmt::Result {
    let (year, month, day, hour, minute, second) = civil(seconds + offset);
    write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}")?;
    if offset == 0 {
        return f.write_char('Z');
    }
    let sign = if offset < 0 { '-' } else { '+' };
    let minutes = offset.unsigned_abs() / 60;
    write!(f, "{sign}{:02}{:02}", minutes / 60, minutes % 60)
}

/// Whole seconds since the epoch, rounded down, and the microseconds beyond them.
fn since_epoch(time: SystemTime) -> (i64, u32) {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => (since.as_secs() as i64, since.subsec_micros()),
        Err(before) => {
            let micros = before.duration().as_micros() as i64;
            ((-micros).div_euclid(1_000_000), (-micros).rem_euclid(1_000_000) as u32)
        }
    }
}

/// Seconds that local time is ahead of UTC at a moment.
fn local_offset(seconds: i64) -> i64 {
    /// No zone changes its offset but at the begin of a quarter of an hour.
    const QUARTER: i64 = 900;
    /// The last quarter asked for (since the epoch) and its offset, in one word.
    static LAST: AtomicI64 = AtomicI64::new(i64::MIN);
    const OFFSET_BITS: u32 = 24;

    let quarter = seconds.div_euclid(QUARTER);
    let last = LAST.load(Ordering::Relaxed);
    if last != i64::MIN && last >> OFFSET_BITS == quarter {
        // The low bits hold the offset with its sign.
        return last << (64 - OFFSET_BITS) >> (64 - OFFSET_BITS);
    }
    let offset = ask_local_offset(seconds);
    LAST.store(quarter << OFFSET_BITS | offset & ((1 << OFFSET_BITS) - 1), Ordering::Relaxed);
    offset
}

fn ask_local_offset(seconds: i64) -> i64 {
    let seconds: nix::libc::time_t = seconds;
    // SAFETY: `tm` is plain numbers and a pointer, for which all zeros is a value.
    let mut local: nix::libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both point to values of their types that live through the call.
    let answer = unsafe { nix::libc::localtime_r(&raw const seconds, &raw mut local) };
    if answer.is_null() { 0 } else { local.tm_gmtoff }
}

/// Year, month, day, hour, minute and second of a number of seconds since the epoch, by the Gregorian
/// calendar.
fn civil(seconds: i64) -> (i64, u32, u32, u32, u32, u32) {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400) as u32);
    // Years are counted from March, so that the leap day is the last of its year.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u32;
    let month =
        (if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 }) as u32;
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, month, day, second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps the lines it is given.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<String>>>);

    impl Sink for Kept {
        fn write(&self, line: &Line<'_>) -> io::Result<()> {
            self.0.lock().push(line.text.to_owned());
            Ok(())
        }
    }

    fn logger(level: LogLevel, format: LogFormat) -> (Logger, Kept) {
        let kept = Kept::default();
        (Logger::new(level, format, true, vec![Box::new(kept.clone())]), kept)
    }

    /// A line with its time taken out, for that is the only part that differs.
    fn timeless(line: &str) -> String {
        let at = line.find("\"ts\":\"").expect("a line has a time") + 6;
        let end = at + line[at..].find('"').expect("the time ends");
        assert!(end - at >= "2006-01-02T15:04:05.000000Z".len(), "{line}");
        format!("{}T{}", &line[..at], &line[end..])
    }

    #[test]
    fn a_line_is_what_zap_writes() {
        let (logger, kept) = logger(LogLevel::Info, LogFormat::Json);
        let line = tracing::subscriber::with_default(logger, || {
            let error = io::Error::other("broken \"pipe\"\n");
            tracing::info!(
                "remote-addr" = "127.0.0.1:1",
                count = 7_u64,
                ratio = 0.5,
                secure = false,
                took = %crate::config::duration::GoDuration(1_500_000),
                urls = list(["a", "b\\"]).value(),
                error = &error as &dyn std::error::Error,
                "ready {}",
                1
            );
            line!() - 11
        });
        let lines = kept.0.lock();
        assert_eq!(
            timeless(&lines[0]),
            format!(
                "{{\"level\":\"info\",\"ts\":\"T\",\"caller\":\"src/logging.rs:{line}\",\
                 \"msg\":\"ready 1\",\"remote-addr\":\"127.0.0.1:1\",\"count\":7,\"ratio\":0.5,\
                 \"secure\":false,\"took\":\"1.5ms\",\"urls\":[\"a\",\"b\\\\\"],\
                 \"error\":\"broken \\\"pipe\\\"\\n\"}}\n"
            )
        );
        serde_json::from_str::<serde_json::Value>(&lines[0]).expect("the line is JSON");
    }

    #[test]
    fn the_console_form_is_for_people() {
        let (logger, kept) = logger(LogLevel::Debug, LogFormat::Console);
        tracing::subscriber::with_default(logger, || {
            tracing::debug!(target: "logger/raft", id = "8e9e", "became leader");
            tracing::warn!("plain");
        });
        let lines = kept.0.lock();
        let parts: Vec<&str> = lines[0].trim_end().split('\t').collect();
        assert_eq!(parts[1..3], ["debug", "raft"]);
        assert!(parts[3].starts_with("src/logging.rs:"), "{}", parts[3]);
        assert_eq!(parts[4..], ["became leader", "{\"id\":\"8e9e\"}"]);
        assert!(lines[1].ends_with("\tplain\n"));
    }

    #[test]
    fn levels_and_targets_decide_what_is_written() {
        let (logger, kept) = logger(LogLevel::Info, LogFormat::Json);
        let logging = logger.handle();
        tracing::subscriber::with_default(logger, || {
            let all = || {
                tracing::trace!("trace");
                tracing::debug!("debug");
                tracing::info!("info");
                tracing::info!(target: "h2::frame", "foreign info");
                tracing::warn!(target: "h2::frame", "foreign warning");
                tracing::error!("error");
                tracing::error!(target: PANIC, "panic");
                fatal!(code = 1, "fatal");
                kept.0
                    .lock()
                    .drain(..)
                    .map(|line| {
                        let line: serde_json::Value =
                            serde_json::from_str(&line).expect("a line is JSON");
                        format!("{}:{}", line["level"], line["msg"]).replace('"', "")
                    })
                    .collect::<Vec<_>>()
            };
            let severe = ["error:error", "panic:panic", "fatal:fatal"];
            assert_eq!(all(), [&["info:info", "warn:foreign warning"], &severe[..]].concat());
            logging.set_level(LogLevel::Debug);
            let more = ["debug:debug", "info:info", "info:foreign info", "warn:foreign warning"];
            assert_eq!(all(), [&more[..], &severe].concat());
            logging.set_level(LogLevel::Fatal);
            assert_eq!(all(), ["fatal:fatal"]);
            assert_eq!(logging.level(), LogLevel::Fatal);
        });
    }

    #[test]
    fn repeated_lines_are_thinned_out() {
        let sampler = Sampler::new();
        let second = UNIX_EPOCH + Duration::from_secs(1_000);
        let passed = |message: &str, now, lines: u32| {
            (0..lines).filter(|_| sampler.passes(LogLevel::Info, message, now)).count()
        };
        assert_eq!(passed("a", second, 350), 102);
        assert_eq!(passed("b", second, 50), 50);
        assert!(sampler.passes(LogLevel::Warn, "a", second));
        assert_eq!(passed("a", second + Duration::from_secs(1), 350), 102);
    }

    #[test]
    fn times_are_written_with_zone() {
        let stamp = |seconds, micros, offset| {
            let mut text = String::new();
            write_stamp(&mut text, seconds, micros, offset).expect("a string takes it");
            text
        };
        assert_eq!(stamp(1_136_239_445, 7, -7 * 3600), "2006-01-02T15:04:05.000007-0700");
        assert_eq!(stamp(0, 0, 0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(stamp(951_782_399, 999_999, 0), "2000-02-28T23:59:59.999999Z");
        assert_eq!(stamp(951_782_400, 0, 5 * 3600 + 1800), "2000-02-29T05:30:00.000000+0530");
        assert_eq!(stamp(-1, 0, 0), "1969-12-31T23:59:59.000000Z");
        let asked = ask_local_offset(1_700_000_000);
        assert_eq!([local_offset(1_700_000_000), local_offset(1_700_000_001)], [asked; 2]);
    }

    #[test]
    fn a_full_file_is_put_aside_and_old_ones_go() {
        let directory = tempfile::tempdir().expect("a directory for the test");
        let path = directory.path().join("q.log");
        let rotation = Rotation { maxsize: 1, maxbackups: 1, compress: true, ..Default::default() };
        for day in ["01", "02"] {
            let name = format!("q-2020-01-{day}T00-00-00.000.log");
            fs::write(directory.path().join(&name), "old").expect("a file of the test");
        }
        fs::write(directory.path().join("q-other.log"), "not ours").expect("a file of the test");
        tidy_files(&path, &rotation, SystemTime::now()).expect("the directory can be read");
        let mut names: Vec<String> = fs::read_dir(directory.path())
            .expect("the directory can be read")
            .map(|entry| entry.expect("it can").file_name().into_string().expect("it is UTF-8"))
            .collect();
        names.sort();
        assert_eq!(names, ["q-2020-01-02T00-00-00.000.log.gz", "q-other.log"]);
        let mut text = String::new();
        let file = File::open(directory.path().join(&names[0])).expect("it is there");
        io::Read::read_to_string(&mut flate2::read::GzDecoder::new(file), &mut text)
            .expect("it is gzip");
        assert_eq!(text, "old");

        let rotation = Rotation { maxsize: 1, ..Default::default() };
        let rotating = Rotating::open(&path, &rotation).expect("the file can be made");
        let text = "x".repeat(700 * 1024) + "\n";
        let line = Line { text: &text, level: LogLevel::Info, file: "a/b.rs" };
        rotating.write(&line).expect("there is room");
        rotating.write(&line).expect("there is room in the next file");
        assert_eq!(fs::metadata(&path).expect("it is there").len(), text.len() as u64);
        assert_eq!(fs::read_dir(directory.path()).expect("it can be read").count(), 4);
    }

    #[test]
    fn the_journal_is_sent_fields() {
        let directory = tempfile::tempdir().expect("a directory for the test");
        let path = directory.path().join("socket");
        let receiver = UnixDatagram::bind(&path).expect("a socket of the test");
        let mut journal = Journal::connect(&path).expect("it listens");
        journal.identifier = "q".to_owned();
        for (text, message) in [
            ("one\n", b"MESSAGE=one\n".to_vec()),
            ("one\ntwo\n", b"MESSAGE\n\x07\0\0\0\0\0\0\0one\ntwo\n".to_vec()),
        ] {
            let line = Line { text, level: LogLevel::Error, file: "actors/raft.rs" };
            journal.write(&line).expect("it is sent");
            let mut entry = [0; 256];
            let bytes = receiver.recv(&mut entry).expect("it has come");
            let rest = b"PRIORITY=3\nPACKAGE=actors\nSYSLOG_IDENTIFIER=q\n";
            assert_eq!(entry[..bytes], [&message[..], rest].concat());
        }
        let absent = Journal::connect(&directory.path().join("absent"));
        assert!(absent.is_err());
    }

    #[test]
    fn callers_are_named_by_directory_and_file() {
        assert_eq!(short_path("src/actors/raft.rs"), "actors/raft.rs");
        assert_eq!(short_path("src/main.rs"), "src/main.rs");
        assert_eq!(short_path("main.rs"), "main.rs");
        assert_eq!(short_path("/a/b/c.rs"), "b/c.rs");
    }
}
