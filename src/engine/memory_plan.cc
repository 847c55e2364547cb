#include "src/engine/memory_plan.h"

#include <algorithm>

namespace tandem::engine {
namespace {

std::string size_text(int64_t bytes) {
  constexpr double kMiB = 1 << 20;
  constexpr double kGiB = 1 << 30;
  const double value = static_cast<double>(bytes);
  return value < kGiB ? fmt::format("{:.1f} MiB", value / kMiB) : fmt::format("{:.2f} GiB", value / kGiB);
}

int64_t blocks_for_tokens(const model::KvLayout& kv, int64_t tokens) {
  return (tokens + kv.block_size - 1) / kv.block_size;
}

Error too_few_blocks(const model::MemoryNeeds& needs, const char* option, int64_t num_blocks, int64_t needed) {
  const int64_t block_bytes = needs.kv.total_block_bytes();
  const int64_t tokens = num_blocks * needs.kv.block_size;
  return invalid_argument(option,
                          "{} KV blocks ({}) cannot hold one request of --max-model-len {}, which needs {} ({}); raise "
                          "--{}{}",
                          num_blocks, size_text(num_blocks * block_bytes), needs.max_model_len, needed,
                          size_text(needed * block_bytes), option,
                          tokens < 2 ? "" : fmt::format(" or lower --max-model-len to {}", tokens));
}

// Says which part is too large, by how much, and what would help.
Error too_little_memory(const model::MemoryNeeds& needs, const MemoryRequest& request, const AvailableMemory& available,
                        int64_t num_blocks, int64_t total_bytes, int64_t limit_bytes) {
  const int64_t block_bytes = needs.kv.total_block_bytes();
  const bool is_given = request.num_blocks > 0 || request.kv_bytes > 0;
  const int64_t room = std::max<int64_t>(0, limit_bytes - needs.weight_bytes - needs.workspace_bytes) / block_bytes;
  std::string remedy = "use a --quantization of fewer bits or a machine with more memory";
  if (needs.workspace_bytes > std::max(needs.weight_bytes, limit_bytes / 2)) {
    remedy = "lower --max-num-batched-tokens or --max-num-seqs, which the workspace grows with";
  }
  if (room > 0 && is_given) {
    remedy = fmt::format("lower {}", request.num_blocks > 0
                                         ? fmt::format("--num-gpu-blocks-override to {}", room)
                                         : fmt::format("--kv-cache-memory-bytes to {}", room * block_bytes));
  } else if (room > 0) {
    remedy = fmt::format("lower --max-model-len to {}, {}", room * needs.kv.block_size, remedy);
  }
  return make_error(ErrorKind::kUnavailable,
                    "the model does not fit: {} of weights, {} of workspace{} and {} of KV cache ({}) are {}; "
                    "--gpu-memory-utilization {} of the {} available ({}) is {}, {} too little; {}",
                    size_text(needs.weight_bytes), size_text(needs.workspace_bytes),
                    needs.staging_bytes > 0 ? fmt::format(" (while loading {})", size_text(needs.staging_bytes)) : "",
                    size_text(num_blocks * block_bytes),
                    is_given ? "as given" : fmt::format("one request of --max-model-len {}", needs.max_model_len),
                    size_text(total_bytes), request.utilization, size_text(available.bytes), available.limited_by,
                    size_text(limit_bytes), size_text(total_bytes - limit_bytes), remedy);
}

}  // namespace

Result<MemoryPlan> plan_memory(const model::MemoryNeeds& needs, const MemoryRequest& request,
                               const AvailableMemory& available) {
  const int64_t block_bytes = needs.kv.total_block_bytes();
  const int64_t needed = blocks_for_tokens(needs.kv, needs.max_model_len);
  const int64_t limit_bytes = static_cast<int64_t>(static_cast<double>(available.bytes) * request.utilization);
  const int64_t room = (limit_bytes - needs.weight_bytes - needs.workspace_bytes) / block_bytes;

  int64_t num_blocks = request.num_blocks;
  if (num_blocks == 0 && request.kv_bytes > 0) num_blocks = request.kv_bytes / block_bytes;
  if (request.num_blocks > 0 || request.kv_bytes > 0) {
    const char* option = request.num_blocks > 0 ? "num-gpu-blocks-override" : "kv-cache-memory-bytes";
    if (num_blocks < needed) return too_few_blocks(needs, option, num_blocks, needed);
  } else {
    const int64_t wanted = request.fill ? room : std::min(room, kDefaultKvBytes / block_bytes);
    num_blocks = std::max(needed, wanted);
  }
  const int64_t serving = needs.weight_bytes + needs.workspace_bytes + num_blocks * block_bytes;
  const int64_t total = std::max(serving, needs.weight_bytes + needs.staging_bytes);
  if (total > limit_bytes) return too_little_memory(needs, request, available, num_blocks, total, limit_bytes);
  return MemoryPlan{num_blocks, total};
}

}  // namespace tandem::engine
