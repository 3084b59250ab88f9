//! The probe's report for people: a table in groups, and under each thing amiss why and what to do.

use console::Style;

use super::Report;
use super::finding::{Finding, State};

/// The whole text, with a newline at its end.
pub(super) fn report(report: &Report, colour: bool) -> String {
    let mut text = format!("{} on {} (Linux {})\n", report.software, report.host, report.kernel);
    let width = report.findings.iter().map(|finding| label(finding).chars().count()).max();
    for group in report.findings.chunk_by(|a, b| a.group == b.group) {
        let title = Style::new().bold().force_styling(colour).apply_to(group[0].group.title());
        text.push_str(&format!("\n{title}\n"));
        for finding in group {
            push(&mut text, finding, width.unwrap_or(0), colour);
        }
    }
    let title = Style::new().bold().force_styling(colour).apply_to("A migration would use");
    text.push_str(&format!("\n{title}\n"));
    let choices =
        [("tracker", &report.would_use.tracker), ("transport", &report.would_use.transport)];
    for (what, choice) in choices {
        let name = choice.name.as_deref().unwrap_or("none");
        text.push_str(&format!("  {what:<9}  {name}: {}\n", choice.reason));
    }
    text.push_str(&format!("\n{}\n", last_line(report, colour)));
    text
}

fn push(text: &mut String, finding: &Finding, width: usize, colour: bool) {
    let (style, state) = match (finding.state, finding.required) {
        (State::Ok, _) => (Style::new().green(), "ok"),
        (State::Warn, _) => (Style::new().yellow(), "warn"),
        (State::Missing, false) => (Style::new().yellow(), "missing"),
        (State::Missing, true) => (Style::new().red().bold(), "MISSING"),
    };
    let label = label(finding);
    // Padded by hand: a width would count the colour's escape bytes too.
    let pad = " ".repeat("missing".len() - state.len());
    let state = style.force_styling(colour).apply_to(state);
    text.push_str(&format!("  {state}{pad}  {label:<width$}  {}\n", finding.value));
    let margin = " ".repeat("  missing  ".len() + width + 2);
    for (what, line) in [("why", &finding.why), ("fix", &finding.fix)] {
        if let Some(line) = line {
            text.push_str(&format!("{margin}{what}: {line}\n"));
        }
    }
}

/// The name without the group that its heading says already.
fn label(finding: &Finding) -> &str {
    let group =
        ["kernel.", "privileges.", "tracking.", "io_uring.", "memory.", "cpu.", "rdma.", "qemu."];
    let cut = group.iter().find_map(|prefix| finding.name.strip_prefix(prefix));
    cut.unwrap_or(&finding.name)
}

fn last_line(report: &Report, colour: bool) -> String {
    let blocking: Vec<&str> =
        report.findings.iter().filter(|f| f.blocks()).map(|f| f.name.as_str()).collect();
    match blocking.is_empty() {
        true => {
            let style = Style::new().green().bold().force_styling(colour);
            style.apply_to("A migration from this host can work.").to_string()
        }
        false => {
            let style = Style::new().red().bold().force_styling(colour);
            let line = "A migration from this host can't work:";
            format!("{} missing {}", style.apply_to(line), blocking.join(", "))
        }
    }
}
