//! Suites of libraries for Python: a virtual environment for each, and pytest in it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::cluster::{Cluster, tail};
use crate::environment::{Running, installed, output};
use crate::junit;
use crate::verdict::Results;

/// The suites sleep for a minute or so; some of their tests wait for ever if an event does not come.
const SUITE: Duration = Duration::from_secs(300);

/// Random examples for each test that takes some.
const EXAMPLES: &str = "10";

/// A library's suite.
pub struct Suite {
    /// The name of the library, and of its package in the registry.
    pub library: &'static str,
    /// What is installed: a `requirements.txt` that names the library too.
    pub requirements: &'static str,
    /// pytest's, in the library's source directory.
    pub arguments: &'static [&'static str],
    /// Names and texts of tests of our own that run among them: of what the library's leave out.
    pub own: &'static [(&'static str, &'static str)],
}

/// A suite that can run.
pub struct Ready {
    suite: Suite,
    python: PathBuf,
    sources: PathBuf,
}

/// Where this suite's own files are.
fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients")
}

/// The program that `name` means in this process.
fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is not installed"))
}

impl Suite {
    /// Installs the library, what its suite needs, and the suite, which only the source package has.
    pub fn prepare(self) -> Ready {
        let Suite { library, requirements, .. } = self;
        let release = requirements
            .lines()
            .find(|line| line.starts_with(&format!("{library}==")))
            .unwrap_or_else(|| panic!("the requirements do not name {library}"));
        let version = Command::new("python3").arg("--version").output();
        let version = version.map(|said| String::from_utf8_lossy(&said.stdout).into_owned());
        let recipe = format!("{}{requirements}", version.unwrap_or_default());
        let dir = installed(library, &recipe, |dir| {
            let run = |command: &mut Command| output(command, dir);
            run(Command::new("python3").args(["-m", "venv"]).arg(dir.join("venv")))?;
            let pip = |arguments: &[&str]| {
                let mut command = Command::new(dir.join("venv/bin/python"));
                command.args(["-m", "pip", "--disable-pip-version-check", "--no-input"]);
                command.args(arguments).current_dir(dir);
                run(&mut command)
            };
            let file = dir.join("requirements.txt");
            fs::write(&file, requirements).map_err(|error| error.to_string())?;
            pip(&["install", "--requirement", "requirements.txt"])?;
            let only_source =
                ["download", "--no-deps", "--no-binary", library, "--dest", ".", release];
            pip(&only_source)?;
            let archive = format!("{}.tar.gz", release.replace("==", "-"));
            let mut extract = Command::new(dir.join("venv/bin/python"));
            run(extract.args(["-m", "tarfile", "--extract", &archive]).current_dir(dir))?;
            Ok(())
        });
        let sources = dir.join(release.replace("==", "-"));
        for (name, text) in self.own {
            fs::write(sources.join("tests").join(name), text).unwrap();
        }
        Ready { suite: self, python: dir.join("venv/bin/python"), sources }
    }
}

impl Ready {
    /// Runs the suite against a cluster.
    ///
    /// # Panics
    /// If it does not come to its end, or leaves no report.
    pub fn run(&self, cluster: &Cluster) -> Results {
        let (report, log) = (cluster.scratch("report.xml"), cluster.scratch("pytest.log"));
        let own = here();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = [own.join("bin")].into_iter().chain(std::env::split_paths(&path));
        let port = cluster.ports[0].to_string();
        let url = format!("http://127.0.0.1:{port}");
        let others: Vec<String> = cluster.others().iter().map(u32::to_string).collect();

        let file = File::create(&log).unwrap();
        let mut pytest = Command::new(&self.python);
        pytest
            .args(["-m", "pytest"])
            .args(self.suite.arguments)
            .args(self.suite.own.iter().map(|(name, _)| format!("tests/{name}")))
            // The library's own options ask for plugins that measure its coverage.
            .args(["-o", "addopts=", "-p", "no:cacheprovider", "-p", "suite_under_test"])
            .arg(format!("--junitxml={}", report.display()))
            .current_dir(&self.sources)
            .env("PATH", std::env::join_paths(path).unwrap())
            .env("PYTHONPATH", &own)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("ETCDCTL_API", "3")
            .env("REAL_ETCDCTL", program("etcdctl"))
            .env("TEST_LIBRARY", self.suite.library)
            .env("TEST_EXAMPLES", EXAMPLES)
            .env("TEST_SERVER_PORT", &port)
            .env("TEST_OTHER_MEMBERS", others.join(" "))
            // Names of the libraries' own.
            .env("PYTHON_ETCD_HTTP_URL", &url)
            .env("TEST_ETCD_HTTP_URL", &url)
            .env("TOOZ_TEST_HTTP_URL", &url)
            .env("TOOZ_TEST_ETCD_PORT", &port)
            .env("TEST_ETCD_VERSION", "v3.4.23");
        for option in ["ETCDCTL_ENDPOINTS", "PYTEST_ADDOPTS", "PYTHONHOME"] {
            pytest.env_remove(option);
        }
        pytest.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let child = pytest.spawn().unwrap_or_else(|error| panic!("{pytest:?}: {error}"));
        let ended = Running(child).wait(SUITE);

        let said = fs::read_to_string(&log).unwrap_or_default();
        let context = || {
            let (program, library) = (cluster.program, self.suite.library);
            let said = tail(&said, 60);
            format!("{library} with {program:?}: {ended:?}\n{said}\n{}", cluster.logs())
        };
        assert!(ended.is_some(), "the suite does not end: {}", context());
        let xml = fs::read_to_string(&report)
            .unwrap_or_else(|error| panic!("no report ({error}): {}", context()));
        let results = junit::parse(&xml).unwrap_or_else(|error| panic!("{error}: {}", context()));
        if !ended.is_some_and(|status| status.success()) {
            println!("{}", context());
        }
        results
    }
}
