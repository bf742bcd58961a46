use std::path::Path;

use engine_conformance::{Mirror, Model};

use super::*;

mod conformance {
    engine_conformance::suite!(|dir: &std::path::Path| crate::tests::open(dir),
        buffered_survives_drop: true);
}

fn open(dir: &Path) -> Bbolt {
    Bbolt::open(dir, &Options::defaults(&ABOUT)).unwrap()
}
