//! The maps. Their names are part of the ABI; user space pins all of them and may set other capacities.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::lpm_trie::LpmTrie;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf};
use mesh_abi as abi;

// Hash tables without preallocation: they cost memory for what they hold, and only a table of buckets before.
#[map]
pub static SERVICES: HashMap<abi::ServiceKey, abi::Service> =
    HashMap::with_max_entries(32_768, BPF_F_NO_PREALLOC);
#[map]
pub static SLOTS: HashMap<abi::SlotKey, abi::Slot> =
    HashMap::with_max_entries(262_144, BPF_F_NO_PREALLOC);
#[map]
pub static MEMBERS: HashMap<abi::MemberKey, abi::Member> =
    HashMap::with_max_entries(262_144, BPF_F_NO_PREALLOC);
#[map]
pub static NODE_ADDRESSES: HashMap<abi::Address, u32> =
    HashMap::with_max_entries(16_384, BPF_F_NO_PREALLOC);
#[btf_map]
pub static PEERS: SkStorage<abi::Peer> = SkStorage::new();
#[map]
pub static REVERSE: LruHashMap<abi::ReverseKey, abi::Reverse> =
    LruHashMap::with_max_entries(16_384, 0);
#[map]
pub static STICKY: LruHashMap<abi::StickyKey, abi::Sticky> =
    LruHashMap::with_max_entries(16_384, 0);
#[map]
pub static AFFINITY: LruHashMap<abi::AffinityKey, abi::AffinityValue> =
    LruHashMap::with_max_entries(16_384, 0);

#[map]
pub static LOCAL_PODS: HashMap<abi::Address, abi::LocalPod> =
    HashMap::with_max_entries(4_096, BPF_F_NO_PREALLOC);
#[map]
pub static POD_PORTS: HashMap<u32, abi::PodPort> =
    HashMap::with_max_entries(4_096, BPF_F_NO_PREALLOC);
#[map]
pub static REMOTE_BLOCKS: LpmTrie<abi::Address, abi::RemoteBlock> =
    LpmTrie::with_max_entries(4_096, BPF_F_NO_PREALLOC);
#[map]
pub static NODE: Array<abi::NodeConfig> = Array::with_max_entries(1, 0);
#[map]
pub static COUNTERS: PerCpuArray<abi::Counter> =
    PerCpuArray::with_max_entries(abi::Reason::COUNT, 0);

/// Some 7,700 events: a reader that comes 10 ms after it was woken loses none up to 570,000 in a second.
#[map]
pub static FLOWS: RingBuf = RingBuf::with_byte_size(abi::flow::RING_BYTES, 0);
#[map]
pub static FLOW_CONFIG: Array<abi::FlowConfig> = Array::with_max_entries(1, 0);
#[map]
pub static FLOW_COUNTERS: PerCpuArray<u64> =
    PerCpuArray::with_max_entries(abi::FlowCounter::COUNT, 0);
#[map]
pub static FLOW_LIMITS: LruHashMap<abi::FlowLimitKey, abi::FlowLimit> =
    LruHashMap::with_max_entries(4_096, 0);
#[map]
pub static FLOW_SLOTS: Array<abi::FlowSlot> = Array::with_max_entries(abi::FlowSlot::COUNT, 0);
#[btf_map]
pub static FLOW_SOCKETS: SkStorage<abi::FlowSocket> = SkStorage::new();
#[map]
pub static DATAGRAMS: LruHashMap<abi::DatagramKey, u64> = LruHashMap::with_max_entries(16_384, 0);
#[map]
pub static NAMESPACES: HashMap<u64, u32> = HashMap::with_max_entries(4_096, BPF_F_NO_PREALLOC);
#[map]
pub static EDGE_SERVICES: HashMap<abi::ServiceKey, abi::EdgeService> =
    HashMap::with_max_entries(32_768, BPF_F_NO_PREALLOC);
#[map]
pub static EDGE_TABLES: HashMap<u32, abi::EdgeTable> =
    HashMap::with_max_entries(32_768, BPF_F_NO_PREALLOC);
#[map]
pub static EDGE_BACKENDS: HashMap<abi::EdgeBackendKey, abi::EdgeBackend> =
    HashMap::with_max_entries(262_144, BPF_F_NO_PREALLOC);
#[map]
pub static EDGE_SOURCES: LpmTrie<abi::EdgeSource, u32> =
    LpmTrie::with_max_entries(16_384, BPF_F_NO_PREALLOC);
#[map]
pub static EDGE_FLOWS: LruHashMap<abi::FlowKey, abi::Flow> =
    LruHashMap::with_max_entries(131_072, 0);
#[map]
pub static EDGE_FRAGMENTS: LruHashMap<abi::FragmentKey, abi::Fragment> =
    LruHashMap::with_max_entries(8_192, 0);
#[map]
pub static EDGE_NODES: HashMap<abi::Address, abi::EdgeNode> =
    HashMap::with_max_entries(4_096, BPF_F_NO_PREALLOC);
#[map]
pub static EDGE_CONFIG: Array<abi::EdgeConfig> = Array::with_max_entries(1, 0);
#[map]
pub static EDGE_UPLINKS: HashMap<u32, abi::EdgeUplink> =
    HashMap::with_max_entries(64, BPF_F_NO_PREALLOC);
#[map]
pub static EDGE_OWNED: HashMap<abi::Address, u32> =
    HashMap::with_max_entries(16_384, BPF_F_NO_PREALLOC);
#[map]
pub static EDGE_ADDRESSES: HashMap<abi::Address, u32> =
    HashMap::with_max_entries(256, BPF_F_NO_PREALLOC);
/// Not pinned: it holds nothing between two packets.
#[map]
pub static EDGE_SCRATCH: PerCpuArray<crate::edge::Scratch> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static EDGE_COUNTERS: PerCpuArray<abi::Counter> =
    PerCpuArray::with_max_entries(abi::EdgeReason::COUNT, 0);
#[map]
pub static POLICY_STATE: Array<abi::PolicyState> = Array::with_max_entries(1, 0);
#[map]
pub static POD_POLICIES: HashMap<u32, abi::PodPolicy> =
    HashMap::with_max_entries(4_096, BPF_F_NO_PREALLOC);
#[map]
pub static IDENTITIES: HashMap<abi::Address, u32> =
    HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);
#[map]
pub static POLICY_BLOCKS: LpmTrie<abi::Address, u32> =
    LpmTrie::with_max_entries(65_536, BPF_F_NO_PREALLOC);
#[map]
pub static POLICY_RULES: LpmTrie<abi::RuleMatch, abi::PolicyRule> =
    LpmTrie::with_max_entries(262_144, BPF_F_NO_PREALLOC);
#[map]
pub static CONNECTIONS: LruHashMap<abi::ConnectionKey, abi::Connection> =
    LruHashMap::with_max_entries(65_536, 0);
#[map]
pub static BEGINNINGS: LruHashMap<abi::ConnectionKey, abi::Connection> =
    LruHashMap::with_max_entries(32_768, 0);
#[map]
pub static FRAGMENTS: LruHashMap<abi::PieceKey, u32> = LruHashMap::with_max_entries(1_024, 0);
// Not part of the ABI: nobody else looks at these.
/// What policies have allowed lately, and under which generation of the tables: most of what begins is like something before it.
#[map]
pub static ALLOWED: LruHashMap<crate::policy::Question, crate::policy::Permission> =
    LruHashMap::with_max_entries(8_192, 0);
#[map]
pub static SCRATCH: PerCpuArray<crate::connection::Scratch> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static HOST_PORTS: HashMap<abi::HostPort, u32> =
    HashMap::with_max_entries(256, BPF_F_NO_PREALLOC);
#[map]
pub static TRACE: Array<abi::TraceState> = Array::with_max_entries(1, 0);
#[map]
pub static TRACES: HashMap<abi::TraceKey, u32> = HashMap::with_max_entries(256, BPF_F_NO_PREALLOC);
/// Some 540 events; a probe makes a dozen on each node.
#[map]
pub static TRACE_EVENTS: RingBuf = RingBuf::with_byte_size(1 << 16, 0);
