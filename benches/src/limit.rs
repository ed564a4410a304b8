//! What the extra hop of a backend elsewhere costs by itself: frames to the pod that go by way of the entry node, where a
//! program of a dozen instructions sends them on to the MAC of the pod's node and does nothing else. No balancer that sends
//! packets on from a tc hook can be faster, however little it does.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use anyhow::Context;
use kinesin::lab::Pod;
use kinesin::net::Rtnl;
use kinesin::net::rtnl::Route;

use crate::bpf::{self, Foreign, insn};
use crate::cluster::Cluster;

/// Where the destination address is in a frame.
const IP_DESTINATION: u32 = 30;

/// An address of the pod that leads by way of the entry node, and the program there, for as long as this lives.
pub(crate) struct Bare {
    _link: OwnedFd,
}

impl Bare {
    /// Gives the pod, which is on the second node, another address, and sends what is for it on from the first one.
    pub(crate) fn start(cluster: &Cluster, pod: &Pod, address: Ipv4Addr) -> anyhow::Result<Self> {
        let (lab, to) = (&cluster.lab, ipnet::Ipv4Net::new(address, 32)?);
        let (entry, node) = (lab.node(1), lab.node(2));
        let (ifindex, macs) = cluster.runtime.block_on(async {
            let inside = Rtnl::open_in(pod.netns())?;
            inside.add_address(inside.device("eth0").await?.ifindex, to.into()).await?;
            let client = Rtnl::open_in(lab.client().netns())?;
            let (ifindex, via) = (client.device("eth0").await?.ifindex, Some(entry.address().into()));
            client.add_route(Route { to: to.into(), via, ifindex, source: None }).await?;
            let behind = Rtnl::open_in(node.netns())?;
            let ifindex = behind.device(&format!("veth-{}", pod.name())).await?.ifindex;
            behind.add_route(Route { to: to.into(), via: None, ifindex, source: None }).await?;
            let own = Rtnl::open_in(entry.netns())?.device("eth0").await?;
            let macs = own.mac.zip(behind.device("eth0").await?.mac).context("eth0 of a node has no MAC")?;
            anyhow::Ok((own.ifindex, macs))
        })?;
        let link = entry.netns().run(|| load(address, macs, ifindex)?.link(ifindex, bpf::TCX_INGRESS, 0))??;
        Ok(Self { _link: link })
    }
}

/// Loads the program: frames to the address get both MACs, `from` first, and leave by the device that they came in. As their
/// sender, the client would seem to be behind the entry node, and what is for it would go there.
fn load(address: Ipv4Addr, (from, to): ([u8; 6], [u8; 6]), ifindex: u32) -> io::Result<Foreign> {
    let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (to, from);
    let code = [
        insn(0xbf, 6, 1, 0, 0),                                   // r6 = context
        insn(0x20, 0, 0, 0, IP_DESTINATION),                      // r0 = destination address
        insn(0x56, 0, 0, 11, u32::from(address)),                 // another one: pass
        insn(0x62, 10, 0, -16, u32::from_ne_bytes([a, b, c, d])), // the MACs, on the stack
        insn(0x62, 10, 0, -12, u32::from_ne_bytes([e, f, g, h])), //
        insn(0x62, 10, 0, -8, u32::from_ne_bytes([i, j, k, l])),  //
        insn(0xbf, 1, 6, 0, 0),                                   //
        insn(0xb7, 2, 0, 0, 0),                                   //
        insn(0xbf, 3, 10, 0, 0),                                  //
        insn(0x07, 3, 0, 0, -16i32 as u32),                       //
        insn(0xb7, 4, 0, 0, 12),                                  //
        insn(0xb7, 5, 0, 0, 0),                                   //
        insn(0x85, 0, 0, 0, 9),                                   // bpf_skb_store_bytes
        insn(0x05, 0, 0, 2, 0),                                   //
        insn(0xb7, 0, 0, 0, -1i32 as u32),                        // pass: TC_ACT_UNSPEC
        insn(0x95, 0, 0, 0, 0),                                   //
        insn(0xb7, 1, 0, 0, ifindex),                             //
        insn(0xb7, 2, 0, 0, 0),                                   //
        insn(0x85, 0, 0, 0, 23),                                  // bpf_redirect
        insn(0x95, 0, 0, 0, 0),                                   //
    ];
    Foreign::of(bpf::SCHED_CLS, 0, &code)
}
