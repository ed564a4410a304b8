//! `enable-host-legacy-routing=false`: packets to pods of this node go straight to them, and by the host's stack whenever
//! there is something about them that only the stack does.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::Instant;

use aya::maps::{PerCpuArray, PerCpuValues};
use kinesin::datapath::MapStore;
use kinesin_abi::{
    DEVICE_ACROSS, DEVICE_ETHERNET, DEVICE_POD, DEVICE_SERVED, DeviceValue, SETTING_DIRECT_TO_PODS,
    SETTING_DIRECT_WATCHED, Settings, WATCHED_FOR, proto,
};
use kinesin_core::trace::Verdict;

use crate::bpf;
use crate::packets::{ACK, End, IP, SYN, ends, tcp, ttl, udp};
use crate::packets6::{ends6, hops, tcp6};
use crate::rig::*;
use crate::trace::{self, Seen, Traced};
use crate::traffic::{Lan, PATIENCE, connect_to, exchange};

const POD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x55];
pub(crate) const POD_DEVICE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x54];
/// Datagrams per family; more than what else a pod and its node have to say to each other meanwhile.
const DATAGRAMS: u64 = 500;

pub(crate) fn direct() -> Settings {
    let settings = settings();
    Settings { flags: settings.flags | SETTING_DIRECT_TO_PODS, ..settings }
}

fn pod_device() -> DeviceValue {
    DeviceValue { mac: POD_DEVICE_MAC, flags: DEVICE_ETHERNET | DEVICE_POD, ..DeviceValue::default() }
}

/// A rig whose local pods are behind a device of their own, and known to the neighbour table.
pub(crate) fn with_pod() -> Rig {
    let rig = Rig::dual();
    ip("link add pod0 address 02:00:00:00:00:54 type veth peer name pod1");
    ip("link set pod0 up");
    ip("link set pod1 up");
    ip("route add 10.42.1.5/32 dev pod0");
    ip("neigh add 10.42.1.5 lladdr 02:00:00:00:00:55 dev pod0");
    ip("route add fd00:42:1::5/128 dev pod0");
    ip("neigh add fd00:42:1::5 lladdr 02:00:00:00:00:55 dev pod0");
    rig.maps.put_device(ifindex("pod0"), &pod_device()).unwrap();
    rig.maps.write_settings(&direct()).unwrap();
    rig
}

const SECOND: u64 = 1_000_000_000;
const FROM: End = (CLIENT, 40_000);
const TO: End = (VIP, TO_LOCAL);

impl Rig {
    /// Makes the programs ask the routing tables for the next packet, whatever they were told moments ago.
    pub(crate) fn ask_again(&mut self) {
        let map = self.datapath.ebpf_mut().map_mut("WAYS").expect("in the object");
        let mut ways: PerCpuArray<_, [u8; 96]> = map.try_into().expect("an array for each CPU");
        for index in 0..ways.len() {
            let nothing = vec![[0; 96]; aya::util::nr_cpus().unwrap().get() as usize];
            ways.set(index, PerCpuValues::try_from(nothing).unwrap(), 0).unwrap();
        }
    }

    /// The packet is translated, and goes straight to the pod, or by the stack.
    #[track_caller]
    fn assert_goes(&mut self, packet: &[u8], straight: bool) {
        let before = ttl(packet);
        let (code, out) = self.ingress(packet);
        assert_eq!(ends(&out), (ends(packet).0, (LOCAL_POD, 8080)));
        if straight {
            assert_eq!((code, ttl(&out)), (REDIRECT, before - 1));
            assert_eq!(out[..12], [POD_MAC, POD_DEVICE_MAC].concat(), "the frame is for the pod");
        } else {
            assert_eq!((code, ttl(&out)), (NEXT, before));
            assert_eq!(out[..12], packet[..12], "as it came");
        }
    }
}

#[test]
fn packets_to_pods_of_this_node_get_their_frame_and_one_hop_less() {
    isolated(|| {
        let mut rig = with_pod();
        for protocol in [proto::TCP, proto::UDP] {
            let first = crate::packets::packet(protocol, FROM, TO);
            rig.assert_goes(&first, true);
            // One of the connection, too.
            let next = if protocol == proto::TCP { tcp(FROM, TO, ACK) } else { first };
            rig.assert_goes(&next, true);
        }
        for flags in [SYN, ACK] {
            let packet = tcp6((CLIENT6, 40_000), (VIP6, TO_LOCAL), flags);
            let (code, out) = rig.ingress6(&packet);
            assert_eq!((code, hops(&out)), (REDIRECT, hops(&packet) - 1));
            assert_eq!(out[..12], [POD_MAC, POD_DEVICE_MAC].concat());
            assert_eq!(ends6(&out), ((CLIENT6, 40_000), (LOCAL_POD6, 8080)));
        }
        // What is for another node or for nobody is none of it.
        let (code, out) = rig.ingress(&tcp(FROM, (VIP, TO_REMOTE), SYN));
        assert_eq!((code, ends(&out).1), (REDIRECT, (REMOTE_POD, 8080)));
        rig.assert_untouched(&tcp(FROM, (LOCAL_POD, 8080), SYN));
        rig.assert_untouched(&tcp(FROM, (NODE, 22), SYN));
    });
}

#[test]
fn whatever_only_the_stack_does_is_left_to_it() {
    isolated(|| {
        let mut rig = with_pod();
        let packet = tcp(FROM, TO, SYN);
        rig.assert_goes(&packet, true);
        let put = |rig: &Rig, flags| {
            rig.maps.put_device(ifindex("pod0"), &DeviceValue { flags, ..pod_device() }).unwrap();
        };

        // The last hop, which is answered with an error.
        let mut last = packet.clone();
        last[IP + 8] = 1;
        crate::packets::seal_ip(&mut last);
        rig.assert_goes(&last, false);
        // A packet that is too long for the device, one that just fits, and one that would.
        ip("link set pod0 mtu 1280");
        for (len, straight) in [(1280, true), (1281, false), (100, true)] {
            rig.assert_goes(&udp(FROM, TO, &vec![1; len - 28]), straight);
        }
        ip("link set pod0 mtu 1500");
        // A device that is none of a pod.
        put(&rig, DEVICE_ETHERNET);
        rig.ask_again();
        rig.assert_goes(&packet, false);
        put(&rig, DEVICE_ETHERNET | DEVICE_POD);
        rig.assert_goes(&packet, true);
        // The key, which works at once.
        rig.maps.write_settings(&settings()).unwrap();
        rig.assert_goes(&packet, false);
        rig.maps.write_settings(&direct()).unwrap();
        rig.assert_goes(&packet, true);
        // While somebody looks whether the stack is needed, and no longer.
        let watched = Settings { flags: direct().flags | SETTING_DIRECT_WATCHED, ..direct() };
        for (age, straight) in [(0, true), (WATCHED_FOR - SECOND, true), (WATCHED_FOR + SECOND, false)] {
            rig.maps.write_settings(&Settings { alive_at: now() - age, ..watched }).unwrap();
            rig.assert_goes(&packet, straight);
        }
        rig.maps.write_settings(&direct()).unwrap();
        // A host that does not forward.
        forwarding(false);
        rig.ask_again();
        rig.assert_goes(&packet, false);
        forwarding(true);
        // A neighbour that is not known.
        ip("neigh del 10.42.1.5 dev pod0");
        rig.ask_again();
        rig.assert_goes(&packet, false);
        ip("neigh add 10.42.1.5 lladdr 02:00:00:00:00:55 dev pod0");
        rig.assert_goes(&packet, true);
        // No route, and an address of the host itself.
        ip("route replace unreachable 10.42.1.5/32");
        rig.ask_again();
        rig.assert_goes(&packet, false);
        ip("route del unreachable 10.42.1.5/32");
        ip("addr add 10.42.1.5/32 dev lo");
        rig.assert_goes(&packet, false);
    });
}

#[test]
fn what_the_routing_tables_said_is_believed_for_moments_and_of_the_same_two_ends_only() {
    isolated(|| {
        let mut rig = with_pod();
        let packet = tcp(FROM, TO, SYN);
        rig.assert_goes(&packet, true);
        ip("rule add from 10.0.0.78 lookup 100 pref 1");
        ip("route add unreachable default table 100");
        // Another client, whom a rule of the host leads elsewhere, at the same place of the table or another one.
        for last in 0..=255 {
            let client = Ipv4Addr::new(10, 0, 0, last);
            rig.assert_goes(&tcp((client, 40_000), TO, SYN), last != 78);
        }
        // A length that nobody has asked about.
        ip("link set pod0 mtu 1280");
        rig.assert_goes(&udp(FROM, TO, &[1; 100]), true);
        rig.assert_goes(&udp(FROM, TO, &[1; 1300]), false);
        // The other end of the pair is another pod's by now.
        rig.assert_goes(&packet, true);
        ip("neigh replace 10.42.1.5 lladdr 02:00:00:00:00:66 dev pod0");
        let deadline = Instant::now() + PATIENCE;
        while rig.ingress(&packet).1[..6] == POD_MAC {
            assert!(Instant::now() < deadline, "the old neighbour is believed for ever");
        }
        assert_eq!(rig.ingress(&packet).1[..6], [2, 0, 0, 0, 0, 0x66]);
    });
}

/// `kinesin trace`, held against the programs.
#[test]
fn the_way_to_a_pod_of_this_node_is_told() {
    isolated(|| {
        let mut traced = Traced::of(with_pod(), &[]);
        let to_pod = |sport| trace::packet(proto::TCP, (CLIENT, sport), (VIP, TO_LOCAL));
        let straight = |sport| Seen::Sent((CLIENT, sport).into(), (LOCAL_POD, 8080).into());
        let by_stack = |sport| Seen::Translated((CLIENT, sport).into(), (LOCAL_POD, 8080).into());
        // The first packet of a connection, and another one.
        for _ in 0..2 {
            let (said, seen) = traced.agree(&to_pod(1));
            assert_eq!(seen, straight(1));
            let Verdict::Sent { device, .. } = &said.ways[0].verdict else { panic!("{said:?}") };
            assert_eq!(device, "pod0");
        }
        ip("neigh del 10.42.1.5 dev pod0");
        traced.rig.ask_again();
        traced.look_again();
        assert_eq!(traced.agree(&to_pod(1)).1, by_stack(1));
        assert_eq!(traced.agree(&to_pod(2)).1, by_stack(2));
        ip("neigh add 10.42.1.5 lladdr 02:00:00:00:00:55 nud stale dev pod0");
        traced.look_again();
        assert_eq!(traced.agree(&to_pod(2)).1, straight(2));
        traced.rig.maps.write_settings(&settings()).unwrap();
        assert_eq!(traced.agree(&to_pod(2)).1, by_stack(2));
    });
}

/// Packets of a family that the stack of this namespace has forwarded.
fn forwarded(v6: bool) -> u64 {
    if v6 {
        let text = fs::read_to_string("/proc/thread-self/net/snmp6").unwrap();
        let line = text.lines().find(|line| line.starts_with("Ip6OutForwDatagrams")).unwrap();
        return line.split_whitespace().nth(1).unwrap().parse().unwrap();
    }
    crate::snmp::counters("Ip")["ForwDatagrams"]
}

/// Real sockets at both ends. The stack forwards both directions of a connection to a pod, or its answers alone, or nothing.
#[test]
fn real_traffic_passes_the_hosts_stack_in_both_directions_in_one_or_in_none() {
    isolated(|| {
        let mut lan = Lan::dual();
        let maps = lan.datapath.as_ref().unwrap().maps();
        let families: [(IpAddr, IpAddr); 2] = [(CLIENT.into(), VIP.into()), (CLIENT6.into(), VIP6.into())];
        let value = DeviceValue { flags: DEVICE_ETHERNET | DEVICE_POD, ..DeviceValue::default() };
        maps.put_device(ifindex("pod0"), &value).unwrap();
        let by_neighbour = device().flags | DEVICE_SERVED;
        // Kernels without tcx have no programs at pods' devices.
        let answers = if bpf::has_tcx() { 0 } else { 1 };
        // Out of the LAN device, or into its other end.
        let ways = [
            (settings(), device().flags, 2),
            (direct(), device().flags, 1),
            (direct(), by_neighbour, answers),
            (direct(), by_neighbour | DEVICE_ACROSS, answers),
            (settings(), by_neighbour | DEVICE_ACROSS, 2),
            (direct(), by_neighbour, answers),
        ];
        lan.datapath.as_mut().unwrap().follow_pods(&BTreeSet::from([ifindex("pod0")]));
        for (settings, flags, times) in ways {
            maps.write_settings(&settings).unwrap();
            maps.put_device(ifindex(LAN), &DeviceValue { flags, ..device() }).unwrap();
            for (client, vip) in families {
                // Until the neighbour is known, all of it goes by the stack.
                lan.client.run(move || exchange(&connect_to((vip, TO_LOCAL).into()).unwrap(), 4 << 20));
                let before = forwarded(vip.is_ipv6());
                lan.client.run(move || {
                    let socket = UdpSocket::bind((client, 0)).unwrap();
                    socket.set_read_timeout(Some(PATIENCE)).unwrap();
                    socket.connect((vip, TO_LOCAL)).unwrap();
                    for number in 0..DATAGRAMS {
                        socket.send(&number.to_be_bytes()).unwrap();
                        let mut bytes = [0; 8];
                        assert_eq!(socket.recv(&mut bytes).unwrap(), 8);
                        assert_eq!(u64::from_be_bytes(bytes), number);
                    }
                    // In fragments.
                    let sent: Vec<u8> = (0..4000).map(|at| at as u8).collect();
                    let mut bytes = vec![0; 8000];
                    socket.send(&sent).unwrap();
                    assert_eq!(socket.recv(&mut bytes).unwrap(), sent.len());
                    assert!(bytes[..sent.len()] == sent);
                });
                let passed = forwarded(vip.is_ipv6()) - before;
                let expected = times * DATAGRAMS;
                // What was in fragments, and what pods and their node have to say to each other.
                assert!((expected..expected + DATAGRAMS / 2).contains(&passed), "{vip}: {passed}, not {expected}");
            }
        }
        assert_eq!(maps.drops().unwrap(), []);
        // To the node itself nothing has changed.
        maps.write_settings(&direct()).unwrap();
        let host: (Ipv4Addr, u16) = (VIP, crate::traffic::TO_HOST);
        lan.client.run(move || exchange(&connect_to(host.into()).unwrap(), 100_000));
    });
}
