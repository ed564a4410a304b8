//! Hooks: attached, adopted, replaced, independent of each other.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;

use aya::programs::TcAttachType;
use kinesin::datapath::{AttachMode, Attachment, Datapath, HookStatus, LoadOptions, MapStore, detach_all, links_dir};

use crate::bpf::{self, tc};
use crate::packets::{IP, SYN, tcp};
use crate::programs::preferred;
use crate::rig::*;

fn load(root: &BpfRoot) -> Datapath {
    Datapath::load(&options(root.path())).expect("the maps are made")
}

/// Ids of the programs of the LAN device, by tcx or in filters.
fn attached(direction: TcAttachType) -> Vec<u32> {
    let (kind, way) = match direction {
        TcAttachType::Ingress => (bpf::TCX_INGRESS, "ingress"),
        TcAttachType::Egress => (bpf::TCX_EGRESS, "egress"),
    };
    let mut ids = bpf::programs(ifindex(LAN), kind).unwrap_or_default();
    for line in tc(&format!("filter show dev {LAN} {way}")) {
        let mut words = line.split(' ').skip_while(|word| *word != "id");
        ids.extend(words.nth(1).and_then(|id| id.parse::<u32>().ok()));
    }
    ids
}

fn link_id(root: &BpfRoot, name: &str) -> u32 {
    use aya::programs::links::{FdLink, PinnedLink};
    FdLink::from(PinnedLink::from_pin(links_dir(root.path()).join(name)).expect("pinned")).info().unwrap().id()
}

/// Whether a link or filter of a device is pinned.
fn is_pinned(root: &BpfRoot, ifindex: u32) -> bool {
    let pins = std::fs::read_dir(links_dir(root.path())).expect("made by loading").flatten();
    pins.into_iter().any(|pin| pin.file_name().to_string_lossy().starts_with(&format!("{ifindex}-")))
}

#[test]
fn a_device_is_attached_in_both_directions_and_detached() {
    isolated(|| {
        network();
        let root = BpfRoot::new();
        let mut datapath = load(&root);
        let lan = ifindex(LAN);
        let hooks = datapath.attach_device(LAN, lan).unwrap();
        let [ingress, egress] = [&hooks.ingress, &hooks.egress].map(HookStatus::clone);
        assert_eq!((ingress.program.as_str(), ingress.attached), ("cil_from_netdev", Some(preferred())));
        assert_eq!((egress.place.as_str(), egress.error.as_deref()), ("lan0 egress", None));
        assert_eq!(datapath.hooks(), [ingress, egress]);
        assert_eq!((attached(TcAttachType::Ingress).len(), attached(TcAttachType::Egress).len()), (1, 1));
        datapath.detach_device(LAN, lan).unwrap();
        datapath.detach_device(LAN, lan).unwrap();
        assert_eq!((attached(TcAttachType::Ingress).len(), datapath.hooks().len()), (0, 0));
    });
}

#[test]
fn the_next_agent_replaces_the_programs_inside_the_links_it_finds() {
    isolated(|| {
        network();
        let root = BpfRoot::new();
        let lan = ifindex(LAN);
        let mut first = load(&root);
        first.attach_device(LAN, lan).unwrap();
        let before = attached(TcAttachType::Ingress);
        let links = || match preferred() {
            Attachment::Tcx => ["ingress", "egress"].map(|way| link_id(&root, &format!("{lan}-{way}"))),
            _ => [0; 2],
        };
        let links_before = links();
        // The agent dies; its programs stay.
        drop(first);
        assert_eq!(attached(TcAttachType::Ingress), before);
        let mut second = load(&root);
        assert_eq!(attached(TcAttachType::Ingress), before, "loading alone changes nothing");
        second.attach_device(LAN, lan).unwrap();
        let after = attached(TcAttachType::Ingress);
        assert_eq!((before.len(), after.len()), (1, 1));
        assert_ne!(before, after, "the program is the new one");
        assert_eq!(links_before, links(), "the link is the same");
        // Again in the same process.
        second.attach_device(LAN, lan).unwrap();
        assert_eq!(attached(TcAttachType::Ingress), after);
        drop(second);
        detach_all(root.path()).unwrap();
        assert!(attached(TcAttachType::Egress).is_empty());
    });
}

#[test]
fn the_pin_of_a_device_that_has_gone_is_forgotten() {
    for attach in [AttachMode::Auto, AttachMode::Clsact] {
        isolated(move || {
            network();
            let root = BpfRoot::new();
            let options = LoadOptions { attach, ..options(root.path()) };
            let mut datapath = Datapath::load(&options).unwrap();
            let old = ifindex(LAN);
            datapath.attach_device(LAN, old).unwrap();
            ip("link del lan0");
            ip("link add lan0 type veth peer name lan1");
            assert!(datapath.attach_device(LAN, ifindex(LAN)).unwrap().ingress.is_ok());
            assert!(is_pinned(&root, old));
            drop(datapath);
            let _ = Datapath::load(&options).unwrap();
            assert!(!is_pinned(&root, old) && is_pinned(&root, ifindex(LAN)));
        });
    }
}

#[test]
fn a_new_device_with_the_index_of_an_old_one_is_attached_anew() {
    isolated(|| {
        network();
        let root = BpfRoot::new();
        let mut datapath = load(&root);
        let lan = ifindex(LAN);
        datapath.attach_device(LAN, lan).unwrap();
        ip("link del lan0");
        ip(&format!("link add lan0 index {lan} type veth peer name lan1"));
        assert!(datapath.attach_device(LAN, lan).unwrap().egress.is_ok());
        assert_eq!(attached(TcAttachType::Egress).len(), 1);
    });
}

#[test]
fn ipv6_has_hooks_of_its_own_which_go_when_it_is_switched_off() {
    isolated(|| {
        network();
        let lan = ifindex(LAN);
        for attach in [AttachMode::Auto, AttachMode::Clsact] {
            let root = BpfRoot::new();
            let load = |ipv6| Datapath::load(&LoadOptions { attach, ipv6, ..options(root.path()) }).unwrap();
            for _ in 0..2 {
                let mut both = load(true);
                let hooks = both.attach_device(LAN, lan).unwrap();
                assert!(hooks.are_ok(), "{hooks:?}");
                let programs = hooks.ipv6.expect("both families are served").map(|hook| hook.program);
                assert_eq!(programs, ["cil_from_netdev6", "cil_to_netdev6"]);
                assert_eq!((both.hooks().len(), links(&root)), (4, 4));
                assert_eq!(both.verify_hooks(), 0);
                drop(both);
                let mut one = load(false);
                let hooks = one.attach_device(LAN, lan).unwrap();
                assert_eq!((hooks.are_ok(), hooks.ipv6), (true, None));
                assert_eq!((one.hooks().len(), links(&root)), (2, 2));
            }
            let mut both = load(true);
            both.attach_device(LAN, lan).unwrap();
            both.detach_device(LAN, lan).unwrap();
            assert_eq!((both.hooks().len(), links(&root)), (0, 0));
        }
    });
}

/// How many hooks are pinned as ours.
fn links(root: &BpfRoot) -> usize {
    std::fs::read_dir(links_dir(root.path())).unwrap().count()
}

#[test]
fn a_device_that_is_not_there_is_an_error_with_its_name() {
    isolated(|| {
        network();
        let root = BpfRoot::new();
        let error = load(&root).attach_device("eth7", 4711).unwrap_err().to_string();
        assert!(error.contains("eth7") && error.contains("4711"), "{error}");
    });
}

#[test]
fn without_tcx_the_programs_are_filters_of_clsact() {
    isolated(|| {
        network();
        let root = BpfRoot::new();
        let options = LoadOptions { attach: AttachMode::Clsact, ..options(root.path()) };
        let lan = ifindex(LAN);
        let filters = |way: &str| {
            let lines = tc(&format!("filter show dev {LAN} {way}"));
            lines.iter().filter(|line| line.contains("direct-action")).count()
        };
        for _ in 0..2 {
            let mut datapath = Datapath::load(&options).unwrap();
            for _ in 0..2 {
                let hooks = datapath.attach_device(LAN, lan).unwrap();
                assert_eq!(hooks.ingress.attached, Some(Attachment::Clsact), "{:?}", hooks.ingress.error);
            }
            drop(datapath);
            assert_eq!((filters("ingress"), filters("egress")), (1, 1), "they stay, and there is one each");
        }
        let mut datapath = Datapath::load(&options).unwrap();
        datapath.detach_device(LAN, lan).unwrap();
        assert_eq!((filters("ingress"), filters("egress")), (0, 0));
        datapath.attach_device(LAN, lan).unwrap();
        drop(datapath);
        detach_all(root.path()).unwrap();
        assert_eq!((filters("ingress"), filters("egress")), (0, 0));
    });
}

/// A tun device of this namespace, as a file.
pub(crate) fn tun() -> File {
    let file = File::options().read(true).write(true).open("/dev/net/tun").expect("the kernel has tun");
    // SAFETY: integers, arrays and unions of them; zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tun0") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    // SAFETY: the request is valid for this ioctl and outlives it.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) }, 0);
    file
}

#[test]
fn devices_without_link_header_translate_both_ways() {
    isolated(|| {
        let mut rig = Rig::new();
        let mut tun = tun();
        ip("addr add 192.168.7.1/24 dev tun0");
        ip("link set tun0 up");
        let index = ifindex("tun0");
        let hooks = rig.datapath.attach_device("tun0", index).unwrap();
        assert_eq!((hooks.ingress.program.as_str(), hooks.ingress.error), ("cil_from_l3dev", None));
        // The backend is this host, where nobody listens: the stack answers with a reset, which leaves as the service's.
        let host = std::net::Ipv4Addr::new(192, 168, 7, 1);
        rig.maps.apply(&[kinesin_core::plan::Op::Backend(LOCAL_ID, backend(host, 8080, 6, true))]).unwrap();
        let peer = std::net::Ipv4Addr::new(192, 168, 7, 2);
        tun.write_all(&tcp((peer, 40_000), (VIP, TO_LOCAL), SYN)[IP..]).unwrap();
        let mut reply = [0; 2048];
        let answer = loop {
            let len = tun.read(&mut reply).unwrap();
            // The stack also announces itself by IPv6.
            if reply[0] == 0x45 {
                break &reply[..len];
            }
        };
        let framed = [&[0; IP][..], answer].concat();
        assert_eq!(crate::packets::ends(&framed), ((VIP, TO_LOCAL), (peer, 40_000)));
        let counted = rig.maps.forwarded().unwrap();
        assert_eq!((counted[0].1.packets, counted[1].1.packets), (1, 1));
        assert_eq!(answer[33] & 0x04, 0x04, "a reset");
    });
}
