//! Which way a group takes.

use std::thread;

use tch::{Device, Tensor};

use super::nccl::library_file;
use super::{HOST, PATIENT, group};
use crate::collective::seat::{Seat, Way, Wish};
use crate::collective::{Collective, Error, Invitation};

fn over(way: Way) -> Wish {
    let library = Some(library_file());
    Wish { way, library }
}

/// Forms a group of members with these wishes and returns what each made of it.
fn form<T: Send>(
    wishes: &[Wish],
    body: impl Fn(Box<dyn Collective>) -> T + Sync,
) -> Vec<Result<T, Error>> {
    let world = wishes.len() as u32;
    let (seats, cards): (Vec<_>, Vec<_>) = (0..)
        .zip(wishes)
        .map(|(rank, wish)| Seat::open_as(wish, Device::Cpu, HOST, rank, world).unwrap())
        .unzip();
    let (cards, body) = (&cards, &body);
    thread::scope(|scope| {
        let members: Vec<_> = (0..)
            .zip(seats)
            .map(|(rank, seat)| {
                scope.spawn(move || {
                    let group = &group(1);
                    let deadline = PATIENT.min(std::time::Duration::from_secs(5));
                    seat.connect(&Invitation {
                        group,
                        rank,
                        peers: cards,
                        token: [7; 32],
                        deadline,
                        ended: Default::default(),
                    })
                    .map(body)
                })
            })
            .collect();
        members.into_iter().map(|m| m.join().unwrap()).collect()
    })
}

fn sum_of_ones(mut group: Box<dyn Collective>) -> f64 {
    let mut flat = Tensor::from_slice(&[1f32]);
    group.all_reduce_sum(&mut flat).unwrap();
    flat.double_value(&[0])
}

#[test]
fn a_group_forms_by_every_way() {
    for way in [Way::Tcp, Way::Nccl, Way::Auto] {
        for world in 1..=3 {
            let sums = form(&vec![over(way); world], sum_of_ones);
            let sums: Vec<f64> = sums.into_iter().map(Result::unwrap).collect();
            assert_eq!(sums, vec![world as f64; world], "{way:?}");
        }
    }
}

#[test]
fn cards_say_what_a_member_can_do() {
    let card = |way, rank| {
        let (_, card) = Seat::open_as(&over(way), Device::Cpu, HOST, rank, 2).unwrap();
        let words: Vec<String> = card.split(' ').map(str::to_owned).collect();
        words
    };
    for rank in 0..2 {
        // On the CPU nobody looks for NCCL without being asked.
        assert_eq!(card(Way::Auto, rank).len(), 1);
        assert_eq!(card(Way::Tcp, rank).len(), 1);
        let words = card(Way::Nccl, rank);
        assert!(words[0].starts_with("127.0.0.1:"));
        assert_eq!(words[1], "nccl");
        assert_eq!(words.len(), if rank == 0 { 3 } else { 2 });
    }
}

#[test]
fn who_asks_for_nccl_and_cannot_have_it_is_told() {
    let lost = Wish {
        way: Way::Nccl,
        library: Some("/nowhere/libnccl.so.2".to_owned()),
    };
    let error = Seat::open_as(&lost, Device::Cpu, HOST, 0, 1).unwrap_err();
    assert!(matches!(error, Error::NcclNotFound { .. }), "{error}");
    let mixed = form(&[over(Way::Nccl), over(Way::Tcp)], sum_of_ones);
    let error = mixed[0].as_ref().unwrap_err().to_string();
    assert!(error.contains("rank 1 cannot"), "{error}");
    assert!(mixed[1].is_err());
}

#[test]
fn a_way_has_a_name() {
    assert_eq!("auto".parse::<Way>().unwrap(), Way::Auto);
    assert_eq!("tcp".parse::<Way>().unwrap(), Way::Tcp);
    assert_eq!("nccl".parse::<Way>().unwrap(), Way::Nccl);
    let error = "mpi".parse::<Way>().unwrap_err().to_string();
    assert!(error.contains("DISTILLERY_COLLECTIVE is `mpi`"), "{error}");
}

#[test]
fn cards_that_make_no_sense_are_refused() {
    for cards in [
        ["127.0.0.1:1 mpi", "b"],
        ["127.0.0.1:1 nccl 00", "b"],
        ["a b c d", "b"],
    ] {
        let (seat, _) = Seat::open_as(&over(Way::Nccl), Device::Cpu, HOST, 1, 2).unwrap();
        let peers = cards.map(str::to_owned);
        let refused = seat.connect(&Invitation {
            group: &group(1),
            rank: 1,
            peers: &peers,
            token: [7; 32],
            deadline: PATIENT,
            ended: Default::default(),
        });
        assert!(
            matches!(refused.err(), Some(Error::Setup { .. })),
            "{cards:?}"
        );
    }
}
