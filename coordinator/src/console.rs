//! What people and programs are told: results on standard output, everything else on standard error.
//!
//! Whoever reads may stop reading at any time (`… | head -1`). That ends no command and changes no exit code: what
//! nobody reads is dropped. The macros of `std` would panic, so the lints refuse them in this crate.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};

/// Writes a line of results to standard output.
///
/// # Errors
///
/// Results that cannot be written, on a full disk say. A reader that is gone is no error.
pub fn result(line: impl Display) -> io::Result<()> {
    write_to(&mut io::stdout().lock(), format!("{line}\n").as_bytes())
}

/// Writes a line about what happens to standard error. When that cannot be written there is nobody left to tell.
pub fn note(line: impl Display) {
    draw(format_args!("{line}\n"));
}

/// Writes `text` to standard error as it stands, without ending the line.
pub fn draw(text: impl Display) {
    let _ = write_to(&mut io::stderr().lock(), text.to_string().as_bytes());
}

fn write_to(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        ended => ended,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader that answers every write with one kind of error.
    struct Reader(ErrorKind);

    impl Write for Reader {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_is_gone_is_no_error_and_a_full_disk_is_one() {
        let gone = write_to(&mut Reader(ErrorKind::BrokenPipe), b"x");
        assert!(gone.is_ok());
        let full = write_to(&mut Reader(ErrorKind::StorageFull), b"x");
        assert_eq!(full.map_err(|e| e.kind()), Err(ErrorKind::StorageFull));
    }
}
