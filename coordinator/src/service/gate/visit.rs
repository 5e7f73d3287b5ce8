//! Who is at the door, and who is inside.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use tokio::sync::oneshot;

use super::refusals::Refusals;
use super::{LEAVING, Limits, WINDOW};
use crate::metrics::Metrics;

/// Addresses whose failures are counted at a time.
const ADDRESSES: usize = 4096;

/// Everybody who is connected.
#[derive(Debug, Clone)]
pub struct Book {
    limits: Limits,
    pages: Arc<Mutex<Pages>>,
}

#[derive(Debug, Default)]
struct Pages {
    /// In the order of their arrival.
    strangers: BTreeMap<u64, Stranger>,
    arrivals: u64,
    /// Sent away, and not gone yet.
    leaving: usize,
    members: usize,
    looks: u64,
    failures: BTreeMap<IpAddr, u32>,
    refusals: Refusals,
}

#[derive(Debug)]
struct Stranger {
    address: IpAddr,
    arrived: u64,
    has_spoken: bool,
    dismiss: oneshot::Sender<()>,
}

impl Pages {
    /// Crosses out a stranger that became a member or is gone, whether it was sent away before or not.
    fn forget(&mut self, id: u64) {
        if self.strangers.remove(&id).is_none() {
            self.leaving -= 1;
        }
    }

    /// Whom to send away, of those whose grace is over: of the address that takes most places, one that has not said a word,
    /// or else the one that has stood there longest.
    fn least_welcome(&self, limits: &Limits) -> Option<u64> {
        let mut crowds: BTreeMap<IpAddr, usize> = BTreeMap::new();
        for stranger in self.strangers.values() {
            *crowds.entry(stranger.address).or_default() += 1;
        }
        let over = self.strangers.iter().filter(|(_, stranger)| {
            let grace = match stranger.has_spoken {
                true => limits.grace,
                false => limits.silent_grace,
            };
            stranger.arrived < self.looks.saturating_sub(grace)
        });
        // Of equals the last one counts, which in reverse is who came first.
        let found = over.rev().max_by_key(|(_, stranger)| {
            (crowds.get(&stranger.address).copied(), !stranger.has_spoken)
        });
        found.map(|(&id, _)| id)
    }
}

impl Book {
    /// Nobody is there yet. Whoever is turned away is counted in `metrics`.
    pub fn new(limits: Limits, metrics: Metrics) -> Self {
        let pages = Pages {
            refusals: Refusals::new(metrics),
            ..Pages::default()
        };
        Self {
            limits,
            pages: Arc::new(Mutex::new(pages)),
        }
    }

    /// Writes down who came from `peer`; nobody if too many from there came to nothing lately. On loopback an address says
    /// nothing about who calls, so it is held against nobody.
    pub fn enter(&self, peer: SocketAddr) -> Option<(Arc<Visit>, oneshot::Receiver<()>)> {
        let address = neighbourhood(peer.ip());
        let mut pages = self.pages();
        let failures = pages.failures.get(&address).copied().unwrap_or(0);
        if failures >= self.limits.failures && !address.is_loopback() {
            let reason = "too many connections from there came to nothing lately";
            pages.refusals.note(address, reason);
            return None;
        }
        let id = pages.arrivals;
        pages.arrivals += 1;
        let (dismiss, dismissed) = oneshot::channel();
        let arrived = pages.looks;
        pages.strangers.insert(
            id,
            Stranger {
                address,
                arrived,
                has_spoken: false,
                dismiss,
            },
        );
        let visit = Visit {
            id,
            address,
            book: self.clone(),
            member: AtomicBool::new(false),
            failure: OnceLock::new(),
        };
        Some((Arc::new(visit), dismissed))
    }

    /// Whether another stranger may come. Where all places are taken, one whose grace is over is sent away, but no more
    /// than [`LEAVING`] are on their way out at a time.
    pub fn make_room(&self) -> bool {
        let mut pages = self.pages();
        if pages.strangers.len() < self.limits.strangers {
            return true;
        }
        if pages.leaving >= LEAVING {
            return false;
        }
        let Some(id) = pages.least_welcome(&self.limits) else {
            return false;
        };
        if let Some(stranger) = pages.strangers.remove(&id) {
            pages.leaving += 1;
            // It may be leaving already.
            let _ = stranger.dismiss.send(());
        }
        true
    }

    /// Time goes on by one look.
    pub fn look(&self) {
        let mut pages = self.pages();
        pages.looks += 1;
        if pages.looks.is_multiple_of(WINDOW) {
            pages.failures.clear();
            pages.refusals.close();
        }
    }

    /// Says what was only counted so far.
    pub fn close_window(&self) {
        self.pages().refusals.close();
    }

    /// Logs that a connection of `peer` was turned away.
    pub fn refuse(&self, peer: SocketAddr, reason: &str) {
        self.pages().refusals.note(peer.ip(), reason);
    }

    /// Strangers and members.
    #[cfg(test)]
    pub(super) fn count(&self) -> (usize, usize) {
        let pages = self.pages();
        (pages.strangers.len(), pages.members)
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().expect("no holder of this lock can panic")
    }
}

/// Whom an address belongs to: a single IPv4 address, or an IPv6 network of 64 bits, which one host may have whole.
fn neighbourhood(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) if address.is_loopback() => address.into(),
        IpAddr::V6(address) => {
            let network = address.to_bits() & !u128::from(u64::MAX);
            Ipv6Addr::from_bits(network).into()
        }
    }
}

/// One connection, from its arrival to its end.
#[derive(Debug)]
pub struct Visit {
    id: u64,
    address: IpAddr,
    book: Book,
    member: AtomicBool,
    failure: OnceLock<String>,
}

/// There is no place for another member.
#[derive(Debug, thiserror::Error)]
#[error("this coordinator serves {members} connections already, which is its limit")]
pub struct Full {
    members: usize,
}

impl Visit {
    /// Its holder has shown the token.
    ///
    /// # Errors
    /// [`Full`] when as many as may be are inside already.
    pub fn prove(&self) -> Result<(), Full> {
        if self.is_member() {
            return Ok(());
        }
        let mut pages = self.book.pages();
        let members = self.book.limits.members;
        if pages.members >= members {
            let _ = self
                .failure
                .set("there is no place for another member".to_owned());
            return Err(Full { members });
        }
        if !self.member.swap(true, Ordering::SeqCst) {
            pages.members += 1;
            pages.forget(self.id);
        }
        Ok(())
    }

    /// Its holder has said something, whatever it is.
    pub(super) fn spoke(&self) {
        if let Some(stranger) = self.book.pages().strangers.get_mut(&self.id) {
            stranger.has_spoken = true;
        }
    }

    /// Whom its address belongs to.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Whether the token was shown.
    pub fn is_member(&self) -> bool {
        self.member.load(Ordering::SeqCst)
    }

    /// Why it comes to nothing, if it does; the first reason counts.
    pub fn failed(&self, reason: String) {
        let _ = self.failure.set(reason);
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut pages = self.book.pages();
        if self.is_member() {
            pages.members -= 1;
            return;
        }
        pages.forget(self.id);
        if pages.failures.len() < ADDRESSES || pages.failures.contains_key(&self.address) {
            *pages.failures.entry(self.address).or_default() += 1;
        }
        let reason = self
            .failure
            .get()
            .map_or("it left without showing the token", String::as_str);
        pages.refusals.note(self.address, reason);
    }
}
