//! Texts kept in the repository that a test compares with what the code says now.

use std::fmt::Write;
use std::path::Path;

/// Compares `text` with the file at `path` below the crate; `PAGEFERRY_BLESS=1` rewrites it.
pub(crate) fn assert_is(path: &str, text: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("PAGEFERRY_BLESS").is_some() {
        std::fs::write(&file, text).expect("the snapshot can be written");
        return;
    }
    let kept = std::fs::read_to_string(&file).unwrap_or_default();
    let differing = kept.lines().zip(text.lines()).find(|(kept, now)| kept != now);
    if let Some((kept, now)) = differing {
        panic!("{path} says\n  {kept}\nand the code\n  {now}\n{HINT}");
    }
    assert_eq!(kept.lines().count(), text.lines().count(), "lines of {path}; {HINT}");
}

/// A situation and what came of each input in it; inputs with one result in one line.
pub(crate) fn situation(name: &str, results: &[(String, String)]) -> String {
    let mut groups: Vec<(&str, Vec<&str>)> = Vec::new();
    for (input, result) in results {
        match groups.iter_mut().find(|(known, _)| known == result) {
            Some((_, inputs)) => inputs.push(input),
            None => groups.push((result, vec![input])),
        }
    }
    let mut text = format!("\n{name}\n");
    for (result, inputs) in groups {
        writeln!(text, "    {result:<40} <- {}", inputs.join(", ")).expect("a string");
    }
    text
}

const HINT: &str =
    "if that is meant: PAGEFERRY_BLESS=1 cargo test -p pageferry-datapath --test transitions";
