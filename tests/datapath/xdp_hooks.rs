//! The hook in the driver: attached and replaced like the others, and done without where it is not to be had.

use std::process::Command;

use kinesin::datapath::{Acceleration, Attachment, Datapath, LoadOptions, detach_all, links_dir, pinned_hooks};

use crate::bpf::{self, Foreign};
use crate::rig::*;

fn load(root: &BpfRoot, acceleration: Acceleration) -> Datapath {
    Datapath::load(&LoadOptions { acceleration, ..options(root.path()) }).unwrap()
}

/// How the device shows its XDP program: mode and id.
fn on_device(name: &str) -> Option<(String, u32)> {
    let output = Command::new("ip").args(["link", "show", "dev", name]).output().expect("iproute2");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let id = text.split("prog/xdp id ").nth(1)?.split_whitespace().next()?.parse().ok()?;
    let mode = text.split_whitespace().find(|word| word.starts_with("xdp"))?.to_owned();
    Some((mode, id))
}

fn link_id(root: &BpfRoot) -> u32 {
    use aya::programs::links::{FdLink, PinnedLink};
    let pin = links_dir(root.path()).join(format!("{}-xdp", ifindex(LAN)));
    FdLink::from(PinnedLink::from_pin(pin).expect("pinned")).info().unwrap().id()
}

#[test]
fn the_driver_runs_the_program_and_the_next_agent_replaces_it_in_place() {
    isolated(|| {
        network();
        let root = BpfRoot::new();
        let lan = ifindex(LAN);
        let mut first = load(&root, Acceleration::Native);
        let hook = first.attach_device(LAN, lan).unwrap().xdp.unwrap();
        assert_eq!((hook.attached, hook.error, hook.place.as_str()), (Some(Attachment::Xdp), None, "lan0 xdp"));
        let (mode, before) = on_device(LAN).unwrap();
        assert_eq!((mode.as_str(), first.accelerated().into_iter().collect::<Vec<_>>()), ("xdp", vec![lan]));
        let link = link_id(&root);
        drop(first);
        assert!(pinned_hooks(root.path()).iter().any(|hook| hook.attached == Some(Attachment::Xdp)));
        let mut second = load(&root, Acceleration::Native);
        assert!(second.attach_device(LAN, lan).unwrap().are_ok());
        assert_ne!(on_device(LAN).unwrap().1, before, "the program is the new one");
        assert_eq!(link_id(&root), link, "the link is the same");
        assert_eq!((second.verify_hooks(), second.failing()), (0, 0));
        // Somebody takes it off; it comes back.
        bpf::detach_link(&links_dir(root.path()).join(format!("{lan}-xdp")));
        assert_eq!(on_device(LAN), None);
        assert_eq!(second.verify_hooks(), 1);
        assert!(on_device(LAN).is_some());
        drop(second);
        // An agent that is not to accelerate removes what it finds; so does an uninstallation.
        let mut third = load(&root, Acceleration::Disabled);
        assert_eq!(third.attach_device(LAN, lan).unwrap().xdp, None);
        assert_eq!(on_device(LAN), None);
        third.accelerate(Acceleration::Native);
        assert!(on_device(LAN).is_some() && third.failing() == 0);
        third.accelerate(Acceleration::Disabled);
        assert_eq!((on_device(LAN), third.hooks().len()), (None, 2));
        third.accelerate(Acceleration::Native);
        drop(third);
        detach_all(root.path()).unwrap();
        assert_eq!(on_device(LAN), None);
    });
}

#[test]
fn r48_the_xdp_program_of_somebody_else_stays() {
    isolated(|| {
        network();
        let root = BpfRoot::new();
        ip("tuntap add tap0 mode tap");
        ip("link set tap0 up");
        let tap = ifindex("tap0");
        let foreign = Foreign::load(bpf::XDP, 0, 2);
        let pin = root.path().join("foreign");
        foreign.pin(&pin);
        let theirs = Some(("xdp".to_owned(), foreign.id));
        ip(&format!("link set dev tap0 xdpdrv pinned {}", pin.display()));
        assert_eq!(on_device("tap0"), theirs);

        let mut datapath = load(&root, Acceleration::Native);
        let hooks = datapath.attach_device("tap0", tap).unwrap();
        let error = hooks.xdp.unwrap().error.unwrap();
        assert!(error.contains("another XDP program"), "{error}");
        assert!(hooks.ingress.is_ok() && hooks.egress.is_ok(), "the others work (R34)");
        assert_eq!((datapath.failing(), datapath.accelerated().len()), (1, 0));
        assert_eq!(on_device("tap0"), theirs);

        datapath.accelerate(Acceleration::BestEffort);
        assert_eq!((datapath.failing(), datapath.hooks().len()), (0, 2), "nothing is wrong");
        let without: Vec<_> = datapath.unaccelerated().collect();
        assert!(matches!(without[..], [("tap0", why)] if why.contains("another XDP program")), "{without:?}");
        assert_eq!((datapath.verify_hooks(), on_device("tap0")), (0, theirs.clone()));

        drop(datapath);
        detach_all(root.path()).unwrap();
        assert_eq!(on_device("tap0"), theirs, "uninstalling leaves it, too");

        // It goes: whoever makes do takes its place at the next look, whoever insists at the next attempt.
        for acceleration in [Acceleration::BestEffort, Acceleration::Native] {
            let mut datapath = load(&root, acceleration);
            datapath.attach_device("tap0", tap).unwrap();
            ip("link set dev tap0 xdp off");
            match acceleration {
                Acceleration::Native => assert_eq!(datapath.retry(), 0),
                _ => assert_eq!(datapath.verify_hooks(), 0, "nobody took it away"),
            }
            assert_eq!((datapath.accelerated().len(), datapath.unaccelerated().count()), (1, 0));
            drop(datapath);
            detach_all(root.path()).unwrap();
            foreign.pin(&pin2(&root, acceleration));
            ip(&format!("link set dev tap0 xdpdrv pinned {}", pin2(&root, acceleration).display()));
        }
    });
}

fn pin2(root: &BpfRoot, acceleration: Acceleration) -> std::path::PathBuf {
    root.path().join(format!("foreign-{acceleration:?}"))
}

#[test]
fn a_virtual_cable_runs_it_only_where_that_is_insisted_on() {
    isolated(|| {
        network();
        let root = BpfRoot::new();
        let lan = ifindex(LAN);
        let mut datapath = load(&root, Acceleration::BestEffort);
        let hooks = datapath.attach_device(LAN, lan).unwrap();
        assert_eq!((hooks.are_ok(), hooks.xdp, on_device(LAN)), (true, None, None));
        let without: Vec<_> = datapath.unaccelerated().collect();
        assert!(matches!(without[..], [(LAN, why)] if why.contains("peer")), "{without:?}");
        datapath.accelerate(Acceleration::Native);
        assert!(on_device(LAN).is_some() && datapath.unaccelerated().count() == 0);
        datapath.accelerate(Acceleration::BestEffort);
        assert_eq!((on_device(LAN), datapath.failing()), (None, 0));
        detach_all(root.path()).unwrap();
    });
}

#[test]
fn r48_a_driver_without_xdp_is_told_or_done_without() {
    isolated(|| {
        network();
        // Its packets are other devices'.
        ip("link add br0 type bridge");
        ip("link set br0 up");
        let _tun = crate::hooks::tun();
        ip("link set tun0 up");
        let root = BpfRoot::new();
        let mut datapath = load(&root, Acceleration::Native);
        let hooks = datapath.attach_device("br0", ifindex("br0")).unwrap();
        assert!(hooks.ingress.is_ok() && hooks.egress.is_ok(), "the others work (R34)");
        assert_eq!(hooks.xdp.unwrap().error.as_deref(), Some("its driver has no native XDP"));
        assert_eq!(datapath.attach_device("tun0", ifindex("tun0")).unwrap().xdp, None, "no Ethernet, no question");
        assert_eq!(datapath.failing(), 1);
        datapath.accelerate(Acceleration::BestEffort);
        let hooks = datapath.attach_device("br0", ifindex("br0")).unwrap();
        assert_eq!((hooks.are_ok(), hooks.xdp, datapath.failing()), (true, None, 0));
        assert_eq!(datapath.unaccelerated().collect::<Vec<_>>(), [("br0", "its driver has no native XDP")]);
        datapath.detach_device("br0", ifindex("br0")).unwrap();
        assert_eq!(datapath.unaccelerated().count(), 0);
        detach_all(root.path()).unwrap();
    });
}
