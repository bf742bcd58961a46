//! Looks for an order of the operations that explains their answers, and believes no revision.
//!
//! The search of Wing and Gong: take any operation that no other one has to precede, put it next if the
//! state gives its answer, go on from there; come back when nothing fits. With Lowe's memory: the same
//! operations done with the same state need not be tried twice. It decides every history; so that it
//! decides true ones at once, operations are tried in the order of hints. A wrong hint costs time, and
//! changes nothing in the result.

use std::collections::{BTreeMap, HashSet};

use super::{Answer, Call, Guard, Key, Operation, Outcome, Step, Time, Value, Violation};

/// Placements tried before the search is given up: far more than there are operations.
const STEPS_MAX: u64 = 5_000_000;

/// Every key group by itself; answers how many steps it took.
///
/// # Errors
/// The groups without an order.
pub fn check(operations: &[Operation], hints: &[u64]) -> Result<u64, Vec<Violation>> {
    let mut violations = Vec::new();
    let mut steps = 0;
    for (keys, members) in groups(operations) {
        match Search::new(operations, hints, &keys, &members).run() {
            Ok(taken) => steps += taken,
            Err(violation) => violations.push(violation),
        }
    }
    if violations.is_empty() { Ok(steps) } else { Err(violations) }
}

/// Keys that some call joins, with the operations on them. What never happened, and reads that may be
/// old or have no answer, are left out: they bind nothing.
fn groups(operations: &[Operation]) -> Vec<(Vec<Key>, Vec<usize>)> {
    let mut root: BTreeMap<Key, Key> = BTreeMap::new();
    fn find(root: &BTreeMap<Key, Key>, mut key: Key) -> Key {
        while root[&key] != key {
            key = root[&key];
        }
        key
    }
    let counts = |operation: &Operation| {
        let writes = operation.call.steps().any(|step| !matches!(step, Step::Get(_)));
        match operation.outcome {
            Outcome::Done(_) => !operation.call.serializable,
            Outcome::Unknown => writes,
            Outcome::Failed => false,
        }
    };
    for operation in operations.iter().filter(|operation| counts(operation)) {
        let mut first = None;
        for key in operation.call.keys() {
            root.entry(key).or_insert(key);
            let to = find(&root, key);
            let with = *first.get_or_insert(to);
            root.insert(to, find(&root, with));
        }
    }
    let mut found: BTreeMap<Key, (Vec<Key>, Vec<usize>)> = BTreeMap::new();
    for key in root.keys() {
        found.entry(find(&root, *key)).or_default().0.push(*key);
    }
    for (n, operation) in operations.iter().enumerate() {
        if counts(operation)
            && let Some(key) = operation.call.keys().next()
        {
            found.entry(find(&root, key)).or_default().1.push(n);
        }
    }
    found.into_values().collect()
}

/// The values of a group's keys, in the order of the keys.
type State = Vec<Option<Value>>;

struct Search<'a> {
    operations: Vec<&'a Operation>,
    hints: Vec<u64>,
    keys: &'a [Key],
    /// Operations not placed, as a list in the order of their calls: the next of each, by place + 1;
    /// 0 is the head.
    next: Vec<usize>,
    previous: Vec<usize>,
    /// Done ones that are not placed.
    open: usize,
}

/// A placed operation, and what else could have been placed there.
struct Placement {
    candidates: Vec<usize>,
    tried: usize,
    state: State,
    hash: u128,
}

impl<'a> Search<'a> {
    fn new(all: &'a [Operation], hints: &[u64], keys: &'a [Key], members: &[usize]) -> Self {
        let mut members = members.to_vec();
        members.sort_by_key(|n| all[*n].invoked);
        let operations: Vec<&Operation> = members.iter().map(|n| &all[*n]).collect();
        let n = operations.len();
        Search {
            hints: members.iter().map(|n| hints[*n]).collect(),
            keys,
            next: (1..=n + 1).collect(),
            previous: (0..=n + 1).map(|place| place.saturating_sub(1)).collect(),
            open: operations.iter().filter(|operation| operation.reply().is_some()).count(),
            operations,
        }
    }

    fn end(&self) -> usize {
        self.operations.len() + 1
    }

    /// Takes the operation at list place `place` out.
    fn unlink(&mut self, place: usize) {
        let (before, after) = (self.previous[place], self.next[place]);
        self.next[before] = after;
        self.previous[after] = before;
    }

    /// Puts it back; in the reverse order of taking out.
    fn relink(&mut self, place: usize) {
        let (before, after) = (self.previous[place], self.next[place]);
        self.next[before] = place;
        self.previous[after] = place;
    }

    /// What may come next: everything that began before any other one that is left was over.
    fn candidates(&self) -> Vec<usize> {
        let mut found = Vec::new();
        let mut over = Time::MAX;
        let mut place = self.next[0];
        while place != self.end() {
            let operation = self.operations[place - 1];
            if operation.invoked > over {
                break;
            }
            over = over.min(operation.returned);
            found.push(place);
            place = self.next[place];
        }
        found.sort_by_key(|place| self.hints[place - 1]);
        found
    }

    fn run(mut self) -> Result<u64, Violation> {
        let mut memory: HashSet<(u128, State)> = HashSet::new();
        let mut state: State = vec![None; self.keys.len()];
        let mut hash = 0;
        let mut stack: Vec<Placement> = Vec::new();
        let mut candidates = self.candidates();
        let mut tried = 0;
        let mut steps = 0;
        let mut best = (0, Vec::new());
        loop {
            if self.open == 0 {
                return Ok(steps);
            }
            if steps >= STEPS_MAX {
                return Err(Violation::Undecided { keys: self.keys.to_vec(), steps });
            }
            let mut placed = false;
            while let Some(&place) = candidates.get(tried) {
                tried += 1;
                steps += 1;
                let operation = self.operations[place - 1];
                let Some(after) = apply(operation, self.keys, &state) else { continue };
                let with = hash ^ mark(place);
                if !memory.insert((with, after.clone())) {
                    continue;
                }
                self.unlink(place);
                self.open -= usize::from(operation.reply().is_some());
                let before = std::mem::replace(&mut state, after);
                stack.push(Placement {
                    candidates: std::mem::take(&mut candidates),
                    tried,
                    state: before,
                    hash,
                });
                hash = with;
                placed = true;
                break;
            }
            if placed {
                candidates = self.candidates();
                tried = 0;
                continue;
            }
            if stack.len() >= best.0 {
                let stuck = |place: &usize| {
                    let operation = self.operations[place - 1];
                    operation.reply().is_some().then(|| format!("{operation}, state {state:?}"))
                };
                best = (stack.len(), candidates.iter().filter_map(stuck).take(5).collect());
            }
            let Some(placement) = stack.pop() else {
                let of = self.operations.len();
                let (placed, stuck) = best;
                return Err(Violation::NoOrder { keys: self.keys.to_vec(), placed, of, stuck });
            };
            let place = placement.candidates[placement.tried - 1];
            self.relink(place);
            self.open += usize::from(self.operations[place - 1].reply().is_some());
            Placement { candidates, tried, state, hash } = placement;
        }
    }
}

/// A set of operations is named by the exclusive or of 128 random bits for each: that two sets share a
/// name is no likelier than a broken memory, and could only hide an order, never feign one.
fn mark(place: usize) -> u128 {
    let mix = |seed: u64| {
        let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        u128::from(z ^ (z >> 31))
    };
    let place = place as u64;
    mix(2 * place) << 64 | mix(2 * place + 1)
}

/// The state after the operation, or nothing if it would have answered otherwise.
fn apply(operation: &Operation, keys: &[Key], state: &State) -> Option<State> {
    let at = |key: Key| keys.binary_search(&key).expect("the group has all keys of its operations");
    let call: &Call = &operation.call;
    let succeeded = call.when.iter().all(|guard| match *guard {
        Guard::Value(key, value) => state[at(key)] == Some(value),
        // A value stands for one revision only.
        Guard::Revision { key, value, .. } => state[at(key)] == value,
    });
    let reply = operation.reply();
    if reply.is_some_and(|reply| {
        reply.succeeded != succeeded || reply.answers.len() != call.branch(succeeded).len()
    }) {
        return None;
    }
    let mut after = state.clone();
    for (n, step) in call.branch(succeeded).iter().enumerate() {
        let slot = at(step.key());
        let answer = match *step {
            Step::Put(_, value) => {
                after[slot] = Some(value);
                Answer::Put
            }
            Step::Delete(_) => {
                let had = after[slot].take();
                Answer::Deleted(i64::from(had.is_some()))
            }
            Step::Get(_) => {
                // Only the value is judged here.
                let got = reply.map(|reply| reply.answers[n]);
                match got {
                    Some(Answer::Got(kv)) if kv.map(|kv| kv.value) == after[slot] => continue,
                    None => continue,
                    Some(_) => return None,
                }
            }
        };
        if reply.is_some_and(|reply| reply.answers[n] != answer) {
            return None;
        }
    }
    Some(after)
}
