#include "src/kernels/cpu/topology.h"

#include <hwloc.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "src/base/check.h"
#include "src/base/control_group.h"
#include "src/base/log.h"

namespace tandem::kernels::cpu {
namespace {

void check_done(int result, const char* call) {
  if (result < 0) fail_check(__FILE__, __LINE__, fmt::format("{} failed", call));
}

}  // namespace

const Topology& Topology::of_this_machine() {
  static const Topology topology;
  return topology;
}

Topology::Topology() {
  check_done(hwloc_topology_init(&topology_), "hwloc_topology_init");
  check_done(hwloc_topology_load(topology_), "hwloc_topology_load");
  const hwloc_bitmap_t allowed = hwloc_bitmap_alloc();
  if (hwloc_get_cpubind(topology_, allowed, HWLOC_CPUBIND_PROCESS) != 0 ||
      hwloc_topology_restrict(topology_, allowed, 0) != 0) {
    log_warning("kernels", "this process's affinity mask is unknown, all processors count: {}", std::strerror(errno));
  }
  hwloc_bitmap_free(allowed);
  find_nodes();
}

Topology::Topology(const std::string& description, const std::string& allowed) {
  check_done(hwloc_topology_init(&topology_), "hwloc_topology_init");
  check_done(hwloc_topology_set_synthetic(topology_, description.c_str()), "hwloc_topology_set_synthetic");
  check_done(hwloc_topology_load(topology_), "hwloc_topology_load");
  if (!allowed.empty()) {
    const hwloc_bitmap_t set = hwloc_bitmap_alloc();
    check_done(hwloc_bitmap_list_sscanf(set, allowed.c_str()), "hwloc_bitmap_list_sscanf");
    check_done(hwloc_topology_restrict(topology_, set, 0), "hwloc_topology_restrict");
    hwloc_bitmap_free(set);
  }
  find_nodes();
}

Topology::~Topology() { hwloc_topology_destroy(topology_); }

void Topology::find_nodes() {
  for (hwloc_obj_t node = nullptr;
       (node = hwloc_get_next_obj_by_type(topology_, HWLOC_OBJ_NUMANODE, node)) != nullptr;) {
    if (node->cpuset == nullptr || hwloc_bitmap_iszero(node->cpuset) != 0) continue;  // memory without processors
    int cores = hwloc_get_nbobjs_inside_cpuset_by_type(topology_, node->cpuset, HWLOC_OBJ_CORE);
    if (cores <= 0) cores = hwloc_bitmap_weight(node->cpuset);  // a machine that does not tell
    nodes_.push_back(Node{node, cores});
  }
  CHECK_GT(nodes_.size(), 0U);
}

int Topology::num_cores() const {
  int cores = 0;
  for (const Node& node : nodes_) cores += node.cores;
  return cores;
}

std::vector<int> Topology::place_threads(int threads) const {
  std::vector<std::pair<int, int>> cores;  // (place in its node, node)
  for (int node = 0; node < num_nodes(); ++node) {
    for (int core = 0; core < nodes_[static_cast<size_t>(node)].cores; ++core) cores.emplace_back(core, node);
  }
  std::sort(cores.begin(), cores.end());
  std::vector<int> places;
  for (size_t thread = 0; std::ssize(places) < threads; ++thread) places.push_back(cores[thread % cores.size()].second);
  return places;
}

void Topology::bind_this_thread(int node) const {
  if (num_nodes() == 1) return;
  CHECK_LT(node, num_nodes());
  if (hwloc_set_cpubind(topology_, nodes_[static_cast<size_t>(node)].object->cpuset, HWLOC_CPUBIND_THREAD) != 0) {
    log_warning("kernels", "a compute thread could not be kept on NUMA node {}: {}", node, std::strerror(errno));
  }
}

void Topology::interleave(std::byte* address, int64_t bytes) const {
  if (num_nodes() == 1) return;
  const hwloc_nodeset_t all = hwloc_bitmap_alloc();
  for (const Node& node : nodes_) hwloc_bitmap_or(all, all, node.object->nodeset);
  if (hwloc_set_area_membind(topology_, address, static_cast<size_t>(bytes), all, HWLOC_MEMBIND_INTERLEAVE,
                             HWLOC_MEMBIND_BYNODESET) != 0) {
    log_warning("kernels", "{} bytes could not be spread over {} NUMA nodes: {}", bytes, num_nodes(),
                std::strerror(errno));
  }
  hwloc_bitmap_free(all);
}

int count_usable_cores() {
  const int cores = Topology::of_this_machine().num_cores();
  const double quota = processor_quota();
  return std::max(1, quota < cores ? static_cast<int>(quota) : cores);
}

}  // namespace tandem::kernels::cpu
