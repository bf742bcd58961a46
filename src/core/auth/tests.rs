use engine_api::Op;
use quorate_proto::authpb::UserAddOptions;
use quorate_proto::authpb::permission::Type::{Read, Readwrite, Write};

use super::*;

const SALT: Salt = Salt { id: 1, index: 1 };
/// A hash as requests carry it; what it is the hash of does not matter here.
const HASH: &str = "aGFzaA==";

/// A store, and everything it has asked to be kept.
#[derive(Default)]
struct Rig {
    store: AuthStore,
    batch: Batch,
}

impl Rig {
    /// A change that is made: the revision counts it, or not, as `counts` says.
    fn make(
        &mut self,
        counts: bool,
        change: impl FnOnce(&mut AuthStore, &mut Batch) -> Result<(), AuthError>,
    ) {
        let (before, kept) = (self.store.clone(), self.batch.len());
        assert_eq!(change(&mut self.store, &mut self.batch), Ok(()));
        assert_eq!(self.store.revision(), before.revision() + u64::from(counts));
        if !counts {
            assert_eq!((&self.store, self.batch.len()), (&before, kept));
        }
    }

    /// A change that is refused, and leaves no trace.
    fn refuse(
        &mut self,
        error: AuthError,
        change: impl FnOnce(&mut AuthStore, &mut Batch) -> Result<(), AuthError>,
    ) {
        let (before, kept) = (self.store.clone(), self.batch.len());
        assert_eq!(change(&mut self.store, &mut self.batch), Err(error));
        assert_eq!((&self.store, self.batch.len()), (&before, kept));
    }

    fn with(users: &[&str], roles: &[&str]) -> Rig {
        let mut rig = Rig::default();
        for user in users {
            rig.make(true, |store, batch| store.user_add(&user_add(user), &SALT, batch));
        }
        for role in roles {
            rig.make(true, |store, batch| store.role_add(role, batch));
        }
        rig
    }

    fn enabled(mut self) -> Rig {
        self.store.enabled = true;
        self
    }

    /// The newest value that was kept under a key; `None` if it was deleted last.
    fn kept(&self, in_table: Table, under: &[u8]) -> Option<&[u8]> {
        let found = self.batch.ops.iter().rev().find(|op| {
            let (Op::Put { table, key, .. } | Op::Delete { table, key }) = op;
            *table == in_table && key == under
        });
        match found.expect("something was done to the key") {
            Op::Put { value, .. } => Some(value),
            Op::Delete { .. } => None,
        }
    }

    /// The store that comes out of what was kept.
    fn restored(&self) -> AuthStore {
        let mut rows = BTreeMap::new();
        for op in self.batch.ops.clone() {
            match op {
                Op::Put { table, key, value } => rows.insert((table, key), value),
                Op::Delete { table, key } => rows.remove(&(table, key)),
            };
        }
        let mut store = AuthStore::default();
        let (mut enabled, mut revision) = (false, 0);
        for ((table, key), value) in rows {
            match (table, &key[..]) {
                (Table::AuthUsers, _) => store.restore_user(&value).unwrap(),
                (Table::AuthRoles, _) => store.restore_role(&value).unwrap(),
                (Table::Auth, ENABLED) => enabled = value[..] == [1],
                (Table::Auth, REVISION) => {
                    revision = u64::from_be_bytes(value[..].try_into().unwrap());
                }
                other => panic!("{other:?}"),
            }
        }
        store.restore_state(enabled, revision);
        store
    }
}

fn user_add(name: &str) -> pb::AuthUserAddRequest {
    pb::AuthUserAddRequest { name: name.into(), hashed_password: HASH.into(), ..Default::default() }
}

fn change_password(name: &str, hash: &str) -> pb::AuthUserChangePasswordRequest {
    pb::AuthUserChangePasswordRequest {
        name: name.into(),
        hashed_password: hash.into(),
        ..Default::default()
    }
}

fn permission(kind: permission::Type, key: &str, range_end: &str) -> Permission {
    Permission {
        perm_type: kind as i32,
        key: key.to_string().into(),
        range_end: range_end.to_string().into(),
    }
}

fn grant(
    role: &str,
    kind: permission::Type,
    key: &str,
    range_end: &str,
) -> pb::AuthRoleGrantPermissionRequest {
    let perm = Some(permission(kind, key, range_end));
    pb::AuthRoleGrantPermissionRequest { name: role.into(), perm }
}

fn revoke(role: &str, key: &str, range_end: &str) -> pb::AuthRoleRevokePermissionRequest {
    pb::AuthRoleRevokePermissionRequest {
        role: role.into(),
        key: key.to_string().into(),
        range_end: range_end.to_string().into(),
    }
}

#[test]
fn users_come_and_go() {
    let mut rig = Rig::with(&["b", "a"], &[]);
    assert_eq!(rig.store.user_names(), ["a", "b"]);
    assert_eq!(rig.store.user_roles("a"), Ok(vec![]));
    assert_eq!(rig.store.user_roles("c"), Err(AuthError::UserNotFound));
    rig.refuse(AuthError::UserEmpty, |s, b| s.user_add(&user_add(""), &SALT, b));
    rig.refuse(AuthError::UserAlreadyExist, |s, b| s.user_add(&user_add("a"), &SALT, b));
    rig.refuse(AuthError::UserNotFound, |s, b| s.user_delete("c", b));
    rig.make(true, |s, b| s.user_delete("a", b));
    rig.refuse(AuthError::UserNotFound, |s, b| s.user_delete("a", b));
    assert_eq!(rig.store.user_names(), ["b"]);
    assert_eq!(rig.kept(Table::AuthUsers, b"a"), None);
    assert_eq!(rig.store.revision(), 4);
    assert_eq!(rig.kept(Table::Auth, REVISION), Some(&4u64.to_be_bytes()[..]));
    assert_eq!(rig.restored(), rig.store);
}

#[test]
fn the_bytes_of_a_user_are_those_of_etcd() {
    let mut rig = Rig::with(&["u"], &["r2", "r1"]);
    // Options are written even where nothing is chosen.
    assert_eq!(rig.kept(Table::AuthUsers, b"u"), Some(&b"\x0a\x01u\x12\x04hash\x22\x00"[..]));
    for role in ["r2", "r1"] {
        rig.make(true, |s, b| s.user_grant_role("u", role, b));
    }
    assert_eq!(
        rig.kept(Table::AuthUsers, b"u"),
        Some(&b"\x0a\x01u\x12\x04hash\x1a\x02r1\x1a\x02r2\x22\x00"[..])
    );
    let options = Some(UserAddOptions { no_password: true });
    let add = pb::AuthUserAddRequest { options, ..user_add("n") };
    rig.make(true, |s, b| s.user_add(&add, &SALT, b));
    assert_eq!(rig.kept(Table::AuthUsers, b"n"), Some(&b"\x0a\x01n\x22\x02\x08\x01"[..]));
    rig.make(true, |s, b| s.role_grant_permission(&grant("r1", Readwrite, "a", "b"), b));
    assert_eq!(
        rig.kept(Table::AuthRoles, b"r1"),
        Some(&b"\x0a\x02r1\x12\x08\x08\x02\x12\x01a\x1a\x01b"[..])
    );
    rig.make(true, |s, b| s.role_grant_permission(&grant("r2", Read, "a", ""), b));
    assert_eq!(rig.kept(Table::AuthRoles, b"r2"), Some(&b"\x0a\x02r2\x12\x03\x12\x01a"[..]));
}

#[test]
fn a_password_is_changed_where_there_is_one() {
    let mut rig = Rig::with(&["u"], &["r"]);
    rig.make(true, |s, b| s.user_grant_role("u", "r", b));
    rig.make(true, |s, b| s.user_change_password(&change_password("u", "bmV3"), &SALT, b));
    assert_eq!(
        rig.kept(Table::AuthUsers, b"u"),
        Some(&b"\x0a\x01u\x12\x03new\x1a\x01r\x22\x00"[..])
    );
    let unreadable = change_password("u", "no base64!");
    rig.refuse(AuthError::NoPasswordUser, |s, b| s.user_change_password(&unreadable, &SALT, b));
    let unknown = change_password("x", "bmV3");
    rig.refuse(AuthError::UserNotFound, |s, b| s.user_change_password(&unknown, &SALT, b));
    let unreadable = pb::AuthUserAddRequest { hashed_password: "!".into(), ..user_add("x") };
    rig.refuse(AuthError::NoPasswordUser, |s, b| s.user_add(&unreadable, &SALT, b));

    let options = Some(UserAddOptions { no_password: true });
    let add = pb::AuthUserAddRequest { options, ..user_add("n") };
    rig.make(true, |s, b| s.user_add(&add, &SALT, b));
    rig.make(true, |s, b| s.user_change_password(&change_password("n", "!"), &SALT, b));
    assert_eq!(rig.kept(Table::AuthUsers, b"n"), Some(&b"\x0a\x01n\x22\x02\x08\x01"[..]));
    assert_eq!(rig.restored(), rig.store);
}

#[test]
fn a_user_is_in_roles_that_exist_and_in_root() {
    let mut rig = Rig::with(&["u"], &["b", "a"]);
    rig.refuse(AuthError::UserNotFound, |s, b| s.user_grant_role("x", "missing", b));
    rig.refuse(AuthError::RoleNotFound, |s, b| s.user_grant_role("u", "missing", b));
    for role in ["root", "b", "a"] {
        rig.make(true, |s, b| s.user_grant_role("u", role, b));
    }
    rig.make(false, |s, b| s.user_grant_role("u", "root", b));
    assert_eq!(rig.store.user_roles("u").unwrap(), ["a", "b", "root"]);
    rig.refuse(AuthError::UserNotFound, |s, b| s.user_revoke_role("x", "a", b));
    rig.refuse(AuthError::RoleNotGranted, |s, b| s.user_revoke_role("u", "missing", b));
    rig.make(true, |s, b| s.user_revoke_role("u", "a", b));
    rig.refuse(AuthError::RoleNotGranted, |s, b| s.user_revoke_role("u", "a", b));
    assert_eq!(rig.store.user_roles("u").unwrap(), ["b", "root"]);
    assert_eq!(rig.restored(), rig.store);
}

#[test]
fn a_role_that_is_deleted_is_taken_from_all_users() {
    let mut rig = Rig::with(&["u", "v", "w"], &["a", "b"]);
    for (user, role) in [("u", "a"), ("u", "b"), ("v", "b"), ("w", "a")] {
        rig.make(true, |s, b| s.user_grant_role(user, role, b));
    }
    rig.refuse(AuthError::RoleEmpty, |s, b| s.role_add("", b));
    rig.refuse(AuthError::RoleAlreadyExist, |s, b| s.role_add("a", b));
    rig.refuse(AuthError::RoleNotFound, |s, b| s.role_delete("missing", b));
    // One change, however many users it reaches.
    rig.make(true, |s, b| s.role_delete("a", b));
    assert_eq!(rig.store.role_names(), ["b"]);
    assert_eq!(rig.kept(Table::AuthRoles, b"a"), None);
    let roles = ["u", "v", "w"].map(|user| rig.store.user_roles(user).unwrap().join(" "));
    assert_eq!(roles, ["b", "b", ""]);
    assert_eq!(rig.restored(), rig.store);
}

#[test]
fn permissions_are_for_ranges_that_hold_a_key() {
    let mut rig = Rig::with(&[], &["r"]);
    let none = pb::AuthRoleGrantPermissionRequest { name: "missing".into(), perm: None };
    rig.refuse(AuthError::PermissionNotGiven, |s, b| s.role_grant_permission(&none, b));
    for (key, range_end) in [("", ""), ("", "a"), ("", "\0"), ("b", "a"), ("b", "b")] {
        // Found out before the role is looked for.
        let grant = grant("missing", Read, key, range_end);
        rig.refuse(AuthError::InvalidManagement, |s, b| s.role_grant_permission(&grant, b));
    }
    let unknown = grant("missing", Read, "a", "");
    rig.refuse(AuthError::RoleNotFound, |s, b| s.role_grant_permission(&unknown, b));
    for (key, range_end) in [("a", ""), ("b", "c"), ("c", "\0"), ("\0", "\0"), ("\0", "")] {
        rig.make(true, |s, b| s.role_grant_permission(&grant("r", Read, key, range_end), b));
    }
    assert_eq!(rig.store.role_permissions("missing"), Err(AuthError::RoleNotFound));
    assert_eq!(
        rig.store.role_permissions("r").unwrap(),
        [("\0", "\0"), ("\0", ""), ("a", ""), ("b", "c"), ("c", "\0")]
            .map(|(key, range_end)| permission(Read, key, range_end))
    );
    assert_eq!(rig.restored(), rig.store);
}

#[test]
fn permissions_are_sorted_by_key_and_replaced_by_range() {
    let mut rig = Rig::with(&[], &["r"]);
    for (kind, key, range_end) in
        [(Read, "m", "n"), (Write, "a", ""), (Read, "z", ""), (Write, "m", "n"), (Read, "m", "")]
    {
        rig.make(true, |s, b| s.role_grant_permission(&grant("r", kind, key, range_end), b));
    }
    let expected = [
        permission(Write, "a", ""),
        permission(Write, "m", "n"),
        permission(Read, "m", ""),
        permission(Read, "z", ""),
    ];
    assert_eq!(rig.store.role_permissions("r").unwrap(), expected);
    // The same as before counts as a change.
    rig.make(true, |s, b| s.role_grant_permission(&grant("r", Write, "m", "n"), b));
    assert_eq!(rig.store.role_permissions("r").unwrap(), expected);
    // A range behind another one of the same key is not found again; taking it away takes both.
    rig.make(true, |s, b| s.role_grant_permission(&grant("r", Write, "m", ""), b));
    let held = rig.store.role_permissions("r").unwrap();
    assert_eq!(held[2..4], [permission(Read, "m", ""), permission(Write, "m", "")]);
    rig.make(true, |s, b| s.role_revoke_permission(&revoke("r", "m", ""), b));
    assert_eq!(rig.store.role_permissions("r").unwrap().len(), 3);

    rig.refuse(AuthError::RoleNotFound, |s, b| s.role_revoke_permission(&revoke("x", "m", ""), b));
    for (key, range_end) in [("m", ""), ("m", "o"), ("a", "b"), ("x", "")] {
        let revoke = revoke("r", key, range_end);
        rig.refuse(AuthError::PermissionNotGranted, |s, b| s.role_revoke_permission(&revoke, b));
    }
    rig.make(true, |s, b| s.role_revoke_permission(&revoke("r", "m", "n"), b));
    assert_eq!(
        rig.store.role_permissions("r").unwrap(),
        [permission(Write, "a", ""), permission(Read, "z", "")]
    );
    assert_eq!(rig.restored(), rig.store);
}

#[test]
fn role_root_permits_everything_once_it_is_there() {
    let mut rig = Rig::default();
    assert_eq!(rig.store.role_permissions(ROOT), Err(AuthError::RoleNotFound));
    rig.make(true, |s, b| s.role_add(ROOT, b));
    let everything = [permission(Readwrite, "", "\0")];
    assert_eq!(rig.store.role_permissions(ROOT).unwrap(), everything);
    rig.make(true, |s, b| s.role_grant_permission(&grant(ROOT, Read, "a", ""), b));
    assert_eq!(rig.store.role_permissions(ROOT).unwrap(), everything);
}

#[test]
fn a_root_in_its_role_is_needed_to_enable() {
    let mut rig = Rig::with(&["u"], &["root"]);
    rig.make(true, |s, b| s.user_grant_role("u", ROOT, b));
    assert_eq!(rig.store.check_enable(), Err(AuthError::RootUserNotExist));
    rig.make(true, |s, b| s.user_add(&user_add(ROOT), &SALT, b));
    assert_eq!(rig.store.check_enable(), Err(AuthError::RootRoleNotExist));
    rig.refuse(AuthError::RootRoleNotExist, |s, b| s.enable(b));
    rig.make(true, |s, b| s.user_grant_role(ROOT, ROOT, b));
    assert_eq!(rig.store.check_enable(), Ok(()));
    assert_eq!(rig.store.check_login("u"), Err(AuthError::NotEnabled));
    let revision = rig.store.revision();
    rig.store.enable(&mut rig.batch).unwrap();
    assert_eq!((rig.store.enabled(), rig.store.revision()), (true, revision));
    assert_eq!(rig.kept(Table::Auth, ENABLED), Some(&[1][..]));
    assert_eq!(rig.restored(), rig.store);
    rig.make(false, |s, b| s.enable(b));
}

#[test]
fn root_stays_while_authentication_is_on() {
    let mut rig = Rig::with(&["root", "u"], &["root"]).enabled();
    for user in ["root", "u"] {
        rig.make(true, |s, b| s.user_grant_role(user, ROOT, b));
    }
    rig.refuse(AuthError::InvalidManagement, |s, b| s.user_delete(ROOT, b));
    rig.refuse(AuthError::InvalidManagement, |s, b| s.user_revoke_role(ROOT, ROOT, b));
    rig.refuse(AuthError::InvalidManagement, |s, b| s.role_delete(ROOT, b));
    rig.make(true, |s, b| s.user_revoke_role("u", ROOT, b));
    let disable = |store: &mut AuthStore, batch: &mut Batch| {
        store.disable(batch);
        Ok(())
    };
    rig.make(true, disable);
    assert_eq!(rig.kept(Table::Auth, ENABLED), Some(&[0][..]));
    rig.make(false, disable);
    assert_eq!(rig.restored(), rig.store);
    rig.make(true, |s, b| s.role_delete(ROOT, b));
    rig.make(true, |s, b| s.user_delete(ROOT, b));
}

#[test]
fn a_user_that_a_release_without_options_left_has_a_password() {
    let mut rig = Rig::default();
    rig.store.restore_user(b"\x0a\x01u\x12\x03old").unwrap();
    rig.make(true, |s, b| s.user_change_password(&change_password("u", "bmV3"), &SALT, b));
    assert_eq!(rig.kept(Table::AuthUsers, b"u"), Some(&b"\x0a\x01u\x12\x03new"[..]));
    assert!(rig.store.restore_user(b"\x0a\x01\xff").is_err());
    assert!(rig.store.restore_role(b"\x0a\x05r").is_err());
}
