//! Where a setting's value goes, and how text or YAML becomes that value.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::duration::{self, GoDuration};
use super::gates::FeatureGates;
use super::types::Origins;
use super::url::{self, Url};

/// A place in [`Config`](super::Config) with the form its text has.
pub enum Slot<'a> {
    Bool(&'a mut bool),
    Uint(&'a mut u64),
    Uint32(&'a mut u32),
    Int(&'a mut i64),
    /// Go's form on the command line, nanoseconds in a file; never negative.
    Duration(&'a mut Duration),
    Text(&'a mut String),
    Path(&'a mut PathBuf),
    /// One of some words on the command line. A file's word is judged later.
    Choice(&'a mut String, &'static [&'static str]),
    /// Some of some words.
    Choices(&'a mut String, &'static [&'static str]),
    Urls(&'a mut Vec<Url>),
    Origins(&'a mut Origins),
    /// Each once and sorted; in a file one string with commas.
    Set(&'a mut BTreeSet<String>),
    /// Each once and sorted; in a file an array, taken as it is.
    UniqueList(&'a mut Vec<String>),
    /// In the order given; in a file an array.
    List(&'a mut Vec<String>),
    Gates(&'a mut FeatureGates),
    /// `name=value` with commas; in a file also a map.
    Options(&'a mut BTreeMap<String, String>),
}

/// Why a value was not taken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// The text or value has not the form it must have.
    Form(String),
    /// The form is right, but a duration may not be negative.
    Negative(GoDuration),
}

impl From<String> for Refusal {
    fn from(what: String) -> Self {
        Refusal::Form(what)
    }
}

impl Slot<'_> {
    /// Whether the flag may stand alone and takes a value only with `=`.
    pub fn is_bool(&self) -> bool {
        matches!(self, Slot::Bool(_))
    }

    /// What kind of value `--help` says the flag takes; nothing for a boolean.
    pub fn value_name(&self) -> &'static str {
        match self {
            Slot::Bool(_) => "",
            Slot::Uint(_) | Slot::Uint32(_) | Slot::Int(_) => "<number>",
            Slot::Duration(_) => "<duration>",
            Slot::Text(_) => "<text>",
            Slot::Path(_) => "<path>",
            Slot::Choice(..) => "<word>",
            Slot::Choices(..) => "<words>",
            Slot::Urls(_) => "<URLs>",
            Slot::Origins(_) | Slot::Set(_) | Slot::UniqueList(_) | Slot::List(_) => "<list>",
            Slot::Gates(_) | Slot::Options(_) => "<name=value,...>",
        }
    }

    /// The value as the flag would be given it.
    pub fn print(&self) -> String {
        match self {
            Slot::Bool(value) => value.to_string(),
            Slot::Uint(value) => value.to_string(),
            Slot::Uint32(value) => value.to_string(),
            Slot::Int(value) => value.to_string(),
            Slot::Duration(value) => GoDuration::from(**value).to_string(),
            Slot::Text(value) | Slot::Choice(value, _) | Slot::Choices(value, _) => {
                (*value).clone()
            }
            Slot::Path(value) => value.display().to_string(),
            Slot::Urls(urls) => url::join(urls),
            Slot::Origins(Origins::Any) => "*".to_owned(),
            Slot::Origins(Origins::Only(origins)) => comma(origins),
            Slot::Set(values) => comma(values.iter()),
            Slot::UniqueList(values) | Slot::List(values) => values.join(","),
            Slot::Gates(gates) => gates.to_string(),
            Slot::Options(options) => comma(options.iter().map(|(k, v)| format!("{k}={v}"))),
        }
    }

    /// Takes the text of a flag or a variable.
    ///
    /// # Errors
    /// [`Refusal`], with Go's words where Go judges the form.
    pub fn set_text(&mut self, text: &str) -> Result<(), Refusal> {
        match self {
            Slot::Bool(value) => **value = parse_bool(text).ok_or("parse error".to_owned())?,
            Slot::Uint(value) => **value = parse_uint(text)?,
            Slot::Uint32(value) => {
                **value = u32::try_from(parse_uint(text)?)
                    .map_err(|_| "value out of range".to_owned())?;
            }
            Slot::Int(value) => **value = parse_int(text)?,
            Slot::Duration(value) => {
                let given = duration::parse(text).map_err(|_| "parse error".to_owned())?;
                **value = given.to_std().ok_or(Refusal::Negative(given))?;
            }
            Slot::Text(value) => **value = text.to_owned(),
            Slot::Path(value) => **value = PathBuf::from(text),
            Slot::Choice(value, words) => {
                if !words.contains(&text) {
                    return Err(Refusal::Form("invalid value".to_owned()));
                }
                **value = text.to_owned();
            }
            Slot::Choices(value, words) => {
                if let Some(bad) = text.split(',').find(|word| !words.contains(word)) {
                    return Err(Refusal::Form(format!("invalid value {bad:?}")));
                }
                **value = text.to_owned();
            }
            // An empty text leaves what is in force.
            Slot::Urls(_) if text.is_empty() => {}
            Slot::Urls(urls) => **urls = Url::parse_list(text).map_err(|e| e.to_string())?,
            Slot::Origins(origins) => {
                **origins = match text {
                    "*" => Origins::Any,
                    _ => {
                        let urls = Url::parse_list(text).map_err(|e| e.to_string())?;
                        Origins::Only(urls.iter().map(Url::to_string).collect())
                    }
                };
            }
            Slot::Set(values) => **values = text.split(',').map(str::to_owned).collect(),
            Slot::UniqueList(values) => {
                let unique: BTreeSet<String> = text.split(',').map(str::to_owned).collect();
                **values = unique.into_iter().collect();
            }
            Slot::List(values) => **values = text.split(',').map(str::to_owned).collect(),
            Slot::Gates(gates) => gates.set_text(text)?,
            Slot::Options(options) => **options = parse_options(text)?,
        }
        Ok(())
    }

    /// Takes a value of a configuration file, as loosely as etcd does: null leaves what is in force,
    /// a number or a boolean can stand for a text, a whole number may be written as a fraction.
    ///
    /// # Errors
    /// [`Refusal`], saying what was wanted and what was found.
    pub fn set_value(&mut self, value: &Value) -> Result<(), Refusal> {
        if value.is_null() {
            return Ok(());
        }
        match self {
            Slot::Bool(slot) => {
                **slot = value.as_bool().ok_or_else(|| wanted("true or false", value))?;
            }
            Slot::Uint(slot) => {
                **slot = whole(value)
                    .and_then(|number| u64::try_from(number).ok())
                    .ok_or_else(|| wanted("a whole number, 0 or more", value))?;
            }
            Slot::Uint32(slot) => {
                **slot = whole(value)
                    .and_then(|number| u32::try_from(number).ok())
                    .ok_or_else(|| wanted("a whole number from 0 to 4294967295", value))?;
            }
            Slot::Int(slot) => {
                **slot = whole(value)
                    .and_then(|number| i64::try_from(number).ok())
                    .ok_or_else(|| wanted("a whole number", value))?;
            }
            Slot::Duration(slot) => {
                let given = whole(value)
                    .and_then(|number| i64::try_from(number).ok())
                    .map(GoDuration)
                    .ok_or_else(|| wanted("a duration as a whole number of nanoseconds", value))?;
                **slot = given.to_std().ok_or(Refusal::Negative(given))?;
            }
            Slot::Text(slot) | Slot::Choice(slot, _) | Slot::Choices(slot, _) => {
                **slot = text(value)?;
            }
            Slot::Path(slot) => **slot = PathBuf::from(text(value)?),
            Slot::Urls(_) | Slot::Origins(_) | Slot::Set(_) | Slot::Gates(_) => {
                let text = text(value)?;
                if !text.is_empty() {
                    self.set_text(&text)?;
                }
            }
            Slot::UniqueList(slot) | Slot::List(slot) => {
                let items = value.as_array().ok_or_else(|| wanted("an array of texts", value))?;
                **slot = items.iter().map(text).collect::<Result<_, _>>()?;
            }
            Slot::Options(slot) => match value {
                Value::Object(map) => {
                    **slot = map
                        .iter()
                        .map(|(name, value)| Ok((name.clone(), text(value)?)))
                        .collect::<Result<_, Refusal>>()?;
                }
                _ => **slot = parse_options(&text(value)?)?,
            },
        }
        Ok(())
    }
}

fn comma<T: AsRef<str>>(items: impl IntoIterator<Item = T>) -> String {
    let mut joined = String::new();
    for item in items {
        if !joined.is_empty() {
            joined.push(',');
        }
        joined.push_str(item.as_ref());
    }
    joined
}

fn wanted(what: &str, found: &Value) -> Refusal {
    Refusal::Form(format!("want {what}, found {found}"))
}

fn text(value: &Value) -> Result<String, Refusal> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(_) | Value::Bool(_) => Ok(value.to_string()),
        _ => Err(wanted("a text", value)),
    }
}

/// The whole number that a JSON number is.
fn whole(value: &Value) -> Option<i128> {
    let number = match value {
        Value::Number(number) => number,
        _ => return None,
    };
    if let Some(number) = number.as_i64() {
        return Some(number.into());
    }
    if let Some(number) = number.as_u64() {
        return Some(number.into());
    }
    let float = number.as_f64()?;
    // Beyond 2^53 a fraction no longer tells neighbouring numbers apart.
    (float.fract() == 0.0 && float.abs() < 9_007_199_254_740_992.0).then_some(float as i128)
}

/// Go's words for true and false.
pub fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// A whole number with Go's prefixes (`0x`, `0o`, `0b`, a leading 0 for octal) and underscores.
fn parse_uint(text: &str) -> Result<u64, String> {
    let (digits, radix) = match text.as_bytes() {
        [b'0', b'x' | b'X', ..] => (&text[2..], 16),
        [b'0', b'o' | b'O', ..] => (&text[2..], 8),
        [b'0', b'b' | b'B', ..] => (&text[2..], 2),
        [b'0', _, ..] => (&text[1..], 8),
        _ => (text, 10),
    };
    let prefixed = digits.len() != text.len();
    let mut plain = String::with_capacity(digits.len());
    let mut after_digit = prefixed;
    for c in digits.chars() {
        match c {
            // Underscores stand between digits or behind a prefix.
            '_' if after_digit => after_digit = false,
            _ if c.is_digit(radix) => {
                plain.push(c);
                after_digit = true;
            }
            _ => return Err("parse error".to_owned()),
        }
    }
    if plain.is_empty() || !after_digit {
        return Err("parse error".to_owned());
    }
    u64::from_str_radix(&plain, radix).map_err(|_| "value out of range".to_owned())
}

fn parse_int(text: &str) -> Result<i64, String> {
    let out_of_range = || "value out of range".to_owned();
    match text.as_bytes().first() {
        Some(b'-') => {
            let number = parse_uint(&text[1..])?;
            0_i64.checked_sub_unsigned(number).ok_or_else(out_of_range)
        }
        Some(b'+') => i64::try_from(parse_uint(&text[1..])?).map_err(|_| out_of_range()),
        _ => i64::try_from(parse_uint(text)?).map_err(|_| out_of_range()),
    }
}

/// Reads `name=value,...`.
///
/// # Errors
/// What is wrong with the text.
pub fn parse_options(text: &str) -> Result<BTreeMap<String, String>, String> {
    let mut options = BTreeMap::new();
    for item in text.split(',').filter(|item| !item.is_empty()) {
        let (name, value) = item
            .split_once('=')
            .ok_or_else(|| format!("option {item:?} has not the form name=value"))?;
        if options.insert(name.trim().to_owned(), value.trim().to_owned()).is_some() {
            return Err(format!("option {:?} is given twice", name.trim()));
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_forms_of_go() {
        for (text, number) in [
            ("0", Ok(0)),
            ("10", Ok(10)),
            ("0x10", Ok(16)),
            ("0b11", Ok(3)),
            ("0o17", Ok(15)),
            ("017", Ok(15)),
            ("0x_ff", Ok(255)),
            ("18446744073709551615", Ok(u64::MAX)),
            ("18446744073709551616", Err("value out of range")),
            ("1_000", Ok(1000)),
            ("_1", Err("parse error")),
            ("1__0", Err("parse error")),
            ("", Err("parse error")),
            ("0x", Err("parse error")),
            ("0x1_", Err("parse error")),
            ("-1", Err("parse error")),
            ("1.5", Err("parse error")),
            ("08", Err("parse error")),
        ] {
            assert_eq!(parse_uint(text), number.map_err(str::to_owned), "{text}");
        }
        assert_eq!(parse_int("-9223372036854775808"), Ok(i64::MIN));
        assert_eq!(parse_int("-9223372036854775809"), Err("value out of range".to_owned()));
        assert_eq!(parse_int("+5"), Ok(5));
    }

    #[test]
    fn a_file_may_write_values_loosely() {
        let (mut number, mut text, mut flag) = (7_u64, "old".to_owned(), true);
        Slot::Uint(&mut number).set_value(&Value::Null).unwrap();
        assert_eq!(number, 7);
        Slot::Uint(&mut number).set_value(&serde_json::json!(1000.0)).unwrap();
        assert_eq!(number, 1000);
        Slot::Text(&mut text).set_value(&serde_json::json!(12)).unwrap();
        assert_eq!(text, "12");
        Slot::Text(&mut text).set_value(&serde_json::json!(true)).unwrap();
        assert_eq!(text, "true");
        let refused = Slot::Bool(&mut flag).set_value(&serde_json::json!("true"));
        assert_eq!(refused, Err(Refusal::Form("want true or false, found \"true\"".to_owned())));
        let mut wait = Duration::ZERO;
        let refused = Slot::Duration(&mut wait).set_value(&serde_json::json!("10m"));
        assert!(matches!(refused, Err(Refusal::Form(what)) if what.contains("nanoseconds")));
        let refused = Slot::Duration(&mut wait).set_value(&serde_json::json!(-5));
        assert_eq!(refused, Err(Refusal::Negative(GoDuration(-5))));
    }
}
