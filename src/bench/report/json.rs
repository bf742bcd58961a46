//! A report as JSON, to a file or from one.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::model::{Report, SCHEMA};

/// Why a report cannot be read.
#[derive(thiserror::Error, Debug)]
pub enum ReadError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is no report: {source}", path.display())]
    Form { path: PathBuf, source: serde_json::Error },
    #[error("{} is a report of schema {found}, this release reads {SCHEMA}", path.display())]
    Schema { path: PathBuf, found: u64 },
}

/// Writes `report` and a line's end.
///
/// # Errors
/// Those of `out`.
pub fn write(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, report).map_err(io::Error::from)?;
    writeln!(out)
}

/// The report in a file.
///
/// # Errors
/// If there is none, or one of another schema.
pub fn read(path: &Path) -> Result<Report, ReadError> {
    let form = |source| ReadError::Form { path: path.to_path_buf(), source };
    let text =
        fs::read(path).map_err(|source| ReadError::Read { path: path.to_path_buf(), source })?;
    // The number first: a report of another schema would only fail by some field.
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(form)?;
    match value.get("schema").and_then(serde_json::Value::as_u64) {
        Some(found) if found != u64::from(SCHEMA) => {
            Err(ReadError::Schema { path: path.to_path_buf(), found })
        }
        _ => serde_json::from_value(value).map_err(form),
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::tests::report;
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let mut text = Vec::new();
        write(&report(), &mut text).unwrap();
        fs::write(&path, &text).unwrap();
        assert_eq!(read(&path).unwrap(), report());

        let text = String::from_utf8(text).unwrap();
        fs::write(&path, text.replace("\"schema\": 1", "\"schema\": 2")).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.ends_with("is a report of schema 2, this release reads 1"), "{error}");
        fs::write(&path, text.replace("\"cores\"", "\"coars\"")).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("is no report: unknown field `coars`"), "{error}");
        fs::write(&path, "{").unwrap();
        assert!(matches!(read(&path), Err(ReadError::Form { .. })));
        assert!(matches!(read(dir.path()), Err(ReadError::Read { .. })));
    }
}
