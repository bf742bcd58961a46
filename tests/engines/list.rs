//! `quorate engines`.

use quorate::engines::{ALL, DEFAULT};
use serde_json::Value;

use crate::{quorate, text, written};

#[test]
fn people_and_programs_are_told_of_all_engines() {
    let table = written(&quorate(&["engines"]).output().unwrap());
    assert_eq!(table, written(&quorate(&["engines", "-w", "table"]).output().unwrap()));
    let json = written(&quorate(&["engines", "-w", "json"]).output().unwrap());
    let json: Vec<Value> = serde_json::from_str(&json).unwrap();
    assert_eq!(json.len(), ALL.len());
    for (engine, json) in ALL.iter().zip(&json) {
        let about = engine.about;
        assert!(table.contains(about.summary), "{table}");
        assert_eq!(json["name"], about.name);
        assert_eq!(json["default"], *engine == DEFAULT);
        assert_eq!(json["bufferedSurvives"], about.buffered_survives.to_string());
        assert_eq!(json["durableSurvives"], about.durable_survives.to_string());
        assert_eq!(json["reclaim"], about.reclaim.to_string());
        assert_eq!(json["keyBytesMax"].as_u64(), about.key_bytes_max);
        assert_eq!(json["valueBytesMax"].as_u64(), about.value_bytes_max);
        let options = json["options"].as_array().unwrap();
        assert_eq!(options.len(), about.options.len());
        for (spec, option) in about.options.iter().zip(options) {
            assert_eq!((&option["name"], &option["help"]), (&spec.name.into(), &spec.help.into()));
        }
    }
}

#[test]
fn a_command_that_cannot_be_read_is_exit_code_2() {
    for args in [
        &["engines", "-w", "xml"][..],
        &["engines", "all"],
        &["utl"],
        &["utl", "engine"],
        &["utl", "engine", "convert", "--from-dir=a", "--to-dir=b"],
        &["utl", "engine", "convert", "--from-dir=a", "--to-dir=b", "--engine=redb", "c"],
    ] {
        let output = quorate(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let said = text(&output.stderr);
        assert!(said.contains("Usage:") || said.contains("try '--help'"), "{args:?}: {said}");
        assert_eq!(text(&output.stdout), "", "{args:?}");
    }
    let help = written(&quorate(&["utl", "engine", "convert", "--help"]).output().unwrap());
    assert!(help.contains("--from-wal-dir"), "{help}");
}
