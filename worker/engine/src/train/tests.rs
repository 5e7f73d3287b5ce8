use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::thread;
use std::time::Duration;

use distillery_common::group::GroupId;
use distillery_common::ids::Generation;
use distillery_common::latents::loader::Order;
use distillery_common::recipe::{Batch, Loss, Optimizer, RateSchedule};
use distillery_common::seed::{Purpose, Stream, normal};
use tch::{Device, Kind, Tensor};

use super::flat::Parameters;
use super::snapshot::{self, Part};
use super::{Control, Error, Notice, Plan, Restoring, Sink, Source, StepReport, Trainer};
use crate::collective::solo::Solo;
use crate::collective::tcp::{Invitation, TcpRing};
use crate::collective::tests::PATIENT;
use crate::collective::tests::nccl::on_nccl;
use crate::collective::{self, Abort, Collective, Parts};
use crate::diffusion::denoiser::{Conditioning, Denoiser};
use crate::diffusion::prediction::Prediction;
use crate::diffusion::schedule::Schedule;
use crate::diffusion::segments::Segments;
use crate::distill::mlcm::Mlcm;
use crate::distill::{Rows, Setting};

const CHANNELS: i64 = 4;
const HIDDEN: i64 = 16;

/// Two layers on (z, t / 1000), computed in `kind`.
struct Mlp {
    weights: Vec<(String, Tensor)>,
    kind: Kind,
}

impl Mlp {
    fn new(kind: Kind) -> Self {
        let shapes: [(&str, Vec<i64>); 4] = [
            ("in.bias", vec![HIDDEN]),
            ("in.weight", vec![CHANNELS + 1, HIDDEN]),
            ("out.bias", vec![CHANNELS]),
            ("out.weight", vec![HIDDEN, CHANNELS]),
        ];
        let weights = (0..)
            .zip(shapes)
            .map(|(ordinal, (name, shape))| {
                let len = shape.iter().product::<i64>() as usize;
                let values = normal(5, Purpose::AdapterInit, ordinal, 0, len);
                let tensor = Tensor::from_slice(&values).view(&shape[..]) * 0.3;
                let tensor = tensor.to_kind(kind).set_requires_grad(true);
                (name.to_owned(), tensor)
            })
            .collect();
        Self { weights, kind }
    }

    fn parameters(&self) -> Parameters {
        let share = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.shallow_clone());
        Parameters::new(self.weights.iter().map(share).collect())
    }
}

impl Denoiser for Mlp {
    fn predict(&self, z: &Tensor, t: &Tensor, _: &Conditioning) -> Tensor {
        let time = t.to_kind(Kind::Float).view([-1, 1]) / 1000.0;
        let input = Tensor::cat(&[z.to_kind(Kind::Float).flatten(1, -1), time], 1);
        let w = |i: usize| &self.weights[i].1;
        let hidden = (input.to_kind(self.kind).matmul(w(1)) + w(0)).tanh();
        (hidden.matmul(w(3)) + w(2))
            .to_kind(Kind::Float)
            .view(&z.size()[..])
    }
}

/// Rows that are a pure function of their position in the data order.
struct Rowmaker {
    order: Order,
}

impl Rowmaker {
    fn new() -> Self {
        Self {
            order: Order {
                seed: 9,
                stage: 0,
                rows: 50,
                global_batch: 1,
                virtual_ranks: None,
            },
        }
    }
}

impl Source for Rowmaker {
    fn rows(&mut self, positions: Range<u64>) -> anyhow::Result<Rows> {
        let rows: Vec<u64> = positions.map(|p| self.order.row_at(p)).collect();
        let draw = |purpose| {
            let values: Vec<f32> = rows
                .iter()
                .flat_map(|&row| normal(1, purpose, row, 0, CHANNELS as usize))
                .collect();
            Tensor::from_slice(&values).view([-1, CHANNELS, 1, 1])
        };
        let times: Vec<i64> = rows
            .iter()
            .map(|&row| Stream::new(1, Purpose::TrajectoryTimes, row, 0).below(999))
            .map(|t| i64::from(t) + 1)
            .collect();
        Ok(Rows {
            numbers: rows.clone(),
            z: draw(Purpose::InitialNoise),
            // What is learnable: noise that is a function of the state.
            eps_w: draw(Purpose::InitialNoise) * 0.5 + 0.2,
            t: Tensor::from_slice(&times),
            conditioning: Conditioning {
                context: Tensor::zeros([rows.len() as i64, 1, 1], (Kind::Float, Device::Cpu)),
                pooled: None,
                time_ids: None,
            },
        })
    }
}

/// Keeps reports and stops before step `until`.
struct Recorder {
    until: u64,
    reports: Vec<StepReport>,
}

impl Recorder {
    fn until(until: u64) -> Self {
        Self {
            until,
            reports: Vec::new(),
        }
    }
}

impl Sink for Recorder {
    fn after_step(&mut self, trainer: &Trainer, report: &StepReport) -> anyhow::Result<Control> {
        self.reports.push(report.clone());
        Ok(match trainer.position().step < self.until {
            true => Control::Continue,
            false => Control::Stop,
        })
    }
}

fn plan(micro: Option<u64>) -> Plan {
    Plan {
        steps: 40,
        batch: Batch {
            global: 12,
            micro,
            virtual_ranks: None,
        },
        optimizer: Optimizer {
            lr: 3e-3,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay: 0.01,
            grad_clip: Some(1.0),
            schedule: RateSchedule::Cosine,
            warmup: 5,
            max_skipped: 3,
            sharded: false,
        },
        ema_decay: Some(0.9),
    }
}

fn objective() -> Mlcm {
    Mlcm::new(Setting {
        schedule: Schedule::stable_diffusion(),
        prediction: Prediction::Epsilon,
        segments: Segments::new(8).unwrap(),
        skip: 25,
        loss: Loss::L2,
    })
}

/// Trains a fresh student until `until`, continuing from `from` when given; its state and reports.
fn train(
    kind: Kind,
    plan: &Plan,
    from: Option<&snapshot::Snapshot>,
    until: u64,
    group: &mut dyn Collective,
) -> (snapshot::Snapshot, Vec<StepReport>) {
    let student = Mlp::new(kind);
    let mut trainer = Trainer::new(plan.clone(), student.parameters());
    if let Some(state) = from {
        trainer.restore(state).unwrap();
    }
    let mut recorder = Recorder::until(until);
    trainer
        .run(
            &objective(),
            &student,
            None,
            group,
            &mut Rowmaker::new(),
            &mut recorder,
        )
        .unwrap();
    let mut state = trainer.empty_snapshot();
    trainer.snapshot(&mut state);
    (state, recorder.reports)
}

/// Test 14.
#[test]
fn training_on_is_the_same_as_stopping_and_resuming_bit_for_bit() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let plan = plan(Some(5));
        let (whole, reports) = train(kind, &plan, None, 40, &mut Solo::default());
        let (half, first) = train(kind, &plan, None, 20, &mut Solo::default());
        // Through names and values, as a checkpoint goes.
        let student = Mlp::new(kind);
        let mut trainer = Trainer::new(plan.clone(), student.parameters());
        let fresh = trainer.fingerprint();
        let mut restoring = Restoring::new(&mut trainer);
        for (part, place, values) in half.entries() {
            let values = Tensor::from_slice(values).view(&place.shape[..]);
            restoring.take(part, &place.name, &values).unwrap();
        }
        restoring.finish(half.position).unwrap();
        let mut read = trainer.empty_snapshot();
        trainer.snapshot(&mut read);
        assert_eq!(read, half);
        assert_ne!(trainer.fingerprint(), fresh);
        let values = half.entries().flat_map(|(_, _, values)| values);
        let bytes: Vec<u8> = values.flat_map(|value| value.to_le_bytes()).collect();
        let named = xxhash_rust::xxh3::xxh3_128(&bytes).to_le_bytes();
        assert_eq!(trainer.fingerprint()[..16], named);
        assert_eq!(trainer.fingerprint()[16..24], 20u64.to_le_bytes());
        let (resumed, second) = train(kind, &plan, Some(&read), 40, &mut Solo::default());
        assert_eq!(whole.position.step, 40);
        assert_eq!(whole, resumed);
        assert_eq!(reports, [first, second].concat());
        assert_ne!(whole.part(Part::Student), half.part(Part::Student));
        assert_ne!(whole.part(Part::Student), whole.part(Part::Ema));
    }
}

#[test]
fn training_lowers_the_loss() {
    let mut plan = plan(None);
    plan.optimizer.lr = 0.03;
    let (_, reports) = train(Kind::Float, &plan, None, 40, &mut Solo::default());
    let mean =
        |reports: &[StepReport]| reports.iter().map(|r| r.loss).sum::<f64>() / reports.len() as f64;
    assert!(mean(&reports[30..]) < 0.7 * mean(&reports[..10]));
}

/// However a step is split into forward passes and over ranks, it is the mean over the same global batch.
#[test]
fn a_split_step_is_the_whole_step() {
    let (whole, reports) = train(Kind::Float, &plan(None), None, 4, &mut Solo::default());
    let close = |state: &snapshot::Snapshot, steps: &[StepReport]| {
        let values = |s: &snapshot::Snapshot| s.part(Part::Student).unwrap().to_vec();
        for (a, b) in values(&whole).into_iter().zip(values(state)) {
            assert!((a - b).abs() < 2e-5, "{a} and {b}");
        }
        for (a, b) in reports.iter().zip(steps) {
            assert!((a.loss - b.loss).abs() < 1e-5 * a.loss);
            assert!((a.grad_norm - b.grad_norm).abs() < 1e-4 * a.grad_norm);
            let counts = |r: &StepReport| -> Vec<u64> {
                r.loss_by_segment.iter().map(|&(_, rows)| rows).collect()
            };
            assert_eq!(counts(a), counts(b));
            assert_eq!(counts(a).iter().sum::<u64>(), 12);
        }
    };
    let (micro, steps) = train(Kind::Float, &plan(Some(5)), None, 4, &mut Solo::default());
    close(&micro, &steps);
    for world in [2, 3] {
        let states = train_on_ring(world);
        for (state, steps) in &states {
            assert_eq!(state, &states[0].0, "ranks hold the same bits");
            close(state, steps);
        }
    }
}

fn train_on_ring(world: u32) -> Vec<(snapshot::Snapshot, Vec<StepReport>)> {
    on_ring(world, |ring| train(Kind::Float, &plan(None), None, 4, ring))
}

/// Runs `body` on each rank of a ring and returns what each made of it.
fn on_ring<T: Send>(world: u32, body: impl Fn(&mut TcpRing) -> T + Sync) -> Vec<T> {
    let body = &body;
    let (listeners, peers): (Vec<_>, Vec<_>) = (0..world)
        .map(|_| TcpRing::listen(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap())
        .map(|(listener, address)| (listener, address.to_string()))
        .unzip();
    let group = GroupId {
        stage: "seg8".to_owned(),
        generation: Generation(1),
    };
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..)
            .zip(listeners)
            .map(|(rank, listener)| {
                let invitation = Invitation {
                    group: &group,
                    rank,
                    peers: &peers,
                    token: [0; 32],
                    deadline: Duration::from_secs(60),
                    ended: Default::default(),
                };
                scope.spawn(move || body(&mut listener.connect(&invitation).unwrap()))
            })
            .collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

/// Values of a state by the name of their part and tensor, as bits.
type Values = BTreeMap<(&'static str, String), Vec<u32>>;

/// What a member with all moments or a share of them holds after `until` steps, and what it was told of them.
fn train_as_member(
    plan: &Plan,
    from: Option<&Values>,
    until: u64,
    ring: &mut dyn Collective,
) -> (Values, Vec<StepReport>) {
    let student = Mlp::new(Kind::Float);
    let (rank, world) = (ring.rank(), ring.world());
    let mut trainer = Trainer::member(plan.clone(), student.parameters(), rank, world);
    if let Some(from) = from {
        let mut restoring = Restoring::new(&mut trainer);
        for ((part, name), values) in from {
            let part = Part::ALL.into_iter().find(|p| p.prefix() == *part).unwrap();
            let values: Vec<f32> = values.iter().map(|&bits| f32::from_bits(bits)).collect();
            // What is another rank's is left alone.
            restoring
                .take(part, name, &Tensor::from_slice(&values))
                .unwrap();
        }
        let position = snapshot::Position {
            step: until / 2,
            applied: until / 2,
            ..Default::default()
        };
        restoring.finish(position).unwrap();
    }
    let mut recorder = Recorder::until(until);
    trainer
        .run(
            &objective(),
            &student,
            None,
            ring,
            &mut Rowmaker::new(),
            &mut recorder,
        )
        .unwrap();
    ring.agree(&trainer.fingerprint()).unwrap();
    let held: usize = trainer.state().iter().map(|(_, flat)| flat.numel()).sum();
    let mut state = trainer.empty_snapshot();
    trainer.snapshot(&mut state);
    let values: Values = state
        .entries()
        .filter(|(.., values)| !values.is_empty())
        .map(|(part, place, values)| {
            let bits = values.iter().map(|x| x.to_bits()).collect();
            ((part.prefix(), place.name.clone()), bits)
        })
        .collect();
    let kept: usize = values.values().map(Vec::len).sum();
    assert_eq!(held, kept, "nothing is held but what is kept");
    (values, recorder.reports)
}

/// The plan of a reproducible batch, or of none, with moments that are shared out or not.
fn shared_plan(virtual_ranks: Option<u32>, sharded: bool) -> Plan {
    let mut plan = plan(None);
    plan.batch.virtual_ranks = virtual_ranks;
    plan.optimizer.sharded = sharded;
    plan.optimizer.grad_clip = Some(1e-3);
    plan
}

/// The tensors are of 16, 80, 4 and 64 values, 164 in all: two ranks take 96 and 68 of them.
#[test]
fn shared_moments_make_the_same_bits_and_are_held_once() {
    for virtual_ranks in [None, Some(6)] {
        for world in 1..=4 {
            let train = |sharded| {
                let plan = shared_plan(virtual_ranks, sharded);
                on_ring(world, |ring| train_as_member(&plan, None, 6, ring))
            };
            let (whole, shared) = (train(false), train(true));
            let norm = whole[0].1[0].grad_norm;
            assert!(norm > 1e-3, "{norm} is clipped");
            let mut moments = Values::new();
            for ((own, reports), (all, expected)) in std::iter::zip(&shared, &whole) {
                assert_eq!(reports, expected, "{world} ranks");
                for (name, values) in own {
                    assert_eq!(values, &all[name], "{name:?} with {world} ranks");
                    if name.0.starts_with("adam") {
                        assert_eq!(moments.insert(name.clone(), values.clone()), None);
                    }
                }
                let of_student = own.keys().filter(|(part, _)| *part == "student");
                assert_eq!(of_student.count(), 4);
            }
            let all = whole[0]
                .0
                .iter()
                .filter(|(name, _)| name.0.starts_with("adam"));
            assert!(moments.iter().eq(all));
        }
    }
    let moments_of = |(own, _): &(Values, _)| -> usize {
        let moments = own.iter().filter(|(name, _)| name.0 == "adam_m");
        moments.map(|(_, values)| values.len()).sum()
    };
    let plan = shared_plan(None, true);
    let two = on_ring(2, |ring| train_as_member(&plan, None, 1, ring));
    assert_eq!(two.iter().map(moments_of).collect::<Vec<_>>(), [96, 68]);
}

/// Says in the step after `steps` of them that this rank leaves, with a checkpoint or without.
struct Leaver {
    recorder: Recorder,
    steps: usize,
    checkpoint: bool,
    /// The step in which it says that it is still saving.
    saves_in: usize,
}

impl Sink for Leaver {
    fn notice(&mut self) -> Notice {
        let done = self.recorder.reports.len();
        Notice {
            leave: (done >= self.steps).then_some(self.checkpoint),
            saving: done == self.saves_in,
        }
    }

    fn after_step(&mut self, trainer: &Trainer, report: &StepReport) -> anyhow::Result<Control> {
        self.recorder.after_step(trainer, report)
    }
}

#[test]
fn a_rank_that_leaves_takes_the_others_along_after_the_same_step() {
    // When each rank leaves, and whether with a checkpoint: none at its own time but the first.
    let cases = [
        ([40, 40, 3], true),
        ([40, 2, 40], false),
        ([5, 2, 2], true),
        ([0, 40, 40], true),
    ];
    for ((leaves, checkpoint), plan) in cases.into_iter().flat_map(|case| {
        let ways = [(None, false), (None, true), (Some(6), false)];
        ways.map(|(ranks, sharded)| (case, shared_plan(ranks, sharded)))
    }) {
        let leave = |group: &mut dyn Collective| {
            let rank = group.rank();
            let student = Mlp::new(Kind::Float);
            let mut trainer = Trainer::member(plan.clone(), student.parameters(), rank, 3);
            let mut sink = Leaver {
                recorder: Recorder::until(40),
                steps: leaves[rank as usize],
                checkpoint,
                saves_in: rank as usize,
            };
            let (objective, mut source) = (objective(), Rowmaker::new());
            trainer
                .run(&objective, &student, None, group, &mut source, &mut sink)
                .unwrap();
            // Nobody is left behind in a step.
            group.agree(&trainer.fingerprint()).unwrap();
            let said: Vec<_> = sink.recorder.reports.iter().map(|r| r.notice).collect();
            (trainer.position().step, said)
        };
        let mut ended = on_ring(3, |ring| leave(ring));
        ended.extend(on_nccl(3, PATIENT, |mut nccl| leave(&mut nccl)));
        let steps = leaves.into_iter().min().unwrap();
        let said: Vec<Notice> = (0..=steps)
            .map(|step| Notice {
                leave: (step == steps).then_some(checkpoint),
                saving: step < 3,
            })
            .collect();
        for end in ended {
            assert_eq!(end, (steps as u64 + 1, said.clone()), "{leaves:?} {plan:?}");
        }
    }
}

/// Four ranks stop; one, two and three go on with what they left, to the student of those that never shared.
#[test]
fn shared_moments_are_gone_on_from_by_any_number_of_ranks() {
    let plan = |sharded| shared_plan(Some(6), sharded);
    let (expected, _) = train_as_member(&plan(false), None, 8, &mut Solo::default());
    let mut half = Values::new();
    for (own, _) in on_ring(4, |ring| train_as_member(&plan(true), None, 4, ring)) {
        half.extend(own);
    }
    for world in 1..=3 {
        let ended = on_ring(world, |ring| {
            train_as_member(&plan(true), Some(&half), 8, ring)
        });
        let mut whole = Values::new();
        ended.into_iter().for_each(|(own, _)| whole.extend(own));
        assert!(whole == expected, "{world} ranks");
    }
}

/// The other half of a group of two that never comes: it fails the operation with this number.
struct Failing {
    fails_at: u32,
    operations: u32,
}

impl Failing {
    fn operate(&mut self) -> Result<(), collective::Error> {
        self.operations += 1;
        match self.operations == self.fails_at {
            true => Err(collective::Error::Aborted),
            false => Ok(()),
        }
    }
}

impl Collective for Failing {
    fn rank(&self) -> u32 {
        0
    }
    fn world(&self) -> u32 {
        2
    }
    fn all_reduce_sum_in(&mut self, _: &mut Tensor, _: &Parts) -> Result<(), collective::Error> {
        self.operate()
    }
    fn broadcast(&mut self, _: &mut Tensor, _: u32) -> Result<(), collective::Error> {
        self.operate()
    }
    fn all_reduce_fixed(
        &mut self,
        _: Vec<collective::tree::Partial>,
        _: u32,
        _: &mut Tensor,
    ) -> Result<(), collective::Error> {
        self.operate()
    }
    fn reduce_scatter_sum(&mut self, _: &mut Tensor, _: &Parts) -> Result<(), collective::Error> {
        self.operate()
    }
    fn all_gather(&mut self, _: &mut Tensor, _: &Parts) -> Result<(), collective::Error> {
        self.operate()
    }
    fn gather(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, collective::Error> {
        self.operate().map(|()| vec![own.to_vec(); 2])
    }
    fn aborter(&self) -> std::sync::Arc<dyn Abort> {
        Solo::default().aborter()
    }
}

/// Until a rank has updated its own masters a step leaves no trace; from then until all masters are round the state is
/// torn, and says so.
#[test]
fn a_step_with_shared_moments_is_whole_or_torn() {
    for (fails_at, torn) in [(1, false), (2, false), (3, true)] {
        let student = Mlp::new(Kind::Float);
        let mut trainer = Trainer::member(shared_plan(None, true), student.parameters(), 0, 2);
        let before = trainer.fingerprint();
        let mut group = Failing {
            fails_at,
            operations: 0,
        };
        let error = trainer
            .run(
                &objective(),
                &student,
                None,
                &mut group,
                &mut Rowmaker::new(),
                &mut Recorder::until(1),
            )
            .unwrap_err();
        assert!(matches!(error, Error::Group { step: 0, .. }));
        assert_eq!(trainer.is_torn(), torn, "{fails_at}");
        assert_eq!(trainer.fingerprint() == before, !torn, "{fails_at}");
        trainer.reseat(1, 3);
        trainer.resume(snapshot::Position::default());
        assert!(!trainer.is_torn());
        let (_, moments) = &trainer.state()[1];
        assert_eq!(
            moments.numel(),
            trainer.layout().span(&trainer.places(Part::AdamM)).len()
        );
    }
}

/// Rows whose states are not finite at the given steps.
struct Poison(Vec<u64>, Rowmaker);

impl Source for Poison {
    fn rows(&mut self, positions: Range<u64>) -> anyhow::Result<Rows> {
        let poisoned = self.0.contains(&(positions.start / 12));
        let mut rows = self.1.rows(positions)?;
        if poisoned {
            rows.z *= f64::NAN;
        }
        Ok(rows)
    }
}

fn train_poisoned(
    plan: &Plan,
    poisoned: Vec<u64>,
    from: Option<&snapshot::Snapshot>,
    until: u64,
) -> (Trainer, Vec<StepReport>, Result<(), Error>) {
    let student = Mlp::new(Kind::Float);
    let mut trainer = Trainer::new(plan.clone(), student.parameters());
    if let Some(state) = from {
        trainer.restore(state).unwrap();
    }
    let mut recorder = Recorder::until(until);
    let result = trainer.run(
        &objective(),
        &student,
        None,
        &mut Solo::default(),
        &mut Poison(poisoned, Rowmaker::new()),
        &mut recorder,
    );
    (trainer, recorder.reports, result)
}

#[test]
fn steps_without_a_finite_gradient_are_skipped_and_counted() {
    let (trainer, reports, result) = train_poisoned(&plan(None), vec![2, 3, 6], None, 10);
    result.unwrap();
    let skipped: Vec<u64> = reports
        .iter()
        .filter(|r| r.skipped)
        .map(|r| r.step)
        .collect();
    assert_eq!(skipped, [2, 3, 6]);
    let position = trainer.position();
    assert_eq!((position.step, position.applied), (10, 7));
    assert_eq!((position.skipped, position.skipped_in_a_row), (3, 0));
    let mut state = trainer.empty_snapshot();
    trainer.snapshot(&mut state);
    assert!(
        state
            .part(Part::Student)
            .unwrap()
            .iter()
            .all(|x| x.is_finite())
    );
    assert!(
        state
            .part(Part::AdamM)
            .unwrap()
            .iter()
            .all(|x| x.is_finite())
    );
}

/// Going on from the state behind a skipped step is the same as not stopping there.
#[test]
fn a_skipped_step_does_not_keep_a_stage_from_being_resumed() {
    let stage = plan(None);
    let (first, reports, result) = train_poisoned(&stage, vec![2, 4], None, 5);
    result.unwrap();
    assert!(reports[4].skipped && !reports[4].grad_norm.is_finite());
    let mut state = first.empty_snapshot();
    first.snapshot(&mut state);
    let (resumed, ..) = train_poisoned(&stage, vec![2, 4], Some(&state), 10);
    let (whole, ..) = train_poisoned(&stage, vec![2, 4], None, 10);
    let (mut a, mut b) = (resumed.empty_snapshot(), whole.empty_snapshot());
    resumed.snapshot(&mut a);
    whole.snapshot(&mut b);
    assert_eq!(a, b);
    assert_eq!((a.position.step, a.position.applied), (10, 8));
}

/// `max_skipped` steps in a row may be lost; the next one ends the stage.
#[test]
fn one_skipped_step_more_than_allowed_in_a_row_ends_the_stage() {
    for (max_skipped, poisoned) in [(0, vec![4]), (1, vec![4, 5]), (3, vec![4, 5, 6, 7])] {
        let mut stage = plan(None);
        stage.optimizer.max_skipped = max_skipped;
        let last = *poisoned.last().unwrap();
        let (trainer, _, result) = train_poisoned(&stage, poisoned.clone(), None, 10);
        match result.unwrap_err() {
            Error::Diverged { step, in_a_row } => {
                assert_eq!((step, in_a_row), (last, max_skipped + 1));
            }
            other => panic!("{other}"),
        }
        assert_eq!(trainer.position().applied, 4);
        let allowed = poisoned[1..].to_vec();
        let (trainer, _, result) = train_poisoned(&stage, allowed, None, 10);
        result.unwrap();
        assert_eq!(trainer.position().skipped, u64::from(max_skipped));
    }
}

/// A group whose sums fail.
struct Broken;

impl Collective for Broken {
    fn rank(&self) -> u32 {
        0
    }
    fn world(&self) -> u32 {
        1
    }
    fn all_reduce_sum_in(&mut self, _: &mut Tensor, _: &Parts) -> Result<(), collective::Error> {
        Err(collective::Error::Aborted)
    }
    fn broadcast(&mut self, _: &mut Tensor, _: u32) -> Result<(), collective::Error> {
        Err(collective::Error::Aborted)
    }
    fn all_reduce_fixed(
        &mut self,
        _: Vec<collective::tree::Partial>,
        _: u32,
        _: &mut Tensor,
    ) -> Result<(), collective::Error> {
        Err(collective::Error::Aborted)
    }
    fn reduce_scatter_sum(&mut self, _: &mut Tensor, _: &Parts) -> Result<(), collective::Error> {
        Err(collective::Error::Aborted)
    }
    fn all_gather(&mut self, _: &mut Tensor, _: &Parts) -> Result<(), collective::Error> {
        Err(collective::Error::Aborted)
    }
    fn gather(&mut self, _: &[u8]) -> Result<Vec<Vec<u8>>, collective::Error> {
        Err(collective::Error::Aborted)
    }
    fn aborter(&self) -> std::sync::Arc<dyn Abort> {
        Solo::default().aborter()
    }
}

#[test]
fn a_step_that_was_not_reduced_is_not_applied() {
    let student = Mlp::new(Kind::Float);
    let mut trainer = Trainer::new(plan(None), student.parameters());
    let mut before = trainer.empty_snapshot();
    trainer.snapshot(&mut before);
    let error = trainer
        .run(
            &objective(),
            &student,
            None,
            &mut Broken,
            &mut Rowmaker::new(),
            &mut Recorder::until(1),
        )
        .unwrap_err();
    assert!(matches!(error, Error::Group { step: 0, .. }));
    let mut after = trainer.empty_snapshot();
    trainer.snapshot(&mut after);
    assert_eq!(before, after);
}

#[test]
fn compute_weights_are_the_rounded_masters() {
    let student = Mlp::new(Kind::BFloat16);
    let mut trainer = Trainer::new(plan(None), student.parameters());
    let mut recorder = Recorder::until(3);
    trainer
        .run(
            &objective(),
            &student,
            None,
            &mut Solo::default(),
            &mut Rowmaker::new(),
            &mut recorder,
        )
        .unwrap();
    let mut state = trainer.empty_snapshot();
    trainer.snapshot(&mut state);
    let rounded = |part| {
        let values = Tensor::from_slice(state.part(part).unwrap());
        values.to_kind(Kind::BFloat16).to_kind(Kind::Float)
    };
    let shown = || {
        let parts: Vec<Tensor> = student
            .weights
            .iter()
            .map(|(_, w)| w.flatten(0, -1))
            .collect();
        Tensor::cat(&parts, 0).detach().to_kind(Kind::Float)
    };
    assert_eq!(shown(), rounded(Part::Student));
    // f32 masters move by less than bf16 can show.
    assert_ne!(
        Tensor::from_slice(state.part(Part::Student).unwrap()),
        rounded(Part::Student)
    );
}

#[test]
fn a_state_that_lacks_a_tensor_or_has_another_size_is_refused_by_name() {
    let student = Mlp::new(Kind::Float);
    let mut trainer = Trainer::new(plan(None), student.parameters());
    let position = snapshot::Position::default();
    let error = Restoring::new(&mut trainer).finish(position).unwrap_err();
    assert_eq!(error.to_string(), "the state has no tensor adam_m/in.bias");
    let short = Tensor::from_slice(&[0.0f32; 3]);
    let mut restoring = Restoring::new(&mut trainer);
    // A tensor that nobody asks for is left alone.
    restoring.take(Part::Student, "other", &short).unwrap();
    let error = restoring
        .take(Part::Student, "in.bias", &short)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor student/in.bias of the state has 3 values, the student needs 16"
    );
}
