//! The keys that the roles of a user permit, merged.

use bytes::Bytes;
use quorate_proto::authpb::{Permission, permission};

use super::OPEN_END;
use super::access::Operation;
use super::tree::Tree;

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
            let range = Range::permitted(&permission.key, &permission.range_end);
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
    /// The range of a permission.
    fn permitted(key: &Bytes, range_end: &Bytes) -> Range {
        let end = match &range_end[..] {
            [] => {
                // The next key there can be.
                let mut end = Vec::with_capacity(key.len() + 1);
                end.extend_from_slice(key);
                end.push(0);
                end.into()
            }
            OPEN_END => Bytes::new(),
            _ => range_end.clone(),
        };
        Range { begin: key.clone(), end }
    }

    /// Whether there is a key in it. Releases that did not look have let in others.
    fn has_a_key(&self) -> bool {
        !self.begin.is_empty() && (self.end.is_empty() || self.begin < self.end)
    }
}

/// A set of keys.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct Ranges {
    /// In ascending order, with a gap between each and the next.
    merged: Vec<Range>,
    /// As they were granted, for what `merged` cannot tell.
    tree: Tree,
    /// Some have no key in them, which makes etcd miss others when it is asked for more than one key.
    muddled: bool,
}

impl Ranges {
    /// In the order in which roles and permissions come.
    fn of(mut ranges: Vec<Range>) -> Ranges {
        let mut tree = Tree::default();
        for range in &ranges {
            tree.insert(range.begin.clone(), range.end.clone());
        }
        let all = ranges.len();
        ranges.retain(Range::has_a_key);
        let muddled = ranges.len() < all;
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
        Ranges { merged, tree, muddled }
    }

    /// Up to where, without a gap, the keys from `key` on are in the set; `None` if `key` is not.
    fn end_from(&self, key: &[u8]) -> Option<&Bytes> {
        let after = self.merged.partition_point(|range| range.begin <= key);
        let range = &self.merged[after.checked_sub(1)?];
        (range.end.is_empty() || key < &range.end[..]).then_some(&range.end)
    }

    /// Whether a key is in the set. The empty one, which is no key, never is.
    pub fn has(&self, key: &[u8]) -> bool {
        self.end_from(key).is_some()
    }

    /// Whether all keys of a range are in the set (v3-api 3.2). For a range without a key this is as good
    /// as for the key that it names, but for what etcd overlooks.
    pub fn cover(&self, key: &[u8], range_end: &[u8]) -> bool {
        match range_end {
            [] => self.has(key),
            OPEN_END if self.muddled => self.tree.cover(key, &[]),
            OPEN_END => self.end_from(key).is_some_and(|end| end.is_empty()),
            _ if self.muddled || range_end <= key => self.tree.cover(key, range_end),
            _ => self.end_from(key).is_some_and(|end| end.is_empty() || range_end <= &end[..]),
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
        if count <= self.merged.len() {
            return keys.all(|key| self.has(key));
        }
        let mut from: &[u8] = &[];
        for range in &self.merged {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Permissions, and whether they cover ranges, from the tree of etcd 3.7.1. Every third line has
    /// permissions without a key; all have questions for ranges without one.
    const RECORDED: &str = include_str!("ranges.txt");

    fn bytes(hex: &str) -> Bytes {
        if hex == "-" {
            return Bytes::new();
        }
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(byte).collect()
    }

    fn range(text: &str) -> (Bytes, Bytes) {
        let (key, range_end) = text.split_once(',').unwrap();
        (bytes(key), bytes(range_end))
    }

    #[test]
    fn answers_are_those_of_etcd() {
        let mut asked = [0; 2];
        for (number, line) in RECORDED.lines().enumerate() {
            let (granted, questions) = line.split_once('|').unwrap();
            let granted = granted.split_whitespace().map(range);
            let ranges = Ranges::of(granted.map(|(k, e)| Range::permitted(&k, &e)).collect());
            for question in questions.split_whitespace() {
                let (text, answer) = question.split_once('=').unwrap();
                let (key, range_end) = range(text);
                let found = ranges.cover(&key, &range_end);
                assert_eq!(found, answer == "y", "line {}: {text}", number + 1);
                // What needs no tree is right in it, too.
                if !ranges.muddled && !range_end.is_empty() {
                    let end = if range_end == OPEN_END { &[][..] } else { &range_end };
                    assert_eq!(ranges.tree.cover(&key, end), found, "line {}: {text}", number + 1);
                }
                asked[usize::from(found)] += 1;
            }
        }
        assert!(asked[0] > 500 && asked[1] > 500, "{asked:?}");
    }
}
