//! Parsers of bytes that others may have written, fed with what nobody should write: recipes, join strings, users' files, every
//! kind of object in the store, the messages of both wires, what Slurm answers and what the page is asked. The greetings of
//! a ring of engines are fed by the engine's own tests, since nothing here links libtorch; TLS and HTTP/2 are libraries'.
//!
//! Valid inputs are taken from the repository and from a run of the engine's stand-in, then changed at random: bits,
//! numbers, lengths, pieces of other inputs. What comes back does not matter. A panic does, and so does memory that a few
//! bytes asked for. A [`Target`] is a function of bytes, so that an engine that is guided by coverage can call it as well.

mod corpus;
mod inside;
mod messages;
mod mutate;
mod targets;

pub use self::corpus::Corpus;
pub use self::mutate::mutate;

/// A parser, with inputs that it accepts.
pub struct Target {
    /// For people and `--target`.
    pub name: &'static str,
    /// Inputs to begin with.
    pub seeds: Vec<Vec<u8>>,
    /// Most memory that it may take for one input, in MiB.
    pub memory_mib: f64,
    /// Parses, and throws away what comes of it.
    pub parse: Parse,
}

/// A parser that keeps nothing.
pub type Parse = Box<dyn Fn(&[u8])>;

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} seeds)", self.name, self.seeds.len())
    }
}

/// All targets, with seeds from `corpus`.
///
/// # Errors
/// When the corpus lacks what a target begins with.
pub fn targets(corpus: &Corpus) -> anyhow::Result<Vec<Target>> {
    let mut all = targets::texts(corpus)?;
    all.extend(targets::files(corpus)?);
    all.extend(targets::stored(corpus)?);
    all.extend(targets::wires());
    all.extend(inside::sockets());
    all.extend(inside::caches(corpus)?);
    all.extend(inside::answers()?);
    for target in &all {
        anyhow::ensure!(!target.seeds.is_empty(), "{} has no seed", target.name);
    }
    Ok(all)
}
