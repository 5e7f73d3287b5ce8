//! Errands that go wrong.

use super::super::Input;
use super::*;

/// The stage waited for ever.
#[tokio::test]
async fn an_errand_that_panics_says_so() {
    let dataset = Dataset {
        digest: Digest::of(b"rows"),
        reused_from: None,
    };
    let errands = Errands::new(Store::in_memory(), Plan { stages: vec![] }, dataset);
    let (inputs, mut told) = tokio::sync::mpsc::channel(1);
    // There is no stage 7 to look at.
    errands.seal(7, BTreeMap::new(), 0, Handle { inputs });
    let Some(Input::Event(Event::Sealed { stage: 7, result })) = told.recv().await else {
        panic!("it reports");
    };
    let Err(Trouble::Permanent(what)) = result else {
        panic!("nothing was sealed");
    };
    assert!(
        what.contains("a bug of its own: index out of bounds"),
        "{what}"
    );
}
