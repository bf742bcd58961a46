//! A report as text for a terminal, and how figures are written in both table and page.

use std::fmt::Write as _;

use super::model::{Figure, Group, Latency, Measure, Outcome, Report, Set, ratio};

/// A number with three significant digits and a prefix of thousands.
pub fn short(value: f64) -> String {
    let (scaled, prefix) = match value.abs() {
        size if size >= 999.5e6 => (value / 1e9, " G"),
        size if size >= 999.5e3 => (value / 1e6, " M"),
        size if size >= 999.5 => (value / 1e3, " k"),
        _ => (value, ""),
    };
    format!("{}{prefix}", three_digits(scaled))
}

fn three_digits(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 99.95 => format!("{value:.0}"),
        size if size >= 9.995 => format!("{value:.1}"),
        size if size >= 0.9995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Bytes in binary units.
pub fn bytes(value: f64) -> String {
    let (scaled, unit) = match value {
        size if size >= 1_048_051_712.0 => (size / f64::from(1 << 30), "GiB"),
        size if size >= 1_023_488.0 => (size / f64::from(1 << 20), "MiB"),
        size if size >= 999.5 => (size / 1024.0, "KiB"),
        size => return format!("{size:.0} B"),
    };
    format!("{} {unit}", three_digits(scaled))
}

/// A time in the unit that suits it.
pub fn time(us: f64) -> String {
    match us {
        us if us >= 999_500.0 => format!("{} s", three_digits(us / 1e6)),
        us if us >= 999.5 => format!("{} ms", three_digits(us / 1e3)),
        us => format!("{} µs", three_digits(us)),
    }
}

/// The value by which subjects are compared, with its unit.
pub fn value(figure: &Figure) -> String {
    match figure {
        Figure::Rate { unit, per_second, .. } if unit == "bytes" => {
            format!("{}/s", bytes(*per_second))
        }
        Figure::Rate { per_second, unit, .. } => format!("{} {unit}/s", short(*per_second)),
        Figure::Bytes { bytes: size } => bytes(*size as f64),
        Figure::Seconds { seconds } => time(seconds * 1e6),
    }
}

/// A proportion, with as many digits as tell something.
pub fn proportion(ratio: f64) -> String {
    match ratio {
        ratio if ratio >= 99.5 => format!("×{ratio:.0}"),
        ratio if ratio >= 9.95 => format!("×{ratio:.1}"),
        ratio if ratio >= 0.0995 => format!("×{ratio:.2}"),
        ratio => format!("×{ratio:.4}"),
    }
}

/// What a measure is of: its title, and under which conditions.
pub fn conditions(measure: &Measure) -> String {
    let mut text = measure.title.clone();
    let cache = measure.cache.map(|cache| format!("{} page cache", cache.name()));
    let told: Vec<String> = measure.durability.iter().cloned().chain(cache).collect();
    if !told.is_empty() {
        write!(text, " ({})", told.join(", ")).expect("a string grows");
    }
    text
}

/// The size of a set.
pub fn size(set: &Set) -> String {
    format!("{} keys, values of {}", grouped(set.keys), bytes(set.value_bytes as f64))
}

/// A number with a blank between thousands.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// The machine in one line.
pub fn machine(report: &Report) -> String {
    let machine = &report.machine;
    format!(
        "{} cores, {} of memory, {}, {}, data on {}",
        machine.cores,
        bytes(machine.memory_bytes as f64),
        machine.kernel,
        machine.architecture,
        machine.file_system
    )
}

/// The whole report: a line a workload, a column a subject; the figure, and its ratio to the best.
pub fn text(report: &Report) -> String {
    let mut text = format!("{}\n", machine(report));
    if !report.optimised {
        text.push_str("compiled without optimisation: the figures mean nothing\n");
    }
    for set in &report.sets {
        write!(text, "\n{}\n", size(set)).expect("a string grows");
        let head = std::iter::once(String::new());
        let head = head.chain(set.runs.iter().map(|run| run.subject.clone())).collect();
        let mut lines: Vec<Vec<String>> = vec![head];
        let workloads = set.workloads();
        for group in Group::ALL {
            for measure in workloads.iter().filter(|measure| measure.group == group) {
                lines.push(line(set, measure));
                lines.extend(latency_line(set, measure));
            }
        }
        let verdict = |outcome: &Outcome| match outcome {
            Outcome::Verified { rows, .. } => format!("{} rows", grouped(*rows)),
            Outcome::Failed { .. } => "FAILED".to_owned(),
        };
        let verified = std::iter::once("Verified at the end".to_owned());
        lines.push(verified.chain(set.runs.iter().map(|run| verdict(&run.outcome))).collect());
        text.push_str(&aligned(&lines));
    }
    text.push('\n');
    for note in &report.notes {
        writeln!(text, "{note}").expect("a string grows");
    }
    for failure in report.failures() {
        writeln!(text, "error: {failure}").expect("a string grows");
    }
    text
}

fn line(set: &Set, of: &Measure) -> Vec<String> {
    let best = set.best(&of.workload);
    let cells = set.of(&of.workload).map(|(_, measure)| match measure {
        None => "-".to_owned(),
        Some(measure) => {
            let ratio = ratio(measure.figure.value(), best);
            let ratio = ratio.map_or("-".to_owned(), proportion);
            format!("{} {ratio:>6}", value(&measure.figure))
        }
    });
    std::iter::once(conditions(of)).chain(cells).collect()
}

fn latency_line(set: &Set, of: &Measure) -> Option<Vec<String>> {
    let latency = |measure: &Measure| match &measure.figure {
        Figure::Rate { latency_us, .. } => *latency_us,
        _ => None,
    };
    latency(of)?;
    let cells = set.of(&of.workload).map(|(_, measure)| {
        measure.and_then(latency).map_or("-".to_owned(), |Latency { p50, p99, p999, .. }| {
            format!("{} / {} / {}", time(p50), time(p99), time(p999))
        })
    });
    Some(std::iter::once("  p50 / p99 / p99.9".to_owned()).chain(cells).collect())
}

/// Names to the left, values to the right of their columns.
pub fn aligned(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for line in lines {
        for (column, cell) in line.iter().enumerate() {
            let width = widths[column];
            match column {
                0 => write!(text, "{cell:<width$}"),
                _ => write!(text, "  {cell:>width$}"),
            }
            .expect("a string grows");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::model::tests::report;
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        for (number, shown) in [
            (0.0, "0"),
            (0.1234, "0.123"),
            (9.994, "9.99"),
            (9.996, "10.0"),
            (999.4, "999"),
            (999.6, "1.00 k"),
            (123_456.0, "123 k"),
            (1_234_567.0, "1.23 M"),
            (2e9, "2.00 G"),
        ] {
            assert_eq!(short(number), shown);
        }
        assert_eq!(bytes(0.0), "0 B");
        assert_eq!(bytes(1000.0), "0.977 KiB");
        assert_eq!(bytes(1_048_576.0), "1.00 MiB");
        assert_eq!(bytes(3.5 * f64::from(1 << 30)), "3.50 GiB");
        assert_eq!([time(0.5), time(1500.0), time(2e6)], ["0.500 µs", "1.50 ms", "2.00 s"]);
        assert_eq!([grouped(5), grouped(1000), grouped(1_234_567)], ["5", "1 000", "1 234 567"]);
        assert_eq!(
            [1.0, 12.34, 0.1, 0.0023].map(proportion),
            ["×1.00", "×12.3", "×0.10", "×0.0023"]
        );
    }

    #[test]
    fn the_table_holds_every_figure_its_ratio_and_the_errors() {
        let text = text(&report());
        let line = |start: &str| {
            let mut lines = text.lines();
            lines.find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{start}: {text}"))
        };
        let load = line("Title of load (durable, warm page cache)");
        assert!(
            load.contains("100 rows/s  ×1.00") && load.ends_with("25.0 rows/s  ×0.25"),
            "{load}"
        );
        assert!(line("  p50 / p99 / p99.9").ends_with("1.50 µs / 20.0 µs / 300 µs"));
        assert!(line("Title of space").ends_with("100 B  ×2.00"));
        assert!(line("Title of open").ends_with('-'));
        assert!(line("Verified").ends_with("FAILED"));
        assert!(line("error: beta with 1000 keys of 256 B").ends_with("row 5 is <gone>"));
        assert!(text.contains("1 000 keys, values of 256 B\n"));
    }
}
