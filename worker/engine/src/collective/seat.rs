//! A place in a group to come, and the way that its members will take: alone, over TCP, or over NCCL.
//!
//! Every member opens a [`Seat`] and says a line of itself, its card, that reaches all of them. The way follows from the
//! cards, so that all members choose the same:
//!
//! ```text
//! 10.0.0.7:40123                  listens there for a ring
//! 10.0.0.7:40123 nccl             could also use NCCL
//! 10.0.0.7:40123 nccl 0a1b…       the same, of rank 0, with the id of the communicator in 256 hexadecimal digits
//! ```
//!
//! NCCL is taken when all could use it, the ring otherwise. Must never know who carries the cards.

use std::net::IpAddr;
use std::str::FromStr;

use tch::Device;

use super::nccl::{Nccl, Nvidia, UniqueId};
use super::solo::Solo;
use super::tcp::{Listener, TcpRing};
use super::{Collective, Error, Invitation};

/// Which way the operator wants: `tcp`, `nccl` or `auto`.
const WAY_VARIABLE: &str = "DISTILLERY_COLLECTIVE";

/// Names NCCL's file where it is installed under another name.
pub const LIBRARY_VARIABLE: &str = "DISTILLERY_NCCL";

/// How the members of a group may reach each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Way {
    /// NCCL where every member has a CUDA device and the library, else a ring.
    #[default]
    Auto,
    /// A ring, whatever the device.
    Tcp,
    /// NCCL or nothing.
    Nccl,
}

impl FromStr for Way {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "auto" => Ok(Self::Auto),
            "tcp" => Ok(Self::Tcp),
            "nccl" => Ok(Self::Nccl),
            other => Err(Error::Setup {
                reason: format!("{WAY_VARIABLE} is `{other}`; it may be auto, tcp or nccl"),
            }),
        }
    }
}

/// What the operator of a host wants.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wish {
    /// Which way.
    pub way: Way,
    /// NCCL's file, where it is not the one that the loader finds.
    pub library: Option<String>,
}

impl Wish {
    /// As `DISTILLERY_COLLECTIVE` and `DISTILLERY_NCCL` say.
    pub fn from_environment() -> Result<Self, Error> {
        let way = match std::env::var(WAY_VARIABLE) {
            Ok(text) if !text.is_empty() => text.parse()?,
            _ => Way::Auto,
        };
        let library = std::env::var(LIBRARY_VARIABLE).ok();
        Ok(Self {
            way,
            library: library.filter(|name| !name.is_empty()),
        })
    }
}

/// A member's place before the group forms.
#[derive(Debug)]
pub struct Seat {
    device: Device,
    way: Way,
    listener: Listener,
    /// Where NCCL may be used.
    library: Option<Nvidia>,
}

impl Seat {
    /// Opens a seat as the environment wishes; see [`Self::open_as`].
    pub fn open(
        device: Device,
        advertise: IpAddr,
        rank: u32,
        world: u32,
    ) -> Result<(Self, String), Error> {
        Self::open_as(&Wish::from_environment()?, device, advertise, rank, world)
    }

    /// Opens a seat for `rank` of `world` with `device`. The text is the member's card, which every member needs.
    ///
    /// `advertise` is an address of this host that the other members reach; nothing listens on any other.
    pub fn open_as(
        wish: &Wish,
        device: Device,
        advertise: IpAddr,
        rank: u32,
        world: u32,
    ) -> Result<(Self, String), Error> {
        assert!(rank < world, "a rank lies in its world");
        let library = match (wish.way, device) {
            (Way::Tcp, _) | (Way::Auto, Device::Cpu | Device::Mps | Device::Vulkan) => None,
            (Way::Auto, Device::Cuda(_)) => match serving(wish, device) {
                Ok(library) => Some(library),
                Err(error) => {
                    tracing::warn!(%error, "no NCCL here: the group sums over TCP");
                    None
                }
            },
            (Way::Nccl, _) => Some(serving(wish, device)?),
        };
        let (listener, address) = TcpRing::listen(advertise).map_err(|source| Error::Setup {
            reason: format!("nothing can listen on {advertise}: {source}"),
        })?;
        let card = match &library {
            None => address.to_string(),
            Some(library) if rank == 0 => format!("{address} nccl {}", UniqueId::new(library)?),
            Some(_) => format!("{address} nccl"),
        };
        let seat = Self {
            device,
            way: wish.way,
            listener,
            library,
        };
        Ok((seat, card))
    }

    /// Forms the group with everybody whose cards are the invitation's `peers`.
    pub fn connect(self, invitation: &Invitation<'_>) -> Result<Box<dyn Collective>, Error> {
        let (rank, world) = (invitation.rank, invitation.peers.len() as u32);
        if world == 1 && self.way != Way::Nccl {
            return Ok(Box::new(Solo::default()));
        }
        let cards: Vec<Card> = invitation
            .peers
            .iter()
            .map(|text| text.parse())
            .collect::<Result<_, Error>>()?;
        if let Some((library, id)) = self.nccl(&cards)? {
            let (device, deadline) = (self.device, invitation.deadline);
            let ended = &invitation.ended;
            let nccl = Nccl::join(&library, &id, rank, world, device, deadline, ended)?;
            return Ok(Box::new(nccl));
        }
        let addresses: Vec<String> = cards.into_iter().map(|card| card.address).collect();
        let ring = self.listener.connect(&Invitation {
            peers: &addresses,
            ..invitation.clone()
        })?;
        Ok(Box::new(ring))
    }

    /// The library and the communicator's id where all members can use NCCL.
    fn nccl(&self, cards: &[Card]) -> Result<Option<(Nvidia, UniqueId)>, Error> {
        let id = cards.first().and_then(|card| card.id.clone());
        let without = cards.iter().position(|card| !card.can_nccl);
        match (without, id, &self.library) {
            (None, Some(id), Some(library)) => Ok(Some((*library, id))),
            (Some(rank), ..) if self.way == Way::Nccl => Err(Error::Setup {
                reason: format!("NCCL is asked for, and rank {rank} cannot use it"),
            }),
            (None, None, _) => Err(Error::Setup {
                reason: "rank 0 can use NCCL and has no id for it".to_owned(),
            }),
            (None, Some(_), None) => Err(Error::Setup {
                reason: "all ranks are said to use NCCL, and this one cannot".to_owned(),
            }),
            (Some(_), ..) => Ok(None),
        }
    }
}

/// The library that the wish names, if it can serve `device`.
fn serving(wish: &Wish, device: Device) -> Result<Nvidia, Error> {
    let library = Nvidia::open(wish.library.as_deref())?;
    library.check_serves(device)?;
    Ok(library)
}

/// What a member says of itself.
#[derive(Debug, PartialEq, Eq)]
struct Card {
    /// `host:port` for a ring.
    address: String,
    can_nccl: bool,
    /// Of rank 0.
    id: Option<UniqueId>,
}

impl FromStr for Card {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let words: Vec<&str> = text.split(' ').collect();
        let (address, can_nccl, id) = match words[..] {
            [address] => (address, false, None),
            [address, "nccl"] => (address, true, None),
            [address, "nccl", id] => (address, true, Some(id.parse()?)),
            _ => {
                return Err(Error::Setup {
                    reason: format!("`{text}` is no card of a member"),
                });
            }
        };
        Ok(Self {
            address: address.to_owned(),
            can_nccl,
            id,
        })
    }
}
