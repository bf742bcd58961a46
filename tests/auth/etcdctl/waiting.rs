//! Commands that go on: watches, and locks and elections whose holders come and go.

use quorate_proto::etcdserverpb as pb;

use super::{Pair, ROOT, WRONG, Way, Who, plain, user};
use crate::ctl::{Running, normal};
use crate::login::Session;
use crate::rig::wait_for;
use crate::server::{Member, kv, span};

/// One of a member that goes on.
fn running(pair: &Pair, member: &Member, who: Who, args: &[&str]) -> Running {
    Running::start(pair.command(member, who, args))
}

/// Its next lines.
fn lines(member: &Member, running: &mut Running, count: usize) -> String {
    plain(&normal(member, &running.lines(count).join("\n")))
}

/// How it ends.
fn end(member: &Member, running: Running) -> (String, String, Option<i32>) {
    let (rest, errors, code) = running.end();
    let plain = |text: &str| plain(&normal(member, text));
    (plain(&rest.join("\n")), plain(&errors), code)
}

pub async fn watches(way: Way) {
    let pair = Pair::secured(way).await;
    for key in ["r/1", "r/2", "s", "r/1"] {
        pair.compare(ROOT, &["put", key, key], "");
    }
    // Those that may go on; those that may not end by themselves.
    let allowed: &[(Who, &[&str], usize)] = &[
        (ROOT, &["watch", "--prefix", "", "--rev", "2"], 12),
        (user("reader"), &["watch", "--prefix", "r/", "--rev", "2", "--prev-kv"], 11),
        (user("reader"), &["watch", "r/1", "--rev", "2"], 6),
        (user("single"), &["watch", "s", "--rev", "2"], 3),
    ];
    for (who, args, count) in allowed {
        let [ours, theirs] = pair.members.each_ref().map(|member| {
            let mut watch = running(&pair, member, *who, args);
            let seen = lines(member, &mut watch, *count);
            watch.terminate();
            (seen, end(member, watch))
        });
        assert_eq!(ours, theirs, "{way:?}: {who:?}: etcdctl {args:?}");
    }
    let refused: &[(Who, &[&str])] = &[
        (user("reader"), &["watch", "--prefix", "r", "--rev", "1"]),
        (user("reader"), &["watch", "s"]),
        (user("writer"), &["watch", "w/1"]),
        (user("plain"), &["watch", "--prefix", ""]),
        (Who::Nobody, &["watch", "r/1"]),
    ];
    for (who, args) in refused {
        pair.compare(*who, args, "");
    }
    if way != Way::Certificate {
        pair.compare(WRONG, &["watch", "r/1"], "");
    }
}

pub async fn locks_and_elections(way: Way) {
    let pair = Pair::secured(way).await;
    let mut told = Vec::new();
    for member in &pair.members {
        let root = Session::of(member.api(), "root").await;
        let locks = told_of_locks(&pair, member, &root).await;
        told.push((locks, told_of_elections(&pair, member, &root).await));
    }
    assert_eq!(told[0], told[1], "{way:?}");
    let refused: &[(Who, &[&str])] = &[
        (user("both"), &["lock", "x/lock"]),
        (user("both"), &["lock", "x/lock", "echo", "held"]),
        (user("plain"), &["lock", "b/lock"]),
        (user("single"), &["elect", "b/office", "me"]),
        (user("plain"), &["elect", "b/office", "me"]),
        (user("plain"), &["elect", "-l", "b/office"]),
    ];
    for (who, args) in refused {
        pair.compare(*who, args, "");
    }
    if way != Way::Certificate {
        pair.compare(WRONG, &["lock", "b/lock"], "");
        pair.compare(WRONG, &["elect", "b/office", "me"], "");
    }
}

/// The leases of the keys below a name, once they are so many: of who holds or leads, and who waits.
async fn queue(root: &Session, name: &str, count: usize) -> Vec<i64> {
    let request = || root.ask(span(&format!("{name}/"), &format!("{name}0")));
    wait_for(&format!("{count} below {name}"), || async {
        let reply = root.api.kv.clone().range(request()).await;
        let kvs = reply.map_err(|error| error.to_string())?.into_inner().kvs;
        let leases: Vec<i64> = kvs.iter().map(|raw| kv(raw).lease).collect();
        if leases.len() == count { Ok(leases) } else { Err(format!("{leases:?}")) }
    })
    .await
}

/// What those print who hold a lock in turn, and how they end.
async fn told_of_locks(pair: &Pair, member: &Member, root: &Session) -> Vec<String> {
    let mut told = Vec::new();
    let mut holder = running(pair, member, user("both"), &["lock", "b/l", "--ttl", "7"]);
    told.push(lines(member, &mut holder, 1));
    let [lease] = queue(root, "b/l", 1).await[..] else { unreachable!("there is one") };
    let request = root.ask(pb::LeaseTimeToLiveRequest { id: lease, keys: false });
    let left = root.api.lease.clone().lease_time_to_live(request).await.unwrap().into_inner();
    assert_eq!(left.granted_ttl, 7, "{:?}", member.kind);

    // One that waits and leaves, one that waits and gets it.
    let leaving = running(pair, member, user("each"), &["lock", "b/l"]);
    queue(root, "b/l", 2).await;
    let mut behind = running(pair, member, ROOT, &["lock", "b/l", "echo", "held"]);
    queue(root, "b/l", 3).await;
    leaving.terminate();
    told.push(format!("{:?}", end(member, leaving)));
    queue(root, "b/l", 2).await;
    holder.terminate();
    told.push(format!("{:?}", end(member, holder)));
    told.push(lines(member, &mut behind, 1));
    told.push(format!("{:?}", end(member, behind)));
    queue(root, "b/l", 0).await;

    // Commands that are run while it is held, and know what they hold.
    for command in [&["false"][..], &["sh", "-c", "echo $ETCD_LOCK_KEY $ETCD_LOCK_REV; exit 3"]] {
        let args: Vec<&str> = ["lock", "b/l"].iter().chain(command).copied().collect();
        told.push(format!("{:?}", end(member, running(pair, member, user("both"), &args))));
        queue(root, "b/l", 0).await;
    }
    told
}

/// What candidates and who listens to them print, and how they end.
async fn told_of_elections(pair: &Pair, member: &Member, root: &Session) -> Vec<String> {
    let mut told = Vec::new();
    let mut first = running(pair, member, user("both"), &["elect", "b/e", "one"]);
    told.push(lines(member, &mut first, 2));
    let mut listener = running(pair, member, user("each"), &["elect", "-l", "b/e"]);
    told.push(lines(member, &mut listener, 2));
    let mut second = running(pair, member, ROOT, &["elect", "b/e", "two"]);
    queue(root, "b/e", 2).await;
    // It resigns.
    first.terminate();
    told.push(format!("{:?}", end(member, first)));
    told.push(lines(member, &mut second, 2));
    told.push(lines(member, &mut listener, 2));
    second.terminate();
    told.push(format!("{:?}", end(member, second)));
    queue(root, "b/e", 0).await;
    listener.terminate();
    told.push(format!("{:?}", end(member, listener)));
    told
}
