#include "src/ep/all2all.h"

#include <fmt/ranges.h>

#include <vector>

namespace tandem::ep {
namespace {

constexpr All2All kAll[] = {All2All::kAllGather, All2All::kHighThroughput, All2All::kLowLatency, All2All::kNaive};

// Each becomes what serves the same end: one that packs rows by counts, for large batches, or one of fixed capacity
// that tells no counts before, for small ones.
struct Alias {
  const char* name;
  All2All backend;
};
constexpr Alias kAliases[] = {{"deepep_high_throughput", All2All::kHighThroughput},
                              {"deepep_low_latency", All2All::kLowLatency},
                              {"pplx", All2All::kLowLatency},
                              {"flashinfer_all2allv", All2All::kHighThroughput}};

}  // namespace

const char* all2all_name(All2All backend) {
  switch (backend) {
    case All2All::kNaive: return "naive";
    case All2All::kAllGather: return "allgather_reducescatter";
    case All2All::kHighThroughput: return "high_throughput";
    case All2All::kLowLatency: return "low_latency";
  }
  return "unknown";
}

Result<All2AllChoice> parse_all2all_backend(std::string_view name) {
  std::vector<std::string_view> names;
  for (const All2All backend : kAll) {
    if (name == all2all_name(backend)) return All2AllChoice{backend, ""};
    names.emplace_back(all2all_name(backend));
  }
  for (const Alias& alias : kAliases) {
    if (name == alias.name) {
      return All2AllChoice{
          alias.backend, fmt::format("all2all backend {}: {} is used in its place", name, all2all_name(alias.backend))};
    }
    names.emplace_back(alias.name);
  }
  return invalid_argument("all2all-backend", "all2all backend \"{}\" is unknown; choose one of {}", name,
                          fmt::join(names, ", "));
}

}  // namespace tandem::ep
