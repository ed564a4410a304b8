use std::sync::Arc;

use kinesin_abi::{FrontendKind, proto};

use super::*;
use crate::services::{BackendRef, BackendSet};

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn pod(last: u8, state: BackendState) -> BackendRef {
    BackendRef {
        addr: IpAddr::from([10, 42, 0, last]),
        port: 53,
        proto: proto::UDP,
        state,
        local: false,
        node: "".into(),
        zone: "".into(),
    }
}

/// A Service with these frontends, which all lead to these pods.
fn service(frontends: &[(&str, u16)], pods: &[(u8, BackendState)]) -> Compiled {
    let backends: Arc<[BackendRef]> = pods.iter().map(|(last, state)| pod(*last, *state)).collect();
    let frontend = |(addr, port): &(&str, u16)| Frontend {
        addr: ip(addr),
        port: *port,
        proto: proto::UDP,
        kind: FrontendKind::ClusterIp,
        port_name: "dns".into(),
        flags: 0,
        affinity: 0,
        external: Some(0),
        internal: Some(0),
    };
    Compiled {
        frontends: frontends.iter().map(frontend).collect(),
        sets: vec![BackendSet { backends, usable: pods.len() }],
        ..Compiled::default()
    }
}

const VIP: &str = "10.96.0.10";
use BackendState::{Active, Maintenance, Terminating, TerminatingNotServing};

fn asked(addr: &str, port: u16) -> End {
    (ip(addr), port, proto::UDP)
}

fn led(last: u8) -> End {
    (IpAddr::from([10, 42, 0, last]), 53, proto::UDP)
}

#[test]
fn only_backends_that_left_or_take_nothing_are_over() {
    let old = service(&[(VIP, 53)], &[(1, Active), (2, Active), (3, Active), (4, Active)]);
    let new = service(&[(VIP, 53)], &[(1, Active), (2, Terminating), (3, TerminatingNotServing)]);
    let gone = Gone::between(Some(&old), Some(&new));
    let over: Vec<u8> = (1..=4).filter(|last| gone.includes(&asked(VIP, 53), &led(*last))).collect();
    assert_eq!(over, [3, 4]);
    assert!(gone.has_protocol(proto::UDP) && !gone.has_protocol(proto::TCP));
    // Who asked for something else is not concerned.
    assert!(!gone.includes(&asked(VIP, 54), &led(4)) && !gone.includes(&asked("10.96.0.11", 53), &led(4)));
    let unready = service(&[(VIP, 53)], &[(1, Maintenance)]);
    assert!(Gone::between(Some(&old), Some(&unready)).includes(&asked(VIP, 53), &led(1)));
    assert!(Gone::between(Some(&old), Some(&old)).is_empty());
    assert!(Gone::between(None, Some(&old)).is_empty());
}

#[test]
fn a_removed_service_or_frontend_ends_what_came_through_it_even_if_others_have_the_pod() {
    let old = service(&[(VIP, 53), ("10.0.0.100", 53)], &[(1, Active)]);
    let one = service(&[("10.0.0.100", 53)], &[(1, Active)]);
    let gone = Gone::between(Some(&old), Some(&one));
    assert!(gone.includes(&asked(VIP, 53), &led(1)) && !gone.includes(&asked("10.0.0.100", 53), &led(1)));
    let gone = Gone::between(Some(&old), None);
    assert!(gone.includes(&asked(VIP, 53), &led(1)) && gone.includes(&asked("10.0.0.100", 53), &led(1)));
    let scaled_to_zero = service(&[(VIP, 53), ("10.0.0.100", 53)], &[]);
    assert_eq!(Gone::between(Some(&old), Some(&scaled_to_zero)), gone);
}

#[test]
fn node_ports_are_reached_by_any_local_address() {
    let old = service(&[("0.0.0.0", 30_053)], &[(1, Active)]);
    let gone = Gone::between(Some(&old), None);
    for addr in ["127.0.0.1", "192.168.1.10"] {
        assert!(gone.includes(&asked(addr, 30_053), &led(1)), "{addr}");
    }
}

#[test]
fn after_a_restart_every_socket_that_no_service_accounts_for_is_over() {
    let sockets = [
        (asked(VIP, 53), led(1)),
        (asked(VIP, 53), led(2)),
        (asked("10.96.0.99", 53), led(1)),
        (asked("127.0.0.1", 30_053), led(1)),
    ];
    let services = [service(&[(VIP, 53)], &[(1, Active)]), service(&[("0.0.0.0", 30_053)], &[(1, Terminating)])];
    let gone = Gone::among(sockets.into_iter(), services.iter());
    let over: Vec<_> = sockets.iter().filter(|(asked, led)| gone.includes(asked, led)).collect();
    assert_eq!(over, [&sockets[1], &sockets[2]]);
    assert!(Gone::among(sockets[..1].iter().copied(), services.iter()).is_empty());
    let mut merged = Gone::default();
    merged.merge(gone.clone());
    assert_eq!(merged, gone);
}
