//! Users, roles and what roles permit, as the log makes them (v3-api 3.12).
//!
//! They can be prepared while authentication is off, which is how a cluster gets ready to switch it on.
//! Each change counts the auth revision up by one and leaves the revision of the keys alone.
//!
//! What a user may do follows from all its roles; it is kept ready for each user, so that a check costs
//! one look-up. [`access`] decides who may do what.
//!
//! **Invariant**: a change is checked whole before anything of it is done, so a refused request leaves
//! neither the store nor the batch changed.

pub mod access;
pub mod password;
mod ranges;
mod tree;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use engine_api::{Batch, Table};
use prost::Message;
use quorate_proto::authpb::{Permission, Role, User, permission};
use quorate_proto::etcdserverpb as pb;

use rustc_hash::FxBuildHasher;

use password::Salt;
use ranges::Permitted;

/// The user and the role that may do anything. Authentication cannot be switched on without this user
/// in this role.
pub const ROOT: &str = "root";

/// Keys of the `auth` bucket (formats-and-peers 3).
pub const ENABLED: &[u8] = b"authEnabled";
pub const REVISION: &[u8] = b"authRevision";

/// A range end that stands for the end of all keys.
const OPEN_END: &[u8] = b"\0";

/// Why a request about users and roles is refused.
#[derive(thiserror::Error, Clone, Copy, PartialEq, Eq, Debug)]
pub enum AuthError {
    #[error("authentication is not enabled")]
    NotEnabled,
    #[error("user root does not exist")]
    RootUserNotExist,
    #[error("user root does not have role root")]
    RootRoleNotExist,
    #[error("user name is empty")]
    UserEmpty,
    #[error("user exists already")]
    UserAlreadyExist,
    #[error("user does not exist")]
    UserNotFound,
    /// Also what etcd says where a hash in the log is not the text that it should be.
    #[error("user cannot have this password")]
    NoPasswordUser,
    #[error("role name is empty")]
    RoleEmpty,
    #[error("role exists already")]
    RoleAlreadyExist,
    #[error("role does not exist")]
    RoleNotFound,
    #[error("role is not granted to the user")]
    RoleNotGranted,
    #[error("no permission is given")]
    PermissionNotGiven,
    #[error("permission is not granted to the role")]
    PermissionNotGranted,
    /// No such user, or not with this password: which of them is not told.
    #[error("user name or password is wrong")]
    AuthFailed,
    #[error("permission is denied")]
    PermissionDenied,
    /// Users or roles have changed since the credential was looked at.
    #[error("the credential is older than the last change of users and roles")]
    OldRevision,
    /// Authentication would be left without its root, or a permission is for no key.
    #[error("change of users or roles is not allowed")]
    InvalidManagement,
}

/// All users and roles.
#[derive(Clone, PartialEq, Debug)]
pub struct AuthStore {
    enabled: bool,
    revision: u64,
    users: BTreeMap<String, User>,
    roles: BTreeMap<String, Role>,
    /// Of every user: follows from users and roles.
    permitted: HashMap<String, Arc<Permitted>, FxBuildHasher>,
}

impl Default for AuthStore {
    fn default() -> Self {
        AuthStore {
            enabled: false,
            revision: 1,
            users: BTreeMap::new(),
            roles: BTreeMap::new(),
            permitted: HashMap::default(),
        }
    }
}

impl AuthStore {
    /// Whether requests need a user.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Begins at 1.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Takes over what the `auth` bucket says, after all users and roles. A revision of 0 stands for one
    /// never written.
    pub fn restore_state(&mut self, enabled: bool, revision: u64) {
        self.enabled = enabled;
        self.revision = revision.max(1);
        self.merge_all(|_| true);
    }

    /// Adds a user read from the bucket.
    ///
    /// # Errors
    /// If the value is not a `User`, or its name not text.
    pub fn restore_user(&mut self, value: &[u8]) -> Result<(), String> {
        let user = User::decode(value).map_err(|error| error.to_string())?;
        self.users.insert(name(&user.name)?, user);
        Ok(())
    }

    /// Adds a role read from the bucket.
    ///
    /// # Errors
    /// If the value is not a `Role`, or its name not text.
    pub fn restore_role(&mut self, value: &[u8]) -> Result<(), String> {
        let role = Role::decode(value).map_err(|error| error.to_string())?;
        self.roles.insert(name(&role.name)?, role);
        Ok(())
    }

    /// Whether authentication can be switched on: user root must be there and have role root.
    ///
    /// # Errors
    /// `RootUserNotExist`, `RootRoleNotExist`.
    pub fn check_enable(&self) -> Result<(), AuthError> {
        let root = self.users.get(ROOT).ok_or(AuthError::RootUserNotExist)?;
        if !root.roles.iter().any(|role| role == ROOT) {
            return Err(AuthError::RootRoleNotExist);
        }
        Ok(())
    }

    /// Switches authentication on; nothing happens if it is on. No revision is counted.
    ///
    /// # Errors
    /// `RootUserNotExist`, `RootRoleNotExist`.
    pub fn enable(&mut self, batch: &mut Batch) -> Result<(), AuthError> {
        if !self.enabled {
            self.check_enable()?;
            self.enabled = true;
            batch.put(Table::Auth, ENABLED, &[1][..]);
        }
        Ok(())
    }

    /// Switches authentication off; answers false if it is off already.
    pub fn disable(&mut self, batch: &mut Batch) -> bool {
        let disabled = std::mem::take(&mut self.enabled);
        if disabled {
            batch.put(Table::Auth, ENABLED, &[0][..]);
            self.count_up(batch);
        }
        disabled
    }

    /// Whether a user may be given a token. Its password was checked before that was proposed.
    ///
    /// # Errors
    /// `NotEnabled`, `AuthFailed`.
    pub fn check_login(&self, user: &str) -> Result<(), AuthError> {
        if !self.enabled {
            return Err(AuthError::NotEnabled);
        }
        match self.users.get(user) {
            Some(user) if !has_no_password(user) => Ok(()),
            _ => Err(AuthError::AuthFailed),
        }
    }

    /// What a password given by `user` is to be compared with: the text of a hash.
    ///
    /// # Errors
    /// `NotEnabled`, `AuthFailed` for an unknown user, `NoPasswordUser`.
    pub fn password_of(&self, user: &str) -> Result<&Bytes, AuthError> {
        if !self.enabled {
            return Err(AuthError::NotEnabled);
        }
        match self.users.get(user) {
            None => Err(AuthError::AuthFailed),
            Some(user) if has_no_password(user) => Err(AuthError::NoPasswordUser),
            Some(user) => Ok(&user.password),
        }
    }

    /// Whether tokens that `user` was given under this store are good under another one, of which it is
    /// not known how it came about: those of a user that is gone or has another password are not.
    pub fn tokens_last(&self, user: &str, under: &AuthStore) -> bool {
        let password = |store: &AuthStore| store.users.get(user).map(|user| user.password.clone());
        under.enabled && password(self).is_some_and(|old| password(under) == Some(old))
    }

    /// Adds a user. A password in the clear, as members before 3.5 propose it, is hashed with `salt`.
    ///
    /// # Errors
    /// `UserEmpty`, `UserAlreadyExist`, `NoPasswordUser`.
    pub fn user_add(
        &mut self,
        request: &pb::AuthUserAddRequest,
        salt: &Salt,
        batch: &mut Batch,
    ) -> Result<(), AuthError> {
        if request.name.is_empty() {
            return Err(AuthError::UserEmpty);
        }
        if self.users.contains_key(&request.name) {
            return Err(AuthError::UserAlreadyExist);
        }
        // Stored even if nothing is chosen: etcd looks into it without asking whether it is there.
        let options = request.options.unwrap_or_default();
        let password = if options.no_password {
            Bytes::new()
        } else {
            password::chosen(&request.password, &request.hashed_password, salt)?
        };
        let user = User {
            name: request.name.clone().into(),
            password,
            roles: Vec::new(),
            options: Some(options),
        };
        self.put_user(&request.name, user, batch);
        self.count_up(batch);
        Ok(())
    }

    /// Removes a user.
    ///
    /// # Errors
    /// `InvalidManagement`, `UserNotFound`.
    pub fn user_delete(&mut self, user: &str, batch: &mut Batch) -> Result<(), AuthError> {
        if self.enabled && user == ROOT {
            return Err(AuthError::InvalidManagement);
        }
        self.users.remove(user).ok_or(AuthError::UserNotFound)?;
        self.permitted.remove(user);
        batch.delete(Table::AuthUsers, user.to_string());
        self.count_up(batch);
        Ok(())
    }

    /// Gives a user another password. One that has none keeps having none; that counts as a change.
    ///
    /// # Errors
    /// `UserNotFound`, `NoPasswordUser`.
    pub fn user_change_password(
        &mut self,
        request: &pb::AuthUserChangePasswordRequest,
        salt: &Salt,
        batch: &mut Batch,
    ) -> Result<(), AuthError> {
        let mut user = self.user(&request.name)?.clone();
        user.password = if has_no_password(&user) {
            Bytes::new()
        } else {
            password::chosen(&request.password, &request.hashed_password, salt)?
        };
        self.put_user(&request.name, user, batch);
        self.count_up(batch);
        Ok(())
    }

    /// Puts a user into a role; nothing happens if it is in it. Role root need not have been added.
    ///
    /// # Errors
    /// `UserNotFound`, `RoleNotFound`.
    pub fn user_grant_role(
        &mut self,
        user: &str,
        role: &str,
        batch: &mut Batch,
    ) -> Result<(), AuthError> {
        let mut changed = self.user(user)?.clone();
        if role != ROOT {
            self.role(role)?;
        }
        let Err(at) = changed.roles.binary_search_by(|held| held.as_str().cmp(role)) else {
            return Ok(());
        };
        changed.roles.insert(at, role.to_string());
        self.put_user(user, changed, batch);
        self.count_up(batch);
        Ok(())
    }

    /// Takes a role from a user.
    ///
    /// # Errors
    /// `InvalidManagement`, `UserNotFound`, `RoleNotGranted`.
    pub fn user_revoke_role(
        &mut self,
        user: &str,
        role: &str,
        batch: &mut Batch,
    ) -> Result<(), AuthError> {
        if self.enabled && user == ROOT && role == ROOT {
            return Err(AuthError::InvalidManagement);
        }
        let changed = without_role(self.user(user)?, role).ok_or(AuthError::RoleNotGranted)?;
        self.put_user(user, changed, batch);
        self.count_up(batch);
        Ok(())
    }

    /// The roles of a user, in order.
    ///
    /// # Errors
    /// `UserNotFound`.
    pub fn user_roles(&self, user: &str) -> Result<Vec<String>, AuthError> {
        Ok(self.user(user)?.roles.clone())
    }

    /// The names of all users, in order.
    pub fn user_names(&self) -> Vec<String> {
        self.users.keys().cloned().collect()
    }

    /// Adds a role that permits nothing.
    ///
    /// # Errors
    /// `RoleEmpty`, `RoleAlreadyExist`.
    pub fn role_add(&mut self, role: &str, batch: &mut Batch) -> Result<(), AuthError> {
        if role.is_empty() {
            return Err(AuthError::RoleEmpty);
        }
        if self.roles.contains_key(role) {
            return Err(AuthError::RoleAlreadyExist);
        }
        let added = Role { name: role.to_string().into(), key_permission: Vec::new() };
        self.put_role(role, added, batch);
        self.count_up(batch);
        Ok(())
    }

    /// Removes a role, and takes it from all users.
    ///
    /// # Errors
    /// `InvalidManagement`, `RoleNotFound`.
    pub fn role_delete(&mut self, role: &str, batch: &mut Batch) -> Result<(), AuthError> {
        if self.enabled && role == ROOT {
            return Err(AuthError::InvalidManagement);
        }
        self.roles.remove(role).ok_or(AuthError::RoleNotFound)?;
        batch.delete(Table::AuthRoles, role.to_string());
        let holders = self.users.iter();
        let changed: Vec<(String, User)> = holders
            .filter_map(|(name, user)| Some((name.clone(), without_role(user, role)?)))
            .collect();
        for (name, user) in changed {
            self.put_user(&name, user, batch);
        }
        self.count_up(batch);
        Ok(())
    }

    /// What a role permits, by key. Role root permits everything, whatever it was granted.
    ///
    /// # Errors
    /// `RoleNotFound`.
    pub fn role_permissions(&self, role: &str) -> Result<Vec<Permission>, AuthError> {
        let found = self.role(role)?;
        if role == ROOT {
            return Ok(vec![Permission {
                perm_type: permission::Type::Readwrite as i32,
                key: Bytes::new(),
                range_end: OPEN_END.into(),
            }]);
        }
        Ok(found.key_permission.clone())
    }

    /// The names of all roles, in order.
    pub fn role_names(&self) -> Vec<String> {
        self.roles.keys().cloned().collect()
    }

    /// Lets a role read, write or both in a range of keys; changes which, if the range is permitted.
    ///
    /// # Errors
    /// `PermissionNotGiven`, `InvalidManagement`, `RoleNotFound`.
    pub fn role_grant_permission(
        &mut self,
        request: &pb::AuthRoleGrantPermissionRequest,
        batch: &mut Batch,
    ) -> Result<(), AuthError> {
        let given = request.perm.as_ref().ok_or(AuthError::PermissionNotGiven)?;
        if !permits_a_key(&given.key, &given.range_end) {
            return Err(AuthError::InvalidManagement);
        }
        let mut role = self.role(&request.name)?.clone();
        let held = &mut role.key_permission;
        // Of several ranges with this key etcd compares the first alone: a range that comes later is
        // added once more. What members store must not differ, so it is the same here.
        let first = held.partition_point(|held| held.key < given.key);
        match held.get_mut(first) {
            Some(same) if same.key == given.key && same.range_end == given.range_end => {
                same.perm_type = given.perm_type;
            }
            _ => {
                let after = held.partition_point(|held| held.key <= given.key);
                held.insert(after, given.clone());
            }
        }
        self.put_role(&request.name, role, batch);
        self.count_up(batch);
        Ok(())
    }

    /// Takes from a role what it permits in exactly this range.
    ///
    /// # Errors
    /// `RoleNotFound`, `PermissionNotGranted`.
    pub fn role_revoke_permission(
        &mut self,
        request: &pb::AuthRoleRevokePermissionRequest,
        batch: &mut Batch,
    ) -> Result<(), AuthError> {
        let mut role = self.role(&request.role)?.clone();
        let before = role.key_permission.len();
        role.key_permission
            .retain(|held| held.key != request.key || held.range_end != request.range_end);
        if role.key_permission.len() == before {
            return Err(AuthError::PermissionNotGranted);
        }
        self.put_role(&request.role, role, batch);
        self.count_up(batch);
        Ok(())
    }

    fn user(&self, name: &str) -> Result<&User, AuthError> {
        self.users.get(name).ok_or(AuthError::UserNotFound)
    }

    fn role(&self, name: &str) -> Result<&Role, AuthError> {
        self.roles.get(name).ok_or(AuthError::RoleNotFound)
    }

    fn put_user(&mut self, name: &str, user: User, batch: &mut Batch) {
        batch.put(Table::AuthUsers, name.to_string(), user.encode_to_vec());
        let permitted = Arc::new(self.merge(&user.roles));
        self.permitted.insert(name.to_string(), permitted);
        self.users.insert(name.to_string(), user);
    }

    fn put_role(&mut self, name: &str, role: Role, batch: &mut Batch) {
        batch.put(Table::AuthRoles, name.to_string(), role.encode_to_vec());
        self.roles.insert(name.to_string(), role);
        self.merge_all(|user| user.roles.iter().any(|held| held == name));
    }

    /// What these roles permit together. Role root need not have been added.
    fn merge(&self, roles: &[String]) -> Permitted {
        let everything = roles.iter().any(|role| role == ROOT);
        let held = roles.iter().filter_map(|role| self.roles.get(role));
        Permitted::merge(everything, held.flat_map(|role| &role.key_permission))
    }

    /// Merges anew what the users in question have. Those in the same roles share it.
    fn merge_all(&mut self, in_question: impl Fn(&User) -> bool) {
        let mut merged: HashMap<&[String], Arc<Permitted>, FxBuildHasher> = HashMap::default();
        let mut permitted = std::mem::take(&mut self.permitted);
        for (name, user) in self.users.iter().filter(|(_, user)| in_question(user)) {
            let of_roles =
                merged.entry(&user.roles).or_insert_with(|| Arc::new(self.merge(&user.roles)));
            permitted.insert(name.clone(), of_roles.clone());
        }
        drop(merged);
        self.permitted = permitted;
    }

    fn count_up(&mut self, batch: &mut Batch) {
        self.revision += 1;
        batch.put(Table::Auth, REVISION, self.revision.to_be_bytes().to_vec());
    }
}

fn name(bytes: &Bytes) -> Result<String, String> {
    String::from_utf8(bytes.to_vec()).map_err(|error| error.to_string())
}

fn has_no_password(user: &User) -> bool {
    user.options.is_some_and(|options| options.no_password)
}

/// The user without a role; `None` if it does not have it.
fn without_role(user: &User, role: &str) -> Option<User> {
    let mut changed = user.clone();
    changed.roles.retain(|held| held != role);
    (changed.roles.len() < user.roles.len()).then_some(changed)
}

/// Whether a permission for this range is one for any key at all.
fn permits_a_key(key: &[u8], range_end: &[u8]) -> bool {
    !key.is_empty() && (range_end.is_empty() || range_end == OPEN_END || key < range_end)
}

#[cfg(test)]
mod tests;
