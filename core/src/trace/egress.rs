//! Packets of the node itself and of its pods: straight from the pod's device, or the stack's way, and tc egress of the
//! device that they leave by.

use kinesin_abi::{DEVICE_ETHERNET, DEVICE_POD, DEVICE_SERVED, FLOW_REDIRECT, FLOW_REPLY, FlowValue, proto};

use super::flows::tuple;
use super::ingress::program;
use super::route::{Fib, Hop};
use super::{Attached, Hook, RouteQuery, Step, Tracer, Verdict, View, Way, sure};

impl<V: View> Tracer<'_, V> {
    /// A packet of this node that no socket hook sees.
    pub(super) fn leave(&mut self) -> Result<Vec<Way>, V::Error> {
        let dst = self.packet.dst;
        if let Some((pod, how, hop)) = self.way_past_the_stack()? {
            let program = program("cil_from_container", dst.is_ipv6());
            self.hook(&program, format!("{how} ingress of {}", self.view.device_name(pod)), "");
            if let Some(flow) = self.find_flow()?.filter(is_answer) {
                let step = self.hop_step(dst, &hop);
                self.say(step);
                let device = self.view.device_name(hop.ifindex);
                return Ok(sure(self.written(Verdict::Sent { tuple: tuple(&flow), device })));
            }
        }
        let hop = match self.view.route(&RouteQuery { dst, src: None, ingress: None })? {
            Ok(hop) => hop,
            Err(why) => {
                self.say(Step::NoRoute { to: dst, why });
                return Ok(sure(Verdict::pass("the host's stack has no route for it")));
            }
        };
        let step = self.hop_step(dst, &hop);
        self.say(step);
        if hop.local {
            return Ok(sure(Verdict::pass("it is for this node itself, whose stack delivers it")));
        }
        let (ifindex, name) = (hop.ifindex, self.view.device_name(hop.ifindex));
        let Some(device) = self.view.device(ifindex)? else {
            return Ok(sure(Verdict::pass(format!("it leaves by {name}, which has no program of ours"))));
        };
        let v6 = dst.is_ipv6();
        let ethernet = device.flags & DEVICE_ETHERNET != 0;
        let program = program(if ethernet { "cil_to_netdev" } else { "cil_to_l3dev" }, v6);
        match self.view.attached(Hook::Egress { ifindex, v6 })? {
            Attached::Yes(how) => self.hook(&program, format!("{how} egress of {name}"), ""),
            Attached::No(why) => {
                self.hook(&program, format!("egress of {name}"), &format!("not attached: {why}"));
                return Ok(sure(Verdict::pass(format!("no program of ours is on {name}"))));
            }
        }
        self.egress()
    }

    /// Of a packet of a pod of this node that may pass the host's stack by: the pod's device, how our program hangs there, and
    /// the way.
    fn way_past_the_stack(&self) -> Result<Option<(u32, String, Hop)>, V::Error> {
        let (dst, v6) = (self.packet.dst, self.packet.dst.is_ipv6());
        let Some(src) = self.packet.src.filter(|_| self.has_ports()) else { return Ok(None) };
        if !self.view.settings()?.goes_straight(self.view.now()) {
            return Ok(None);
        }
        let Ok(pod) = self.view.route(&RouteQuery { dst: src, src: None, ingress: None })? else { return Ok(None) };
        let has = |ifindex, flag| {
            Ok::<_, V::Error>(self.view.device(ifindex)?.is_some_and(|device| device.flags & flag != 0))
        };
        if pod.local || !has(pod.ifindex, DEVICE_POD)? {
            return Ok(None);
        }
        let Attached::Yes(how) = self.view.attached(Hook::Pod { v6 })? else { return Ok(None) };
        let Fib::Hop(hop) = self.fib(pod.ifindex, src, dst)? else { return Ok(None) };
        let leaves = hop.is_known() && has(hop.ifindex, DEVICE_SERVED)?;
        Ok(leaves.then_some((pod.ifindex, how, hop)))
    }

    /// Only such packets have entries of their own.
    fn has_ports(&self) -> bool {
        matches!(self.packet.proto, proto::TCP | proto::UDP | proto::SCTP)
    }

    /// Only answers of local backends are changed on the way out.
    fn egress(&mut self) -> Result<Vec<Way>, V::Error> {
        if !self.has_ports() {
            return Ok(sure(Verdict::pass("only answers of backends are changed on the way out")));
        }
        match self.find_flow()? {
            Some(flow) if is_answer(&flow) => Ok(sure(self.written(Verdict::Translated(tuple(&flow))))),
            _ => Ok(sure(Verdict::pass("only answers of local backends are changed on the way out"))),
        }
    }
}

/// Whether the packets of an entry are answers of a backend of this node.
fn is_answer(flow: &FlowValue) -> bool {
    flow.flags & (FLOW_REPLY | FLOW_REDIRECT) == FLOW_REPLY
}
