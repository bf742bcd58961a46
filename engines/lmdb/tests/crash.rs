//! Crashes with the smallest buffer, where buffered commits become durable by themselves.

use std::path::Path;

use engine_api::Options;
use engine_lmdb::{ABOUT, Lmdb};

fn open(dir: &Path) -> Lmdb {
    let given = [("buffer-bytes".to_owned(), (1 << 16).to_string())].into();
    Lmdb::open(dir, &Options::new(&ABOUT, &given).unwrap()).unwrap()
}

mod small_buffer {
    engine_conformance::suite!(crate::open, crash_only: true);
}
