//! Sockets of the node and its pods: `sock.rs` of the programs, told.

use kinesin_abi::{
    Addr, AffinityKey, Be16, FLOW_REPLY, FrontendKey, FrontendKind, FrontendValue, PeerKey, frontend_flags, proto,
};

use super::select::{self, Candidate, member};
use super::{Attached, Hook, Step, Tracer, Verdict, View, Way, text};

/// How the frontend of another node's NodePort is found.
const OF_ANOTHER_NODE: &str = "another-node";

impl<V: View> Tracer<'_, V> {
    /// A socket that connects, or sends without having connected.
    pub(super) fn socket(&mut self, netns: Option<u64>, host: bool) -> Result<Vec<Way>, V::Error> {
        if self.answers_a_client()? {
            self.hook("cil_sock4_connect", "cgroup".into(), "not asked: the packet answers a client that is known");
            return self.leave();
        }
        let v6 = self.packet.dst.is_ipv6();
        let program = match (v6, self.packet.proto) {
            (false, proto::UDP) => "cil_sock4_connect, cil_sock4_sendmsg",
            (false, _) => "cil_sock4_connect",
            (true, proto::UDP) => "cil_sock6_connect, cil_sock6_sendmsg",
            (true, _) => "cil_sock6_connect",
        };
        let whose = if host { "a process of this node" } else { "a pod of this node" };
        match self.view.attached(Hook::Socket { v6 })? {
            Attached::Yes(how) => self.hook(program, format!("{how} of {whose}"), ""),
            Attached::No(why) => {
                self.hook(program, whose.into(), &format!("not attached: {why}"));
                return self.leave();
            }
        }
        if !matches!(self.packet.proto, proto::TCP | proto::UDP) {
            return self.leave();
        }
        let Some((key, by, frontend)) = self.socket_frontend(host)? else { return self.leave() };
        self.frontend_step(&key, by, &frontend, false);
        let candidates = self.choose_for_socket(&frontend, netns)?;
        let denied = Verdict::Denied { errno: "EPERM".into() };
        select::ways(candidates, denied, |candidate| self.connects(candidate))
    }

    /// Whether the tuple is that of a local backend which answers: such packets come from a socket that was accepted.
    fn answers_a_client(&self) -> Result<bool, V::Error> {
        if self.packet.src.is_none() {
            return Ok(false);
        }
        Ok(self.view.flow(&self.packet.key())?.is_some_and(|flow| flow.flags & FLOW_REPLY != 0))
    }

    /// The frontend of a socket's destination; wildcards do not concern sockets.
    fn socket_frontend(&mut self, host: bool) -> Result<Option<(FrontendKey, &'static str, FrontendValue)>, V::Error> {
        let exact = self.frontend_key(Be16::new(self.packet.dport), self.packet.proto);
        let found = self.view.frontend(&exact)?;
        let mut tried = vec![text::frontend(&exact)];
        if let Some(frontend) = found {
            if frontend.flags & frontend_flags::WILDCARD == 0 {
                return Ok(Some((exact, "exact", frontend)));
            }
        } else if let Some((by, kinds)) = self.stands_for_all(host)? {
            let key = FrontendKey { addr: exact.addr.every(), ..exact };
            tried.push(text::frontend(&key));
            if let Some(frontend) = self.view.frontend(&key)? {
                let local = frontend.flags & frontend_flags::EXTERNAL_LOCAL != 0 && by == OF_ANOTHER_NODE;
                if !local && kinds.iter().any(|kind| frontend.flags & frontend_flags::KIND == *kind as u32) {
                    return Ok(Some((key, by, frontend)));
                }
            }
        }
        self.say(Step::NoFrontend { tried });
        Ok(None)
    }

    /// What the destination is, where it may stand for every address of a node, and for which kinds of frontends. The node's
    /// loopback addresses lead to NodePorts and host ports, those of a pod are the pod's own; those of other nodes lead to
    /// NodePorts.
    fn stands_for_all(&self, host: bool) -> Result<Option<(&'static str, &'static [FrontendKind])>, V::Error> {
        let dst = self.packet.dst;
        if dst.is_loopback() {
            return Ok(host.then_some(("any-local-address", &[FrontendKind::NodePort, FrontendKind::HostPort])));
        }
        let settings = self.view.settings()?;
        if !(settings.node_port_min..=settings.node_port_max).contains(&self.packet.dport) {
            return Ok(None);
        }
        let dst = Addr::from(dst);
        let peer = self.view.peer(&PeerKey::of_addr(&dst))?.filter(|peer| peer.is_at(&dst));
        Ok(peer.map(|_| (OF_ANOTHER_NODE, [FrontendKind::NodePort].as_slice())))
    }

    fn choose_for_socket(&mut self, frontend: &FrontendValue, netns: Option<u64>) -> Result<Vec<Candidate>, V::Error> {
        if frontend.flags & frontend_flags::AFFINITY != 0 {
            let key = netns.map(|cookie| AffinityKey::of_netns(cookie, frontend.service));
            let client = netns.map_or_else(|| "its network namespace".into(), |cookie| format!("netns {cookie:#x}"));
            if let Some(bound) = self.recall(frontend, frontend.internal, key, client)? {
                return Ok(vec![bound]);
            }
        }
        self.random(frontend.internal)
    }

    fn connects(&self, (chance, id, backend): Candidate) -> Result<Way, V::Error> {
        let chosen = member(id, &backend);
        let to = chosen.address;
        let steps = vec![Step::Backend(chosen.clone()), self.stack_step(to.ip())?];
        Ok(Way { chance, backend: Some(chosen), steps, verdict: Verdict::Connects { to } })
    }
}
