//! Crashes with the smallest cache, where buffered commits spill into the file, and with a stored list of free
//! pages, which opening then trusts.

use std::path::Path;

use engine_api::Options;
use engine_bbolt::{ABOUT, Bbolt};

fn open(dir: &Path) -> Bbolt {
    let given = [("cache-bytes", (1 << 20).to_string()), ("sync-freelist", "true".to_owned())];
    let given = given.map(|(name, value)| (name.to_owned(), value)).into();
    Bbolt::open(dir, &Options::new(&ABOUT, &given).unwrap()).unwrap()
}

mod small_cache_and_freelist {
    engine_conformance::suite!(crate::open, crash_only: true);
}
