//! Reading keys at a revision (v3-api 3.3).

use bytes::Bytes;
use quorate_proto::KeyValueBytes;
use quorate_proto::etcdserverpb::RangeRequest;
use quorate_proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use quorate_proto::mvccpb::KeyValue;
use smallvec::SmallVec;

use super::key_index::Found;
use super::{Key, KeyRange, ReadError, Snapshot, Values};

/// What a range read answers.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Ranged {
    /// Encoded, in the order asked for.
    pub kvs: Vec<KeyValueBytes>,
    /// More keys than the limit remained after filtering.
    pub more: bool,
    /// Keys in the range at that revision, ignoring limit and filters.
    pub count: i64,
}

struct Row<'a> {
    key: &'a Key,
    found: Found,
    /// Read ahead only to sort by value; boxed, because most ranges have very many rows and none.
    value: Option<Box<(KeyValueBytes, Bytes)>>,
}

impl Snapshot {
    /// Calls `visit` with each key of the range that exists at main revision `at`, in order, until
    /// it answers false.
    pub fn visit<'s>(
        &'s self,
        range: KeyRange<'_>,
        at: i64,
        mut visit: impl FnMut(&'s Key, Found) -> bool,
    ) {
        let Some(bounds) = range.bounds() else { return };
        for (key, history) in self.index.range::<_, [u8]>(bounds) {
            if let Some(found) = history.get(at)
                && !visit(key, found)
            {
                return;
            }
        }
    }

    /// Answers a range request; its `revision` is the caller's to check where it must fail before
    /// the read, but it is checked here too.
    ///
    /// # Errors
    /// `Compacted`, `Future`, `Superseded`, `Storage`.
    pub fn range(&self, values: &Values<'_>, request: &RangeRequest) -> Result<Ranged, ReadError> {
        self.select(values, request, true)
    }

    /// As [`Snapshot::range`], but it need not look at keys beyond the limit: `count` is that of the
    /// whole range only where there are no `more`.
    ///
    /// # Errors
    /// As [`Snapshot::range`].
    pub fn page(&self, values: &Values<'_>, request: &RangeRequest) -> Result<Ranged, ReadError> {
        self.select(values, request, false)
    }

    fn select(
        &self,
        values: &Values<'_>,
        request: &RangeRequest,
        counted: bool,
    ) -> Result<Ranged, ReadError> {
        let at = if request.revision <= 0 { self.revision } else { request.revision };
        self.check_readable(at)?;
        let order = SortOrder::try_from(request.sort_order).unwrap_or(SortOrder::None);
        let target = SortTarget::try_from(request.sort_target).unwrap_or(SortTarget::Key);
        let limit = usize::try_from(request.limit).unwrap_or(0);
        let filtered = request.min_mod_revision != 0
            || request.max_mod_revision != 0
            || request.min_create_revision != 0
            || request.max_create_revision != 0;
        let in_key_order =
            order == SortOrder::None || (order == SortOrder::Ascend && target == SortTarget::Key);
        let fetch = if limit > 0 && !filtered && in_key_order { limit + 1 } else { usize::MAX };

        let mut count = 0;
        // Most reads are of one key.
        let mut rows: SmallVec<[Row<'_>; 1]> = SmallVec::new();
        let mut add = |key, found| {
            count += 1;
            if rows.len() < fetch && !request.count_only {
                rows.push(Row { key, found, value: None });
            }
            counted || rows.len() < fetch
        };
        match KeyRange::of(&request.key, &request.range_end) {
            Some(range) => self.visit(range, at, add),
            None => {
                if let Some((key, history)) = self.index.get_key_value(&request.key[..])
                    && let Some(found) = history.get(at)
                {
                    add(key, found);
                }
            }
        }
        if request.count_only {
            return Ok(Ranged { count, ..Ranged::default() });
        }
        if filtered {
            rows.retain(|row| passes(request, &row.found));
        }
        if order != SortOrder::None || target != SortTarget::Key {
            self.sort(values, &mut rows, order, target)?;
        }
        let more = limit > 0 && rows.len() > limit;
        if more {
            rows.truncate(limit);
        }
        let mut kvs = Vec::with_capacity(rows.len());
        for row in rows {
            kvs.push(match row.value {
                _ if request.keys_only && target != SortTarget::Value => {
                    KeyValueBytes::from(&KeyValue {
                        key: Bytes::copy_from_slice(row.key),
                        ..fields(&row.found)
                    })
                }
                Some(read) if request.keys_only => {
                    let kv = read.0.parse().map_err(|_| ReadError::Damaged(row.found.modified))?;
                    KeyValueBytes::from(&KeyValue { value: Bytes::new(), ..kv })
                }
                Some(read) => read.0,
                None => self.value(values, row.found.modified)?,
            });
        }
        Ok(Ranged { kvs, more, count })
    }

    /// Sorts stably over key order, so that ties stay in key order in both directions.
    fn sort(
        &self,
        values: &Values<'_>,
        rows: &mut [Row<'_>],
        order: SortOrder,
        target: SortTarget,
    ) -> Result<(), ReadError> {
        if target == SortTarget::Value {
            for row in rows.iter_mut() {
                let stored = self.value(values, row.found.modified)?;
                let kv = stored.parse().map_err(|_| ReadError::Damaged(row.found.modified))?;
                row.value = Some(Box::new((stored, kv.value)));
            }
        }
        fn value<'r>(row: &'r Row<'_>) -> Option<&'r Bytes> {
            row.value.as_ref().map(|read| &read.1)
        }
        let compare = |a: &Row<'_>, b: &Row<'_>| match target {
            SortTarget::Key => a.key.cmp(b.key),
            SortTarget::Version => a.found.version.cmp(&b.found.version),
            SortTarget::Create => a.found.created.main.cmp(&b.found.created.main),
            SortTarget::Mod => a.found.modified.main.cmp(&b.found.modified.main),
            SortTarget::Value => value(a).cmp(&value(b)),
        };
        if order == SortOrder::Descend {
            rows.sort_by(|a, b| compare(b, a));
        } else {
            rows.sort_by(compare);
        }
        Ok(())
    }
}

/// Whether a found key is inside the request's revision bounds; a bound of 0 is off.
fn passes(request: &RangeRequest, found: &Found) -> bool {
    let within =
        |value: i64, min: i64, max: i64| (max == 0 || value <= max) && (min == 0 || value >= min);
    within(found.modified.main, request.min_mod_revision, request.max_mod_revision)
        && within(found.created.main, request.min_create_revision, request.max_create_revision)
}

/// What the index knows of a key: all but value and lease.
fn fields(found: &Found) -> KeyValue {
    KeyValue {
        create_revision: found.created.main,
        mod_revision: found.modified.main,
        version: found.version,
        ..Default::default()
    }
}
