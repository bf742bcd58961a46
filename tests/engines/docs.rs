//! docs/engines.md says what the engines say of themselves.

use quorate::engines::list::markdown;

const BEGIN: &str = "<!-- engines: begin";
const END: &str = "<!-- engines: end -->";

#[test]
fn the_tables_are_what_the_engines_say() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/engines.md");
    let document = std::fs::read_to_string(path).unwrap();
    let begin = document.find(BEGIN).expect("there is a mark where the tables begin");
    let begin = begin + document[begin..].find('\n').expect("the mark is a line") + 1;
    let end = document.find(END).expect("there is a mark where the tables end");
    let tables = format!("\n{}\n", markdown());
    if document[begin..end] == tables {
        return;
    }
    if std::env::var_os("REWRITE_DOCS").is_none() {
        panic!(
            "docs/engines.md does not say what the engines do: run this test with REWRITE_DOCS=1.\n\
             It should have:\n{tables}"
        );
    }
    let rewritten = format!("{}{tables}{}", &document[..begin], &document[end..]);
    std::fs::write(path, rewritten).unwrap();
}
