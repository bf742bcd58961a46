//! The judges judged: true histories pass, and each kind of lie is found.

use std::collections::BTreeMap;

use super::watch::{Log, Told};
use super::*;
use crate::rig::random::Random;

/// A store that does one thing at a time, and what its clients and watchers see of it.
#[derive(Default)]
struct Twin {
    keys: BTreeMap<Key, Kv>,
    revision: Revision,
    told: Vec<Told>,
    operations: Vec<Operation>,
}

impl Twin {
    fn new() -> Twin {
        Twin { revision: 1, ..Twin::default() }
    }

    fn run(&mut self, call: &Call, at: Time) -> Reply {
        let succeeded = call.when.iter().all(|guard| match *guard {
            Guard::Value(key, value) => self.keys.get(&key).is_some_and(|kv| kv.value == value),
            Guard::Revision { key, revision, .. } => {
                self.keys.get(&key).map_or(0, |kv| kv.modified) == revision
            }
        });
        let next = self.revision + 1;
        let mut events = Vec::new();
        let mut answers = Vec::new();
        for step in call.branch(succeeded) {
            let before = self.keys.get(&step.key()).copied();
            let key = Some(step.key());
            match *step {
                Step::Put(key_put, value) => {
                    let created = before.map_or(next, |kv| kv.created);
                    let version = before.map_or(1, |kv| kv.version + 1);
                    let now = Kv { value, created, modified: next, version };
                    self.keys.insert(key_put, now);
                    events.push((next, Change { key, now: Some(now), before }));
                    answers.push(Answer::Put);
                }
                Step::Delete(key_deleted) => {
                    if self.keys.remove(&key_deleted).is_some() {
                        events.push((next, Change { key, now: None, before }));
                    }
                    answers.push(Answer::Deleted(i64::from(before.is_some())));
                }
                Step::Get(_) => answers.push(Answer::Got(before)),
            }
        }
        if !events.is_empty() {
            self.revision = next;
            self.told.push(Told { received: at, events });
        }
        Reply { revision: self.revision, succeeded, answers }
    }

    /// Does a call between `invoked` and `returned`, and logs it.
    fn call(&mut self, call: Call, invoked: Time, returned: Time) -> Reply {
        let reply = self.run(&call, returned);
        let outcome = Outcome::Done(reply.clone());
        self.log(call, invoked, returned, outcome);
        reply
    }

    fn log(&mut self, call: Call, invoked: Time, returned: Time, outcome: Outcome) {
        let client = self.operations.len();
        self.operations.push(Operation { client, member: 0, invoked, returned, call, outcome });
    }

    fn logs(&self) -> Vec<Log> {
        (0..3).map(|member| Log { member, told: self.told.clone() }).collect()
    }

    fn check(&self) -> Result<Summary, Vec<Violation>> {
        super::check(&self.operations, &self.logs(), &[], self.revision)
    }

    /// What the search alone says.
    fn search(&self) -> Result<u64, Vec<Violation>> {
        search::check(&self.operations, &vec![0; self.operations.len()])
    }
}

fn put(key: Key, value: Value) -> Call {
    Call::plain(Step::Put(key, value))
}

fn get(key: Key) -> Call {
    Call::plain(Step::Get(key))
}

fn delete(key: Key) -> Call {
    Call::plain(Step::Delete(key))
}

/// A history of `n` calls at a time by ten clients: each happens at some moment of its span, a tenth
/// of the answers get lost, and half of those calls get lost as well.
fn random_history(seed: u64, n: usize) -> Twin {
    let mut random = Random::new(seed);
    let mut twin = Twin::new();
    // Each call has a span; what happens is ordered by a moment in it.
    let mut spans: Vec<(Time, Time, Time)> = Vec::new();
    let mut free = [0; 10];
    for _ in 0..n {
        let client = random.below(10) as usize;
        let invoked = free[client] + 1 + random.below(50);
        let returned = invoked + 1 + random.below(100);
        free[client] = returned;
        spans.push((invoked + random.below(returned - invoked), invoked, returned));
    }
    spans.sort_unstable();
    let mut seen: BTreeMap<Key, Kv> = BTreeMap::new();
    for (n, (moment, invoked, returned)) in spans.into_iter().enumerate() {
        let group = random.below(2) as Key * 3;
        let key = group + random.below(3) as Key;
        let value = n as Value + 1;
        let call = match random.below(6) {
            0 | 1 => put(key, value),
            2 => get(key),
            3 => delete(key),
            4 => {
                let known = seen.get(&key).copied();
                let guard = Guard::Revision {
                    key,
                    revision: known.map_or(0, |kv| kv.modified),
                    value: known.map(|kv| kv.value),
                };
                Call {
                    when: vec![guard],
                    then: vec![Step::Put(key, value)],
                    otherwise: vec![Step::Get(key)],
                    serializable: false,
                }
            }
            _ => Call {
                then: vec![Step::Put(group, value), Step::Delete(group + 1), Step::Get(group + 2)],
                ..Call::default()
            },
        };
        if random.percent(10) {
            if random.percent(50) {
                twin.run(&call, moment);
            }
            twin.log(call, invoked, Time::MAX, Outcome::Unknown);
            continue;
        }
        let reply = twin.run(&call, moment);
        for (step, answer) in call.branch(reply.succeeded).iter().zip(&reply.answers) {
            if let Answer::Got(kv) = answer {
                match kv {
                    Some(kv) => seen.insert(step.key(), *kv),
                    None => seen.remove(&step.key()),
                };
            }
        }
        twin.log(call, invoked, returned, Outcome::Done(reply));
    }
    twin
}

#[test]
fn true_histories_pass() {
    for seed in 0..20 {
        let twin = random_history(seed, 400);
        let summary = twin.check().unwrap_or_else(|found| panic!("seed {seed}: {found:?}"));
        assert_eq!(summary.operations, 400);
        assert!(summary.unknown > summary.happened && summary.happened > 0, "{summary:?}");
        // The hints are right, so hardly anything is tried in vain.
        assert!(summary.steps < 4000, "seed {seed}: {summary:?}");
    }
}

#[test]
fn the_search_needs_no_hints_for_a_short_history() {
    for seed in 0..20 {
        let mut twin = random_history(seed, 40);
        twin.search().unwrap_or_else(|found| panic!("seed {seed}: {found:?}"));
        // A value that is nobody's is found by it, too.
        let lie =
            twin.operations.iter_mut().rev().find_map(|operation| match &mut operation.outcome {
                Outcome::Done(reply) => reply.answers.iter_mut().find_map(|answer| match answer {
                    Answer::Got(Some(kv)) => Some(kv),
                    _ => None,
                }),
                _ => None,
            });
        let Some(lie) = lie else { continue };
        lie.value = 1_000_000;
        assert!(matches!(twin.search().unwrap_err()[..], [Violation::NoOrder { .. }]));
    }
}

#[test]
fn every_change_of_an_answer_is_found() {
    for seed in 0..10 {
        let honest = random_history(seed, 150);
        let mut random = Random::new(seed);
        for _ in 0..30 {
            let mut twin = random_history(seed, 150);
            let n = random.below(150) as usize;
            let Outcome::Done(reply) = &mut twin.operations[n].outcome else { continue };
            match random.below(3) {
                0 => reply.revision += 1,
                1 => reply.revision -= 1,
                _ => {
                    let at = random.below(reply.answers.len() as u64) as usize;
                    reply.answers[at] = match reply.answers[at] {
                        Answer::Put => continue,
                        Answer::Deleted(0) => Answer::Deleted(1),
                        // A delete without an answer may have been the one that did it.
                        Answer::Deleted(_) => continue,
                        Answer::Got(None) => {
                            Answer::Got(Some(Kv { value: 1, created: 2, modified: 2, version: 1 }))
                        }
                        Answer::Got(Some(_)) => Answer::Got(None),
                    };
                }
            }
            // A read may be true at a neighbouring revision as well.
            let told = &twin.operations[n];
            let reply = told.reply().unwrap();
            let reads = !reply.wrote() && !honest.operations[n].reply().unwrap().wrote();
            let same = reply.answers == honest.operations[n].reply().unwrap().answers;
            if reads && same {
                continue;
            }
            assert!(twin.check().is_err(), "seed {seed}: {told} passed");
        }
    }
}

#[test]
fn a_stale_read() {
    let mut twin = Twin::new();
    twin.call(put(1, 1), 0, 10);
    let stale = twin.call(get(1), 20, 30);
    twin.call(put(1, 2), 40, 50);
    assert!(twin.check().is_ok());
    // True at its revision, but that was over.
    twin.log(get(1), 60, 70, Outcome::Done(stale.clone()));
    assert!(matches!(twin.check().unwrap_err()[..], [Violation::Stale { known: 3, .. }]));
    assert!(matches!(twin.search().unwrap_err()[..], [Violation::NoOrder { .. }]));
    // A read that says that it may be stale is none.
    let serializable = Call { serializable: true, ..get(1) };
    twin.operations.pop();
    twin.log(serializable, 60, 70, Outcome::Done(stale.clone()));
    assert!(twin.check().is_ok());
    // Nor one that began before.
    twin.operations.pop();
    twin.log(get(1), 45, 70, Outcome::Done(stale));
    assert!(twin.check().is_ok());
}

#[test]
fn a_read_older_than_what_a_watcher_had_seen() {
    let mut twin = Twin::new();
    twin.call(put(1, 1), 0, 10);
    let stale = twin.call(get(1), 20, 30);
    twin.run(&put(1, 2), 50);
    twin.log(put(1, 2), 40, Time::MAX, Outcome::Unknown);
    twin.log(get(1), 60, 70, Outcome::Done(stale));
    assert!(matches!(twin.check().unwrap_err()[..], [Violation::Stale { known: 3, .. }]));
}

#[test]
fn a_lost_write() {
    let mut twin = Twin::new();
    twin.call(put(1, 1), 0, 10);
    let ghost = Reply { revision: 3, succeeded: true, answers: vec![Answer::Put] };
    twin.log(put(1, 2), 20, 30, Outcome::Done(ghost.clone()));
    assert!(matches!(twin.check().unwrap_err()[..], [Violation::Lost { .. }]));
    // Another one is at its revision.
    twin.call(put(1, 3), 40, 50);
    let found = twin.check().unwrap_err();
    assert!(matches!(found[..], [Violation::Lost { .. }, Violation::Stale { .. }]), "{found:?}");
    // The search sees it as soon as somebody reads.
    twin.operations.pop();
    let reply = Reply {
        revision: 3,
        succeeded: true,
        answers: vec![Answer::Got(Some(Kv { value: 1, created: 2, modified: 2, version: 1 }))],
    };
    twin.log(get(1), 60, 70, Outcome::Done(reply));
    assert!(matches!(twin.search().unwrap_err()[..], [Violation::NoOrder { .. }]));
}

#[test]
fn a_write_that_happened_twice() {
    let mut twin = Twin::new();
    twin.call(put(1, 1), 0, 10);
    twin.run(&put(1, 1), 20);
    assert!(matches!(twin.check().unwrap_err()[..], [Violation::Twice { revision: 3, .. }]));
    // The same for one without an answer.
    twin.operations[0].outcome = Outcome::Unknown;
    twin.operations[0].returned = Time::MAX;
    assert!(matches!(twin.check().unwrap_err()[..], [Violation::Twice { revision: 3, .. }]));
    // Two writers were told the same revision.
    let mut twin = Twin::new();
    let reply = twin.call(put(1, 1), 0, 10);
    twin.log(put(2, 2), 0, 10, Outcome::Done(reply));
    let found = twin.check().unwrap_err();
    assert!(found.iter().any(|one| matches!(one, Violation::Lost { .. })), "{found:?}");
}

#[test]
fn a_delete_that_happened_twice() {
    let mut twin = Twin::new();
    twin.call(put(1, 1), 0, 10);
    twin.run(&delete(1), 15);
    twin.log(delete(1), 12, Time::MAX, Outcome::Unknown);
    twin.call(put(1, 2), 20, 30);
    assert_eq!(twin.check().unwrap().happened, 1);
    twin.run(&delete(1), 40);
    assert!(matches!(twin.check().unwrap_err()[..], [Violation::Invented { revision: 5, .. }]));
    // A second one without an answer could have been it; the first cannot be both.
    twin.log(delete(1), 35, Time::MAX, Outcome::Unknown);
    assert_eq!(twin.check().unwrap().happened, 2);
    // But not one that was asked for after everybody knew.
    twin.operations.last_mut().unwrap().invoked = 45;
    assert!(matches!(twin.check().unwrap_err()[..], [Violation::Invented { revision: 5, .. }]));
}

#[test]
fn what_failed_or_was_never_asked_for_and_happened() {
    let mut twin = Twin::new();
    twin.run(&put(2, 1), 5);
    assert!(matches!(twin.check().unwrap_err()[..], [Violation::Invented { revision: 2, .. }]));
    twin.log(put(2, 1), 0, Time::MAX, Outcome::Failed);
    assert!(matches!(twin.check().unwrap_err()[..], [Violation::Invented { revision: 2, .. }]));
    // What is not of the workload is let be, its revision counts.
    twin.told[0].events[0].1.key = None;
    twin.operations.clear();
    twin.call(put(1, 1), 10, 20);
    assert!(twin.check().is_ok());
}

#[test]
fn a_write_without_an_answer_may_come_late_and_not_early() {
    let mut twin = Twin::new();
    twin.log(put(1, 7), 0, Time::MAX, Outcome::Unknown);
    twin.call(put(1, 1), 10, 20);
    twin.run(&put(1, 7), 1000);
    twin.call(get(1), 1010, 1020);
    assert!(twin.check().is_ok());
    assert!(twin.search().is_ok());
    // Read before it was asked for.
    twin.operations[0].invoked = 1030;
    let found = twin.check().unwrap_err();
    assert!(matches!(found[..], [Violation::Invented { revision: 3, .. }]), "{found:?}");
    assert!(twin.search().is_err());
}

#[test]
fn two_that_both_believe_their_comparison() {
    let swap = |value| Call {
        when: vec![Guard::Value(1, 1)],
        then: vec![Step::Put(1, value)],
        otherwise: vec![Step::Get(1)],
        serializable: false,
    };
    let mut twin = Twin::new();
    twin.call(put(1, 1), 0, 10);
    assert!(twin.call(swap(2), 20, 40).succeeded);
    assert!(!twin.call(swap(3), 25, 45).succeeded);
    assert!(twin.check().is_ok());
    twin.operations.pop();
    // The store did it against the comparison.
    twin.run(&put(1, 3), 45);
    let reply = Reply { revision: 4, succeeded: true, answers: vec![Answer::Put] };
    twin.log(swap(3), 25, 45, Outcome::Done(reply));
    assert!(matches!(twin.check().unwrap_err()[..], [Violation::Lost { .. }]));
    assert!(matches!(twin.search().unwrap_err()[..], [Violation::NoOrder { .. }]));
}

#[test]
fn writes_acknowledged_against_real_time() {
    let mut twin = Twin::new();
    twin.call(put(1, 1), 100, 110);
    twin.call(put(2, 2), 0, 10);
    // By revision key 1 was first, by the clock key 2.
    let found = twin.check().unwrap_err();
    assert!(matches!(found[..], [Violation::Stale { known: 3, .. }]), "{found:?}");
}

#[test]
fn watches() {
    let mut twin = Twin::new();
    for n in 0..6 {
        twin.call(put(1, n + 1), n * 10, n * 10 + 5);
    }
    let last = twin.revision;
    let honest = twin.logs();
    assert_eq!(watch::history(&honest, &[], last).unwrap().last(), last);
    let judge = |change: &dyn Fn(&mut Vec<Told>)| {
        let mut logs = honest.clone();
        change(&mut logs[1].told);
        watch::history(&logs, &[], last).unwrap_err()
    };
    let gap = judge(&|told| drop(told.remove(2)));
    assert_eq!(gap, [Violation::Gap { member: 1, after: 3, got: 5 }]);
    let first = judge(&|told| drop(told.remove(0)));
    assert_eq!(first, [Violation::Gap { member: 1, after: 1, got: 3 }]);
    let reordered = judge(&|told| told.swap(2, 3));
    assert_eq!(reordered, [Violation::Reordered { member: 1, after: 5, got: 4 }]);
    let repeated = judge(&|told| told.insert(3, told[2].clone()));
    assert_eq!(repeated, [Violation::Repeated { member: 1, revision: 4 }]);
    let doubled = judge(&|told| {
        let event = told[2].events[0];
        told[2].events.push(event);
    });
    assert_eq!(doubled, [Violation::Repeated { member: 1, revision: 4 }]);
    let short = judge(&|told| drop(told.pop()));
    assert_eq!(short, [Violation::Short { member: 1, at: 6, last: 7 }]);
    let other = judge(&|told| told[2].events[0].1.now.as_mut().unwrap().value = 77);
    assert!(matches!(other[..], [Violation::Disagree { revision: 4, members: (0, 1), .. }]));
    // A watch that was broken off need not tell all, and what it tells must be the same.
    let mut part = honest[2].clone();
    part.told.truncate(3);
    assert!(watch::history(&honest[..2], std::slice::from_ref(&part), last).is_ok());
    part.told[1].events[0].1.before = None;
    part.told[2].events[0].1.before = None;
    let found = watch::history(&honest[..2], &[part], last).unwrap_err();
    assert!(matches!(found[..], [Violation::Disagree { revision: 3, members: (0, 2), .. }]));
    // All tell the same lie about the version.
    let mut logs = honest.clone();
    for log in &mut logs {
        log.told[3].events[0].1.now.as_mut().unwrap().version = 9;
    }
    let found = watch::history(&logs, &[], last).unwrap_err();
    assert!(matches!(found[..], [Violation::Event { revision: 5, .. }]), "{found:?}");
    // Nothing at all is short as well.
    let found = watch::history(&[Log::default()], &[], 2).unwrap_err();
    assert_eq!(found, [Violation::Short { member: 0, at: 1, last: 2 }]);
}

#[test]
fn a_transaction_on_two_keys_is_seen_whole() {
    let both = Call { then: vec![Step::Put(1, 1), Step::Put(2, 2)], ..Call::default() };
    let mut twin = Twin::new();
    twin.call(both, 0, 10);
    let reads = Call { then: vec![Step::Get(1), Step::Get(2)], ..Call::default() };
    twin.call(reads.clone(), 20, 30);
    assert!(twin.check().is_ok());
    let Outcome::Done(reply) = &mut twin.operations[1].outcome else { unreachable!() };
    reply.answers[1] = Answer::Got(None);
    assert!(matches!(twin.check().unwrap_err()[..], [Violation::Wrong { .. }]));
    assert!(matches!(twin.search().unwrap_err()[..], [Violation::NoOrder { .. }]));
}
