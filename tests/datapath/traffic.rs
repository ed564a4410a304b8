//! Real traffic: a client, a node with a pod, and a second node on one switched LAN. Checksums are left to offload and
//! segments are merged, as on any virtual device, so this is where mistakes with them show.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use kinesin::datapath::{Datapath, LoadOptions};
use kinesin_abi::{FrontendKind, L2Key, frontend_flags, proto};
use kinesin_core::plan::Op;
use nix::sched::{CloneFlags, unshare};

use crate::rig::*;

/// Port of [`VIP`] whose backend is the node itself.
pub(crate) const TO_HOST: u16 = 85;
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with a thread inside, which ends with it.
pub(crate) struct Host {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    netns: String,
}

impl Host {
    pub(crate) fn new() -> Self {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (named, name) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("root may unshare");
            ip("link set lo up");
            let netns = format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid());
            named.send(netns).expect("the test waits");
            queue.into_iter().for_each(|job| job());
        });
        let netns = name.recv().expect("the thread starts");
        Self { jobs: Some(jobs), thread: Some(thread), netns }
    }

    /// Runs in this namespace and waits.
    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        self.start(move || {
            let _ = done.send(job());
        });
        result.recv().expect("the job did not panic")
    }

    pub(crate) fn start(&self, job: impl FnOnce() + Send + 'static) {
        self.jobs.as_ref().expect("open until dropped").send(Box::new(job)).expect("the thread lives");
    }

    pub(crate) fn ip(&self, arguments: &'static [&'static str]) {
        self.run(|| arguments.iter().for_each(|line| ip(line)));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Echoes TCP connections and datagrams at an address until its namespace's sockets go.
fn echo(at: (impl Into<IpAddr>, u16)) {
    let at = SocketAddr::from(at);
    let listener = TcpListener::bind(at).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let (mut from, mut to) = (stream.try_clone().unwrap(), stream);
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
        }
    });
    let socket = UdpSocket::bind(at).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 9000];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..len], from);
        }
    });
}

pub(crate) struct Lan {
    pub(crate) client: Host,
    pub(crate) pod: Host,
    pub(crate) second: Host,
    pub(crate) switch: Host,
    pub(crate) datapath: Option<Datapath>,
    pub(crate) root: BpfRoot,
    dual: bool,
}

impl Lan {
    /// The same with IPv6 beside IPv4, on every host and at the services.
    pub(crate) fn dual() -> Self {
        let lan = Self::serving(true);
        ip("addr add fd00:1::10/64 dev lan0 nodad");
        ip("addr add fd00:42:1::1/64 dev pod0 nodad");
        ip("route add fd00:42:2::/48 via fd00:1::11");
        lan.pod.ip(&["addr add fd00:42:1::5/64 dev eth0 nodad", "route add default via fd00:42:1::1"]);
        lan.second.ip(&["addr add fd00:1::11/64 dev eth0 nodad", "addr add fd00:42:2::5/128 dev lo nodad"]);
        lan.client.ip(&["addr add fd00:1::50/64 dev eth0 nodad", "route add fd00:99::/64 dev eth0"]);
        lan.pod.run(|| echo((LOCAL_POD6, 8080)));
        lan.second.run(|| echo((REMOTE_POD6, 8080)));
        let maps = lan.datapath.as_ref().unwrap().maps();
        maps.apply(&services6()).unwrap();
        maps.put_l2(L2Key { addr: VIP6.into(), ifindex: ifindex(LAN) }).unwrap();
        lan
    }

    /// The calling thread becomes the node.
    pub(crate) fn new() -> Self {
        Self::serving(false)
    }

    fn serving(dual: bool) -> Self {
        let [switch, client, pod, second] = std::array::from_fn(|_| Host::new());
        ip("link set lo up");
        switch.ip(&["link add br0 type bridge", "link set br0 up"]);
        ip(&format!("link add lan0 address 02:00:00:00:00:10 type veth peer name p0 netns {}", switch.netns));
        ip(&format!("link add pod0 type veth peer name eth0 netns {}", pod.netns));
        let (into_client, into_second) = (client.netns.clone(), second.netns.clone());
        switch.run(move || {
            ip(&format!("link add p1 type veth peer name eth0 netns {into_client}"));
            ip(&format!("link add p2 type veth peer name eth0 netns {into_second}"));
            for port in ["p0", "p1", "p2"] {
                ip(&format!("link set {port} master br0 up"));
            }
        });
        ip("link set lan0 up");
        ip("addr add 192.168.1.10/24 dev lan0");
        ip("link set pod0 up");
        ip("addr add 10.42.1.1/24 dev pod0");
        ip("route add 10.42.2.0/24 via 192.168.1.11");
        forwarding(true);
        pod.ip(&["link set eth0 up", "addr add 10.42.1.5/24 dev eth0", "route add default via 10.42.1.1"]);
        second.ip(&["link set eth0 up", "addr add 192.168.1.11/24 dev eth0", "addr add 10.42.2.5/32 dev lo"]);
        client.ip(&["link set eth0 up", "addr add 192.168.1.50/24 dev eth0", "route add 10.0.0.0/24 dev eth0"]);
        pod.run(|| echo((LOCAL_POD, 8080)));
        second.run(|| echo((REMOTE_POD, 8080)));
        echo((NODE, 8080));

        let root = BpfRoot::new();
        let mut lan = Self { client, pod, second, switch, datapath: None, root, dual };
        lan.start_agent();
        let maps = lan.datapath.as_ref().unwrap().maps();
        maps.write_settings(&settings()).unwrap();
        maps.put_device(ifindex(LAN), &device()).unwrap();
        maps.apply(&services()).unwrap();
        for (id, protocol) in [(50, proto::TCP), (60, proto::UDP)] {
            let flags = frontend_flags::ROUTABLE;
            let host = value(FrontendKind::LoadBalancer, flags, id, 1);
            let ops = [
                Op::Backend(id, backend(NODE, 8080, protocol, true)),
                Op::Slot(id, id),
                Op::PutFrontend(frontend(VIP, TO_HOST, protocol), host),
            ];
            maps.apply(&ops).unwrap();
        }
        maps.put_l2(L2Key { addr: VIP.into(), ifindex: ifindex(LAN) }).unwrap();
        lan
    }

    /// Loads and attaches, in place of what is there.
    pub(crate) fn start_agent(&mut self) {
        let mut datapath = Datapath::load(&LoadOptions { ipv6: self.dual, ..options(self.root.path()) }).unwrap();
        let hooks = datapath.attach_device(LAN, ifindex(LAN)).unwrap();
        assert!(hooks.are_ok(), "{hooks:?}");
        self.datapath = Some(datapath);
    }
}

/// Runs a program in a host's namespace; returns what it printed.
pub(crate) fn command(host: &Host, line: &'static str) -> String {
    host.run(move || {
        let mut words = line.split_whitespace();
        let program = words.next().expect("a program");
        let output = std::process::Command::new(program).args(words).output().expect("it is installed");
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    })
}

pub(crate) fn connect(port: u16) -> std::io::Result<TcpStream> {
    connect_to((VIP, port).into())
}

pub(crate) fn connect_to(service: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&service, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Sends so many bytes and asserts that they come back.
pub(crate) fn exchange(stream: &TcpStream, len: usize) {
    let sent: Vec<u8> = (0..len).map(|i| (i * 7 + i / 251) as u8).collect();
    let (mut writer, copy) = (stream.try_clone().unwrap(), sent.clone());
    let sender = std::thread::spawn(move || writer.write_all(&copy));
    let mut received = vec![0; len];
    (&*stream).read_exact(&mut received).unwrap();
    sender.join().unwrap().unwrap();
    assert!(sent == received, "the bytes that came back differ");
}

#[test]
fn connections_and_datagrams_reach_local_remote_and_host_backends() {
    isolated(|| {
        let lan = Lan::new();
        for port in [TO_LOCAL, TO_REMOTE, TO_HOST] {
            lan.client.run(move || {
                let stream = connect(port).unwrap();
                exchange(&stream, 4 << 20);
                stream.shutdown(Shutdown::Write).unwrap();
                assert_eq!((&stream).read(&mut [0; 1]).unwrap(), 0, "the end of the connection arrives too");
                let socket = UdpSocket::bind((CLIENT, 0)).unwrap();
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
                socket.connect((VIP, port)).unwrap();
                for len in [0, 1, 1200] {
                    socket.send(&vec![len as u8; len]).unwrap();
                    assert_eq!(socket.recv(&mut [0; 2048]).unwrap(), len);
                }
            });
        }
        // Who the LAN sees.
        let neighbours = lan.client.run(|| fs::read_to_string("/proc/thread-self/net/arp").unwrap());
        let mac = neighbours.lines().find(|line| line.starts_with("10.0.0.100 ")).expect("resolved");
        assert!(mac.contains("02:00:00:00:00:10"), "{mac}");
        let maps = lan.datapath.as_ref().unwrap().maps();
        assert!(maps.read_l2().unwrap()[0].1.responses_sent > 0);
        assert_eq!(maps.drops().unwrap(), []);
    });
}

#[test]
fn a_refusal_arrives_at_real_sockets() {
    isolated(|| {
        let lan = Lan::new();
        lan.client.run(|| {
            let error = connect(TO_NOBODY).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
            for payload in [&b""[..], &[7; 1001]] {
                let socket = UdpSocket::bind((CLIENT, 0)).unwrap();
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
                socket.connect((VIP, TO_NOBODY)).unwrap();
                socket.send(payload).unwrap();
                let error = socket.recv(&mut [0; 8]).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
            }
        });
    });
}

#[test]
fn connections_outlive_the_agent_and_its_successors() {
    isolated(|| {
        let mut lan = Lan::new();
        let streams: Vec<TcpStream> =
            lan.client.run(|| [TO_LOCAL, TO_REMOTE].iter().map(|port| connect(*port).unwrap()).collect());
        for _ in 0..3 {
            streams.iter().for_each(|stream| exchange(stream, 100_000));
            // The agent dies, and for a while there is none.
            drop(lan.datapath.take());
            streams.iter().for_each(|stream| exchange(stream, 100_000));
            lan.client.run(|| exchange(&connect(TO_REMOTE).unwrap(), 1000));
            lan.start_agent();
        }
        streams.iter().for_each(|stream| exchange(stream, 100_000));
    });
}

/// Sends an echo request through a socket of the kernel's ping service and waits for the reply.
pub(crate) fn ping(to: SocketAddr, payload: &[u8]) -> std::io::Result<Vec<u8>> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
    fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")?;
    let (family, protocol, request, reply) = match to {
        SocketAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8, 0),
        SocketAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129),
    };
    let fd = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)?;
    // A datagram socket with a protocol of its own: the calls are the same.
    let socket = UdpSocket::from(fd);
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(to)?;
    socket.send(&[&[request, 0, 0, 0, 0, 0, 0, 1], payload].concat())?;
    let mut answer = vec![0; 2048];
    let len = socket.recv(&mut answer)?;
    assert_eq!((answer[0], answer[1], &answer[6..8]), (reply, 0, &[0, 1][..]), "an echo reply");
    Ok(answer[8..len].to_vec())
}

#[test]
fn a_service_address_answers_a_real_ping() {
    isolated(|| {
        let lan = Lan::new();
        lan.client.run(|| {
            for len in [0, 1, 56, 1472] {
                let payload = vec![len as u8; len];
                assert_eq!(ping((VIP, 1).into(), &payload).unwrap(), payload);
            }
        });
        assert_eq!(lan.datapath.as_ref().unwrap().maps().drops().unwrap(), []);
    });
}

/// Sends a lot both ways through narrow routes, and asserts that both senders learned it by ICMP.
fn assert_discovered(port: u16, narrow: &[&str]) {
    let lan = Lan::new();
    narrow.iter().for_each(|route| ip(route));
    lan.client.run(move || exchange(&connect(port).unwrap(), 1 << 20));
    let routes = command(&lan.client, "ip route get 10.0.0.100");
    assert!(routes.contains("mtu 1300"), "the client knows the way's MTU: {routes}");
}

#[test]
fn long_transfers_find_their_way_through_a_smaller_mtu() {
    isolated(|| assert_discovered(TO_REMOTE, &["route change 10.42.2.0/24 via 192.168.1.11 mtu lock 1300"]));
    // The stack reports it, about the translated packet.
    isolated(|| assert_discovered(TO_LOCAL, &["route change 10.42.1.0/24 dev pod0 src 10.42.1.1 mtu lock 1300"]));
}

#[test]
fn replies_find_their_way_through_a_smaller_mtu() {
    for port in [TO_LOCAL, TO_REMOTE] {
        isolated(move || {
            let lan = Lan::new();
            ip("route add 192.168.1.50/32 dev lan0 mtu lock 1300");
            lan.client.run(move || exchange(&connect(port).unwrap(), 1 << 20));
            let (host, line) = if port == TO_LOCAL {
                (&lan.pod, "ip route get 192.168.1.50")
            } else {
                (&lan.second, "ip route get 192.168.1.10")
            };
            let routes = command(host, line);
            assert!(routes.contains("mtu 1300"), "the backend knows the way's MTU: {routes}");
        });
    }
}

#[test]
fn a_router_behind_the_node_is_heard_by_the_client() {
    isolated(|| {
        let lan = Lan::new();
        // The second node becomes a router, with the backend behind a narrower link.
        let far = Host::new();
        let netns = far.netns.clone();
        lan.second.run(move || {
            ip("addr del 10.42.2.5/32 dev lo");
            ip(&format!("link add far0 mtu 1280 type veth peer name eth0 mtu 1280 netns {netns}"));
            ip("link set far0 up");
            ip("addr add 10.42.2.1/24 dev far0");
            forwarding(true);
        });
        far.ip(&["link set eth0 up", "addr add 10.42.2.5/24 dev eth0", "route add default via 10.42.2.1"]);
        far.run(|| echo((REMOTE_POD, 8080)));
        lan.client.run(|| {
            let socket = UdpSocket::bind((CLIENT, 0)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.connect((VIP, TO_REMOTE)).unwrap();
            // Linux sets "don't fragment" on datagrams by default.
            socket.send(&[1; 1400]).unwrap();
            let error = socket.recv(&mut [0; 2048]).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
            socket.send(&[2; 1200]).unwrap();
            assert_eq!(socket.recv(&mut [0; 2048]).unwrap(), 1200);
        });
        let routes = command(&lan.client, "ip route get 10.0.0.100");
        assert!(routes.contains("mtu 1280"), "the client knows the way's MTU: {routes}");
    });
}
