//! What the journal promises, on a store in memory.

use distillery_common::ids::{Generation, Incarnation};
use distillery_common::task::FailureClass;

use super::*;

const SPENT: Spent = Spent {
    elapsed: std::time::Duration::from_millis(1500),
    peak_bytes: Some(20 << 20),
};

fn started(stage: &str) -> Record {
    Record::StageStarted {
        stage: stage.into(),
    }
}

async fn claim(store: &Store, writer: u128) -> Journal {
    Journal::claim(store, "a:1", Uuid::from_u128(writer), SPENT)
        .await
        .expect("a run can always be claimed")
}

#[tokio::test]
async fn what_was_appended_is_read_back_in_order() {
    let store = Store::in_memory();
    let mut journal = claim(&store, 1).await;
    assert_eq!(journal.durable().term, Term(1));
    journal
        .append(&[started("x"), started("y")], SPENT)
        .await
        .expect("nobody else is there");
    journal.append(&[], SPENT).await.expect("nothing to do");
    let read = read(&store).await.expect("readable");
    assert_eq!(read, journal.folded);
    assert_eq!(read.next, 2);
    let records = records(&store).await.expect("readable");
    assert_eq!(records[1..], [started("x"), started("y")]);
}

#[tokio::test]
async fn only_the_higher_term_writes() {
    let store = Store::in_memory();
    let mut old = claim(&store, 1).await;
    let mut new = claim(&store, 2).await;
    assert_eq!((old.term(), new.term()), (Term(1), Term(2)));
    let fenced = old
        .append(&[started("x")], SPENT)
        .await
        .expect_err("fenced");
    assert!(matches!(fenced, Error::Fenced { by: Term(2) }), "{fenced}");
    new.append(&[started("y")], SPENT)
        .await
        .expect("it has the run");
    let again = old
        .append(&[started("x")], SPENT)
        .await
        .expect_err("still fenced");
    assert!(matches!(again, Error::Fenced { .. }), "{again}");
    let records = records(&store).await.expect("readable");
    assert_eq!(records.last(), Some(&started("y")));
    assert!(!records.contains(&started("x")));
}

#[tokio::test]
async fn whoever_was_replaced_can_see_it_without_writing() {
    let store = Store::in_memory();
    let mut old = claim(&store, 1).await;
    let look = old.lookout();
    assert_eq!(look.successor().await.expect("readable"), None);
    old.append(&[started("x")], SPENT).await.expect("it has it");
    let own = look.successor().await.expect("readable");
    assert_eq!(own, None, "what it wrote itself meanwhile is no successor");
    let look = old.lookout();
    let new = claim(&store, 2).await;
    assert_eq!(look.successor().await.expect("readable"), Some(new.term()));
    assert_eq!(new.lookout().successor().await.expect("readable"), None);
}

#[tokio::test]
async fn claims_at_the_same_moment_get_different_terms() {
    let store = Store::in_memory();
    let claims = (1..=8).map(|n| {
        let store = store.clone();
        async move { claim(&store, n).await.term() }
    });
    let mut terms = futures::future::join_all(claims).await;
    terms.sort();
    assert_eq!(terms, (1..=8).map(Term).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_snapshot_spares_reading_from_the_beginning_and_changes_nothing() {
    let store = Store::in_memory();
    let mut journal = claim(&store, 1).await;
    for n in 1..SNAPSHOT_EVERY + 10 {
        let stage = format!("s{}", n % 7);
        let records = match n % 3 {
            0 => vec![started(&stage)],
            1 => vec![Record::GenerationFormed {
                generation: Generation(n),
                stage,
                members: vec![Incarnation(n), Incarnation(n + 1)],
                base_step: n,
                base: Some(format!("base-{n}")),
            }],
            _ => vec![Record::TaskFailedCounted {
                stage,
                index: n,
                class: FailureClass::Io,
                message: "slow disk".into(),
            }],
        };
        journal.append(&records, SPENT).await.expect("ours");
    }
    let from_snapshot = read(&store).await.expect("readable");
    assert_eq!(from_snapshot, journal.folded);
    let from_the_beginning = records(&store).await.expect("readable");
    let replayed = Durable::replay(&from_the_beginning);
    assert_eq!(from_snapshot.durable, replayed, "I7");
    let key = layout::journal_snapshot(SNAPSHOT_EVERY);
    let bytes = store.get(&key).await.expect("it is there");
    let parsed = snapshot::parse(&bytes).expect("whole");
    assert_eq!(snapshot::write(&parsed), bytes, "the bytes are canonical");

    let segment = layout::journal_segment(3);
    store.delete(&segment).await.expect("deleted");
    let gap = read(&store).await.expect_err("a hole is a hole");
    assert!(matches!(gap, Error::Gap { seq: 3 }), "{gap}");
}

/// A folder that is listed while others create in it may show a segment without the one before.
#[tokio::test]
async fn a_listing_that_misses_a_segment_is_no_hole() {
    let store = Store::in_memory();
    let mut journal = claim(&store, 1).await;
    for stage in ["x", "y", "z"] {
        journal
            .append(&[started(stage)], SPENT)
            .await
            .expect("ours");
    }
    let seen = |listed: &[u64]| listed.iter().copied().collect::<BTreeSet<u64>>();
    for listed in [&[0, 1, 2, 3][..], &[0, 3], &[3]] {
        assert_eq!(count(&store, &seen(listed)).await.expect("no hole"), 4);
    }
    let hole = count(&store, &seen(&[0, u64::MAX])).await;
    assert!(matches!(hole, Err(Error::Gap { seq: 4 })), "{hole:?}");
}

#[tokio::test]
async fn a_snapshot_of_segments_that_are_gone_is_not_passed_over() {
    let store = Store::in_memory();
    let mut journal = claim(&store, 1).await.with_snapshots_every(3);
    for stage in ["x", "y", "z"] {
        journal
            .append(&[started(stage)], SPENT)
            .await
            .expect("ours");
    }
    assert_eq!(read(&store).await.expect("whole"), journal.folded);
    for seq in [3, 2] {
        let segment = layout::journal_segment(seq);
        store.delete(&segment).await.expect("deleted");
    }
    let lost = read(&store).await.expect_err("two segments were lost");
    let expected = "3 journal segments come to, of which 2 are there";
    assert!(lost.to_string().contains(expected), "{lost}");
}

#[tokio::test]
async fn a_segment_that_somebody_put_there_is_refused_with_what_to_do() {
    let claimed = |term| Record::TermClaimed {
        term: Term(term),
        endpoint: "b:1".into(),
    };
    let foreign = [
        (1, "other", vec![started("y")], "did not claim term 1"),
        (1, "other", vec![claimed(1)], "did not claim term 1"),
        (2, "other", vec![started("y")], "the claim of its term 2"),
        (2, "other", vec![claimed(3)], "the claim of its term 2"),
        (0, "other", vec![], "term 0 and comes after term 1"),
    ];
    for (term, writer, records, says) in foreign {
        let store = Store::in_memory();
        let mut journal = claim(&store, 1).await.with_snapshots_every(2);
        journal.append(&[started("x")], SPENT).await.expect("ours");
        let body = stored::write(Term(term), writer, SPENT, &records);
        let key = layout::journal_segment(2);
        store.create(&key, body.into()).await.expect("created");
        let refused = read(&store).await.expect_err("it is not ours").to_string();
        for part in ["segment 2", says, "move it away"] {
            assert!(refused.contains(part), "{part} is not in {refused}");
        }
    }
}

#[tokio::test]
async fn a_damaged_snapshot_is_passed_over() {
    let store = Store::in_memory();
    let mut journal = claim(&store, 1).await;
    journal.append(&[started("x")], SPENT).await.expect("ours");
    let mut ahead = journal.folded.clone();
    ahead.durable.endpoint = "a lie".into();
    for (seq, bytes) in [
        (0, Bytes::from_static(b"{}")),
        (1, snapshot::write(&ahead)),
        (9, snapshot::write(&ahead)),
    ] {
        let key = layout::journal_snapshot(seq);
        store.create(&key, bytes).await.expect("created");
    }
    let read = read(&store).await.expect("readable");
    assert_eq!(read, journal.folded);
}
