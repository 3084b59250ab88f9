//! `pageferry pki` as it is typed, and its files as others read them.
#![forbid(unsafe_code)]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn pki(args: &[&str]) -> std::io::Result<Output> {
    Command::new(env!("CARGO_BIN_EXE_pageferry")).arg("pki").args(args).output()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[track_caller]
fn done(args: &[&str]) -> String {
    let output = pki(args).expect("it starts");
    assert!(output.status.success(), "{args:?}: {}", text(&output));
    text(&output)
}

#[track_caller]
fn refused(args: &[&str], word: &str) -> String {
    let output = pki(args).expect("it starts");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(3), "{args:?}: {said}");
    assert!(said.contains(word), "{args:?}: {word:?} is not in {said:?}");
    said
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).expect("it is there").permissions().mode() & 0o777
}

#[test]
fn init_issue_and_show() -> Outcome {
    let place = tempfile::tempdir()?;
    let dir = place.path().join("pki");
    let at = dir.to_str().ok_or("a name")?;
    let said = refused(&["issue", "host-b", "--dir", at], "has no ca-cert.pem");
    assert!(said.contains("hint: ") && said.contains("pageferry pki init"), "{said}");
    done(&["init", "--dir", at]);
    refused(&["init", "--dir", at], "is there already");
    done(&["issue", "host-b", "10.0.0.2", "--dir", at]);
    refused(&["issue", "host-b", "--dir", at], "is there already");
    refused(&["issue", "../host", "--dir", at], "neither a host name nor an IP address");
    assert_eq!(mode(&dir.join("ca-key.pem")), 0o600);
    let host = dir.join("hosts/host-b");
    for (file, expected) in [
        ("ca-cert.pem", 0o644),
        ("server-cert.pem", 0o644),
        ("server-key.pem", 0o600),
        ("client-cert.pem", 0o644),
        ("client-key.pem", 0o600),
    ] {
        assert_eq!(mode(&host.join(file)), expected, "{file}");
    }
    assert!(!host.join("ca-key.pem").exists(), "the authority's key stays where it is");

    let host_at = host.to_str().ok_or("a name")?;
    let shown = done(&["show", "--dir", host_at]);
    assert!(shown.contains("host-b (host-b, 10.0.0.2)"), "{shown}");
    assert!(shown.contains("signed by pageferry CA") && !shown.contains("WRONG"), "{shown}");
    std::fs::set_permissions(host.join("client-key.pem"), PermissionsExt::from_mode(0o644))?;
    refused(&["show", "--dir", host_at], "chmod 600");
    std::fs::copy(dir.join("ca-key.pem"), host.join("client-key.pem"))?;
    refused(&["show", "--dir", host_at], "do not belong together");

    // For the machine itself, beside its authority.
    done(&["issue", "host-a", "--dir", at, "--out", at]);
    assert!(done(&["show", "--dir", at]).contains("CA key"));
    Ok(())
}

/// What QEMU and libvirt check by GnuTLS, checked by somebody else's eyes.
#[test]
fn openssl_believes_what_was_issued() -> Outcome {
    if Command::new("openssl").arg("version").output().is_err() {
        pageferry_ctl::lab::skip("openssl_believes_what_was_issued", "there is no openssl");
        return Ok(());
    }
    let place = tempfile::tempdir()?;
    let dir = place.path().join("pki");
    let at = dir.to_str().ok_or("a name")?;
    done(&["init", "--dir", at]);
    done(&["issue", "host-b", "10.0.0.2", "--dir", at]);
    let host = dir.join("hosts/host-b");
    for (purpose, file, more) in [
        ("sslserver", "server-cert.pem", ["-verify_hostname", "host-b"]),
        ("sslserver", "server-cert.pem", ["-verify_ip", "10.0.0.2"]),
        ("sslclient", "client-cert.pem", ["-verify_depth", "1"]),
    ] {
        let output = Command::new("openssl")
            .args(["verify", "-x509_strict", "-purpose", purpose])
            .args(more)
            .arg("-CAfile")
            .arg(host.join("ca-cert.pem"))
            .arg(host.join(file))
            .output()?;
        assert!(output.status.success(), "{purpose}: {}", text(&output));
    }
    Ok(())
}
