//! What an engine prints, as it is kept with the run: numbered objects of whole lines, a JSON object each.
//!
//! Lines come from elsewhere and may hold anything, so that they are made plain before they are kept, and again when
//! they are read. This module must never know who prints, keeps or reads.

use std::fmt::Write as _;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// The longest line that is kept, in bytes; the rest of a longer one is left out.
pub const LINE_BYTES: usize = 4096;
/// Lines of an engine's output that a failure carries.
pub const TAIL_LINES: usize = 200;
/// Most bytes of a line among these; the rest of a longer one is left out.
pub const TAIL_LINE_BYTES: usize = 512;
/// Most bytes of all of them: each is indented below the one before it, and says whether it goes on.
pub const TAIL_BYTES: usize = TAIL_LINES * (TAIL_LINE_BYTES + "\n  …".len());

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Line {
    /// When the worker read it: milliseconds since 1970 by the worker's clock.
    pub at_ms: i64,
    /// Without its end.
    pub text: String,
}

/// `lines` as one object.
pub fn to_bytes(lines: &[Line]) -> Bytes {
    let mut text = String::new();
    for line in lines {
        let json = serde_json::to_string(line).expect("numbers and text become JSON");
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{json}");
    }
    text.into()
}

/// The lines of an object. Whatever is no line of ours is left out: a log decides nothing.
pub fn from_bytes(bytes: &[u8]) -> Vec<Line> {
    let lines = bytes.split(|&byte| byte == b'\n');
    lines
        .filter_map(|line| serde_json::from_slice::<Line>(line).ok())
        .map(|line| Line {
            at_ms: line.at_ms,
            text: plain(&line.text),
        })
        .collect()
}

/// `text` as [`whole`], and at most [`LINE_BYTES`] of it.
pub fn plain(text: &str) -> String {
    cut(&whole(text)).to_owned()
}

/// As much of `text` as is kept of a line.
pub fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(LINE_BYTES)]
}

/// `text` as one line that a terminal shows and does not obey. Colours and the like (ANSI escape sequences) are left out,
/// tabs become spaces, and other control characters a mark.
pub fn whole(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut chars = text.trim_end().chars().peekable();
    while let Some(c) = chars.next() {
        let c = match c {
            '\u{1b}' => {
                if chars.next_if_eq(&'[').is_some() {
                    // Parameters, then one letter.
                    while chars
                        .next_if(|c| ('\u{20}'..='\u{3f}').contains(c))
                        .is_some()
                    {}
                    chars.next();
                }
                continue;
            }
            '\t' => ' ',
            c if c.is_control() => '\u{fffd}',
            c => c,
        };
        kept.push(c);
    }
    kept
}

/// The last of `lines` as a failure carries them, each below the last and indented: [`TAIL_LINES`] and
/// [`TAIL_LINE_BYTES`] of each at most. The whole lines are in the logs.
pub fn tail<S: AsRef<str>>(lines: &[S]) -> String {
    let mut text = String::new();
    for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
        let line = line.as_ref();
        let kept = &line[..line.floor_char_boundary(TAIL_LINE_BYTES)];
        text.push_str("\n  ");
        text.push_str(kept);
        if kept.len() < line.len() {
            text.push('…');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::MAX_MESSAGE_BYTES;

    #[test]
    fn lines_are_read_as_they_were_kept_and_foreign_ones_are_left_out() {
        let lines = [(1, "one"), (2, "a \"quoted\" word")].map(|(at_ms, text)| Line {
            at_ms,
            text: text.into(),
        });
        let bytes = to_bytes(&lines);
        assert_eq!(from_bytes(&bytes), lines);
        let cut = &bytes[..bytes.len() - 4];
        assert_eq!(from_bytes(cut), lines[..1]);
        let foreign = [b"\xff\xfe\nplain text\n".as_slice(), &bytes].concat();
        assert_eq!(from_bytes(&foreign), lines);
    }

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        for (text, kept) in [
            (
                "\u{1b}[2m12:00\u{1b}[0m \u{1b}[1;31mbad\u{1b}[K",
                "12:00 bad",
            ),
            ("a\tb\r\n", "a b"),
            ("ring \u{7} \u{9b}31m", "ring \u{fffd} \u{fffd}31m"),
            ("\u{1b}", ""),
            ("\u{1b}[", ""),
        ] {
            assert_eq!(plain(text), kept, "{text:?}");
        }
        assert_eq!(plain(&"ü".repeat(LINE_BYTES)).len(), LINE_BYTES);
    }

    #[test]
    fn a_tail_has_the_last_lines_and_a_bound() {
        let many: Vec<String> = (0..500).map(|n| n.to_string()).collect();
        let text = tail(&many);
        assert_eq!(text.lines().skip(1).count(), TAIL_LINES);
        assert!(text.starts_with("\n  300\n") && text.ends_with("\n  499"));
        let long = vec!["ü".repeat(LINE_BYTES); TAIL_LINES];
        let text = tail(&long);
        assert_eq!(text.lines().skip(1).count(), TAIL_LINES);
        assert!(text.ends_with("ü…"));
        assert_eq!(text.len(), TAIL_BYTES);
        // A status tells of twenty failures.
        const { assert!(20 * TAIL_BYTES < MAX_MESSAGE_BYTES) };
        assert_eq!(tail::<&str>(&[]), "");
    }
}
