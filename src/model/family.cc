#include "src/model/family.h"

namespace tandem::model {
namespace {

constexpr const Family* kFamilies[] = {&kDeepseekV3, &kQwen3Moe};

}  // namespace

std::span<const Family* const> families() { return kFamilies; }

const Family* find_family(std::string_view architecture) {
  for (const Family* family : kFamilies) {
    if (family->architecture == architecture) return family;
  }
  return nullptr;
}

}  // namespace tandem::model
