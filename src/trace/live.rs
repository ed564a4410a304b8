//! [`View`] of the maps and routing tables as they are now.

use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kinesin_abi::{
    AffinityKey, AffinityValue, Backend, BackendId, BackendState, DeviceValue, FlowKey, FlowValue, FrontendKey,
    FrontendValue, L2Key, PeerKey, PeerValue, SLOT_EMPTY, SetRef, Settings, SourceRangeKey, proto,
};
use kinesin_core::trace::{Attached, Hook, Hop, RouteQuery, View};
use tokio::runtime::Handle;

use super::TraceError;
use crate::datapath::{HookStatus, MapStore, bytes_of, from_bytes, maglev_ids};
use crate::net::rtnl::Neighbour;
use crate::net::{NetError, Rtnl, sysctl};

/// `SO_NETNS_COOKIE` (Linux 5.14).
const SO_NETNS_COOKIE: i32 = 71;

/// Who knows the Services' names: `namespace/name:port` of a frontend.
pub type Names = Box<dyn Fn(&FrontendKey) -> Option<String> + Send>;

/// The maps, the hooks, and a netlink socket.
pub struct Live {
    store: Arc<dyn MapStore>,
    hooks: Vec<HookStatus>,
    names: Option<Names>,
    rtnl: Rtnl,
    neighbours: Vec<Neighbour>,
    runtime: Handle,
}

impl Live {
    /// Looks at the network namespace of the calling thread, which must not be one of the runtime.
    ///
    /// # Errors
    /// The kernel has no netlink socket for us, or does not tell its neighbours.
    pub fn open(store: Arc<dyn MapStore>, hooks: Vec<HookStatus>, runtime: Handle) -> Result<Self, NetError> {
        let rtnl = {
            let _guard = runtime.enter();
            Rtnl::open()?
        };
        let neighbours = runtime.block_on(rtnl.neighbours())?;
        Ok(Self { store, hooks, names: None, rtnl, neighbours, runtime })
    }

    /// Also tells the Services' names.
    #[must_use]
    pub fn with_names(self, names: Names) -> Self {
        Self { names: Some(names), ..self }
    }

    fn get<K: aya::Pod, V: aya::Pod>(&self, table: &str, key: &K) -> Result<Option<V>, TraceError> {
        Ok(self.store.raw_get(table, bytes_of(key))?.and_then(|bytes| from_bytes(&bytes)))
    }

    /// The hook at a place, or of a program.
    fn hook(&self, fits: impl Fn(&HookStatus) -> bool, absent: &str) -> Attached {
        match self.hooks.iter().find(|hook| fits(hook)) {
            Some(HookStatus { attached: Some(how), .. }) => Attached::Yes(format!("{how:?}").to_lowercase()),
            Some(hook) => Attached::No(hook.error.clone().unwrap_or_else(|| absent.to_owned())),
            None => Attached::No(absent.to_owned()),
        }
    }
}

impl View for Live {
    type Error = TraceError;

    fn frontend(&self, key: &FrontendKey) -> Result<Option<FrontendValue>, TraceError> {
        self.get("frontends", key)
    }

    fn slots(&self, set: SetRef) -> Result<Vec<BackendId>, TraceError> {
        let slots = set.base..set.base.saturating_add(set.count);
        slots.map(|slot| Ok(self.get("slots", &slot)?.unwrap_or(SLOT_EMPTY))).collect()
    }

    fn backend(&self, id: BackendId) -> Result<Option<Backend>, TraceError> {
        if id == SLOT_EMPTY {
            return Ok(None);
        }
        let backend: Option<Backend> = self.get("backends", &id)?;
        Ok(backend.filter(|backend| backend.state != BackendState::Free as u8))
    }

    fn maglev(&self, base: u32) -> Result<Option<Arc<[BackendId]>>, TraceError> {
        Ok(self.store.raw_get("maglev", bytes_of(&base))?.map(|bytes| maglev_ids(&bytes)))
    }

    fn flow(&self, key: &FlowKey) -> Result<Option<FlowValue>, TraceError> {
        Ok(match self.get("flows", key)?.filter(|_| key.proto == proto::TCP) {
            None => self.get("transient", key)?,
            found => found,
        })
    }

    fn affinity(&self, key: &AffinityKey) -> Result<Option<AffinityValue>, TraceError> {
        self.get("affinity", key)
    }

    fn source_ranges(&self, service: u32) -> Result<Vec<SourceRangeKey>, TraceError> {
        let all = self.store.raw_entries("ranges")?;
        let keys = all.iter().filter_map(|(key, _)| from_bytes::<SourceRangeKey>(key));
        Ok(keys.filter(|key| key.range.service == service).collect())
    }

    fn announced(&self, key: &L2Key) -> Result<bool, TraceError> {
        Ok(self.store.raw_get("l2", bytes_of(key))?.is_some())
    }

    fn device(&self, ifindex: u32) -> Result<Option<DeviceValue>, TraceError> {
        self.get("devices", &ifindex)
    }

    fn peer(&self, key: &PeerKey) -> Result<Option<PeerValue>, TraceError> {
        self.get("peers", key)
    }

    fn settings(&self) -> Result<Settings, TraceError> {
        Ok(self.get("settings", &0u32)?.unwrap_or_default())
    }

    fn serves(&self, ifindex: u32) -> bool {
        let place = format!("{} ingress", self.device_name(ifindex));
        self.hooks.iter().any(|hook| hook.place == place)
    }

    fn attached(&self, hook: Hook) -> Result<Attached, TraceError> {
        let device = |ifindex, way: &str, v6: bool| {
            let place = format!("{} {way}", self.device_name(ifindex));
            let absent = if v6 {
                "the agent serves no IPv6 on this device (see the keys enable-ipv6 and devices)"
            } else {
                "the agent does not serve this device (see the key devices)"
            };
            self.hook(|hook| hook.place == place && hook.program.ends_with('6') == v6, absent)
        };
        Ok(match hook {
            Hook::Ingress { ifindex, v6 } => device(ifindex, "ingress", v6),
            Hook::Egress { ifindex, v6 } => device(ifindex, "egress", v6),
            Hook::Pod { v6 } => {
                let program = if v6 { "cil_from_container6" } else { "cil_from_container" };
                self.hook(|hook| hook.program == program, "packets of pods go by the host's stack")
            }
            Hook::Socket { v6 } => {
                let program = if v6 { "cil_sock6_connect" } else { "cil_sock4_connect" };
                self.hook(|hook| hook.program == program, "socket translation is off (see the key bpf-lb-sock)")
            }
        })
    }

    fn route(&self, query: &RouteQuery) -> Result<Result<Hop, String>, TraceError> {
        Ok(self.runtime.block_on(self.rtnl.way_to(query, &self.neighbours))?)
    }

    fn forwards(&self, ifindex: u32, v4: bool) -> Result<bool, TraceError> {
        let (family, name) = (if v4 { "ipv4" } else { "ipv6" }, self.device_name(ifindex));
        // A device without the family forwards nothing of it.
        Ok(sysctl::read(&format!("{family}/conf/{name}/forwarding")).is_ok_and(|value| value != "0"))
    }

    fn device_name(&self, ifindex: u32) -> String {
        let name = nix::net::if_::if_indextoname(ifindex);
        name.map_or_else(|_| format!("if{ifindex}"), |name| name.to_string_lossy().into_owned())
    }

    fn device_index(&self, name: &str) -> Option<u32> {
        nix::net::if_::if_nametoindex(name).ok()
    }

    fn host_netns(&self) -> Option<u64> {
        let socket = std::net::UdpSocket::bind((IpAddr::from([127, 0, 0, 1]), 0)).ok()?;
        let (mut cookie, mut len) = (0u64, size_of::<u64>() as libc::socklen_t);
        // SAFETY: both pointers are to live variables, and `len` is the size of the first.
        let code = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_NETNS_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut len,
            )
        };
        (code == 0).then_some(cookie)
    }

    fn now(&self) -> u64 {
        crate::clock::monotonic_nanos()
    }

    fn service_name(&self, key: &FrontendKey) -> Option<String> {
        self.names.as_ref().and_then(|names| names(key))
    }
}
