//! The maps. Their names are part of the ABI; user space pins all of them and may set other capacities.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::lpm_trie::LpmTrie;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray};
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
