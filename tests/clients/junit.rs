//! JUnit's XML, as far as pytest writes it: `testcase` elements, and what is told of them inside.

use crate::verdict::{Outcome, Results, add};

/// The tests in a report, each named `classname::name`.
///
/// # Errors
/// What in the text is not as pytest writes it.
pub fn parse(xml: &str) -> Result<Results, String> {
    let mut results = Results::new();
    // The test whose element is open.
    let mut open: Option<String> = None;
    let mut rest = xml;
    // pytest escapes `<` in text and both `<` and `>` in attributes: each `<` begins a tag.
    while let Some(start) = rest.find('<') {
        rest = &rest[start + 1..];
        let end = rest.find('>').ok_or_else(|| format!("a tag does not end: {}", cut(rest)))?;
        let tag = &rest[..end];
        rest = &rest[end + 1..];
        let (name, attributes) = tag.split_once(char::is_whitespace).unwrap_or((tag, ""));
        let closed = tag.ends_with('/');
        match name.trim_end_matches('/') {
            "testcase" => {
                let class = attribute(attributes, "classname")?;
                let test = format!("{class}::{}", attribute(attributes, "name")?);
                add(&mut results, test.clone(), Outcome::Passed);
                open = (!closed).then_some(test);
            }
            what @ ("failure" | "error" | "skipped") => {
                let test = open.clone().ok_or_else(|| format!("a {what} outside of a test"))?;
                let why = attribute(attributes, "message")?;
                let outcome = match what {
                    "skipped" => Outcome::Skipped(why),
                    _ => Outcome::Failed(why),
                };
                add(&mut results, test, outcome);
            }
            _ if name == "/testcase" => open = None,
            _ => {}
        }
    }
    match open {
        Some(test) => Err(format!("the report ends within {test}")),
        None => Ok(results),
    }
}

/// The value of an attribute, its entities replaced.
fn attribute(attributes: &str, name: &str) -> Result<String, String> {
    let missing = || format!("no {name} in: {}", cut(attributes));
    let mut rest = attributes;
    loop {
        let (key, after) = rest.split_once("=\"").ok_or_else(missing)?;
        let (value, after) = after.split_once('"').ok_or_else(missing)?;
        if key.trim() == name {
            return Ok(unescape(value));
        }
        rest = after;
    }
}

fn unescape(text: &str) -> String {
    let text = text.replace("&#10;", "\n").replace("&#09;", "\t").replace("&#13;", "\r");
    let text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"");
    // Last: what it leaves is not an entity.
    text.replace("&amp;", "&")
}

/// The beginning of `text`, for a message.
fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_pytest_is_read() {
        let xml = r#"<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest" errors="1"
            failures="1" skipped="1" tests="4"><testcase classname="t.C" name="good" time="0.1" />
            <testcase classname="t.C" name="bad"><failure message="assert 1 &lt; 0&#10;&amp;lt;">text &lt;b&gt;
            </failure></testcase><testcase classname="t" name="left"><skipped type="pytest.skip"
            message="no cluster">here</skipped></testcase><testcase classname="t" name="ends"></testcase>
            <testcase classname="t" name="ends"><error message="on teardown">x</error></testcase>
            </testsuite></testsuites>"#;
        let results = parse(xml).unwrap();
        let expected = [
            ("t.C::bad", Outcome::Failed("assert 1 < 0\n&lt;".to_string())),
            ("t.C::good", Outcome::Passed),
            ("t::ends", Outcome::Failed("on teardown".to_string())),
            ("t::left", Outcome::Skipped("no cluster".to_string())),
        ];
        assert_eq!(results.len(), expected.len());
        for (name, outcome) in expected {
            assert_eq!(results[name], outcome, "{name}");
        }
    }

    #[test]
    fn a_torn_report_is_an_error() {
        assert!(
            parse("<testsuite><testcase classname=\"a\"").unwrap_err().contains("does not end")
        );
        assert!(parse("<testcase name=\"a\"/>").unwrap_err().contains("no classname"));
        let open = "<testcase classname=\"a\" name=\"b\"><failure message=\"\"/>";
        assert!(parse(open).unwrap_err().contains("ends within a::b"));
        assert!(parse("<error message=\"\"/>").unwrap_err().contains("outside of a test"));
    }
}
