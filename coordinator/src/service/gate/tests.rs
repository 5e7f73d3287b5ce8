use super::*;

const FRIEND: &str = "10.0.0.1:4000";
const CROWD: &str = "10.0.0.2:4000";

fn limits() -> Limits {
    Limits {
        members: 2,
        strangers: 4,
        patience: Duration::from_secs(10),
        grace: 3,
        silent_grace: 1,
        failures: 5,
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

#[test]
fn a_stranger_becomes_a_member_or_is_gone() {
    let book = Book::new(limits(), Metrics::default());
    let (one, _) = book.enter(address(FRIEND)).expect("comes in");
    let (two, _) = book.enter(address(FRIEND)).expect("comes in");
    assert_eq!(book.count(), (2, 0));
    one.prove().expect("there is a place");
    one.prove().expect("it may say so again");
    assert_eq!(book.count(), (1, 1));
    drop(two);
    assert_eq!(book.count(), (0, 1));
    drop(one);
    assert_eq!(book.count(), (0, 0));
}

#[test]
fn no_more_members_than_places() {
    let book = Book::new(limits(), Metrics::default());
    let enter = || book.enter(address(FRIEND)).expect("comes in").0;
    let inside = [enter(), enter()];
    for visit in &inside {
        visit.prove().expect("there is a place");
    }
    let third = enter();
    let full = third.prove().expect_err("it is full").to_string();
    assert!(full.contains("serves 2 connections already"), "{full}");
    drop(inside);
    third.prove().expect("there is a place again");
}

#[test]
fn whoever_stands_longest_in_the_largest_crowd_makes_room() {
    let book = Book::new(limits(), Metrics::default());
    let (friend, mut friends) = book.enter(address(FRIEND)).expect("comes in");
    let mut crowd: Vec<_> = (0..3).filter_map(|_| book.enter(address(CROWD))).collect();
    assert!(!book.make_room(), "all have only just come");
    friend.spoke();
    crowd.iter().for_each(|(visit, _)| visit.spoke());
    (0..3).for_each(|_| book.look());
    assert!(!book.make_room(), "their grace is not over");
    book.look();
    assert!(book.make_room());
    assert!(friends.try_recv().is_err(), "the friend may stay");
    crowd[0]
        .1
        .try_recv()
        .expect("the first of the crowd has to go");
    assert!(crowd[1].1.try_recv().is_err());
    assert_eq!(book.count(), (3, 0));
}

#[test]
fn whoever_says_nothing_makes_room_first_and_sooner() {
    let book = Book::new(limits(), Metrics::default());
    let mut crowd: Vec<_> = (0..4).filter_map(|_| book.enter(address(CROWD))).collect();
    for spoken in [0, 1, 3] {
        crowd[spoken].0.spoke();
    }
    book.look();
    assert!(!book.make_room(), "even its grace is not over");
    book.look();
    assert!(book.make_room());
    crowd[2].1.try_recv().expect("the silent one has to go");
    crowd.push(book.enter(address(CROWD)).expect("comes in"));
    assert!(!book.make_room(), "the grace of those that spoke goes on");
    (0..2).for_each(|_| book.look());
    assert!(book.make_room());
    crowd[4].1.try_recv().expect("silent again");
    crowd.push(book.enter(address(FRIEND)).expect("comes in"));
    assert!(book.make_room(), "now the oldest has to go");
    crowd[0].1.try_recv().expect("the oldest");
}

#[test]
fn in_a_crowd_of_many_addresses_the_silent_make_room_as_soon() {
    let book = Book::new(limits(), Metrics::default());
    let one_each = (1..=3).map(|host| address(&format!("10.0.1.{host}:1")));
    let mut visits: Vec<_> = one_each.filter_map(|peer| book.enter(peer)).collect();
    (0..2).for_each(|_| book.look());
    // The last to come has the highest address, and no crowd is larger than another.
    visits.push(book.enter(address("10.0.2.1:1")).expect("comes in"));
    assert!(book.make_room(), "three have been silent for long enough");
    visits[0]
        .1
        .try_recv()
        .expect("the oldest of them has to go");
    // Two young ones are the largest crowd now.
    visits.push(book.enter(address("10.0.2.1:1")).expect("comes in"));
    assert!(book.make_room(), "two have been silent for long enough");
    visits[1].1.try_recv().expect("the oldest of them");
}

#[test]
fn few_open_files_are_shared_out() {
    let many = Limits::with_files(1 << 20).expect("enough");
    assert_eq!((many.members, many.strangers), (MAX_MEMBERS, STRANGERS));
    let usual = Limits::with_files(4096).expect("enough");
    assert_eq!((usual.members, usual.strangers), (2560, STRANGERS));
    let few = Limits::with_files(1024).expect("enough");
    assert_eq!((few.members, few.strangers), (512, 256));
    let fewest = Limits::with_files(FEWEST_FILES).expect("enough");
    assert_eq!((fewest.members, fewest.strangers), (128, 64));
    assert!(Limits::with_files(FEWEST_FILES - 1).is_none());
}

#[test]
fn only_so_many_may_be_on_their_way_out() {
    let places = LEAVING + 2;
    let book = Book::new(
        Limits {
            strangers: places,
            ..limits()
        },
        Metrics::default(),
    );
    let mut visits: Vec<_> = (0..places)
        .filter_map(|_| book.enter(address(CROWD)))
        .collect();
    (0..4).for_each(|_| book.look());
    for _ in 0..LEAVING {
        assert!(book.make_room());
        visits.push(book.enter(address(CROWD)).expect("comes in"));
    }
    assert!(!book.make_room(), "they are still there");
    let (stranger, _) = visits.remove(0);
    drop(stranger);
    assert!(book.make_room(), "one is gone");
    visits.push(book.enter(address(FRIEND)).expect("comes in"));
    assert!(!book.make_room());
    // It showed the token in that very moment.
    visits[0].0.prove().expect("there is a place");
    assert!(book.make_room(), "one has become a member");
    drop(visits);
    assert_eq!(book.count(), (0, 0));
}

/// Ends a test that would wait for ever.
async fn soon<T>(waiting: impl Future<Output = T>) -> T {
    let longest = Duration::from_secs(120);
    let waited = tokio::time::timeout(longest, waiting).await;
    waited.expect("it ends of itself, long before")
}

/// A stranger that has connected, and the guest that it is to the service.
async fn stranger(limits: Limits) -> (Book, TcpStream, Guest) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let place = listener.local_addr().expect("an address");
    let stranger = soon(TcpStream::connect(place)).await.expect("let in");
    let (stream, peer) = soon(listener.accept()).await.expect("accepted");
    let book = Book::new(limits, Metrics::default());
    let (visit, dismissed) = book.enter(peer).expect("comes in");
    let patience = Patience::new(limits.patience, dismissed);
    let guest = Guest::new(Io::Plain(stream), visit, patience);
    (book, stranger, guest)
}

/// Only reading used to be watched, and whoever takes no answers is not read from.
#[tokio::test]
async fn a_stranger_that_takes_no_answers_is_hung_up_on_in_time() {
    use tokio::io::AsyncWriteExt as _;

    let (_book, _stranger, mut guest) = stranger(Limits {
        patience: Duration::from_millis(100),
        ..limits()
    })
    .await;
    // More than any socket's buffers hold.
    let answer = vec![0; 256 << 20];
    let error = soon(guest.write_all(&answer)).await;
    let error = error.expect_err("it is not taken");
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    let error = soon(guest.flush()).await;
    let error = error.expect_err("it has to go for good");
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}

#[tokio::test]
async fn a_stranger_that_was_sent_away_gets_no_further_word() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let (book, _stranger, mut guest) = stranger(Limits {
        strangers: 1,
        patience: Duration::from_secs(3600),
        ..limits()
    })
    .await;
    (0..5).for_each(|_| book.look());
    assert!(book.make_room());
    let mut heard = [0; 1];
    let read = soon(guest.read(&mut heard)).await;
    read.expect_err("it has to go");
    let written = soon(guest.write_all(b"more")).await;
    written.expect_err("and stays gone");
}

#[tokio::test]
async fn a_fleet_that_calls_at_once_waits_in_the_queue() {
    let Door { listener, .. } = Door::bind("localhost:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    // Nobody accepts before all are connected: as many as every kernel of the last years queues.
    let mut callers = Vec::new();
    for _ in 0..1000 {
        callers.push(soon(TcpStream::connect(address)).await.expect("a place"));
    }
    for _ in &callers {
        soon(listener.accept()).await.expect("a caller");
    }
}

#[test]
fn an_address_that_fails_too_often_waits_for_the_next_window_and_no_other_does() {
    let metrics = Metrics::default();
    let book = Book::new(limits(), metrics.clone());
    for _ in 0..5 {
        drop(book.enter(address(CROWD)).expect("comes in"));
    }
    assert!(book.enter(address(CROWD)).is_none());
    let mut counted = String::new();
    metrics.write(&mut counted).expect("a string takes it");
    assert!(
        counted.contains("connections_turned_away_total{said=\"something\"} 6"),
        "{counted}"
    );
    assert!(book.enter(address(FRIEND)).is_some());
    (0..WINDOW).for_each(|_| book.look());
    assert!(book.enter(address(CROWD)).is_some());
    for here in ["127.0.0.1:1", "[::1]:1"] {
        (0..9).for_each(|_| drop(book.enter(address(here)).expect("comes in")));
    }
    for host in 1..=5 {
        let neighbour = format!("[2001:db8::{host}]:1");
        drop(book.enter(address(&neighbour)).expect("comes in"));
    }
    assert!(
        book.enter(address("[2001:db8::77]:1")).is_none(),
        "one network"
    );
    assert!(
        book.enter(address("[2001:db8:0:1::1]:1")).is_some(),
        "another"
    );
}
