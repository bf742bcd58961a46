//! Which seeds and how many rounds a randomized case runs, and how the environment changes that.

/// A number in the environment.
pub(crate) fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {text:?}")))
}

/// How often a crash case crashes: `ENGINE_CRASH_ROUNDS`, or `default`.
pub(crate) fn crash_rounds(default: u64) -> u64 {
    number("ENGINE_CRASH_ROUNDS").unwrap_or(default)
}

/// The seeds of a randomized case: the one in `ENGINE_SEED`, or `default`. Says which runs, so that a
/// failure's output tells how to repeat it.
pub(crate) fn each_seed(default: impl IntoIterator<Item = u64>, run: impl Fn(u64)) {
    let seeds =
        number("ENGINE_SEED").map_or_else(|| default.into_iter().collect(), |seed| vec![seed]);
    for seed in seeds {
        eprintln!("seed {seed}; repeat with ENGINE_SEED={seed}");
        run(seed);
    }
}
