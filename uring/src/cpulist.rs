//! Lists of cores as the kernel writes them: `0-3,8,10-11`.

/// Parses one; anything that is not a list gives `None`. An empty text is an empty list.
pub fn parse(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        // A core number the kernel could not have: not worth the memory.
        if first > last || last >= CPUS_MAX {
            return None;
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    cpus.dedup();
    Some(cpus)
}

/// Writes one, as short as can be. `cpus` is sorted.
pub fn format(cpus: &[usize]) -> String {
    let mut text = String::new();
    for run in cpus.chunk_by(|a, b| a + 1 == *b) {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(&run[0].to_string());
        if run.len() > 1 {
            text.push('-');
            text.push_str(&run[run.len() - 1].to_string());
        }
    }
    text
}

/// The kernel's NR_CPUS is at most 8192.
const CPUS_MAX: usize = 8192;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_go_both_ways() {
        for text in ["", "0", "0-3", "0-3,8,10-11"] {
            assert_eq!(format(&parse(text).unwrap()), text);
        }
        assert_eq!(parse("2,1\n").unwrap(), [1, 2]);
        assert_eq!(parse("3-1"), None);
        assert_eq!(parse("0-99999999999"), None);
        assert_eq!(parse("none"), None);
    }
}
