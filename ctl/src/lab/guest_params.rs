//! What the guest program is asked to do, as `pf.*` words on the guest's kernel command line.
//!
//! Shared by the host side, which writes them, and the guest program, which reads them. A word
//! with a dot is kept by the kernel for modules and never handed to PID 1 as an argument.

use std::net::Ipv4Addr;

/// The work of one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestParams {
    /// Incompressible, self-verifying memory in MiB.
    pub fill_mib: u64,
    /// Part of it that the writers rewrite, in MiB; the rest is verified over and over.
    pub hot_mib: u64,
    /// Memory that held noise and is free when the guest is ready, in MiB: what a balloon takes first.
    pub spare_mib: u64,
    /// Writer threads; they share the hot set between them.
    pub writers: u32,
    /// Pages that all writers together rewrite per second; 0 is as fast as they can.
    pub pages_per_second: u64,
    /// Every n-th word of a page is rewritten: 1 is the whole page, 64 makes dirty pages fast.
    pub stride_words: u32,
    /// Part of each page, in percent, that a codec makes next to nothing of.
    pub packing_percent: u32,
    /// Writers walk the hot set in scattered order instead of upwards.
    pub scattered: bool,
    /// Milliseconds between two ticks.
    pub tick_ms: u32,
    /// Address and prefix length of the first network interface.
    pub ipv4: Option<(Ipv4Addr, u8)>,
    /// UDP port that echoes.
    pub udp_echo_port: Option<u16>,
    /// Threads that read `/dev/vda` with `O_DIRECT`.
    pub disk_readers: u32,
    /// Bytes of one such read, in KiB.
    pub disk_request_kib: u32,
    /// Memory that keeps what was read, in MiB for all readers together. A buffer is verified all
    /// the time and is read into again only when every other one has been.
    pub disk_keep_mib: u32,
    /// End of the disk, in MiB, that one more thread writes with `O_DIRECT` and reads back: the
    /// scratch part that the image was made with.
    pub disk_scratch_mib: u32,
}

impl Default for GuestParams {
    fn default() -> Self {
        Self {
            fill_mib: 64,
            hot_mib: 16,
            spare_mib: 0,
            writers: 2,
            pages_per_second: 0,
            stride_words: 1,
            packing_percent: 0,
            scattered: false,
            tick_ms: 100,
            ipv4: None,
            udp_echo_port: None,
            disk_readers: 0,
            disk_request_kib: 64,
            disk_keep_mib: 16,
            disk_scratch_mib: 0,
        }
    }
}

/// A `pf.*` word that can't be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("unusable kernel parameter {word}")]
pub struct BadParam {
    /// The word as it stood on the command line.
    pub word: String,
}

impl GuestParams {
    /// The words for the kernel command line.
    pub fn to_command_line(&self) -> String {
        let mut line = format!(
            "pf.fill_mib={} pf.hot_mib={} pf.spare_mib={} pf.writers={} pf.rate={} pf.stride={} pf.packing={} \
             pf.scattered={} pf.tick_ms={} pf.disk_readers={} pf.disk_request_kib={} pf.disk_keep_mib={} \
             pf.disk_scratch_mib={}",
            self.fill_mib,
            self.hot_mib,
            self.spare_mib,
            self.writers,
            self.pages_per_second,
            self.stride_words,
            self.packing_percent,
            u8::from(self.scattered),
            self.tick_ms,
            self.disk_readers,
            self.disk_request_kib,
            self.disk_keep_mib,
            self.disk_scratch_mib,
        );
        if let Some((address, prefix)) = self.ipv4 {
            line += &format!(" pf.ipv4={address}/{prefix}");
        }
        if let Some(port) = self.udp_echo_port {
            line += &format!(" pf.udp_echo={port}");
        }
        line
    }

    /// Reads the `pf.*` words of a kernel command line; all others are passed over.
    pub fn from_command_line(line: &str) -> Result<Self, BadParam> {
        let mut params = Self::default();
        for word in line.split_ascii_whitespace() {
            let Some((name, value)) = word.strip_prefix("pf.").and_then(|w| w.split_once('='))
            else {
                continue;
            };
            params.set(name, value).ok_or_else(|| BadParam { word: word.to_owned() })?;
        }
        Ok(params)
    }

    fn set(&mut self, name: &str, value: &str) -> Option<()> {
        match name {
            "fill_mib" => self.fill_mib = value.parse().ok()?,
            "hot_mib" => self.hot_mib = value.parse().ok()?,
            "spare_mib" => self.spare_mib = value.parse().ok()?,
            "writers" => self.writers = value.parse().ok()?,
            "rate" => self.pages_per_second = value.parse().ok()?,
            "stride" => self.stride_words = value.parse().ok().filter(|n| *n > 0)?,
            "packing" => self.packing_percent = value.parse().ok().filter(|n| *n <= 100)?,
            "scattered" => self.scattered = value == "1",
            "tick_ms" => self.tick_ms = value.parse().ok().filter(|n| *n > 0)?,
            "disk_readers" => self.disk_readers = value.parse().ok()?,
            "disk_request_kib" => {
                self.disk_request_kib = value.parse().ok().filter(|n| *n >= 4 && n % 4 == 0)?;
            }
            "disk_keep_mib" => self.disk_keep_mib = value.parse().ok()?,
            "disk_scratch_mib" => self.disk_scratch_mib = value.parse().ok()?,
            "udp_echo" => self.udp_echo_port = Some(value.parse().ok()?),
            "ipv4" => {
                let (address, prefix) = value.split_once('/')?;
                let prefix = prefix.parse().ok().filter(|p| *p <= 32)?;
                self.ipv4 = Some((address.parse().ok()?, prefix));
            }
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let params = GuestParams {
            fill_mib: 2048,
            hot_mib: 256,
            spare_mib: 512,
            writers: 3,
            pages_per_second: 5000,
            stride_words: 64,
            packing_percent: 75,
            scattered: true,
            tick_ms: 50,
            ipv4: Some((Ipv4Addr::new(10, 1, 2, 3), 24)),
            udp_echo_port: Some(7),
            disk_readers: 2,
            disk_request_kib: 128,
            disk_keep_mib: 32,
            disk_scratch_mib: 8,
        };
        let line = format!("console=ttyS0 quiet {} -- guest-init", params.to_command_line());
        assert_eq!(GuestParams::from_command_line(&line), Ok(params));
    }

    #[test]
    fn unknown_and_unusable_words_are_refused() {
        for word in ["pf.flil_mib=3", "pf.fill_mib=x", "pf.ipv4=1.2.3.4/33", "pf.stride=0"] {
            let refused = GuestParams::from_command_line(&format!("quiet {word}"));
            assert_eq!(refused, Err(BadParam { word: word.to_owned() }));
        }
    }
}
