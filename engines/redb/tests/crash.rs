//! Crashes with the smallest cache, where buffered commits spill into the file.

use std::path::Path;

use engine_api::Options;
use engine_redb::{ABOUT, Redb};

fn open(dir: &Path) -> Redb {
    let given = [("cache-bytes".to_owned(), (1 << 20).to_string())].into();
    Redb::open(dir, &Options::new(&ABOUT, &given).unwrap()).unwrap()
}

mod small_cache {
    engine_conformance::suite!(crate::open, crash_only: true);
}
