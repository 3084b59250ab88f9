//! The guest's whole root file system: one program, its libraries and the virtio modules.
//!
//! A cpio archive in the kernel's `newc` format (Documentation/driver-api/early-userspace/
//! buffer-format.rst), not compressed: copying is cheaper for an emulated processor than
//! unpacking. No device nodes are needed, the program mounts devtmpfs itself.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::command;
use super::error::{LabError, io};
use super::kernel_image::filter;

/// Where the program stands in the guest; `rdinit=` names it.
pub(super) const PROGRAM: &str = "/pageferry";
/// Modules that a guest needs beside those that they depend on.
pub(super) const MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon"];

const FILE: u32 = 0o100_755;
const FOLDER: u32 = 0o040_755;

/// A cpio archive that is being written.
struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    entry_count: u32,
}

/// The archive for `program`; the files in `modules` are loaded in the order of their names.
pub(super) fn build(program: &Path, modules: &Path) -> Result<Vec<u8>, LabError> {
    let mut archive = Archive { bytes: Vec::new(), folders: BTreeSet::new(), entry_count: 0 };
    for folder in ["dev", "proc", "sys"] {
        archive.folder(folder);
    }
    archive.file(PROGRAM, &stripped(program)?);
    for library in libraries(program)? {
        let bytes = fs::read(&library).map_err(io("read", &library))?;
        archive.file(&library.to_string_lossy(), &bytes);
    }
    for entry in fs::read_dir(modules).map_err(io("list", modules))? {
        let path = entry.map_err(io("list", modules))?.path();
        let bytes = fs::read(&path).map_err(io("read", &path))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("/modules/{name}"), &bytes);
    }
    Ok(archive.finish())
}

impl Archive {
    fn file(&mut self, path: &str, bytes: &[u8]) {
        let name = path.trim_start_matches('/');
        for (slash, _) in name.match_indices('/') {
            self.folder(&name[..slash]);
        }
        self.entry(name, FILE, bytes);
    }

    fn folder(&mut self, name: &str) {
        if self.folders.insert(name.to_owned()) {
            self.entry(name, FOLDER, &[]);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) {
        self.entry_count += 1;
        let name_bytes = name.len() as u32 + 1;
        let fields = [
            self.entry_count, // inode
            mode,
            0, // user
            0, // group
            1, // links
            0, // time: the same input makes the same archive
            bytes.len() as u32,
            0, // device
            0,
            0, // device number of a node
            0,
            name_bytes,
            0, // checksum, not used in this format
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(bytes);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

/// The program without its symbols if `strip` is there: a debug build is ten times smaller so.
fn stripped(program: &Path) -> Result<Vec<u8>, LabError> {
    let folder = tempfile::tempdir().map_err(io("create", &std::env::temp_dir()))?;
    let small = folder.path().join("stripped");
    let source = program.to_string_lossy();
    let target = small.to_string_lossy();
    let strip = command::output(&mut command::words(["strip", "-o", &target, &source]));
    let path = if strip.is_ok() { &small } else { program };
    fs::read(path).map_err(io("read", path))
}

/// The dynamic loader and the shared libraries of `program`, as its loader finds them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>, LabError> {
    let listing = command::output(&mut command::words(["ldd", &program.to_string_lossy()]))
        .or_else(|error| match error {
            // ldd fails for a static program, which is a fine one.
            LabError::Command { .. } => Ok(String::new()),
            other => Err(other),
        })?;
    Ok(library_paths(&listing))
}

fn library_paths(ldd: &str) -> Vec<PathBuf> {
    ldd.lines()
        .filter_map(|line| {
            let path = line.split_once("=>").map_or(line, |(_, path)| path);
            let path = path.trim().split(' ').next()?;
            path.starts_with('/').then(|| PathBuf::from(path))
        })
        .collect()
}

/// The modules under `folder` that the guest loads, each after those that it depends on.
pub(super) fn modules_in_order(folder: &Path) -> Result<Vec<(String, Vec<u8>)>, LabError> {
    let mut found = Vec::new();
    list_modules(folder, &mut found)?;
    let mut ordered = Vec::new();
    for name in MODULES {
        load_order(name, &found, &mut ordered)?;
    }
    Ok(ordered)
}

fn load_order(
    name: &str,
    found: &[(String, PathBuf)],
    ordered: &mut Vec<(String, Vec<u8>)>,
) -> Result<(), LabError> {
    if ordered.iter().any(|(done, _)| done == name) {
        return Ok(());
    }
    let Some((_, path)) = found.iter().find(|(other, _)| other == name) else {
        return Ok(()); // not in the package: this kernel has it built in
    };
    let mut bytes = fs::read(path).map_err(io("read", path))?;
    match path.extension().and_then(|ending| ending.to_str()) {
        Some("xz") => bytes = filter("xz", &bytes)?,
        Some("zst") => bytes = filter("zstd", &bytes)?,
        _ => {}
    }
    for needed in dependencies(&bytes) {
        load_order(&needed, found, ordered)?;
    }
    ordered.push((name.to_owned(), bytes));
    Ok(())
}

/// What a module says it depends on, in its `.modinfo` section: `depends=a,b`.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &module[at + KEY.len()..];
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    let names = String::from_utf8_lossy(&value[..end]);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

fn list_modules(folder: &Path, found: &mut Vec<(String, PathBuf)>) -> Result<(), LabError> {
    for entry in fs::read_dir(folder).map_err(io("list", folder))? {
        let path = entry.map_err(io("list", folder))?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            list_modules(&path, found)?;
        } else if let Some((name, _)) = file.split_once(".ko") {
            found.push((name.replace('-', "_"), path));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_one_that_cpio_reads() {
        let mut archive = Archive { bytes: Vec::new(), folders: BTreeSet::new(), entry_count: 0 };
        archive.file("/a/b/c", b"12345");
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        for name in ["a\0", "a/b\0", "a/b/c\0", "TRAILER!!!\0"] {
            assert!(text.contains(name), "{name:?}");
        }
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(text.matches("070701").count(), 4);
    }

    #[test]
    fn libraries_are_read_from_both_forms_of_line() {
        let ldd = "\tlinux-vdso.so.1 (0x7ff)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x7f)\n\
                   \t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        let expected = ["/lib/x/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(library_paths(ldd), expected);
    }

    #[test]
    fn dependencies_come_first() {
        assert_eq!(dependencies(b"x\0depends=virtio,virtio-ring\0y"), ["virtio", "virtio_ring"]);
        assert!(dependencies(b"x\0depends=\0").is_empty());
    }
}
