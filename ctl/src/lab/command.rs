//! Runs the small programs that the laboratory leans on (`ip`, `tc`, `apt-get`, `dpkg-deb`, …).

use std::process::{Command, Stdio};

use super::error::LabError;

/// Bytes of standard error that an error carries.
const STDERR_BYTES_MAX: usize = 600;

/// A command from words: the first is the program.
pub(crate) fn words<'a>(words: impl IntoIterator<Item = &'a str>) -> Command {
    let mut words = words.into_iter();
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words);
    command
}

/// Runs `command` to its end; its standard output if it ended well.
pub(crate) fn output(command: &mut Command) -> Result<String, LabError> {
    let text = format!("{command:?}").replace('"', "");
    let output = command.stdin(Stdio::null()).output().map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => LabError::Missing {
            what: format!("the program {}", command.get_program().display()),
            hint: "make setup",
        },
        _ => LabError::Io { action: "run", path: command.get_program().into(), source },
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = tail(&String::from_utf8_lossy(&output.stderr), STDERR_BYTES_MAX);
    Err(LabError::Command { command: text, status: output.status, stderr })
}

/// Runs a command given as one line of plain words.
pub(crate) fn run(line: &str) -> Result<String, LabError> {
    output(&mut words(line.split_ascii_whitespace()))
}

/// The last `bytes_max` bytes of `text`, trimmed.
pub(crate) fn tail(text: &str, bytes_max: usize) -> String {
    let text = text.trim();
    let mut start = text.len().saturating_sub(bytes_max);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text[start..].to_owned()
}
