//! Reads Rust source as the laws need it: words, paths, texts and comments, each with its line.
//!
//! A small tokenizer rather than a parser: it needs no dependency, cannot disagree with the compiler about versions,
//! and what it must get right (strings, characters, lifetimes, nested comments, `use` trees) fits on two screens.
//! It does not see through renaming imports; clippy and the compiler do.

use std::iter::Peekable;
use std::slice::Iter;

/// The smallest piece that a law can speak about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Token {
    /// An identifier or keyword, without `r#`.
    Word(String),
    /// What stands between the quotes of a string literal.
    Text(String),
    /// A comment with its slashes.
    Comment(String),
    /// Any other character that is not white space.
    Mark(char),
}

/// A token and the line, from 1, on which it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Located {
    pub(crate) token: Token,
    pub(crate) line: usize,
}

impl Located {
    pub(crate) fn is_mark(&self, mark: char) -> bool {
        self.token == Token::Mark(mark)
    }

    pub(crate) fn is_word(&self, word: &str) -> bool {
        self.word() == Some(word)
    }

    pub(crate) fn word(&self) -> Option<&str> {
        match &self.token {
            Token::Word(word) => Some(word),
            Token::Text(_) | Token::Comment(_) | Token::Mark(_) => None,
        }
    }
}

/// `a::b::c`, from a `use` (one per leaf of its tree) or from anywhere else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Path {
    pub(crate) words: Vec<String>,
    pub(crate) line: usize,
    pub(crate) imported: bool,
}

impl Path {
    /// Whether `part`, such as `Instant::now`, is a run of this path's words.
    pub(crate) fn contains(&self, part: &str) -> bool {
        let part: Vec<&str> = part.split("::").collect();
        self.words.windows(part.len()).any(|run| run == part)
    }

    /// The path as it would be written.
    pub(crate) fn text(&self) -> String {
        self.words.join("::")
    }
}

/// All tokens of a source text, comments included.
pub(crate) fn tokens(source: &str) -> Vec<Located> {
    let chars: Vec<char> = source.chars().collect();
    let mut found = Vec::new();
    let (mut at, mut line) = (0, 1);
    while at < chars.len() {
        let (end, token) = next_token(&chars, at);
        if let Some(token) = token {
            found.push(Located { token, line });
        }
        line += chars[at..end].iter().filter(|c| **c == '\n').count();
        at = end;
    }
    found
}

/// The end of what begins at `at`, and the token that it is, if it is one.
fn next_token(chars: &[char], at: usize) -> (usize, Option<Token>) {
    let next = chars.get(at + 1).copied();
    match chars[at] {
        space if space.is_whitespace() => (at + 1, None),
        '/' if next == Some('/') => {
            let end = find(chars, at, |c| c == '\n');
            (end, Some(Token::Comment(chars[at..end].iter().collect())))
        }
        '/' if next == Some('*') => {
            let end = end_of_block_comment(chars, at);
            (end, Some(Token::Comment(chars[at..end].iter().collect())))
        }
        '"' => quoted(chars, at + 1),
        '\'' => (end_of_character_or_lifetime(chars, at), None),
        digit if digit.is_ascii_digit() => (find(chars, at, |c| !is_word_char(c)), None),
        letter if is_word_char(letter) => word_or_prefixed_text(chars, at),
        mark => (at + 1, Some(Token::Mark(mark))),
    }
}

fn is_word_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The first position from `from` on where `stop` holds, or the end.
fn find(chars: &[char], from: usize, stop: impl Fn(char) -> bool) -> usize {
    (from..chars.len())
        .find(|at| stop(chars[*at]))
        .unwrap_or(chars.len())
}

fn end_of_block_comment(chars: &[char], start: usize) -> usize {
    let (mut at, mut depth) = (start + 2, 1);
    while at < chars.len() && depth > 0 {
        match chars[at..] {
            ['/', '*', ..] => (at, depth) = (at + 2, depth + 1),
            ['*', '/', ..] => (at, depth) = (at + 2, depth - 1),
            _ => at += 1,
        }
    }
    at
}

/// A text whose first character, after the quote, is at `start`.
fn quoted(chars: &[char], start: usize) -> (usize, Option<Token>) {
    let mut at = start;
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    let end = at.min(chars.len());
    let text = chars[start..end].iter().collect();
    ((end + 1).min(chars.len()), Some(Token::Text(text)))
}

/// A raw text whose first `#` or quote is at `start`.
fn raw_quoted(chars: &[char], start: usize) -> (usize, Option<Token>) {
    let quote = find(chars, start, |c| c != '#');
    let hashes = quote - start;
    let closes = |at: &usize| {
        chars[*at] == '"' && chars[at + 1..].iter().take_while(|c| **c == '#').count() >= hashes
    };
    let end = (quote + 1..chars.len()).find(closes).unwrap_or(chars.len());
    let text = chars[(quote + 1).min(end)..end].iter().collect();
    ((end + 1 + hashes).min(chars.len()), Some(Token::Text(text)))
}

/// `'x'` and `'\u{1F600}'` are characters; `'a` without a closing quote is a lifetime.
fn end_of_character_or_lifetime(chars: &[char], start: usize) -> usize {
    match chars[start + 1..] {
        ['\\', _, ..] => (find(chars, start + 3, |c| c == '\'') + 1).min(chars.len()),
        [_, '\'', ..] => start + 3,
        _ => find(chars, start + 1, |c| !is_word_char(c)).max(start + 1),
    }
}

/// A word; or, after `r`, `b`, `c`, `br` and `cr`, a text or a byte; or, after `r#`, a raw identifier.
fn word_or_prefixed_text(chars: &[char], at: usize) -> (usize, Option<Token>) {
    let end = find(chars, at, |c| !is_word_char(c));
    let word: String = chars[at..end].iter().collect();
    let quote = chars.get(find(chars, end, |c| c != '#')) == Some(&'"');
    match (word.as_str(), chars.get(end)) {
        ("b" | "c", Some('"')) => quoted(chars, end + 1),
        ("b", Some('\'')) => (end_of_character_or_lifetime(chars, end), None),
        ("r" | "br" | "cr", Some('"' | '#')) if quote => raw_quoted(chars, end),
        ("r", Some('#')) => word_or_prefixed_text(chars, end + 1),
        _ => (end, Some(Token::Word(word))),
    }
}

/// The tokens without comments and without what stands under `#[cfg(test)]`.
pub(crate) fn shipped(tokens: &[Located]) -> Vec<Located> {
    let code: Vec<Located> = tokens
        .iter()
        .filter(|located| !matches!(located.token, Token::Comment(_)))
        .cloned()
        .collect();
    let mut kept = Vec::new();
    let mut at = 0;
    while at < code.len() {
        if is_test_attribute(&code[at..]) {
            at = end_of_item(&code, at + TEST_ATTRIBUTE.len());
        } else {
            kept.push(code[at].clone());
            at += 1;
        }
    }
    kept
}

const TEST_ATTRIBUTE: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];

fn is_test_attribute(code: &[Located]) -> bool {
    let same = |(located, expected): (&Located, &&str)| match &located.token {
        Token::Word(word) => word == expected,
        Token::Mark(mark) => mark.to_string() == **expected,
        Token::Text(_) | Token::Comment(_) => false,
    };
    code.len() >= TEST_ATTRIBUTE.len() && code.iter().zip(&TEST_ATTRIBUTE).all(same)
}

/// An item ends at its semicolon, or with its braces.
fn end_of_item(code: &[Located], start: usize) -> usize {
    let mut depth = 0_usize;
    for (at, located) in code.iter().enumerate().skip(start) {
        match located.token {
            Token::Mark('{' | '(' | '[') => depth += 1,
            Token::Mark(')' | ']') => depth = depth.saturating_sub(1),
            Token::Mark('}') if depth <= 1 => return at + 1,
            Token::Mark('}') => depth -= 1,
            Token::Mark(';') if depth == 0 => return at + 1,
            _ => {}
        }
    }
    code.len()
}

/// All paths, single words included, with every `use` tree written out.
pub(crate) fn paths(code: &[Located]) -> Vec<Path> {
    let mut found = Vec::new();
    let mut rest = code.iter().peekable();
    while let Some(located) = rest.next() {
        let Some(word) = located.word() else { continue };
        // `impl Trait + use<'a>` imports nothing.
        if word == "use" && !rest.peek().is_some_and(|next| next.is_mark('<')) {
            import(&mut rest, Vec::new(), &mut found);
        } else {
            let mut words = vec![word.to_owned()];
            while let Some(next) = segment_after(&mut rest) {
                words.push(next);
            }
            found.push(Path {
                words,
                line: located.line,
                imported: false,
            });
        }
    }
    found
}

/// Takes `::word`. Anything else is left, but for the `::` of `::<`.
fn segment_after(rest: &mut Peekable<Iter<'_, Located>>) -> Option<String> {
    let mut ahead = rest.clone();
    if !(ahead.next()?.is_mark(':') && ahead.next()?.is_mark(':')) {
        return None;
    }
    let word = ahead.next()?.word()?.to_owned();
    *rest = ahead;
    Some(word)
}

/// Takes one `use` tree up to the mark that ends it, and finds one path per leaf.
fn import(rest: &mut Peekable<Iter<'_, Located>>, mut words: Vec<String>, found: &mut Vec<Path>) {
    let mut line = rest.peek().map_or(0, |located| located.line);
    let mut renamed = false;
    let mut grouped = false;
    while let Some(located) = rest.peek() {
        match &located.token {
            Token::Mark(',' | '}' | ';') => break,
            Token::Word(word) if word == "as" => renamed = true,
            Token::Word(word) if !renamed => {
                line = located.line;
                words.push(word.clone());
            }
            Token::Mark('{') => {
                grouped = true;
                import_group(rest, &words, found);
                continue;
            }
            _ => {}
        }
        rest.next();
    }
    if !grouped && !words.is_empty() {
        found.push(Path {
            words,
            line,
            imported: true,
        });
    }
}

fn import_group(rest: &mut Peekable<Iter<'_, Located>>, words: &[String], found: &mut Vec<Path>) {
    rest.next(); // the opening brace
    while let Some(located) = rest.peek() {
        if located.is_mark('}') {
            rest.next();
            return;
        }
        if located.is_mark(',') {
            rest.next();
            continue;
        }
        if located.is_mark(';') {
            return; // not Rust; whoever wrote it hears of it from the compiler
        }
        import(rest, words.to_vec(), found);
    }
}
