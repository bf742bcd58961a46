//! Passwords as the log and the `authUsers` bucket hold them: hashed with bcrypt.
//!
//! The member that takes a call hashes the password and proposes the hash, so that all members store the
//! same one and the log does not know the password (formats-and-peers 5.4). Members before 3.5 put it
//! into the log as it is; then each member that applies the entry hashes it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bcrypt::{HashParts, Version};
use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::AuthError;

/// A longer password cannot be hashed: bcrypt would not look at the rest of it.
pub const BYTES_MAX: usize = 72;

/// The cost of hashing what the log holds in the clear: the default of `--bcrypt-cost`. It is not the
/// member's own setting, as all members are to store the same.
const LOGGED_COST: u32 = 10;

/// What a password that the log holds in the clear is hashed with. The members that such an entry comes
/// from draw a salt each; here it follows from the entry, so that applying it again gives the same hash.
#[derive(Clone, Copy, Debug)]
pub struct Salt {
    /// Of the request: made of its time and member, so that another cluster's is another one.
    pub id: u64,
    /// Of the log entry.
    pub index: u64,
}

impl Salt {
    /// Nothing of the password goes in: the salt is stored, and bcrypt is there to make guessing slow.
    fn bytes(self) -> [u8; 16] {
        let digest = Sha256::new()
            .chain_update(b"auth salt")
            .chain_update(self.id.to_be_bytes())
            .chain_update(self.index.to_be_bytes())
            .finalize();
        std::array::from_fn(|at| digest[at])
    }
}

/// The stored form of a password, from what a request holds of it: a hash, or the password itself.
pub(super) fn chosen(clear: &str, hashed: &str, salt: &Salt) -> Result<Bytes, AuthError> {
    if clear.is_empty() || !hashed.is_empty() {
        // An empty text, which a change to an empty password comes with, is an empty hash: it stands
        // for a password that nobody can give.
        return match STANDARD.decode(hashed) {
            Ok(hash) => Ok(hash.into()),
            Err(_) => Err(AuthError::NoPasswordUser),
        };
    }
    if clear.len() > BYTES_MAX {
        return Err(AuthError::NoPasswordUser);
    }
    match bcrypt::hash_with_salt(clear, LOGGED_COST, salt.bytes()) {
        Ok(hash) => Ok(stored(&hash).into()),
        Err(_) => Err(AuthError::NoPasswordUser),
    }
}

/// The text that is stored, with the version that etcd writes.
fn stored(hash: &HashParts) -> String {
    hash.format_for_version(Version::TwoA)
}

/// A hash as it is proposed.
pub fn proposed(hash: &HashParts) -> String {
    STANDARD.encode(stored(hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SALT: Salt = Salt { id: 7, index: 9 };

    #[test]
    fn a_hash_is_stored_as_it_was_proposed() {
        let hash = bcrypt::hash_with_salt("pw", 4, [1; 16]).unwrap();
        let stored = chosen("", &proposed(&hash), &SALT).unwrap();
        let text = std::str::from_utf8(&stored).unwrap();
        assert!(text.starts_with("$2a$04$") && text.len() == 60, "{text}");
        assert!(bcrypt::verify("pw", text).unwrap());
        // The hash counts where both are there.
        assert_eq!(chosen("other", &proposed(&hash), &SALT), Ok(stored));
    }

    #[test]
    fn a_password_in_the_clear_is_hashed_alike_by_all_members() {
        let stored = chosen("pw", "", &SALT).unwrap();
        assert_eq!(chosen("pw", "", &SALT), Ok(stored.clone()));
        let text = std::str::from_utf8(&stored).unwrap();
        assert!(text.starts_with("$2a$10$"), "{text}");
        assert!(bcrypt::verify("pw", text).unwrap());
        assert!(!bcrypt::verify("pw2", text).unwrap());
        assert_ne!(chosen("pw", "", &Salt { index: 10, ..SALT }), Ok(stored.clone()));
        assert_ne!(chosen("pw", "", &Salt { id: 8, ..SALT }), Ok(stored));
    }

    #[test]
    fn what_cannot_be_stored_is_refused() {
        assert_eq!(chosen("", "no base64!", &SALT), Err(AuthError::NoPasswordUser));
        assert_eq!(chosen(&"x".repeat(73), "", &SALT), Err(AuthError::NoPasswordUser));
        assert!(chosen(&"x".repeat(72), "", &SALT).is_ok());
        assert_eq!(chosen("", "", &SALT), Ok(Bytes::new()));
    }
}
