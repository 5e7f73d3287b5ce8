//! The NCCL code, over a library that speaks NCCL's interface on host memory (tests/host-nccl), and, where there is
//! a GPU, over NCCL itself.

use std::process::Command;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use tch::{Device, Kind, Tensor};

use super::fixed::{LEAVES, reduce};
use super::{PATIENT, bits, on_ring, skipped, values};
use crate::collective::nccl::{Nccl, Nvidia, UniqueId};
use crate::collective::{Collective, Ended, Error, NcclFault, Parts};

/// The library that Cargo built beside this test.
pub(super) fn library_file() -> String {
    let test = std::env::current_exe().unwrap();
    let file = test.with_file_name("libdistillery_host_nccl.so");
    assert!(
        file.exists(),
        "Cargo builds {} before this test",
        file.display()
    );
    file.to_str().unwrap().to_owned()
}

fn library() -> Nvidia {
    Nvidia::open(Some(&library_file())).unwrap()
}

/// A deadline that passes, and within which ranks find one another all the same.
const SHORT: Duration = Duration::from_secs(3);

/// Runs `body` on each rank of a formed communicator.
pub(crate) fn on_nccl<T: Send>(
    world: u32,
    deadline: Duration,
    body: impl Fn(Nccl) -> T + Sync,
) -> Vec<T> {
    let (library, body) = (library(), &body);
    let id = &UniqueId::new(&library).unwrap();
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                scope.spawn(move || {
                    let device = Device::Cpu;
                    body(
                        Nccl::join(
                            &library,
                            id,
                            rank,
                            world,
                            device,
                            deadline,
                            &Ended::default(),
                        )
                        .unwrap(),
                    )
                })
            })
            .collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

#[test]
fn nccl_sums_values_of_every_kind() {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        on_nccl(3, PATIENT, |mut nccl| {
            // Small whole numbers are exact in every kind.
            let own = Tensor::arange(1001, (Kind::Int64, Device::Cpu)).remainder(16);
            let mut flat = (own.shallow_clone() + i64::from(nccl.rank())).to_kind(kind);
            nccl.all_reduce_sum(&mut flat).unwrap();
            assert_eq!(flat.to_kind(Kind::Int64), own * 3 + 3);
        });
    }
}

#[test]
fn nccl_does_what_the_trait_says() {
    for (world, len) in [(1, 4), (2, 7), (3, 2), (4, 0), (3, 10_001)] {
        on_nccl(world, PATIENT, |mut nccl| {
            let rank = nccl.rank();
            let own = Tensor::from_slice(&values(rank, len));
            let mut whole = own.copy();
            nccl.all_reduce_sum(&mut whole).unwrap();
            let ends = (1..world).map(|_| len / 3).chain([len]);
            for parts in [Parts::even(len, world), Parts::ending_at(ends.collect())] {
                let mut halves = own.copy();
                nccl.reduce_scatter_sum(&mut halves, &parts).unwrap();
                nccl.all_gather(&mut halves, &parts).unwrap();
                assert_eq!(whole, halves, "{parts:?}");
            }
            let mut from_last = own.copy();
            nccl.broadcast(&mut from_last, world - 1).unwrap();
            assert_eq!(from_last, Tensor::from_slice(&values(world - 1, len)));
            let texts = nccl.gather(format!("r{rank}").as_bytes()).unwrap();
            let expected: Vec<_> = (0..world)
                .map(|rank| format!("r{rank}").into_bytes())
                .collect();
            assert_eq!(texts, expected);
            nccl.agree(&[5; 32]).unwrap();
            let odd = [u8::from(rank + 1 == world); 32];
            assert_eq!(nccl.agree(&odd).is_ok(), world == 1);
        });
    }
}

#[test]
fn texts_of_different_lengths_are_told_and_not_waited_for() {
    let errors = on_nccl(2, PATIENT, |mut nccl| {
        nccl.gather(&vec![0; 3 + nccl.rank() as usize]).unwrap_err()
    });
    let told = |error: &Error| matches!(error, Error::OutOfStep { .. });
    assert!(errors.iter().all(told), "{errors:?}");
}

#[test]
fn the_fixed_sum_has_the_bits_of_the_ring_over_nccl() {
    for world in 1..=5 {
        for leaves in LEAVES {
            for len in [0, 3, 1021] {
                let alone = on_ring(1, PATIENT, |mut ring| reduce(&mut ring, leaves, len));
                let sums = on_nccl(world, PATIENT, |mut nccl| reduce(&mut nccl, leaves, len));
                for sum in sums {
                    assert_eq!(bits(&sum), bits(&alone[0]), "{leaves} over {world}");
                }
            }
        }
    }
}

fn fault(error: &Error) -> Option<NcclFault> {
    match error {
        Error::Nccl { fault, .. } => Some(*fault),
        _ => None,
    }
}

#[test]
fn a_rank_that_dies_is_noticed_over_nccl() {
    let errors = on_nccl(3, PATIENT, |mut nccl| {
        if nccl.rank() == 1 {
            // Without taking leave.
            nccl.aborter().abort();
            return None;
        }
        let mut flat = Tensor::from_slice(&values(0, 1000));
        let error = nccl.all_reduce_sum(&mut flat).unwrap_err();
        assert!(matches!(
            nccl.all_reduce_sum(&mut flat),
            Err(Error::Aborted)
        ));
        Some(error)
    });
    for error in errors.into_iter().flatten() {
        assert_eq!(fault(&error), Some(NcclFault::PeerLost), "{error}");
        assert!(
            error.to_string().contains("remote process exited"),
            "{error}"
        );
    }
}

#[test]
fn a_rank_that_takes_leave_breaks_nothing_before_it_is_missed() {
    let errors = on_nccl(2, SHORT, |mut nccl| {
        let mut flat = Tensor::from_slice(&values(0, 10));
        nccl.all_reduce_sum(&mut flat).unwrap();
        if nccl.rank() == 1 {
            drop(nccl);
            return None;
        }
        Some(nccl.all_reduce_sum(&mut flat).unwrap_err())
    });
    let error = errors[0].as_ref().unwrap();
    assert_eq!(fault(error), Some(NcclFault::Timeout), "{error}");
}

#[test]
fn a_silent_rank_is_given_up_after_the_deadline_over_nccl() {
    let given_up = Barrier::new(2);
    let errors = on_nccl(2, SHORT, |mut nccl| {
        let mut flat = Tensor::from_slice(&values(0, 10));
        if nccl.rank() == 1 {
            // Alive until the other has given up, which ends the communicator here too.
            given_up.wait();
            return nccl.all_reduce_sum(&mut flat).unwrap_err();
        }
        let error = nccl.all_reduce_sum(&mut flat).unwrap_err();
        given_up.wait();
        error
    });
    assert_eq!(fault(&errors[0]), Some(NcclFault::Timeout), "{}", errors[0]);
    assert_eq!(
        fault(&errors[1]),
        Some(NcclFault::PeerLost),
        "{}",
        errors[1]
    );
}

#[test]
fn a_communicator_that_does_not_fill_up_is_given_up() {
    let library = library();
    let id = UniqueId::new(&library).unwrap();
    let deadline = Duration::from_millis(200);
    let error = Nccl::join(
        &library,
        &id,
        0,
        2,
        Device::Cpu,
        deadline,
        &Ended::default(),
    )
    .unwrap_err();
    assert!(error.to_string().contains("did not all join"), "{error}");
}

#[test]
fn another_thread_ends_a_sum_that_waits_for_a_silent_rank_over_nccl() {
    let ended = Barrier::new(2);
    let errors = on_nccl(2, PATIENT, |mut nccl| {
        let mut flat = Tensor::zeros([1], (Kind::Float, Device::Cpu));
        if nccl.rank() == 1 {
            ended.wait();
            // What rank 0 gave to the first sum may have come through before its abort did.
            let mut sums = (0..2).map(|_| nccl.all_reduce_sum(&mut flat));
            return sums.find_map(Result::err).unwrap();
        }
        let aborter = nccl.aborter();
        thread::scope(|scope| {
            scope.spawn(move || {
                aborter.abort();
                aborter.abort();
            });
            let error = nccl.all_reduce_sum(&mut flat).unwrap_err();
            ended.wait();
            error
        })
    });
    assert!(matches!(errors[0], Error::Aborted), "{}", errors[0]);
    assert_eq!(
        fault(&errors[1]),
        Some(NcclFault::PeerLost),
        "{}",
        errors[1]
    );
}

const CHILD: &str = "DISTILLERY_TEST_NCCL_CHILD";

/// The other rank is a process that is killed in the middle of a run.
#[test]
fn a_process_that_dies_is_noticed() {
    const NAME: &str = "collective::tests::nccl::a_process_that_dies_is_noticed";
    let library = library();
    if let Ok(id) = std::env::var(CHILD) {
        let id: UniqueId = id.parse().unwrap();
        let mut nccl =
            Nccl::join(&library, &id, 1, 2, Device::Cpu, PATIENT, &Ended::default()).unwrap();
        let mut flat = Tensor::from_slice(&[2f32]);
        nccl.all_reduce_sum(&mut flat).unwrap();
        assert_eq!(flat.double_value(&[0]), 3.0);
        std::process::abort();
    }
    let id = UniqueId::new(&library).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture"])
        .env(CHILD, id.to_string())
        .spawn()
        .unwrap();
    let mut nccl =
        Nccl::join(&library, &id, 0, 2, Device::Cpu, PATIENT, &Ended::default()).unwrap();
    let mut flat = Tensor::from_slice(&[1f32]);
    nccl.all_reduce_sum(&mut flat).unwrap();
    assert_eq!(flat.double_value(&[0]), 3.0);
    let error = nccl.all_reduce_sum(&mut flat).unwrap_err();
    assert_eq!(fault(&error), Some(NcclFault::PeerLost), "{error}");
    assert!(!child.wait().unwrap().success());
}

#[test]
fn a_missing_library_is_a_clear_error() {
    let error = Nvidia::open(Some("/nowhere/libnccl.so.2")).unwrap_err();
    assert!(
        error.to_string().contains("/nowhere/libnccl.so.2"),
        "{error}"
    );
    assert!(error.to_string().contains("DISTILLERY_NCCL"), "{error}");
    // A library of another kind has no such functions.
    let error = Nvidia::open(Some("libc.so.6")).unwrap_err();
    assert!(error.to_string().contains("ncclGetUniqueId"), "{error}");
}

#[test]
fn a_library_serves_its_own_memory_only() {
    let library = library();
    let id = UniqueId::new(&library).unwrap();
    let error = Nccl::join(
        &library,
        &id,
        0,
        1,
        Device::Cuda(0),
        PATIENT,
        &Ended::default(),
    )
    .unwrap_err();
    assert!(error.to_string().contains("host memory"), "{error}");
}

#[test]
fn an_id_is_its_hexadecimal_digits() {
    let id: UniqueId = "0a".repeat(128).parse().unwrap();
    assert_eq!(id.to_string(), "0a".repeat(128));
    assert!("xy".parse::<UniqueId>().is_err());
    assert!("zz".repeat(128).parse::<UniqueId>().is_err());
    assert!("é".repeat(128).parse::<UniqueId>().is_err());
}

/// A group of one over NCCL itself sums to itself and agrees with itself; runs where there is a GPU and the library.
#[test]
fn nccl_sums_over_one_rank_on_a_gpu() {
    if !tch::Cuda::is_available() {
        return skipped("there is no GPU for NCCL");
    }
    let library = match Nvidia::open(std::env::var("DISTILLERY_NCCL").ok().as_deref()) {
        Err(error @ Error::NcclNotFound { .. }) => return skipped(&error.to_string()),
        library => library.unwrap(),
    };
    let device = Device::Cuda(0);
    assert!(library.check_serves(Device::Cpu).is_err());
    let id = UniqueId::new(&library).unwrap();
    let mut nccl = Nccl::join(&library, &id, 0, 1, device, PATIENT, &Ended::default()).unwrap();
    let mut flat = Tensor::from_slice(&values(0, 10_000)).to_device(device);
    nccl.all_reduce_sum(&mut flat).unwrap();
    nccl.broadcast(&mut flat, 0).unwrap();
    let whole = Parts::even(10_000, 1);
    nccl.reduce_scatter_sum(&mut flat, &whole).unwrap();
    nccl.all_gather(&mut flat, &whole).unwrap();
    nccl.agree(&[9; 32]).unwrap();
    let flat = flat.to_device(Device::Cpu);
    assert_eq!(Vec::<f32>::try_from(flat).unwrap(), values(0, 10_000));
    nccl.aborter().abort();
    let mut flat = Tensor::zeros([1], (Kind::Float, device));
    assert!(matches!(
        nccl.all_reduce_sum(&mut flat),
        Err(Error::Aborted)
    ));
}

/// An abort while the others are awaited ends the wait, long before the deadline.
#[test]
fn a_communicator_that_is_given_up_while_it_forms_is_no_longer_waited_for() {
    let library = library();
    let id = UniqueId::new(&library).unwrap();
    let ended = Ended::default();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(50));
            ended.set();
        });
        let hour = Duration::from_secs(3600);
        let error = Nccl::join(&library, &id, 0, 2, Device::Cpu, hour, &ended).unwrap_err();
        assert!(matches!(error, Error::Aborted), "{error}");
    });
}
