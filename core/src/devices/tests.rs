use super::*;

fn eth(name: &str, ifindex: u32, addresses: &[&str]) -> Device {
    Device {
        name: name.into(),
        ifindex,
        mac: Some([2, 0, 0, 0, 0, ifindex as u8]),
        up: true,
        running: true,
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        has_global_unicast_route: true,
        ..Device::default()
    }
}

fn names(devices: &[&Device]) -> Vec<String> {
    devices.iter().map(|d| d.name.to_string()).collect()
}

#[test]
fn each_automatic_rule_excludes_what_it_is_for() {
    let good = || eth("eth0", 2, &["192.0.2.1/24"]);
    assert_eq!(unsuitable(&good()), None);
    type Spoil = fn(&mut Device);
    let cases: &[(&str, Spoil)] = &[
        ("no addresses", |d| d.addresses.clear()),
        ("down", |d| d.up = false),
        ("slave", |d| d.is_slave = true),
        ("loopback", |d| d.is_loopback = true),
        ("enslaved", |d| d.master = Some(7)),
        ("cilium", |d| d.name = "cilium_host".into()),
        ("lo", |d| d.name = "lo1".into()),
        ("lxc", |d| d.name = "lxc1234".into()),
        ("cni", |d| d.name = "cni0".into()),
        ("docker", |d| d.name = "docker0".into()),
        ("veth", |d| d.kind = "veth".into()),
        ("bridge", |d| d.kind = "bridge".into()),
        ("openvswitch", |d| d.kind = "openvswitch".into()),
        ("ipoib", |d| d.kind = "ipoib".into()),
        ("no route", |d| d.has_global_unicast_route = false),
    ];
    for (what, spoil) in cases {
        let mut device = good();
        spoil(&mut device);
        assert!(unsuitable(&device).is_some(), "{what}");
        assert!(select(std::slice::from_ref(&device), &[] as &[&str]).is_empty(), "{what}");
        // Said explicitly, it is used all the same.
        assert_eq!(select(std::slice::from_ref(&device), &[device.name.as_str()]).len(), 1, "{what}");
    }
    let mut veth = good();
    veth.kind = "veth".into();
    veth.has_default_route = true;
    assert_eq!(unsuitable(&veth), None, "a veth with a default route is a container's way out");
    let mut unplugged = good();
    unplugged.running = false;
    assert_eq!(unsuitable(&unplugged), None, "a cable may come back");
    assert!(!unplugged.is_live());
}

#[test]
fn the_first_pattern_that_fits_decides() {
    let mut bridge = eth("br0", 5, &[]);
    bridge.kind = "bridge".into();
    let devices = [
        eth("eth0", 2, &["192.0.2.1/24"]),
        eth("eth1", 3, &["192.0.2.2/24"]),
        eth("wlan0", 4, &["192.0.2.3/24"]),
        bridge,
    ];
    let cases: &[(&[&str], bool, &[&str])] = &[
        (&[], false, &["eth0", "eth1", "wlan0"]),
        (&["eth+"], false, &["eth0", "eth1"]),
        (&["eth1"], false, &["eth1"]),
        (&["eth"], false, &[]),
        (&["!eth1", "eth+"], false, &["eth0"]),
        (&["eth+", "!eth1"], false, &["eth0", "eth1"]),
        (&["!eth+", "+"], false, &["wlan0", "br0"]),
        (&["!eth+"], false, &["wlan0"]),
        (&["br0"], true, &["eth0", "eth1", "wlan0", "br0"]),
        (&["br0", "!eth0"], true, &["eth1", "wlan0", "br0"]),
        (&["", " eth0 "], false, &["eth0"]),
        (&["nothing"], false, &[]),
    ];
    for (filter, force, expected) in cases {
        assert_eq!(names(&select_with(&devices, filter, *force)), *expected, "{filter:?} {force}");
    }
}

#[test]
fn node_ports_are_served_on_one_address_per_family_and_device() {
    let one =
        eth("eth0", 2, &["203.0.113.5/24", "10.0.0.5/24", "10.0.0.6/24", "fe80::1/64", "2001:db8::5/64", "fd00::5/64"]);
    let two = eth("eth1", 3, &["198.51.100.7/24", "169.254.1.1/16"]);
    let devices = [&one, &two];
    let ips = |list: &[&str]| list.iter().map(|ip| ip.parse().unwrap()).collect::<Vec<IpAddr>>();
    let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect::<Vec<IpNet>>();
    let cases: &[(&[&str], &[&str], &[&str])] = &[
        (&[], &[], &["10.0.0.5", "fd00::5", "198.51.100.7"]),
        (&["10.0.0.6"], &[], &["10.0.0.6", "fd00::5", "198.51.100.7"]),
        (&["203.0.113.5", "2001:db8::5"], &[], &["203.0.113.5", "2001:db8::5", "198.51.100.7"]),
        (&["10.0.0.5"], &["203.0.113.0/24", "198.51.100.0/24"], &["203.0.113.5", "198.51.100.7"]),
        (&[], &["10.0.0.6/32"], &["10.0.0.6"]),
        (&[], &["192.168.0.0/16"], &[]),
    ];
    for (node, cidrs, expected) in cases {
        assert_eq!(node_port_addresses(&devices, &ips(node), &nets(cidrs)), ips(expected), "{node:?} {cidrs:?}");
    }
}

#[test]
fn a_device_answers_for_the_ip_versions_of_its_networks() {
    let (four, six) = (Families { ipv4: true, ipv6: false }, Families { ipv4: false, ipv6: true });
    let bridge = |addresses: &[&str]| Device {
        ifindex: 9,
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        ..Device::default()
    };
    let cases: [(&[&str], &[&str], Families); 8] = [
        (&["10.0.0.1/24", "fd00::1/64"], &[], Families::BOTH),
        (&["10.0.0.1/24", "fe80::1/64"], &[], four),
        (&["fd00::1/64"], &[], six),
        (&["169.254.3.4/16", "2001:db8::1/64"], &[], six),
        // Its addresses are elsewhere, so it cannot be told.
        (&[], &[], Families::BOTH),
        (&["fe80::1/64"], &[], Families::BOTH),
        // A port of a bridge has the bridge's.
        (&["fe80::1/64"], &["10.0.0.1/24"], four),
        (&["10.0.0.2/24"], &["fd00::1/64"], Families::BOTH),
    ];
    for (own, masters, expected) in cases {
        let device = Device { ifindex: 2, master: Some(9), ..bridge(own) };
        let all = [device.clone(), bridge(masters)];
        assert_eq!(families(&device, &all), expected, "{own:?} below {masters:?}");
    }
    assert!(four.include("::ffff:10.0.0.1".parse().unwrap()) && !four.include("fd00::1".parse().unwrap()));
}

#[test]
fn only_an_end_of_a_pair_leads_into_another_namespace() {
    let pair = Device {
        kind: "veth".into(),
        reaches_out: true,
        qdisc: "noqueue".into(),
        ..eth("veth1234", 7, &["169.254.1.1/32"])
    };
    assert!(pair.leads_across());
    let others = [
        Device { kind: "macvlan".into(), ..pair.clone() },
        Device { reaches_out: false, ..pair.clone() },
        // Part of the bridge that pods are routed to.
        Device { master: Some(9), ..pair.clone() },
        // What goes to the pod is shaped.
        Device { qdisc: "tbf".into(), ..pair },
    ];
    for other in others {
        assert!(!other.leads_across(), "{other:?}");
    }
}
