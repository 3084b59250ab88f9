//! `docs/protocol.md` against the code: every message with its number and its fields.

use crate::frames::parts;
use crate::messages::examples;

#[test]
fn the_page_of_the_protocol_has_every_message_with_its_fields() {
    let page = include_str!("../../../docs/protocol.md");
    for message in examples() {
        let (kind, header, body) = parts(&message);
        let begin = format!("| {} | {kind:?} |", kind as u8);
        let row = page.lines().find(|line| line.starts_with(&begin));
        let row = row.unwrap_or_else(|| panic!("docs/protocol.md has no row {begin}"));
        for field in header.keys() {
            assert!(row.contains(&format!("`{field}`")), "{kind:?}: {field} is not in the page");
        }
        let has_no_body = row.ends_with("| |");
        assert_eq!(has_no_body, body.is_empty(), "{kind:?}: {row}");
    }
}
