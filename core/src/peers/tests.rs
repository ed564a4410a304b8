use super::*;

const HERE: [u8; 6] = [2, 0, 0, 0, 0, 1];
const THERE: [u8; 6] = [2, 0, 0, 0, 0, 2];
static BY_STACK: HostRouting = HostRouting { straight: false, said: false, why: None, clear: BTreeSet::new() };
const NEW: Usage<'static> = Usage { new: true, routing: &BY_STACK };

fn net(text: &str) -> IpNet {
    text.parse().expect("a network")
}

fn device() -> Device {
    Device {
        name: "eth0".into(),
        ifindex: 7,
        mac: Some(HERE),
        up: true,
        running: true,
        mtu: 1500,
        addresses: vec![net("10.0.0.11/24"), net("fd00::11/64"), net("fe80::1/64")],
        ..Device::default()
    }
}

fn members(links: &[(&str, &[Link])]) -> BTreeMap<SmolStr, Arc<Record>> {
    let record = |node: &str, links: &[Link]| Record { node: node.into(), links: links.to_vec(), ..Record::default() };
    links.iter().map(|(node, links)| (SmolStr::new(node), Arc::new(record(node, links)))).collect()
}

fn link(address: &str) -> Link {
    Link { mac: THERE, mtu: 1500, addresses: vec![net(address)] }
}

fn neighbour(mac: [u8; 6]) -> Neighbour {
    Neighbour { ifindex: 7, address: [10, 0, 0, 12].into(), mac }
}

/// Nothing goes to other segments.
fn near() -> Beyond {
    Beyond { dispatch: Dispatch::L2, ..Beyond::default() }
}

fn state(links: &[Link], neighbours: &[Neighbour]) -> State {
    let peers = judge("a", &[&device()], &members(&[("a", &[]), ("b", links)]), neighbours, &near());
    assert_eq!(peers.len(), 1, "never this node itself");
    peers[0].state.clone()
}

#[test]
fn a_node_that_answers_in_a_network_of_ours_under_its_own_mac_is_a_neighbour() {
    assert_eq!(state(&[link("10.0.0.12/24")], &[neighbour(THERE)]), State::Neighbour);
    let v6 = Neighbour { address: "fd00::12".parse().expect("address"), ..neighbour(THERE) };
    assert_eq!(state(&[link("fd00::12/64")], &[v6]), State::Neighbour);
}

#[test]
fn everybody_else_is_not_and_says_why() {
    let other = [2, 0, 0, 0, 0, 9];
    let cases: [(&[Link], &[Neighbour], State); 6] = [
        (&[], &[neighbour(THERE)], State::Mute),
        (&[link("10.0.1.12/24")], &[neighbour(THERE)], State::Elsewhere),
        // In our network, but we are not in its: its answers would go another way.
        (&[link("10.0.0.12/30")], &[neighbour(THERE)], State::Elsewhere),
        (&[link("10.0.0.12/24")], &[], State::Unresolved),
        (&[link("10.0.0.12/24")], &[neighbour(other)], State::OtherMac(other)),
        (&[Link { mtu: 1400, ..link("10.0.0.12/24") }], &[neighbour(THERE)], State::Mtu { theirs: 1400, ours: 1500 }),
    ];
    for (links, neighbours, expected) in cases {
        let found = state(links, neighbours);
        assert_eq!(found, expected);
        assert!(State::LABELS.contains(&found.label()));
    }
}

#[test]
fn of_two_names_with_one_tag_neither_is_used() {
    let mut seen = BTreeMap::new();
    let (one, other) = (0..)
        .map(|i| format!("node-{i}"))
        .find_map(|name| seen.insert(tag(&name), name.clone()).map(|before| (before, name)))
        .expect("24 bits are not for ever");
    let links = [link("10.0.0.12/24")];
    let peers = judge("a", &[&device()], &members(&[(&one, &links), (&other, &links)]), &[neighbour(THERE)], &near());
    assert!(peers.iter().all(|peer| matches!(peer.state, State::TagTaken(_))), "{peers:?}");
    assert_eq!(entries(&peers, NEW, &[], |_| true), BTreeMap::new());
}

#[test]
fn a_peer_that_leaves_keeps_its_connections_and_gets_no_new_ones_until_its_node_is_gone() {
    let links = [link("10.0.0.12/24")];
    let peers = judge("a", &[&device()], &members(&[("b", &links)]), &[neighbour(THERE)], &near());
    let there = entries(&peers, NEW, &[], |_| true);
    let value = there[&PeerKey::of_node(tag("b"))];
    assert_eq!(there[&PeerKey::of_mac(THERE)], value);
    assert_eq!((value.flags, value.mac_bytes(), value.ifindex), (PEER_TAKES_NEW, THERE, 7));
    assert_eq!(value.ipv4.to_ne_bytes(), [10, 0, 0, 12]);
    let held: Vec<_> = there.into_iter().collect();
    let left = entries(&[], NEW, &held, |node| node == tag("b"));
    let of_b = [PeerKey::of_node(tag("b")), PeerKey::of_mac(THERE)];
    assert!(left.len() == 3 && of_b.iter().all(|key| left[key] == PeerValue { flags: 0, ..value }));
    assert_eq!(entries(&[], NEW, &held, |_| false), BTreeMap::new());
    let off = entries(&peers, Usage { new: false, ..NEW }, &held, |_| true);
    assert!(off.len() == 3 && off.values().all(|value| value.flags & PEER_TAKES_NEW == 0));
}

#[test]
fn frames_go_across_a_pair_only_where_that_is_asked_for_and_can_be() {
    let pair = Device { kind: "veth".into(), reaches_out: true, qdisc: "noqueue".into(), ..device() };
    let straight = HostRouting { straight: true, said: true, ..HostRouting::default() };
    let usage = Usage { new: true, routing: &straight };
    // Nobody says so, and nobody has looked at the device.
    let unseen = HostRouting { said: false, ..straight.clone() };
    let apart = Usage { new: true, routing: &unseen };
    let flags = |device: &Device, usage| {
        let links = [link("10.0.0.12/24")];
        let peers = judge("a", &[device], &members(&[("b", &links)]), &[neighbour(THERE)], &near());
        let map = entries(&peers, usage, &[], |_| true);
        assert_eq!(map[&PeerKey::of_node(tag("b"))], map[&PeerKey::of_mac(THERE)]);
        map[&PeerKey::of_node(tag("b"))].flags
    };
    assert_eq!(flags(&pair, usage), PEER_TAKES_NEW | PEER_ACROSS);
    assert_eq!(flags(&pair, Usage { new: false, ..usage }), PEER_ACROSS);
    assert_eq!(flags(&pair, NEW), PEER_TAKES_NEW);
    assert_eq!(flags(&pair, apart), PEER_TAKES_NEW);
    assert_eq!(flags(&Device { qdisc: "tbf".into(), ..pair }, usage), PEER_TAKES_NEW);
    assert_eq!(flags(&device(), usage), PEER_TAKES_NEW);
    // One that has left keeps its way for as long as frames go so.
    let key = PeerKey::of_node(tag("b"));
    let flags = PEER_TAKES_NEW | PEER_ACROSS;
    let held = [(key, PeerValue { flags, ifindex: 7, node: tag("b"), ..PeerValue::default() })];
    for (usage, left) in [(usage, PEER_ACROSS), (NEW, 0), (apart, 0)] {
        assert_eq!(entries(&[], usage, &held, |_| true)[&key].flags, left);
    }
}

/// The state of a node on another segment, and what the map holds for it.
fn beyond(links: &[Link], takes: &[&str], beyond: &Beyond) -> (State, BTreeMap<PeerKey, PeerValue>) {
    let takes = takes.iter().map(SmolStr::new).collect();
    let record = Record { node: "b".into(), links: links.to_vec(), takes, ..Record::default() };
    let members = BTreeMap::from([(SmolStr::new("b"), Arc::new(record))]);
    let peers = judge("a", &[&device()], &members, &[], beyond);
    (peers[0].state.clone(), entries(&peers, NEW, &[], |_| true))
}

#[test]
fn a_node_on_another_segment_is_reached_by_route_where_the_dispatch_leads_there_and_it_takes_that() {
    let far =
        Link { addresses: vec![net("10.0.1.12/24"), net("10.0.1.99/24"), net("fd01::12/64")], ..link("10.0.1.12/24") };
    let links = [far.clone(), Link { mac: [2, 0, 0, 0, 0, 3], ..link("172.16.0.12/16") }];
    let ipip = Beyond { dispatch: Dispatch::Ipip, ..Beyond::default() };
    let (state, map) = beyond(&links, &["ipip"], &ipip);
    assert_eq!(state, State::Routed(Dispatch::Ipip));
    let value = map[&PeerKey::of_node(tag("b"))];
    assert_eq!((value.flags, value.ifindex, value.mac), (PEER_TAKES_NEW | PEER_BY_ROUTE, 0, [0; 3]));
    assert_eq!(
        (value.ipv4.to_ne_bytes(), value.ipv6),
        ([10, 0, 1, 12], "fd01::12".parse::<std::net::Ipv6Addr>().expect("address").into())
    );
    // Its packets are known by the first address of each link and family.
    let by: Vec<IpAddr> = ["10.0.1.12", "fd01::12", "172.16.0.12"].map(|ip| ip.parse().expect("address")).to_vec();
    assert!(by.iter().all(|ip| map[&PeerKey::of_addr(&(*ip).into())].node == tag("b")));
    assert_eq!(map.len(), 1 + by.len());

    // What it sends is taken whatever this node sends.
    let (state, map) = beyond(&links, &["ipip"], &near());
    assert_eq!((state, map.len()), (State::Elsewhere, 4));
    assert!(map.values().all(|value| value.flags == PEER_BY_ROUTE));

    assert_eq!(beyond(&links, &[], &ipip).0, State::Untaken(Dispatch::Ipip));
    assert_eq!(beyond(&[Link { mtu: 1300, ..far.clone() }], &["ipip"], &ipip).0, State::Narrow(1300));
    let refuse = |ips: &[&str]| Beyond {
        refused: ips.iter().map(|ip| (ip.parse().expect("address"), "network unreachable".into())).collect(),
        ..ipip.clone()
    };
    assert_eq!(beyond(&links, &["ipip"], &refuse(&["10.0.1.12"])).0, State::Routed(Dispatch::Ipip));
    let none = beyond(&links, &["ipip"], &refuse(&["10.0.1.12", "fd01::12"])).0;
    assert_eq!(none.text(), "snat: no way there: 10.0.1.12: network unreachable, fd01::12: network unreachable");
    for state in [State::Untaken(Dispatch::Ipip), State::Narrow(1300), none, State::Routed(Dispatch::Ipip)] {
        assert!(State::LABELS.contains(&state.label()));
    }
}

#[test]
fn tags_are_the_same_in_every_version() {
    assert_eq!([tag(""), tag("node-1"), tag("node-2")], [0, GOLDEN[0], GOLDEN[1]]);
    assert!((0..10_000).all(|i| (1..=NODE_TAG_MAX).contains(&tag(&format!("n{i}")))));
}

const GOLDEN: [NodeTag; 2] = [12_858_328, 12_858_732];
