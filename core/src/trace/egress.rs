//! Packets of the node itself: the stack's way, and tc egress of the device that they leave by.

use kinesin_abi::{DEVICE_ETHERNET, FLOW_REDIRECT, FLOW_REPLY, proto};

use super::flows::tuple;
use super::ingress::program;
use super::{Attached, Hook, RouteQuery, Step, Tracer, Verdict, View, Way, sure};

impl<V: View> Tracer<'_, V> {
    /// A packet of this node that no socket hook sees.
    pub(super) fn leave(&mut self) -> Result<Vec<Way>, V::Error> {
        let dst = self.packet.dst;
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

    /// Only answers of local backends are changed on the way out.
    fn egress(&mut self) -> Result<Vec<Way>, V::Error> {
        let ours = matches!(self.packet.proto, proto::TCP | proto::UDP | proto::SCTP);
        if !ours {
            return Ok(sure(Verdict::pass("only answers of backends are changed on the way out")));
        }
        match self.find_flow()? {
            Some(flow) if flow.flags & (FLOW_REPLY | FLOW_REDIRECT) == FLOW_REPLY => {
                Ok(sure(self.written(Verdict::Translated(tuple(&flow)))))
            }
            _ => Ok(sure(Verdict::pass("only answers of local backends are changed on the way out"))),
        }
    }
}
