//! Which watchers a key concerns: a hash map for single keys, an interval tree for ranges.

use std::collections::hash_map::{DefaultHasher, Entry};
use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, Hasher};

use bytes::Bytes;

use super::Random;

/// A watcher's place in the hub's table.
pub(super) type Slot = u32;

/// The keys a watcher follows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Keys {
    One(Bytes),
    /// `from <= key`, and below the end.
    Range(Bytes, End),
}

/// Where a range stops; `Open` is above every key.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum End {
    Before(Bytes),
    Open,
}

impl End {
    fn is_above(&self, key: &[u8]) -> bool {
        match self {
            End::Before(end) => &end[..] > key,
            End::Open => true,
        }
    }
}

/// SipHash that begins with a seed: clients choose the keys, so they must not know where one lands.
#[derive(Clone, Debug)]
struct Seeded(u64);

impl BuildHasher for Seeded {
    type Hasher = DefaultHasher;

    fn build_hasher(&self) -> DefaultHasher {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.0);
        hasher
    }
}

/// Watchers by what they follow.
#[derive(Debug)]
pub(super) struct Index {
    keys: HashMap<Bytes, BTreeSet<Slot>, Seeded>,
    ranges: Ranges,
}

impl Index {
    pub(super) fn new(random: &mut Random) -> Self {
        Index {
            keys: HashMap::with_hasher(Seeded(random.next())),
            ranges: Ranges::new(Random::new(random.next())),
        }
    }

    pub(super) fn insert(&mut self, keys: &Keys, slot: Slot) {
        let new = match keys {
            Keys::One(key) => match self.keys.entry(key.clone()) {
                Entry::Occupied(mut slots) => slots.get_mut().insert(slot),
                Entry::Vacant(none) => none.insert(BTreeSet::new()).insert(slot),
            },
            Keys::Range(from, end) => self.ranges.insert(from, end, slot),
        };
        assert!(new, "a watcher is in an index once");
    }

    pub(super) fn remove(&mut self, keys: &Keys, slot: Slot) {
        let known = match keys {
            Keys::One(key) => match self.keys.entry(key.clone()) {
                Entry::Occupied(mut slots) => {
                    let known = slots.get_mut().remove(&slot);
                    if slots.get().is_empty() {
                        slots.remove();
                    }
                    known
                }
                Entry::Vacant(_) => false,
            },
            Keys::Range(from, end) => self.ranges.remove(from, end, slot),
        };
        assert!(known, "a watcher is removed from the index that has it");
    }

    /// Calls `visit` with every watcher that follows `key`, once.
    pub(super) fn matching(&self, key: &[u8], visit: &mut dyn FnMut(Slot)) {
        if let Some(slots) = self.keys.get(key) {
            slots.iter().copied().for_each(&mut *visit);
        }
        self.ranges.matching(self.ranges.root, key, visit);
    }

    pub(super) fn clear(&mut self) {
        self.keys.clear();
        self.ranges.clear();
    }
}

/// A treap by (start, end) in which each node knows the greatest end below it, so that a look-up
/// passes over subtrees that stop before the key. Equal ranges share a node.
#[derive(Debug)]
struct Ranges {
    nodes: Vec<Node>,
    free: Vec<u32>,
    root: u32,
    random: Random,
}

/// No node.
const NIL: u32 = u32::MAX;

#[derive(Debug)]
struct Node {
    from: Bytes,
    end: End,
    /// Never empty for a node of the tree.
    slots: BTreeSet<Slot>,
    /// A parent's is at least that of its children, which keeps the tree balanced in expectation.
    priority: u64,
    left: u32,
    right: u32,
    /// The node of this subtree with the greatest end.
    furthest: u32,
}

impl Ranges {
    fn new(random: Random) -> Self {
        Ranges { nodes: Vec::new(), free: Vec::new(), root: NIL, random }
    }

    fn clear(&mut self) {
        self.nodes.clear();
        self.free.clear();
        self.root = NIL;
    }

    fn node(&self, at: u32) -> &Node {
        &self.nodes[at as usize]
    }

    fn node_mut(&mut self, at: u32) -> &mut Node {
        &mut self.nodes[at as usize]
    }

    fn is_before(&self, at: u32, from: &Bytes, end: &End) -> bool {
        let node = self.node(at);
        (&node.from, &node.end) < (from, end)
    }

    fn find(&self, from: &Bytes, end: &End) -> u32 {
        let mut at = self.root;
        while at != NIL {
            let node = self.node(at);
            at = match (from, end).cmp(&(&node.from, &node.end)) {
                std::cmp::Ordering::Less => node.left,
                std::cmp::Ordering::Equal => return at,
                std::cmp::Ordering::Greater => node.right,
            };
        }
        NIL
    }

    /// Answers whether `slot` is new in the range.
    fn insert(&mut self, from: &Bytes, end: &End, slot: Slot) -> bool {
        let at = self.find(from, end);
        if at != NIL {
            return self.node_mut(at).slots.insert(slot);
        }
        let node = Node {
            from: from.clone(),
            end: end.clone(),
            slots: BTreeSet::from([slot]),
            priority: self.random.next(),
            left: NIL,
            right: NIL,
            furthest: NIL,
        };
        let at = match self.free.pop() {
            Some(at) => {
                self.nodes[at as usize] = node;
                at
            }
            None => {
                self.nodes.push(node);
                u32::try_from(self.nodes.len() - 1).expect("fewer ranges than watcher slots")
            }
        };
        self.node_mut(at).furthest = at;
        let (left, right) = self.split(self.root, from, end);
        let left = self.merge(left, at);
        self.root = self.merge(left, right);
        true
    }

    /// Answers whether `slot` was in the range.
    fn remove(&mut self, from: &Bytes, end: &End, slot: Slot) -> bool {
        let at = self.find(from, end);
        if at == NIL || !self.node_mut(at).slots.remove(&slot) {
            return false;
        }
        if self.node(at).slots.is_empty() {
            self.root = self.unlink(self.root, at);
            self.free.push(at);
        }
        true
    }

    /// The subtree `at` without the node `gone`.
    fn unlink(&mut self, at: u32, gone: u32) -> u32 {
        let (left, right) = (self.node(at).left, self.node(at).right);
        if at == gone {
            return self.merge(left, right);
        }
        let node = self.node(gone);
        if (&node.from, &node.end) < (&self.node(at).from, &self.node(at).end) {
            self.node_mut(at).left = self.unlink(left, gone);
        } else {
            self.node_mut(at).right = self.unlink(right, gone);
        }
        self.update(at);
        at
    }

    /// What is before the range, and the rest.
    fn split(&mut self, at: u32, from: &Bytes, end: &End) -> (u32, u32) {
        if at == NIL {
            return (NIL, NIL);
        }
        if self.is_before(at, from, end) {
            let (middle, rest) = self.split(self.node(at).right, from, end);
            self.node_mut(at).right = middle;
            self.update(at);
            (at, rest)
        } else {
            let (before, middle) = self.split(self.node(at).left, from, end);
            self.node_mut(at).left = middle;
            self.update(at);
            (before, at)
        }
    }

    /// One tree of two, of which all of `left` is before all of `right`.
    fn merge(&mut self, left: u32, right: u32) -> u32 {
        if left == NIL || right == NIL {
            return if left == NIL { right } else { left };
        }
        if self.node(left).priority >= self.node(right).priority {
            let below = self.merge(self.node(left).right, right);
            self.node_mut(left).right = below;
            self.update(left);
            left
        } else {
            let below = self.merge(left, self.node(right).left);
            self.node_mut(right).left = below;
            self.update(right);
            right
        }
    }

    fn update(&mut self, at: u32) {
        let mut furthest = at;
        for child in [self.node(at).left, self.node(at).right] {
            if child != NIL {
                let candidate = self.node(child).furthest;
                if self.node(candidate).end > self.node(furthest).end {
                    furthest = candidate;
                }
            }
        }
        self.node_mut(at).furthest = furthest;
    }

    fn matching(&self, at: u32, key: &[u8], visit: &mut dyn FnMut(Slot)) {
        if at == NIL || !self.node(self.node(at).furthest).end.is_above(key) {
            return;
        }
        let node = self.node(at);
        self.matching(node.left, key, visit);
        if &node.from[..] <= key {
            if node.end.is_above(key) {
                node.slots.iter().copied().for_each(&mut *visit);
            }
            self.matching(node.right, key, visit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(n: u64) -> Bytes {
        Bytes::from(format!("{n:02}"))
    }

    fn depth(ranges: &Ranges, at: u32) -> usize {
        if at == NIL {
            return 0;
        }
        1 + depth(ranges, ranges.node(at).left).max(depth(ranges, ranges.node(at).right))
    }

    #[test]
    fn finds_what_a_walk_over_all_watchers_finds() {
        for seed in 0..10 {
            let mut random = Random::new(seed);
            let mut index = Index::new(&mut random);
            let mut all: Vec<(Keys, Slot)> = Vec::new();
            for step in 0..3000u32 {
                if !all.is_empty() && random.below(5) < 2 {
                    let (keys, slot) = all.swap_remove(random.below(all.len() as u64) as usize);
                    index.remove(&keys, slot);
                } else {
                    let from = random.below(60);
                    let keys = match random.below(4) {
                        0 => Keys::One(bytes(from)),
                        1 => Keys::Range(bytes(from), End::Open),
                        _ => {
                            Keys::Range(bytes(from), End::Before(bytes(from + 1 + random.below(9))))
                        }
                    };
                    index.insert(&keys, step);
                    all.push((keys, step));
                }
                let key = bytes(random.below(60));
                let mut found = Vec::new();
                index.matching(&key, &mut |slot| found.push(slot));
                found.sort_unstable();
                let mut expect: Vec<Slot> = all
                    .iter()
                    .filter(|(keys, _)| match keys {
                        Keys::One(one) => *one == key,
                        Keys::Range(from, end) => *from <= key && *end > End::Before(key.clone()),
                    })
                    .map(|(_, slot)| *slot)
                    .collect();
                expect.sort_unstable();
                assert_eq!(found, expect, "seed {seed} step {step}");
            }
        }
    }

    #[test]
    fn the_tree_stays_shallow_when_ranges_come_in_order() {
        let mut ranges = Ranges::new(Random::new(1));
        for n in 0..20_000u32 {
            let from = Bytes::from(format!("/registry/{n:06}/"));
            let end = End::Before(Bytes::from(format!("/registry/{n:06}0")));
            ranges.insert(&from, &end, n);
        }
        assert!(depth(&ranges, ranges.root) < 60);
        let mut found = Vec::new();
        ranges.matching(ranges.root, b"/registry/000700/x", &mut |slot| found.push(slot));
        assert_eq!(found, [700]);
    }
}
