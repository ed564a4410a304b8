//! The host on the LAN that is no node: what it knows, what it gets, what it hears.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};

use super::report::{Backend, LoadEvent, Totals};
use super::{CLIENT_ADDRESS, LabError, programs};
use crate::net::arp::ArpSocket;
use crate::net::proc::Process;
use crate::net::rtnl::Neighbour;
use crate::net::{Netns, Rtnl};

/// How long a single request of `get` may take.
pub(super) const GET_LIMIT: Duration = Duration::from_secs(5);

/// The LAN client.
#[derive(Debug, Clone)]
pub struct Client {
    netns: Netns,
    cgroup: PathBuf,
    binary: PathBuf,
    logs: PathBuf,
}

/// An HTTP answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The body as text.
    pub body: String,
    /// Who answered, when it was a pod of the lab.
    pub backend: Option<Backend>,
}

impl Client {
    pub(super) fn new(netns: Netns, cgroup: PathBuf, binary: PathBuf, logs: PathBuf) -> Self {
        Self { netns, cgroup, binary, logs }
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its cgroup, in which no agent's programs are.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        CLIENT_ADDRESS
    }

    /// Runs a program on the client; it dies with the handle.
    ///
    /// # Errors
    /// When it can not be started.
    pub fn spawn(&self, name: &str, command: Command) -> Result<Process, LabError> {
        let log = self.logs.join(format!("client-{name}.log"));
        let prepared = Process::command(format!("{name} on the client"), command).netns(&self.netns);
        Ok(prepared.cgroup(&self.cgroup).log(&log).start()?)
    }

    /// The neighbour table, IPv4 and IPv6.
    ///
    /// # Errors
    /// When the dump fails.
    pub async fn arp_table(&self) -> Result<Vec<Neighbour>, LabError> {
        Ok(Rtnl::open_in(&self.netns)?.neighbours().await?)
    }

    /// The MAC that the neighbour table has for an address.
    ///
    /// # Errors
    /// When the dump fails.
    pub async fn mac_of(&self, address: IpAddr) -> Result<Option<[u8; 6]>, LabError> {
        let table = self.arp_table().await?;
        Ok(table.into_iter().find(|entry| entry.address == address).and_then(|entry| entry.mac))
    }

    /// One request on a connection of its own, at most five seconds. The URL is `http://<address>[:port][/path]`.
    ///
    /// # Errors
    /// When there is no complete answer.
    pub async fn get(&self, url: &str) -> Result<Response, LabError> {
        get_from(&self.netns, url, GET_LIMIT).await
    }

    /// Broadcasts one ARP request and returns every distinct MAC that answers within `bound`, first come first. Waits for the whole
    /// bound.
    ///
    /// # Errors
    /// When the client's link is down.
    pub async fn arp_probe_within(&self, address: Ipv4Addr, bound: Duration) -> Result<Vec<[u8; 6]>, LabError> {
        let eth0 = Rtnl::open_in(&self.netns)?.device("eth0").await?;
        let socket = self.netns.run(|| ArpSocket::open(eth0.ifindex))??;
        let from = (eth0.mac.expect("invariant: a veth has a MAC"), CLIENT_ADDRESS);
        let asked = tokio::task::spawn_blocking(move || socket.who_has(address, from, bound)).await;
        Ok(asked.map_err(|e| LabError::Program(format!("the ARP probe ended early: {e}")))??)
    }

    /// [`Self::arp_probe_within`] 300 ms, which is ample on a LAN of veths.
    ///
    /// # Errors
    /// When the client's link is down.
    pub async fn arp_probe(&self, address: Ipv4Addr) -> Result<Vec<[u8; 6]>, LabError> {
        self.arp_probe_within(address, Duration::from_millis(300)).await
    }

    /// Starts the load program.
    ///
    /// # Errors
    /// When it can not be started.
    pub fn load(&self, options: &programs::ClientOptions) -> Result<LoadHandle, LabError> {
        LoadHandle::start(&self.binary, &self.netns, &self.cgroup, &self.logs.join("client-load.log"), options)
    }
}

/// A TCP connection from inside a namespace, usable everywhere.
pub(crate) async fn connect(netns: &Netns, to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let socket = netns
        .run(|| if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() })
        .map_err(io::Error::other)??;
    tokio::time::timeout(limit, socket.connect(to)).await?
}

/// One HTTP request from inside a namespace; for pods and nodes too.
///
/// # Errors
/// When there is no complete answer within `limit`.
pub async fn get_from(netns: &Netns, url: &str, limit: Duration) -> Result<Response, LabError> {
    let (to, path) = programs::parse_url(url).map_err(LabError::Invalid)?;
    let work = async {
        let stream = connect(netns, to, limit).await.map_err(|e| e.to_string())?;
        request(stream, to, &path).await.map_err(|e| e.to_string())
    };
    let failed = |e: String| LabError::Program(format!("get {url} from {}: {e}", netns.name()));
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err("no answer in time".into())).map_err(failed)
}

/// One request on a fresh connection, which ends with the answer.
pub(super) async fn request(stream: TcpStream, to: SocketAddr, path: &str) -> Result<Response, hyper::Error> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = hyper::Request::get(path)
        .header(hyper::header::HOST, to.to_string())
        // The server closes first, so that it and not the client keeps the port in TIME-WAIT.
        .header(hyper::header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .expect("invariant: the path was parsed as a URI before");
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let body = String::from_utf8_lossy(&response.into_body().collect().await?.to_bytes()).into_owned();
        let backend = body.parse().ok();
        Ok(Response { status, body, backend })
    };
    tokio::pin!(answer);
    let mut connection = std::pin::pin!(connection);
    let mut open = true;
    loop {
        tokio::select! {
            result = &mut answer => return result,
            // An error of the connection reaches the request too, with more to say about it.
            _ = &mut connection, if open => open = false,
        }
    }
}

/// A running load program.
#[derive(Debug)]
pub struct LoadHandle {
    process: Process,
    totals: watch::Receiver<Totals>,
    events: mpsc::UnboundedReceiver<LoadEvent>,
}

impl LoadHandle {
    pub(super) fn start(
        binary: &Path,
        netns: &Netns,
        cgroup: &Path,
        log: &Path,
        options: &programs::ClientOptions,
    ) -> Result<Self, LabError> {
        let mut command = Command::new(binary);
        command.arg(programs::CLIENT).args(options.to_args());
        let prepared = Process::command("the load client", command).netns(netns).cgroup(cgroup).log(log);
        let process = prepared.piped_stdout().start()?;
        let stdout = process.take_stdout().ok_or_else(|| LabError::Program("the load client has no output".into()))?;
        let (publish, totals) = watch::channel(Totals::default());
        #[allow(
            clippy::disallowed_methods,
            reason = "one run's own output; a reader that is late must not stop the totals"
        )]
        let (send, events) = mpsc::unbounded_channel();
        // A thread, because this is a blocking pipe; it ends with the process.
        std::thread::spawn(move || {
            use std::io::BufRead;
            for line in io::BufReader::new(stdout).lines().map_while(Result::ok) {
                let Ok(event) = serde_json::from_str::<LoadEvent>(&line) else {
                    tracing::warn!(line, "the load client said something unknown");
                    continue;
                };
                if let LoadEvent::Tick(totals) | LoadEvent::Summary(totals) = &event {
                    publish.send_replace(totals.clone());
                }
                let _ = send.send(event);
            }
        });
        Ok(Self { process, totals, events })
    }

    /// The process, for its pid and log.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// The latest totals; they are never more than the report interval old.
    pub fn totals(&self) -> Totals {
        self.totals.borrow().clone()
    }

    /// Waits until the totals satisfy a condition, at most `limit`.
    ///
    /// # Errors
    /// When they do not; the error has the last totals and words.
    pub async fn wait_for(
        &self,
        what: &str,
        limit: Duration,
        condition: impl Fn(&Totals) -> bool,
    ) -> Result<Totals, LabError> {
        let mut totals = self.totals.clone();
        let outcome = tokio::time::timeout(limit, totals.wait_for(|t| condition(t))).await;
        match outcome {
            Ok(Ok(totals)) => Ok(totals.clone()),
            _ => Err(LabError::Program(format!(
                "no {what} within {limit:?}: {:?}; {}",
                self.totals(),
                self.process.report()
            ))),
        }
    }

    /// The next event; `None` when the program has ended and all were read.
    pub async fn next_event(&mut self) -> Option<LoadEvent> {
        self.events.recv().await
    }

    /// Waits for the summary of a run with a duration.
    ///
    /// # Errors
    /// When the program ends without one or does not end within `limit`.
    pub async fn summary(mut self, limit: Duration) -> Result<Totals, LabError> {
        let work = async {
            while let Some(event) = self.events.recv().await {
                if let LoadEvent::Summary(totals) = event {
                    return Some(totals);
                }
            }
            None
        };
        let found = tokio::time::timeout(limit, work).await.ok().flatten();
        found.ok_or_else(|| LabError::Program(format!("no summary of the load: {}", self.process.report())))
    }

    /// Ends it with SIGTERM and returns its summary: nothing is in flight any more.
    ///
    /// # Errors
    /// When it gives none within ten seconds.
    pub async fn stop(self) -> Result<Totals, LabError> {
        self.process.signal(nix::sys::signal::Signal::SIGTERM);
        self.summary(Duration::from_secs(10)).await
    }
}
