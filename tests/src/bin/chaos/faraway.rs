//! Things that are far away: hosts behind a network, and a store behind a proxy.

use std::time::Duration;

use super::hosts::{self, Hosts, address};
use super::proxy::{Mood, Proxy};
use super::server::{Server, s3_variables};
use super::site::{Setting, Site, Wrap};
use super::{Context, Score};

/// Hosts beside the coordinator's.
const WORKERS: u32 = 3;

/// Partitions both ways and one way, loss, resets, pulled cables.
pub(crate) fn network(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let alone = [
        ("min: 1, max: 2", "min: 1, max: 1"),
        (
            "cluster: {launcher: external,",
            "cluster: {launcher: external, listen: \"10.77.1.2:0\", tls: \"on\",",
        ),
    ];
    let mut setting = Setting::small(&context.base, &alone[..1]);
    let mut undisturbed = Site::begin(&setting)?;
    undisturbed.finish()?;
    for (from, to) in &alone[1..] {
        setting.recipe = setting.recipe.replace(from, to);
    }
    setting.pace = (250, 40);
    let mut number = 0;
    while !context.is_over(score.faults) {
        let mut stream = context.stream(number);
        let Some(hosts) = Hosts::new(number, WORKERS + 1)? else {
            score.skipped(hosts::NEEDED);
            return Ok(());
        };
        number += 1;
        let mut site = Site::new(&setting)?;
        site.wrap = Wrap {
            coordinator: hosts.on(1),
            worker: Vec::new(),
        };
        site.coordinate(&[])?;
        for host in 2..=WORKERS + 1 {
            site.wrap.worker = hosts.on(host);
            site.hire(1)?;
        }
        site.setting.workers = WORKERS as usize;
        score.runs += 1;
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(stream.below(700).into()));
            if site.succeeded()? {
                break;
            }
            let host = 2 + stream.below(WORKERS);
            let (worker, head) = (address(host), address(1));
            match stream.below(5) {
                0 => hosts.part(host, 1)?,
                1 => hosts.rule(&format!("-s {worker} -d {head} -j DROP"))?,
                2 => hosts.rule(&format!("-s {head} -d {worker} -j DROP"))?,
                3 => hosts.rule("-m statistic --mode random --probability 0.3 -j DROP")?,
                _ => hosts.rule(&format!(
                    "-s {worker} -p tcp -j REJECT --reject-with tcp-reset"
                ))?,
            }
            score.faults += 1;
            std::thread::sleep(Duration::from_millis(300 + u64::from(stream.below(4000))));
            hosts.heal()?;
        }
        site.finish()?;
        super::workers::check_wins(&site, score)?;
        if let Some(complaint) = site.audit(Some(&undisturbed.output()))? {
            score.violated(format!("{complaint}kept in {}", site.keep().display()));
        }
    }
    Ok(())
}

/// A bucket whose server is away, slow, busy, or loses replies after it did what it was asked.
pub(crate) fn store(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let Ok(program) = std::env::var("DISTILLERY_MOTO") else {
        score.skipped("DISTILLERY_MOTO is not set (make servers)");
        return Ok(());
    };
    let mut setting = Setting::small(&context.base, &[]);
    let mut undisturbed = Site::begin(&setting)?;
    undisturbed.finish()?;
    let server = Server::start(&program, &[], "127.0.0.1")?;
    let proxy = Proxy::before(([127, 0, 0, 1], server.port).into())?;
    let mut number = 0;
    while !context.is_over(score.faults) {
        let mut stream = context.stream(number);
        setting.output = Some(format!("s3://chaos/run{number}"));
        setting.variables = s3_variables(&format!("127.0.0.1:{}", proxy.port));
        number += 1;
        let mut site = Site::begin(&setting)?;
        score.runs += 1;
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(200 + u64::from(stream.below(1500))));
            if site.succeeded()? {
                break;
            }
            proxy.be(Mood::BAD[stream.below(Mood::BAD.len() as u32) as usize]);
            std::thread::sleep(Duration::from_millis(200 + u64::from(stream.below(3000))));
            proxy.be(Mood::Good);
            score.faults += 1;
        }
        site.finish()?;
        super::workers::check_wins(&site, score)?;
        if let Some(complaint) = site.audit(Some(&undisturbed.output()))? {
            score.violated(complaint);
        }
    }
    score.note(format!(
        "{} connections and replies were hurt",
        proxy.hurt()
    ));
    Ok(())
}
