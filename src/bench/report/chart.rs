//! Charts as inline SVG. Each is drawn 360 units wide, the width of a phone, so that its text can be read
//! there; colours come from the page's style sheet, and no figure is told by colour alone.

use super::model::Latency;
use super::table::time;

const WIDTH: f64 = 360.0;

/// Colours that the style sheet has, `c0` and so on; then they begin anew, with other dashes.
pub const COLOURS: usize = 7;

const DASHES: [&str; 4] = ["none", "7 3", "2 3", "9 3 2 3"];

/// Text in which nothing is markup.
pub fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            // What a page may not hold at all.
            c if c.is_control() && !matches!(c, '\n' | '\t') => safe.push('\u{fffd}'),
            c => safe.push(c),
        }
    }
    safe
}

/// Adds to a string, which cannot fail.
macro_rules! add {
    ($text:expr, $($arg:tt)*) => {{
        use std::fmt::Write as _;
        $text.write_fmt(format_args!($($arg)*)).expect("a string grows")
    }};
}
pub(super) use add;

fn svg(title: &str, height: f64, body: &str) -> String {
    let title = escaped(title);
    format!(
        "<svg role=\"img\" aria-label=\"{title}\" viewBox=\"0 0 {WIDTH} {height:.0}\" \
         xmlns=\"http://www.w3.org/2000/svg\"><title>{title}</title>{body}</svg>\n"
    )
}

/// One subject of a bar chart.
pub struct Bar<'a> {
    pub name: &'a str,
    /// Which colour it has.
    pub colour: usize,
    /// `None`: there is no figure.
    pub value: Option<f64>,
    /// It does not set the scale; its bar is broken where it is longer than that.
    pub reference: bool,
    pub label: String,
}

/// A bar for each subject, from zero.
pub fn bars(title: &str, bars: &[Bar<'_>]) -> String {
    const ROW: f64 = 31.0;
    let longest = |references: bool| {
        let counted = bars.iter().filter(|bar| references || !bar.reference);
        counted.filter_map(|bar| bar.value).fold(0.0, f64::max)
    };
    let most = if longest(false) > 0.0 { longest(false) } else { longest(true) };
    let mut body = String::new();
    for (at, bar) in bars.iter().enumerate() {
        let y = at as f64 * ROW;
        let length = match bar.value {
            Some(value) if most > 0.0 => (value / most * WIDTH).clamp(1.0, WIDTH),
            _ => 0.0,
        };
        add!(
            body,
            "<text x=\"0\" y=\"{:.0}\">{}</text><text x=\"{WIDTH}\" y=\"{:.0}\" class=\"r\">{}</text>\
             <rect class=\"rail\" x=\"0\" y=\"{:.0}\" width=\"{WIDTH}\" height=\"9\"/>\
             <rect class=\"f{}\" x=\"0\" y=\"{:.0}\" width=\"{length:.1}\" height=\"9\"/>",
            y + 12.0,
            escaped(bar.name),
            y + 12.0,
            escaped(&bar.label),
            y + 17.0,
            bar.colour % COLOURS,
            y + 17.0
        );
        if bar.value.is_some_and(|value| value > most) {
            add!(body, "<path class=\"slit\" d=\"M{} {:.0}l-5 13\"/>", WIDTH - 20.0, y + 15.0);
        }
    }
    svg(title, bars.len() as f64 * ROW, &body)
}

/// Latencies of each subject on one logarithmic axis.
pub fn latencies(title: &str, subjects: &[(&str, usize, Latency)]) -> String {
    const ROW: f64 = 31.0;
    const MARGIN: f64 = 14.0;
    let all = || subjects.iter().flat_map(|(_, _, l)| [l.p50, l.p99, l.p999, l.max]);
    let least = all().fold(f64::INFINITY, f64::min).max(1e-3);
    let most = all().fold(least, f64::max);
    let (from, to) =
        (least.log10().floor(), (most.log10().ceil()).max(least.log10().floor() + 1.0));
    let x = |us: f64| {
        let place = (us.max(1e-3).log10() - from) / (to - from);
        MARGIN + place.clamp(0.0, 1.0) * (WIDTH - 2.0 * MARGIN)
    };
    let bottom = subjects.len() as f64 * ROW;
    let mut body = String::new();
    let decades = (to - from) as i32;
    for decade in 0..=decades {
        let us = 10f64.powf(from + f64::from(decade));
        let at = x(us);
        add!(
            body,
            "<line class=\"grid\" x1=\"{at:.1}\" y1=\"0\" x2=\"{at:.1}\" y2=\"{bottom:.0}\"/>"
        );
        // Not more labels than fit.
        if decade % (decades / 5 + 1) == 0 {
            let anchor = match decade {
                0 => "",
                decade if decade == decades => " class=\"r\"",
                _ => " class=\"m\"",
            };
            let edge = match decade {
                0 => 0.0,
                decade if decade == decades => WIDTH,
                _ => at,
            };
            add!(
                body,
                "<text{anchor} x=\"{edge:.1}\" y=\"{:.0}\">{}</text>",
                bottom + 14.0,
                tick(us)
            );
        }
    }
    for (row, (name, colour, latency)) in subjects.iter().enumerate() {
        let y = row as f64 * ROW;
        let line = y + 21.0;
        let class = colour % COLOURS;
        let [p50, p99, p999, max] = [latency.p50, latency.p99, latency.p999, latency.max].map(x);
        add!(
            body,
            "<text x=\"0\" y=\"{:.0}\">{}</text>\
             <line class=\"s{class}\" x1=\"{p50:.1}\" y1=\"{line}\" x2=\"{max:.1}\" y2=\"{line}\"/>\
             <circle class=\"f{class}\" cx=\"{p50:.1}\" cy=\"{line}\" r=\"5\"/>\
             <rect class=\"f{class}\" x=\"{:.1}\" y=\"{}\" width=\"8\" height=\"8\"/>\
             <path class=\"f{class}\" d=\"M{p999:.1} {}l5.5 5.5l-5.5 5.5l-5.5 -5.5z\"/>\
             <line class=\"s{class}\" x1=\"{max:.1}\" y1=\"{}\" x2=\"{max:.1}\" y2=\"{}\"/>",
            y + 12.0,
            escaped(name),
            p99 - 4.0,
            line - 4.0,
            line - 5.5,
            line - 6.0,
            line + 6.0
        );
    }
    svg(title, bottom + 18.0, &body)
}

/// A power of ten as a time, without the digits that say nothing.
fn tick(us: f64) -> String {
    match us {
        us if us < 0.9 => format!("{:.0} ns", us * 1e3),
        us if us < 900.0 => format!("{us:.0} µs"),
        us if us < 900e3 => format!("{:.0} ms", us / 1e3),
        us => format!("{:.0} s", us / 1e6),
    }
}

/// A line of a chart over time.
pub struct Line<'a> {
    pub name: &'a str,
    pub colour: usize,
    /// Seconds and values, in order of time.
    pub points: Vec<(f64, f64)>,
}

/// Values over time, one line a subject, from zero; the legend is below.
pub fn over_time(title: &str, lines: &[Line<'_>], show: fn(f64) -> String) -> String {
    const TOP: f64 = 8.0;
    const HEIGHT: f64 = 150.0;
    const LEFT: f64 = 62.0;
    let points = || lines.iter().flat_map(|line| &line.points);
    let (last, most) = points()
        .fold((0.0f64, 0.0f64), |(last, most), (at, value)| (last.max(*at), most.max(*value)));
    let top = round_up(most);
    let last = if last > 0.0 { last } else { 1.0 };
    let x = |at: f64| LEFT + at / last * (WIDTH - LEFT - 6.0);
    let y = |value: f64| TOP + HEIGHT - value / top * HEIGHT;
    let mut body = String::new();
    for quarter in 0..=4 {
        let value = top * f64::from(quarter) / 4.0;
        let at = y(value);
        add!(
            body,
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{WIDTH}\" y2=\"{at:.1}\"/>\
             <text class=\"r\" x=\"{}\" y=\"{:.1}\">{}</text>",
            LEFT - 5.0,
            at + 4.0,
            show(value)
        );
    }
    add!(
        body,
        "<text x=\"{LEFT}\" y=\"{0:.0}\">0 s</text><text class=\"r\" x=\"{WIDTH}\" y=\"{0:.0}\">{1}</text>",
        TOP + HEIGHT + 15.0,
        time(last * 1e6)
    );
    for line in lines {
        let drawn = line.points.iter().map(|(at, value)| format!("{:.1},{:.1}", x(*at), y(*value)));
        add!(
            body,
            "<polyline class=\"s{}\" stroke-dasharray=\"{}\" points=\"{}\"/>",
            line.colour % COLOURS,
            dash(line.colour),
            drawn.collect::<Vec<_>>().join(" ")
        );
    }
    let mut below = TOP + HEIGHT + 34.0;
    for (at, line) in lines.iter().enumerate() {
        let left = if at % 2 == 0 { 0.0 } else { WIDTH / 2.0 };
        add!(
            body,
            "<line class=\"s{}\" stroke-dasharray=\"{}\" x1=\"{left}\" y1=\"{2:.0}\" x2=\"{3}\" y2=\"{2:.0}\"/>\
             <text x=\"{4}\" y=\"{5:.0}\">{6}</text>",
            line.colour % COLOURS,
            dash(line.colour),
            below - 4.0,
            left + 30.0,
            left + 36.0,
            below,
            escaped(line.name)
        );
        if at % 2 == 1 {
            below += 18.0;
        }
    }
    let rows = lines.len().div_ceil(2) as f64;
    svg(title, TOP + HEIGHT + 22.0 + rows * 18.0, &body)
}

fn dash(colour: usize) -> &'static str {
    // Neighbours differ, and so do two subjects of one colour.
    DASHES[(colour % COLOURS + colour / COLOURS) % DASHES.len()]
}

/// The next of 1, 2, 4, 8... mebibytes or so: a quarter of it is a plain number.
fn round_up(most: f64) -> f64 {
    let mut top = 1.0;
    while top < most {
        top *= 2.0;
    }
    // Between two powers of two lies a step that is plain as well.
    if top * 0.75 >= most && top >= 4.0 { top * 0.75 } else { top }
}

#[cfg(test)]
mod tests {
    use super::super::table::bytes;
    use super::*;

    #[test]
    fn markup_in_names_is_text() {
        assert_eq!(escaped("a<b> & \"c\"\u{7}"), "a&lt;b&gt; &amp; &quot;c&quot;\u{fffd}");
    }

    #[test]
    fn the_longest_bar_fills_the_width_and_a_missing_figure_has_none() {
        let bar = |value: Option<f64>| Bar {
            name: "a",
            colour: 8,
            value,
            reference: false,
            label: String::new(),
        };
        let drawn = bars("t", &[bar(Some(10.0)), bar(Some(5.0)), bar(None)]);
        for width in ["\"360.0\"", "\"180.0\"", "\"0.0\""] {
            assert!(drawn.contains(&format!("width={width}")), "{drawn}");
        }
        assert!(drawn.contains("class=\"f1\"") && drawn.contains("viewBox=\"0 0 360 93\""));
        assert!(!bars("t", &[bar(Some(0.0))]).contains("NaN"));
        assert!(!drawn.contains("slit"));
        let broken = Bar { reference: true, ..bar(Some(99.0)) };
        let drawn = bars("t", &[broken, bar(Some(5.0))]);
        assert_eq!(
            (drawn.matches("width=\"360.0\"").count(), drawn.matches("slit").count()),
            (2, 1)
        );
    }

    #[test]
    fn latencies_lie_on_a_logarithmic_axis() {
        let latency = Latency { p50: 1.0, p99: 10.0, p999: 100.0, max: 10_000.0 };
        let drawn = latencies("t", &[("a", 0, latency)]);
        // 14 + (0, 1/4, 1/2, 1) of 332.
        for part in ["cx=\"14.0\"", "x=\"93.0\"", "M180.0", "x2=\"346.0\"", ">1 µs<", ">10 ms<"] {
            assert!(drawn.contains(part), "{part}: {drawn}");
        }
        let same = Latency { p50: 1.0, p99: 1.0, p999: 1.0, max: 1.0 };
        assert!(!latencies("t", &[("a", 0, same)]).contains("NaN"));
        assert_eq!([tick(0.1), tick(1e3), tick(1e6)], ["100 ns", "1 ms", "1 s"]);
    }

    #[test]
    fn lines_begin_at_zero_and_stay_inside() {
        let line = |points: &[(f64, f64)]| Line { name: "a", colour: 0, points: points.to_vec() };
        let drawn = over_time("t", &[line(&[(0.0, 0.0), (2.0, 1024.0)])], bytes);
        assert!(drawn.contains("points=\"62.0,158.0 354.0,8.0\""), "{drawn}");
        assert!(drawn.contains(">2.00 s<") && drawn.contains(">1.00 KiB<"), "{drawn}");
        for points in [&[][..], &[(0.0, 0.0)]] {
            assert!(!over_time("t", &[line(points)], bytes).contains("NaN"));
        }
        assert_eq!([round_up(0.0), round_up(5.0), round_up(7.0)], [1.0, 6.0, 8.0]);
        assert_ne!(dash(0), dash(1));
        assert_ne!(dash(0), dash(COLOURS));
    }
}
