//! Load through a VIP over the same load on the pod itself: short turns of each, one after the other, so that whatever
//! else the machine does meets both.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use kinesin::lab::{Client, Pod};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::report::{interval, line, median, quantile};

/// The kernel's `TCP_TIMEWAIT_LEN`: ports that come again before it has passed are refused now and then (PAWS), each time for
/// a second, whoever balances.
pub(crate) const TIME_WAIT: Duration = Duration::from_secs(60);

/// Where a pod swallows bytes over TCP, and datagrams over UDP.
pub(crate) const SINK_PORT: u16 = 5_001;

const TURN: Duration = Duration::from_millis(500);
pub(crate) const TURNS: usize = 15;
pub(crate) const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// Both of Linux' own range, as clients have them. Apart from each other, so that no balancer meets the same two ends once
/// translated and once not.
pub(crate) const PORTS_THROUGH: &str = "32768 46999";
const PORTS_DIRECT: &str = "47000 60999";
const CONNECTIONS: usize = 8;
/// No answer for so long is a connection that does not work; on a busy machine, a server has not run for seconds.
const STUCK: Duration = Duration::from_secs(20);
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n";
const LAST_REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n";
/// With the headers of UDP, IPv4 and Ethernet, and the check sequence that no veth carries, 64 bytes.
const DATAGRAM: usize = 18;

/// Keeps a process (0: this thread) on one core: servers and client side by side on two, or each turn measures where the
/// scheduler happened to put them. On a machine with one core nothing is to be chosen.
pub(crate) fn pin(pid: Pid, core: usize) -> anyhow::Result<()> {
    if std::thread::available_parallelism()?.get() > 1 {
        let mut cores = CpuSet::new();
        cores.set(core)?;
        sched_setaffinity(pid, &cores)?;
    }
    Ok(())
}

/// One kind of load for some time; how much of it arrived.
pub(crate) type Load<'a> = &'a (dyn Fn(SocketAddr, Duration) -> anyhow::Result<u64> + Sync);

/// The median of the ratios of neighbouring turns, and between what it is with a certainty of 95 %.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ratio {
    pub(crate) median: f64,
    pub(crate) between: (f64, f64),
}

/// Turns of `through` and `direct`; prints and returns the ratio of neighbouring turns.
pub(crate) fn compare(
    client: &Client,
    what: &str,
    (through, direct): (SocketAddr, SocketAddr),
    load: Load<'_>,
    turns: usize,
) -> anyhow::Result<Ratio> {
    let turn = |to| -> anyhow::Result<f64> {
        let ports = if to == through { PORTS_THROUGH } else { PORTS_DIRECT };
        let load = || -> anyhow::Result<u64> {
            std::fs::write(PORT_RANGE, ports)?;
            pin(Pid::from_raw(0), 0)?;
            load(to, TURN)
        };
        let done = client.netns().run(load)?.with_context(|| format!("load on {to}"))?;
        Ok(done as f64 / TURN.as_secs_f64())
    };
    turn(through)?;
    turn(direct)?;
    let (mut ratios, mut rates) = (Vec::new(), Vec::new());
    for number in 0..turns {
        // Whoever comes second may profit or suffer from it: take turns in that, too.
        let (vip, pod) = if number % 2 == 0 {
            let vip = turn(through)?;
            (vip, turn(direct)?)
        } else {
            let pod = turn(direct)?;
            (turn(through)?, pod)
        };
        ratios.push(vip / pod);
        rates.push(pod);
    }
    let ratio = Ratio { median: median(&ratios), between: interval(&ratios) };
    let figures = [
        ("ratio", format!("{:.3}", ratio.median)),
        ("95 %", format!("{:.3} to {:.3}", ratio.between.0, ratio.between.1)),
        ("quartiles", format!("{:.2} to {:.2}", quantile(&ratios, 0.25), quantile(&ratios, 0.75))),
        ("the pod itself", format!("{:.0}/s", median(&rates))),
    ];
    line(what, &figures);
    Ok(ratio)
}

/// Several connections, each with one request under way; one thread, so that the servers have the other core.
pub(crate) fn keep_alive(to: SocketAddr, time: Duration) -> anyhow::Result<u64> {
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        connections.push(connect(to)?);
    }
    let begun = Instant::now();
    let mut done = 0;
    let mut buffer = [0; 4096];
    while begun.elapsed() < time {
        for connection in &mut connections {
            connection.write_all(REQUEST)?;
        }
        for connection in &mut connections {
            read_answer(connection, &mut buffer)?;
            done += 1;
        }
    }
    Ok(done)
}

/// One connection per request, closed by the server, one after the other.
pub(crate) fn new_connections(to: SocketAddr, time: Duration) -> anyhow::Result<u64> {
    let begun = Instant::now();
    let mut done = 0;
    let mut buffer = [0; 4096];
    while begun.elapsed() < time {
        let mut connection = connect(to)?;
        connection.write_all(LAST_REQUEST)?;
        read_answer(&mut connection, &mut buffer)?;
        while connection.read(&mut buffer)? > 0 {}
        done += 1;
    }
    Ok(done)
}

fn connect(to: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, STUCK)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STUCK))?;
    Ok(stream)
}

/// Reads one whole answer: the head, and as many bytes as it says.
fn read_answer(stream: &mut TcpStream, buffer: &mut [u8]) -> anyhow::Result<()> {
    let mut filled = 0;
    loop {
        let read = stream.read(&mut buffer[filled..])?;
        if read == 0 {
            bail!("the connection ended in the middle of an answer");
        }
        filled += read;
        let text = &buffer[..filled];
        let Some(head) = text.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { continue };
        let head_text = String::from_utf8_lossy(&text[..head]).to_ascii_lowercase();
        ensure!(head_text.starts_with("http/1.1 200"), "{head_text}");
        let length =
            head_text.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next()?.parse().ok());
        let length: usize = length.context("the answer has no length")?;
        if filled >= head + 4 + length {
            return Ok(());
        }
    }
}

/// Threads in a pod that take whatever comes, and count it. They end with it.
pub(crate) struct Sink {
    bytes: Arc<AtomicU64>,
    datagrams: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
}

/// How long a thread looks for the next datagram before it sleeps.
const AWAKE: Duration = Duration::from_millis(1);
/// How long a thread waits for something to come before it looks whether it is still wanted.
const PATIENCE: Duration = Duration::from_millis(200);

impl Sink {
    pub(crate) fn start(pod: &Pod) -> anyhow::Result<Self> {
        let sink = Self { bytes: Arc::default(), datagrams: Arc::default(), over: Arc::default() };
        let address = (Ipv4Addr::UNSPECIFIED, SINK_PORT);
        let (listener, socket) =
            pod.netns().run(move || anyhow::Ok((TcpListener::bind(address)?, UdpSocket::bind(address)?)))??;
        // A socket stays in the namespace that it was made in.
        let (bytes, over) = (sink.bytes.clone(), sink.over.clone());
        std::thread::spawn(move || swallow_stream(&listener, &bytes, &over));
        let (datagrams, over) = (sink.datagrams.clone(), sink.over.clone());
        std::thread::spawn(move || swallow_datagrams(&socket, &datagrams, &over));
        Ok(sink)
    }

    /// Bytes over one connection, as many as fit.
    pub(crate) fn throughput(&self, to: SocketAddr, time: Duration) -> anyhow::Result<u64> {
        let mut stream = connect(to)?;
        stream.set_write_timeout(Some(STUCK))?;
        let before = self.bytes.load(Ordering::Relaxed);
        let begun = Instant::now();
        let block = vec![0; 128 << 10];
        while begun.elapsed() < time {
            stream.write_all(&block)?;
        }
        Ok(self.bytes.load(Ordering::Relaxed) - before)
    }

    /// Datagrams that make frames of 64 bytes, as many as the client can send; how many arrive counts.
    pub(crate) fn datagrams(&self, to: SocketAddr, time: Duration) -> anyhow::Result<u64> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(to)?;
        let before = self.datagrams.load(Ordering::Relaxed);
        let begun = Instant::now();
        while begun.elapsed() < time {
            for _ in 0..64 {
                socket.send(&[0; DATAGRAM])?;
            }
        }
        Ok(self.datagrams.load(Ordering::Relaxed) - before)
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

fn swallow_stream(listener: &TcpListener, bytes: &AtomicU64, over: &AtomicBool) -> anyhow::Result<()> {
    pin(Pid::from_raw(0), 1)?;
    listener.set_nonblocking(true)?;
    let mut buffer = vec![0; 256 << 10];
    while !over.load(Ordering::Relaxed) {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                crate::cluster::pause(Duration::from_millis(1));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(STUCK))?;
        while let Ok(read @ 1..) = stream.read(&mut buffer) {
            bytes.fetch_add(read as u64, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// As a server under load does, it does not sleep between two datagrams: to wake it took longer than any balancer, and the
/// slower they came, the more often it was needed.
fn swallow_datagrams(socket: &UdpSocket, datagrams: &AtomicU64, over: &AtomicBool) -> anyhow::Result<()> {
    pin(Pid::from_raw(0), 1)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut buffer = [0; 64];
    let mut last = None;
    while !over.load(Ordering::Relaxed) {
        if socket.recv(&mut buffer).is_ok() {
            datagrams.fetch_add(1, Ordering::Relaxed);
            if last.replace(Instant::now()).is_none() {
                socket.set_nonblocking(true)?;
            }
        } else if last.is_some_and(|last| last.elapsed() > AWAKE) {
            socket.set_nonblocking(false)?;
            last = None;
        }
    }
    Ok(())
}
