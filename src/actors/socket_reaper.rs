//! Ends sockets whose translated backend is gone, so that their owners connect anew.
//!
//! owns: the ending of sockets of this node and its pods, and their entries in the sockets table
//! hears: changed services, a (re)loaded data path, the clock
//! says: whether the kernel can end sockets
//! restart story: once the services are complete, looks at every translated socket; from then on at what changes end
//!
//! A change that ends nothing costs its Service's frontends and backends. One that does costs a list of the connected
//! sockets of each network namespace, by the kernel, per burst of changes.
//! Deliberately absent: sockets that our programs have not translated.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kinesin_abi::{Addr, Be16, SocketKey, proto};
use kinesin_core::services::{Compiled, ServiceKey};
use kinesin_core::sockets::{End, Gone};
use metrics::counter;

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label, Timer};
use crate::datapath::{MapError, MapStore};
use crate::net::Netns;
use crate::net::netns::NETNS_DIR;
use crate::net::sock_diag::{Connected, SockDiag};
use crate::table::Subscription;
use crate::world::World;

/// What the reaper hears.
pub enum SocketReaperMsg {
    /// Services changed, or the data path was loaded.
    Wake,
    /// Time to end sockets.
    Due,
}

impl Label for SocketReaperMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Wake => "Wake",
            Self::Due => "Due",
        }
    }
}

/// When sockets are ended after the change: soon, once the maps say so too, and again for those that connected in
/// between.
const AFTER: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(700)];

/// The actor.
pub struct SocketReaper {
    world: World,
    me: Address<SocketReaperMsg>,
    services: Subscription<ServiceKey, Compiled>,
    /// What each Service meant before its next change; shared with the table.
    seen: HashMap<ServiceKey, Arc<Compiled>>,
    /// All translated sockets have been looked at once.
    looked: bool,
    /// What is over and when it is due.
    pending: Vec<(Instant, Gone)>,
    due: Option<Timer>,
}

impl Actor for SocketReaper {
    type Msg = SocketReaperMsg;
    type Args = World;

    async fn start(world: World, me: Address<SocketReaperMsg>) -> Result<Self, Failure> {
        let wake = me.waker(|| SocketReaperMsg::Wake);
        let reaper = Self {
            services: world.compiled.subscribe(wake),
            seen: HashMap::new(),
            looked: false,
            pending: Vec::new(),
            due: None,
            me,
            world,
        };
        if reaper.world.config().services.socket_lb() {
            let able = tokio::task::spawn_blocking(|| SockDiag::open()?.can_destroy(proto::UDP)).await?;
            reaper.note(able.err().map(|error| reason(&error)).as_deref());
        }
        Ok(reaper)
    }

    async fn handle(&mut self, _: SocketReaperMsg) -> Result<(), Failure> {
        let complete = self.world.compiled.is_complete();
        let mut gone = Gone::default();
        for (key, new) in self.services.take() {
            let old = match &new {
                Some(new) => self.seen.insert(key, new.clone()),
                None => self.seen.remove(&key),
            };
            gone.merge(Gone::between(old.as_deref(), new.as_deref()));
        }
        if !self.world.config().services.socket_lb() {
            return Ok(());
        }
        let store = self.world.maps.get().map(|handle| handle.tables.store.clone());
        let Some(store) = store else { return Ok(()) };
        if complete && !self.looked {
            self.looked = true;
            let sockets = store.sockets()?;
            let ends = sockets
                .iter()
                .map(|(key, value)| (end(value.addr, value.port, key.proto), end(key.addr, key.port, key.proto)));
            gone.merge(Gone::among(ends, self.seen.values().map(|compiled| &**compiled)));
        }
        if !gone.is_empty() {
            let now = Instant::now();
            self.pending.extend(AFTER.map(|after| (now + after, gone.clone())));
        }
        self.reap(store).await?;
        let next = self.pending.iter().map(|(due, _)| *due).min();
        self.due =
            next.map(|next| self.me.cast_after(next.saturating_duration_since(Instant::now()), SocketReaperMsg::Due));
        Ok(())
    }
}

impl SocketReaper {
    /// Ends what is due.
    async fn reap(&mut self, store: Arc<dyn MapStore>) -> Result<(), Failure> {
        let now = Instant::now();
        let mut gone = Gone::default();
        for (_, due) in self.pending.extract_if(.., |(due, _)| *due <= now) {
            gone.merge(due);
        }
        let services = &self.world.config().services;
        let protocols: Vec<u8> = [proto::UDP, proto::TCP]
            .into_iter()
            .filter(|protocol| {
                gone.has_protocol(*protocol) && (*protocol == proto::UDP || services.terminate_all_protos)
            })
            .collect();
        if protocols.is_empty() {
            return Ok(());
        }
        let pods = services.terminates_pod_connections();
        let ended = tokio::task::spawn_blocking(move || {
            let mut ended = Ended::default();
            ended.here(&*store, &gone, &protocols)?;
            if pods {
                for namespace in namespaces() {
                    // One that is gone meanwhile has no sockets left to end.
                    let Ok(netns) = Netns::open(&namespace.to_string_lossy()) else { continue };
                    if let Ok(outcome) = netns.run(|| ended.here(&*store, &gone, &protocols)) {
                        outcome?;
                    }
                }
            }
            Ok::<_, MapError>(ended)
        })
        .await??;
        for (protocol, count) in &ended.count {
            let name = if *protocol == proto::UDP { "UDP" } else { "TCP" };
            counter!("kinesin_sockets_ended_total", "protocol" => name).increment(*count);
            tracing::info!(protocol = name, sockets = count, "sockets of removed backends ended");
        }
        if ended.error.is_some() || !ended.count.is_empty() {
            self.note(ended.error.as_deref());
        }
        Ok(())
    }

    fn note(&self, refused: Option<&str>) {
        let text = refused.map(|why| {
            format!(
                "sockets connected to removed backends are not ended, their owners must reconnect by themselves: {why}"
            )
        });
        self.world.problems.set("sockets", text.into_iter().collect());
    }
}

fn end(addr: Addr, port: Be16, protocol: u8) -> End {
    (IpAddr::from(addr), port.get(), protocol)
}

/// Why the kernel does not, and what helps.
fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "the kernel is built without CONFIG_INET_DIAG_DESTROY".into(),
        Some(libc::ENOENT) => "the kernel has no module udp_diag or tcp_diag".into(),
        Some(libc::EPERM) => "the agent lacks CAP_NET_ADMIN".into(),
        _ => error.to_string(),
    }
}

/// What was done.
#[derive(Default)]
struct Ended {
    /// Sockets, by IP protocol.
    count: BTreeMap<u8, u64>,
    error: Option<String>,
}

impl Ended {
    /// Ends sockets of the calling thread's network namespace.
    fn here(&mut self, store: &dyn MapStore, gone: &Gone, protocols: &[u8]) -> Result<(), MapError> {
        let diag = match SockDiag::open() {
            Ok(diag) => diag,
            Err(error) => {
                self.error = Some(reason(&error));
                return Ok(());
            }
        };
        for protocol in protocols {
            let sockets = match diag.connected(*protocol) {
                Ok(sockets) => sockets,
                Err(error) => {
                    self.error = Some(reason(&error));
                    continue;
                }
            };
            for socket in sockets {
                let backend = (socket.peer.ip(), socket.peer.port(), *protocol);
                if gone.concerns(&backend) {
                    self.one(store, &diag, gone, &socket, &backend)?;
                }
            }
        }
        Ok(())
    }

    fn one(
        &mut self,
        store: &dyn MapStore,
        diag: &SockDiag,
        gone: &Gone,
        socket: &Connected,
        backend: &End,
    ) -> Result<(), MapError> {
        let key = socket_key(socket.cookie, socket.peer, socket.protocol);
        // Whoever connected to the pod itself is not our concern.
        let Some(value) = store.socket(&key)? else { return Ok(()) };
        if !gone.includes(&end(value.addr, value.port, key.proto), backend) {
            return Ok(());
        }
        match diag.destroy(socket) {
            Ok(true) => *self.count.entry(socket.protocol).or_default() += 1,
            Ok(false) => {}
            Err(error) => {
                self.error = Some(reason(&error));
                return Ok(());
            }
        }
        store.forget_socket(&key)
    }
}

fn socket_key(cookie: u64, peer: SocketAddr, protocol: u8) -> SocketKey {
    SocketKey { cookie, addr: peer.ip().into(), port: Be16::new(peer.port()), proto: protocol, pad: [0; 5] }
}

/// Paths of all other network namespaces that can be seen: those of processes, and those with a name. Each once.
fn namespaces() -> Vec<PathBuf> {
    let identity = |path: &PathBuf| fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
    let own = identity(&PathBuf::from("/proc/thread-self/ns/net"));
    let below = |dir: &str| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let processes = below("/proc").filter(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()))
    });
    let candidates = below(NETNS_DIR).chain(processes.map(|process| process.join("ns/net")));
    let mut found = BTreeMap::new();
    for path in candidates {
        if let Some(identity) = identity(&path).filter(|identity| Some(*identity) != own) {
            found.entry(identity).or_insert(path);
        }
    }
    found.into_values().collect()
}
