#include "src/eplb/placement_file.h"

#include <algorithm>
#include <fstream>
#include <iterator>

#include "src/eplb/expert_load.h"
#include "src/eplb/json_checks.h"

namespace tandem::eplb {
namespace {

constexpr const char* kFormat = "tandem-expert-placement";
constexpr size_t kMaxFileBytes = size_t{256} << 20;

Status parse_layer(const nlohmann::json& row, int64_t layer, const Place& place, std::span<int32_t> slots,
                   int64_t num_experts) {
  if (!row.is_array() || row.size() != slots.size()) {
    return place.fault("layer {} has {} slots; num_ranks times slots_per_rank is {}", layer,
                       row.is_array() ? row.size() : 0, slots.size());
  }
  for (size_t s = 0; s < slots.size(); ++s) {
    if (!is_integer_in(row[s], 0, num_experts - 1)) {
      return place.fault("slot {} of layer {} is {}; experts are 0 … {}", s, layer, row[s].dump(), num_experts - 1);
    }
    slots[s] = row[s].get<int32_t>();
  }
  const std::vector<int32_t> copies = count_copies(slots, num_experts);
  const auto missing = std::find(copies.begin(), copies.end(), 0);
  if (missing == copies.end()) return {};
  return place.fault("layer {} has no slot for expert {}", layer, missing - copies.begin());
}

}  // namespace

std::string format_placement(const StoredPlacement& stored) {
  const Placement& placement = stored.placement;
  std::string text = fmt::format(
      R"({{"format":"{}","version":{},"layers":[{}],"num_experts":{},"num_ranks":{},"slots_per_rank":{},"slots":[)",
      kFormat, kFileVersion, fmt::join(stored.layers, ","), placement.num_experts(), placement.num_ranks(),
      placement.slots_per_rank());
  for (int64_t l = 0; l < placement.num_layers(); ++l) {
    fmt::format_to(std::back_inserter(text), "{}\n [{}]", l == 0 ? "" : ",", fmt::join(placement.layer(l), ","));
  }
  return text + "]}\n";
}

Result<StoredPlacement> parse_placement(const std::string& text, const std::string& name) {
  const Place place{name};
  TANDEM_ASSIGN(const nlohmann::json json, parse_object(text, place));
  TANDEM_TRY(check_format(json, kFormat, place));
  StoredPlacement stored;
  TANDEM_ASSIGN(stored.layers, take_layers(json, place));
  Layout layout;
  TANDEM_ASSIGN(layout.num_experts, take_count(json, "num_experts", 1, kMaxExperts, place));
  TANDEM_ASSIGN(layout.num_ranks, take_count(json, "num_ranks", 1, kMaxRanks, place));
  TANDEM_ASSIGN(const int64_t per_rank, take_count(json, "slots_per_rank", 1, kMaxSlotsPerLayer, place));
  layout.num_redundant = layout.num_ranks * per_rank - layout.num_experts;
  if (Status checked = check_layout(layout); !checked.ok()) return place.fault("{}", checked.error().message);
  const auto slots = json.find("slots");
  if (slots == json.end() || !slots->is_array() || slots->size() != stored.layers.size()) {
    return place.fault("\"slots\" must be a list of {} layers, as many as \"layers\" names", stored.layers.size());
  }
  stored.placement = Placement(std::ssize(stored.layers), layout);
  for (size_t l = 0; l < stored.layers.size(); ++l) {
    TANDEM_TRY(parse_layer((*slots)[l], stored.layers[l], place, stored.placement.layer(static_cast<int64_t>(l)),
                           layout.num_experts));
  }
  return stored;
}

Result<StoredPlacement> read_placement_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return make_error(ErrorKind::kNotFound, "{}: cannot be read; give a file of `tandem eplb --output`", path);
  const std::streamoff bytes = file.tellg();
  if (bytes < 0 || static_cast<size_t>(bytes) > kMaxFileBytes) {
    return make_error(ErrorKind::kDataLoss, "{}: has {} bytes; a placement has at most {}", path, bytes, kMaxFileBytes);
  }
  file.seekg(0);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return parse_placement(text, path);
}

}  // namespace tandem::eplb
