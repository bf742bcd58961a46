//! JSON web tokens (RFC 7519): claims about a user, signed, so that no member has to remember them.
//!
//! One algorithm is configured, and a token that names another one is refused before anything else is
//! looked at.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{self, KeyPair as _, ParsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use x509_parser::pem::Pem;

use super::IssueError;
use crate::config::JwtOptions;

/// Why tokens cannot be signed or verified as configured.
#[derive(thiserror::Error, Debug)]
pub enum KeyError {
    #[error("{option} {}: {source}", path.display())]
    Unreadable {
        option: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("sign-method {method} needs {needs}")]
    Missing { method: String, needs: &'static str },
    #[error("{option} {} is no key for sign-method {method}: {why}", path.display())]
    Unfit { option: &'static str, path: PathBuf, method: String, why: String },
    #[error("pub-key {} is not the public part of priv-key {}", pub_key.display(), priv_key.display())]
    Mismatch { pub_key: PathBuf, priv_key: PathBuf },
}

/// What a token says that has been verified, but for the time.
pub(super) struct Claims {
    pub user: Arc<str>,
    pub revision: u64,
    /// Seconds since 1970; `None` for ever.
    exp: Option<f64>,
    nbf: Option<f64>,
}

impl Claims {
    /// Whether they hold at this time.
    pub fn hold(&self, unix_s: u64) -> bool {
        let now = unix_s as f64;
        self.exp.is_none_or(|exp| now < exp) && self.nbf.is_none_or(|nbf| now >= nbf)
    }
}

#[derive(Deserialize)]
struct Header {
    alg: String,
}

/// Fields in the order in which etcd writes them.
#[derive(Serialize)]
struct Signed<'a> {
    exp: u64,
    revision: u64,
    username: &'a str,
}

#[derive(Deserialize)]
struct Told {
    username: String,
    /// JSON of other writers may have a fraction or an exponent.
    revision: f64,
    exp: Option<f64>,
    nbf: Option<f64>,
}

enum SigningKey {
    Hmac(Box<hmac::Key>),
    Rsa(signature::RsaKeyPair, &'static dyn signature::RsaEncoding),
    Ecdsa(signature::EcdsaKeyPair),
    Ed25519(signature::Ed25519KeyPair),
}

enum VerifyingKey {
    Hmac(Box<hmac::Key>),
    Public(ParsedPublicKey),
}

/// Signs and verifies.
pub(super) struct Jwt {
    method: String,
    ttl: Duration,
    /// The first part of each token.
    header: String,
    signing: Option<SigningKey>,
    verifying: VerifyingKey,
}

/// What a sign-method is made of.
enum Family {
    Hmac(hmac::Algorithm),
    Rsa(&'static dyn signature::RsaEncoding, &'static signature::RsaParameters),
    Ecdsa(
        &'static signature::EcdsaSigningAlgorithm,
        &'static signature::EcdsaVerificationAlgorithm,
    ),
    Ed25519,
}

fn family(method: &str) -> Option<Family> {
    use signature as s;
    Some(match method {
        "HS256" => Family::Hmac(hmac::HMAC_SHA256),
        "HS384" => Family::Hmac(hmac::HMAC_SHA384),
        "HS512" => Family::Hmac(hmac::HMAC_SHA512),
        "RS256" => Family::Rsa(&s::RSA_PKCS1_SHA256, &s::RSA_PKCS1_2048_8192_SHA256),
        "RS384" => Family::Rsa(&s::RSA_PKCS1_SHA384, &s::RSA_PKCS1_2048_8192_SHA384),
        "RS512" => Family::Rsa(&s::RSA_PKCS1_SHA512, &s::RSA_PKCS1_2048_8192_SHA512),
        "PS256" => Family::Rsa(&s::RSA_PSS_SHA256, &s::RSA_PSS_2048_8192_SHA256),
        "PS384" => Family::Rsa(&s::RSA_PSS_SHA384, &s::RSA_PSS_2048_8192_SHA384),
        "PS512" => Family::Rsa(&s::RSA_PSS_SHA512, &s::RSA_PSS_2048_8192_SHA512),
        "ES256" => Family::Ecdsa(&s::ECDSA_P256_SHA256_FIXED_SIGNING, &s::ECDSA_P256_SHA256_FIXED),
        "ES384" => Family::Ecdsa(&s::ECDSA_P384_SHA384_FIXED_SIGNING, &s::ECDSA_P384_SHA384_FIXED),
        "ES512" => Family::Ecdsa(&s::ECDSA_P521_SHA512_FIXED_SIGNING, &s::ECDSA_P521_SHA512_FIXED),
        "EdDSA" => Family::Ed25519,
        _ => return None,
    })
}

/// One of the two files, if it is configured.
struct File<'a> {
    option: &'static str,
    path: &'a Path,
    method: &'a str,
    bytes: Vec<u8>,
}

impl<'a> File<'a> {
    fn read(
        option: &'static str,
        path: &'a Path,
        method: &'a str,
    ) -> Result<Option<Self>, KeyError> {
        if path.as_os_str().is_empty() {
            return Ok(None);
        }
        match std::fs::read(path) {
            Ok(bytes) => Ok(Some(File { option, path, method, bytes })),
            Err(source) => Err(KeyError::Unreadable { option, path: path.into(), source }),
        }
    }

    fn unfit(&self, why: impl ToString) -> KeyError {
        let (path, method) = (self.path.into(), self.method.into());
        KeyError::Unfit { option: self.option, path, method, why: why.to_string() }
    }

    /// The key that `take` finds in one of the file's PEM blocks: some tools write others before it,
    /// such as a curve's parameters.
    fn pem<T, E: ToString>(&self, take: impl Fn(&[u8]) -> Result<T, E>) -> Result<T, KeyError> {
        let mut why = "it holds no PEM block".to_string();
        for block in Pem::iter_from_buffer(&self.bytes) {
            match block.map_err(|error| self.unfit(error)) {
                Ok(block) => match take(&block.contents) {
                    Ok(key) => return Ok(key),
                    Err(error) => why = error.to_string(),
                },
                Err(error) => return Err(error),
            }
        }
        Err(self.unfit(why))
    }

    /// The public key, which may be in a certificate.
    fn public(
        &self,
        algorithm: &'static dyn signature::VerificationAlgorithm,
    ) -> Result<ParsedPublicKey, KeyError> {
        self.pem(|der| {
            ParsedPublicKey::new(algorithm, der).or_else(|rejected| {
                match x509_parser::parse_x509_certificate(der) {
                    Ok((_, found)) => ParsedPublicKey::new(algorithm, found.public_key().raw),
                    Err(_) => Err(rejected),
                }
            })
        })
    }
}

impl Jwt {
    /// Reads the keys.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn open(options: &JwtOptions) -> Result<Self, KeyError> {
        let method = options.sign_method.as_str();
        let missing = |needs| KeyError::Missing { method: method.into(), needs };
        let private = File::read("priv-key", &options.priv_key, method)?;
        let public = File::read("pub-key", &options.pub_key, method)?;
        let family = family(method).ok_or_else(|| missing("another server"))?;
        let (signing, verifying) = match family {
            Family::Hmac(algorithm) => {
                let secret = private.filter(|secret| !secret.bytes.is_empty());
                let secret = secret.ok_or_else(|| missing("priv-key"))?;
                let key = Box::new(hmac::Key::new(algorithm, &secret.bytes));
                (Some(SigningKey::Hmac(key.clone())), VerifyingKey::Hmac(key))
            }
            Family::Rsa(encoding, parameters) => {
                let read = |file: &File<'_>| {
                    let pair = file.pem(|der| {
                        signature::RsaKeyPair::from_pkcs8(der)
                            .or_else(|_| signature::RsaKeyPair::from_der(der))
                    })?;
                    let own = pair.public_key().as_ref().to_vec();
                    Ok((SigningKey::Rsa(pair, encoding), own))
                };
                pair(private, public, parameters, read)?.ok_or_else(|| missing(EITHER))?
            }
            Family::Ecdsa(algorithm, verification) => {
                let read = |file: &File<'_>| {
                    let pair = file
                        .pem(|der| signature::EcdsaKeyPair::from_private_key_der(algorithm, der))?;
                    let own = pair.public_key().as_ref().to_vec();
                    Ok((SigningKey::Ecdsa(pair), own))
                };
                pair(private, public, verification, read)?.ok_or_else(|| missing(EITHER))?
            }
            Family::Ed25519 => {
                let read = |file: &File<'_>| {
                    let pair = file.pem(signature::Ed25519KeyPair::from_pkcs8)?;
                    let own = pair.public_key().as_ref().to_vec();
                    Ok((SigningKey::Ed25519(pair), own))
                };
                pair(private, public, &signature::ED25519, read)?.ok_or_else(|| missing(EITHER))?
            }
        };
        let header = format!("{{\"alg\":\"{method}\",\"typ\":\"JWT\"}}");
        let jwt = Jwt {
            method: method.into(),
            ttl: options.ttl,
            header: URL_SAFE_NO_PAD.encode(header),
            signing,
            verifying,
        };
        // Whatever form the two keys came in: what one signs, the other has to verify.
        if let Some(key) = &jwt.signing {
            let signed = key.sign(b"probe");
            let fits = signed.is_ok_and(|signed| jwt.verifying.verify(b"probe", &signed));
            if !fits {
                let (pub_key, priv_key) = (options.pub_key.clone(), options.priv_key.clone());
                return Err(KeyError::Mismatch { pub_key, priv_key });
            }
        }
        Ok(jwt)
    }

    /// Signs a token for `user`.
    ///
    /// # Errors
    /// `VerifyOnly`, `Failed`.
    pub fn sign(&self, user: &str, revision: u64, unix_s: u64) -> Result<String, IssueError> {
        let key = self.signing.as_ref().ok_or(IssueError::VerifyOnly)?;
        // A second that has begun counts as one that is over, as in etcd.
        let exp = unix_s + self.ttl.as_secs();
        let claims = serde_json::to_vec(&Signed { exp, revision, username: user })
            .expect("a name and numbers are always JSON");
        let mut token = format!("{}.{}", self.header, URL_SAFE_NO_PAD.encode(claims));
        let signed = key.sign(token.as_bytes())?;
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(signed, &mut token);
        Ok(token)
    }

    /// What a token says, if it is signed with the configured key in the configured way.
    pub fn verify(&self, token: &str) -> Option<Claims> {
        let (message, signed) = token.rsplit_once('.')?;
        let (header, claims) = message.split_once('.')?;
        let header: Header = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(header).ok()?).ok()?;
        if header.alg != self.method {
            return None;
        }
        let signed = URL_SAFE_NO_PAD.decode(signed).ok()?;
        if !self.verifying.verify(message.as_bytes(), &signed) {
            return None;
        }
        let told: Told = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
        Some(Claims {
            user: told.username.into(),
            revision: told.revision as u64,
            exp: told.exp,
            nbf: told.nbf,
        })
    }
}

/// What a pair of keys needs at least.
const EITHER: &str = "priv-key, or pub-key to verify only";

/// The keys of an algorithm that has two; `None` if neither is there. `read` reads the private one with
/// its public part.
fn pair(
    private: Option<File<'_>>,
    public: Option<File<'_>>,
    algorithm: &'static dyn signature::VerificationAlgorithm,
    read: impl Fn(&File<'_>) -> Result<(SigningKey, Vec<u8>), KeyError>,
) -> Result<Option<(Option<SigningKey>, VerifyingKey)>, KeyError> {
    let given = public.map(|file| file.public(algorithm)).transpose()?;
    let Some(file) = private else {
        return Ok(given.map(|key| (None, VerifyingKey::Public(key))));
    };
    let (signing, own) = read(&file)?;
    let public = match given {
        Some(key) => key,
        None => ParsedPublicKey::new(algorithm, own).map_err(|error| file.unfit(error))?,
    };
    Ok(Some((Some(signing), VerifyingKey::Public(public))))
}

impl SigningKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, IssueError> {
        let random = SystemRandom::new();
        Ok(match self {
            SigningKey::Hmac(key) => hmac::sign(key, message).as_ref().to_vec(),
            SigningKey::Rsa(pair, encoding) => {
                let mut signed = vec![0; pair.public_modulus_len()];
                pair.sign(*encoding, &random, message, &mut signed)
                    .map_err(|_| IssueError::Failed)?;
                signed
            }
            SigningKey::Ecdsa(pair) => {
                let signed = pair.sign(&random, message).map_err(|_| IssueError::Failed)?;
                signed.as_ref().to_vec()
            }
            SigningKey::Ed25519(pair) => pair.sign(message).as_ref().to_vec(),
        })
    }
}

impl VerifyingKey {
    fn verify(&self, message: &[u8], signed: &[u8]) -> bool {
        match self {
            VerifyingKey::Hmac(key) => hmac::verify(key, message, signed).is_ok(),
            VerifyingKey::Public(key) => key.verify_sig(message, signed).is_ok(),
        }
    }
}
