//! The guests that libvirt runs, asked by its own `virsh`.
//!
//! libvirt keeps the QMP socket it made to itself (QEMU serves one client on each), so a domain needs
//! one more, by `<qemu:commandline>` with `-qmp unix:PATH,server=on,wait=off`. Domains without are
//! left out, and said.

use std::io;
use std::path::PathBuf;
use std::process::Command;

use super::error::DrainError;
use super::guest::Guest;

/// Name of a domain, and why it is left out.
pub(super) type LeftOut = (String, String);

/// All running domains with a socket of their own, and those without.
pub(super) fn guests(uri: &str) -> Result<(Vec<Guest>, Vec<LeftOut>), DrainError> {
    let (mut guests, mut left_out) = (Vec::new(), Vec::new());
    let names = virsh(uri, &["list", "--name"])?;
    for name in names.lines().map(str::trim).filter(|name| !name.is_empty()) {
        match qmp_socket(&virsh(uri, &["dumpxml", name])?) {
            Ok(Some(qmp)) => guests.push(Guest::at(qmp, Some(name.to_owned()))),
            Ok(None) => {
                let why = "no QMP socket beside libvirt's own: give it a <qemu:commandline> with \
                           -qmp unix:PATH,server=on,wait=off";
                left_out.push((name.to_owned(), why.into()));
            }
            Err(error) => left_out.push((name.to_owned(), format!("its XML: {error}"))),
        }
    }
    Ok((guests, left_out))
}

fn virsh(uri: &str, words: &[&str]) -> Result<String, DrainError> {
    let failed =
        |source| DrainError::Virsh { command: format!("virsh {}", words.join(" ")), source };
    let output = Command::new("virsh").args(["-c", uri]).args(words).output().map_err(failed)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(io::Error::other(crate::agent::failure::one_line(said.trim()))));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The path of the last `-qmp unix:PATH` among a domain's own arguments for QEMU.
fn qmp_socket(xml: &str) -> Result<Option<PathBuf>, roxmltree::Error> {
    let document = roxmltree::Document::parse(xml)?;
    let arguments: Vec<&str> = document
        .descendants()
        .filter(|node| node.tag_name().name() == "arg")
        .filter(|node| node.tag_name().namespace().is_some_and(|it| it.contains("libvirt.org")))
        .filter_map(|node| node.attribute("value"))
        .collect();
    let mut sockets = arguments.windows(2).filter(|pair| pair[0] == "-qmp").filter_map(|pair| {
        let path = pair[1].strip_prefix("unix:")?.split(',').next()?;
        Some(PathBuf::from(path))
    });
    Ok(sockets.next_back())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str =
        "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>";

    #[test]
    fn a_domain_s_own_socket_is_found() {
        let xml = format!(
            "{HEAD}<name>web</name><qemu:commandline><qemu:arg value='-qmp'/><qemu:arg \
             value='unix:/run/vms/web&amp;1.qmp,server=on,wait=off'/></qemu:commandline></domain>"
        );
        assert_eq!(qmp_socket(&xml).unwrap(), Some("/run/vms/web&1.qmp".into()));
        let without = format!("{HEAD}<name>web</name></domain>");
        assert_eq!(qmp_socket(&without).unwrap(), None);
        assert!(qmp_socket("no XML").is_err());
    }
}
