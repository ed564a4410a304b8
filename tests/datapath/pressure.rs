//! Tables of connections that are too small, are replaced, or are looked through for what has expired.

use std::net::Ipv4Addr;

use kinesin::datapath::{Datapath, LoadOptions, MapSizes, MapStore};
use kinesin_abi::{Direction, DropReason, FlowCount, Timeouts, proto};
use kinesin_core::flows::{Counts, most_opening};

use crate::flows::{count, entries};
use crate::packets::{ACK, End, FIN, RST, SYN, ends, tcp, udp};
use crate::rig::*;

const SERVICE: End = (VIP, TO_REMOTE);

/// Opens a connection to a remote backend; returns its ends on the backend's side.
fn establish(rig: &mut Rig, client: End) -> (End, End) {
    let (code, out) = rig.ingress(&tcp(client, SERVICE, SYN));
    assert_eq!(code, REDIRECT, "{client:?}");
    let (node, pod) = ends(&out);
    rig.ingress(&tcp(pod, node, SYN | ACK));
    rig.ingress(&tcp(client, SERVICE, ACK));
    (node, pod)
}

/// Whether packets of a connection go where they went, both ways.
fn works(rig: &mut Rig, client: End, (node, pod): (End, End)) -> bool {
    let (_, there) = rig.ingress(&tcp(client, SERVICE, ACK));
    let (_, back) = rig.ingress(&tcp(pod, node, ACK));
    (ends(&there), ends(&back)) == ((node, pod), (SERVICE, client))
}

fn client(n: u16) -> End {
    (CLIENT, 61_000 + n)
}

#[test]
fn r28_an_overloaded_table_keeps_established_connections_and_counts_what_it_forgets() {
    isolated(|| {
        let mut rig = Rig::with(MapSizes { flows: 256, transient: 256, ..small() });
        // What connections that begin may have of the table of established ones.
        let share = most_opening(256) as usize;
        let held: Vec<(End, (End, End))> = (0..50).map(|n| (client(n), establish(&mut rig, client(n)))).collect();
        assert_eq!(count(&rig, "flows"), 100);
        // From everywhere, and never gone on with; not one packet of the established ones meanwhile.
        for n in 0..3000u32 {
            let flood = (Ipv4Addr::from(0x0b00_0000 + n), 40_000);
            assert_eq!(rig.ingress(&tcp(flood, (VIP, TO_LOCAL), SYN)).0, NEXT, "the newest are served");
        }
        for (client, ends) in &held {
            assert!(works(&mut rig, *client, *ends), "{client:?}");
        }
        let counts = Counts(rig.maps.flow_counts().unwrap());
        let present = count(&rig, "transient") as u64;
        assert!(present <= 256 && counts.of(FlowCount::Created) + share as u64 >= 6000, "{counts:?}");
        assert!((1..=share as u64).contains(&counts.opening()), "{counts:?}");
        assert_eq!(count(&rig, "flows"), 100 + counts.opening() as usize);
        let forgotten = counts.forgotten(present, 256);
        assert!(forgotten > 5000, "{forgotten} of {counts:?}");
        // Those who answer are no better off while they cannot see the answers.
        for n in 0..300 {
            let (_, out) = rig.ingress(&tcp((CLIENT, 20_000 + n), (VIP, TO_LOCAL), SYN));
            let (client, pod) = ends(&out);
            rig.egress(&tcp(pod, client, SYN | ACK));
        }
        assert!(count(&rig, "flows") <= 100 + share);
        // Those that never went on expire, and others may begin there again.
        let found = rig.maps.collect_flows(&Timeouts::DEFAULT, now() + 61_000_000_000).unwrap();
        assert_eq!((found.settled.alive, found.opening), ([100, 0], 0), "{found:?}");
        assert_eq!(Counts(rig.maps.flow_counts().unwrap()).opening(), 0);
        rig.ingress(&tcp((CLIENT, 30_000), (VIP, TO_LOCAL), SYN));
        assert_eq!(count(&rig, "flows"), 102);
    });
}

/// Where packets of a connection come in on one CPU and its answers on another, each would count wrong for ever.
#[test]
fn what_is_counted_on_other_cpus_is_evened_out() {
    isolated(|| {
        let mut rig = Rig::with(MapSizes { flows: 256, ..small() });
        let online = aya::util::online_cpus().unwrap().len();
        let share = most_opening(256) as usize / online * online;
        let on = |cpu: usize| {
            let mut set = nix::sched::CpuSet::new();
            set.set(cpu % online).unwrap();
            nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).unwrap();
        };
        for round in 0..4 {
            for n in 0..8 {
                let client = client(round * 8 + n);
                on(0);
                let (_, out) = rig.ingress(&tcp(client, (VIP, TO_LOCAL), SYN));
                let (client, pod) = ends(&out);
                rig.egress(&tcp(pod, client, SYN | ACK));
                on(1);
                rig.ingress(&tcp(client, (VIP, TO_LOCAL), ACK));
            }
            rig.maps.share_openings(None).unwrap();
        }
        assert_eq!(count(&rig, "flows"), 64);
        let counts = Counts(rig.maps.flow_counts().unwrap());
        assert_eq!(
            (counts.opening(), counts.of(FlowCount::Created)),
            (0, 0),
            "none had to begin elsewhere: {counts:?}"
        );
        // All CPUs together have their share and no more.
        for n in 0..300 {
            on(n);
            rig.ingress(&tcp((CLIENT, 20_000 + n as u16), (VIP, TO_LOCAL), SYN));
        }
        assert_eq!(count(&rig, "flows"), 64 + share);
    });
}

#[test]
fn a_full_table_of_established_connections_leaves_the_rest_where_the_oldest_are_forgotten() {
    isolated(|| {
        let mut rig = Rig::with(MapSizes { flows: 64, ..small() });
        let held: Vec<(End, (End, End))> = (0..100).map(|n| (client(n), establish(&mut rig, client(n)))).collect();
        let counts = Counts(rig.maps.flow_counts().unwrap());
        assert!(counts.of(FlowCount::Unsettled) > 0, "it is counted: {counts:?}");
        assert!(count(&rig, "flows") <= 64);
        for (client, ends) in &held {
            assert!(works(&mut rig, *client, *ends), "{client:?}");
        }
        assert_eq!(rig.dropped(DropReason::FlowInsertFailed, Direction::Ingress), 0);
    });
}

#[test]
fn expired_connections_are_collected_and_their_ports_are_free() {
    isolated(|| {
        let mut rig = Rig::new();
        let (open, closed, reset) = (client(0), client(1), client(2));
        let kept = establish(&mut rig, open);
        let (node, pod) = establish(&mut rig, closed);
        rig.ingress(&tcp(closed, SERVICE, FIN | ACK));
        rig.ingress(&tcp(pod, node, FIN | ACK));
        let (node, pod) = establish(&mut rig, reset);
        rig.ingress(&tcp(pod, node, RST));
        rig.ingress(&tcp(client(3), SERVICE, SYN));
        rig.ingress(&udp(client(4), SERVICE, b"?"));
        let collect =
            |rig: &Rig, later: u64| rig.maps.collect_flows(&Timeouts::DEFAULT, now() + later * 1_000_000_000).unwrap();
        let first = collect(&rig, 0);
        assert_eq!((first.settled.removed(), first.transient.removed()), (0, 0));
        let closed = collect(&rig, 11);
        assert_eq!((closed.settled.expired, closed.settled.alive), ([4, 0], [4, 0]), "{closed:?}");
        assert_eq!(closed.opening, 2);
        let quiet = collect(&rig, 61);
        assert_eq!((quiet.settled.removed(), quiet.transient.expired), (2, [0, 2]), "{quiet:?}");
        assert_eq!(quiet.opening, 0);
        assert_eq!((count(&rig, "flows"), count(&rig, "transient")), (2, 0), "{:?}", entries(&rig));
        assert!(works(&mut rig, open, kept));
        assert_eq!(collect(&rig, 8_001).settled.removed(), 2);
        assert_eq!(entries(&rig), []);
        // Nothing was forgotten: everything is accounted for.
        assert_eq!(Counts(rig.maps.flow_counts().unwrap()).forgotten(0, 0), 0);
    });
}

#[test]
fn timeouts_are_those_of_the_settings() {
    isolated(|| {
        let mut rig = Rig::new();
        let one_port = |timeouts| kinesin_abi::Settings { snat_min: 61_000, snat_max: 61_000, timeouts, ..settings() };
        rig.maps.write_settings(&one_port(Timeouts::DEFAULT)).unwrap();
        let _ = establish(&mut rig, (CLIENT, 40_000));
        let second = |rig: &mut Rig| rig.ingress(&tcp((CLIENT, 40_001), SERVICE, SYN)).0;
        assert_eq!(second(&mut rig), SHOT, "the only port is in use");
        let before = now();
        rig.maps.write_settings(&one_port(Timeouts { service_tcp: 1, ..Timeouts::DEFAULT })).unwrap();
        while now() - before < 1_100_000_000 {
            std::thread::yield_now();
        }
        assert_eq!(second(&mut rig), REDIRECT);
    });
}

/// Loads again with other sizes of both tables of connections, as a new agent does.
fn reload(rig: &mut Rig, flows: u32, transient: u32) {
    let sizes = MapSizes { flows, transient, ..small() };
    let options = LoadOptions { max_entries: sizes, ..LoadOptions::new(rig.root()) };
    rig.datapath = Datapath::load(&options).expect("the maps are made");
    rig.maps = rig.datapath.kernel_maps();
}

#[test]
fn r29_resizing_keeps_every_connection_before_while_and_after_it_is_copied() {
    isolated(|| {
        let mut rig = Rig::new();
        let held: Vec<(End, (End, End))> = (0..40).map(|n| (client(n), establish(&mut rig, client(n)))).collect();
        let half_open = (CLIENT, 62_000);
        let opening = ends(&rig.ingress(&tcp(half_open, SERVICE, SYN)).1);
        let asking = (CLIENT, 62_001);
        let asked = ends(&rig.ingress(&udp(asking, SERVICE, b"?")).1);
        let all_work = |rig: &mut Rig, when: &str| {
            for (client, ends) in &held {
                assert!(works(rig, *client, *ends), "{when}: {client:?}");
            }
            assert_eq!(ends(&rig.ingress(&udp(asking, SERVICE, b"?")).1), asked, "{when}");
        };
        for (number, (flows, transient)) in [(8192, 8192), (1024, 512), (4096, 4096)].into_iter().enumerate() {
            reload(&mut rig, flows, transient);
            // New programs, empty tables.
            all_work(&mut rig, "before copying");
            let young = (CLIENT, 63_000 + number as u16);
            let young_ends = establish(&mut rig, young);
            let moved = rig.datapath.take_moving().expect("there is something to move").finish();
            assert!(moved.iter().all(|table| table.lost == 0 && table.difference.contains("max_entries")), "{moved:?}");
            all_work(&mut rig, "after copying");
            assert!(works(&mut rig, young, young_ends));
            assert_eq!(ends(&rig.ingress(&tcp(half_open, SERVICE, SYN)).1), opening);
            let left: Vec<_> = std::fs::read_dir(kinesin::datapath::maps_dir(rig.root())).unwrap().collect();
            assert!(
                !left.iter().any(|pin| pin.as_ref().unwrap().file_name().to_string_lossy().contains('-')),
                "{left:?}"
            );
        }
    });
}

#[test]
fn r29_an_agent_that_dies_while_it_resizes_leaves_every_connection_to_the_next() {
    isolated(|| {
        let mut rig = Rig::new();
        let held: Vec<(End, (End, End))> = (0..40).map(|n| (client(n), establish(&mut rig, client(n)))).collect();
        // Each dies before it has copied anything, and the sizes change every time but the last.
        let mut open = held.clone();
        for (number, size) in [8192, 2048, 2048].into_iter().enumerate() {
            reload(&mut rig, size, size);
            let young = (CLIENT, 63_000 + number as u16);
            open.push((young, establish(&mut rig, young)));
            for (client, ends) in &open {
                assert!(works(&mut rig, *client, *ends), "{number}: {client:?}");
            }
        }
        let moved = rig.datapath.take_moving().expect("left unfinished").finish();
        assert!(moved.iter().all(|table| table.lost == 0), "{moved:?}");
        for (client, ends) in &open {
            assert!(works(&mut rig, *client, *ends), "{client:?}");
        }
        reload(&mut rig, 2048, 2048);
        assert!(rig.datapath.take_moving().is_some_and(|moving| moving.is_empty()), "nothing is left to move");
    });
}

#[test]
fn a_connection_that_ended_while_it_was_moved_does_not_come_back() {
    isolated(|| {
        let mut rig = Rig::new();
        let (node, pod) = establish(&mut rig, client(0));
        rig.ingress(&tcp(pod, node, RST));
        reload(&mut rig, 8192, 8192);
        // The client uses its port again.
        let again = establish(&mut rig, client(0));
        rig.datapath.take_moving().expect("there is something to move").finish();
        assert!(works(&mut rig, client(0), again));
        let over = entries(&rig)
            .into_iter()
            .filter(|(key, value)| key.proto == proto::TCP && kinesin_abi::tcp_closed(value.tcp));
        assert_eq!(over.count(), 0);
    });
}
