//! Answers of pods leave straight from the pod's device, and by the host's stack whenever there is something about them that
//! only the stack does. Real traffic is in `deliver`.

use kinesin::datapath::MapStore;
use kinesin_abi::{DEVICE_ACROSS, DEVICE_SERVED, DeviceValue, proto};
use kinesin_core::trace::{Place, Verdict};

use crate::bpf;
use crate::deliver::{POD_DEVICE_MAC, direct, with_pod};
use crate::packets::{ACK, End, IP, SYN, ends, seal_ip, tcp, ttl, udp};
use crate::packets6::{ends6, hops, tcp6};
use crate::rig::*;
use crate::trace::{self, Seen, Traced};

const SYN_ACK: u8 = SYN | ACK;
const FROM: End = (CLIENT, 40_000);
const TO: End = (VIP, TO_LOCAL);
const POD: End = (LOCAL_POD, 8080);

/// The packet in a frame for its gateway.
pub(crate) fn sent_by_pod(packet: &[u8]) -> Vec<u8> {
    [&POD_DEVICE_MAC, &packet[6..]].concat()
}

fn serve(rig: &Rig, flags: u16) {
    rig.maps.put_device(rig.lan, &DeviceValue { flags: device().flags | flags, ..device() }).unwrap();
}

/// A rig with a connection by TCP and one by UDP to a pod of its own.
fn with_connections(flags: u16) -> Rig {
    let mut rig = with_pod();
    serve(&rig, flags);
    for protocol in [proto::TCP, proto::UDP] {
        rig.ingress(&crate::packets::packet(protocol, FROM, TO));
    }
    rig
}

impl Rig {
    fn leave_pod(&mut self, packet: &[u8]) -> (i32, Vec<u8>) {
        self.run_on("cil_from_container", &sent_by_pod(packet), ifindex("pod0"))
    }

    /// The answer goes straight to the LAN, or untouched to the stack.
    #[track_caller]
    fn assert_leaves(&mut self, answer: &[u8], straight: bool) {
        let (code, out) = self.leave_pod(answer);
        if straight {
            assert_eq!((code, ttl(&out), ends(&out)), (REDIRECT, ttl(answer) - 1, (TO, FROM)));
        } else {
            assert_eq!((code, out), (NEXT, sent_by_pod(answer)));
            // Where it is translated as it leaves, as ever.
            let (code, out) = self.egress(answer);
            assert_eq!((code, ends(&out)), (NEXT, (TO, FROM)));
        }
    }
}

#[test]
fn answers_have_the_services_address_and_one_hop_less() {
    isolated(|| {
        let mut rig = with_connections(DEVICE_SERVED | DEVICE_ACROSS);
        for answer in [tcp(POD, FROM, SYN_ACK), tcp(POD, FROM, ACK), udp(POD, FROM, b"answer")] {
            rig.assert_leaves(&answer, true);
        }
        // Into the other end, as a frame for the client; once a second by the neighbour table, which makes the frame later.
        let answer = tcp(POD, FROM, ACK);
        let frame = [CLIENT_MAC, NODE_MAC].concat();
        let frames = (0..3).map(|_| rig.leave_pod(&answer).1[..12] == frame[..]);
        assert!(frames.filter(|is| *is).count() >= 2);

        rig.ingress6(&tcp6((CLIENT6, 40_000), (VIP6, TO_LOCAL), SYN));
        let answer = tcp6((LOCAL_POD6, 8080), (CLIENT6, 40_000), SYN_ACK);
        for _ in 0..2 {
            let (code, out) = rig.run_on("cil_from_container6", &sent_by_pod(&answer), ifindex("pod0"));
            assert_eq!((code, hops(&out)), (REDIRECT, hops(&answer) - 1));
            assert_eq!(ends6(&out), ((VIP6, TO_LOCAL), (CLIENT6, 40_000)));
        }
    });
}

#[test]
fn what_answers_nobody_is_left_alone() {
    isolated(|| {
        let mut rig = with_connections(DEVICE_SERVED);
        // Of connections that are none of ours, in both directions; and what its client sends.
        for packet in [
            tcp(POD, (CLIENT, 1), SYN_ACK),
            tcp((LOCAL_POD, 1), FROM, SYN),
            udp((LOCAL_POD, 1), FROM, b""),
            tcp(FROM, TO, ACK),
        ] {
            let (code, out) = rig.leave_pod(&packet);
            assert_eq!((code, out), (NEXT, sent_by_pod(&packet)));
        }
    });
}

#[test]
fn whatever_only_the_stack_does_is_left_to_it() {
    isolated(|| {
        let mut rig = with_connections(DEVICE_SERVED);
        let answer = udp(POD, FROM, b"answer");
        rig.assert_leaves(&answer, true);

        // The last hop, which is answered with an error; a fragment.
        let mut odd = answer.clone();
        odd[IP + 8] = 1;
        seal_ip(&mut odd);
        rig.assert_leaves(&odd, false);
        let mut odd = answer.clone();
        odd[IP + 6] |= 0x20;
        seal_ip(&mut odd);
        rig.assert_leaves(&odd, false);
        // A packet that is too long for the device, and one that just fits.
        ip("link set lan0 mtu 1280");
        for (len, straight) in [(1280, true), (1281, false)] {
            rig.assert_leaves(&udp(POD, FROM, &vec![1; len - 28]), straight);
        }
        ip("link set lan0 mtu 1500");
        // A device that we do not serve.
        serve(&rig, 0);
        rig.ask_again();
        rig.assert_leaves(&answer, false);
        serve(&rig, DEVICE_SERVED);
        rig.assert_leaves(&answer, true);
        // The key, which works at once.
        rig.maps.write_settings(&settings()).unwrap();
        rig.assert_leaves(&answer, false);
        rig.maps.write_settings(&direct()).unwrap();
        rig.assert_leaves(&answer, true);
        // A host that does not forward.
        forwarding(false);
        rig.ask_again();
        rig.assert_leaves(&answer, false);
        forwarding(true);
        // A neighbour that is not known.
        ip("neigh del 192.168.1.50 dev lan0");
        rig.ask_again();
        rig.assert_leaves(&answer, false);
        ip("neigh add 192.168.1.50 lladdr 02:00:00:00:00:50 dev lan0");
        // A rule of the host for what the pod sends.
        ip("rule add from 10.42.1.5 lookup 100 pref 1");
        ip("route add unreachable default table 100");
        rig.ask_again();
        rig.assert_leaves(&answer, false);
        ip("rule del pref 1");
        rig.assert_leaves(&answer, true);
    });
}

/// `kinesin trace`, held against the programs.
#[test]
fn the_way_of_answers_is_told() {
    isolated(|| {
        let mut rig = with_pod();
        serve(&rig, DEVICE_SERVED);
        rig.datapath.follow_pods(&[ifindex("pod0")].into());
        let mut traced = Traced::of(rig, &[]);
        traced.look_again();
        for protocol in [proto::TCP, proto::UDP] {
            traced.agree(&trace::packet(protocol, FROM, TO));
            let answer = trace::packet(protocol, POD, FROM);
            // Kernels without tcx have no programs at pods' devices, and no way but the stack's.
            if bpf::has_tcx() {
                let (said, seen) = traced.agree_from_pod("pod0", &answer);
                assert_eq!(seen, Seen::Sent(TO.into(), FROM.into()));
                let Verdict::Sent { device, .. } = &said.ways[0].verdict else { panic!("{said:?}") };
                assert_eq!(device, LAN);
            }
            let (_, seen) = traced.agree_from_pod("pod0", &trace::packet(protocol, (LOCAL_POD, 9), (CLIENT, 9)));
            assert_eq!(seen, Seen::Untouched);
            traced.rig.maps.write_settings(&settings()).unwrap();
            let (_, seen) = traced.agree_at("cil_to_netdev", &answer, Place::Node);
            assert_eq!(seen, Seen::Translated(TO.into(), FROM.into()));
            traced.rig.maps.write_settings(&direct()).unwrap();
        }
    });
}
