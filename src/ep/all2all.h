// The ways by which rows travel to their experts (--all2all-backend).
#pragma once

#include <string>
#include <string_view>

#include "src/base/result.h"

namespace tandem::ep {

enum class All2All : uint8_t {
  kNaive,           // one rank after the other sends all its rows to all: the oracle, and the least memory
  kAllGather,       // all rows to all ranks at once
  kHighThroughput,  // counts first, then each row once to every rank that has an expert of it, packed: for prefill
  kLowLatency,      // each row at once into a place of its source, without counts before: for decode
};
const char* all2all_name(All2All backend);  // as --all2all-backend takes it

struct All2AllChoice {
  All2All backend = All2All::kAllGather;
  std::string note;  // to be shown: what vLLM's name became; empty if the name is our own
};
// Own names, and those that vLLM has or had.
Result<All2AllChoice> parse_all2all_backend(std::string_view name);

}  // namespace tandem::ep
