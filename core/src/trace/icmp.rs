//! Echo requests from a device: `icmp.rs` of the programs, told. Errors quote another packet: trace that one.

use kinesin_abi::{DropReason, SETTING_ANSWER_PING, frontend_flags};

use super::ingress::unicast;
use super::{Tracer, Verdict, View, Way, sure};

impl<V: View> Tracer<'_, V> {
    pub(super) fn echo_request(&mut self, ifindex: u32) -> Result<Vec<Way>, V::Error> {
        if self.own_address(ifindex)? {
            return Ok(sure(Verdict::pass("the host answers for its own address")));
        }
        if !self.announces(ifindex)? {
            match self.claimed()? {
                None => return Ok(sure(Verdict::pass("the destination is none of our addresses"))),
                Some(claim) if claim.flags & frontend_flags::ROUTABLE == 0 => {
                    return Ok(sure(Verdict::dropped(DropReason::IsClusterIp)));
                }
                Some(_) => {}
            }
        }
        if self.view.settings()?.flags & SETTING_ANSWER_PING == 0 {
            let v6 = self.packet.dst.is_ipv6();
            let reason = if v6 { DropReason::UnknownIcmp6Type } else { DropReason::UnknownIcmpType };
            return Ok(sure(Verdict::dropped(reason)));
        }
        if !unicast(self.packet.src) {
            return Ok(sure(Verdict::dropped(DropReason::InvalidPacket)));
        }
        Ok(sure(Verdict::Answered { with: "echo reply".into() }))
    }
}
