mod fixed;
pub(crate) mod nccl;
mod seats;

use std::io::{Read as _, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use distillery_common::group::GroupId;
use distillery_common::ids::Generation;
use tch::{Device, Kind, Tensor};

use super::solo::Solo;
use super::tcp::{Listener, TcpRing};
use super::{Collective, Error, Invitation, LONGEST_TEXT, Parts};

const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn group(generation: u64) -> GroupId {
    GroupId {
        stage: "seg8".to_owned(),
        generation: Generation(generation),
    }
}

fn listeners(world: u32) -> (Vec<Listener>, Vec<String>) {
    (0..world)
        .map(|_| TcpRing::listen(HOST).unwrap())
        .map(|(listener, address)| (listener, address.to_string()))
        .unzip()
}

/// Runs `body` on each rank of a formed ring and returns what each made of it.
pub(crate) fn on_ring<T: Send>(
    world: u32,
    deadline: Duration,
    body: impl Fn(TcpRing) -> T + Sync,
) -> Vec<T> {
    let (listeners, peers) = listeners(world);
    let (peers, body) = (&peers, &body);
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..)
            .zip(listeners)
            .map(|(rank, listener)| {
                scope.spawn(move || {
                    let invitation = Invitation {
                        group: &group(1),
                        rank,
                        peers,
                        token: [7; 32],
                        deadline,
                        ended: Default::default(),
                    };
                    body(listener.connect(&invitation).unwrap())
                })
            })
            .collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

pub(crate) const PATIENT: Duration = Duration::from_secs(30);

/// Values with many magnitudes, different on every rank.
fn values(rank: u32, len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| ((i * 31 + rank as usize * 17) % 1009) as f32 * 0.37 - 100.0 / (rank + 1) as f32)
        .collect()
}

#[test]
fn a_sum_over_the_ring_is_the_sum_and_has_the_same_bits_everywhere() {
    // Shorter than the world, one piece, and several pieces with an uneven end.
    for (world, len) in [
        (1, 5),
        (2, 3),
        (3, 2),
        (2, 100_003),
        (3, 70_001),
        (4, 150_001),
    ] {
        let sums = on_ring(world, PATIENT, |mut ring| {
            let mut flat = Tensor::from_slice(&values(ring.rank(), len));
            ring.all_reduce_sum(&mut flat).unwrap();
            // A second sum on the same ring starts clean.
            let mut ones = Tensor::ones([7], (Kind::Float, Device::Cpu));
            ring.all_reduce_sum(&mut ones).unwrap();
            assert_eq!(ones.double_value(&[6]), f64::from(world));
            Vec::<f32>::try_from(flat).unwrap()
        });
        assert_eq!(sums[0].len(), len);
        for (i, &sum) in sums[0].iter().enumerate().take(502) {
            let exact: f64 = (0..world).map(|r| f64::from(values(r, len)[i])).sum();
            assert!((f64::from(sum) - exact).abs() <= 1e-6 * exact.abs().max(1e3));
        }
        for other in &sums[1..] {
            assert_eq!(bits(&sums[0]), bits(other));
        }
        if world > 1 && len > 4 {
            let again = on_ring(world, PATIENT, |mut ring| {
                let mut flat = Tensor::from_slice(&values(ring.rank(), len));
                ring.all_reduce_sum(&mut flat).unwrap();
                Vec::<f32>::try_from(flat).unwrap()
            });
            assert_eq!(bits(&sums[0]), bits(&again[0]));
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_sum_in_two_halves_has_the_bits_of_the_whole() {
    let even = [(1, 5), (2, 3), (3, 2), (2, 0), (4, 1_050_007), (3, 70_001)];
    let even = even.map(|(world, len)| Parts::even(len, world));
    let uneven = [
        vec![0, 5],
        vec![7, 7, 9],
        vec![600_000, 600_001, 600_001, 1_000_003],
    ];
    for parts in even.into_iter().chain(uneven.map(Parts::ending_at)) {
        let (world, len) = (parts.world(), parts.of(parts.world() - 1).end);
        let sums = on_ring(world, PATIENT, |mut ring| {
            let own = Tensor::from_slice(&values(ring.rank(), len));
            let mut whole = own.copy();
            ring.all_reduce_sum_in(&mut whole, &parts).unwrap();
            let mut halves = own.copy();
            ring.reduce_scatter_sum(&mut halves, &parts).unwrap();
            let own = parts.of(ring.rank());
            let at = |flat: &Tensor| bits(&Vec::<f32>::try_from(flat).unwrap()[own.clone()]);
            assert_eq!(at(&whole), at(&halves));
            ring.all_gather(&mut halves, &parts).unwrap();
            let all = |flat| bits(&Vec::<f32>::try_from(flat).unwrap());
            assert_eq!(all(&whole), all(&halves));
            all(&whole)
        });
        let addends: Vec<Vec<f32>> = (0..world).map(|rank| values(rank, len)).collect();
        for (i, &sum) in sums[0].iter().enumerate().step_by(997) {
            let exact: f64 = addends.iter().map(|own| f64::from(own[i])).sum();
            let sum = f64::from(f32::from_bits(sum));
            assert!((sum - exact).abs() <= 1e-6 * exact.abs().max(1e3), "{i}");
        }
        assert!(sums.iter().all(|sum| *sum == sums[0]), "{parts:?}");
    }
}

#[test]
fn parts_cover_a_buffer_once() {
    for world in 1..6 {
        for len in 0..40 {
            let parts = Parts::even(len, world);
            assert!((0..world).flat_map(|rank| parts.of(rank)).eq(0..len));
            let longer = parts.with_tail(3);
            assert!((0..world).flat_map(|rank| longer.of(rank)).eq(0..len + 3));
            assert!((0..world - 1).all(|rank| longer.of(rank) == parts.of(rank)));
        }
    }
}

/// Ranks that cut a buffer of one length differently would add each other's parts.
#[test]
fn ranks_that_cut_differently_find_out() {
    let errors = on_ring(2, PATIENT, |mut ring| {
        let parts = Parts::ending_at(vec![4 + ring.rank() as usize, 9]);
        let mut flat = Tensor::zeros([9], (Kind::Float, Device::Cpu));
        ring.all_reduce_sum_in(&mut flat, &parts).unwrap_err()
    });
    let told = |error: &Error| matches!(error, Error::OutOfStep { .. });
    assert!(errors.iter().any(told), "{errors:?}");
}

#[test]
fn texts_are_gathered_in_rank_order() {
    let odd = on_ring(3, PATIENT, |mut ring| {
        let own = format!("rank {}!!", ring.rank());
        let all = ring.gather(own.as_bytes()).unwrap();
        assert_eq!(all, [b"rank 0!!", b"rank 1!!", b"rank 2!!"]);
        assert_eq!(ring.gather(b"").unwrap(), [b"", b"", b""]);
        assert_eq!(ring.gather(&[7; 5]).unwrap(), [[7; 5]; 3]);
        assert!(ring.gather(&vec![0; LONGEST_TEXT + 1]).is_err());
        ring.gather(&vec![1; 4 + ring.rank() as usize]).unwrap_err()
    });
    let named = |error: &Error| matches!(error, Error::OutOfStep { .. });
    assert!(odd.iter().any(named), "{odd:?}");
}

#[test]
fn a_broadcast_reaches_every_rank_from_any_root() {
    for root in 0..3 {
        let received = on_ring(3, PATIENT, |mut ring| {
            let mut flat = Tensor::from_slice(&values(ring.rank(), 40_000));
            ring.broadcast(&mut flat, root).unwrap();
            Vec::<f32>::try_from(flat).unwrap()
        });
        for flat in received {
            assert_eq!(flat, values(root, 40_000));
        }
    }
}

#[test]
fn ranks_agree_only_on_the_same_digest() {
    let same = on_ring(4, PATIENT, |mut ring| ring.agree(&[3; 32]).is_ok());
    assert_eq!(same, [true; 4]);
    let odd = on_ring(3, PATIENT, |mut ring| {
        let digest = [u8::from(ring.rank() == 1); 32];
        ring.agree(&digest).unwrap_err().to_string()
    });
    for (rank, message) in odd.iter().enumerate() {
        assert!(message.contains("different state"), "{rank}: {message}");
    }
}

#[test]
fn a_rank_that_dies_is_noticed_by_all_at_once() {
    let errors = on_ring(3, PATIENT, |mut ring| {
        if ring.rank() == 1 {
            return None;
        }
        let mut flat = Tensor::from_slice(&values(0, 1_000_000));
        Some(ring.all_reduce_sum(&mut flat).unwrap_err())
    });
    for error in errors.into_iter().flatten() {
        assert!(matches!(error, Error::PeerLost { .. }), "{error}");
    }
}

#[test]
fn a_rank_that_leaves_between_two_sums_spoils_only_the_second() {
    let seen = Barrier::new(2);
    let errors = on_ring(2, PATIENT, |mut ring| {
        let mut flat = Tensor::from_slice(&values(0, 1_000_000));
        let mut sum = |ring: &mut TcpRing| ring.all_reduce_sum(&mut flat);
        sum(&mut ring).unwrap();
        if ring.rank() == 0 {
            let error = sum(&mut ring).unwrap_err();
            seen.wait();
            return Some(error);
        }
        let held = ring.aborter();
        drop(ring);
        // Alive, and its end still in somebody's hands, until the other has noticed.
        seen.wait();
        drop(held);
        None
    });
    assert!(matches!(errors[0], Some(Error::PeerLost { .. })));
}

#[test]
fn a_rank_that_is_silent_is_given_up_after_the_deadline() {
    let given_up = Barrier::new(2);
    // The ring must form within it too.
    let errors = on_ring(2, Duration::from_secs(3), |mut ring| {
        let mut flat = Tensor::zeros([4], (Kind::Float, Device::Cpu));
        if ring.rank() == 1 {
            // Alive, connected, and doing nothing until the other has given up and left.
            given_up.wait();
            return ring.all_reduce_sum(&mut flat).unwrap_err();
        }
        let error = ring.all_reduce_sum(&mut flat).unwrap_err();
        drop(ring);
        given_up.wait();
        error
    });
    assert!(matches!(errors[0], Error::Timeout { rank: 0, peer: 1 }));
    assert!(matches!(errors[1], Error::PeerLost { .. }));
}

#[test]
fn another_thread_ends_a_waiting_sum() {
    let errors = on_ring(2, PATIENT, |mut ring| {
        let mut flat = Tensor::zeros([4], (Kind::Float, Device::Cpu));
        if ring.rank() == 1 {
            ring.aborter().abort();
            return ring.all_reduce_sum(&mut flat).unwrap_err();
        }
        ring.all_reduce_sum(&mut flat).unwrap_err()
    });
    assert!(matches!(errors[0], Error::PeerLost { .. }));
    assert!(matches!(errors[1], Error::Aborted));

    let ended = Barrier::new(2);
    let errors = on_ring(2, PATIENT, |mut ring| {
        if ring.rank() == 1 {
            // Alive and silent until the other has given up.
            ended.wait();
            let mut flat = Tensor::zeros([8], (Kind::Float, Device::Cpu));
            return ring.all_reduce_sum(&mut flat).unwrap_err();
        }
        let aborter = ring.aborter();
        thread::scope(|scope| {
            scope.spawn(move || aborter.abort());
            let mut flat = Tensor::zeros([8], (Kind::Float, Device::Cpu));
            let error = ring.all_reduce_sum(&mut flat).unwrap_err();
            ended.wait();
            error
        })
    });
    assert!(matches!(errors[0], Error::Aborted), "{}", errors[0]);
    assert!(matches!(errors[1], Error::PeerLost { .. }), "{}", errors[1]);
}

#[test]
fn ranks_that_do_different_things_find_out() {
    let errors = on_ring(2, PATIENT, |mut ring| {
        let len = 4 + i64::from(ring.rank());
        let mut flat = Tensor::zeros([len], (Kind::Float, Device::Cpu));
        ring.all_reduce_sum(&mut flat).unwrap_err()
    });
    assert!(
        errors
            .iter()
            .any(|error| matches!(error, Error::OutOfStep { .. }))
    );
}

#[test]
fn strangers_are_turned_away_and_the_ring_still_forms() {
    let (listeners, peers) = listeners(2);
    // A port scanner, a talker of something else, and a member of another ring's token.
    let mut scanner = TcpStream::connect(&peers[0]).unwrap();
    scanner.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    drop(TcpStream::connect(&peers[1]).unwrap());
    let formed = thread::scope(|scope| {
        let ranks: Vec<_> = (0..)
            .zip(listeners)
            .map(|(rank, listener)| {
                let peers = &peers;
                scope.spawn(move || {
                    let invitation = Invitation {
                        group: &group(2),
                        rank,
                        peers,
                        token: [1; 32],
                        deadline: PATIENT,
                        ended: Default::default(),
                    };
                    let mut ring = listener.connect(&invitation).unwrap();
                    ring.agree(&[0; 32]).is_ok()
                })
            })
            .collect();
        ranks
            .into_iter()
            .map(|rank| rank.join().unwrap())
            .collect::<Vec<_>>()
    });
    assert_eq!(formed, [true, true]);
}

/// Each used to be given two seconds in turn, and the wait was over after 64 of them.
#[test]
fn callers_that_say_nothing_hold_up_nobody() {
    let (listeners, peers) = listeners(2);
    // More for each than may be in the middle of their greeting, and no more than a queue in the kernel holds.
    let silent: Vec<TcpStream> = (0..200)
        .map(|at| TcpStream::connect(&peers[at % 2]).unwrap())
        .collect();
    let formed = thread::scope(|scope| {
        let ranks: Vec<_> = (0..)
            .zip(listeners)
            .map(|(rank, listener)| {
                let peers = &peers;
                scope.spawn(move || {
                    let invitation = Invitation {
                        group: &group(2),
                        rank,
                        peers,
                        token: [1; 32],
                        deadline: PATIENT,
                        ended: Default::default(),
                    };
                    let mut ring = listener.connect(&invitation).unwrap();
                    ring.agree(&[0; 32]).is_ok()
                })
            })
            .collect();
        ranks
            .into_iter()
            .map(|rank| rank.join().unwrap())
            .collect::<Vec<_>>()
    });
    assert_eq!(formed, [true, true]);
    drop(silent);
}

/// A greeting with its stage's name, as it goes over the wire.
fn read_greeting(from: &mut TcpStream) -> Vec<u8> {
    let mut bytes = vec![0; 91];
    from.read_exact(&mut bytes).unwrap();
    let stage = usize::from(u16::from_le_bytes([bytes[57], bytes[58]]));
    bytes.resize(91 + stage, 0);
    from.read_exact(&mut bytes[91..]).unwrap();
    bytes
}

/// What a listener says to whoever calls.
fn read_challenge(from: &mut TcpStream) -> [u8; 40] {
    let mut bytes = [0; 40];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

/// Sits on the way to `target`, and says there what it has heard on another connection, which it had opened before.
fn replay_on_the_way(tap: &std::net::TcpListener, target: &str) -> Vec<u8> {
    let (mut caller, _) = tap.accept().unwrap();
    let mut stranger = TcpStream::connect(target).unwrap();
    let mut relay = TcpStream::connect(target).unwrap();
    let challenges = [read_challenge(&mut stranger), read_challenge(&mut relay)];
    assert_ne!(challenges[0], challenges[1]);
    caller.write_all(&challenges[1]).unwrap();
    let greeting = read_greeting(&mut caller);
    stranger.write_all(&greeting).unwrap();
    let mut answer = Vec::new();
    // Hung up on, politely or not.
    let _ = stranger.read_to_end(&mut answer);
    assert!(answer.is_empty(), "the stranger was answered");
    relay.write_all(&greeting).unwrap();
    caller.write_all(&read_greeting(&mut relay)).unwrap();
    std::io::copy(&mut caller, &mut relay).unwrap();
    greeting
}

/// Sits on the way to `target`, hangs up on the first two callers, one of them in the middle of its greeting, and passes
/// on what the third and `target` say.
fn hang_up_on_the_way(tap: &std::net::TcpListener, target: &str) {
    drop(tap.accept().unwrap());
    let (mut second, _) = tap.accept().unwrap();
    let mut challenge = [5; 40];
    challenge[..8].copy_from_slice(b"dstring3");
    second.write_all(&challenge).unwrap();
    read_greeting(&mut second);
    drop(second);
    let (caller, _) = tap.accept().unwrap();
    let relay = TcpStream::connect(target).unwrap();
    let pass = |mut from: &TcpStream, mut to: &TcpStream| {
        // Whoever leaves may do so in any way.
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Write);
    };
    thread::scope(|scope| {
        scope.spawn(|| pass(&relay, &caller));
        pass(&caller, &relay);
    });
}

/// A listener whose places are taken by strangers hangs up on whoever has waited longest, which may be the neighbour.
#[test]
fn a_neighbour_that_is_hung_up_on_calls_again() {
    let tap = std::net::TcpListener::bind((HOST, 0)).unwrap();
    let (listeners, peers) = listeners(2);
    let tapped = [peers[0].clone(), tap.local_addr().unwrap().to_string()];
    thread::scope(|scope| {
        scope.spawn(|| hang_up_on_the_way(&tap, &peers[1]));
        for (rank, listener) in (0..).zip(listeners) {
            let peers = if rank == 0 { &tapped[..] } else { &peers[..] };
            scope.spawn(move || {
                let invitation = Invitation {
                    group: &group(1),
                    rank,
                    peers,
                    token: [7; 32],
                    deadline: PATIENT,
                    ended: Default::default(),
                };
                let mut ring = listener.connect(&invitation).unwrap();
                ring.agree(&[0; 32]).unwrap();
            });
        }
    });
}

/// It used to be answered, if it was first, and the ring did not form.
#[test]
fn a_greeting_that_is_replayed_in_its_own_generation_takes_no_place() {
    let tap = std::net::TcpListener::bind((HOST, 0)).unwrap();
    let (listeners, peers) = listeners(2);
    let tapped = [peers[0].clone(), tap.local_addr().unwrap().to_string()];
    let greeting = thread::scope(|scope| {
        let heard = scope.spawn(|| replay_on_the_way(&tap, &peers[1]));
        let ranks: Vec<_> = (0..)
            .zip(listeners)
            .map(|(rank, listener)| {
                let peers = if rank == 0 { &tapped[..] } else { &peers[..] };
                scope.spawn(move || {
                    let invitation = Invitation {
                        group: &group(1),
                        rank,
                        peers,
                        token: [7; 32],
                        deadline: PATIENT,
                        ended: Default::default(),
                    };
                    let mut ring = listener.connect(&invitation).unwrap();
                    ring.agree(&[0; 32]).unwrap();
                })
            })
            .collect();
        ranks.into_iter().for_each(|rank| rank.join().unwrap());
        heard.join().unwrap()
    });
    assert!(!greeting.windows(32).any(|bytes| bytes == [7; 32]));

    // Nor in a later one.
    let (listener, address) = TcpRing::listen(HOST).unwrap();
    TcpStream::connect(address)
        .unwrap()
        .write_all(&greeting)
        .unwrap();
    let peers = [tap.local_addr().unwrap().to_string(), address.to_string()];
    let invitation = Invitation {
        group: &group(2),
        rank: 1,
        peers: &peers,
        token: [7; 32],
        deadline: Duration::from_secs(3),
        ended: Default::default(),
    };
    let error = listener.connect(&invitation).unwrap_err().to_string();
    assert!(
        error.contains("1 were turned away") && error.contains("repeats what it has heard"),
        "{error}"
    );
}

#[test]
fn members_of_different_generations_or_runs_do_not_form_a_ring() {
    for (generations, tokens, said) in [([1, 2], [7, 7], "generation"), ([1, 1], [7, 8], "token")] {
        let (listeners, peers) = listeners(2);
        let errors: Vec<String> = thread::scope(|scope| {
            let ranks: Vec<_> = (0u32..)
                .zip(listeners)
                .map(|(rank, listener)| {
                    let peers = &peers;
                    scope.spawn(move || {
                        let invitation = Invitation {
                            group: &group(generations[rank as usize]),
                            rank,
                            peers,
                            token: [tokens[rank as usize]; 32],
                            deadline: Duration::from_secs(3),
                            ended: Default::default(),
                        };
                        listener.connect(&invitation).unwrap_err().to_string()
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        assert!(
            errors.iter().any(|error| error.contains(said)),
            "{errors:?}"
        );
    }
}

#[test]
fn a_group_of_one_leaves_values_alone_until_it_is_aborted() {
    let mut solo = Solo::default();
    let mut flat = Tensor::from_slice(&[1.5f32, 2.5]);
    solo.all_reduce_sum(&mut flat).unwrap();
    assert_eq!(Vec::<f32>::try_from(&flat).unwrap(), [1.5, 2.5]);
    solo.agree(&[0; 32]).unwrap();
    let whole = Parts::even(2, 1);
    solo.reduce_scatter_sum(&mut flat, &whole).unwrap();
    solo.all_gather(&mut flat, &whole).unwrap();
    assert_eq!(solo.gather(b"alone").unwrap(), [b"alone"]);
    assert_eq!(Vec::<f32>::try_from(&flat).unwrap(), [1.5, 2.5]);
    solo.aborter().abort();
    assert!(matches!(
        solo.all_reduce_sum(&mut flat),
        Err(Error::Aborted)
    ));
}

/// Says that a test did not run; where `DISTILLERY_REQUIRE_GPU=1` asks for all of them, that is a failure.
fn skipped(why: &str) {
    assert!(
        std::env::var("DISTILLERY_REQUIRE_GPU").as_deref() != Ok("1"),
        "{why}, and DISTILLERY_REQUIRE_GPU=1"
    );
    // Past the harness, which swallows what tests that pass have printed.
    writeln!(std::io::stderr(), "SKIPPED: {why}").unwrap();
}

/// An abort that came while members waited for each other used to be seen when the wait was over, and the worker had
/// killed the engine by then, and with it the state that the next group was to go on from.
#[test]
fn a_ring_that_is_given_up_while_it_forms_is_no_longer_waited_for() {
    // The neighbour takes the call and never answers; nobody calls us.
    let silent = std::net::TcpListener::bind((HOST, 0)).unwrap();
    let (listener, address) = TcpRing::listen(HOST).unwrap();
    let peers = [
        address.to_string(),
        silent.local_addr().unwrap().to_string(),
    ];
    let ended = super::Ended::default();
    let invitation = Invitation {
        group: &group(1),
        rank: 0,
        peers: &peers,
        token: [7; 32],
        deadline: Duration::from_secs(3600),
        ended: ended.clone(),
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(50));
            ended.set();
        });
        let error = listener.connect(&invitation).unwrap_err();
        assert!(matches!(error, Error::Aborted), "{error}");
    });
}
