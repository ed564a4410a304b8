//! tc ingress of a device: `ingress.rs` of the programs, told.

use std::net::IpAddr;

use kinesin_abi::{
    Addr, Backend, Be16, DEVICE_ETHERNET, DEVICE_XDP, DropReason, FLOW_DIRECT, FLOW_HANDED_ON, FLOW_REDIRECT,
    FLOW_REPLY, FlowValue, FrontendKey, FrontendKind, FrontendValue, L2Key, NodeTag, PEER_BY_ROUTE, PEER_TAKES_NEW,
    PeerKey, PeerValue, SETTING_REJECT_NO_BACKEND, frontend_flags, proto,
};

use super::flows::tuple;
use super::route::Fib;
use super::select::{self, Candidate, member};
use super::{Attached, Hook, Neighbour, Port, Step, Tracer, Tuple, Verdict, View, Way, sure, text};
use crate::devices::mac_text;

impl<V: View> Tracer<'_, V> {
    /// A packet that comes in by a device.
    pub(super) fn ingress(&mut self, ifindex: u32) -> Result<Vec<Way>, V::Error> {
        let name = self.view.device_name(ifindex);
        let device = self.view.device(ifindex)?;
        let ethernet = device.is_none_or(|device| device.flags & DEVICE_ETHERNET != 0);
        let v6 = self.packet.dst.is_ipv6();
        let program = program(if ethernet { "cil_from_netdev" } else { "cil_from_l3dev" }, v6);
        match self.view.attached(Hook::Ingress { ifindex, v6 })? {
            Attached::Yes(how) => {
                let driver = device.is_some_and(|device| device.flags & DEVICE_XDP != 0);
                let note = if driver { "cil_xdp_entry comes first: what it sends, it sends as told here" } else { "" };
                self.hook(&program, format!("{how} ingress of {name}"), note);
            }
            Attached::No(why) => {
                self.hook(&program, format!("ingress of {name}"), &format!("not attached: {why}"));
                return Ok(sure(Verdict::pass(format!("no program of ours is on {name}"))));
            }
        }
        if ethernet {
            self.neighbour(ifindex, name)?;
        }
        match self.packet.proto {
            proto::ICMP | proto::ICMPV6 => self.echo_request(ifindex),
            proto::TCP | proto::UDP | proto::SCTP => self.ported(ifindex),
            _ if self.claimed()?.is_some() => Ok(sure(Verdict::dropped(DropReason::UnknownL4))),
            _ => Ok(sure(Verdict::pass("the destination is none of our addresses"))),
        }
    }

    pub(super) fn hook(&mut self, program: &str, place: String, note: &str) {
        self.say(Step::Hook { program: program.into(), place, note: note.into() });
    }

    /// Who answers neighbours for the destination.
    fn neighbour(&mut self, ifindex: u32, device: String) -> Result<(), V::Error> {
        let address = self.packet.dst;
        let answers = if self.announces(ifindex)? {
            if self.view.settings()?.is_alive(self.view.now()) {
                Neighbour::Program
            } else {
                Neighbour::SilentWithoutAgent
            }
        } else if self.own_address(ifindex)? {
            Neighbour::Host
        } else {
            Neighbour::NotThisNode
        };
        self.say(Step::Neighbour { address, device, answers });
        Ok(())
    }

    pub(super) fn announces(&self, ifindex: u32) -> Result<bool, V::Error> {
        self.view.announced(&L2Key { addr: self.packet.dst(), ifindex })
    }

    /// Whether the destination is the device's own address.
    pub(super) fn own_address(&self, ifindex: u32) -> Result<bool, V::Error> {
        let dst = self.packet.dst();
        Ok(self.view.device(ifindex)?.is_some_and(|device| {
            if dst.is_v4() { device.ipv4 == dst.v4_raw() } else { device.ipv6 == dst && !dst.is_unspecified() }
        }))
    }

    /// The wildcard of the destination, by which all of its ports are ours.
    pub(super) fn claimed(&self) -> Result<Option<FrontendValue>, V::Error> {
        self.view.frontend(&self.frontend_key(Be16::new(0), proto::ANY))
    }

    pub(super) fn frontend_key(&self, port: Be16, proto: u8) -> FrontendKey {
        FrontendKey { addr: self.packet.dst(), port, proto, pad: 0 }
    }

    /// TCP, UDP or SCTP.
    fn ported(&mut self, ifindex: u32) -> Result<Vec<Way>, V::Error> {
        if let Some(flow) = self.find_flow()? {
            if flow.flags & (FLOW_DIRECT | FLOW_REPLY) == FLOW_DIRECT {
                return Ok(sure(Verdict::pass("it is addressed to the backend; only the answers are translated")));
            }
            if flow.flags & FLOW_HANDED_ON == 0 || flow.flags & FLOW_REDIRECT != 0 {
                return self.follow(ifindex, &flow);
            }
            // TCP remembers the node, other protocols their backend.
            let node = if self.packet.proto == proto::TCP {
                Some(flow.slot)
            } else {
                let backend = self.view.backend(flow.backend)?;
                backend.filter(|backend| backend.addr == flow.dst).map(|backend| backend.node())
            };
            if let Some(node) = node
                && let Some(verdict) = self.hand_on(ifindex, node, false, true)?
            {
                return Ok(sure(verdict));
            }
        }
        let exact = self.frontend_key(Be16::new(self.packet.dport), self.packet.proto);
        if let Some(frontend) = self.view.frontend(&exact)? {
            self.frontend_step(&exact, "exact", &frontend, true);
            return self.begin(ifindex, &frontend);
        }
        let any = self.frontend_key(Be16::new(0), proto::ANY);
        if let Some(frontend) = self.view.frontend(&any)? {
            self.frontend_step(&any, "wildcard", &frontend, true);
            return Ok(sure(Verdict::dropped(DropReason::NoBackend)));
        }
        self.say(Step::NoFrontend { tried: vec![text::frontend(&exact), text::frontend(&any)] });
        Ok(sure(Verdict::pass("the destination is no service")))
    }

    pub(super) fn frontend_step(&mut self, key: &FrontendKey, by: &str, frontend: &FrontendValue, external: bool) {
        let (set, local) = if external {
            (frontend.external, frontend_flags::EXTERNAL_LOCAL)
        } else {
            (frontend.internal, frontend_flags::INTERNAL_LOCAL)
        };
        self.say(Step::Frontend {
            key: text::frontend(key),
            by: by.into(),
            kind: text::kind(frontend.flags).into(),
            service: self.view.service_name(key),
            id: frontend.service,
            scope: if external { "external" } else { "internal" }.into(),
            policy: if frontend.flags & local != 0 { "Local" } else { "Cluster" }.into(),
            backends: set.count,
        });
    }

    /// A packet of a known connection.
    fn follow(&mut self, ifindex: u32, flow: &FlowValue) -> Result<Vec<Way>, V::Error> {
        let redirect = flow.flags & FLOW_REDIRECT != 0;
        if !redirect && flow.flags & FLOW_REPLY != 0 {
            return Ok(sure(Verdict::pass("answers of a local backend leave by egress; nobody out here may send one")));
        }
        let to = tuple(flow);
        if !redirect {
            let (step, verdict) = self.local_way(ifindex, to)?;
            self.say(step);
            return Ok(sure(self.written(verdict)));
        }
        let (step, verdict) = self.send(ifindex, to)?;
        self.say(step);
        Ok(sure(self.written(verdict)))
    }

    /// To the node of a backend as it is: one that takes `new` connections, or any; a neighbour on the packet's device, or
    /// one by route where the way may be `far`.
    fn hand_on(&self, ifindex: u32, node: NodeTag, new: bool, far: bool) -> Result<Option<Verdict>, V::Error> {
        let peer = self.view.peer(&PeerKey::of_node(node))?;
        let Some(peer) = peer.filter(|peer| !new || peer.flags & PEER_TAKES_NEW != 0) else { return Ok(None) };
        if peer.flags & PEER_BY_ROUTE == 0 {
            let device = self.view.device_name(ifindex);
            let mac = mac_text(peer.mac_bytes());
            return Ok((peer.ifindex == ifindex).then_some(Verdict::HandedOn { mac, device }));
        }
        if far { self.wrap(ifindex, &peer) } else { Ok(None) }
    }

    /// The first packet of a connection: as [`Self::hand_on`], or to the backend itself with the client's address.
    fn hand_on_first(
        &self,
        ifindex: u32,
        backend: &Backend,
        forwarding: u32,
        steps: &mut Vec<Step>,
    ) -> Result<Option<Verdict>, V::Error> {
        if forwarding != frontend_flags::FORWARDING_OPT {
            return self.hand_on(ifindex, backend.node(), true, forwarding == frontend_flags::FORWARDING_IPIP);
        }
        let peer = self.view.peer(&PeerKey::of_node(backend.node()))?;
        let takes = peer.is_some_and(|peer| {
            const BOTH: u16 = PEER_TAKES_NEW | PEER_BY_ROUTE;
            peer.flags & BOTH == BOTH
        });
        if !takes {
            return self.hand_on(ifindex, backend.node(), true, false);
        }
        let (src, dst) = (self.packet.src.unwrap_or(self.packet.dst), IpAddr::from(backend.addr));
        let sport = Port::only(self.packet.sport);
        let (step, verdict) = self.send(ifindex, Tuple { src, sport, dst, dport: backend.port.get() })?;
        let Verdict::Sent { .. } = &verdict else { return Ok(None) };
        let why = "the packet says which service it is for, and the backend's node answers the client".to_owned();
        steps.extend([step, Step::Source { address: src, kept: true, port: sport, why }]);
        Ok(Some(verdict))
    }

    /// To a node by route, inside another packet; none where there is no address or no way.
    fn wrap(&self, ifindex: u32, peer: &PeerValue) -> Result<Option<Verdict>, V::Error> {
        let to = if self.packet.dst.is_ipv6() { peer.ipv6 } else { Addr::from_v4_raw(peer.ipv4) };
        if to.is_unspecified() || to == Addr::from_v4_raw(0) {
            return Ok(None);
        }
        let Some((_, own)) = self.source_address(ifindex, ifindex)? else { return Ok(None) };
        let egress = match self.fib(ifindex, own, to.into())? {
            Fib::Hop(hop) => hop.ifindex,
            Fib::Back(ifindex) => ifindex,
            Fib::None(_) => return Ok(None),
        };
        let from = self.source_address(egress, ifindex)?;
        let device = self.view.device_name(egress);
        Ok(from.map(|(_, from)| Verdict::Wrapped { from, to: to.into(), device }))
    }

    /// The first packet of a connection to one of our frontends.
    fn begin(&mut self, ifindex: u32, frontend: &FrontendValue) -> Result<Vec<Way>, V::Error> {
        let drop = |reason| Ok(sure(Verdict::dropped(reason)));
        if frontend.flags & frontend_flags::WILDCARD != 0 {
            return drop(DropReason::NoBackend);
        }
        if frontend.flags & frontend_flags::ROUTABLE == 0 {
            return drop(DropReason::IsClusterIp);
        }
        if frontend.flags & frontend_flags::SOURCE_RANGES != 0 && !self.serves_client(frontend)? {
            return drop(DropReason::SourceRange);
        }
        if frontend.external.count == 0 {
            return self.refuse();
        }
        let candidates = self.choose(frontend)?;
        select::ways(candidates, Verdict::dropped(DropReason::NoBackend), |candidate| {
            self.to_backend(ifindex, frontend, candidate)
        })
    }

    /// No backend: dropped, and the client is told where the settings and its address allow.
    fn refuse(&self) -> Result<Vec<Way>, V::Error> {
        let asked = self.view.settings()?.flags & SETTING_REJECT_NO_BACKEND != 0;
        let told = (asked && unicast(self.packet.src)).then(|| "ICMP port unreachable".to_owned());
        let reason = DropReason::NoBackend;
        Ok(sure(Verdict::Dropped { reason: reason.text().into(), number: reason as u8, told }))
    }

    fn to_backend(
        &self,
        ifindex: u32,
        frontend: &FrontendValue,
        (chance, id, backend): Candidate,
    ) -> Result<Way, V::Error> {
        let mut steps = vec![Step::Backend(member(id, &backend))];
        // Peers know only a node's primary addresses.
        let known =
            frontend.flags & frontend_flags::KIND != FrontendKind::NodePort as u32 || self.own_address(ifindex)?;
        let forwarding = frontend.flags & frontend_flags::FORWARDING;
        if !backend.is_local()
            && forwarding != frontend_flags::FORWARDING_SNAT
            && known
            && let Some(verdict) = self.hand_on_first(ifindex, &backend, forwarding, &mut steps)?
        {
            return Ok(Way { chance, backend: Some(member(id, &backend)), steps, verdict });
        }
        let verdict = self.written(self.deliver(ifindex, &backend, &mut steps)?);
        Ok(Way { chance, backend: Some(member(id, &backend)), steps, verdict })
    }

    fn deliver(
        &self,
        ifindex: u32,
        backend: &kinesin_abi::Backend,
        steps: &mut Vec<Step>,
    ) -> Result<Verdict, V::Error> {
        let dst = IpAddr::from(backend.addr);
        let client = self.packet.src.unwrap_or(self.packet.dst);
        if backend.is_local() {
            let Some(sport) = self.source_port(backend, self.packet.src(), false)? else {
                return Ok(Verdict::dropped(DropReason::NoNatMapping));
            };
            let why = "the backend is on this node".to_owned();
            steps.push(Step::Source { address: client, kept: true, port: sport, why });
            let (step, verdict) =
                self.local_way(ifindex, Tuple { src: client, sport, dst, dport: backend.port.get() })?;
            steps.push(step);
            return Ok(verdict);
        }
        let egress = match self.fib(ifindex, client, dst)? {
            Fib::Hop(hop) => {
                steps.push(self.hop_step(dst, &hop));
                hop.ifindex
            }
            Fib::Back(ifindex) => {
                steps.push(self.back_step(dst, ifindex));
                ifindex
            }
            Fib::None(why) => {
                steps.push(Step::NoRoute { to: dst, why });
                return Ok(Verdict::dropped(DropReason::FibLookupFailed));
            }
        };
        let Some((device, source)) = self.source_address(egress, ifindex)? else {
            return Ok(Verdict::dropped(DropReason::NoNatMapping));
        };
        let Some(sport) = self.source_port(backend, source.into(), true)? else {
            return Ok(Verdict::dropped(DropReason::NoNatMapping));
        };
        let why = format!("the backend is on another node and answers the address of {device}");
        steps.push(Step::Source { address: source, kept: false, port: sport, why });
        let tuple = Tuple { src: source, sport, dst, dport: backend.port.get() };
        Ok(Verdict::Sent { tuple, device: self.view.device_name(egress) })
    }

    /// What becomes of a translation when it is written: a port of SCTP cannot be.
    pub(super) fn written(&self, verdict: Verdict) -> Verdict {
        let (Verdict::Translated(to) | Verdict::Sent { tuple: to, .. }) = &verdict else { return verdict };
        let packet = &self.packet;
        let kept = to.sport == Port::only(packet.sport) && to.dport == packet.dport;
        if packet.proto == proto::SCTP && !kept { Verdict::dropped(DropReason::CsumL4) } else { verdict }
    }

    /// The node's address for connections that leave by one device and came in by another, and whose it is.
    fn source_address(&self, egress: u32, ingress: u32) -> Result<Option<(String, IpAddr)>, V::Error> {
        for ifindex in [egress, ingress] {
            let device = self.view.device(ifindex)?.unwrap_or_default();
            let own = if self.packet.dst.is_ipv6() { device.ipv6 } else { Addr::from_v4_raw(device.ipv4) };
            if own.v4_raw() != 0 || !(own.is_v4() || own.is_unspecified()) {
                return Ok(Some((self.view.device_name(ifindex), own.into())));
            }
        }
        Ok(None)
    }

    /// Out of a device, past the host's stack.
    fn send(&self, ifindex: u32, tuple: Tuple) -> Result<(Step, Verdict), V::Error> {
        Ok(match self.fib(ifindex, tuple.src, tuple.dst)? {
            Fib::Hop(hop) => {
                let device = self.view.device_name(hop.ifindex);
                (self.hop_step(tuple.dst, &hop), Verdict::Sent { tuple, device })
            }
            Fib::Back(ifindex) => {
                let device = self.view.device_name(ifindex);
                (self.back_step(tuple.dst, ifindex), Verdict::Sent { tuple, device })
            }
            Fib::None(why) => (Step::NoRoute { to: tuple.dst, why }, Verdict::dropped(DropReason::FibLookupFailed)),
        })
    }
}

/// Whether an answer may be sent to the address (RFC 1122 section 3.2.2).
pub(super) fn unicast(src: Option<IpAddr>) -> bool {
    match src {
        Some(IpAddr::V4(v4)) => {
            let [first, ..] = v4.octets();
            first != 0 && first != 127 && first < 224
        }
        Some(IpAddr::V6(v6)) => !v6.is_unspecified() && !v6.is_loopback() && !v6.is_multicast(),
        None => false,
    }
}

/// A program's name; those of IPv6 have a 6 behind it.
pub(super) fn program(name: &str, v6: bool) -> String {
    if v6 { format!("{name}6") } else { name.to_owned() }
}
