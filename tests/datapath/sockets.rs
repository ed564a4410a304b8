//! Sockets of the node: a child process in a cgroup of its own talks to services, and the kernel translates for it.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use kinesin::datapath::{Datapath, cgroup2_root, detach_all};
use kinesin_abi::{FrontendKind, PeerKey, PeerValue, frontend_flags, proto};
use kinesin_core::plan::Op;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use crate::rig::*;

/// A cgroup of this test, removed with it.
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    pub(crate) fn new(name: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let root = cgroup2_root().expect("cgroup2 is mounted");
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("kinesin-test-{}-{number}-{name}", std::process::id()));
        fs::create_dir(&path).expect("root may make cgroups");
        Self { path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `child` in a process inside the cgroup and the calling thread's namespaces; its error becomes a panic.
    #[track_caller]
    pub(crate) fn run(&self, child: impl FnOnce() -> Result<(), String>) {
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        // SAFETY: the child of this multi-threaded process only makes system calls and allocates; glibc keeps its
        // allocator usable across fork. It leaves by `_exit`.
        match unsafe { fork() }.expect("fork") {
            ForkResult::Child => {
                drop(reader);
                let joined = fs::write(self.path.join("cgroup.procs"), "0").map_err(|error| format!("join: {error}"));
                let code = match joined.and_then(|()| child()) {
                    Ok(()) => 0,
                    Err(error) => {
                        let mut writer = writer;
                        let _ = writer.write_all(error.as_bytes());
                        1
                    }
                };
                // SAFETY: ends the child without running the parent's destructors.
                unsafe { libc::_exit(code) }
            }
            ForkResult::Parent { child } => {
                drop(writer);
                let mut error = String::new();
                reader.read_to_string(&mut error).expect("the child's report");
                let status = waitpid(child, None).expect("the child ends");
                assert_eq!(status, WaitStatus::Exited(child, 0), "{error}");
            }
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}

const LISTENER: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// A node whose ClusterIP leads to a listener on loopback, for TCP and UDP.
pub(crate) struct Node {
    tcp: TcpListener,
    udp: UdpSocket,
    pub(crate) cgroup: Cgroup,
    pub(crate) datapath: Datapath,
    pub(crate) root: BpfRoot,
}

impl Node {
    pub(crate) fn new() -> Self {
        network();
        let root = BpfRoot::new();
        let datapath = Datapath::load(&options(root.path())).expect("the maps are made");
        let cgroup = Cgroup::new("sockets");
        let tcp = TcpListener::bind((LISTENER, 0)).unwrap();
        let udp = UdpSocket::bind((LISTENER, 0)).unwrap();
        let mut node = Self { tcp, udp, cgroup, datapath, root };
        node.start();
        node
    }

    /// The next agent.
    pub(crate) fn restart(&mut self) {
        self.datapath = Datapath::load(&options(self.root.path())).expect("the maps are made");
        self.start();
    }

    fn start(&mut self) {
        let hooks = self.datapath.attach_cgroup(self.cgroup.path());
        assert_eq!(hooks.len(), 10);
        assert!(hooks.iter().all(|hook| hook.is_ok()), "{hooks:#?}");
        let [tcp, udp] = [self.tcp.local_addr(), self.udp.local_addr()].map(|addr| addr.unwrap().port());
        let mut ops = Vec::new();
        for (id, protocol, port) in [(1, proto::TCP, tcp), (2, proto::UDP, udp)] {
            ops.push(Op::Backend(id, backend(LISTENER, port, protocol, true)));
            ops.push(Op::Slot(id, id));
            let cluster_ip = value(FrontendKind::ClusterIp, 0, id, 1);
            let node_port = value(FrontendKind::NodePort, frontend_flags::ROUTABLE, id, 1);
            ops.push(Op::PutFrontend(frontend(CLUSTER_IP, 80, protocol), cluster_ip));
            ops.push(Op::PutFrontend(frontend(NODE, 30_080, protocol), node_port));
            ops.push(Op::PutFrontend(frontend(Ipv4Addr::UNSPECIFIED, 30_080, protocol), node_port));
            ops.push(Op::PutFrontend(frontend(CLUSTER_IP, 81, protocol), value(FrontendKind::ClusterIp, 0, 0, 0)));
        }
        let wildcard = value(FrontendKind::ClusterIp, frontend_flags::WILDCARD, 0, 0);
        ops.push(Op::PutFrontend(frontend(CLUSTER_IP, 0, proto::ANY), wildcard));
        self.datapath.maps().apply(&ops).unwrap();
    }

    /// Connects to the service, and asserts that the backend is reached.
    #[track_caller]
    pub(crate) fn assert_translates(&self) {
        self.cgroup.run(|| TcpStream::connect((CLUSTER_IP, 80)).map(drop).map_err(text));
        self.tcp.accept().unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = detach_all(self.root.path());
    }
}

pub(crate) fn text(error: std::io::Error) -> String {
    format!("{error} ({:?})", error.kind())
}

pub(crate) fn expect<T: PartialEq + std::fmt::Debug>(what: &str, is: T, should: T) -> Result<(), String> {
    if is == should { Ok(()) } else { Err(format!("{what} is {is:?}, not {should:?}")) }
}

fn peer(addr: Ipv4Addr, port: u16) -> SocketAddr {
    (addr, port).into()
}

fn mapped(addr: Ipv4Addr, port: u16) -> SocketAddr {
    (addr.to_ipv6_mapped(), port).into()
}

#[test]
fn a_connection_to_a_service_reaches_its_backend_and_shows_the_service() {
    isolated(|| {
        let node = Node::new();
        let targets =
            [peer(CLUSTER_IP, 80), peer(NODE, 30_080), peer(Ipv4Addr::LOCALHOST, 30_080), mapped(CLUSTER_IP, 80)];
        for target in targets {
            node.cgroup.run(|| {
                let mut stream = TcpStream::connect(target).map_err(text)?;
                expect("peer", stream.peer_addr().map_err(text)?, target)?;
                stream.write_all(b"hello").map_err(text)
            });
            let (mut stream, from) = node.tcp.accept().unwrap();
            let mut said = String::new();
            stream.read_to_string(&mut said).unwrap();
            assert_eq!((said.as_str(), from.ip()), ("hello", Ipv4Addr::LOCALHOST.into()));
        }
        assert_eq!(node.datapath.maps().raw_entries("sockets").unwrap().len(), targets.len());
    });
}

#[test]
fn a_pods_loopback_is_its_own_and_the_nodes_leads_to_node_ports_and_host_ports() {
    isolated(|| {
        let node = Node::new();
        let host_port = value(FrontendKind::HostPort, frontend_flags::ROUTABLE, 1, 1);
        let surrogate = Op::PutFrontend(frontend(Ipv4Addr::UNSPECIFIED, 8080, proto::TCP), host_port);
        node.datapath.maps().apply(&[surrogate]).unwrap();
        for port in [30_080, 8080] {
            node.cgroup.run(|| TcpStream::connect(peer(Ipv4Addr::LOCALHOST, port)).map(drop).map_err(text));
            node.tcp.accept().unwrap();
        }
        // A pod is in the node's cgroup, and has a network namespace of its own.
        node.cgroup.run(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).map_err(|error| text(error.into()))?;
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().map_err(text)?;
            expect("ip link set lo up", up.success(), true)?;
            for port in [30_080, 8080] {
                let error = TcpStream::connect(peer(Ipv4Addr::LOCALHOST, port)).map(drop).map_err(|e| e.kind());
                expect("the pod's own port", error, Err(std::io::ErrorKind::ConnectionRefused))?;
                let own = TcpListener::bind(peer(Ipv4Addr::LOCALHOST, port)).map_err(text)?;
                let mut stream = TcpStream::connect(peer(Ipv4Addr::LOCALHOST, port)).map_err(text)?;
                let (mut accepted, _) = own.accept().map_err(text)?;
                stream.write_all(b"mine").map_err(text)?;
                drop(stream);
                let mut said = String::new();
                accepted.read_to_string(&mut said).map_err(text)?;
                expect("what the pod told itself", said.as_str(), "mine")?;
            }
            Ok(())
        });
    });
}

#[test]
fn a_node_port_of_another_node_is_served_here_unless_only_its_own_pods_may_answer() {
    const OTHER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 11);
    const STRANGER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 12);
    isolated(|| {
        let node = Node::new();
        let maps = node.datapath.maps();
        maps.write_settings(&settings()).unwrap();
        let other = PeerValue { ipv4: u32::from_ne_bytes(OTHER.octets()), ..PeerValue::default() };
        maps.put_peer(&PeerKey::of_addr(&OTHER.into()), &other).unwrap();
        let local = value(FrontendKind::NodePort, frontend_flags::ROUTABLE | frontend_flags::EXTERNAL_LOCAL, 1, 1);
        let host_port = value(FrontendKind::HostPort, frontend_flags::ROUTABLE, 1, 1);
        maps.apply(&[
            Op::PutFrontend(frontend(Ipv4Addr::UNSPECIFIED, 30_081, proto::TCP), local),
            Op::PutFrontend(frontend(Ipv4Addr::UNSPECIFIED, 30_082, proto::TCP), host_port),
        ])
        .unwrap();
        node.cgroup.run(|| {
            let stream = TcpStream::connect(peer(OTHER, 30_080)).map_err(text)?;
            expect("peer", stream.peer_addr().map_err(text)?, peer(OTHER, 30_080))
        });
        node.tcp.accept().unwrap();
        assert_eq!(maps.raw_entries("sockets").unwrap().len(), 1);
        // What is not translated goes out to the LAN, where nobody is.
        node.cgroup.run(|| {
            let soon = std::time::Duration::from_millis(200);
            for to in [peer(OTHER, 30_081), peer(OTHER, 30_082), peer(OTHER, 80), peer(STRANGER, 30_080)] {
                expect("nobody answers", TcpStream::connect_timeout(&to, soon).is_err(), true)?;
            }
            Ok(())
        });
        assert_eq!(maps.raw_entries("sockets").unwrap().len(), 1);
    });
}

#[test]
fn datagrams_reach_the_backend_and_answers_come_from_the_service() {
    isolated(|| {
        let node = Node::new();
        let server = node.udp.try_clone().unwrap();
        // Answers everything until the test's thread, and with it the namespace, is gone.
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((len, from)) = server.recv_from(&mut buffer) {
                let _ = server.send_to(&buffer[..len], from);
            }
        });
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let any6 = SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, 0));
        for (local, target) in [(any, peer(CLUSTER_IP, 80)), (any, peer(NODE, 30_080)), (any6, mapped(CLUSTER_IP, 80))]
        {
            node.cgroup.run(|| {
                let mut buffer = [0; 64];
                let socket = UdpSocket::bind(local).map_err(text)?;
                socket.set_read_timeout(Some(std::time::Duration::from_secs(10))).map_err(text)?;
                socket.send_to(b"unconnected", target).map_err(text)?;
                let (len, from) = socket.recv_from(&mut buffer).map_err(text)?;
                expect("source of the answer", (&buffer[..len], from), (&b"unconnected"[..], target))?;
                let socket = UdpSocket::bind(local).map_err(text)?;
                socket.set_read_timeout(Some(std::time::Duration::from_secs(10))).map_err(text)?;
                socket.connect(target).map_err(text)?;
                expect("peer", socket.peer_addr().map_err(text)?, target)?;
                socket.send(b"connected").map_err(text)?;
                let (len, from) = socket.recv_from(&mut buffer).map_err(text)?;
                expect("source of the answer", (&buffer[..len], from), (&b"connected"[..], target))
            });
        }
    });
}

#[test]
fn a_service_without_backends_fails_at_once() {
    isolated(|| {
        let node = Node::new();
        // An empty set has no slots: the one at its base is another service's.
        node.datapath.maps().apply(&[Op::Slot(0, 1)]).unwrap();
        node.cgroup.run(|| {
            let denied = Some(libc::EPERM);
            let connect = TcpStream::connect(peer(CLUSTER_IP, 81)).err().and_then(|error| error.raw_os_error());
            expect("connect", connect, denied)?;
            let connect = TcpStream::connect(mapped(CLUSTER_IP, 81)).err().and_then(|error| error.raw_os_error());
            expect("connect of an IPv6 socket", connect, denied)?;
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(text)?;
            let sent = socket.send_to(b"?", peer(CLUSTER_IP, 81)).err().and_then(|error| error.raw_os_error());
            expect("sendto", sent, denied)
        });
    });
}

#[test]
fn sockets_of_one_network_stay_with_one_backend_and_leave_it_when_the_service_does() {
    isolated(|| {
        let node = Node::new();
        let listeners: Vec<TcpListener> = (0..6).map(|_| TcpListener::bind((LISTENER, 0)).unwrap()).collect();
        let mut ops = Vec::new();
        for (n, listener) in (0..).zip(&listeners) {
            let port = listener.local_addr().unwrap().port();
            listener.set_nonblocking(true).unwrap();
            ops.push(Op::Backend(20 + n, backend(LISTENER, port, proto::TCP, true)));
            ops.push(Op::Slot(40 + n, 20 + n));
        }
        let sticky = |count| kinesin_abi::FrontendValue {
            affinity: 60,
            service: 9,
            ..value(FrontendKind::ClusterIp, frontend_flags::AFFINITY, 40, count)
        };
        ops.push(Op::PutFrontend(frontend(CLUSTER_IP, 90, proto::TCP), sticky(6)));
        node.datapath.maps().apply(&ops).unwrap();
        // Whoever has connections to accept; accepts them all.
        let visited = |times: usize| -> Vec<usize> {
            node.cgroup.run(move || {
                for n in 0..times {
                    let to = if n % 2 == 0 { peer(CLUSTER_IP, 90) } else { mapped(CLUSTER_IP, 90) };
                    TcpStream::connect(to).map_err(text)?;
                }
                Ok(())
            });
            let accepted = listeners.iter().map(|listener| std::iter::from_fn(|| listener.accept().ok()).count());
            accepted.collect()
        };
        let first = visited(20);
        assert_eq!(first.iter().filter(|n| **n > 0).collect::<Vec<_>>(), [&20], "{first:?}");
        let held = first.iter().position(|n| *n > 0).unwrap() as u32;
        let bonds = node.datapath.maps().dump_raw("affinity").unwrap();
        assert!(bonds.len() == 1 && bonds[0].0.starts_with("netns 0x"), "{bonds:?}");
        // The service gives it up; the backend itself stays where it is.
        let mut ops = vec![Op::Slot(40 + held, 25)];
        ops.push(Op::PutFrontend(frontend(CLUSTER_IP, 90, proto::TCP), sticky(5)));
        ops.push(Op::Slot(45, 0));
        node.datapath.maps().apply(&ops).unwrap();
        let second = visited(20);
        let next: Vec<usize> = (0..6).filter(|n| second[*n] > 0).collect();
        assert!(next.len() == 1 && next[0] as u32 != held, "{second:?} after {first:?}");
    });
}

#[test]
fn other_destinations_are_not_touched() {
    isolated(|| {
        let node = Node::new();
        let port = node.tcp.local_addr().unwrap().port();
        let v6 = TcpListener::bind((std::net::Ipv6Addr::LOCALHOST, 0)).unwrap();
        let v6_port = v6.local_addr().unwrap().port();
        node.cgroup.run(|| {
            TcpStream::connect(peer(LISTENER, port)).map_err(text)?;
            TcpStream::connect((std::net::Ipv6Addr::LOCALHOST, v6_port)).map_err(text)?;
            // Wildcards do not concern sockets: there is just nobody at that port (the route leads to the LAN,
            // where nobody answers in time).
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(text)?;
            socket.connect(peer(CLUSTER_IP, 9999)).map_err(text)?;
            expect("peer", socket.peer_addr().map_err(text)?, peer(CLUSTER_IP, 9999))
        });
        assert_eq!(node.datapath.maps().raw_entries("sockets").unwrap().len(), 0);
    });
}

#[test]
fn processes_outside_the_cgroup_are_not_translated() {
    isolated(|| {
        let node = Node::new();
        let outside = Cgroup::new("outside");
        outside.run(|| {
            let refused = TcpStream::connect(peer(Ipv4Addr::LOCALHOST, 30_080)).err().map(|error| error.kind());
            expect("connect", refused, Some(std::io::ErrorKind::ConnectionRefused))
        });
        drop(node);
    });
}

#[test]
fn hooks_of_a_dead_agent_go_on_and_the_next_one_replaces_them_in_place() {
    isolated(|| {
        let mut node = Node::new();
        let links = || {
            let mut all: Vec<(String, u32, u32)> = fs::read_dir(kinesin::datapath::links_dir(node.root.path()))
                .unwrap()
                .map(|pin| {
                    use aya::programs::links::{FdLink, PinnedLink};
                    let path = pin.unwrap().path();
                    let info = FdLink::from(PinnedLink::from_pin(&path).unwrap()).info().unwrap();
                    (path.display().to_string(), info.id(), info.program_id())
                })
                .collect();
            all.sort();
            all
        };
        let before = links();
        assert_eq!(before.len(), 10);
        let mut next = Datapath::load(&options(node.root.path())).unwrap();
        let hooks = next.attach_cgroup(node.cgroup.path());
        assert!(hooks.iter().all(|hook| hook.is_ok()), "{hooks:#?}");
        let after = links();
        for (old, new) in before.iter().zip(&after) {
            assert_eq!((&old.0, old.1), (&new.0, new.1), "the link is the same");
            assert_ne!(old.2, new.2, "the program is the new one");
        }
        node.datapath = next;
        node.cgroup.run(|| TcpStream::connect(peer(CLUSTER_IP, 80)).map(drop).map_err(text));
        // Another cgroup gets links of its own.
        let other = Cgroup::new("other");
        assert!(node.datapath.attach_cgroup(other.path()).iter().all(|hook| hook.is_ok()));
        other.run(|| TcpStream::connect(peer(CLUSTER_IP, 80)).map(drop).map_err(text));
    });
}

#[test]
fn a_cgroup_that_is_not_there_is_named_in_every_status() {
    isolated(|| {
        let root = BpfRoot::new();
        let mut datapath = Datapath::load(&options(root.path())).unwrap();
        let hooks = datapath.attach_cgroup(Path::new("/nowhere"));
        assert!(hooks.iter().all(|hook| hook.error.as_ref().is_some_and(|error| error.contains("/nowhere"))));
    });
}
