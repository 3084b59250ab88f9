//! `/proc/PID/maps`, typed: where a process has what mapped.

use std::ops::Range;

use bitflags::bitflags;

bitflags! {
    /// How a range is mapped.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Access: u8 {
        /// May be read.
        const READ = 1 << 0;
        /// May be written.
        const WRITE = 1 << 1;
        /// May be executed.
        const EXECUTE = 1 << 2;
        /// Writes go to the file, rather than to a private copy.
        const SHARED = 1 << 3;
    }
}

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its virtual addresses.
    pub range: Range<u64>,
    /// How it is mapped.
    pub access: Access,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// Major and minor number of the file's device; 0, 0 without a file.
    pub device: (u32, u32),
    /// The file's inode; 0 without a file.
    pub inode: u64,
    /// The file's path, or what the kernel calls it (`[vdso]`, `/memfd:ram (deleted)`); bytes that
    /// are no UTF-8 are replaced, so this is for people.
    pub name: String,
}

impl Mapping {
    /// Reads one line; `None` if it is not of the form that `proc_pid_maps(5)` gives.
    pub fn parse(line: &str) -> Option<Self> {
        let mut rest = line;
        let mut field = || {
            let (field, after) = rest.split_once(' ').unwrap_or((rest, ""));
            rest = after.trim_start_matches(' ');
            field
        };
        let (start, end) = field().split_once('-')?;
        let range = hex(start)?..hex(end)?;
        let access = access(field())?;
        let offset = hex(field())?;
        let (major, minor) = field().split_once(':')?;
        let device = (hex(major)?.try_into().ok()?, hex(minor)?.try_into().ok()?);
        let inode = field().parse().ok()?;
        let name = rest.to_owned();
        (range.start < range.end).then_some(Self { range, access, offset, device, inode, name })
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Never true: the kernel maps nothing of no length.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Whether this maps the file with this `st_dev` and `st_ino`.
    pub fn is_of(&self, (device, inode): (u64, u64)) -> bool {
        let (major, minor) = self.device;
        self.inode == inode && inode != 0 && libc::makedev(major, minor) == device
    }
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

fn access(text: &str) -> Option<Access> {
    let [read, write, execute, shared] = text.as_bytes() else { return None };
    let mut access = Access::empty();
    let letters = [
        (read, b'r', b'-', Access::READ),
        (write, b'w', b'-', Access::WRITE),
        (execute, b'x', b'-', Access::EXECUTE),
        (shared, b's', b'p', Access::SHARED),
    ];
    for (letter, yes, no, flag) in letters {
        match *letter {
            letter if letter == yes => access |= flag,
            letter if letter == no => {}
            _ => return None,
        }
    }
    Some(access)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_of_all_kinds_are_read() {
        let line = "7f3c00000000-7f3c40000000 rw-s 00100000 00:01 1029                       \
                    /memfd:memory-backend-memfd (deleted)";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!(mapping.range, 0x7f3c_0000_0000..0x7f3c_4000_0000);
        assert_eq!(mapping.access, Access::READ | Access::WRITE | Access::SHARED);
        assert_eq!((mapping.offset, mapping.device, mapping.inode), (0x10_0000, (0, 1), 1029));
        assert_eq!(mapping.name, "/memfd:memory-backend-memfd (deleted)");
        assert!(mapping.is_of((1, 1029)) && !mapping.is_of((2, 1029)));

        let line =
            "7ffd8a5f9000-7ffd8a5fb000 r-xp 00000000 00:00 0                          [vdso]";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!((mapping.name.as_str(), mapping.len()), ("[vdso]", 0x2000));
        assert!(!mapping.is_of((0, 0)));

        let line = "55d0c0000000-55d0c0001000 ---p 00000000 00:00 0 ";
        assert_eq!(Mapping::parse(line).unwrap().name, "");
    }

    #[test]
    fn other_text_is_no_mapping() {
        for line in [
            "",
            "1000-2000",
            "1000-1000 rw-p 0 00:00 0",
            "2000-1000 rw-p 0 00:00 0",
            "1000-2000 rw-q 0 00:00 0",
            "1000-2000 rw-p 0 0000 0",
            "1000-2000 rw-p 0 00:00 x",
        ] {
            assert_eq!(Mapping::parse(line), None, "{line:?}");
        }
    }

    proptest! {
        #[test]
        fn no_line_makes_the_parser_panic(line in "[0-9a-f:rwxps -]{0,60}") {
            let _ = Mapping::parse(&line);
        }
    }
}
