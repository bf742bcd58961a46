//! Reports as one page that needs nothing beside itself: no script, no font, no picture from elsewhere.
//! Behind each chart stands a table with its figures.
//!
//! The page is written so that an XML parser reads it as well: every element is closed.

use super::chart::{self, Bar, Line, add, escaped};
use super::model::{Command, Figure, Group, Measure, Outcome, Report, Run, Sample, Set, ratio};
use super::table;

const STYLE: &str = include_str!("style.css");

/// All `reports` on one page.
pub fn page(reports: &[Report]) -> String {
    let title = match reports {
        [one] => heading(one.command),
        _ => "Measurements",
    };
    let mut page = String::new();
    add!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\" xmlns=\"http://www.w3.org/1999/xhtml\">\n<head>\n\
         <meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
    );
    for report in reports {
        add!(page, "<article>\n");
        head(&mut page, report);
        for set in &report.sets {
            overview(&mut page, set);
        }
        for set in &report.sets {
            figures(&mut page, set);
        }
        foot(&mut page, report);
        add!(page, "</article>\n");
    }
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

fn heading(command: Command) -> &'static str {
    match command {
        Command::Engines => "Storage engines compared",
        Command::Server => "Servers compared",
    }
}

fn head(page: &mut String, report: &Report) {
    add!(page, "<header>\n<h1>{}</h1>\n", heading(report.command));
    add!(
        page,
        "<p>{}. Measured on {} by quorate {} in {}.</p>\n",
        escaped(&table::machine(report)),
        date(report.started_unix_s),
        escaped(&report.version),
        table::time(report.elapsed_s * 1e6)
    );
    if !report.optimised {
        page.push_str(
            "<p class=\"bad\">The program was compiled without optimisation: the figures mean nothing.</p>\n",
        );
    }
    for failure in report.failures() {
        add!(page, "<p class=\"bad\">Failed: {}</p>\n", escaped(&failure));
    }
    page.push_str("</header>\n");
}

/// A table begins; `wide` ones become lists on a narrow screen.
fn table_head(page: &mut String, caption: &str, columns: &[&str]) {
    add!(page, "<table class=\"wide\"><caption>{}</caption>\n<thead><tr>", escaped(caption));
    for column in columns {
        add!(page, "<th scope=\"col\">{}</th>", escaped(column));
    }
    page.push_str("</tr></thead>\n<tbody>\n");
}

fn cell(page: &mut String, label: &str, class: &str, text: &str) {
    let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
    add!(page, "<td{class} data-label=\"{}\">{}</td>", escaped(label), escaped(text));
}

/// Every workload of a set in proportion to its best.
fn overview(page: &mut String, set: &Set) {
    add!(page, "<h2>In short: {}</h2>\n", escaped(&table::size(set)));
    let mut columns = vec!["Workload"];
    columns.extend(set.runs.iter().map(|run| &run.subject[..]));
    let caption = "Each in proportion to the best of the line (marked). Rates: more is better; bytes and \
                   times: less is better.";
    table_head(page, caption, &columns);
    for measure in set.workloads() {
        add!(page, "<tr><th scope=\"row\">{}</th>", escaped(&what(measure)));
        let best = set.best(&measure.workload);
        for (subject, measure) in set.of(&measure.workload) {
            let ratio = measure.and_then(|measure| ratio(measure.figure.value(), best));
            let class = if ratio == Some(1.0) { "best" } else { "" };
            cell(page, subject, class, &ratio.map_or("–".to_owned(), table::proportion));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table>\n");
}

/// The conditions of a measure, with what its group does not say by itself.
fn what(measure: &Measure) -> String {
    let text = table::conditions(measure);
    match measure.group {
        Group::Space => format!("Space: {text}"),
        Group::Memory => format!("Memory: {text}"),
        _ => text,
    }
}

fn figures(page: &mut String, set: &Set) {
    add!(page, "<h2>{}</h2>\n", escaped(&table::size(set)));
    let workloads = set.workloads();
    for group in Group::ALL {
        let of_group: Vec<&&Measure> = workloads.iter().filter(|m| m.group == group).collect();
        if of_group.is_empty() {
            continue;
        }
        add!(page, "<h3>{}</h3>\n<div class=\"figures\">\n", group.title());
        for measure in of_group {
            figure(page, set, measure);
        }
        page.push_str("</div>\n");
    }
    let shown = |run: &Run| run.samples.len() > 1;
    if set.runs.iter().any(shown) {
        page.push_str("<h3>Memory and space over time</h3>\n<div class=\"figures\">\n");
        let series: [(&str, fn(&Sample) -> u64); 4] = [
            ("Resident set over time, bytes", |sample| sample.rss_bytes),
            ("Memory of its own (no file's) over time, bytes", |sample| sample.anonymous_bytes),
            ("Its files in the page cache over time, bytes", |sample| sample.cached_bytes),
            ("Space on disk over time, bytes", |sample| sample.disk_bytes),
        ];
        for (title, pick) in series {
            over_time(page, set, title, pick);
        }
        page.push_str("</div>\n");
    }
}

/// The unit of a figure's chart.
fn unit(figure: &Figure) -> String {
    match figure {
        Figure::Rate { unit, .. } => format!("{unit} per second, more is better"),
        Figure::Bytes { .. } => "bytes, less is better".to_owned(),
        Figure::Seconds { .. } => "time, less is better".to_owned(),
    }
}

/// One workload: its bars, its latencies, its table.
fn figure(page: &mut String, set: &Set, of: &Measure) {
    let title = format!("{}, {}", of.title, unit(&of.figure));
    let mut conditions: Vec<String> = of.durability.iter().cloned().collect();
    conditions.extend(of.cache.map(|cache| format!("{} page cache", cache.name())));
    add!(page, "<figure>\n<figcaption>{}", escaped(&title));
    if !conditions.is_empty() {
        add!(page, "<small>{}</small>", escaped(&conditions.join("; ")));
    }
    page.push_str("</figcaption>\n");

    let found: Vec<(&str, Option<&Measure>)> = set.of(&of.workload).collect();
    let bars: Vec<Bar<'_>> = found
        .iter()
        .enumerate()
        .map(|(colour, (name, measure))| Bar {
            name,
            colour,
            value: measure.map(|measure| measure.figure.value()),
            reference: set.runs[colour].reference,
            label: measure.map_or("–".to_owned(), |measure| table::value(&measure.figure)),
        })
        .collect();
    page.push_str(&chart::bars(&title, &bars));

    let latency = |measure: &Measure| match &measure.figure {
        Figure::Rate { latency_us, .. } => *latency_us,
        _ => None,
    };
    let latencies: Vec<_> = found
        .iter()
        .enumerate()
        .filter_map(|(colour, (name, measure))| Some((*name, colour, latency((*measure)?)?)))
        .collect();
    if !latencies.is_empty() {
        let title = format!("Latency of a call: {}", of.title);
        page.push_str(
            "<p class=\"soft key\">Latency of a call: ● p50, ■ p99, ◆ p99.9, | max</p>\n",
        );
        page.push_str(&chart::latencies(&title, &latencies));
    }
    figure_table(page, set, of, &found, !latencies.is_empty());
    page.push_str("</figure>\n");
}

fn figure_table(
    page: &mut String,
    set: &Set,
    of: &Measure,
    found: &[(&str, Option<&Measure>)],
    latencies: bool,
) {
    let best = set.best(&of.workload);
    let rates = matches!(of.figure, Figure::Rate { .. });
    let any = |pick: fn(&Figure) -> bool| {
        found.iter().any(|(_, measure)| measure.is_some_and(|measure| pick(&measure.figure)))
    };
    let cpu = any(|figure| matches!(figure, Figure::Rate { cpu_us: Some(_), .. }));
    let written = any(|figure| matches!(figure, Figure::Rate { write_amplification: Some(_), .. }));
    let errors = any(|figure| matches!(figure, Figure::Rate { errors: 1.., .. }));
    let mut columns = vec!["", if rates { "Rate" } else { "Value" }, "Ratio"];
    if latencies {
        columns.extend(["p50", "p99", "p99.9", "max"]);
    }
    if cpu {
        columns.push("CPU");
    }
    if written {
        columns.push("Written");
    }
    if errors {
        columns.push("Errors");
    }
    let mut caption = "Figures".to_owned();
    if cpu {
        caption.push_str("; CPU: processor time for one");
    }
    if written {
        caption.push_str("; Written: bytes to the disk for each byte of data");
    }
    table_head(page, &caption, &columns);
    for (name, measure) in found {
        add!(page, "<tr><th scope=\"row\">{}</th>", escaped(name));
        let Some(measure) = measure else {
            for column in &columns[1..] {
                cell(page, column, "", "–");
            }
            page.push_str("</tr>\n");
            continue;
        };
        let ratio = ratio(measure.figure.value(), best);
        // The unit of a rate is in the title.
        let value = match &measure.figure {
            Figure::Rate { unit, per_second, .. } if unit != "bytes" => table::short(*per_second),
            figure => table::value(figure),
        };
        cell(page, columns[1], "", &value);
        let class = if ratio == Some(1.0) { "best" } else { "" };
        cell(page, "Ratio", class, &ratio.map_or("–".to_owned(), table::proportion));
        if let Figure::Rate { latency_us, cpu_us, write_amplification, errors: failed, .. } =
            &measure.figure
        {
            let told = |value: Option<f64>| value.map_or("–".to_owned(), table::time);
            if latencies {
                cell(page, "p50", "", &told(latency_us.map(|latency| latency.p50)));
                cell(page, "p99", "", &told(latency_us.map(|latency| latency.p99)));
                cell(page, "p99.9", "", &told(latency_us.map(|latency| latency.p999)));
                cell(page, "max", "", &told(latency_us.map(|latency| latency.max)));
            }
            if cpu {
                cell(page, "CPU", "", &told(*cpu_us));
            }
            if written {
                let text =
                    write_amplification.map_or("–".to_owned(), |times| format!("{times:.2}"));
                cell(page, "Written", "", &text);
            }
            if errors {
                cell(page, "Errors", "", &table::grouped(*failed));
            }
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table>\n");
}

/// A chart of samples; its table has the most within each workload.
fn over_time(page: &mut String, set: &Set, title: &str, pick: fn(&Sample) -> u64) {
    let lines: Vec<Line<'_>> = set
        .runs
        .iter()
        .enumerate()
        .filter(|(_, run)| run.samples.iter().any(|sample| pick(sample) > 0))
        .map(|(colour, run)| Line {
            name: &run.subject,
            colour,
            points: run.samples.iter().map(|s| (s.at_s, pick(s) as f64)).collect(),
        })
        .collect();
    if lines.is_empty() {
        return;
    }
    add!(page, "<figure>\n<figcaption>{}</figcaption>\n", escaped(title));
    page.push_str(&chart::over_time(title, &lines, table::bytes));
    let mut columns = vec!["Workload"];
    columns.extend(lines.iter().map(|line| line.name));
    table_head(page, "The most while each workload ran", &columns);
    let mut phases: Vec<&str> = Vec::new();
    for sample in set.runs.iter().flat_map(|run| &run.samples) {
        if !phases.contains(&&sample.phase[..]) {
            phases.push(&sample.phase);
        }
    }
    for phase in phases {
        add!(page, "<tr><th scope=\"row\">{}</th>", escaped(phase));
        for line in &lines {
            let run = set.runs.iter().find(|run| run.subject == line.name);
            let samples = run.iter().flat_map(|run| &run.samples);
            let most = samples.filter(|sample| sample.phase == phase).map(pick).max();
            let text = most.map_or("–".to_owned(), |most| table::bytes(most as f64));
            cell(page, line.name, "", &text);
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table>\n</figure>\n");
}

fn foot(page: &mut String, report: &Report) {
    page.push_str("<h2>How to read this</h2>\n<ul>\n");
    for note in &report.notes {
        add!(page, "<li>{}</li>\n", escaped(note));
    }
    page.push_str("</ul>\n");

    page.push_str("<h2>What was measured</h2>\n");
    let mut facts: Vec<&str> = Vec::new();
    for name in report.subjects.iter().flat_map(|subject| subject.facts.keys()) {
        if !facts.contains(&&name[..]) {
            facts.push(name);
        }
    }
    let mut columns = vec!["Name", "Summary"];
    columns.extend(&facts);
    table_head(page, "What each says of itself", &columns);
    for subject in &report.subjects {
        add!(page, "<tr><th scope=\"row\">{}</th>", escaped(&subject.name));
        cell(page, "Summary", "text", &subject.summary);
        for fact in &facts {
            cell(page, fact, "text", subject.facts.get(*fact).map_or("–", String::as_str));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table>\n");

    table_head(
        page,
        "Checked at the end of each run",
        &["Run", "Keys", "Value", "Rows compared", "Bytes compared", "CRC-32C"],
    );
    for set in &report.sets {
        for run in &set.runs {
            add!(page, "<tr><th scope=\"row\">{}</th>", escaped(&run.subject));
            cell(page, "Keys", "", &table::grouped(set.keys));
            cell(page, "Value", "", &table::bytes(set.value_bytes as f64));
            match &run.outcome {
                Outcome::Verified { rows, bytes, digest } => {
                    cell(page, "Rows compared", "", &table::grouped(*rows));
                    cell(page, "Bytes compared", "", &table::bytes(*bytes as f64));
                    cell(page, "CRC-32C", "", &format!("{digest:08x}"));
                }
                Outcome::Failed { .. } => {
                    cell(page, "Rows compared", "bad", "failed");
                    cell(page, "Bytes compared", "", "–");
                    cell(page, "CRC-32C", "", "–");
                }
            }
            page.push_str("</tr>\n");
        }
    }
    page.push_str("</tbody></table>\n");

    let settings: Vec<String> =
        report.settings.iter().map(|(name, value)| format!("{name} {value}")).collect();
    add!(page, "<p class=\"soft\">Settings: {}.</p>\n", escaped(&settings.join("; ")));
}

/// A day by its number, as year, month and day (UTC).
fn date(unix_s: u64) -> String {
    // Years that begin in March have the day that comes and goes at their end.
    let days = unix_s / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, turn) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    format!("{}-{month:02}-{day:02}", year + era * 400 + turn)
}

#[cfg(test)]
mod tests {
    use super::super::model::tests::report;
    use super::*;

    #[test]
    fn days_are_those_of_the_calendar() {
        for (unix_s, day) in [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (951_868_800, "2000-03-01"),
            (1_798_761_599, "2026-12-31"),
            (1_798_761_600, "2027-01-01"),
            (4_107_542_400, "2100-03-01"),
        ] {
            assert_eq!(date(unix_s), day);
        }
    }

    #[test]
    fn the_page_holds_all_figures_and_what_failed() {
        let page = page(&[report(), report()]);
        for part in [
            "<title>Measurements</title>",
            "In short: 1 000 keys, values of 256 B",
            "Title of load, rows per second, more is better",
            "<small>durable; warm page cache</small>",
            "alpha &amp; &lt;more&gt;",
            "row 5 is &lt;gone&gt;",
            "Resident set over time, bytes",
            "<td class=\"best\" data-label=\"alpha\">×1.00</td>",
            "00000007",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert_eq!(page.matches("<figure>").count(), page.matches("</figure>").count());
        // A table for each chart of one kind or the other, and no chart without.
        assert_eq!(page.matches("<figure>").count(), 2 * (3 + 4));
        assert_eq!(page.matches("<h1>").count(), 2);
    }
}
