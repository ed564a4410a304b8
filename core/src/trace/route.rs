//! The kernel's routing tables as `bpf_fib_lookup` consults them.

use std::net::IpAddr;

use kinesin_abi::{DEVICE_ETHERNET, DEVICE_POD};
use serde::{Deserialize, Serialize};

use super::{Step, Tracer, Tuple, Verdict, View};
use crate::devices::mac_text;

/// What is asked of the routing tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteQuery {
    /// Where to.
    pub dst: IpAddr,
    /// From whom, where that is known.
    pub src: Option<IpAddr>,
    /// The device that the packet came in by; none for the node's own.
    pub ingress: Option<u32>,
}

/// The way to an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hop {
    /// The address is this node's own.
    pub local: bool,
    /// The device that it leaves by.
    pub ifindex: u32,
    /// The next hop; none where the destination is on the link.
    pub via: Option<IpAddr>,
    /// The source address that the node itself would use.
    pub source: Option<IpAddr>,
    /// The next hop's MAC, where it is known.
    pub mac: Option<[u8; 6]>,
    /// State of the neighbour entry, or `none`.
    pub neighbour: String,
}

impl Hop {
    /// Whether the neighbour table has a MAC that is not known to be wrong (`NUD_VALID`).
    pub(super) fn is_known(&self) -> bool {
        self.mac.is_some() && !matches!(self.neighbour.as_str(), "failed" | "incomplete")
    }
}

/// What `bpf_fib_lookup` says.
pub(super) enum Fib {
    /// This way.
    Hop(Hop),
    /// The device does not forward: back out of it, as the programs decide.
    Back(u32),
    /// No way.
    None(String),
}

impl<V: View> Tracer<'_, V> {
    /// What the programs' own lookup finds.
    pub(super) fn fib(&self, ingress: u32, src: IpAddr, dst: IpAddr) -> Result<Fib, V::Error> {
        if !self.view.forwards(ingress, dst.is_ipv4())? {
            return Ok(Fib::Back(ingress));
        }
        let query = RouteQuery { dst, src: Some(src), ingress: Some(ingress) };
        Ok(match self.view.route(&query)? {
            Ok(hop) if hop.local => Fib::None(format!("{dst} is an address of this node")),
            Ok(hop) => Fib::Hop(hop),
            Err(why) => Fib::None(why),
        })
    }

    /// To a pod of this node: straight to its device where the settings, the device and the neighbour table allow that, else
    /// by the host's stack.
    pub(super) fn local_way(&self, ingress: u32, to: Tuple) -> Result<(Step, Verdict), V::Error> {
        if self.view.settings()?.goes_straight(self.view.now())
            && self.on_ethernet(ingress)?
            && let Fib::Hop(hop) = self.fib(ingress, to.src, to.dst)?
            && hop.is_known()
            && self.view.device(hop.ifindex)?.is_some_and(|device| device.flags & DEVICE_POD != 0)
        {
            let device = self.view.device_name(hop.ifindex);
            return Ok((self.hop_step(to.dst, &hop), Verdict::Sent { tuple: to, device }));
        }
        Ok((self.stack_step(to.dst)?, Verdict::Translated(to)))
    }

    fn on_ethernet(&self, ifindex: u32) -> Result<bool, V::Error> {
        Ok(self.view.device(ifindex)?.is_some_and(|device| device.flags & DEVICE_ETHERNET != 0))
    }

    pub(super) fn hop_step(&self, to: IpAddr, hop: &Hop) -> Step {
        Step::Route {
            to,
            device: self.view.device_name(hop.ifindex),
            via: hop.via,
            mac: hop.mac.map(mac_text),
            neighbour: hop.neighbour.clone(),
        }
    }

    /// The way that a device which forwards nothing has to its own LAN.
    pub(super) fn back_step(&self, to: IpAddr, ifindex: u32) -> Step {
        Step::Route {
            to,
            device: self.view.device_name(ifindex),
            via: None,
            mac: None,
            neighbour: "asked of the kernel when it is sent, as the device does not forward".into(),
        }
    }

    /// The way that the host's stack has, for a packet that it goes on with.
    pub(super) fn stack_step(&self, to: IpAddr) -> Result<Step, V::Error> {
        Ok(match self.view.route(&RouteQuery { dst: to, src: None, ingress: None })? {
            Ok(hop) => self.hop_step(to, &hop),
            Err(why) => Step::NoRoute { to, why },
        })
    }
}
