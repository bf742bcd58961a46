//! The keys that the roles of a user permit, merged.

use bytes::Bytes;
use quorate_proto::authpb::{Permission, permission};

use super::OPEN_END;
use super::access::Operation;

/// What all roles of one user permit together.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct Permitted {
    /// Has role root: what follows is not looked at.
    pub everything: bool,
    pub read: Ranges,
    pub write: Ranges,
}

impl Permitted {
    /// Merges permissions. One of a type that is not known permits nothing.
    pub fn merge<'a>(
        everything: bool,
        permissions: impl Iterator<Item = &'a Permission>,
    ) -> Permitted {
        let (mut read, mut write) = (Vec::new(), Vec::new());
        for permission in permissions {
            let Some(range) = Range::permitted(&permission.key, &permission.range_end) else {
                continue;
            };
            match permission::Type::try_from(permission.perm_type) {
                Ok(permission::Type::Read) => read.push(range),
                Ok(permission::Type::Write) => write.push(range),
                Ok(permission::Type::Readwrite) => {
                    read.push(range.clone());
                    write.push(range);
                }
                Err(_) => {}
            }
        }
        Permitted { everything, read: Ranges::of(read), write: Ranges::of(write) }
    }

    /// Where the keys are that something may be done with.
    pub fn ranges(&self, operation: Operation) -> &Ranges {
        match operation {
            Operation::Read => &self.read,
            Operation::Write => &self.write,
        }
    }
}

/// Keys from `begin` up to, but not with, `end`; to the last one if that is empty.
#[derive(Clone, PartialEq, Debug)]
struct Range {
    begin: Bytes,
    end: Bytes,
}

impl Range {
    /// The range of a permission; `None` if there is no key in it, which can come from a release that did
    /// not look.
    fn permitted(key: &Bytes, range_end: &Bytes) -> Option<Range> {
        if key.is_empty() {
            return None;
        }
        let end = match &range_end[..] {
            [] => {
                // The next key there can be.
                let mut end = Vec::with_capacity(key.len() + 1);
                end.extend_from_slice(key);
                end.push(0);
                end.into()
            }
            OPEN_END => Bytes::new(),
            _ if range_end <= key => return None,
            _ => range_end.clone(),
        };
        Some(Range { begin: key.clone(), end })
    }
}

/// A set of keys: ranges in ascending order, with a gap between each and the next.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct Ranges(Vec<Range>);

impl Ranges {
    fn of(mut ranges: Vec<Range>) -> Ranges {
        ranges.sort_unstable_by(|a, b| a.begin.cmp(&b.begin));
        let mut merged: Vec<Range> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(last) if last.end.is_empty() => break,
                // One that begins where the last one ends leaves no key between them.
                Some(last) if range.begin <= last.end => {
                    if range.end.is_empty() || range.end > last.end {
                        last.end = range.end;
                    }
                }
                _ => merged.push(range),
            }
        }
        merged.shrink_to_fit();
        Ranges(merged)
    }

    /// Up to where, without a gap, the keys from `key` on are in the set; `None` if `key` is not.
    fn end_from(&self, key: &[u8]) -> Option<&Bytes> {
        let after = self.0.partition_point(|range| range.begin <= key);
        let range = &self.0[after.checked_sub(1)?];
        (range.end.is_empty() || key < &range.end[..]).then_some(&range.end)
    }

    /// Whether a key is in the set. The empty one, which is no key, never is.
    pub fn has(&self, key: &[u8]) -> bool {
        self.end_from(key).is_some()
    }

    /// Whether all keys of a range are in the set (v3-api 3.2). A range without a key is taken for the one
    /// key that it names.
    pub fn cover(&self, key: &[u8], range_end: &[u8]) -> bool {
        let Some(end) = self.end_from(key) else { return false };
        match range_end {
            [] => true,
            OPEN_END => end.is_empty(),
            _ => end.is_empty() || range_end <= &end[..],
        }
    }

    /// Whether all of many ordered keys are in the set. `any_in` tells whether any of them is at or after
    /// the first, and before the second if that is given: asked for each gap, it spares a walk over keys
    /// that can be far more than there are ranges.
    pub fn have_all<'k>(
        &self,
        count: usize,
        mut keys: impl Iterator<Item = &'k Bytes>,
        any_in: impl Fn(&[u8], Option<&[u8]>) -> bool,
    ) -> bool {
        if count <= self.0.len() {
            return keys.all(|key| self.has(key));
        }
        let mut from: &[u8] = &[];
        for range in &self.0 {
            if any_in(from, Some(&range.begin)) {
                return false;
            }
            if range.end.is_empty() {
                return true;
            }
            from = &range.end;
        }
        !any_in(from, None)
    }
}
