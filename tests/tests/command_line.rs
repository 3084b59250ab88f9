//! What scripts and newcomers rely on: the shape of `probe --json`, the examples of `--help`, and
//! the exit code of bad usage.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::process::{Command, Output};

use pageferry_ctl::lab::program;
use serde_json::Value;

type Outcome = Result<(), Box<dyn std::error::Error>>;

const DONE: i32 = 0;
const BAD_USAGE: i32 = 2;
const REFUSED: i32 = 3;

fn pageferry<'a>(
    args: impl IntoIterator<Item = &'a str>,
) -> Result<Output, Box<dyn std::error::Error>> {
    Ok(Command::new(program()?).args(args).output()?)
}

#[test]
fn probe_prints_one_json_object_of_the_documented_shape() -> Outcome {
    let output = pageferry(["probe", "--json"])?;
    let text = String::from_utf8(output.stdout)?;
    assert_eq!(text.lines().count(), 1, "one line: {text}");
    let report: Value = serde_json::from_str(&text)?;
    for key in ["software", "host", "kernel"] {
        assert!(report[key].as_str().is_some_and(|text| !text.is_empty()), "{key}: {report:#}");
    }
    assert!(report["would_use"].is_object(), "{report:#}");
    assert!(report["nics"].is_array(), "{report:#}");
    assert!(report.get("rdma").is_some(), "{report:#}");

    let findings = report["findings"].as_array().ok_or("findings are a list")?;
    let (mut names, mut groups) = (BTreeSet::new(), BTreeSet::new());
    for finding in findings {
        let word = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
        assert!(names.insert(word("name")), "named twice: {finding:#}");
        assert!(word("name").contains('.'), "{finding:#}");
        groups.insert(word("group"));
        assert!(finding["required"].is_boolean() && finding["value"].is_string(), "{finding:#}");
        match word("state").as_str() {
            "ok" => assert!(finding["why"].is_null() && finding["fix"].is_null(), "{finding:#}"),
            "warn" | "missing" => assert!(finding["why"].is_string(), "{finding:#}"),
            other => panic!("state {other}: {finding:#}"),
        }
    }
    for group in ["kernel", "privileges", "tracking", "io-uring", "memory", "cpu", "qemu"] {
        assert!(groups.contains(group), "nothing about {group}: {groups:?}");
    }

    let blocked = findings.iter().any(|f| f["required"] == true && f["state"] == "missing");
    assert_eq!(report["can_migrate"], !blocked);
    assert_eq!(output.status.code(), Some(if blocked { REFUSED } else { DONE }));
    Ok(())
}

/// The lines of `--help` that can be typed.
fn examples() -> Result<Vec<Vec<String>>, Box<dyn std::error::Error>> {
    let output = pageferry(["--help"])?;
    assert_eq!(output.status.code(), Some(DONE));
    let text = String::from_utf8(output.stdout)?;
    let (_, text) = text.split_once("Examples:").ok_or("the help has examples")?;
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix("pageferry "));
    Ok(lines.map(|line| line.split_whitespace().map(String::from).collect()).collect())
}

#[test]
fn every_example_of_the_help_runs() -> Outcome {
    let examples = examples()?;
    let commands: Vec<&str> = examples.iter().map(|words| words[0].as_str()).collect();
    assert_eq!(commands, ["probe", "pki", "pki", "target", "migrate", "drain", "demo"]);
    let place = tempfile::tempdir()?;
    let certificates = place.path().join("pki").display().to_string();
    for words in &examples {
        let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
        if words[0] == "pki" {
            words.extend(["--dir", &certificates]);
        }
        let expected: &[i32] = match words[0] {
            // Moves a guest; `make demo` runs it.
            "demo" => continue,
            "probe" => &[DONE, REFUSED],
            "pki" => &[DONE],
            // There is no such guest here: understood, and refused with a reason.
            _ => &[REFUSED],
        };
        let output = pageferry(words.iter().copied())?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let code = output.status.code().unwrap_or(-1);
        assert!(expected.contains(&code), "{words:?}: {code}, {stderr}");
        if code == REFUSED && words[0] != "probe" {
            let said = String::from_utf8_lossy(&output.stdout).into_owned() + &stderr;
            assert!(said.contains("hint: "), "{words:?} gives no hint: {said}");
        }
    }
    Ok(())
}

#[test]
fn every_subcommand_has_help_and_bad_usage_is_told_apart() -> Outcome {
    for command in ["probe", "target", "migrate", "drain", "demo", "pki", "set"] {
        let output = pageferry([command, "--help"])?;
        assert_eq!(output.status.code(), Some(DONE), "{command}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("Usage: pageferry"), "{command}");
        let output = pageferry([command, "--no-such-option"])?;
        assert_eq!(output.status.code(), Some(BAD_USAGE), "{command}");
    }
    Ok(())
}
