//! QEMU's RAM blocks, from the human monitor: no QMP command tells their names.
//!
//! ```text
//!               Block Name    PSize              Offset               Used              Total
//!                       m0    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000
//! ```
//!
//! QEMU 8.2 added the columns `HVA` and `RO`. Names may hold blanks, so lines are read from where
//! the page size stands.

use super::MemoryError;
use crate::qemu::Execute;

/// One RAM block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RamBlock {
    /// Its name in migrations; empty if no device uses it.
    pub(super) name: String,
    /// Page size in bytes.
    pub(super) page_bytes: u64,
    /// Bytes in use.
    pub(super) bytes: u64,
    /// Host virtual address.
    pub(super) hva: Option<u64>,
}

pub(super) fn query(qemu: &dyn Execute) -> Result<Vec<RamBlock>, MemoryError> {
    parse(&qemu.human(COMMAND)?)
}

const COMMAND: &str = "info ramblock";

fn parse(text: &str) -> Result<Vec<RamBlock>, MemoryError> {
    let lines = text.lines().filter(|line| !line.trim().is_empty()).skip(1);
    lines
        .map(|line| {
            parse_line(line)
                .ok_or_else(|| MemoryError::Text { command: COMMAND, line: line.into() })
        })
        .collect()
}

fn parse_line(line: &str) -> Option<RamBlock> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let unit_at = (1..words.len())
        .rfind(|at| unit(words[*at]).is_some() && hex(words.get(at + 1)).is_some())?;
    let page_bytes = words[unit_at - 1].parse::<u64>().ok()?.checked_mul(unit(words[unit_at])?)?;
    Some(RamBlock {
        name: words[..unit_at - 1].join(" "),
        page_bytes,
        bytes: hex(words.get(unit_at + 2))?,
        hva: hex(words.get(unit_at + 4)),
    })
}

fn unit(word: &str) -> Option<u64> {
    match word {
        "B" => Some(1),
        "KiB" => Some(1 << 10),
        "MiB" => Some(1 << 20),
        "GiB" => Some(1 << 30),
        _ => None,
    }
}

fn hex(word: Option<&&str>) -> Option<u64> {
    u64::from_str_radix(word?.strip_prefix("0x")?, 16).ok()
}

/// The first host address of block `name`, by way of a guest address: for QEMUs that don't tell it.
/// `None` if the guest sees none of the block.
pub(super) fn hva_by_guest_address(
    qemu: &dyn Execute,
    name: &str,
) -> Result<Option<u64>, MemoryError> {
    let Some((guest, offset)) = guest_address(&qemu.human("info mtree -f")?, name) else {
        return Ok(None);
    };
    // "Host virtual address for 0x0 (m0) is 0x7f1a27fff000"
    let answer = qemu.human(&format!("gpa2hva {guest:#x}"))?;
    let hva = answer
        .trim()
        .rsplit_once(" is ")
        .filter(|(before, _)| before.ends_with(&format!("({name})")))
        .and_then(|(_, address)| hex(Some(&address)));
    Ok(hva.and_then(|hva| hva.checked_sub(offset)))
}

/// A guest address of the block and its offset in it, from the flat view of the address space
/// `memory`: `  0000000000100000-0000000003ffffff (prio 0, ram): m0 @0000000000100000`.
fn guest_address(mtree: &str, name: &str) -> Option<(u64, u64)> {
    let mut in_memory = false;
    for line in mtree.lines() {
        if line.starts_with("FlatView") {
            in_memory = false;
        } else if line.trim_start().starts_with("AS \"memory\"") {
            in_memory = true;
        } else if in_memory && let Some((range, rest)) = line.trim().split_once(" (prio ") {
            let Some(after) = rest.split_once("): ").and_then(|(_, it)| it.strip_prefix(name))
            else {
                continue;
            };
            // Behind the name: nothing, or the offset, or the accelerator that has it too.
            let offset = match after.split_whitespace().next() {
                _ if !(after.is_empty() || after.starts_with(' ')) => continue,
                Some(word) if word.starts_with('@') => u64::from_str_radix(&word[1..], 16).ok()?,
                _ => 0,
            };
            let (start, _) = range.split_once('-')?;
            return Some((u64::from_str_radix(start, 16).ok()?, offset));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_both_shapes_are_read() {
        let text = "\
              Block Name    PSize              Offset               Used              Total                HVA  RO
               my guest    2 MiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f0d27fff000  rw
                            4 KiB  0x0000000006000000 0x0000000002000000 0x0000000002000000
    /rom@etc/acpi/tables    4 KiB  0x00000000080c0000 0x0000000000020000 0x0000000000200000
";
        let blocks = parse(text).expect("parse");
        assert_eq!((blocks[0].name.as_str(), blocks[0].page_bytes), ("my guest", 2 << 20));
        assert_eq!((blocks[0].bytes, blocks[0].hva), (64 << 20, Some(0x7f0d_27ff_f000)));
        assert_eq!((blocks[1].name.as_str(), blocks[1].hva), ("", None));
        assert_eq!(blocks[2].bytes, 0x20000);
        assert!(parse("header\nnothing of the kind\n").is_err());
    }

    #[test]
    fn guest_address_is_that_of_the_system_address_space() {
        let text = "\
FlatView #1
 AS \"cpu-smm-0\", root: memory
 Root memory region: memory
  0000000000200000-00000000002bffff (prio 0, ram): m1
FlatView #3
 AS \"memory\", root: system
 AS \"cpu-memory-0\", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): m0
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  0000000100100000-0000000101ffffff (prio 0, ram): m1 @0000000000100000 KVM
";
        assert_eq!(guest_address(text, "m1"), Some((0x1_0010_0000, 0x10_0000)));
        assert_eq!(guest_address(text, "m0"), Some((0, 0)));
        assert_eq!(guest_address(text, "m"), None);
        assert_eq!(guest_address(text, "m2"), None);
    }
}
