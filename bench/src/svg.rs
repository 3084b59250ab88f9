//! Plots as SVG, by themselves: no script, no font but the viewer's, nothing from a network.
//!
//! Percentile curves have percentiles on a scale of nines (each further nine is as wide as the one
//! before) and latency on a logarithmic scale; bars begin at 0, with a line from the least to the
//! largest run.

use std::fmt::Write as _;

const WIDTH: f64 = 860.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 44.0;
const TOP: f64 = 44.0;
const PLOT_HEIGHT: f64 = 300.0;
const LEGEND_ROW: f64 = 20.0;
const BAR_ROW: f64 = 30.0;
const BAR_LABEL: f64 = 300.0;
/// Told apart also by people who see red and green alike (Okabe and Ito).
const COLOURS: [&str; 7] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555"];

/// One line.
#[derive(Clone, Debug)]
pub(crate) struct Curve {
    pub(crate) label: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// One bar: the median, and the ends of its line.
#[derive(Clone, Debug)]
pub(crate) struct Bar {
    pub(crate) label: String,
    pub(crate) value: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

/// Colour of the nth of a plot.
fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

/// Latency over percentile; points are (quantile, nanoseconds).
pub(crate) fn percentiles(title: &str, curves: &[Curve]) -> String {
    let values = || curves.iter().flat_map(|curve| curve.points.iter().map(|point| point.1));
    let least = values().fold(f64::INFINITY, f64::min).max(1.0);
    let most = values().fold(1.0, f64::max);
    // As many nines as there are samples for.
    let last = curves.iter().flat_map(|c| c.points.iter().map(|p| nines(p.0))).fold(1.0, f64::max);
    let nines_shown = (last - 0.01).clamp(1.0, 5.0).ceil();
    let (low, high) = (log_floor(least), log_ceil(most));
    let x = |quantile: f64| LEFT + nines(quantile).min(nines_shown) / nines_shown * plot_width();
    let y = |ns: f64| TOP + PLOT_HEIGHT * (1.0 - (ns.log10() - low) / (high - low));
    let mut plot = Plot::new(title, curves.len());
    let steps = ["0", "90", "99", "99.9", "99.99", "99.999"];
    for (nine, label) in steps.iter().enumerate().take(nines_shown as usize + 1) {
        let at = LEFT + nine as f64 / nines_shown * plot_width();
        plot.vertical(at, &format!("{label} %"));
    }
    plot.vertical(x(0.5), "50 %");
    for (value, label) in log_ticks(low, high) {
        plot.horizontal(y(value), &label);
    }
    for (index, curve) in curves.iter().enumerate() {
        let points = curve.points.iter().map(|&(quantile, ns)| (x(quantile), y(ns.max(1.0))));
        plot.line(index, points);
    }
    plot.legend(curves.iter().map(|curve| curve.label.as_str()));
    plot.finish()
}

/// A value over time in seconds, from 0 up.
pub(crate) fn over_time(title: &str, unit: &str, curves: &[Curve]) -> String {
    let points = || curves.iter().flat_map(|curve| curve.points.iter());
    let end = nice_ceil(points().map(|point| point.0).fold(1e-3, f64::max));
    let most = points().map(|point| point.1).fold(1e-9, f64::max);
    let x = |seconds: f64| LEFT + seconds / end * plot_width();
    let top = nice_ceil(most);
    let y = |value: f64| TOP + PLOT_HEIGHT * (1.0 - value / top);
    let mut plot = Plot::new(&format!("{title}, {unit}"), curves.len());
    for step in 0..=5 {
        let share = f64::from(step) / 5.0;
        plot.horizontal(y(top * share), &number(top * share));
        plot.vertical(x(end * share), &format!("{} s", number(end * share)));
    }
    for (index, curve) in curves.iter().enumerate() {
        plot.line(index, curve.points.iter().map(|&(at, value)| (x(at), y(value))));
    }
    plot.legend(curves.iter().map(|curve| curve.label.as_str()));
    plot.finish()
}

/// One bar below the other.
pub(crate) fn bars(title: &str, unit: &str, bars: &[Bar]) -> String {
    let most = nice_ceil(bars.iter().map(|bar| bar.max).fold(1e-9, f64::max));
    let room = WIDTH - BAR_LABEL - RIGHT - 70.0;
    let x = |value: f64| BAR_LABEL + value / most * room;
    let height = TOP + bars.len() as f64 * BAR_ROW + 30.0;
    let mut out = open(height, &format!("{title}, {unit}"));
    for (index, bar) in bars.iter().enumerate() {
        let top = TOP + index as f64 * BAR_ROW;
        let middle = top + BAR_ROW / 2.0 - 3.0;
        text(&mut out, BAR_LABEL - 10.0, middle + 4.0, "end", 12, &shortened(&bar.label));
        let _ = write!(
            out,
            "<rect x=\"{BAR_LABEL}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"/>",
            (x(bar.value) - BAR_LABEL).max(1.0),
            BAR_ROW - 8.0,
            colour(index),
        );
        if bar.max > bar.min {
            let _ = write!(
                out,
                "<path d=\"M{:.1} {middle:.1}H{:.1}\" stroke=\"#222\" stroke-width=\"1.5\"/>",
                x(bar.min),
                x(bar.max),
            );
        }
        text(&mut out, x(bar.max) + 8.0, middle + 4.0, "start", 12, &number(bar.value));
    }
    let foot = TOP + bars.len() as f64 * BAR_ROW + 12.0;
    let said = "bar: median of the runs; line: least to largest";
    text(&mut out, BAR_LABEL, foot, "start", 11, said);
    out + "</svg>\n"
}

struct Plot {
    out: String,
}

impl Plot {
    fn new(title: &str, curves: usize) -> Self {
        let height = TOP + PLOT_HEIGHT + 40.0 + curves as f64 * LEGEND_ROW;
        Self { out: open(height, title) }
    }

    fn vertical(&mut self, x: f64, label: &str) {
        let (top, bottom) = (TOP, TOP + PLOT_HEIGHT);
        let _ = write!(self.out, "<path d=\"M{x:.1} {top}V{bottom}\" stroke=\"#ddd\"/>");
        text(&mut self.out, x, bottom + 18.0, "middle", 11, label);
    }

    fn horizontal(&mut self, y: f64, label: &str) {
        let (left, right) = (LEFT, WIDTH - RIGHT);
        let _ = write!(self.out, "<path d=\"M{left} {y:.1}H{right}\" stroke=\"#ddd\"/>");
        text(&mut self.out, left - 8.0, y + 4.0, "end", 11, label);
    }

    fn line(&mut self, index: usize, points: impl Iterator<Item = (f64, f64)>) {
        let mut path = String::new();
        for (x, y) in points {
            let _ = write!(path, "{}{x:.1} {y:.1}", if path.is_empty() { "M" } else { "L" });
        }
        let _ = write!(
            self.out,
            "<path d=\"{path}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\" \
             stroke-linejoin=\"round\"/>",
            colour(index)
        );
    }

    fn legend<'a>(&mut self, labels: impl Iterator<Item = &'a str>) {
        for (index, label) in labels.enumerate() {
            let y = TOP + PLOT_HEIGHT + 44.0 + index as f64 * LEGEND_ROW;
            let _ = write!(
                self.out,
                "<path d=\"M{LEFT} {:.1}h26\" stroke=\"{}\" stroke-width=\"4\"/>",
                y - 4.0,
                colour(index)
            );
            text(&mut self.out, LEFT + 34.0, y, "start", 12, label);
        }
    }

    fn finish(self) -> String {
        self.out + "</svg>\n"
    }
}

fn open(height: f64, title: &str) -> String {
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\" role=\"img\" font-family=\"sans-serif\">\
         <title>{}</title><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>",
        escaped(title)
    );
    text(&mut out, LEFT - 60.0, 24.0, "start", 15, title);
    out
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, size: u32, said: &str) {
    let _ = write!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\" \
         fill=\"#222\">{}</text>",
        escaped(said)
    );
}

/// As HTML and SVG want it.
pub(crate) fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('"', "&quot;")
}

/// What fits beside a bar.
fn shortened(label: &str) -> String {
    const LETTERS: usize = 44;
    match label.char_indices().nth(LETTERS) {
        None => label.into(),
        Some((at, _)) => format!("{}…", &label[..at]),
    }
}

fn plot_width() -> f64 {
    WIDTH - LEFT - RIGHT
}

/// 0.9 is one, 0.99 two.
fn nines(quantile: f64) -> f64 {
    -(1.0 - quantile.clamp(0.0, 1.0 - 1e-9)).log10()
}

/// The next step of 1, 2, 5, 10 … below, as a power of ten.
fn log_floor(value: f64) -> f64 {
    let whole = value.log10().floor();
    let step = [5.0, 2.0, 1.0].into_iter().find(|step: &f64| whole + step.log10() <= value.log10());
    whole + step.unwrap_or(1.0).log10()
}

fn log_ceil(value: f64) -> f64 {
    let whole = value.log10().floor();
    let step = [2.0, 5.0, 10.0].into_iter().find(|step: &f64| whole + step.log10() > value.log10());
    whole + step.unwrap_or(10.0).log10()
}

/// Nanoseconds 1, 2, 5, 10 … between two powers, with their unit; fewer of many.
fn log_ticks(low: f64, high: f64) -> Vec<(f64, String)> {
    let steps: &[f64] = if high - low > 4.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let mut ticks = Vec::new();
    for power in low.floor() as i32..=high.ceil() as i32 {
        for step in steps {
            let value = step * 10f64.powi(power);
            if value.log10() >= low - 1e-9 && value.log10() <= high + 1e-9 {
                ticks.push((value, duration(value)));
            }
        }
    }
    ticks
}

/// Nanoseconds for people.
pub(crate) fn duration(ns: f64) -> String {
    match ns {
        ns if ns < 1e3 => format!("{} ns", number(ns)),
        ns if ns < 1e6 => format!("{} us", number(ns / 1e3)),
        ns if ns < 1e9 => format!("{} ms", number(ns / 1e6)),
        ns => format!("{} s", number(ns / 1e9)),
    }
}

/// Bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{} KiB", number(bytes as f64 / 1024.0)),
        _ => format!("{} MiB", number(bytes as f64 / 1_048_576.0)),
    }
}

/// Three digits at most, no zeros at the end.
fn number(value: f64) -> String {
    let text = match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 || v == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    };
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').into(),
        false => text,
    }
}

fn nice_ceil(value: f64) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    let steps = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0];
    steps.into_iter().map(|step| step * power).find(|top| *top >= value).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_are_well_formed_and_within_their_frame() {
        let points = vec![(0.0, 1000.0), (0.5, 2000.0), (0.999, 900_000.0), (1.0, 1e6)];
        let curve = Curve { label: "a <b> & \"c\"".into(), points };
        let svg = percentiles("x", &[curve.clone(), curve]);
        assert!(svg.contains("a &lt;b&gt; &amp; &quot;c&quot;") && svg.ends_with("</svg>\n"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        let bar = Bar { label: "a".repeat(90), value: 3.0, min: 2.0, max: 4.0 };
        assert!(bars("x", "GiB/s", &[bar]).contains('…'));
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(duration(1500.0), "1.5 us");
        assert_eq!(duration(2e9), "2 s");
        assert_eq!(number(0.0), "0");
        assert_eq!(number(120.0), "120");
        assert_eq!(nice_ceil(170.0), 200.0);
        assert!((log_floor(3_000.0) - 2_000f64.log10()).abs() < 1e-9);
        assert!((log_ceil(3_000.0) - 5_000f64.log10()).abs() < 1e-9);
    }
}
