//! The maps. Their sizes here are defaults; the loader sets them from the configuration.

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, bpf_fib_lookup},
    btf_maps::{Array, ArrayOfMaps, HashMap, HashOfMaps, LpmTrie, LruHashMap, PerCpuArray},
    macros::btf_map,
};
use kinesin_abi::{
    AffinityKey, AffinityValue, Backend, BackendId, DROP_SLOTS, DeviceValue, DropCounter, FLOW_COUNTS, FlowKey,
    FlowValue, FragmentKey, FragmentValue, FrontendKey, FrontendValue, L2Key, L2Value, MaglevTable, PeerKey, PeerValue,
    Settings, SocketKey, SocketValue, SourceRange,
};

use crate::{
    packet::Packet,
    ways::{WAYS_KEPT, Way},
};

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// Where clients connect to.
#[btf_map]
pub static FRONTENDS: HashMap<FrontendKey, FrontendValue, 65536, NO_PREALLOC> = HashMap::new();

/// Members of backend sets.
#[btf_map]
pub static SLOTS: Array<BackendId, 262144> = Array::new();

/// Backends by id.
#[btf_map]
pub static BACKENDS: Array<Backend, 65536> = Array::new();

/// Maglev tables by the base of their set.
#[btf_map]
pub static MAGLEV: HashOfMaps<u32, Array<MaglevTable, 1>, 65536, NO_PREALLOC> = HashOfMaps::new();

/// Established TCP connections, and a share of those that begin: what the tuple of a packet becomes. Nothing in here is
/// forgotten to make room.
#[btf_map]
pub static FLOWS: HashMap<FlowKey, FlowValue, 131072, NO_PREALLOC> = HashMap::new();

/// All other flows: of UDP, and of TCP connections that are not established yet or found no room among those that are. The
/// oldest make room for new ones.
#[btf_map]
pub static TRANSIENT: LruHashMap<FlowKey, FlowValue, 65536> = LruHashMap::new();

/// The two tables above as they were, while tables of another size take their place. Not pinned. (Maps of any size fit
/// since Linux 5.10.)
#[btf_map]
pub static FLOWS_OLD: ArrayOfMaps<HashMap<FlowKey, FlowValue, 1024, NO_PREALLOC>, 1> = ArrayOfMaps::new();
#[btf_map]
pub static TRANSIENT_OLD: ArrayOfMaps<LruHashMap<FlowKey, FlowValue, 1024>, 1> = ArrayOfMaps::new();

/// What happens to connections.
#[btf_map]
pub static COUNTS: PerCpuArray<u64, { FLOW_COUNTS as usize }> = PerCpuArray::new();

/// The flow of the packet at hand; see `flows`. Private to the programs: not pinned, not dumped.
#[btf_map]
pub static FLOW: PerCpuArray<FlowValue, 1> = PerCpuArray::new();

/// Packets in fragments: the ports, which only the first one has.
#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentValue, 8192> = LruHashMap::new();

/// Translated sockets: what the application asked for.
#[btf_map]
pub static SOCKETS: LruHashMap<SocketKey, SocketValue, 65536> = LruHashMap::new();

/// Which backend a client was given, of services with session affinity.
#[btf_map]
pub static AFFINITY: LruHashMap<AffinityKey, AffinityValue, 65536> = LruHashMap::new();

/// Networks whose clients a service serves, or does not.
#[btf_map]
pub static RANGES: LpmTrie<SourceRange, u32, 65536> = LpmTrie::new();

/// Addresses answered for on the LAN.
#[btf_map]
pub static L2: HashMap<L2Key, L2Value, 4096, NO_PREALLOC> = HashMap::new();

/// Devices by index.
#[btf_map]
pub static DEVICES: HashMap<u32, DeviceValue, 4096, NO_PREALLOC> = HashMap::new();

/// Nodes that packets are handed on to, and whom they come from.
#[btf_map]
pub static PEERS: HashMap<PeerKey, PeerValue, 8192, NO_PREALLOC> = HashMap::new();

/// What the agent tells the programs.
#[btf_map]
pub static SETTINGS: Array<Settings, 1> = Array::new();

/// The packet at hand; see `packet`. Private to the programs: not pinned, not dumped.
#[btf_map]
pub static PACKET: PerCpuArray<Packet, 1> = PerCpuArray::new();

/// The question to the routing tables at hand, and its answer: too large for stacks that are rounded up per call. Private
/// to the programs.
#[btf_map]
pub static ROUTE: PerCpuArray<bpf_fib_lookup, 1> = PerCpuArray::new();

/// What the routing tables have said within the last moments; see `ways`. Private to the programs.
#[btf_map]
pub static WAYS: PerCpuArray<Way, { WAYS_KEPT as usize }> = PerCpuArray::new();

/// Until when, in nanoseconds, this CPU's errors are spent; see `lookup::may_complain`. Private to the programs.
#[btf_map]
pub static COMPLAINTS: PerCpuArray<u64, 1> = PerCpuArray::new();

/// Packets dropped by reason, and forwarded.
#[btf_map]
pub static DROPS: PerCpuArray<DropCounter, { DROP_SLOTS as usize }> = PerCpuArray::new();
