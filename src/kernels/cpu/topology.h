// The processors and memories that a process may use, as hwloc finds them.
//
// On one NUMA node nothing is bound: the kernel moves a thread away from a busy core, which a bound one would wait for.
// Across nodes, compute threads stay on a node each, and weights and KV blocks lie page by page on all of them in turn,
// so that every memory controller works for every product. Neither changes a bit of any result.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct hwloc_topology;
struct hwloc_obj;

namespace tandem::kernels::cpu {

class Topology {
 public:
  // This machine, without what the process's affinity mask leaves out.
  static const Topology& of_this_machine();
  // A machine as hwloc describes one, such as "numa:2 core:4 pu:2"; `allowed`: processors such as "0-3,8", all if
  // empty. For tests.
  Topology(const std::string& description, const std::string& allowed);
  ~Topology();
  Topology(const Topology&) = delete;

  // Cores with a processor that may be used. Threads that share a core share its arithmetic units: one each is enough.
  int num_cores() const;
  // NUMA nodes with such a processor.
  int num_nodes() const { return static_cast<int>(nodes_.size()); }
  // The node of each of `threads` threads, 0 … num_nodes() - 1: dealt out core by core, the nodes in turn.
  std::vector<int> place_threads(int threads) const;
  // Keeps the calling thread on that node. Nothing on a machine of one node.
  void bind_this_thread(int node) const;
  // Spreads pages that nobody has touched yet over the nodes. Nothing on a machine of one node.
  void interleave(std::byte* address, int64_t bytes) const;

 private:
  struct Node {
    const hwloc_obj* object;
    int cores;
  };
  Topology();
  void find_nodes();

  hwloc_topology* topology_ = nullptr;
  std::vector<Node> nodes_;
};

// Cores that this process may use at once: those of Topology::of_this_machine(), or what its control group's quota of
// processor time is worth, if less; at least one.
int count_usable_cores();

}  // namespace tandem::kernels::cpu
