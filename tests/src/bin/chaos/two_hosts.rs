//! A cluster in small: the coordinator and a worker on one host, a worker on another, the bucket on a third, TLS on, and
//! cables that are pulled between any two of them.

use std::time::Duration;

use super::hosts::{self, Hosts, address};
use super::server::{Server, s3_variables};
use super::site::{Setting, Site, Wrap};
use super::{Context, Score};

/// The coordinator's, which has a worker too.
const HEAD: u32 = 1;
/// The other worker's.
const OTHER: u32 = 2;
/// The bucket's.
const BUCKET: u32 = 3;
/// Cables.
const PAIRS: [(u32, u32); 3] = [(HEAD, OTHER), (OTHER, BUCKET), (HEAD, BUCKET)];

/// Partitions between hosts, one after the other, each healed before the next.
pub(crate) fn partitions(context: &Context, score: &mut Score) -> anyhow::Result<()> {
    let Ok(program) = std::env::var("DISTILLERY_MOTO") else {
        score.skipped("DISTILLERY_MOTO is not set (make servers)");
        return Ok(());
    };
    let mut setting = Setting::small(&context.base, &[("min: 1, max: 2", "min: 2, max: 2")]);
    let mut undisturbed = Site::begin(&setting)?;
    undisturbed.finish()?;
    let there = format!(
        "cluster: {{launcher: external, listen: \"{}:0\", tls: \"on\",",
        address(HEAD)
    );
    setting.recipe = setting
        .recipe
        .replace("cluster: {launcher: external,", &there);
    setting.pace = (250, 40);
    let mut number = 0;
    while !context.is_over(score.faults) {
        let mut stream = context.stream(number);
        let Some(hosts) = Hosts::new(number, BUCKET)? else {
            score.skipped(hosts::NEEDED);
            return Ok(());
        };
        let server = Server::start(&program, &hosts.on(BUCKET), &address(BUCKET))?;
        setting.output = Some(format!("s3://chaos/run{number}"));
        setting.variables = s3_variables(&server.endpoint());
        number += 1;
        let mut site = Site::new(&setting)?;
        site.wrap.coordinator = hosts.on(HEAD);
        site.coordinate(&[])?;
        for host in [HEAD, OTHER] {
            site.wrap = Wrap {
                worker: hosts.on(host),
                ..site.wrap.clone()
            };
            site.hire(1)?;
        }
        score.runs += 1;
        // Each cable once, in an order of the run's own.
        let first = stream.below(PAIRS.len() as u32) as usize;
        for pair in 0..PAIRS.len() {
            std::thread::sleep(Duration::from_millis(300 + u64::from(stream.below(1200))));
            if site.succeeded()? {
                break;
            }
            let (one, other) = PAIRS[(first + pair) % PAIRS.len()];
            hosts.part(one, other)?;
            score.faults += 1;
            std::thread::sleep(Duration::from_millis(500 + u64::from(stream.below(5000))));
            hosts.heal()?;
        }
        site.finish()?;
        super::workers::check_wins(&site, score)?;
        if let Some(complaint) = site.audit(Some(&undisturbed.output()))? {
            score.violated(format!("{complaint}kept in {}", site.keep().display()));
        }
    }
    score.note("every run was audited in its bucket: one COMMIT per task, an exact ledger, the undisturbed student");
    Ok(())
}
