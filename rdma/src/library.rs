//! Whether rdma-core's user-space half is installed, without loading any of it.
//!
//! The dynamic linker's directories are looked through by name: reading its cache would mean
//! parsing a private format, and `dlopen` would run foreign code in a probe.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::sysfs;

/// rdma-core's libraries as found on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Libraries {
    /// `libibverbs.so.1`.
    pub ibverbs: Option<PathBuf>,
    /// `librdmacm.so.1`; every connection needs it.
    pub rdmacm: Option<PathBuf>,
    /// Providers installed beside libibverbs, by name.
    pub providers: Vec<String>,
}

/// The ABI names both libraries have had since 2005.
const IBVERBS: &str = "libibverbs.so.1";
const RDMACM: &str = "librdmacm.so.1";

impl Libraries {
    /// Looks below `root`.
    pub(crate) fn find(root: &Path) -> Self {
        let directories = linker_directories(root);
        let find = |name: &str| directories.iter().map(|dir| dir.join(name)).find(|p| p.exists());
        let ibverbs = find(IBVERBS);
        let providers =
            ibverbs.as_deref().and_then(Path::parent).map(providers).unwrap_or_default();
        Self { ibverbs, rdmacm: find(RDMACM), providers }
    }
}

/// `libibverbs/libNAME-rdmavNN.so` beside the library itself.
fn providers(library_directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = sysfs::entries(library_directory.join("libibverbs"))
        .iter()
        .filter_map(|path| {
            let file = sysfs::name(path);
            Some(file.strip_prefix("lib")?.split_once("-rdmav")?.0.to_owned())
        })
        .collect();
    // mlx5, mlx4, efa, hns and mana are libraries of their own; the plug-in is a link to them.
    names.sort();
    names.dedup();
    names
}

/// `/etc/ld.so.conf.d` and the built-in directories, as ld.so(8) has them.
fn linker_directories(root: &Path) -> Vec<PathBuf> {
    let mut directories: Vec<PathBuf> = sysfs::entries(root.join("etc/ld.so.conf.d"))
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .flat_map(|text| {
            text.lines()
                .map(|line| line.split('#').next().unwrap_or_default().trim().to_owned())
                .filter(|line| line.starts_with('/'))
                .collect::<Vec<_>>()
        })
        .map(|line| below(root, &line))
        .collect();
    directories.extend(["/lib64", "/usr/lib64", "/lib", "/usr/lib"].map(|dir| below(root, dir)));
    directories
}

fn below(root: &Path, absolute: &str) -> PathBuf {
    root.join(absolute.trim_start_matches('/'))
}
