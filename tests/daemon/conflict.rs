//! Two processes that want the same: the second is told who has it.

use crate::process::{Setup, runtime};

#[test]
fn a_second_process_on_the_same_directory_is_told_the_first() {
    let setup = Setup::new(&[]);
    let daemon = setup.start();
    let second = Setup::on(setup.data.clone(), &[]);
    let said = second.refused();
    assert_eq!(
        said,
        format!("data directory {} is in use by process {}", setup.data.display(), daemon.pid())
    );
    runtime().block_on(async { daemon.client().put("a", "1").await.unwrap() });
    daemon.stop();
    // It is free again, also after a death without goodbye.
    let daemon = second.start();
    daemon.kill();
    let daemon = second.start();
    runtime().block_on(async {
        assert_eq!(daemon.client().get("a").await.unwrap().unwrap().value, "1");
    });
    daemon.stop();
}

#[test]
fn a_second_process_on_the_same_port_is_told_the_address() {
    let setup = Setup::new(&[]);
    let daemon = setup.start();
    for (client, peer) in [(true, false), (false, true)] {
        let mut second = Setup::new(&[]);
        let taken = if client { setup.client } else { setup.peer };
        if client {
            second.client = taken;
        }
        if peer {
            second.peer = taken;
        }
        let said = second.refused();
        assert!(said.contains(&taken.to_string()), "{said}");
        assert!(said.to_lowercase().contains("address already in use"), "{said}");
        assert!(!second.wal_dir().exists(), "nothing is founded before the ports are had");
    }
    let metrics = format!("--listen-metrics-urls=http://{}", setup.client);
    let said = Setup::new(&[&metrics]).refused();
    assert!(said.contains(&setup.client.to_string()), "{said}");
    daemon.stop();
}

#[test]
fn a_first_start_checks_its_own_entry_before_it_touches_anything() {
    let mut setup = Setup::new(&["--initial-cluster=other=http://127.0.0.1:1"]);
    let said = setup.refused();
    assert_eq!(said, "couldn't find local name \"m\" in the initial cluster configuration");
    assert!(!setup.data.exists());

    setup.args = vec!["--initial-cluster=m=http://127.0.0.1:1".to_string()];
    let said = setup.refused();
    assert_eq!(
        said,
        format!(
            "--initial-cluster has m=http://127.0.0.1:1 but missing from \
             --initial-advertise-peer-urls=http://{}",
            setup.peer
        )
    );
    assert!(!setup.data.exists());

    // A member that has a log does not ask any more.
    setup.args.clear();
    setup.start().stop();
    setup.args = vec!["--initial-cluster=m=http://127.0.0.1:1".to_string()];
    setup.start().stop();
}
