// Load on an engine without HTTP: requests go into a Worker of this process, and what comes out is timed.
#pragma once

#include <vector>

#include "src/base/clock.h"
#include "src/bench/dataset.h"
#include "src/bench/report.h"
#include "src/engine/worker.h"

namespace tandem::bench {

struct EngineRun {
  std::vector<RequestRecord> records;  // in the order of the prompts
  double duration = 0;                 // seconds from the first submit to the last token
};

// Submits all prompts at once, greedy and without regard to end tokens, and waits for the end of each.
// Prompts must be token ids.
EngineRun run_on_worker(engine::Worker& worker, const std::vector<PromptRequest>& prompts, const Clock& clock);

// What a decode step of `rows` streams reads of the weights if every token chooses its experts evenly: an expert is
// read if any row chose it. `expert_bytes` of `weight_bytes` are in num_experts experts per layer, of which a token
// uses top_k; `lookup_bytes` are tables of which a step reads single rows.
struct WeightTraffic {
  double weight_bytes = 0;
  double expert_bytes = 0;
  double lookup_bytes = 0;
  double num_experts = 1;
  double top_k = 1;

  double bytes_per_step(double rows) const;
};

}  // namespace tandem::bench
