//! Libraries installed below the target directory: made once, used until their requirements change.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// A registry that takes longer than this to give a few packages is taken to be out of reach.
const INSTALLATION: Duration = Duration::from_secs(600);

/// The directory in which `make` installs what `recipe` tells; the one of an earlier run if that followed
/// the same recipe to its end.
///
/// # Panics
/// If it cannot be made; the message says what is missing.
pub fn installed(
    name: &str,
    recipe: &str,
    make: impl FnOnce(&Path) -> Result<(), String>,
) -> PathBuf {
    let all = Path::new(env!("CARGO_TARGET_TMPDIR")).join("clients");
    fs::create_dir_all(&all).unwrap();
    // Another run of the same tests may be at it.
    let lock = File::create(all.join(format!("{name}.lock"))).unwrap();
    lock.lock().unwrap();
    let dir = all.join(name);
    let followed = dir.join("recipe");
    if fs::read_to_string(&followed).is_ok_and(|text| text == recipe) {
        return dir;
    }
    if dir.exists() {
        fs::remove_dir_all(&dir).unwrap();
    }
    fs::create_dir(&dir).unwrap();
    if let Err(reason) = make(&dir) {
        panic!(
            "the client library {name} cannot be installed: {reason}\n\
             its suite needs python3 with venv and pip, or node with npm, and their registries \
             (see need_packages in scripts/test); QUORATE_SKIP_CLIENTS=1 leaves these suites out"
        );
    }
    fs::write(&followed, recipe).unwrap();
    dir
}

/// What a command prints.
///
/// # Errors
/// That it cannot be started, fails, or takes too long, with what it said.
pub fn output(command: &mut Command, scratch: &Path) -> Result<String, String> {
    let log = scratch.join("output");
    let file = File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
    let errors = file.try_clone().map_err(|error| format!("{}: {error}", log.display()))?;
    command.stdin(Stdio::null()).stdout(file).stderr(errors);
    let child = command.spawn().map_err(|error| format!("{command:?}: {error}"))?;
    let ended = Running(child).wait(INSTALLATION);
    let said = fs::read_to_string(&log).unwrap_or_default();
    match ended {
        Some(status) if status.success() => Ok(said),
        Some(status) => Err(format!("{command:?}: {status}\n{said}")),
        None => Err(format!("{command:?} takes longer than {INSTALLATION:?}\n{said}")),
    }
}

/// A process that is killed when it is dropped.
pub struct Running(pub Child);

impl Running {
    /// How it ends, or None if it does not within `time`.
    pub fn wait(mut self, time: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + time;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return Some(status);
            }
            if Instant::now() > deadline {
                return None;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
