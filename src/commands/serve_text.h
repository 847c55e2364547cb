// Tokenizer, chat template and facts of the model that `tandem serve` serves.
#pragma once

#include "src/api/served_text.h"
#include "src/base/options.h"
#include "src/commands/rank.h"

namespace tandem::commands {

// From the model's folder. Faults: files that do not belong together, a context that cannot hold an answer.
Result<api::ServedText> load_served_text(const Options& options, const RankConfig& config);

}  // namespace tandem::commands
