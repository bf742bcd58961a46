//! Which seeds and how many rounds a randomized case runs, and how the environment changes that.

/// The seeds of a randomized case: the one in `ENGINE_SEED`, or `default`. Says which runs, so that a
/// failure's output tells how to repeat it.
pub(crate) fn each_seed(default: impl IntoIterator<Item = u64>, run: impl Fn(u64)) {
    let chosen = std::env::var("ENGINE_SEED").ok().map(|text| {
        text.parse().unwrap_or_else(|_| panic!("ENGINE_SEED must be a number, not {text:?}"))
    });
    let seeds = chosen.map_or_else(|| default.into_iter().collect(), |seed| vec![seed]);
    for seed in seeds {
        eprintln!("seed {seed}; repeat with ENGINE_SEED={seed}");
        run(seed);
    }
}
