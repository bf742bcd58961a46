//! Reader and writer against each other; tests/formats.rs has them against etcd.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};

use engine_bbolt::format::{
    BRANCH, ELEMENT_BYTES, HEADER_BYTES, KEY_BYTES_MAX, u16_at, u32_at, u64_at,
};

use super::*;

type Content = BTreeMap<Vec<u8>, BTreeMap<Vec<u8>, Vec<u8>>>;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.below(256) as u8).collect()
    }
}

fn write(content: &Content, page_bytes: usize) -> Vec<u8> {
    let pairs: Vec<(&[u8], Vec<(&[u8], &[u8])>)> = content
        .iter()
        .map(|(name, bucket)| {
            (&name[..], bucket.iter().map(|(key, value)| (&key[..], &value[..])).collect())
        })
        .collect();
    let sources: Vec<Pairs<'_, &[u8], &[u8]>> =
        pairs.iter().map(|(name, pairs)| Pairs { name, pairs }).collect();
    let sources: Vec<&dyn BucketSource> =
        sources.iter().map(|source| source as &dyn BucketSource).collect();
    let mut out = Vec::new();
    let bytes = write_compact(&mut out, &sources, page_bytes).unwrap();
    assert_eq!(bytes, out.len() as u64);
    out
}

fn read(bytes: &[u8]) -> Result<Content, BboltError> {
    let reader = Reader::open(bytes)?;
    let mut content = Content::new();
    for name in reader.buckets()? {
        let mut pairs = BTreeMap::new();
        let bucket = reader.bucket(&name)?.expect("a bucket that was listed");
        bucket.scan(Bound::Unbounded, Bound::Unbounded, &mut |key, value| {
            pairs.insert(key.to_vec(), value.to_vec());
            ControlFlow::Continue(())
        })?;
        content.insert(name, pairs);
    }
    Ok(content)
}

/// Every page is reached once, or is a meta or freelist page; every branch has two children.
fn check_pages(bytes: &[u8], page_bytes: usize) {
    let mut children = BTreeMap::new();
    let mut id = 0;
    while id * page_bytes < bytes.len() {
        let page = &bytes[id * page_bytes..];
        assert_eq!(u64_at(page, 0), id as u64);
        let count = usize::from(u16_at(page, 10));
        if u16_at(page, 8) == BRANCH {
            assert!(count >= 2, "page {id} has {count} children");
            for index in 0..count {
                let child = u64_at(page, HEADER_BYTES + index * ELEMENT_BYTES + 8);
                assert!(children.insert(child, id).is_none(), "page {child} has two parents");
            }
        }
        id += 1 + u32_at(page, 12) as usize;
    }
    assert_eq!(id * page_bytes, bytes.len());
}

fn sample(random: &mut Random, buckets: usize, pairs: usize, value_max: usize) -> Content {
    (0..buckets)
        .map(|n| {
            let pairs = (0..random.below(pairs + 1))
                .map(|_| {
                    let key_bytes = 1 + random.below(40);
                    let value_bytes = random.below(value_max + 1);
                    (random.bytes(key_bytes), random.bytes(value_bytes))
                })
                .collect();
            (format!("bucket{n:03}").into_bytes(), pairs)
        })
        .collect()
}

#[test]
fn what_is_written_is_read() {
    let mut random = Random(7);
    for round in 0..60 {
        let (buckets, pairs, value_max) =
            [(3, 10, 20), (12, 300, 60), (2, 40, 9000), (200, 4, 10), (1, 3000, 5)][round % 5];
        let content = sample(&mut random, buckets, pairs, value_max);
        for page_bytes in [1024, 4096, 65536] {
            let file = write(&content, page_bytes);
            check_pages(&file, page_bytes);
            assert_eq!(read(&file).unwrap(), content, "round {round}");
        }
    }
}

#[test]
fn nothing_and_empty_buckets() {
    let file = write(&Content::new(), PAGE_BYTES);
    assert_eq!(file.len(), 4 * PAGE_BYTES);
    assert_eq!(read(&file).unwrap(), Content::new());
    let names = ["alarm", "auth", "key", "meta"];
    let content: Content =
        names.iter().map(|name| (name.as_bytes().to_vec(), BTreeMap::new())).collect();
    let file = write(&content, PAGE_BYTES);
    assert_eq!(file.len(), 4 * PAGE_BYTES);
    assert_eq!(read(&file).unwrap(), content);
    let reader = Reader::open(&file[..]).unwrap();
    assert_eq!(reader.bucket(b"key").unwrap().unwrap().get(b"x").unwrap(), None);
    assert!(reader.bucket(b"missing").unwrap().is_none());
    assert_eq!((reader.pages(), reader.page_bytes(), reader.transaction()), (4, 4096, 1));
}

#[test]
fn long_keys_big_values_and_many_levels() {
    let mut pairs = BTreeMap::new();
    for n in 0u32..40 {
        let mut key = n.to_be_bytes().to_vec();
        key.resize(KEY_BYTES_MAX - (n as usize % 3) * 16_000, 0xAA);
        pairs.insert(key, vec![n as u8; if n == 20 { 3_000_000 } else { 0 }]);
    }
    let content = Content::from([(b"key".to_vec(), pairs)]);
    let file = write(&content, 1024);
    check_pages(&file, 1024);
    assert_eq!(read(&file).unwrap(), content);

    let pairs: BTreeMap<_, _> =
        (0u64..60_000).map(|n| (n.to_be_bytes().to_vec(), vec![1; 3])).collect();
    let content = Content::from([(b"key".to_vec(), pairs)]);
    let file = write(&content, 1024);
    check_pages(&file, 1024);
    assert_eq!(read(&file).unwrap(), content);
}

#[test]
fn scans_keep_to_their_bounds() {
    let pairs: BTreeMap<Vec<u8>, Vec<u8>> =
        (0u32..2000).map(|n| ((n * 2).to_be_bytes().to_vec(), n.to_le_bytes().to_vec())).collect();
    let file = write(&Content::from([(b"b".to_vec(), pairs.clone())]), 1024);
    let reader = Reader::open(&file[..]).unwrap();
    let bucket = reader.bucket(b"b").unwrap().unwrap();
    let mut random = Random(3);
    for _ in 0..300 {
        let mut bound = |keys: &mut Vec<u8>| {
            *keys = (random.below(4100) as u32).to_be_bytes().to_vec();
            random.below(5)
        };
        let (mut from, mut to) = (Vec::new(), Vec::new());
        let make = |kind, key| match kind {
            0 => Bound::Unbounded,
            1 | 2 => Bound::Included(key),
            _ => Bound::Excluded(key),
        };
        let (from_kind, to_kind) = (bound(&mut from), bound(&mut to));
        let range = (make(from_kind, &from[..]), make(to_kind, &to[..]));
        let mut found = Vec::new();
        bucket
            .scan(range.0, range.1, &mut |key, value| {
                found.push((key.to_vec(), value.to_vec()));
                ControlFlow::Continue(())
            })
            .unwrap();
        let expected: Vec<_> = pairs
            .iter()
            .filter(|(key, _)| std::ops::RangeBounds::<[u8]>::contains(&range, &key[..]))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        assert_eq!(found, expected, "{range:?}");
        let key = &from[..];
        assert_eq!(bucket.get(key).unwrap().as_deref(), pairs.get(key).map(|value| &value[..]));
    }
    let mut seen = 0;
    bucket
        .scan(Bound::Unbounded, Bound::Unbounded, &mut |_, _| {
            seen += 1;
            if seen == 700 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    assert_eq!(seen, 700);
}

#[test]
fn content_that_bbolt_cannot_hold_is_refused() {
    let refuse = |pairs: &[(&[u8], &[u8])]| {
        write_compact(&mut Vec::new(), &[&Pairs { name: b"b", pairs }], PAGE_BYTES).unwrap_err()
    };
    assert!(matches!(refuse(&[(b"b", b""), (b"a", b"")]), WriteError::Order { .. }));
    assert!(matches!(refuse(&[(b"a", b""), (b"a", b"")]), WriteError::Order { .. }));
    assert!(matches!(refuse(&[(b"", b"")]), WriteError::KeyLength { bytes: 0 }));
    let long = vec![1; KEY_BYTES_MAX + 1];
    assert!(matches!(refuse(&[(&long, b"")]), WriteError::KeyLength { .. }));
    let none: &[(&[u8], &[u8])] = &[];
    let (a, b) = (Pairs { name: b"a", pairs: none }, Pairs { name: b"b", pairs: none });
    let error = write_compact(&mut Vec::new(), &[&b, &a], PAGE_BYTES).unwrap_err();
    assert_eq!(error.to_string(), "bucket a does not follow b");
    let error = write_compact(&mut Vec::new(), &[&a], 4095).unwrap_err();
    assert!(matches!(error, WriteError::PageSize { bytes: 4095 }));
}

#[test]
fn content_that_changes_between_the_passes_is_noticed() {
    struct Growing(std::cell::Cell<usize>);
    impl BucketSource for Growing {
        fn name(&self) -> &[u8] {
            b"b"
        }
        fn pairs(&self, visit: &mut PairVisitor<'_>) -> Result<(), WriteError> {
            self.0.set(self.0.get() + 1000);
            visit(b"k", &vec![0; self.0.get() * 4])
        }
    }
    let growing = Growing(std::cell::Cell::new(0));
    let error = write_compact(&mut Vec::new(), &[&growing], PAGE_BYTES).unwrap_err();
    assert!(matches!(error, WriteError::Changed));
}

#[test]
fn a_damaged_first_meta_is_passed_over() {
    let content = sample(&mut Random(9), 3, 50, 50);
    for page_bytes in [1024, 4096, 16384] {
        let mut file = write(&content, page_bytes);
        file[30] ^= 1;
        assert_eq!(read(&file).unwrap(), content);
        file[page_bytes + 30] ^= 1;
        assert!(matches!(read(&file), Err(BboltError::NoMeta)));
    }
    let file = write(&content, PAGE_BYTES);
    assert!(matches!(
        Reader::open(&file[..file.len() - 1]),
        Err(BboltError::CutShort { page_bytes: 4096, .. })
    ));
    assert!(matches!(Reader::open(&b"text"[..]), Err(BboltError::NoMeta)));
    assert!(matches!(Reader::open(&b""[..]), Err(BboltError::NoMeta)));
}

#[test]
fn damage_is_reported_with_its_page() {
    let pairs: BTreeMap<Vec<u8>, Vec<u8>> =
        (0u32..500).map(|n| (n.to_be_bytes().to_vec(), vec![7; 20])).collect();
    let file = write(&Content::from([(b"b".to_vec(), pairs)]), 1024);
    let damaged = |at: usize, bytes: &[u8]| {
        let mut file = file.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        match read(&file).unwrap_err() {
            BboltError::Page { page, at, damage } => {
                assert_eq!(at, page * 1024);
                (page, damage)
            }
            other => panic!("{other}"),
        }
    };
    // Page 3 is the first leaf.
    assert_eq!(damaged(3 * 1024, &[9]), (3, PageDamage::Id { found: 9 }));
    assert_eq!(damaged(3 * 1024 + 8, &[4]), (3, PageDamage::Flags { found: 4 }));
    assert_eq!(damaged(3 * 1024 + 10, &[0, 0]), (3, PageDamage::Empty));
    assert_eq!(damaged(3 * 1024 + 12, &[255, 255]), (3, PageDamage::Overflow { overflow: 0xffff }));
    assert!(matches!(
        damaged(3 * 1024 + 20, &[255, 255]),
        (3, PageDamage::Element { index: 0, .. })
    ));
    assert!(matches!(damaged(3 * 1024 + 24, &[0]), (3, PageDamage::KeyLength { bytes: 0, .. })));
    assert_eq!(damaged(3 * 1024 + 16, &[1]), (3, PageDamage::Nested { index: 0 }));
    // The first key of page 4 becomes less than its branch says, in a place that keeps the order.
    let key = 4 * 1024 + 16 + u32_at(&file, 4 * 1024 + 20) as usize;
    assert_eq!(damaged(key, &[0, 0, 0, 0]), (4, PageDamage::Misplaced { index: 0 }));
}

#[test]
fn a_tree_that_leads_back_to_itself_ends() {
    // A root branch whose child is itself.
    let mut file = write(&Content::new(), 1024);
    let root = 3 * 1024;
    file[root + 8] = BRANCH as u8;
    file[root + 10] = 1;
    file[root + 16..root + 32].fill(0);
    file[root + 16] = 16;
    file[root + 24] = 3;
    match read(&file) {
        Err(BboltError::Page { page: 3, damage: PageDamage::Depth, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn no_mutation_makes_the_reader_panic_or_loop() {
    let mut random = Random(11);
    // A tree of two levels, a small bucket, one with a value over several pages.
    let content = Content::from([
        (b"tree".to_vec(), (10u8..40).map(|n| (vec![n; 9], vec![n; 60])).collect()),
        (b"small".to_vec(), BTreeMap::from([(b"k".to_vec(), b"v".to_vec())])),
        (b"big".to_vec(), BTreeMap::from([(b"k".to_vec(), vec![5; 1500])])),
    ]);
    let file = write(&content, 1024);
    let mut sound = 0;
    for _ in 0..100_000 {
        let mut file = file.clone();
        for _ in 0..1 + random.below(3) {
            // Mostly headers and elements, where structure is.
            let page = random.below(file.len() / 1024);
            let offset = if random.below(4) == 0 { random.below(1024) } else { random.below(96) };
            let at = page * 1024 + offset;
            match random.below(3) {
                0 => file[at] ^= 1 << random.below(8),
                1 => file[at] = random.below(256) as u8,
                _ => file[at] = random.below(20) as u8,
            }
        }
        if random.below(20) == 0 {
            file.truncate(random.below(file.len()));
        }
        sound += usize::from(read(&file).is_ok());
    }
    assert!(sound > 0);
}

#[test]
fn the_digest_is_checked() {
    let mut writer = DigestWriter::new(Vec::new());
    let content = sample(&mut Random(5), 2, 20, 20);
    writer.write_all(&write(&content, PAGE_BYTES)).unwrap();
    let file = writer.finish().unwrap();
    assert_eq!(verify_digest(&&file[..]).unwrap(), file.len() as u64 - 32);
    assert_eq!(read(&file).unwrap(), content);
    for at in [0, 5000, file.len() - 1] {
        let mut damaged = file.clone();
        damaged[at] ^= 1;
        assert!(matches!(verify_digest(&&damaged[..]), Err(DigestError::Mismatch { .. })));
    }
    let cut = &file[..file.len() - 32];
    assert!(matches!(verify_digest(&cut), Err(DigestError::Missing { .. })));
}
