//! What programs that are started here are not handed on: variables that hold the run's token.
//!
//! A recipe may take its token from a variable of any name, so values are looked at, not names. What a store's credentials
//! stand in is left alone: workers need it.

use std::ffi::{OsStr, OsString};

use distillery_common::security::Token;

/// Names of this process's variables whose value holds `token`.
pub(super) fn telling(token: &Token) -> Vec<OsString> {
    of(std::env::vars_os(), token)
}

fn of(variables: impl Iterator<Item = (OsString, OsString)>, token: &Token) -> Vec<OsString> {
    let token = token.reveal();
    variables
        .filter(|(_, value)| holds(value, &token))
        .map(|(name, _)| name)
        .collect()
}

/// Hexadecimal digits are the same number in capitals.
fn holds(value: &OsStr, token: &str) -> bool {
    let value = value.to_string_lossy().to_ascii_lowercase();
    value.contains(&token.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_holds_the_token_is_found_by_its_value() {
        let token = Token::generate().expect("random");
        let other = Token::generate().expect("random").reveal();
        let (plain, capitals) = (token.reveal(), token.reveal().to_uppercase());
        let variables = [
            ("OF_THE_TEAM", plain.clone()),
            ("CAPITALS", capitals),
            ("DISTILLERY_JOIN", format!("https://host:1/run#{plain}")),
            ("LINES", format!("\n {plain} \n")),
            ("AWS_SECRET_ACCESS_KEY", other),
            ("HALF", plain[..32].to_owned()),
            ("PATH", "/usr/bin".to_owned()),
        ];
        let variables = variables
            .into_iter()
            .map(|(name, value)| (OsString::from(name), OsString::from(value)));
        let found = of(variables, &token);
        let expected = ["OF_THE_TEAM", "CAPITALS", "DISTILLERY_JOIN", "LINES"];
        assert_eq!(found, expected.map(OsString::from));
    }
}
