//! Connections, as `ebpf/programs/src/flows.rs` finds and opens them.

use kinesin_abi::{
    Addr, Backend, BackendState, Be16, FLOW_DIRECT, FLOW_REPLY, FlowKey, FlowValue, FrontendKey, SEARCHED_MEMBERS,
    SLOT_EMPTY, SetRef, TCP_SEEN_ACK, TCP_SEEN_FIN, TCP_SEEN_FIN_REPLY, TCP_SEEN_REPLY, TCP_SEEN_RST, proto,
    tcp_closed,
};

use super::{FlowDirection, Port, Step, Tracer, Tuple, View};

const SECOND: u64 = 1_000_000_000;
/// How many ports of the range are looked at to see whether any is free.
const SAMPLES: u32 = 256;

fn seen(tcp: u8) -> Vec<String> {
    let names = [
        (TCP_SEEN_REPLY, "answered"),
        (TCP_SEEN_ACK, "established"),
        (TCP_SEEN_FIN, "fin"),
        (TCP_SEEN_FIN_REPLY, "fin-reply"),
        (TCP_SEEN_RST, "rst"),
    ];
    names.into_iter().filter(|(bit, _)| tcp & bit != 0).map(|(_, name)| name.into()).collect()
}

/// What the entry says that its packets become.
pub(super) fn tuple(flow: &FlowValue) -> Tuple {
    Tuple { src: flow.src.into(), sport: Port::only(flow.sport.get()), dst: flow.dst.into(), dport: flow.dport.get() }
}

impl<V: View> Tracer<'_, V> {
    /// The living entry of the packet's tuple; says what it finds.
    pub(super) fn find_flow(&mut self) -> Result<Option<FlowValue>, V::Error> {
        let Some(flow) = self.view.flow(&self.packet.key())? else {
            self.say(Step::NoFlow);
            return Ok(None);
        };
        let past = if self.packet.proto == proto::TCP && flow.is_over() {
            Some("the connection is over, and a SYN begins another one".to_owned())
        } else if flow.flags & FLOW_REPLY == 0 && !self.serves(&flow)? {
            Some("its backend takes no packets any more".to_owned())
        } else if flow.flags & FLOW_REPLY == 0
            && self.packet.proto != proto::TCP
            && flow.flags & FLOW_DIRECT == 0
            && !self.is_member(&flow)?
        {
            Some("its service does not have its backend any more".to_owned())
        } else {
            None
        };
        let direction = if flow.flags & FLOW_REPLY != 0 { FlowDirection::Reply } else { FlowDirection::Request };
        let idle = self.view.now().saturating_sub(flow.last_seen) / SECOND;
        let living = past.is_none();
        self.say(Step::Flow {
            direction,
            becomes: tuple(&flow),
            backend: flow.backend,
            idle_seconds: idle,
            seen: seen(flow.tcp),
            past,
        });
        Ok(living.then_some(flow))
    }

    /// Whether the backend of a connectionless flow is still one of its service's, where the flow last found it or
    /// elsewhere.
    fn is_member(&self, flow: &FlowValue) -> Result<bool, V::Error> {
        let first = |set: SetRef| SetRef { count: set.count.min(SEARCHED_MEMBERS), ..set };
        if flow.slot != SLOT_EMPTY && self.view.slots(SetRef { base: flow.slot, count: 1 })? == [flow.backend] {
            return Ok(true);
        }
        let key = self.packet.key();
        let key = FrontendKey { addr: key.dst, port: key.dport, proto: key.proto, pad: 0 };
        let Some(frontend) = self.view.frontend(&key)? else { return Ok(false) };
        let backend = self.view.backend(flow.backend)?;
        let leaving = backend.is_some_and(|backend| backend.state == BackendState::Terminating as u8);
        Ok(leaving
            || self.view.slots(first(frontend.external))?.contains(&flow.backend)
            || self.view.slots(first(frontend.internal))?.contains(&flow.backend)
            || frontend.external.count > SEARCHED_MEMBERS)
    }

    /// Whether the backend of a flow still takes packets.
    fn serves(&self, flow: &FlowValue) -> Result<bool, V::Error> {
        Ok(self.view.backend(flow.backend)?.is_some_and(|backend| backend.serves(&self.packet.key(), flow)))
    }

    /// The source port that a backend would see; none where no port is free. Sockets of the node, whose ports the programs
    /// leave alone, are not asked. `redirect` says that the node's address
    /// takes the client's place.
    pub(super) fn source_port(
        &self,
        backend: &Backend,
        source: Addr,
        redirect: bool,
    ) -> Result<Option<Port>, V::Error> {
        let client = self.packet.key();
        // A port of SCTP is never rewritten: it is the client's own or none.
        let fixed = client.proto == proto::SCTP;
        let settings = self.view.settings()?;
        let (min, span) = if fixed { (0, 0) } else { settings.snat_ports() };
        let own = u32::from(self.packet.sport);
        let own_fits = fixed || !redirect || (own >= min && own - min < span);
        // The entry of the backend's direction by which its answers are found, and what it would say.
        let key = |port: u16| FlowKey {
            src: backend.addr,
            dst: source,
            sport: backend.port,
            dport: Be16::new(port),
            proto: client.proto,
            pad: [0; 3],
        };
        let free = |port: u16, pressed: bool| -> Result<bool, V::Error> {
            let Some(holder) = self.view.flow(&key(port))? else { return Ok(true) };
            let same = (holder.src, holder.dst, holder.sport, holder.dport)
                == (client.dst, client.src, client.dport, client.sport);
            Ok(same || self.abandoned(&key(port), &holder, pressed)?)
        };
        let usual = settings.usual_snat_port(&client.src, client.sport) as u16;
        let first = if own_fits { self.packet.sport } else { usual };
        if (own_fits || span != 0) && free(first, span == 0)? {
            return Ok(Some(Port::only(first)));
        }
        if span == 0 {
            return Ok(None);
        }
        if self.view.flow(&key(usual))?.is_none() {
            return Ok(Some(Port::only(usual)));
        }
        let all = Port { first: min as u16, last: (min + span - 1) as u16 };
        let step = span.div_ceil(SAMPLES);
        for port in (min..min + span).step_by(step as usize) {
            if free(port as u16, true)? {
                return Ok(Some(all));
            }
        }
        // Of a larger range only some were looked at.
        Ok((step > 1).then_some(all))
    }

    /// Whether the connection of a reply entry is over, or has been silent for longer than it may.
    fn abandoned(&self, key: &FlowKey, reply: &FlowValue, pressed: bool) -> Result<bool, V::Error> {
        if tcp_closed(reply.tcp) && pressed {
            return Ok(true);
        }
        let timeouts = self.view.settings()?.timeouts;
        let quiet = u64::from(timeouts.of(key.proto, reply.flags, reply.tcp)) * SECOND;
        let silent = |last: u64| self.view.now().saturating_sub(last) > quiet;
        if !silent(reply.last_seen) {
            return Ok(false);
        }
        let forward = self.view.flow(&reply.partner_key(key))?;
        Ok(forward.is_none_or(|forward| silent(forward.last_seen)))
    }
}
