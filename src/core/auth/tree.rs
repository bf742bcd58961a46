//! The answer that etcd gives where ranges make no sense.
//!
//! etcd keeps permissions in a tree of intervals, and finds in it what a range asks for. That is right as
//! long as each range begins before it ends. For others the search leaves branches out, and what it
//! misses depends on how the tree has grown. A transaction may name such a range, as may a permission of
//! a release that did not look; whether the transaction is executed must not differ between members. So
//! the same tree is grown here: that of the textbooks, red-black, with the greatest end below each node.

use std::cmp::Ordering;

use bytes::Bytes;

/// No node.
const NIL: u32 = u32::MAX;

/// Compares where ranges begin or end; an empty one is beyond all keys.
fn compare(a: &[u8], b: &[u8]) -> Ordering {
    match (a.is_empty(), b.is_empty()) {
        (false, false) => a.cmp(b),
        (a_is_last, b_is_last) => a_is_last.cmp(&b_is_last),
    }
}

/// An interval from the first up to, but not with, the second.
type Interval<'a> = (&'a [u8], &'a [u8]);

/// Where an interval is, seen from another one; `Equal` where they overlap.
fn place(a: Interval<'_>, b: Interval<'_>) -> Ordering {
    if compare(a.0, b.0).is_lt() && compare(a.1, b.0).is_le() {
        Ordering::Less
    } else if compare(a.0, b.1).is_ge() {
        Ordering::Greater
    } else {
        Ordering::Equal
    }
}

#[derive(Clone, PartialEq, Debug)]
struct Node {
    begin: Bytes,
    end: Bytes,
    /// The greatest end of this node and all below it.
    max: Bytes,
    parent: u32,
    left: u32,
    right: u32,
    red: bool,
}

impl Node {
    fn interval(&self) -> Interval<'_> {
        (&self.begin, &self.end)
    }
}

#[derive(Clone, PartialEq, Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    root: u32,
}

impl Default for Tree {
    fn default() -> Self {
        Tree { nodes: Vec::new(), root: NIL }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Side {
    Left,
    Right,
}

impl Side {
    fn other(self) -> Side {
        if self == Side::Left { Side::Right } else { Side::Left }
    }
}

impl Tree {
    fn node(&self, at: u32) -> &Node {
        &self.nodes[at as usize]
    }

    fn node_mut(&mut self, at: u32) -> &mut Node {
        &mut self.nodes[at as usize]
    }

    fn child(&self, of: u32, side: Side) -> u32 {
        match side {
            Side::Left => self.node(of).left,
            Side::Right => self.node(of).right,
        }
    }

    fn set_child(&mut self, of: u32, side: Side, child: u32) {
        match side {
            Side::Left => self.node_mut(of).left = child,
            Side::Right => self.node_mut(of).right = child,
        }
    }

    fn side_of(&self, child: u32, parent: u32) -> Side {
        if self.node(parent).left == child { Side::Left } else { Side::Right }
    }

    fn is_red(&self, at: u32) -> bool {
        at != NIL && self.node(at).red
    }

    /// Adds an interval; an empty end is beyond all keys.
    pub fn insert(&mut self, begin: Bytes, end: Bytes) {
        let added = self.nodes.len() as u32;
        let (mut parent, mut side, mut next) = (NIL, Side::Left, self.root);
        while next != NIL {
            parent = next;
            let other = self.node(next);
            let order = compare(&begin, &other.begin).then_with(|| compare(&end, &other.end));
            side = if order.is_lt() { Side::Left } else { Side::Right };
            next = self.child(next, side);
        }
        let max = end.clone();
        self.nodes.push(Node { begin, end, max, parent, left: NIL, right: NIL, red: true });
        if parent == NIL {
            self.root = added;
        } else {
            self.set_child(parent, side, added);
            self.update_max(parent);
        }
        self.balance(added);
    }

    /// After `at` was added or has changed its colour to red.
    fn balance(&mut self, mut at: u32) {
        loop {
            let parent = self.node(at).parent;
            if !self.is_red(parent) {
                break;
            }
            // A red node is not the root.
            let above = self.node(parent).parent;
            let side = self.side_of(parent, above);
            let uncle = self.child(above, side.other());
            if self.is_red(uncle) {
                self.node_mut(uncle).red = false;
                self.node_mut(parent).red = false;
                self.node_mut(above).red = true;
                at = above;
                continue;
            }
            if at == self.child(parent, side.other()) {
                at = parent;
                self.rotate(at, side);
            }
            let parent = self.node(at).parent;
            self.node_mut(parent).red = false;
            let above = self.node(parent).parent;
            self.node_mut(above).red = true;
            self.rotate(above, side.other());
        }
        let root = self.root;
        self.node_mut(root).red = false;
    }

    /// Moves `at` down to `side`; its child on the other side takes its place.
    fn rotate(&mut self, at: u32, side: Side) {
        let up = self.child(at, side.other());
        if up == NIL {
            return;
        }
        let between = self.child(up, side);
        self.set_child(at, side.other(), between);
        if between != NIL {
            self.node_mut(between).parent = at;
        }
        self.update_max(at);
        let above = self.node(at).parent;
        self.node_mut(up).parent = above;
        if above == NIL {
            self.root = up;
        } else {
            let place = self.side_of(at, above);
            self.set_child(above, place, up);
            self.update_max(above);
        }
        self.node_mut(at).parent = up;
        self.set_child(up, side, at);
        self.update_max(up);
    }

    /// Sets the greatest end of `at` and of those above it, up to the first that does not change.
    fn update_max(&mut self, mut at: u32) {
        while at != NIL {
            let node = self.node(at);
            let mut max = &node.end;
            for child in [node.left, node.right] {
                if child != NIL && compare(&self.node(child).max, max).is_gt() {
                    max = &self.node(child).max;
                }
            }
            if compare(&node.max, max).is_eq() {
                break;
            }
            let (max, parent) = (max.clone(), node.parent);
            self.node_mut(at).max = max;
            at = parent;
        }
    }

    /// Whether intervals are found that cover another one together; an empty end is beyond all keys.
    pub fn cover(&self, begin: &[u8], end: &[u8]) -> bool {
        let mut found = None;
        let whole = self.visit(self.root, (begin, end), &mut found);
        found.is_some_and(|(first, last)| {
            whole && compare(last, end).is_ge() && compare(first, begin).is_le()
        })
    }

    /// Joins what is found to `found`; answers false if there is a gap. Goes no deeper than the tree, which
    /// is balanced.
    fn visit<'a>(&'a self, at: u32, asked: Interval<'_>, found: &mut Option<Interval<'a>>) -> bool {
        if at == NIL {
            return true;
        }
        let node = self.node(at);
        match place(asked, node.interval()) {
            Ordering::Less => self.visit(node.left, asked, found),
            Ordering::Greater => {
                place((&node.begin, &node.max), asked).is_ne()
                    || (self.visit(node.left, asked, found) && self.visit(node.right, asked, found))
            }
            Ordering::Equal => {
                self.visit(node.left, asked, found)
                    && join(found, node.interval())
                    && self.visit(node.right, asked, found)
            }
        }
    }
}

/// Answers false if there is a gap before `next`.
fn join<'a>(found: &mut Option<Interval<'a>>, next: Interval<'a>) -> bool {
    match found {
        None => *found = Some(next),
        Some((_, last)) if compare(last, next.0).is_lt() => return false,
        Some((_, last)) if compare(next.1, last).is_gt() => *last = next.1,
        Some(_) => {}
    }
    true
}
