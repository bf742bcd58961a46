//! What version the cluster runs at, and in which form that can be written to its log (operations 2.9,
//! formats-and-peers 5.3).

use super::membership::Version;

/// What a cluster runs at while not all of its members are known.
const LOWEST: Version = Version { major: 3, minor: 0, patch: 0 };
/// The first release that applies the requests of the v3 API about members and versions.
const FIRST_WITH_REQUESTS: Version = Version { major: 3, minor: 5, patch: 0 };

/// The version that the cluster is to be brought to, `servers` being what each member runs (`None` for
/// one that did not tell); `None` if it stays as it is.
///
/// A cluster without a version gets the lowest of its members', or 3.0 if one did not tell. A cluster
/// with one is only ever raised, and only if all have told.
pub fn decide(decided: Option<Version>, servers: &[Option<Version>]) -> Option<Version> {
    let all: Option<Vec<Version>> = servers.iter().copied().collect();
    let lowest = all.and_then(|versions| versions.into_iter().min());
    let lowest = lowest.map(|version| Version { patch: 0, ..version });
    match decided {
        None => Some(lowest.unwrap_or(LOWEST)),
        Some(decided) => lowest.filter(|lowest| *lowest > decided),
    }
}

/// Whether names, client URLs and versions must be written as requests of the v2 API: a member older
/// than 3.5 dies of the others, one from 3.7 on of these.
///
/// A cluster that has been decided to run at such a version may have such a member, even if it did not
/// tell now. 3.0 says nothing: every cluster whose members were not all there at first begins with it.
pub fn needs_v2(decided: Option<Version>, servers: &[Option<Version>]) -> bool {
    let old = |version: &Version| *version < FIRST_WITH_REQUESTS;
    let decided = decided.filter(|version| *version > LOWEST);
    decided.iter().chain(servers.iter().flatten()).any(old)
}

/// Whether the cluster's version rules out members that need requests of the v2 API.
pub fn settled(decided: Option<Version>) -> bool {
    decided >= Some(FIRST_WITH_REQUESTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(texts: &[&str]) -> Vec<Option<Version>> {
        // What is no version stands for a member that did not tell.
        texts.iter().map(|text| Version::parse(text)).collect()
    }

    #[test]
    fn the_cluster_runs_at_what_all_members_can_do() {
        for (decided, servers, expected) in [
            ("", &["3.7.1"][..], "3.7.0"),
            ("", &["3.7.1", "3.6.14", "3.7.0"], "3.6.0"),
            ("", &["3.7.1", "3.4.23"], "3.4.0"),
            ("", &["3.7.1", "?"], "3.0.0"),
            ("3.0.0", &["3.7.1", "3.4.23"], "3.4.0"),
            ("3.0.0", &["3.7.1", "?", "3.7.1"], ""),
            ("3.6.0", &["3.7.1", "3.7.1", "3.7.1"], "3.7.0"),
            ("3.6.0", &["3.7.1", "3.7.1", "3.6.2"], ""),
            ("3.6.0", &["3.7.1", "3.7.1", "?"], ""),
            ("3.7.0", &["3.7.1", "3.7.9"], ""),
            // Never lowered.
            ("3.6.0", &["3.7.1", "3.5.21"], ""),
        ] {
            let decision = decide(Version::parse(decided), &versions(servers));
            assert_eq!(decision, Version::parse(expected), "{decided:?} {servers:?}");
        }
    }

    #[test]
    fn the_log_holds_what_the_oldest_member_understands() {
        for (decided, servers, expected) in [
            ("", &["3.7.1"][..], false),
            ("", &["3.7.1", "3.4.23"], true),
            ("", &["3.7.1", "3.5.0"], false),
            ("", &["3.7.1", "?"], false),
            ("3.0.0", &["3.7.1", "?"], false),
            ("3.0.0", &["3.7.1", "?", "3.4.37"], true),
            ("3.4.0", &["3.7.1", "?"], true),
            ("3.7.0", &["3.7.1", "?"], false),
        ] {
            assert!(!settled(Version::parse(decided)) || decided == "3.7.0");
            let needed = needs_v2(Version::parse(decided), &versions(servers));
            assert_eq!(needed, expected, "{decided:?} {servers:?}");
        }
    }
}
