//! What a certificate says: whom it names, who signed it, until when.
//!
//! For reports and for people. Whether a peer is believed is decided by rustls, never here.

use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::agent::failure::one_line;

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Its subject's common name, or all of the subject where there is none.
    pub subject: String,
    /// Host names and addresses that it is for.
    pub names: Vec<String>,
    /// The common name of who signed it.
    pub issuer: String,
    /// First moment.
    pub from: SystemTime,
    /// Last moment.
    pub until: SystemTime,
    /// It may sign others.
    pub is_authority: bool,
    /// It is for who listens; so is one that does not say what it is for.
    pub for_server: bool,
    /// It is for who connects; so is one that does not say what it is for.
    pub for_client: bool,
    /// SHA-256 of all of it, in hexadecimal.
    pub fingerprint: String,
}

impl Certificate {
    /// Reads one; `None` for what is no certificate.
    pub fn read(der: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(der).ok()?;
        let names = parsed.subject_alternative_name().ok().flatten();
        let names = names.map_or_else(Vec::new, |names| {
            names.value.general_names.iter().filter_map(name).collect()
        });
        let usage = parsed.extended_key_usage().ok().flatten();
        let usage = usage.map(|usage| usage.value);
        let fingerprint = ring::digest::digest(&ring::digest::SHA256, der);
        Some(Self {
            subject: common_name(parsed.subject()),
            names,
            issuer: common_name(parsed.issuer()),
            from: moment(parsed.validity().not_before.timestamp()),
            until: moment(parsed.validity().not_after.timestamp()),
            is_authority: parsed.is_ca(),
            for_server: usage.is_none_or(|usage| usage.any || usage.server_auth),
            for_client: usage.is_none_or(|usage| usage.any || usage.client_auth),
            fingerprint: fingerprint.as_ref().iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }

    /// Whom it names, in one line: `host-b (host-b, 10.0.0.2)`.
    pub fn identity(&self) -> String {
        match self.names.as_slice() {
            [] => self.subject.clone(),
            names if names == [self.subject.as_str()] => self.subject.clone(),
            names => format!("{} ({})", self.subject, names.join(", ")),
        }
    }

    /// Whether it is valid at a time.
    pub fn valid_at(&self, now: SystemTime) -> bool {
        (self.from..=self.until).contains(&now)
    }
}

fn name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some(one_line(name)),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|ip| IpAddr::from(ip).to_string()),
            16 => <[u8; 16]>::try_from(*bytes).ok().map(|ip| IpAddr::from(ip).to_string()),
            _ => None,
        },
        _ => None,
    }
}

fn common_name(name: &x509_parser::x509::X509Name<'_>) -> String {
    let common = name.iter_common_name().find_map(|name| name.as_str().ok());
    one_line(&common.map_or_else(|| name.to_string(), str::to_owned))
}

fn moment(seconds: i64) -> SystemTime {
    match u64::try_from(seconds) {
        Ok(after) => UNIX_EPOCH + Duration::from_secs(after),
        Err(_) => UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs()),
    }
}

/// A moment as people write it, in UTC to the minute.
pub fn date(moment: SystemTime) -> String {
    let at = OffsetDateTime::from(moment);
    let (year, month, day) = (at.year(), u8::from(at.month()), at.day());
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02} UTC", at.hour(), at.minute())
}
