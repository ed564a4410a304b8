//! Sockets that are connected to a backend which goes away: real sockets, the real kernel, the real actor.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use kinesin::actors::socket_reaper::SocketReaper;
use kinesin::address::Address;
use kinesin::config::{Inputs, load};
use kinesin::datapath::{Datapath, detach_all};
use kinesin::supervisor::{Backoff, Child, Policy, Strategy, Tree};
use kinesin::world::{MapsHandle, TablesHandle, World};
use kinesin_abi::{BackendState, FrontendKind, proto};
use kinesin_core::objects::ObjectKey;
use kinesin_core::plan::{Limits, Op};
use kinesin_core::services::{BackendRef, BackendSet, Compiled, Frontend};
use nix::sched::{CloneFlags, unshare};

use crate::rig::*;
use crate::sockets::Cgroup;

/// Longer than anything takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);
/// Ports of the backends, on loopback of whatever namespace the client is in.
const OLD: u16 = 7001;
const NEW: u16 = 7002;

fn compiled(ports: &[u16]) -> Compiled {
    let backend = |protocol| {
        move |port: &u16| BackendRef {
            addr: Ipv4Addr::LOCALHOST.into(),
            port: *port,
            proto: protocol,
            state: BackendState::Active,
            local: true,
            node: "".into(),
            zone: "".into(),
        }
    };
    let protocols = [proto::UDP, proto::TCP];
    let frontend = |(index, protocol): (usize, u8)| Frontend {
        addr: IpAddr::from(CLUSTER_IP),
        port: 80,
        proto: protocol,
        kind: FrontendKind::ClusterIp,
        port_name: "".into(),
        flags: 0,
        affinity: 0,
        external: Some(index),
        internal: Some(index),
    };
    let set = |protocol| BackendSet { backends: ports.iter().map(backend(protocol)).collect(), usable: ports.len() };
    Compiled {
        frontends: protocols.into_iter().enumerate().map(frontend).collect(),
        sets: protocols.map(set).to_vec(),
        ..Compiled::default()
    }
}

/// What the maps hold when the service has this backend.
fn plan(port: u16) -> Vec<Op> {
    let mut ops = Vec::new();
    for (id, protocol) in [(1, proto::UDP), (2, proto::TCP)] {
        ops.push(Op::Backend(id, backend(Ipv4Addr::LOCALHOST, port, protocol, true)));
        ops.push(Op::Slot(id, id));
        ops.push(Op::PutFrontend(frontend(CLUSTER_IP, 80, protocol), value(FrontendKind::ClusterIp, 0, id, 1)));
    }
    ops
}

/// The agent's part: programs on a cgroup, maps, and the actor with the tables that it follows.
struct Node {
    world: World,
    datapath: Datapath,
    cgroup: Cgroup,
    root: BpfRoot,
}

impl Node {
    fn new(flags: &[(&str, &str)]) -> Self {
        ip("link set lo up");
        let root = BpfRoot::new();
        let mut datapath = Datapath::load(&options(root.path())).expect("the maps are made");
        let cgroup = Cgroup::new("reaper");
        assert!(datapath.attach_cgroup(cgroup.path()).iter().all(|hook| hook.is_ok()));
        datapath.maps().apply(&plan(OLD)).expect("written");
        let flags = [("kube-proxy-replacement", "true")].iter().chain(flags);
        let flags = flags.map(|(key, value)| (key.to_string(), value.to_string())).collect();
        let (config, report) = load(&Inputs { flags, hostname: "node".into(), ..Inputs::default() }).expect("valid");
        assert!(report.is_clean(), "{report:?}");
        let world = World::new("node".into(), config);
        world.compiled.put(key(), compiled(&[OLD]));
        world.compiled.set_complete();
        let (store, hooks) = (datapath.maps(), datapath.hooks());
        world.maps.set(MapsHandle {
            tables: TablesHandle { generation: 1, store, limits: Limits::default() },
            hooks,
            unaccelerated: Vec::new(),
        });
        Self { world, datapath, cgroup, root }
    }

    /// The backend is exchanged: in the maps, and for those who follow the services.
    fn exchange(&self) {
        self.datapath.maps().apply(&plan(NEW)).expect("written");
        self.world.compiled.put(key(), compiled(&[NEW]));
    }

    /// Runs a client in the cgroup; `when` it has so many translated sockets, the backend is exchanged. Returns how long
    /// the client took from then on.
    fn run(
        &self,
        sockets: usize,
        exchange_first: bool,
        client: impl FnOnce() -> Result<(), String> + Send,
    ) -> Duration {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        std::thread::scope(|scope| {
            let cgroup = &self.cgroup;
            let client = scope.spawn(move || cgroup.run(client));
            let ready = || self.datapath.maps().sockets().expect("readable").len() >= sockets || client.is_finished();
            wait("the client connects", ready);
            let mut begun = Instant::now();
            if exchange_first {
                // While no agent runs.
                self.exchange();
            }
            runtime.block_on(async {
                let reaper = Child::actor::<SocketReaper>(&Address::new("socket_reaper"), {
                    let world = self.world.clone();
                    move || world.clone()
                });
                let policy = Policy {
                    strategy: Strategy::OneForOne,
                    max_restarts: 0,
                    within: LIMIT,
                    backoff: Backoff { min: Duration::ZERO, max: Duration::ZERO },
                    grace: LIMIT,
                };
                let tree = Tree::start(Child::supervisor("test", policy, vec![reaper])).await.expect("it starts");
                if !exchange_first {
                    begun = Instant::now();
                    self.exchange();
                }
                let deadline = Instant::now() + LIMIT;
                while !client.is_finished() && Instant::now() < deadline {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                tree.stop().await;
            });
            client.join().expect("the client is content");
            begun.elapsed()
        })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = detach_all(self.root.path());
    }
}

fn key() -> ObjectKey {
    ObjectKey::new("default", "dns")
}

fn wait(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        std::thread::yield_now();
    }
}

fn text(error: std::io::Error) -> String {
    format!("{error} ({:?})", error.kind())
}

fn server(port: u16) -> Result<UdpSocket, String> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).map_err(text)?;
    socket.set_read_timeout(Some(LIMIT)).map_err(text)?;
    Ok(socket)
}

fn connected(to: SocketAddr) -> Result<UdpSocket, String> {
    let local: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().map_err(|_| "an address")?;
    let socket = UdpSocket::bind(local).map_err(text)?;
    socket.connect(to).map_err(text)?;
    socket.set_read_timeout(Some(LIMIT)).map_err(text)?;
    Ok(socket)
}

/// Sends and waits until the server has it.
fn deliver(from: &UdpSocket, to: &UdpSocket) -> Result<(), String> {
    from.send(b"question").map_err(text)?;
    let mut buffer = [0; 16];
    to.recv(&mut buffer).map(drop).map_err(text)
}

/// A client of long standing, with servers beside it: uses its socket until it is told that the peer is gone, and
/// connects anew.
fn resolver(target: SocketAddr, own_namespace: bool) -> Result<(), String> {
    if own_namespace {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| error.to_string())?;
        ip("link set lo up");
    }
    let (old, new) = (server(OLD)?, server(NEW)?);
    // To the pod itself: nobody's business.
    let direct = connected((Ipv4Addr::LOCALHOST, OLD).into())?;
    let socket = connected(target)?;
    deliver(&socket, &old)?;
    let mut buffer = [0; 16];
    match socket.recv(&mut buffer) {
        Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => {}
        other => return Err(format!("the socket should have been ended: {other:?}")),
    }
    let again = connected(target)?;
    deliver(&again, &new)?;
    deliver(&direct, &old)
}

fn cluster_ip() -> SocketAddr {
    (CLUSTER_IP, 80).into()
}

#[test]
fn r21_a_connected_socket_leaves_a_backend_that_is_gone() {
    isolated(|| {
        let node = Node::new(&[]);
        let took = node.run(1, false, || resolver(cluster_ip(), false));
        println!("answers resumed {took:?} after the change");
        assert_eq!(node.world.problems.all(), [], "the kernel can");
        // Only the new socket is left.
        let left = node.datapath.maps().sockets().unwrap();
        assert_eq!(left.iter().map(|(key, _)| key.port.get()).collect::<Vec<_>>(), [NEW]);
    });
}

#[test]
fn r21_the_same_for_ipv6_sockets_and_in_a_pods_namespace() {
    isolated(|| {
        let mapped = SocketAddr::from((CLUSTER_IP.to_ipv6_mapped(), 80));
        for (target, own_namespace) in [(mapped, false), (cluster_ip(), true)] {
            let node = Node::new(&[]);
            node.run(1, false, || resolver(target, own_namespace));
        }
    });
}

#[test]
fn r21_a_backend_that_went_while_no_agent_ran_is_noticed_by_the_next() {
    isolated(|| {
        let node = Node::new(&[]);
        node.run(1, true, || resolver(cluster_ip(), false));
    });
}

/// A TCP connection to the service and a UDP socket; ends when the UDP socket has been ended, and says what became of
/// the other.
fn both_protocols(ends_tcp: bool) -> Result<(), String> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, OLD)).map_err(text)?;
    let _server = server(OLD)?;
    let stream = TcpStream::connect(cluster_ip()).map_err(text)?;
    let _accepted = listener.accept().map_err(text)?;
    let socket = connected(cluster_ip())?;
    let mut buffer = [0; 16];
    match socket.recv(&mut buffer) {
        Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => {}
        other => return Err(format!("the UDP socket should have been ended: {other:?}")),
    }
    // Both are ended in one pass, UDP first, and a second one follows.
    let deadline = Instant::now() + Duration::from_secs(if ends_tcp { 30 } else { 2 });
    while Instant::now() < deadline {
        match stream.take_error().map_err(text)? {
            Some(error) if ends_tcp && error.raw_os_error() == Some(libc::ECONNABORTED) => return Ok(()),
            Some(error) => return Err(text(error)),
            None => std::thread::yield_now(),
        }
    }
    if ends_tcp { Err("the TCP connection goes on".into()) } else { Ok(()) }
}

#[test]
fn tcp_connections_go_on_unless_they_are_to_be_ended_too() {
    isolated(|| {
        let node = Node::new(&[]);
        node.run(2, false, || both_protocols(false));
        drop(node);
        let node = Node::new(&[("lb-sock-terminate-all-protos", "true")]);
        node.run(2, false, || both_protocols(true));
    });
}

#[test]
fn sockets_of_pods_are_left_alone_where_that_is_asked_for() {
    isolated(|| {
        let node = Node::new(&[("bpf-lb-sock-terminate-pod-connections", "false")]);
        node.run(1, false, || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|error| error.to_string())?;
            ip("link set lo up");
            let old = server(OLD)?;
            let socket = connected(cluster_ip())?;
            deliver(&socket, &old)?;
            // Beyond the second try.
            let deadline = Instant::now() + Duration::from_secs(3);
            while Instant::now() < deadline {
                deliver(&socket, &old)?;
            }
            Ok(())
        });
    });
}
